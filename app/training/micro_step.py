"""One training micro-step, layer by layer, as a generator: the engine can decode between any two layers.

Forward without a graph, keeping each layer's input; loss on the label positions only; then backward from the last
layer, recomputing one layer at a time with gradients. Memory is that of full gradient checkpointing, and loss and
gradients are those of ordinary autograd. The base is never put in training mode and never changed. Engine thread only.

Shapes: `B` rows, `T` tokens of the longest row, `N` label positions of all rows, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from app.engine.base_model import BaseModel
from app.training.adapter import PlanPart, TrainedAdapter, TrainingPlan
from app.training.examples import TokenSequence

# Label positions whose logits exist at a time. On a CPU the head is the longest quantum by far (32 positions of SmolLM2
# are 5 GFLOP with their gradient), and serving waits for each; on a GPU large products are worth more than short ones.
HEAD_CHUNK = {"cpu": 32, "cuda": 1024}
Quanta = Generator[None, None, "list[PartResult]"]


@dataclass(frozen=True, slots=True)
class Part:
    """One job's share of a micro-step.

    Supervised: every sequence is an example, and `weight` is 1 / (label tokens of the whole optimizer step).
    DPO (`beta` set): sequences come in pairs (preferred, rejected), and `weight` is 1 / (pairs of the optimizer step).
    """

    adapter: TrainedAdapter
    sequences: Sequence[TokenSequence]
    weight: float
    row_keys: tuple[str, ...]  # names of the rows, unique within the job, for dropout
    beta: float | None = None
    reference: TrainedAdapter | None = None  # dpo: what the policy is compared with; None is the base


@dataclass(frozen=True, slots=True)
class PartResult:
    """What one part came to; sums, so that micro-steps can be added up."""

    loss: float  # weighted: the parts of an optimizer step add up to its mean loss
    nll: float  # sum over label tokens
    num_labels: int
    num_correct: int  # label tokens that were the most likely ones; dpo: pairs whose margin is positive
    num_units: int  # what num_correct is out of: label tokens, or pairs
    num_tokens: int


@dataclass(frozen=True, slots=True)
class _Packed:
    ids: Tensor  # [B, T]
    positions: Tensor  # [B, T]
    rows: Tensor  # [N] row of each label position
    before: Tensor  # [N] the position that predicts it
    targets: Tensor  # [N]
    parts: list[PlanPart]
    label_slices: list[slice]  # each part's share of the N


def micro_step(base: BaseModel, parts: Sequence[Part], *, train: bool = True) -> Quanta:
    """Yield after every layer and every chunk of the head; return a result per part.

    With `train`, gradients are added to each part's adapter; without, nothing changes and dropout is off.
    """
    packed = _pack(base, parts)
    plan = TrainingPlan(packed.parts, with_dropout=train)
    hidden, inputs, rotary = yield from _forward(base, packed, plan, keep_inputs=train)
    selected = hidden[packed.rows, packed.before]
    reference = None
    if any(part.beta is not None for part in parts):
        reference = yield from _reference_nll(base, packed, parts)
    nll = None
    if reference is not None or not train:
        # The slope of a pair's loss depends on the whole pair: all log-likelihoods come before any derivative.
        nll, correct = yield from _head_forward(base, selected, packed.targets)
        if not train:
            return _results(packed, parts, nll, correct, reference)
    weights = _token_weights(packed, parts, nll, reference)
    grad_selected, nll, correct = yield from _head_backward(base, selected, packed.targets, weights)
    results = _results(packed, parts, nll, correct, reference)
    grad = torch.zeros_like(hidden).index_put_((packed.rows, packed.before), grad_selected, accumulate=True)
    yield from _backward(base, packed, plan, inputs, rotary, grad)
    return results


@contextmanager
def _planned(base: BaseModel, plan: TrainingPlan | None) -> Iterator[None]:
    """The plan is set for one quantum only: between quanta the seam belongs to serving."""
    base.lora.plan = plan
    try:
        yield
    finally:
        base.lora.plan = None


def _pack(base: BaseModel, parts: Sequence[Part]) -> _Packed:
    sequences = [s for part in parts for s in part.sequences]
    width = max(len(s.ids) for s in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    rows, before, targets, slices, plan_parts = [], [], [], [], []
    row = count = 0
    for part in parts:
        first, began = row, count
        for sequence in part.sequences:
            own = torch.from_numpy(sequence.ids.astype("int64"))
            ids[row, : len(own)] = own
            at = torch.from_numpy(sequence.labels.nonzero()[0])
            rows.append(torch.full_like(at, row))
            before.append(at - 1)
            targets.append(own[at])
            count += len(at)
            row += 1
        lengths = tuple(len(s.ids) for s in part.sequences)
        plan_parts.append(PlanPart(part.adapter, first, row, part.row_keys, lengths))
        slices.append(slice(began, count))
    positions = torch.arange(width).expand(len(sequences), width)
    return _Packed(
        ids=ids.to(base.device),
        positions=positions.to(base.device),
        rows=torch.cat(rows).to(base.device),
        before=torch.cat(before).to(base.device),
        targets=torch.cat(targets).to(base.device),
        parts=plan_parts,
        label_slices=slices,
    )


def _forward(
    base: BaseModel, packed: _Packed, plan: TrainingPlan | None, *, keep_inputs: bool
) -> Generator[None, None, tuple[Tensor, list[Tensor], tuple[Tensor, Tensor]]]:
    with torch.no_grad():
        hidden, rotary = base.embed_and_rotate(packed.ids, packed.positions)
    inputs: list[Tensor] = []
    for index in range(base.shapes.num_layers):
        if keep_inputs:
            inputs.append(hidden)
        with torch.no_grad(), _planned(base, plan):
            hidden = base.run_layer(index, hidden, rotary, packed.positions)
        yield
    return hidden, inputs, rotary


def _reference_nll(base: BaseModel, packed: _Packed, parts: Sequence[Part]) -> Generator[None, None, Tensor]:
    """[N] negative log-likelihoods under what each part is compared with: the bare base, or the adapter it began at."""
    plan_parts = [
        PlanPart(part.reference, p.first, p.last, p.row_keys, p.lengths)
        for part, p in zip(parts, packed.parts, strict=True)
        if part.reference is not None
    ]
    plan = _ReferencePlan(plan_parts) if plan_parts else None
    hidden, _, _ = yield from _forward(base, packed, plan, keep_inputs=False)
    nll, _ = yield from _head_forward(base, hidden[packed.rows, packed.before], packed.targets)
    return nll


class _ReferencePlan(TrainingPlan):
    """Adds the reference adapters to their rows and leaves all other rows to the base."""

    def __init__(self, parts: Sequence[PlanPart]) -> None:
        super().__init__(parts, with_dropout=False)

    def apply(self, linear: int, x: Tensor, y: Tensor) -> Tensor:
        for part in self._parts:
            own = slice(part.first, part.last)
            y[own] = self._added(part, linear, x[own], y[own])
        return y


def _chunks(t: Tensor) -> list[Tensor]:
    size = HEAD_CHUNK[t.device.type]
    return [t[i : i + size] for i in range(0, len(t), size)]


def _head_forward(base: BaseModel, selected: Tensor, targets: Tensor) -> Generator[None, None, tuple[Tensor, Tensor]]:
    """selected `[N, hidden]` -> negative log-likelihood and whether the target was the most likely, both `[N]`."""
    nll, correct = [], []
    for chunk, wanted in zip(_chunks(selected), _chunks(targets), strict=True):
        with torch.no_grad():
            logits = base.logits(chunk)
            nll.append(F.cross_entropy(logits, wanted, reduction="none"))
            correct.append(logits.argmax(-1) == wanted)
        yield
    return torch.cat(nll), torch.cat(correct)


def _head_backward(
    base: BaseModel, selected: Tensor, targets: Tensor, weights: Tensor
) -> Generator[None, None, tuple[Tensor, Tensor, Tensor]]:
    """The gradient of sum(weights * nll) by `selected`, in chunks, so that full logits never exist."""
    grads, nll, correct = [], [], []
    for chunk, wanted, weight in zip(_chunks(selected), _chunks(targets), _chunks(weights), strict=True):
        with torch.enable_grad():
            leaf = chunk.detach().requires_grad_(True)
            logits = base.logits(leaf)
            loss = F.cross_entropy(logits, wanted, reduction="none")
            (grad,) = torch.autograd.grad((loss * weight).sum(), [leaf])
        grads.append(grad)
        nll.append(loss.detach())
        correct.append(logits.detach().argmax(-1) == wanted)
        yield
    return torch.cat(grads), torch.cat(nll), torch.cat(correct)


def _backward(
    base: BaseModel,
    packed: _Packed,
    plan: TrainingPlan,
    inputs: list[Tensor],
    rotary: tuple[Tensor, Tensor],
    grad: Tensor,
) -> Generator[None, None, None]:
    per_layer = _linears_by_layer(base)
    for index in reversed(range(base.shapes.num_layers)):
        leaves = [
            (part.adapter, linear, part.adapter.pairs[linear])
            for part in packed.parts
            for linear in per_layer[index]
            if linear in part.adapter.pairs
        ]
        with torch.enable_grad(), _planned(base, plan):
            x = inputs.pop().detach().requires_grad_(True)
            out = base.run_layer(index, x, rotary, packed.positions)
            own = [t for _, _, pair in leaves for t in (pair.a, pair.b)]
            grad, *grads = torch.autograd.grad(out, [x, *own], grad)
        for (adapter, linear, _), a, b in zip(leaves, grads[0::2], grads[1::2], strict=True):
            adapter.accumulate(linear, a, b)
        yield


def _linears_by_layer(base: BaseModel) -> list[list[int]]:
    """The numbers of the wrapped linears of each layer: paths are `model.layers.<n>.…`."""
    found: list[list[int]] = [[] for _ in range(base.shapes.num_layers)]
    for index, path in enumerate(base.lora.paths):
        found[int(path.split(".layers.", 1)[1].split(".", 1)[0])].append(index)
    return found


# ---- losses


def _pair_margins(nll: Tensor, reference: Tensor, rows: Tensor, first: int, last: int) -> Tensor:
    """log-ratio(preferred) - log-ratio(rejected) of each pair in rows [first, last): `[(last - first) / 2]`.

    nll and reference are a part's label positions; rows says which row each lies in.
    """
    ratio = torch.zeros(last - first, dtype=nll.dtype, device=nll.device)
    ratio.index_add_(0, rows - first, reference - nll)
    return ratio[0::2] - ratio[1::2]


def _token_weights(packed: _Packed, parts: Sequence[Part], nll: Tensor | None, reference: Tensor | None) -> Tensor:
    """[N] the derivative of the weighted loss by each label token's negative log-likelihood.

    DPO (Rafailov et al., 2023): loss = -log sigmoid(beta * margin), whose derivative by the margin is
    -beta * sigmoid(-beta * margin); the margin falls by the preferred answer's nll and grows by the rejected one's.
    """
    weights = torch.empty(len(packed.targets), device=packed.targets.device)
    for part, p, share in zip(parts, packed.parts, packed.label_slices, strict=True):
        if part.beta is None:
            weights[share] = part.weight
            continue
        assert reference is not None
        assert nll is not None
        rows = packed.rows[share]
        margins = _pair_margins(nll[share], reference[share], rows, p.first, p.last)
        slope = part.weight * part.beta * torch.sigmoid(-part.beta * margins)
        signed = torch.stack([slope, -slope], 1).reshape(-1)
        weights[share] = signed[rows - p.first]
    return weights


def _results(
    packed: _Packed, parts: Sequence[Part], nll: Tensor, correct: Tensor, reference: Tensor | None
) -> list[PartResult]:
    results = []
    for part, p, share in zip(parts, packed.parts, packed.label_slices, strict=True):
        own, labels, tokens = nll[share], share.stop - share.start, sum(p.lengths)
        if part.beta is None:
            loss, good, units = float(own.sum()) * part.weight, int(correct[share].sum()), labels
        else:
            assert reference is not None
            margins = _pair_margins(own, reference[share], packed.rows[share], p.first, p.last)
            loss = float(-F.logsigmoid(part.beta * margins).sum()) * part.weight
            good, units = int((margins > 0).sum()), len(margins)
        results.append(PartResult(loss, float(own.sum()), labels, good, units, tokens))
    return results
