"""Random damage to an adapter's files: the door answers with a `CheckedAdapter` or an `AdapterRefused`, never else."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.door import CheckedAdapter, check_adapter
from adapters.errors import AdapterRefused
from tests.adapter_files import LIMITS, PEFT_CONFIG, PLAIN_CONFIG, PLAIN_WEIGHTS, edit_header, tiny_base

BASE = tiny_base()
HEADER_END = 8 + int.from_bytes(PLAIN_WEIGHTS[:8], "little")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=10), children, max_size=4),
    max_leaves=12,
)
many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


def judge(config: bytes, weights: bytes) -> CheckedAdapter | None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "weights"
        path.write_bytes(weights)
        try:
            checked = check_adapter(config, path, BASE, LIMITS)
        except AdapterRefused as refusal:
            refusal.message.encode("ascii")
            return None
    for module in checked.modules:  # what is let in can be read without another look
        for fact in (module.a, module.b):
            assert 8 < fact.start < fact.end <= len(weights)
        assert (module.a.shape[1], module.b.shape[0]) == BASE.linears[module.path]
        assert module.a.shape[0] == module.b.shape[1] == module.rank <= LIMITS.max_rank
        assert 0 < module.scaling <= LIMITS.max_scale
    return checked


@many
@given(st.lists(st.tuples(st.integers(0, HEADER_END - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_overwritten_header_bytes_never_crash_the_door(edits: list[tuple[int, int]]) -> None:
    weights = bytearray(PLAIN_WEIGHTS)
    for position, value in edits:
        weights[position] = value
    judge(PLAIN_CONFIG, bytes(weights))


@many
@given(st.integers(0, len(PLAIN_WEIGHTS)), st.binary(max_size=64), st.integers(0, 64))
def test_spliced_weights_never_crash_the_door(position: int, inserted: bytes, removed: int) -> None:
    judge(PLAIN_CONFIG, PLAIN_WEIGHTS[:position] + inserted + PLAIN_WEIGHTS[position + removed :])


@many
@given(st.data())
def test_header_of_any_json_never_crashes_the_door(data: st.DataObject) -> None:
    def edit(header: dict[str, Any]) -> None:
        name = data.draw(st.sampled_from(sorted(header)))
        part = data.draw(st.sampled_from(["name", "entry", *(["dtype", "shape", "data_offsets"] * 3)]))
        if part == "entry" or name == "__metadata__":
            header[name] = data.draw(JSON)
        elif part == "name":
            header[data.draw(st.text())] = header.pop(name)
        else:
            header[name][part] = data.draw(JSON)

    judge(PLAIN_CONFIG, edit_header(edit))


@many
@given(st.sampled_from(sorted(PEFT_CONFIG)), JSON)
def test_config_of_any_values_never_crashes_the_door(field: str, value: Any) -> None:
    judge(json.dumps(PEFT_CONFIG | {field: value}).encode(), PLAIN_WEIGHTS)


@many
@given(st.integers(0, len(PLAIN_CONFIG)), st.binary(max_size=32), st.integers(0, 32))
def test_spliced_config_never_crashes_the_door(position: int, inserted: bytes, removed: int) -> None:
    judge(PLAIN_CONFIG[:position] + inserted + PLAIN_CONFIG[position + removed :], PLAIN_WEIGHTS)


@many
@given(st.binary(max_size=200))
def test_noise_is_never_accepted(noise: bytes) -> None:
    assert judge(PLAIN_CONFIG, noise) is None
    assert judge(noise, PLAIN_WEIGHTS) is None
