from __future__ import annotations

from pathlib import Path

import pytest

from app.engine.base_model import load_base_model
from app.engine.base_spec import read_base_spec
from tests.tiny import build_base


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_spec_read_from_the_files_is_that_of_the_loaded_model(tmp_path: Path, quantization: str) -> None:
    source = build_base(tmp_path / "Tiny")
    arguments = {"name": "ours", "quantization": quantization}
    first = read_base_spec(str(source), tmp_path / "data", **arguments)
    again = read_base_spec(str(source), tmp_path / "data", **arguments)
    loaded = load_base_model(str(source), tmp_path / "data", device="cpu", **arguments).spec
    assert first == again
    assert (first.id, first.digest, dict(first.linears)) == (loaded.id, loaded.digest, dict(loaded.linears))
    assert set(first.aliases) >= {"ours", "tiny"}
    assert set(first.aliases) <= set(loaded.aliases)


def test_another_quantization_is_another_base(tmp_path: Path) -> None:
    source = build_base(tmp_path / "Tiny")
    digests = {read_base_spec(str(source), tmp_path / "data", quantization=q).digest for q in ("nf4", "none")}
    assert len(digests) == 2
