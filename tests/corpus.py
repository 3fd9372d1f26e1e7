"""The corpus of hostile adapters, each with the one code that the door must refuse it with."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adapters.door import tensor_name
from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE
from tests.adapter_files import (
    LIMITS,
    PLAIN_CONFIG,
    PLAIN_WEIGHTS,
    Q0,
    Q0_A,
    Q0_B,
    RawTensor,
    config_bytes,
    edit_header,
    plain_tensors,
    raw,
    safetensors_bytes,
    tiny_base,
    with_header,
)


@dataclass(frozen=True)
class HostileAdapter:
    """One case. `number` is its row in the corpus; `prepare` lays out what bytes alone cannot say."""

    number: int
    name: str
    code: str
    config: bytes | None
    weights: bytes | None
    prepare: Callable[[Path], None] | None = None

    def write(self, directory: Path) -> None:
        if self.config is not None:
            (directory / CONFIG_FILE).write_bytes(self.config)
        if self.weights is not None:
            (directory / WEIGHTS_FILE).write_bytes(self.weights)
        if self.prepare is not None:
            self.prepare(directory)


def hostile_adapters() -> Iterator[HostileAdapter]:
    """Every hostile pair of files; names, digests and signatures are tested where they are checked."""
    yield from _hostile_files()
    yield from _hostile_configs()
    yield from _hostile_headers()
    yield from _hostile_tensors()


MARKER = "pickle-ran"


class _Marker:
    """Unpickling this creates a file: proof that somebody ran pickle on an adapter."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.path,))


