"""The one table from error class to HTTP answer, and the envelope every error leaves in.

    {"error": {"message": …, "type": …, "param": …, "code": …}}

Rows are looked up along the class's ancestors; a test proves that each class of both trees has a row of its own, or is
one of the door's refusals or the store's faults, which share one. The code is the exception's own. 422 is never sent:
the official client has no place for our fields in it. It repeats a 409, so that says nothing but "come again".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from adapters import errors as adapter_errors
from app import errors
from app.api.rate_headers import rate_headers

INVALID: Final = "invalid_request_error"
RATE: Final = "rate_limit_error"
SERVER: Final = "server_error"


@dataclass(frozen=True, slots=True)
class Answer:
    """How one class of error is told to a client. With `says_why` False only the class's own words leave the server."""

    status: int
    type: str
    says_why: bool = True


TABLE: Final[Mapping[type[Exception], Answer]] = {
    errors.LodgerError: Answer(500, SERVER, says_why=False),
    errors.RequestInvalid: Answer(400, INVALID),
    errors.CallInProgress: Answer(409, INVALID),  # the one 409: here the official client's repeating is right
    errors.ContextLengthExceeded: Answer(400, INVALID),
    errors.ModelNotFound: Answer(404, INVALID),
    errors.UnknownParameter: Answer(400, INVALID),
    errors.UnsupportedParameter: Answer(400, INVALID),
    errors.AccessDenied: Answer(403, INVALID),
    errors.InvalidApiKey: Answer(401, INVALID),
    errors.TenantRequired: Answer(400, INVALID),
    errors.TenantMismatch: Answer(403, INVALID),
    errors.TenantErased: Answer(410, INVALID),
    errors.InsufficientScope: Answer(403, INVALID),
    errors.RateLimited: Answer(429, RATE),
    errors.ServerBusy: Answer(503, SERVER),
    errors.QueueFull: Answer(503, SERVER),
    errors.ServerDraining: Answer(503, SERVER),
    errors.EngineNotReady: Answer(503, SERVER),
    errors.OutOfMemory: Answer(503, SERVER),
    errors.DatabaseUnavailable: Answer(503, SERVER),
    errors.DeadlineExceeded: Answer(504, SERVER),
    errors.InternalError: Answer(500, SERVER, says_why=False),
    errors.NonFiniteOutput: Answer(500, SERVER, says_why=False),
    adapter_errors.AdapterError: Answer(503, SERVER),
    adapter_errors.AdapterRefused: Answer(400, INVALID),
    adapter_errors.AdapterNotFound: Answer(404, INVALID),
    adapter_errors.AdapterNameInvalid: Answer(400, INVALID),
    adapter_errors.AdapterQuarantined: Answer(400, INVALID),
    adapter_errors.AdapterConflict: Answer(400, INVALID),
    adapter_errors.AdapterUnavailable: Answer(503, SERVER),
    adapter_errors.AdapterDigestMismatch: Answer(503, SERVER),
    adapter_errors.StoreError: Answer(503, SERVER, says_why=False),
}

STATUS_BY_CODE: Final[Mapping[str, int]] = {
    "adapter_too_large": 413,
    "request_too_large": 413,
    "file_too_large": 413,
    "unsupported_media_type": 415,
    "not_found": 404,
    "tenant_erased": 410,
}

HTTP_CODES: Final[Mapping[int, tuple[str, str]]] = {
    400: ("invalid_json", "The body could not be read. Send valid JSON."),
    404: ("not_found", "There is nothing here. Check the path and its spelling."),
    405: ("method_not_allowed", "This path does not take this method."),
    408: ("request_timeout", "The body did not arrive in time. Send it again."),
    413: ("request_too_large", "The body is larger than allowed here."),
    415: ("unsupported_media_type", "Send this body as application/json."),
}

