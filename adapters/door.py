"""The adapter door: a stranger's two files in, a `CheckedAdapter` or a coded refusal out. No torch, no PEFT.

The order keeps a refusal cheap: sizes, config, header, names, shapes, and only then the values. Nothing is allocated
by a size that the sender declared. The door never changes a file, and nothing behind it judges one again.

What PEFT's own loader would do with such files, and why it never sees them: keys without `lora_` overwrite the shared
base, some `init_lora_weights` re-initialise it, and an adapter that matches nothing serves the base in silence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from adapters.checked import CheckedAdapter, DoorLimits, ModuleFact, TensorFact, max_weights_bytes
from adapters.errors import (
    AdapterBaseMismatch,
    AdapterFileMissing,
    AdapterFormatUnsupported,
    AdapterModuleUnknown,
    AdapterNoModules,
    AdapterNormTooLarge,
    AdapterPathInvalid,
    AdapterShapeMismatch,
    AdapterTensorMissing,
    AdapterTensorUnexpected,
    AdapterTensorUnpaired,
    AdapterTooLarge,
)
from adapters.manifest import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterManifest,
    BaseModelSpec,
    FileFact,
    adapter_digest,
    canonical_json,
)
from adapters.module_plan import PlannedModule, plan_modules
from adapters.peft_config import parse_config
from adapters.safetensors_header import read_header
from adapters.strict_json import shown
from adapters.tensor_scan import scan_file

__all__ = [
    "CheckedAdapter",
    "DoorLimits",
    "ModuleFact",
    "TensorFact",
    "behaviour_digest",
    "check_adapter",
    "check_base",
    "check_directory",
    "max_weights_bytes",
    "parse_config",
    "tensor_name",
]

# Frobenius norm of lora_A, and of scaling * lora_B. Trained ones stay below a few hundred; under this bound every
# folded value fits float16 and the delta's spectral norm stays below 1e8, so only the row itself can go astray.
MAX_TENSOR_NORM = 1e4
IDENTITY_WARNING = "adapter_is_identity"
IGNORED_FILE_WARNING = "adapter_file_ignored"

_TENSOR_NAME = re.compile(r"base_model\.model\.([A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*)\.lora_([AB])\.weight")
_FOREIGN_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".ckpt", ".npz")


def check_adapter(
    config: bytes, weights: Path, base: BaseModelSpec, limits: DoorLimits, *, check_base_name: bool = True
) -> CheckedAdapter:
    """Check an adapter's two files against `base`. Blocks on reading `weights` once (twice its header).

    `check_base_name=False` skips the config's base name, for an operator who knows better; shapes are always checked.
    Raises a subclass of AdapterRefused.
    """
    parsed = parse_config(config, base, limits, check_base_name=check_base_name)
    plan = plan_modules(parsed, base, limits)
    with _open_regular(weights) as fd:
        num_bytes = os.fstat(fd).st_size
        cap = limits.weights_cap(base)
        if num_bytes > cap:
            raise AdapterTooLarge(f"The weights have {num_bytes} bytes; at most {cap} can fit this base model.")
        tensors = read_header(fd, num_bytes, limits)
        modules = _match_tensors({fact.name: fact for fact in tensors}, plan, base)
        scanned = scan_file(fd, tensors)
    _check_norms(modules, scanned.norms)
    is_identity = all(not scanned.norms[m.a.name] or not scanned.norms[m.b.name] for m in modules)
    return CheckedAdapter(
        config=parsed,
        config_bytes=config,
        modules=modules,
        rank=max(module.rank for module in modules),
        weights=FileFact(scanned.sha256, num_bytes),
        config_file=FileFact(hashlib.sha256(config).hexdigest(), len(config)),
        digest=behaviour_digest(modules, scanned.sha256),
        warnings=(IDENTITY_WARNING,) if is_identity else (),
    )


def check_directory(
    directory: Path, base: BaseModelSpec, limits: DoorLimits, *, check_base_name: bool = True
) -> CheckedAdapter:
    """Check a PEFT directory as `check_adapter` does. Other files in it are ignored and listed as warnings."""
    try:
        names = sorted(entry.name for entry in os.scandir(directory))
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise AdapterFileMissing(f"There is no directory {shown(str(directory))}.") from exc
    except OSError as exc:
        raise AdapterPathInvalid(f"The directory {shown(str(directory))} cannot be read.") from exc
    if WEIGHTS_FILE not in names and any(name.endswith(_FOREIGN_WEIGHTS) for name in names):
        raise AdapterFormatUnsupported(param=WEIGHTS_FILE)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in names:
            raise AdapterFileMissing(f"{name} is missing. An adapter is {CONFIG_FILE} and {WEIGHTS_FILE}.", param=name)
    with _open_regular(directory / CONFIG_FILE) as fd, os.fdopen(os.dup(fd), "rb") as file:
        config = file.read(limits.max_config_bytes + 1)  # one more than allowed, for the config's own size check
    checked = check_adapter(config, directory / WEIGHTS_FILE, base, limits, check_base_name=check_base_name)
    ignored = [f"{IGNORED_FILE_WARNING}: {shown(name)}" for name in names if name not in (CONFIG_FILE, WEIGHTS_FILE)]
    return _with_warnings(checked, ignored)


def check_base(manifest: AdapterManifest, base: BaseModelSpec) -> None:
    """Raise AdapterBaseMismatch when a published version was made for another base than the one served."""
    if manifest.base_digest != base.digest:
        raise AdapterBaseMismatch(f"{manifest.label} was published for {manifest.base_id}, not as it is served here.")


def behaviour_digest(modules: Sequence[ModuleFact], weights_sha256: str) -> str:
    """Return the adapter's identity: equal for files that compute the same, whatever else their configs say.

    Of the config only each module's scaling reaches the output (ranks and modules are the weights' own shapes and
    names), so the digest is over those and the weights' hash. The config's bytes as stored are in the manifest.
    """
    scalings = {module.path: module.scaling for module in modules}
    return adapter_digest(canonical_json(scalings), weights_sha256)


def tensor_name(path: str, side: str) -> str:
    """The name PEFT saves the tensor of module `path` under; `side` is "A" or "B"."""
    return f"base_model.model.{path}.lora_{side}.weight"


@contextlib.contextmanager
def _open_regular(path: Path) -> Iterator[int]:
    """Open a regular file for reading, following no link and waiting for no pipe."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as exc:
        raise AdapterFileMissing(f"{shown(path.name)} is missing.", param=shown(path.name)) from exc
    except PermissionError as exc:
        raise AdapterPathInvalid(f"{shown(path.name)} cannot be read: permission denied.") from exc
    except OSError as exc:  # a link (ELOOP), a socket, a device without a driver
        raise AdapterPathInvalid(param=shown(path.name)) from exc
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise AdapterPathInvalid(param=shown(path.name))
        yield fd
    finally:
        os.close(fd)


