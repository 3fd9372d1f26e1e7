"""Training on a GPU: the layer-wise step on NF4 weights against PEFT and ordinary autograd; the paged optimizer."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor

from adapters.manifest import AdapterManifest
from app.engine.base_model import BaseModel
from app.training.adapter import MasterPair, TrainedAdapter
from app.training.examples import TokenSequence
from app.training.micro_step import Part, micro_step
from app.training.optimizer import AdapterOptimizer, RateSchedule
from tests.engine_rig import random_prompt, request
from tests.gpu.conftest import LoadBase
from tests.gpu.rig import PeftOnBase, run_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

R = TypeVar("R")
RANK, SCALING = 8, 2.0
# Relative norm of the difference of one tensor's gradients. bf16 rounds activations and their gradients at every layer.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


def drain(steps: Generator[None, None, R]) -> R:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def random_adapter(base: BaseModel, seed: int) -> TrainedAdapter:
    g = torch.Generator().manual_seed(seed)
    pairs = {}
    for index, path in enumerate(base.lora.paths):
        i, o = base.spec.linears[path]
        a, b = torch.randn(RANK, i, generator=g) * 0.05, torch.randn(o, RANK, generator=g) * 0.05
        pairs[index] = MasterPair(*(t.to(base.device).requires_grad_(True) for t in (a, b)))
    return TrainedAdapter(pairs, SCALING)


def example(length: int, seed: int, first_label: int = 3) -> TokenSequence:
    ids = np.random.default_rng(seed).integers(3, 290, length).astype(np.int32)
    labels = np.zeros(length, np.bool_)
    labels[first_label:] = True
    return TokenSequence(ids, labels)


SEQUENCES = [example(60, 1), example(17, 2), example(130, 3, first_label=100)]


def gradients_of_peft(base: BaseModel, data_dir: Path, adapter: TrainedAdapter) -> tuple[float, list[Tensor]]:
    """Mean loss over label tokens and the gradients of a and b of each linear, all layers in one graph."""
    config = LoraConfig(
        r=RANK, lora_alpha=SCALING * RANK, target_modules=sorted(base.spec.target_kinds), lora_dropout=0.0
    )
    model: Any = get_peft_model(PeftOnBase(base, data_dir).model, config)
    leaves: list[Tensor] = []
    for index, path in enumerate(base.lora.paths):
        module = model.base_model.model.get_submodule(path)
        for factors, values in ((module.lora_A, adapter.pairs[index].a), (module.lora_B, adapter.pairs[index].b)):
            factors["default"].weight.data = values.detach().clone()
            leaves.append(factors["default"].weight.requires_grad_(True))
    losses = []
    for sequence in SEQUENCES:
        ids = torch.tensor(sequence.ids.astype("int64"), device=base.device)[None]
        at = torch.tensor(sequence.labels.nonzero()[0], device=base.device)
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        losses.append(F.cross_entropy(logits[at - 1], ids[0, at], reduction="sum"))
    loss = torch.stack(losses).sum() / sum(s.num_labels for s in SEQUENCES)
    return loss.item(), list(torch.autograd.grad(loss, leaves))


def layerwise(base: BaseModel, adapter: TrainedAdapter) -> float:
    adapter.clear_gradients()
    weight = 1 / sum(s.num_labels for s in SEQUENCES)
    (result,) = drain(micro_step(base, [Part(adapter, SEQUENCES, weight, ("a", "b", "c"))]))
    return result.loss


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_on_nf4_equal_peft_before_and_after_serving(
    load_base: LoadBase, data_dir: Path, adapter_dirs: list[Path], dtype: str
) -> None:
    base = load_base("nf4", dtype)
    adapter, before = random_adapter(base, 1), base.checksums()
    loss, want = gradients_of_peft(base, data_dir, adapter)

    def ask(adapters: list[AdapterManifest]) -> list[Any]:
        prompts = [random_prompt(40, base.shapes.vocab_size, i) for i in range(len(adapters))]
        return [request(f"r{i}", p, a, max_tokens=4) for i, (p, a) in enumerate(zip(prompts, adapters, strict=True))]

    for _ in range(2):
        assert abs(layerwise(base, adapter) - loss) < TOLERANCE[dtype] * loss
        for got, wanted in zip(adapter.gradients, want, strict=True):
            assert wanted.norm() > 0
            assert (got - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()
        run_engine(base, adapter_dirs, ask)
    assert base.checksums() == before


def test_paged_adamw_steps_like_plain_adamw(load_base: LoadBase) -> None:
    base = load_base("nf4", "float32")
    adapter = random_adapter(base, 1)
    plain = [t.detach().clone().requires_grad_(True) for t in adapter.parameters]
    reference = torch.optim.AdamW(plain, lr=1e-3, weight_decay=0.0)
    optimizer = AdapterOptimizer(adapter, RateSchedule("constant", 1e-3, 0, 10), max_grad_norm=1e9)
    for step in range(3):
        layerwise(base, adapter)
        for parameter, gradient in zip(plain, adapter.gradients, strict=True):
            parameter.grad = gradient.detach().clone()
        reference.step()
        assert optimizer.step(step).is_finite
    for got, want in zip(adapter.parameters, plain, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_a_restored_optimizer_goes_on_as_the_first_would(load_base: LoadBase) -> None:
    base = load_base("nf4", "float32")
    schedule = RateSchedule("linear", 1e-3, 1, 6)

    def take(optimizer: AdapterOptimizer, adapter: TrainedAdapter, steps: range) -> None:
        for step in steps:
            layerwise(base, adapter)
            optimizer.step(step)

    whole, first = random_adapter(base, 1), random_adapter(base, 1)
    take(AdapterOptimizer(whole, schedule, max_grad_norm=1.0), whole, range(4))
    optimizer = AdapterOptimizer(first, schedule, max_grad_norm=1.0)
    take(optimizer, first, range(2))
    kept = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    second = random_adapter(base, 2)
    with torch.no_grad():
        for new, old in zip(second.parameters, first.parameters, strict=True):
            new.copy_(old)
    resumed = AdapterOptimizer(second, schedule, max_grad_norm=1.0)
    resumed.restore(kept)
    take(resumed, second, range(2, 4))
    for got, want in zip(second.parameters, whole.parameters, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
