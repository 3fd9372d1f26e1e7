"""What can go wrong with an adapter or its store. Docstring = default message = what to do next.

    AdapterError                    code, param
    ├── AdapterRefused              the door said no (one subclass per code below); never served, never the base instead
    ├── AdapterNotFound             no such adapter, version or alias for this tenant
    ├── AdapterNameInvalid
    ├── AdapterQuarantined          this digest made non-finite values or failed its check
    ├── AdapterConflict             the state of the adapter forbids it (an aliased version is not deleted)
    └── AdapterUnavailable          the store is down, slow, or answered with the wrong bytes: try again
        └── AdapterDigestMismatch
    StoreError                      raised by a BlobStore
    ├── ObjectNotFound · ObjectTooLarge · StoreDenied
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


class StoreDenied(StoreError):
    """The store refused our credentials. Run `lodger doctor`."""


class StoreUnavailable(StoreError):
    """The store cannot be reached or answered with an error. Run `lodger doctor`."""
