"""The layer-wise step against PEFT and ordinary autograd, and DPO against a plain implementation (fp32)."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from app.engine.base_model import BaseModel, load_base_model
from app.training.adapter import TrainedAdapter, _on_device
from app.training.examples import TokenSequence
from app.training.micro_step import Part, micro_step
from tests.tiny import build_base

R = TypeVar("R")
RELATIVE = 1e-5
SCALING = 2.0
RANK = 4


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("base"), num_layers=3)


@pytest.fixture(scope="module")
def base(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base_model(
        str(base_dir), tmp_path_factory.mktemp("data"), quantization="none", dtype="float32", device="cpu"
    )


def drain(steps: Generator[None, None, R]) -> R:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def random_adapter(base: BaseModel, seed: int, dropout: float = 0.0) -> TrainedAdapter:
    g = torch.Generator().manual_seed(seed)
    pairs = {}
    for index, path in enumerate(base.lora.paths):
        i, o = base.spec.linears[path]
        a, b = torch.randn(RANK, i, generator=g) * 0.05, torch.randn(o, RANK, generator=g) * 0.05
        pairs[index] = _on_device(a, b, base.device)
    return TrainedAdapter(pairs, SCALING, dropout, dropout_seed=seed)


def example(length: int, seed: int, first_label: int = 3) -> TokenSequence:
    ids = np.random.default_rng(seed).integers(3, 290, length).astype(np.int32)
    labels = np.zeros(length, np.bool_)
    labels[first_label:] = True
    return TokenSequence(ids, labels)


class PeftReference:
    """The same adapter in PEFT, on transformers' own attention, with autograd through everything."""

    def __init__(self, base_dir: Path, base: BaseModel, adapter: TrainedAdapter) -> None:
        from transformers import AutoModelForCausalLM

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from peft import LoraConfig, get_peft_model

            kinds = sorted(base.spec.target_kinds)
            config = LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=kinds, lora_dropout=0.0)
            self.model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32), config)
        self.leaves: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for index, path in enumerate(base.lora.paths):
            module: Any = self.model.base_model.model.get_submodule(path)
            module.lora_A["default"].weight.data.copy_(adapter.pairs[index].a)
            module.lora_B["default"].weight.data.copy_(adapter.pairs[index].b)
            self.leaves[index] = (module.lora_A["default"].weight, module.lora_B["default"].weight)

    def nll(self, sequence: TokenSequence, *, adapted: bool = True) -> torch.Tensor:
        """Sum of the label tokens' negative log-likelihoods."""
        ids = torch.tensor(sequence.ids.astype("int64"))[None]
        if adapted:
            logits = self.model(input_ids=ids).logits[0]
        else:
            with self.model.disable_adapter(), torch.no_grad():
                logits = self.model(input_ids=ids).logits[0]
        at = torch.tensor(sequence.labels.nonzero()[0])
        return F.cross_entropy(logits[at - 1], ids[0, at], reduction="sum")

    def gradients(self, loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, [t for pair in self.leaves.values() for t in pair]))


def assert_same(got: list[torch.Tensor], want: list[torch.Tensor], tolerance: float = RELATIVE) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() + 1e-9


def test_gradients_equal_peft_and_autograd_also_after_serving(base: BaseModel, base_dir: Path) -> None:
    adapter, sequences = random_adapter(base, 1), [example(40, 1), example(17, 2), example(33, 3, first_label=20)]
    labels = sum(s.num_labels for s in sequences)
    reference = PeftReference(base_dir, base, adapter)
    loss = torch.stack([reference.nll(s) for s in sequences]).sum() / labels
    want = reference.gradients(loss)
    before = base.checksums()
    for _ in range(2):  # before and after the base has generated
        adapter.clear_gradients()
        (result,) = drain(micro_step(base, [Part(adapter, sequences, 1 / labels, ("a", "b", "c"))]))
        assert abs(result.loss - loss.item()) < RELATIVE * loss.item()
        assert result.num_labels == labels
        assert_same(adapter.gradients, want)
        with torch.inference_mode():
            base.body(input_ids=torch.arange(5, 50)[None], use_cache=False)
    assert base.checksums() == before
    assert base.lora.plan is None


