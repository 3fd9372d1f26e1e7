"""A merged model is the base with its adapter, as nearly as fp16 can say it, and plain transformers loads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapters.checked import DoorLimits
from adapters.door import check_directory
from adapters.manifest import WEIGHTS_FILE
from adapters.weights import LoraPair, read_pairs
from app.engine.base_model import BaseModel, load_base_model
from app.merge import MergeImpossible, adapted_logits, merge
from tests.engine_rig import random_prompt
from tests.tiny import BASE_NAME, build_adapter, build_base

PROBE = torch.tensor([random_prompt(40, 290, seed=1)])


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("base"))


def load(base_dir: Path, directory: Path, quantization: str) -> BaseModel:
    return load_base_model(
        str(base_dir), directory, name=BASE_NAME, quantization=quantization, dtype="float32", device="cpu"
    )


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_merged_model_answers_as_the_adapter_beside_its_base(base_dir: Path, tmp_path: Path, quantization: str) -> None:
    base = load(base_dir, tmp_path / "data", quantization)
    directory = build_adapter(tmp_path / "adapter", base_dir)
    pairs = read_pairs(check_directory(directory, base.spec, DoorLimits()), directory / WEIGHTS_FILE)
    before = base.checksums()
    result = merge(base, pairs, tmp_path / "merged", PROBE)
    assert base.checksums() == before
    assert result.num_same_argmax >= result.num_positions - 1
    # fp16 keeps 11 bits of each weight; measured 2e-3 of the largest logit.
    assert 0 < result.largest_logit_difference < 5e-3 * result.largest_logit
    adapter_moves = (adapted_logits(base, pairs, PROBE) - adapted_logits(base, {}, PROBE)).abs().max()
    assert result.largest_logit_difference < 0.02 * float(adapter_moves)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    with pytest.raises(FileExistsError):
        merge(base, pairs, tmp_path / "merged", PROBE)


def test_weight_beyond_fp16_is_refused_and_leaves_nothing(base_dir: Path, tmp_path: Path) -> None:
    base = load(base_dir, tmp_path / "data", "none")
    path = base.lora.paths[0]
    features_in, features_out = base.spec.linears[path]
    huge = {path: LoraPair(torch.full((1, features_in), 300.0), torch.full((features_out, 1), 300.0), 1.0)}
    with pytest.raises(MergeImpossible, match="beyond fp16"):
        merge(base, huge, tmp_path / "merged", PROBE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]
