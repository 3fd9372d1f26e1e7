"""What can go wrong with an adapter or its store. Docstring = default message = what to do next.

AdapterError                    code, param
├── AdapterRefused              the door said no (one subclass per code below); never served, never the base instead
│   ├── files     FormatUnsupported · FileMissing · PathInvalid · TooLarge · Truncated
│   ├── config    ConfigTooLarge · ConfigInvalid · ConfigFieldUnknown · ConfigValueUnsupported · TypeUnsupported
│   │             RankInvalid · RankTooLarge · AlphaInvalid · BaseMismatch
│   ├── header    HeaderTooLarge · HeaderInvalid · DtypeUnsupported
│   └── tensors   ModuleUnknown · NoModules · TensorUnexpected · TensorUnpaired · TensorMissing · ShapeMismatch
│                 ValuesNotFinite · NormTooLarge     (class AdapterTruncated, code adapter_truncated, and so on)
├── AdapterNotFound             no such adapter, version or alias for this tenant
├── AdapterNameInvalid
├── AdapterQuarantined          this digest made non-finite values or failed its check
├── AdapterConflict             the state of the adapter forbids it (an aliased version is not deleted)
└── AdapterUnavailable          the store is down, slow, or answered with the wrong bytes: try again
    └── AdapterDigestMismatch
StoreError                      raised by a BlobStore
├── ObjectNotFound · ObjectTooLarge · ObjectKeyInvalid · StoreDenied
├── LocalDiskFailed             the file beside the store, not the store itself
└── StoreUnavailable            timeouts, refused connections, 5xx, open breaker
"""

from __future__ import annotations


class AdapterError(Exception):
    """This adapter cannot be used."""

    code = "adapter_unavailable"

    def __init__(self, message: str | None = None, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip())
        self.param = param
        if code is not None:
            self.code = code

    @property
    def message(self) -> str:
        return str(self.args[0])


class AdapterRefused(AdapterError):
    """The adapter's files cannot be accepted; `param` names the field or tensor."""

    code = "adapter_config_invalid"


class AdapterFormatUnsupported(AdapterRefused):
    """The weights must be safetensors, named adapter_model.safetensors. Save them again with PEFT."""

    code = "adapter_format_unsupported"


class AdapterFileMissing(AdapterRefused):
    """An adapter is two files: adapter_config.json and adapter_model.safetensors. Add the one that is missing."""

    code = "adapter_file_missing"


class AdapterPathInvalid(AdapterRefused):
    """Adapter files must be regular files, not links, pipes or devices. Copy the file itself."""

    code = "adapter_path_invalid"


class AdapterTooLarge(AdapterRefused):
    """The weights are larger than any adapter of this base model within the rank limit. Lower the rank."""

    code = "adapter_too_large"


class AdapterTruncated(AdapterRefused):
    """The weights end before their header says so. Send the whole file again."""

    code = "adapter_truncated"


class AdapterConfigTooLarge(AdapterRefused):
    """adapter_config.json is too large. Send the file as PEFT wrote it."""

    code = "adapter_config_too_large"


class AdapterConfigInvalid(AdapterRefused):
    """adapter_config.json is not one plain UTF-8 JSON object. Send the file as PEFT wrote it."""

    code = "adapter_config_invalid"


class AdapterConfigFieldUnknown(AdapterRefused):
    """The config has a field that PEFT's LoRA config does not. Remove it or set it to null."""

    code = "adapter_config_field_unknown"


class AdapterConfigValueUnsupported(AdapterRefused):
    """This option of PEFT is not served here. Train with its default value."""

    code = "adapter_config_value_unsupported"


class AdapterTypeUnsupported(AdapterRefused):
    """Only LoRA adapters are served: `peft_type` must be "LORA"."""

    code = "adapter_type_unsupported"


class AdapterRankInvalid(AdapterRefused):
    """A rank must be a whole number of at least 1."""

    code = "adapter_rank_invalid"


class AdapterRankTooLarge(AdapterRefused):
    """The rank is above this server's limit. Train with a lower `r`, or raise LODGER_MAX_RANK."""

    code = "adapter_rank_too_large"