def test_the_seam_is_free_at_every_pause(base: BaseModel) -> None:
    steps = micro_step(base, [Part(random_adapter(base, 1), [example(20, 1)], 1.0, ("a",))])
    pauses = 0
    for _ in steps:
        pauses += 1
        assert base.lora.plan is None
    assert pauses == 2 * base.shapes.num_layers + 1  # 17 labels are one chunk of the head


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_joint_training_equals_training_alone(base: BaseModel, dropout: float) -> None:
    def parts() -> list[Part]:
        one, two = random_adapter(base, 1, dropout), random_adapter(base, 2, dropout)
        return [
            Part(one, [example(40, 1), example(12, 2)], 0.1, ("0/0", "0/1")),
            Part(two, [example(25, 3)], 0.2, ("0/0",)),
        ]

    joint, alone = parts(), parts()
    together = drain(micro_step(base, joint))
    for part, other, result in zip(joint, alone, together, strict=True):
        (solo,) = drain(micro_step(base, [other]))
        assert abs(solo.loss - result.loss) < 1e-5
        assert_same(part.adapter.gradients, other.adapter.gradients)


def test_dropout_really_drops_and_repeats_itself(base: BaseModel) -> None:
    def gradients(key: str, dropout: float) -> list[torch.Tensor]:
        adapter = random_adapter(base, 1, dropout)
        drain(micro_step(base, [Part(adapter, [example(30, 1)], 1.0, (key,))]))
        return adapter.gradients

    assert_same(gradients("0/0", 0.3), gradients("0/0", 0.3), 0)
    for other in (gradients("1/0", 0.3), gradients("0/0", 0.0)):
        assert (other[0] - gradients("0/0", 0.3)[0]).norm() > 1e-3 * other[0].norm()


def test_accumulated_micro_steps_equal_one(base: BaseModel) -> None:
    whole, split = random_adapter(base, 1), random_adapter(base, 1)
    sequences = [example(30, 1), example(9, 2)]
    drain(micro_step(base, [Part(whole, sequences, 0.05, ("a", "b"))]))
    for sequence, key in zip(sequences, "ab", strict=True):
        drain(micro_step(base, [Part(split, [sequence], 0.05, (key,))]))
    assert_same(split.gradients, whole.gradients)


@pytest.mark.parametrize("continued", [False, True])
def test_dpo_equals_a_plain_implementation(base: BaseModel, base_dir: Path, continued: bool) -> None:
    adapter, beta = random_adapter(base, 1), 0.3
    start = random_adapter(base, 5) if continued else None
    pairs = [example(20, 1), example(26, 2), example(15, 3), example(11, 4)]
    policy = PeftReference(base_dir, base, adapter)
    frozen = PeftReference(base_dir, base, start) if start else policy
    ratios = []
    for sequence in pairs:
        with torch.no_grad():
            anchor = frozen.nll(sequence, adapted=continued)
        ratios.append(anchor - policy.nll(sequence))
    margins = torch.stack([ratios[0] - ratios[1], ratios[2] - ratios[3]])
    loss = -F.logsigmoid(beta * margins).mean()
    part = Part(adapter, pairs, 1 / 2, ("a", "b", "c", "d"), beta=beta, reference=start)
    (result,) = drain(micro_step(base, [part]))
    assert abs(result.loss - loss.item()) < 1e-5
    assert result.num_correct == int((margins > 0).sum())
    assert_same(adapter.gradients, policy.gradients(loss), 1e-4)  # differences of sums of logs: one digit less


def test_evaluation_changes_nothing_and_agrees_with_training(base: BaseModel) -> None:
    adapter = random_adapter(base, 1, dropout=0.5)
    part = Part(adapter, [example(30, 1)], 1.0, ("a",))
    (measured,) = drain(micro_step(base, [part], train=False))
    assert not adapter.grads
    plain = replace(part, adapter=random_adapter(base, 1))
    (trained,) = drain(micro_step(base, [plain]))
    assert abs(measured.nll - trained.nll) < 1e-4
