"""The adapter door against the hostile corpus, and what it must let in."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adapters import errors
from adapters.door import DoorLimits, check_adapter, check_base, check_directory, max_weights_bytes
from adapters.errors import AdapterError, AdapterRefused
from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE, AdapterManifest, is_adapter_name
from tests.adapter_files import (
    LIMITS,
    PLAIN_CONFIG,
    PLAIN_WEIGHTS,
    Q0,
    Q0_B,
    config_bytes,
    plain_tensors,
    raw,
    safetensors_bytes,
    tiny_base,
)
from tests.corpus import MARKER, HostileAdapter, hostile_adapters

BASE = tiny_base()
CORPUS = list(hostile_adapters())


def refusals() -> list[type[AdapterRefused]]:
    return [cls for cls in vars(errors).values() if isinstance(cls, type) and AdapterRefused in cls.__bases__]


def write(directory: Path, config: bytes = PLAIN_CONFIG, weights: bytes = PLAIN_WEIGHTS) -> Path:
    (directory / CONFIG_FILE).write_bytes(config)
    (directory / WEIGHTS_FILE).write_bytes(weights)
    return directory


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: f"{case.number}-{case.name!a}")
def test_hostile_adapter_is_refused_with_its_code(case: HostileAdapter, tmp_path: Path) -> None:
    case.write(tmp_path)
    began = time.process_time()
    with pytest.raises(AdapterRefused) as refusal:
        check_directory(tmp_path, BASE, LIMITS)
    assert refusal.value.code == case.code
    assert time.process_time() - began < 0.5
    assert not (tmp_path / MARKER).exists()
    refusal.value.message.encode("ascii")  # nothing of a stranger's text can break a log or an answer
    assert len(refusal.value.message) < 600
    assert len(refusal.value.param or "") < 300


def test_corpus_reaches_every_refusal() -> None:
    # A renderer is no matter of the files: the manifest names it, and whoever resolves a model compares it.
    of_the_manifest = {"adapter_renderer_mismatch"}
    assert {case.code for case in CORPUS} == {cls.code for cls in refusals()} - of_the_manifest
    assert all(cls.__doc__ for cls in refusals())


def test_file_checks_of_uploads_are_those_of_directories(tmp_path: Path) -> None:
    for case in CORPUS:
        if case.prepare is None and case.config is not None and case.weights is not None:
            weights = tmp_path / "weights"
            weights.write_bytes(case.weights)
            with pytest.raises(AdapterRefused) as refusal:
                check_adapter(case.config, weights, BASE, LIMITS)
            assert refusal.value.code == case.code, case.name


def test_refusals_stay_small_and_load_no_model_library() -> None:
    """A fresh process, with `assert` off, refuses the corpus within 64 MB, without torch, PEFT or safetensors."""
    script = """
import pathlib, resource, sys, tempfile
from adapters.door import check_directory
from adapters.errors import AdapterRefused
from tests.adapter_files import LIMITS, tiny_base
from tests.corpus import hostile_adapters
cases, base, accepted = list(hostile_adapters()), tiny_base(), []
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for case in cases:
    with tempfile.TemporaryDirectory() as directory:
        case.write(pathlib.Path(directory))
        try:
            check_directory(pathlib.Path(directory), base, LIMITS)
            accepted.append(case.name)
        except AdapterRefused:
            pass
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
loaded = {"torch", "peft", "safetensors", "transformers"} & set(sys.modules)
if accepted or loaded or grown > 64 << 10:
    sys.exit(f"accepted {accepted}, loaded {loaded}, grew {grown} KiB")
