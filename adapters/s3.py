"""The store that is an S3 bucket. The only file that knows boto3; its errors become ours in `translate`.

Explicit time limits throughout: boto3's defaults wait a minute for a dead host. No method uses If-Match, since only the
create-only half of conditional writes works everywhere. Calls block and may come from any thread.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import boto3
import botocore.exceptions as aws
import urllib3.exceptions
from botocore.config import Config

from adapters.breaker import CircuitBreaker
from adapters.errors import (
    LocalDiskFailed,
    ObjectNotFound,
    ObjectTooLarge,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)
from adapters.store import (
    PROBE_KEY,
    Names,
    ObjectInfo,
    ObjectInfos,
    check_key,
    check_prefix,
    is_key,
    open_local,
    probe_create_only,
)

MAX_PUT_BYTES = 5 << 30  # the most that one PUT may carry
CHUNK_BYTES = 256 << 10
PAGE_KEYS = 1000

_FOREIGN_ERRORS = (aws.BotoCoreError, aws.ClientError, urllib3.exceptions.HTTPError)
_DENIED_ERRORS = (
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.CredentialRetrievalError,
    aws.NoAuthTokenError,
    aws.TokenRetrievalError,
)
_DENIED_CODES = frozenset(
    {
        "AccessDenied",
        "AuthorizationHeaderMalformed",  # signed for another region
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidToken",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
    }
)


class S3Store:
    """Objects of one bucket below one prefix. Credentials come from the usual AWS variables, files or roles.

    `object_timeout_s` bounds a whole call: its attempts, the pauses between them and a body that trickles in.
    `on_call(op, outcome, seconds)` is told of every call, in the calling thread; outcomes are ok, error, paused and
    those of `_OUTCOMES`.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint_url: str | None = None,
        region: str | None = None,
        addressing_style: Literal["auto", "path", "virtual"] = "auto",
        connect_timeout_s: float = 1.5,
        read_timeout_s: float = 8.0,
        object_timeout_s: float = 20.0,
        max_attempts: int = 3,
        pool_connections: int = 32,
        upload_checksums: Literal["when_required", "when_supported"] = "when_required",
        clock: Callable[[], float] = time.monotonic,
        on_call: Callable[[str, str, float], None] | None = None,
    ) -> None:
        self.bucket = bucket
        self._prefix = check_prefix(prefix.strip("/") + "/" if prefix.strip("/") else "")
        self._attempt_s = connect_timeout_s + read_timeout_s
        self._read_timeout_s = read_timeout_s
        self._object_timeout_s = object_timeout_s
        self._clock = clock
        self._on_call = on_call
        self.breaker = CircuitBreaker(clock)
        self._budget = _Budget()
        self._client: Any = boto3.session.Session().client(
            "s3",
            endpoint_url=endpoint_url,
            region_name=region,
            config=Config(
                retries={"mode": "standard", "total_max_attempts": max_attempts},
                connect_timeout=connect_timeout_s,
                read_timeout=read_timeout_s,
                max_pool_connections=pool_connections,
                signature_version="s3v4",
                s3={"addressing_style": addressing_style},
                # Uploads may carry S3's own checksums where a store has them. Downloads are never checked by boto3:
                # adapters are checked against the sha256 of their manifest, wherever they come from.
                request_checksum_calculation=upload_checksums,
                response_checksum_validation="when_required",
                tcp_keepalive=True,
            ),
        )
        self._client.meta.events.register("before-send.s3", self._check_budget)

    def head(self, key: str) -> ObjectInfo:
        with self._call("head", key) as where:
            answer = self._client.head_object(**where)
            return ObjectInfo(key, answer["ContentLength"], answer["ETag"].strip('"'))

    def get(self, key: str, *, max_bytes: int) -> bytes:
        with self._call("get", key) as where:
            answer = self._client.get_object(**where)
            return b"".join(self._chunks(answer, max_bytes))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        if length <= 0:  # no Range header can ask for nothing
            self.head(key)
            return b""
        with self._call("get", key) as where:
            try:
                answer = self._client.get_object(**where, Range=f"bytes={start}-{start + length - 1}")
            except aws.ClientError as exc:
                if _status(exc) == 416:  # begins past the end
                    return b""
                raise
            return b"".join(self._chunks(answer, length))

    def download(self, key: str, path: Path, *, max_bytes: int) -> ObjectInfo:
        with self._call("get", key) as where:
            answer = self._client.get_object(**where)
            try:
                with path.open("wb") as file:
                    for chunk in self._chunks(answer, max_bytes):
                        file.write(chunk)
            except OSError as exc:
                if isinstance(exc, _FOREIGN_ERRORS):  # some of botocore's errors are OSErrors too
                    raise
                raise LocalDiskFailed() from exc
            return ObjectInfo(key, answer["ContentLength"], answer["ETag"].strip('"'))

    def put(self, key: str, data: bytes | Path) -> None:
        with self._call("put", key) as where, _body(data) as body:
            self._client.put_object(**where, Body=body)

    def put_if_absent(self, key: str, data: bytes | Path) -> bool:
        """As the protocol says. False may also follow this call's own write, when its first answer was lost."""
        if isinstance(data, Path):  # spare sending a large blob that is there already; the PUT is what decides
            with contextlib.suppress(ObjectNotFound):
                self.head(key)
                return False
        with self._call("create", key) as where, _body(data) as body:
            while True:
                try:
                    self._client.put_object(**where, Body=body, IfNoneMatch="*")
                    return True
                except aws.ClientError as exc:
                    if _status(exc) == 412:
                        return False
                    # 409: another writer is at it just now, nothing is decided.
                    if _status(exc) != 409 or self._remaining() <= 0:
                        raise
                time.sleep(random.uniform(0.02, 0.1))
                if not isinstance(body, bytes):
                    body.seek(0)

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> ObjectInfos:
        check_prefix(prefix)
        found: ObjectInfos = []
        query: dict[str, Any] = {"StartAfter": self._prefix + after} if after else {}
        while limit is None or len(found) < limit:
            answer = self._page(prefix, {**query, "MaxKeys": min(PAGE_KEYS, limit or PAGE_KEYS)})
            for entry in answer.get("Contents", ()):
                key = entry["Key"][len(self._prefix) :]
                if is_key(key):  # a console's "folders" are empty objects whose keys end in a slash
                    found.append(ObjectInfo(key, entry["Size"], entry["ETag"].strip('"')))
            if not answer.get("IsTruncated"):
                break
            query = {"ContinuationToken": answer["NextContinuationToken"]}
        return found[:limit]

    def list_dirs(self, prefix: str) -> Names:
        check_prefix(prefix)
        names: Names = []
        query: dict[str, Any] = {}
        while True:
            answer = self._page(prefix, {**query, "Delimiter": "/"})
            for entry in answer.get("CommonPrefixes", ()):
                key = entry["Prefix"][len(self._prefix) : -1]
                if is_key(key):
                    names.append(key.rsplit("/", 1)[-1])
            if not answer.get("IsTruncated"):
                return sorted(names)
            query = {"ContinuationToken": answer["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        with self._call("delete", key) as where:
            self._client.delete_object(**where)

    def probe(self) -> Names:
        try:
            self.list("tenants/", limit=1)
        except StoreDenied as exc:
            return [f"Cannot list the bucket {self.bucket}: {exc} Check the AWS_ variables and grant s3:ListBucket."]
        except StoreError as exc:
            return [f"Cannot list the bucket {self.bucket}: {exc} Check the endpoint, the region and the bucket."]
        problems = probe_create_only(self)
        with contextlib.suppress(StoreError):  # servers need not be allowed to delete
            self.delete(PROBE_KEY)
        return problems

    def close(self) -> None:
        self._client.close()

    def _page(self, prefix: str, query: dict[str, Any]) -> dict[str, Any]:
        with self._call("list", None) as where:
            answer: dict[str, Any] = self._client.list_objects_v2(**where, Prefix=self._prefix + prefix, **query)
            return answer

    @contextlib.contextmanager
    def _call(self, op: str, key: str | None) -> Iterator[dict[str, str]]:
        """Guard one call: breaker, time budget, errors, observer. Yields the arguments that name the object."""
        where = {"Bucket": self.bucket}
        if key is not None:
            where["Key"] = self._prefix + check_key(key)
        if not self.breaker.admit():
            self._observe(op, "paused", 0.0)
            raise StoreUnavailable("The store failed several times; calls are paused for a few seconds.")
        started = self._clock()
        self._budget.deadline, self._budget.attempts = started + self._object_timeout_s, 0
        error: BaseException | None = None
        try:
            yield where
        except _FOREIGN_ERRORS as exc:
            error = translate(exc)
            raise error from exc
        except BaseException as exc:
            error = exc
            raise
        finally:
            # Whatever the store answered, it answered: only its silence and its own failures open the breaker.
            if isinstance(error, StoreUnavailable):
                self.breaker.failed()
            else:
                self.breaker.succeeded()
            self._observe(op, "ok" if error is None else _OUTCOMES.get(type(error), "error"), self._clock() - started)

    def _observe(self, op: str, outcome: str, seconds: float) -> None:
        if self._on_call is not None:
            self._on_call(op, outcome, seconds)

    def _remaining(self) -> float:
        return self._budget.deadline - self._clock()

    def _check_budget(self, **_: Any) -> None:
        """Stop before an attempt that could outlast the call's budget. botocore calls it before every attempt."""
        self._budget.attempts += 1
        if self._budget.attempts > 1 and self._remaining() < self._attempt_s:
            raise StoreUnavailable("The store did not answer in time.")

    def _chunks(self, answer: dict[str, Any], max_bytes: int) -> Iterator[bytes]:
        """Yield the body as it arrives; raises ObjectTooLarge before the first byte, StoreUnavailable when late."""
        with contextlib.closing(answer["Body"]) as body:
            expected: int = answer["ContentLength"]
            if expected > max_bytes:
                raise ObjectTooLarge(f"The object has {expected} bytes; at most {max_bytes} are read here.")
            received = 0
            while received < expected:
                remaining = self._remaining()
                if remaining <= 0:
                    raise StoreUnavailable("The store sent the object too slowly.")
                if remaining < self._read_timeout_s:
                    body.set_socket_timeout(remaining)
                # The public read() waits for as many bytes as it was asked for, so a store that sends one byte at a
                # time would hold us for hours; read1 returns with whatever has come.
                chunk: bytes = body._raw_stream.read1(min(CHUNK_BYTES, expected - received))
                if not chunk:
                    raise StoreUnavailable("The store's answer ended early.")
                received += len(chunk)
                yield chunk


class _Budget(threading.local):
    """What is left of the calling thread's present call."""

    deadline = 0.0  # on the store's clock
    attempts = 0


_OUTCOMES: dict[type[BaseException], str] = {
    ObjectNotFound: "absent",
    ObjectTooLarge: "too_large",
    StoreDenied: "denied",
    StoreUnavailable: "unavailable",
}


@contextlib.contextmanager
def _body(data: bytes | Path) -> Iterator[Any]:
    if isinstance(data, bytes):
        yield data
        return
    with open_local(data) as file:
        if data.stat().st_size > MAX_PUT_BYTES:
            raise ObjectTooLarge(f"One object may have {MAX_PUT_BYTES} bytes here.")
        yield file


def _status(exc: aws.ClientError) -> int:
    status: int = exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status


def translate(exc: Exception) -> StoreError:
    """Return our error for one of boto3's. Its text names no key, host or credential: tenants may get to see it."""
    if isinstance(exc, aws.ClientError):
        code, status = str(exc.response.get("Error", {}).get("Code", "")), _status(exc)
        if code == "NoSuchBucket":
            return StoreUnavailable("The store's bucket does not exist. Create it or correct the store's URL.")
        if status in {401, 403} or code in _DENIED_CODES:
            return StoreDenied(f"The store refused our credentials ({code}).")
        if status == 404:
            return ObjectNotFound()
        return StoreUnavailable(f"The store answered {code} ({status}).")
    if isinstance(exc, _DENIED_ERRORS):
        return StoreDenied("There are no usable credentials for the store. Set AWS_ACCESS_KEY_ID and its secret.")
    if isinstance(exc, aws.ParamValidationError | aws.ValidationError):
        return StoreUnavailable("The store's settings are not valid: check the bucket's name, endpoint and region.")
    return StoreUnavailable("The store cannot be reached or broke off.")
