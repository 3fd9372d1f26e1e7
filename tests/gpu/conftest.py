"""Fixtures of the GPU tests. Without a CUDA device every test here is skipped, and says so.

.venv/bin/pytest -m gpu tests/gpu
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from app.engine.base_model import BaseModel, load_base_model
from tests.tiny import build_adapter, build_base

LoadBase = Callable[..., BaseModel]
KINDS: list[dict[str, object]] = [
    {"r": 4},
    {"r": 8, "alpha": 8},
    {"r": 16, "rslora": True},
    {"r": 64, "alpha": 32},
    {"r": 8, "rank_pattern": {"q_proj": 16, "layers.1.mlp.down_proj": 2}},
    {"r": 16, "target_modules": ["q_proj", "v_proj"]},
]


@pytest.fixture(scope="session")
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def base_dir(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("base"), num_layers=3, max_context=1024)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the 4-bit snapshot lies, the same for every base of the session."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def adapter_dirs(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [build_adapter(root / f"a{i}", base_dir, seed=i, **kind) for i, kind in enumerate(KINDS)]  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def load_base(device: torch.device, base_dir: Path, data_dir: Path) -> LoadBase:
    """Load the tiny base as the server would: `load_base(quantization=…, dtype=…)`."""

    def load(quantization: str, dtype: str) -> BaseModel:
        return load_base_model(
            str(base_dir), data_dir, name="tiny-chat", quantization=quantization, dtype=dtype, device=device.type
        )

    return load
