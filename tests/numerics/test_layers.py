"""The batched LoRA product against a loop over tokens."""

from __future__ import annotations

import pytest
import torch

from adapters.layers import MaskedProduct, PoolTensors, Run, Segment
from adapters.weights import HostAdapter, HostModule

LINEARS = {"layers.0.q_proj": (12, 20), "layers.0.down_proj": (30, 12)}


def host(rank: int, paths: list[str], seed: int, low: int | None = None) -> HostAdapter:
    g = torch.Generator().manual_seed(seed)
    modules = {}
    for path in paths:
        i, o = LINEARS[path]
        r = low or rank
        modules[path] = HostModule(torch.randn(r, i, generator=g), torch.randn(r, o, generator=g))
    return HostAdapter(("t", f"{seed}"), f"{seed}", rank, modules, 0)


def by_loop(adapter: HostAdapter | None, path: str, x: torch.Tensor) -> torch.Tensor:
    module = None if adapter is None else adapter.modules.get(path)
    return torch.zeros(LINEARS[path][1]) if module is None else (x @ module.a.t()) @ module.b


counts_by_shape = {"prefills": [1, 9, 3, 2], "decodes": [1, 1, 1, 1], "two each": [2, 2, 2, 1]}


@pytest.mark.parametrize("ranks", ["equal", "mixed"])
@pytest.mark.parametrize("long_segment", [1, 4, 1000])
@pytest.mark.parametrize("spread", [0, 40], ids=["span", "gather"])
@pytest.mark.parametrize("shape", counts_by_shape)
def test_each_token_equals_its_own_product(ranks: str, long_segment: int, spread: int, shape: str) -> None:
    torch.manual_seed(0)
    pool = PoolTensors(LINEARS, 200, dtype=torch.float32, device=torch.device("cpu"))
    for tensor in (*pool.a, *pool.b):
        tensor.fill_(float("nan"))  # what an adapter leaves of its own rows unwritten would show
    adapters = [
        host(4, list(LINEARS), 1),
        host(8, ["layers.0.q_proj"], 2),
        host(16, list(LINEARS), 3, low=5),
        None,
    ]
    if ranks == "equal":
        adapters = [*(host(8, list(LINEARS), seed) for seed in (1, 2, 3)), None]
    counts = counts_by_shape[shape]
    segments, at, row = [], 0, 3
    for adapter, count in zip(adapters, counts, strict=True):
        if adapter is not None:
            linears = pool.write(row, adapter)
            segments.append(Segment(at, at + count, row, adapter.rank, linears))
            row += adapter.rank + spread
        at += count
    # Rows between the extents may be multiplied, with zeros: stale numbers are harmless, NaN never lies in the pool.
    for tensor in (*pool.a, *pool.b):
        tensor.nan_to_num_(nan=7.0)
    plan = pool.plan(segments, long_segment=long_segment)
    assert plan is not None
    for i, (path, (features_in, features_out)) in enumerate(LINEARS.items()):
        x, y = torch.randn(1, at, features_in), torch.randn(1, at, features_out)
        want, token = y.clone(), 0
        for adapter, count in zip(adapters, counts, strict=True):
            for _ in range(count):
                want[0, token] += by_loop(adapter, path, x[0, token])
                token += 1
        torch.testing.assert_close(plan.apply(i, x, y), want, atol=1e-5, rtol=1e-5)


def test_neighbours_of_one_shape_are_one_product() -> None:
    pool = PoolTensors(LINEARS, 128, dtype=torch.float32, device=torch.device("cpu"))
    counts, ranks = [1, 1, 1, 2, 1, 1], [16, 16, 16, 16, 8, 8]
    segments, at, row = [], 0, 0
    for i, (count, rank) in enumerate(zip(counts, ranks, strict=True)):
        row += 8 * (i == 2)  # a gap in the pool
        segments.append(Segment(at, at + count, row, rank, pool.write(row, host(rank, list(LINEARS), i))))
        at, row = at + count, row + rank
    plan = pool.plan(segments, long_segment=1)
    assert plan is not None
    assert [(p.tokens, p.rank, p.count) for p in plan.products if isinstance(p, Run)] == [
        (1, 16, 2),
        (1, 16, 1),
        (2, 16, 1),
        (1, 8, 2),
    ]


def test_short_segments_share_one_product() -> None:
    pool = PoolTensors(LINEARS, 64, dtype=torch.float32, device=torch.device("cpu"))
    adapters = [pool.write(16 * i, host(16, list(LINEARS), i)) for i in range(4)]
    segments = [Segment(0, 9, 0, 16, adapters[0]), *(Segment(8 + i, 9 + i, 16 * i, 16, adapters[i]) for i in (1, 2, 3))]
    plan = pool.plan(segments, long_segment=4)
    assert plan is not None
    assert [type(product) for product in plan.products] == [Run, MaskedProduct]


@pytest.mark.parametrize("long_segment", [1, 100])
def test_an_overflowing_adapter_spoils_only_its_own_tokens(long_segment: int) -> None:
    pool = PoolTensors(LINEARS, 16, dtype=torch.float32, device=torch.device("cpu"))
    good, bad = host(4, list(LINEARS), 1), host(4, list(LINEARS), 2)
    bad.modules["layers.0.q_proj"].a.fill_(3e38)
    segments = [Segment(0, 1, 0, 4, pool.write(0, good)), Segment(1, 2, 4, 4, pool.write(4, bad))]
    plan = pool.plan(segments, long_segment=long_segment)
    assert plan is not None
    x = torch.ones(1, 2, 12)
    y = plan.apply(0, x, torch.zeros(1, 2, 20))
    torch.testing.assert_close(y[0, 0], by_loop(good, "layers.0.q_proj", x[0, 0]), atol=1e-5, rtol=1e-5)
    assert not torch.isfinite(y[0, 1]).all()


def test_reused_rows_keep_nothing_of_the_adapter_before() -> None:
    pool = PoolTensors(LINEARS, 16, dtype=torch.float32, device=torch.device("cpu"))
    pool.write(0, host(8, list(LINEARS), 1))
    linears = pool.write(0, host(8, ["layers.0.q_proj"], 2, low=2))
    assert linears == 1
    assert not pool.a[1][:8].any()
    assert not pool.a[0][2:8].any()


def test_moved_rows_answer_as_before() -> None:
    pool = PoolTensors(LINEARS, 16, dtype=torch.float32, device=torch.device("cpu"))
    adapter = host(8, list(LINEARS), 1)
    pool.write(5, adapter)
    pool.move(5, 2, 8)  # overlapping
    torch.testing.assert_close(pool.a[0][2:10], adapter.modules["layers.0.q_proj"].a)