def _hostile_files() -> Iterator[HostileAdapter]:
    def marker_pickle(directory: Path) -> None:
        (directory / "adapter_model.bin").write_bytes(pickle.dumps(_Marker(str(directory / MARKER))))

    def case(number: int, name: str, code: str, weights: bytes | None, **more: Any) -> HostileAdapter:
        return HostileAdapter(number, name, code, more.pop("config", PLAIN_CONFIG), weights, **more)

    def link(directory: Path) -> None:
        (directory / "elsewhere").write_bytes(PLAIN_WEIGHTS)
        (directory / WEIGHTS_FILE).symlink_to(directory / "elsewhere")

    yield case(1, "only a pickle", "adapter_format_unsupported", None, prepare=marker_pickle)
    for magic, name in (
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"PK\x03\x04\x14\0\0\0", "zip"),
        (b"\x80\x04\x95abcde", "pickle"),
    ):
        yield case(2, f"{name} named safetensors", "adapter_format_unsupported", magic + bytes(4096))
    yield case(3, "no config", "adapter_file_missing", PLAIN_WEIGHTS, config=None)
    yield case(4, "no weights", "adapter_file_missing", None)
    yield case(5, "weights are a link", "adapter_path_invalid", None, prepare=link)
    yield case(5, "weights are a pipe", "adapter_path_invalid", None, prepare=lambda d: os.mkfifo(d / WEIGHTS_FILE))
    yield case(
        5,
        "weights are a device",
        "adapter_path_invalid",
        None,
        prepare=lambda d: (d / WEIGHTS_FILE).symlink_to("/dev/zero"),
    )
    yield case(5, "weights are a directory", "adapter_path_invalid", None, prepare=lambda d: (d / WEIGHTS_FILE).mkdir())
    yield case(
        5,
        "config is a pipe",
        "adapter_path_invalid",
        PLAIN_WEIGHTS,
        config=None,
        prepare=lambda d: os.mkfifo(d / CONFIG_FILE),
    )
    yield case(7, "one byte above the cap", "adapter_too_large", bytes(LIMITS.weights_cap(tiny_base()) + 1))
    yield case(9, "empty weights", "adapter_truncated", b"")
    yield case(9, "seven bytes", "adapter_truncated", PLAIN_WEIGHTS[:7])
    yield case(10, "cut in the data", "adapter_truncated", PLAIN_WEIGHTS[: len(PLAIN_WEIGHTS) // 2])
    yield case(10, "cut by one byte", "adapter_truncated", PLAIN_WEIGHTS[:-1])
    yield case(10, "cut in the header", "adapter_truncated", PLAIN_WEIGHTS[:100])


_REFUSED_VALUES: tuple[tuple[int, str, Any], ...] = (
    *(
        (23, "init_lora_weights", value)
        for value in ("olora", "pissa", "pissa_niter_4", "corda", "loftq", "lora_ga", 1)
    ),
    *((24, "bias", value) for value in ("all", "lora_only")),
    (24, "lora_bias", True),
    (25, "use_dora", True),
    (25, "use_qalora", True),
    (25, "qalora_group_size", 32),
    (25, "alora_invocation_tokens", [1, 2]),
    (26, "modules_to_save", ["lm_head"]),
    (27, "rank_pattern", {"(x+x+)+y": 8}),
    (27, "rank_pattern", {"^model.layers.0.self_attn.q_proj": 8}),
    (27, "rank_pattern", {f"layers.{i}.q_proj": 8 for i in range(1000)}),
    (27, "rank_pattern", {"": 8}),
    (27, "rank_pattern", ["q_proj"]),
    (27, "alpha_pattern", {"(.*)*q_proj": 8}),
    (28, "target_modules", "all-linear"),
    (28, "target_modules", ".*q_proj"),
    (28, "target_modules", ["q_proj", ".*"]),
    (28, "target_modules", ["q_proj", 1]),
    (28, "target_modules", ["x" * 300]),
    (28, "target_modules", None),
    (29, "layers_pattern", "layers"),
    (29, "exclude_modules", ["q_proj"]),
    (29, "exclude_modules", "q_proj"),
    (29, "layer_replication", [[0, 2], [1, 2]]),
    (29, "target_parameters", ["mlp.experts"]),
    (29, "trainable_token_indices", [1]),
    (29, "trainable_token_indices", {"embed_tokens": [1]}),
    (29, "loftq_config", {"loftq_bits": 4}),
    (29, "eva_config", {"rho": 2.0}),
    (29, "megatron_core", "os"),
    (29, "megatron_config", {}),
    (29, "fan_in_fan_out", True),
    (29, "ensure_weight_tying", True),
    (29, "task_type", "SEQ_CLS"),
    (29, "use_rslora", 1),
    (29, "layers_to_transform", "0"),
    (29, "layers_to_transform", [True]),
    (29, "layers_to_transform", [-1]),
    (29, "base_model_name_or_path", 7),
    (29, "runtime_config", {"ephemeral_gpu_offload": True}),
    *((29, name, {}) for name in ("corda_config", "lora_ga_config", "velora_config", "monteclora_config")),
    *((29, name, {}) for name in ("use_bdlora", "arrow_config", "kasa_config")),
)


def _hostile_configs() -> Iterator[HostileAdapter]:
    def case(number: int, name: str, code: str, config: bytes) -> HostileAdapter:
        return HostileAdapter(number, name, code, config, PLAIN_WEIGHTS)

    invalid = "adapter_config_invalid"
    yield case(13, "config above its cap", "adapter_config_too_large", PLAIN_CONFIG.ljust(LIMITS.max_config_bytes + 1))
    yield case(14, "not JSON", invalid, b"r: 8")
    yield case(14, "UTF-16", invalid, PLAIN_CONFIG.decode().encode("utf-16"))
    yield case(14, "Latin-1", invalid, config_bytes(revision="x").replace(b'"x"', b'"\xe9"'))
    yield case(14, "byte order mark", invalid, b"\xef\xbb\xbf" + PLAIN_CONFIG)
    yield case(14, "empty", invalid, b"")
    yield case(14, "a list", invalid, b"[]")
    yield case(14, "two objects", invalid, PLAIN_CONFIG * 2)
    yield case(15, "r twice", invalid, PLAIN_CONFIG.replace(b'"r": 8', b'"r": 8, "r": 64'))
    yield case(15, "r twice by an escape", invalid, PLAIN_CONFIG.replace(b'"r": 8', b'"r": 8, "\\u0072": 64'))
    yield case(16, "nested 10,000 deep", invalid, b'{"revision": ' + b"[" * 10_000 + b"]" * 10_000 + b"}")
    yield case(16, "nested 9 deep", invalid, config_bytes(auto_mapping=[[[[[[[[]]]]]]]]))
    for literal in (b"NaN", b"Infinity", b"-Infinity"):
        yield case(17, literal.decode(), invalid, PLAIN_CONFIG.replace(b"0.05", literal))
    yield case(17, "5,000 digits", invalid, PLAIN_CONFIG.replace(b"0.05", b"9" * 5000))
    for value in ("8", 8.5, 8.0, True, 0, -1, None, [8]):
        yield case(18, f"r = {value!r}", "adapter_rank_invalid", config_bytes(r=value))
        yield case(18, f"rank_pattern {value!r}", "adapter_rank_invalid", config_bytes(rank_pattern={"q_proj": value}))
    yield case(19, "r = 5,000,000", "adapter_rank_too_large", config_bytes(r=5_000_000))
    yield case(19, "r = 65", "adapter_rank_too_large", config_bytes(r=65))
    yield case(19, "r = 10^4000", "adapter_rank_too_large", config_bytes(r=10**4000))
    yield case(19, "pattern above", "adapter_rank_too_large", config_bytes(rank_pattern={"q_proj": 65}))
    for value in (0, -1, True, "16", None, 10**400):
        name = "10^400" if isinstance(value, int) and value > 1 else repr(value)
        yield case(20, f"alpha {name}", "adapter_alpha_invalid", config_bytes(lora_alpha=value))
        yield case(20, f"alpha_pattern {name}", "adapter_alpha_invalid", config_bytes(alpha_pattern={"q_proj": value}))
    yield case(20, "1e999", "adapter_alpha_invalid", PLAIN_CONFIG.replace(b'"lora_alpha": 16', b'"lora_alpha": 1e999'))
    yield case(20, "scale above its cap", "adapter_alpha_invalid", config_bytes(lora_alpha=8 * 128 + 1))
    yield case(20, "rsLoRA scale above", "adapter_alpha_invalid", config_bytes(lora_alpha=600, use_rslora=True))
    yield case(20, "pattern's scale above", "adapter_alpha_invalid", config_bytes(alpha_pattern={"q_proj": 9999}))
    for value in ("LOHA", "lora", None, ["LORA"]):
        yield case(21, f"peft_type {value!r}", "adapter_type_unsupported", config_bytes(peft_type=value))
    prompt_tuning = {"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}}
    yield case(21, "prompt tuning", "adapter_type_unsupported", json.dumps(prompt_tuning).encode())
    for number, field, value in _REFUSED_VALUES:
        shown = repr(value)[:40]
        yield case(number, f"{field} {shown}", "adapter_config_value_unsupported", config_bytes(**{field: value}))
    yield case(30, "unknown field", "adapter_config_field_unknown", config_bytes(use_magic=False))
    yield case(30, "unknown field of signs", "adapter_config_field_unknown", config_bytes(**{"\ud800\n<b>": 1}))
    yield case(31, "unknown module", "adapter_module_unknown", config_bytes(target_modules=["q_proj", "c_attn"]))
    yield case(31, "half a name", "adapter_module_unknown", config_bytes(target_modules=["proj"]))
    yield case(31, "the head", "adapter_module_unknown", config_bytes(target_modules=["lm_head"]))
    yield case(31, "unknown layer", "adapter_module_unknown", config_bytes(layers_to_transform=[0, 2]))
    yield case(32, "other base", "adapter_base_mismatch", config_bytes(base_model_name_or_path="meta/llama-3"))
    yield case(52, "no targets", "adapter_no_modules", config_bytes(target_modules=[]))


def _hostile_headers() -> Iterator[HostileAdapter]:
    def case(number: int, name: str, code: str, weights: bytes) -> HostileAdapter:
        return HostileAdapter(number, name, code, PLAIN_CONFIG, weights)

    def entry(**changes: Any) -> bytes:
        return edit_header(lambda header: header[Q0_A].update(changes))

    def shift(header: dict[str, Any], by: int) -> None:
        for name, item in header.items():
            if name not in ("__metadata__", Q0_A):
                item["data_offsets"] = [offset + by for offset in item["data_offsets"]]

    data = b"".join(tensor.data for tensor in plain_tensors().values())
    large, invalid = "adapter_header_too_large", "adapter_header_invalid"
    yield case(34, "header of 2^40", large, (1 << 40).to_bytes(8, "little") + b"{}")
    yield case(34, "header of 2^64 - 1", large, b"\xff" * 8 + b"{}")
    entries = {f"tensor {i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
    yield case(35, "20,000 entries", large, with_header(entries))
    yield case(35, "much metadata", large, safetensors_bytes(plain_tensors(), {"x": "y" * LIMITS.max_metadata_bytes}))
    for body in (b"", b"[]", b" {}", b'"x"', b"{", b'{"a":}', b"{}{}", b"\xff\xfe", b'{"a": NaN}', b"{" * 5000):
        yield case(36, f"header {body[:10]!r}", invalid, with_header(body))
    for body in ({"x": 1}, {"x": []}, {"x": {}}, {"__metadata__": 1}, {"__metadata__": {"x": 1}}, {"x": {"y": [[]]}}):
        yield case(36, f"header {body!r}", invalid, with_header(body))
    item = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    yield case(37, "a tensor twice", invalid, with_header(b'{"x":' + item + b',"x":' + item + b"}"))
    yield case(37, "a key twice", invalid, with_header(b'{"x":' + item.replace(b"{", b'{"shape":[1],') + b"}"))
    yield case(38, "overlap", invalid, edit_header(lambda h: h[Q0_B].update(data_offsets=h[Q0_A]["data_offsets"])))
    yield case(38, "gap", invalid, edit_header(lambda h: shift(h, 4), data[:2048] + bytes(4) + data[2048:]))
    yield case(38, "trailing bytes", invalid, PLAIN_WEIGHTS + b"\0")
    yield case(38, "behind an empty header", invalid, with_header({}, b"\0"))
    yield case(38, "offsets reversed", invalid, entry(data_offsets=[2048, 0]))
    yield case(38, "offsets below zero", invalid, entry(data_offsets=[-2048, 0]))
    yield case(38, "offsets of three", invalid, entry(data_offsets=[0, 1, 2048]))
    yield case(38, "offsets of floats", invalid, entry(data_offsets=[0.0, 2048.0]))
    yield case(38, "an entry with more", invalid, entry(strides=[1]))
    for shape in ([-8, -64], [1 << 63, 0], [8.0, 64], [True, 512], "8x64", None, [1] * 9 + [512]):
        yield case(39, f"shape {str(shape)[:20]}", invalid, entry(shape=shape))
    yield case(40, "span below the shape", invalid, entry(shape=[8, 65]))
    yield case(40, "span of another dtype", invalid, entry(dtype="F16"))
    yield case(40, "huge shape", invalid, entry(shape=[1 << 62, 1 << 62]))
    for dtype in ("F64", "I8", "F8_E4M3", "BOOL", "U16", "f32", "F" * 500):
        yield case(41, f"dtype {dtype[:8]}", "adapter_dtype_unsupported", entry(dtype=dtype))
    yield case(41, "dtype 7", invalid, entry(dtype=7))
    yield case(52, "header {}", "adapter_no_modules", with_header({}))
    yield case(52, "metadata alone", "adapter_no_modules", with_header({"__metadata__": {"format": "pt"}}))


_STRANGE_NAMES = (
    (42, "base_model.model.lm_head.weight"),
    (42, "lm_head.weight"),
    (43, f"base_model.model.{Q0}.base_layer.weight"),
    (43, f"base_model.model.{Q0}.weight"),
    (44, "base_model.model.model.norm.weight"),
    (44, f"base_model.model.{Q0}.bias"),
    (44, f"base_model.model.{Q0}.lora_B.bias"),
    (44, f"base_model.model.{Q0}.lora_magnitude_vector"),
    (44, "base_model.model.model.embed_tokens.lora_embedding_A"),
    (44, f"base_model.model.{Q0}.lora_A.default.weight"),
    (44, f"base_model.model.{Q0.replace('q_proj', 'q_prоj')}.lora_A.weight"),  # a Cyrillic o
    (44, f"base_model.model.{Q0}.lora_A.weight\n"),
    (44, f"BASE_MODEL.model.{Q0}.lora_A.weight"),
    (44, ""),
    (44, "\ud800"),
)


def _hostile_tensors() -> Iterator[HostileAdapter]:
    def case(number: int, name: str, code: str, tensors: Mapping[str, RawTensor], **config: Any) -> HostileAdapter:
        return HostileAdapter(number, name, code, config_bytes(**config), safetensors_bytes(tensors))

    plain = plain_tensors()
    one = raw(np.zeros(1))
    for number, name in _STRANGE_NAMES:
        yield case(number, f"extra {name!r}", "adapter_tensor_unexpected", plain | {name: one})
    yield case(44, "undeclared module", "adapter_tensor_unexpected", plain_tensors(("q_proj", "v_proj", "k_proj")))
    yield case(44, "undeclared layer", "adapter_tensor_unexpected", plain, layers_to_transform=[0])
    prefixed = {name.replace(".model.layers", ".language_model.model.layers"): plain[name] for name in plain}
    yield case(45, "another prefix", "adapter_module_unknown", prefixed)
    yield case(45, "LoRA on the head", "adapter_module_unknown", plain | {tensor_name("lm_head", "A"): one})
    yield case(46, "A without B", "adapter_tensor_unpaired", _without(plain, Q0_B))
    yield case(46, "B without A", "adapter_tensor_unpaired", _without(plain, Q0_A))
    yield case(47, "one layer missing", "adapter_tensor_missing", _without(plain, Q0_A, Q0_B))
    yield case(47, "a kind missing", "adapter_tensor_missing", plain_tensors(("q_proj",)))
    swapped = plain | {Q0_A: plain[Q0_B], Q0_B: plain[Q0_A]}
    for name, tensors in (
        ("A and B swapped", swapped),
        ("A of three dimensions", plain | {Q0_A: RawTensor("F32", [1, 8, 64], plain[Q0_A].data)}),
        ("A flat", plain | {Q0_A: RawTensor("F32", [512], plain[Q0_A].data)}),
        ("A transposed", plain | {Q0_A: RawTensor("F32", [64, 8], plain[Q0_A].data)}),
        ("a zero dimension", plain | {Q0_A: raw(np.zeros((0, 64)))}),
        ("no dimension", plain | {Q0_A: raw(np.zeros(()))}),
        ("a rank below the declared", plain_tensors(rank=4)),
        ("a rank above the declared", plain_tensors(rank=16)),
    ):
        yield case(48, name, "adapter_shape_mismatch", tensors)
    wide = plain | {Q0_A: raw(np.zeros((8, 128)))}
    yield case(49, "another model's size", "adapter_shape_mismatch", wide)
    for dtype in ("F32", "F16", "BF16"):
        for value in (np.nan, np.inf, -np.inf):
            values = np.zeros((64, 8))
            values[-1, -1] = value
            tensors = plain | {Q0_B: raw(values, dtype)}
            yield case(50, f"{value} in {dtype}", "adapter_values_not_finite", tensors)
    last = list(plain)[-1]
    ends_badly = RawTensor("F32", plain[last].shape, plain[last].data[:-4] + np.float32(np.nan).tobytes())
    yield case(50, "NaN as the file's last element", "adapter_values_not_finite", plain | {last: ends_badly})
    yield case(51, "a huge A", "adapter_norm_too_large", plain | {Q0_A: raw(np.full((8, 64), 1e30))})
    yield case(51, "a huge B of BF16", "adapter_norm_too_large", plain | {Q0_B: raw(np.full((64, 8), 3e38), "BF16")})
    yield case(51, "one huge element", "adapter_norm_too_large", plain | {Q0_B: raw(np.eye(64, 8) * 2e4)})
    yield case(
        51, "huge once scaled", "adapter_norm_too_large", plain | {Q0_B: raw(np.eye(64, 8) * 100)}, lora_alpha=1024
    )


def _without(tensors: Mapping[str, RawTensor], *names: str) -> dict[str, RawTensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}
