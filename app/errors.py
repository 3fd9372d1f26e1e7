"""What can go wrong with a request or a job. Its sibling is `adapters.errors`; `app/api/errors.py` maps both to HTTP.

LodgerError                     code, param; docstring = default message = what to do next
├── RequestInvalid              the client's request can never work as it is
│   ├── CallInProgress
│   ├── ContextLengthExceeded
│   ├── ModelNotFound
│   ├── UnknownParameter
│   └── UnsupportedParameter
├── AccessDenied
│   ├── InvalidApiKey · TenantRequired · TenantMismatch · TenantErased · InsufficientScope
├── RateLimited                 this tenant's limit
├── ServerBusy                  the server's state: come again
│   ├── QueueFull · ServerDraining · EngineNotReady · OutOfMemory · DatabaseUnavailable
├── DeadlineExceeded
└── InternalError               our fault; nothing of the cause reaches the client but the request id
    └── NonFiniteOutput         this adapter version made NaN or inf
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from app.rate_limits import Allowance


class LodgerError(Exception):
    """Something went wrong. Quote the request id."""

    code = "server_error"

    def __init__(self, message: str | None = None, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip())
        self.param = param
        if code is not None:
            self.code = code

    @property
    def message(self) -> str:
        return str(self.args[0])


class RequestInvalid(LodgerError):
    """The request cannot be served as it is; `param` names the field to change."""

    code = "invalid_value"


class CallInProgress(RequestInvalid):
    """The first call with this Idempotency-Key is still at work. Repeat this one shortly to get its answer."""

    code = "idempotency_in_progress"


class ContextLengthExceeded(RequestInvalid):
    """Prompt and max_tokens together exceed the model's context. Shorten the prompt or ask for fewer tokens."""

    code = "context_length_exceeded"


class ModelNotFound(RequestInvalid):
    """No such model for this key. GET /v1/models lists what can be asked for."""

    code = "model_not_found"


class UnknownParameter(RequestInvalid):
    """This field does not exist here. Remove it."""

    code = "unknown_parameter"


class UnsupportedParameter(RequestInvalid):
    """This field exists in the OpenAI API and is not supported here yet. Remove it."""

    code = "unsupported_parameter"


class AccessDenied(LodgerError):
    """This key may not do that."""

    code = "insufficient_scope"


class InvalidApiKey(AccessDenied):
    """The API key is missing, unknown, revoked or expired. Send `Authorization: Bearer <key>`."""

    code = "invalid_api_key"


class TenantRequired(AccessDenied):
    """A service key acts for several tenants: name one in the header X-Tenant-ID."""

    code = "tenant_required"


class TenantMismatch(AccessDenied):
    """X-Tenant-ID names a tenant that this key does not belong to."""

    code = "tenant_mismatch"


class TenantErased(AccessDenied):
    """This tenant was erased. Nothing of it is left, and its id is not used again."""

    code = "tenant_erased"


class InsufficientScope(AccessDenied):
    """This needs the admin key."""


class RateLimited(LodgerError):
    """This tenant's limit is reached. Wait for the time that Retry-After names."""

    code = "rate_limit_exceeded"

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        allowances: Mapping[str, Allowance] | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_s = retry_after_s  # None: waiting alone does not help, or nobody knows
        self.allowances = allowances or {}  # what is left of each limit, where it is one a minute


class ServerBusy(LodgerError):
    """The server cannot take this now. Try again after the time that Retry-After names."""

    code = "overloaded"


class QueueFull(ServerBusy):
    """The server's queue is full. Try again after the time that Retry-After names."""


class ServerDraining(ServerBusy):
    """The server is shutting down. Send the request to another replica or try again."""

    code = "server_draining"


class EngineNotReady(ServerBusy):
    """The engine is not ready. Try again shortly."""

    code = "engine_not_ready"


class OutOfMemory(ServerBusy):
    """There was not enough memory for this request. Try again, or send a shorter prompt."""

    code = "insufficient_memory"


class DatabaseUnavailable(ServerBusy):
    """The server's database cannot be used now. Try again shortly."""


class DeadlineExceeded(LodgerError):
    """The request was not finished within its time limit. Ask for fewer tokens or allow more time."""

    code = "deadline_exceeded"


class InternalError(LodgerError):
    """Something went wrong on the server. Quote the request id."""


class NonFiniteOutput(InternalError):
    """This adapter version produced values that are not finite and has been quarantined. Publish a new version."""

    code = "adapter_quarantined"