STORE_FAULT: Final = "The adapter store cannot be reached now. Try again shortly."


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """An error ready to be sent: status, the envelope, and the headers that tell a client when to come back."""

    status: int
    type: str
    code: str
    message: str
    param: str | None
    headers: Mapping[str, str]

    @property
    def envelope(self) -> dict[str, Any]:
        body = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": body}

    @property
    def body(self) -> bytes:
        return json.dumps(self.envelope).encode()


def answer_for(error: BaseException, *, retry_after_s: float = 1.0) -> ErrorAnswer:
    """Turn any exception into what the client gets; `retry_after_s` is the server's estimate for 503s.

    What no row knows is a 500 without a word of the cause.
    """
    row = next((TABLE[cls] for cls in type(error).__mro__ if cls in TABLE), None)
    if row is None:
        error, row = errors.InternalError(), TABLE[errors.InternalError]
    code = getattr(error, "code", None)
    if code is None:  # a StoreError: the bucket's own words stay inside
        code, message = adapter_errors.AdapterUnavailable.code, STORE_FAULT
    else:
        message = str(error.args[0]) if row.says_why and error.args else (type(error).__doc__ or "").strip()
    status = STATUS_BY_CODE.get(code, row.status)
    headers = _headers(status, code, getattr(error, "retry_after_s", None) or retry_after_s)
    headers |= rate_headers(getattr(error, "allowances", {}))
    kind = INVALID if 400 <= status < 500 and row.type == SERVER else row.type
    return ErrorAnswer(status, kind, code, message, getattr(error, "param", None), headers)


def answer_for_status(status: int, *, code: str | None = None, message: str | None = None) -> ErrorAnswer:
    """The answer for what the framework found by itself: no route, wrong method, body too large."""
    if status in HTTP_CODES:
        usual, words = HTTP_CODES[status]
        return ErrorAnswer(status, INVALID, code or usual, message or words, None, {})
    if 400 <= status < 500:
        return ErrorAnswer(status, INVALID, code or "invalid_value", message or "The request is not valid.", None, {})
    return answer_for(errors.InternalError())


def _headers(status: int, code: str, retry_after_s: float) -> dict[str, str]:
    headers: dict[str, str] = {}
    if status in (409, 429, 503):
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    if code in ("quota_exceeded", "deadline_exceeded"):
        headers["x-should-retry"] = "false"  # coming back at once cannot help
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if code == errors.ServerDraining.code:
        headers["Connection"] = "close"
    return headers


def from_validation(findings: Sequence[Mapping[str, Any]]) -> errors.RequestInvalid:
    """The first of pydantic's findings, as our own error: which field, and what is wrong with it.

    An unknown field wins over the rest: it is usually the misspelling that explains them.
    """
    unknown = next((f for f in findings if f["type"] == "extra_forbidden"), None)
    finding = unknown or findings[0]
    param = _param(finding["loc"])
    if finding["type"] == "json_invalid":
        return errors.RequestInvalid("The body is not valid JSON.", code="invalid_json")
    if unknown is not None:
        return errors.UnknownParameter(f"Unknown parameter: '{param}'. Remove it.", param=param)
    if finding["type"] == "missing":
        if param is None:
            return errors.RequestInvalid("A JSON body is required.", code="invalid_json")
        return errors.RequestInvalid(f"Missing required parameter: '{param}'.", param=param)
    if param is None:
        return errors.RequestInvalid("The body must be a JSON object, sent as application/json.", code="invalid_json")
    return errors.RequestInvalid(f"Invalid value for '{param}': {_reason(finding)}.", param=param)


def _reason(finding: Mapping[str, Any]) -> str:
    """Pydantic's sentence, which names the rule and never the input."""
    text = str(finding["msg"]).removeprefix("Value error, ")
    return (text[:1].lower() + text[1:]).rstrip(".")


def _param(loc: Sequence[str | int]) -> str | None:
    """`("body", "messages", 0, "content")` as `messages[0].content`; union branches are no part of a client's path."""
    text = ""
    for part in loc:
        if part in ("body", "query", "path", "header") and not text:
            continue
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.replace("_", "").isalnum() and not part[:1].isupper():
            text += f".{part}" if text else part
    return text[:128] or None
