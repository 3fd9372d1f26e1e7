"""From pinned host memory into the rank pool: copies do not wait, and are there when the next product needs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapters.checked import DoorLimits
from adapters.door import check_directory
from adapters.layers import PoolTensors, Segment
from adapters.manifest import WEIGHTS_FILE
from adapters.weights import HostAdapter, load_host_adapter
from app.engine.base_model import BaseModel
from tests.gpu.conftest import LoadBase

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def base(load_base: LoadBase) -> BaseModel:
    return load_base("none", "bfloat16")


def host_adapter(base: BaseModel, directory: Path) -> HostAdapter:
    checked = check_directory(directory, base.spec, DoorLimits(), check_base_name=False)
    key = ("acme", checked.digest)
    return load_host_adapter(key, checked, directory / WEIGHTS_FILE, dtype=base.dtype, pin_memory=True)


def test_host_memory_is_pinned(base: BaseModel, adapter_dirs: list[Path]) -> None:
    adapter = host_adapter(base, adapter_dirs[0])
    assert all(tensor.is_pinned() for module in adapter.modules.values() for tensor in (module.a, module.b))


def test_a_product_right_after_the_copy_sees_the_new_rows(base: BaseModel, adapter_dirs: list[Path]) -> None:
    hosts = [host_adapter(base, directory) for directory in adapter_dirs]
    pool = PoolTensors(base.spec.linears, 64, dtype=base.dtype, device=base.device)
    everything = (1 << len(base.spec.linears)) - 1
    for adapter in hosts * 5:  # the same rows over and over: what lay there before must never answer
        pool.write(0, adapter)
        plan = pool.plan([Segment(0, 3, 0, adapter.rank, everything)], long_segment=24)
        assert plan is not None
        for path, index in pool.index.items():
            features_in, features_out = base.spec.linears[path]
            x = torch.ones(1, 3, features_in, dtype=base.dtype, device=base.device)
            got = plan.apply(index, x, torch.zeros(1, 3, features_out, dtype=base.dtype, device=base.device))
            module = adapter.modules.get(path)
            if module is None:
                assert not got.any(), path
                continue
            a, b = module.a.float(), module.b.float()
            want = (x[0].float().cpu() @ a.t()) @ b
            torch.testing.assert_close(got[0].float().cpu(), want, atol=0.05 * float(want.abs().max()), rtol=0)


def test_rows_equal_the_host_bit_by_bit_also_when_moved(base: BaseModel, adapter_dirs: list[Path]) -> None:
    num_rows = 256
    pool = PoolTensors(base.spec.linears, num_rows, dtype=base.dtype, device=base.device)
    rows: dict[int, HostAdapter] = {}
    at = 0
    for directory in adapter_dirs:
        rows[at] = host_adapter(base, directory)
        pool.write(at, rows[at])
        at += rows[at].rank
    assert at < num_rows - 64
    moved = rows.pop(4)
    pool.move(4, num_rows - moved.rank, moved.rank)
    rows[num_rows - moved.rank] = moved
    for row, adapter in rows.items():
        for path, module in adapter.modules.items():
            index, rank = pool.index[path], module.a.shape[0]
            assert torch.equal(pool.a[index][row : row + rank].cpu(), module.a)
            assert torch.equal(pool.b[index][row : row + rank].cpu(), module.b)