def _match_tensors(
    tensors: Mapping[str, TensorFact], plan: Sequence[PlannedModule], base: BaseModelSpec
) -> tuple[ModuleFact, ...]:
    """Return the planned modules with their tensors; every tensor must belong to one and every module have both."""
    if not tensors:
        raise AdapterNoModules()
    expected = {tensor_name(module.path, side) for module in plan for side in "AB"}
    for name in tensors:
        if name not in expected:
            raise _refuse_name(name, base)
    for name in tensors:
        partner = name.replace(".lora_A.weight", ".lora_B.weight")
        partner = partner if partner != name else name.replace(".lora_B.weight", ".lora_A.weight")
        if partner not in tensors:
            raise AdapterTensorUnpaired(f"The weights hold {name} but not {partner}.", param=name)
    return tuple(_module_fact(module, tensors, base) for module in plan)


def _refuse_name(name: str, base: BaseModelSpec) -> AdapterModuleUnknown | AdapterTensorUnexpected:
    match = _TENSOR_NAME.fullmatch(name)
    if match and match[1] not in base.linears:
        return AdapterModuleUnknown(f"The base model has no module {shown(match[1])} to adapt.", param=shown(name))
    if match:
        return AdapterTensorUnexpected(
            f"The weights hold {shown(name)}, whose module the config does not declare.", param=shown(name)
        )
    return AdapterTensorUnexpected(
        f"The weights hold {shown(name)}. Only base_model.model.<module>.lora_A.weight and lora_B.weight are accepted.",
        param=shown(name),
    )


def _module_fact(module: PlannedModule, tensors: Mapping[str, TensorFact], base: BaseModelSpec) -> ModuleFact:
    a, b = tensors.get(tensor_name(module.path, "A")), tensors.get(tensor_name(module.path, "B"))
    if a is None or b is None:
        raise AdapterTensorMissing(f"The config declares {module.path}, but the weights lack it.", param=module.path)
    in_features, out_features = base.linears[module.path]
    for fact, shape in ((a, (module.rank, in_features)), (b, (out_features, module.rank))):
        if fact.shape != shape:
            raise AdapterShapeMismatch(
                f"{fact.name} is {list(fact.shape[:8])}; this base model and the config's rank ask for {list(shape)}.",
                param=fact.name,
            )
    return ModuleFact(module.path, module.rank, module.scaling, a, b)


def _check_norms(modules: Sequence[ModuleFact], norms: Mapping[str, float]) -> None:
    for module in modules:
        for fact, factor in ((module.a, 1.0), (module.b, module.scaling)):
            if not norms[fact.name] * factor <= MAX_TENSOR_NORM:
                raise AdapterNormTooLarge(
                    f"{fact.name} has norm {norms[fact.name]:.3g}, scaled by {factor:g}; "
                    f"at most {MAX_TENSOR_NORM:g} is accepted.",
                    param=fact.name,
                )


def _with_warnings(checked: CheckedAdapter, more: Sequence[str]) -> CheckedAdapter:
    return dataclasses.replace(checked, warnings=(*checked.warnings, *more))
