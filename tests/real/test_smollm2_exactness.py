"""SmolLM2 in fp32: mixed batches on the engine give the tokens of PEFT running each adapter alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from adapters.manifest import AdapterManifest
from app.engine.base_model import BaseModel, load_base_model
from tests.engine_rig import Answer, random_prompt, request
from tests.numerics.test_exactness import KINDS, PROMPTS, Rig
from tests.peft_oracle import Oracle
from tests.tiny import build_adapter

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

LOGPROB_TOLERANCE = 5e-4  # fp32, 30 layers, as in the design's decisions
COUNT = 6  # tokens of an answer
KINDS = [kind | ({"layers_to_transform": [0, 7, 29]} if "layers_to_transform" in kind else {}) for kind in KINDS]
STRENGTH = 0.02  # of B: strong enough that each adapter answers something of its own

Golden = tuple[list[int], list[float]]


@pytest.fixture(scope="module")
def adapter_dirs(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [
        build_adapter(root / f"a{i}", smollm2_dir, seed=i, strength=STRENGTH, **kind)  # type: ignore[arg-type]
        for i, kind in enumerate(KINDS)
    ]


@pytest.fixture(scope="module")
def base(smollm2_dir: Path, model_cache: Path) -> BaseModel:
    return load_base_model(str(smollm2_dir), model_cache, quantization="none", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def alone(smollm2_dir: Path) -> Callable[[list[int], Path | None], Golden]:
    """What PEFT answers to a prompt with one adapter, computed once."""
    oracle, known = Oracle(smollm2_dir), {}

    def ask(prompt: list[int], adapter: Path | None) -> Golden:
        key = (tuple(prompt), adapter)
        if key not in known:
            known[key] = oracle.greedy(prompt, COUNT, adapter)
        return known[key]

    return ask


@pytest.fixture
def rig(base: BaseModel, adapter_dirs: list[Path]) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(**config: object) -> Rig:
        rigs.append(Rig(base, adapter_dirs, **config))
        return rigs[-1]

    yield make
    for made in rigs:
        made.engine.stop()
        made.engine.check()


def assert_equal(name: str, got: Answer, want: Golden) -> None:
    assert got.tokens == want[0], name
    assert torch.allclose(torch.tensor(got.logprobs), torch.tensor(want[1]), atol=LOGPROB_TOLERANCE), name


def kv_bytes(base: BaseModel, num_tokens: int) -> int:
    shapes = base.shapes
    return num_tokens * shapes.num_layers * 2 * shapes.num_kv_heads * shapes.head_dim * 4


@pytest.mark.parametrize("case", ["as it comes", "prompts in chunks, adapters swapped", "preemption"])
def test_mixed_batch_equals_each_adapter_alone(
    case: str,
    rig: Callable[..., Rig],
    base: BaseModel,
    adapter_dirs: list[Path],
    alone: Callable[[list[int], Path | None], Golden],
) -> None:
    # One step computes all prompts, in blocks of 4, and two blocks are left: then they all decode, and run out.
    few_blocks = {
        "block_size": 4,
        "max_batch_tokens": 2048,
        "max_prefill_tokens": 2048,
        "placements_per_step": len(KINDS),
        "kv_cache_bytes": kv_bytes(base, sum(-(-n // 4) * 4 for n in PROMPTS) + 8),
    }
    config: dict[str, object] = {
        "as it comes": {},
        "prompts in chunks, adapters swapped": {"max_batch_tokens": 96, "pool_rows": 96},
        "preemption": few_blocks,
    }[case]
    made = rig(**{"kv_cache_bytes": kv_bytes(base, 4096)} | config)
    owners: list[tuple[AdapterManifest | None, Path | None]] = [
        *zip(made.adapters, adapter_dirs, strict=True),
        (None, None),
        (None, None),
    ]
    prompts = [random_prompt(length, base.shapes.vocab_size, i) for i, length in enumerate(PROMPTS)]
    answers = made.run(
        *(request(f"r{i}", prompts[i], adapter, max_tokens=COUNT) for i, (adapter, _) in enumerate(owners))
    )
    for i, (_, directory) in enumerate(owners):
        assert_equal(f"r{i}", answers[f"r{i}"], alone(prompts[i], directory))
    snapshot = made.engine.snapshot
    if case == "preemption":
        assert snapshot.scheduler.num_preemptions > 0
    if case == "prompts in chunks, adapters swapped":
        assert snapshot.evictions > 0


def test_every_adapter_answers_something_of_its_own(
    alone: Callable[[list[int], Path | None], Golden], adapter_dirs: list[Path], base: BaseModel
) -> None:
    prompt = random_prompt(31, base.shapes.vocab_size, 31)
    scores = {tuple(alone(prompt, directory)[1]) for directory in (None, *adapter_dirs)}
    assert len(scores) == len(adapter_dirs) + 1, "else the comparisons above would not see a mix-up"


def test_prefix_cache_hits_change_no_token(
    rig: Callable[..., Rig],
    base: BaseModel,
    adapter_dirs: list[Path],
    alone: Callable[[list[int], Path | None], Golden],
) -> None:
    made = rig(kv_cache_bytes=kv_bytes(base, 4096))
    shared = random_prompt(100, base.shapes.vocab_size, 99)
    for turn in range(2):
        prompt = shared + random_prompt(5, base.shapes.vocab_size, 1000 + turn)
        owners = [*zip(made.adapters, adapter_dirs, strict=True), (None, None)]
        made.run(*(request(f"{turn}-{i}", prompt, a, max_tokens=COUNT) for i, (a, _) in enumerate(owners)))
        for i, (_, directory) in enumerate(owners):
            assert_equal(f"{turn}-{i}", made.sink.answers[f"{turn}-{i}"], alone(prompt, directory))
    for i in range(len(owners)):
        finished = made.sink.answers[f"1-{i}"].finished
        assert finished is not None
        assert finished.timings is not None
        assert finished.timings.cached_tokens >= 96, "the shared blocks were found"
