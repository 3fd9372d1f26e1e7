"""Mixed batches on the real engine against PEFT running each adapter alone, token by token (fp32, random Llama)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from adapters.manifest import AdapterManifest
from app.engine.assembly import EngineConfig, assemble_engine
from app.engine.base_model import BaseModel, load_base_model
from app.engine.engine import Engine
from tests.engine_rig import Answer, Collector, DirectoryLoader, random_prompt, request
from tests.peft_oracle import Oracle
from tests.tiny import build_adapter, build_base

LOGPROB_TOLERANCE = 1e-4  # fp32, as in the design's decisions
KINDS: list[dict[str, object]] = [
    {"r": 4},
    {"r": 8, "alpha": 8},
    {"r": 16, "rslora": True},
    {"r": 64, "alpha": 32},
    {"r": 8, "rank_pattern": {"q_proj": 16, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"v_proj": 4}},
    {"r": 16, "target_modules": ["q_proj", "v_proj"]},
    {"r": 4, "layers_to_transform": [1]},
    {"r": 8, "target_modules": ["gate_proj", "up_proj", "down_proj"], "rslora": True, "rank_pattern": {"up_proj": 3}},
]
PROMPTS = [1, 7, 31, 64, 65, 130, 257, 400, 600, 12]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("base"), max_context=1024)


@pytest.fixture(scope="module")
def adapter_dirs(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [build_adapter(root / f"a{i}", base_dir, seed=i, **kind) for i, kind in enumerate(KINDS)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def base(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base_model(
        str(base_dir), tmp_path_factory.mktemp("data"), quantization="none", dtype="float32", device="cpu"
    )


@pytest.fixture(scope="module")
def oracle(base_dir: Path) -> Oracle:
    return Oracle(base_dir)


class Rig:
    """One engine, driven step by step in the test's own thread."""

    def __init__(self, base: BaseModel, dirs: list[Path], **config: object) -> None:
        self.loader = DirectoryLoader(base)
        self.adapters = [self.loader.add(f"tenant{i}", d) for i, d in enumerate(dirs)]
        self.engine: Engine = assemble_engine(base, self.loader, EngineConfig(**config))  # type: ignore[arg-type]
        self.engine.start()
        self.sink = Collector()

    def run(self, *requests: object) -> dict[str, Answer]:
        for r in requests:
            self.engine.submit(r, self.sink)  # type: ignore[arg-type]
        assert self.engine.drain(120)
        self.engine._draining = False
        return self.sink.answers


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


def assert_equals_oracle(
    answers: dict[str, Answer],
    oracle: Oracle,
    cases: dict[str, tuple[list[int], Path | None]],
    count: int,
) -> None:
    for name, (prompt, directory) in cases.items():
        want, scores = oracle.greedy(prompt, count, directory)
        got = answers[name]
        assert got.tokens == want, name
        assert torch.allclose(torch.tensor(got.logprobs), torch.tensor(scores), atol=LOGPROB_TOLERANCE), name


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="as it comes"),
        pytest.param({"max_batch_tokens": 40, "max_sequences": 40}, id="prompts cut into chunks"),
        pytest.param({"pool_rows": 80}, id="adapters swapped in and out"),
        pytest.param({"kv_cache_bytes": 830_000, "block_size": 4, "max_prefill_tokens": 512}, id="preemption forced"),
    ],
)
def test_mixed_batch_equals_each_adapter_alone(
    rig: Callable[..., Rig], config: dict[str, object], adapter_dirs: list[Path], oracle: Oracle, base: BaseModel
) -> None:
    made = rig(**config)
    owners: list[AdapterManifest | None] = [*made.adapters, None, None]
    cases, requests = {}, []
    for i, (adapter, length) in enumerate(zip(owners, PROMPTS, strict=True)):
        prompt = random_prompt(length, base.shapes.vocab_size, i)
        cases[f"r{i}"] = (prompt, adapter_dirs[i] if adapter else None)
        requests.append(request(f"r{i}", prompt, adapter, max_tokens=12))
    answers = made.run(*requests)
    assert_equals_oracle(answers, oracle, cases, 12)
    if "kv_cache_bytes" in config:
        assert made.engine.snapshot.scheduler.num_preemptions > 0
    if "pool_rows" in config:
        assert made.engine.snapshot.evictions > 0


def test_prefix_cache_hits_change_no_token(
    rig: Callable[..., Rig], adapter_dirs: list[Path], oracle: Oracle, base: BaseModel
) -> None:
    made = rig()
    shared = random_prompt(120, base.shapes.vocab_size, 99)
    cases = {}
    for turn in range(2):
        for i, adapter in enumerate(made.adapters):
            prompt = shared + random_prompt(5, base.shapes.vocab_size, 1000 + turn)
            cases[f"t{turn}-{i}"] = (prompt, adapter_dirs[i])
            made.engine.submit(request(f"t{turn}-{i}", prompt, adapter, max_tokens=8), made.sink)
        assert made.engine.drain(120)
        made.engine._draining = False
    assert_equals_oracle(made.sink.answers, oracle, cases, 8)
    for i in range(len(made.adapters)):
        finished = made.sink.answers[f"t1-{i}"].finished
        assert finished is not None
        assert finished.timings is not None
        assert finished.timings.cached_tokens >= 112, "the shared blocks were found"


def test_prompt_logprobs_equal_a_plain_forward(rig: Callable[..., Rig], base_dir: Path, base: BaseModel) -> None:
    from transformers import AutoModelForCausalLM

    made = rig(max_batch_tokens=64, max_sequences=8)
    prompt = random_prompt(150, base.shapes.vocab_size, 5)
    made.run(request("p", prompt, None, max_tokens=1, prompt_logprobs=2))
    first = next(e for e in made.sink.answers["p"].events if getattr(e, "prompt_logprobs", None))
    got = [None if s is None else s.logprob for s in first.prompt_logprobs]  # type: ignore[union-attr]
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)(torch.tensor([prompt])).logits[0]
    scores = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert got[0] is None
    assert torch.allclose(torch.tensor(got[1:]), scores, atol=LOGPROB_TOLERANCE)
