"""The base's identity and shapes without loading its weights: what it takes to check and publish adapters.

Read from the model's config once and kept beside the 4-bit snapshot; later calls need no torch.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

from adapters.manifest import BaseModelSpec, canonical_json
from app.engine.base_files import base_name, resolve_base, source_fingerprint


def read_base_spec(
    model: str, data_dir: Path, *, name: str | None = None, revision: str | None = None, quantization: str = "nf4"
) -> BaseModelSpec:
    """Return the spec that `load_base_model` would have; the first call converts, quantizes and hashes the base.

    Raises BaseModelUnsupported, BaseModelMissing.
    """
    source = resolve_base(model, data_dir, revision)
    served = name or base_name(model)
    kept = data_dir / "base" / served / f"spec-{quantization}-{source_fingerprint(source)}.json"
    if not kept.exists():
        _keep(kept, _load_spec(model, data_dir, name, revision, quantization))
    facts = json.loads(kept.read_text("utf-8"))
    aliases = {served, model, str(source), base_name(model), *facts["aliases"]}
    linears = {path: (shape[0], shape[1]) for path, shape in facts["linears"].items()}
    return BaseModelSpec(served, facts["digest"], tuple(sorted(aliases)), linears)


def _load_spec(model: str, data_dir: Path, name: str | None, revision: str | None, quantization: str) -> BaseModelSpec:
    from app.engine.base_model import load_base_model  # torch and transformers: seconds

    return load_base_model(
        model, data_dir, name=name, revision=revision, quantization=quantization, device="cpu", dtype="auto"
    ).spec


def _keep(path: Path, spec: BaseModelSpec) -> None:
    """Write the facts that only a loaded model knows; whole or not at all."""
    facts = {"digest": spec.digest, "aliases": list(spec.aliases), "linears": dict(spec.linears)}
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    scratch.write_bytes(canonical_json(facts))
    os.replace(scratch, path)