"""
    done = subprocess.run(
        [sys.executable, "-O", "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_no_module_of_the_package_unpickles_or_leaves_files_to_a_library() -> None:
    for source in (Path(__file__).parents[2] / "adapters").glob("*.py"):
        found = re.findall(
            r"^\s*(?:import|from) (?:pickle|peft|safetensors)\b|torch\.load\(", source.read_text(), re.MULTILINE
        )
        assert not found, source.name


def test_plain_adapter_is_accepted_with_its_facts(tmp_path: Path) -> None:
    checked = check_directory(write(tmp_path), BASE, LIMITS)
    assert [module.path for module in checked.modules] == [p for p in BASE.linears if p.endswith(("q_proj", "v_proj"))]
    assert checked.rank == 8
    assert checked.modules[0].scaling == 2.0
    assert checked.warnings == ()
    assert checked.config_bytes == PLAIN_CONFIG
    assert checked.config_file.sha256 == hashlib.sha256(PLAIN_CONFIG).hexdigest()
    assert checked.weights.sha256 == hashlib.sha256(PLAIN_WEIGHTS).hexdigest()
    assert checked.weights.num_bytes == len(PLAIN_WEIGHTS)
    fact = checked.modules[0].b
    assert PLAIN_WEIGHTS[fact.start : fact.end] == plain_tensors()[Q0_B].data


def test_other_files_are_ignored_and_listed(tmp_path: Path) -> None:
    for name in ("README.md", "tokenizer.json", "modeling_evil.py", "adapter_model.bin"):
        (tmp_path / name).write_bytes(b"x")
    checked = check_directory(write(tmp_path), BASE, LIMITS)
    assert checked.warnings == tuple(
        f"adapter_file_ignored: {name}"
        for name in ("README.md", "adapter_model.bin", "modeling_evil.py", "tokenizer.json")
    )


def test_mixed_dtypes_are_accepted(tmp_path: Path) -> None:
    tensors = plain_tensors()
    for (name, tensor), dtype in zip(list(tensors.items()), ("F16", "BF16", "F32", "BF16", "F16") * 2, strict=False):
        tensors[name] = raw(np.frombuffer(tensor.data, "<f4").reshape(tensor.shape), dtype)
    checked = check_directory(write(tmp_path, weights=safetensors_bytes(tensors)), BASE, LIMITS)
    assert {module.a.dtype for module in checked.modules} | {m.b.dtype for m in checked.modules} == {
        "F32",
        "F16",
        "BF16",
    }


def test_tensors_in_any_order_are_accepted(tmp_path: Path) -> None:
    tensors = dict(reversed(plain_tensors().items()))
    checked = check_directory(write(tmp_path, weights=safetensors_bytes(tensors)), BASE, LIMITS)
    assert checked.modules[0].path == Q0


def test_untrained_adapter_is_accepted_with_a_warning(tmp_path: Path) -> None:
    tensors = plain_tensors()
    zeroed = {name: raw(np.zeros(t.shape)) if "lora_B" in name else t for name, t in tensors.items()}
    checked = check_directory(write(tmp_path, weights=safetensors_bytes(zeroed)), BASE, LIMITS)
    assert checked.warnings == ("adapter_is_identity",)


def test_one_trained_module_is_no_identity(tmp_path: Path) -> None:
    tensors = {n: t if Q0 in n or "lora_A" in n else raw(np.zeros(t.shape)) for n, t in plain_tensors().items()}
    assert check_directory(write(tmp_path, weights=safetensors_bytes(tensors)), BASE, LIMITS).warnings == ()


def test_tiny_values_are_no_identity(tmp_path: Path) -> None:
    tensors = {n: raw(np.full(t.shape, 1e-30)) if "lora_B" in n else t for n, t in plain_tensors().items()}
    assert check_directory(write(tmp_path, weights=safetensors_bytes(tensors)), BASE, LIMITS).warnings == ()


def test_operator_may_skip_the_base_name(tmp_path: Path) -> None:
    directory = write(tmp_path, config_bytes(base_model_name_or_path="someone/else"))
    assert check_directory(directory, BASE, LIMITS, check_base_name=False).rank == 8


def test_link_to_the_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    write(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    assert check_directory(tmp_path / "link", BASE, LIMITS).rank == 8


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    (write(tmp_path) / WEIGHTS_FILE).chmod(0)
    with pytest.raises(errors.AdapterPathInvalid, match="permission"):
        check_directory(tmp_path, BASE, LIMITS)


def test_absent_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.AdapterFileMissing):
        check_directory(tmp_path / "nowhere", BASE, LIMITS)


def test_any_flipped_byte_of_the_weights_changes_the_digest(tmp_path: Path) -> None:
    digest = check_directory(write(tmp_path), BASE, LIMITS).digest
    header_end = 8 + int.from_bytes(PLAIN_WEIGHTS[:8], "little")
    for position in (header_end, header_end + 1000, len(PLAIN_WEIGHTS) - 4):  # low mantissa bytes: still finite
        flipped = bytearray(PLAIN_WEIGHTS)
        flipped[position] ^= 1
        assert check_directory(write(tmp_path, weights=bytes(flipped)), BASE, LIMITS).digest != digest


def test_digest_is_of_behaviour_and_not_of_spelling(tmp_path: Path) -> None:
    def digest(**changes: object) -> str:
        return check_directory(write(tmp_path, config_bytes(**changes)), BASE, LIMITS).digest

    plain = digest()
    assert digest(lora_dropout=0.5, peft_version="0.9", revision="main", target_modules=["q_proj", "v_proj"]) == plain
    assert digest(r=4, rank_pattern={"q_proj": 8, "v_proj": 8}, lora_alpha=16) == plain
    assert digest(lora_alpha=32) != plain
    assert digest(use_rslora=True) != plain
    assert digest(alpha_pattern={Q0: 8}) != plain


def test_order_of_pattern_keys_is_part_of_the_behaviour(tmp_path: Path) -> None:
    first = config_bytes(alpha_pattern={Q0: 4, "q_proj": 8})
    second = config_bytes(alpha_pattern={"q_proj": 8, Q0: 4})
    checked = [check_directory(write(tmp_path, config), BASE, LIMITS) for config in (first, second)]
    assert [c.modules[0].scaling for c in checked] == [0.5, 1.0]
    assert checked[0].digest != checked[1].digest


def test_largest_adapter_of_the_base_is_within_its_cap(tmp_path: Path) -> None:
    kinds = tuple(sorted(BASE.target_kinds))
    weights = safetensors_bytes(plain_tensors(kinds, rank=64))
    assert len(weights) <= max_weights_bytes(BASE, 64) <= LIMITS.max_file_bytes
    config = config_bytes(r=64, target_modules=list(kinds))
    assert len(check_directory(write(tmp_path, config, weights), BASE, LIMITS).modules) == len(BASE.linears)
    with pytest.raises(errors.AdapterTooLarge):
        check_directory(tmp_path, BASE, replace(LIMITS, max_file_bytes=len(weights) - 1))


def test_rank_limit_is_a_setting(tmp_path: Path) -> None:
    with pytest.raises(errors.AdapterRankTooLarge) as refusal:
        check_directory(write(tmp_path), BASE, DoorLimits(max_rank=7))
    assert refusal.value.param == "r"


def test_version_for_another_base_digest_is_refused(tmp_path: Path) -> None:
    checked = check_directory(write(tmp_path), BASE, LIMITS)
    manifest = AdapterManifest(
        tenant="acme",
        name="support",
        version=1,
        digest=checked.digest,
        config=checked.config_file,
        weights=checked.weights,
        rank=checked.rank,
        applied_modules=len(checked.modules),
        base_id=BASE.id,
        base_digest=BASE.digest,
        created_at=0.0,
        source="upload",
    )
    check_base(manifest, BASE)
    with pytest.raises(errors.AdapterBaseMismatch):
        check_base(replace(manifest, base_digest="c" * 64), BASE)


@pytest.mark.parametrize(
    "name", ["../x", "/etc", "a\0b", "%2e%2e", "a,b", "x" * 4096, "__base__", "default", "base", ""]
)
def test_hostile_name_is_no_adapter_name(name: str) -> None:
    assert not is_adapter_name(name)


@pytest.mark.parametrize("name", ["t1", "t10", "q-proj", "q_proj", "a.b", "0"])
def test_ordinary_name_is_an_adapter_name(name: str) -> None:
    assert is_adapter_name(name)


def test_refusals_survive_pickling() -> None:
    for cls in refusals():
        error = cls(param="x")
        again: AdapterError = pickle.loads(pickle.dumps(error))
        assert (again.code, again.message, again.param) == (error.code, error.message, "x")