class AdapterAlphaInvalid(AdapterRefused):
    """`lora_alpha` must be a finite number above 0 whose scale over the rank stays within this server's limit."""

    code = "adapter_alpha_invalid"


class AdapterBaseMismatch(AdapterRefused):
    """The adapter was made for another base model. Publish it on a server of that base."""

    code = "adapter_base_mismatch"


class AdapterRendererMismatch(AdapterRefused):
    """The adapter was trained with another chat template than this server renders. Train it again here."""

    code = "adapter_renderer_mismatch"


class AdapterModuleUnknown(AdapterRefused):
    """The adapter changes a module that this base model does not have or does not adapt."""

    code = "adapter_module_unknown"


class AdapterNoModules(AdapterRefused):
    """The adapter changes no module at all, so it would answer as the base. Check `target_modules` and the weights."""

    code = "adapter_no_modules"


class AdapterHeaderTooLarge(AdapterRefused):
    """The weights' header is too large for an adapter. Save them again with `save_pretrained`."""

    code = "adapter_header_too_large"


class AdapterHeaderInvalid(AdapterRefused):
    """The weights' header is not valid safetensors. Save them again with `save_pretrained`."""

    code = "adapter_header_invalid"


class AdapterDtypeUnsupported(AdapterRefused):
    """Adapter tensors must be float32, float16 or bfloat16."""

    code = "adapter_dtype_unsupported"


class AdapterTensorUnexpected(AdapterRefused):
    """The weights hold a tensor that the config does not declare. Only lora_A and lora_B of its modules are taken."""

    code = "adapter_tensor_unexpected"


class AdapterTensorUnpaired(AdapterRefused):
    """Every lora_A needs its lora_B and the other way round. Save the adapter again."""

    code = "adapter_tensor_unpaired"


class AdapterTensorMissing(AdapterRefused):
    """The config declares a module whose tensors are not in the weights. Save both files from the same adapter."""

    code = "adapter_tensor_missing"


class AdapterShapeMismatch(AdapterRefused):
    """A tensor's shape does not fit this base model and the declared rank."""

    code = "adapter_shape_mismatch"


class AdapterValuesNotFinite(AdapterRefused):
    """The weights hold NaN or infinity. Train again, with a lower learning rate."""

    code = "adapter_values_not_finite"


class AdapterNormTooLarge(AdapterRefused):
    """The weights are far too large to be a trained adapter. Train again, with a lower learning rate."""

    code = "adapter_norm_too_large"


class AdapterNotFound(AdapterError):
    """No such adapter, version or alias. GET /v1/adapters lists what there is."""

    code = "model_not_found"


class AdapterNameInvalid(AdapterError):
    """Adapter names are 1 to 63 characters of a-z, 0-9, dot, dash and underscore, and begin with a letter or digit."""

    code = "adapter_name_invalid"


class AdapterQuarantined(AdapterError):
    """This adapter version produced values that are not finite and is no longer served. Publish a new version."""

    code = "adapter_quarantined"


class AdapterConflict(AdapterError):
    """The adapter's present state does not allow this."""

    code = "adapter_in_use"


class AdapterUnavailable(AdapterError):
    """The adapter could not be fetched now. Try again shortly."""

    code = "adapter_unavailable"


class AdapterDigestMismatch(AdapterUnavailable):
    """The stored bytes are not those that were published. Publish the adapter again."""

    code = "adapter_digest_mismatch"


class StoreError(Exception):
    """The blob store failed."""


class ObjectNotFound(StoreError):
    """There is no such object."""


class ObjectTooLarge(StoreError):
    """The object is larger than allowed here."""


class ObjectKeyInvalid(StoreError):
    """Object keys are relative paths of plain segments: no empty one, no `.` or `..`, no control characters."""


class LocalDiskFailed(StoreError):
    """The local disk could not hold the object. Free space in the data directory."""


class StoreDenied(StoreError):
    """The store refused our credentials. Run `lodger doctor`."""


class StoreUnavailable(StoreError):
    """The store cannot be reached or answered with an error. Run `lodger doctor`."""
