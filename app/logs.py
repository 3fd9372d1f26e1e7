"""JSON lines on standard output, built from an allow-list: what is not named here cannot be logged by accident.

Prompts, outputs, keys, paths and exception texts have no field. One line per request comes from `app.api.middleware`.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TextIO

FIELDS = (
    "action",
    "request_id",
    "trace_id",
    "tenant",
    "key_id",
    "adapter",  # name@version
    "digest",  # first 12 hex characters
    "version",
    "rows",
    "rank",
    "method",
    "route",
    "status",
    "code",
    "outcome",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "queue_ms",
    "ttft_ms",
    "total_ms",
    "tier",
    "seconds",
    "count",
    "bytes",
    "reason",
    "error_class",
    "error_at",  # module:line of the frame that raised, never its text
    "host",
    "port",
    "base",
    "device",
    "job_id",
    "step",
)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, event (the message), then the allowed extras that are set."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        for name in FIELDS:
            value = record.__dict__.get(name)
            if value is not None:
                line[name] = value
        if record.exc_info and record.exc_info[1] is not None:
            line["error_class"], line["error_at"] = describe_error(record.exc_info[1])
        return json.dumps(line, separators=(",", ":"), default=str)


def describe_error(error: BaseException) -> tuple[str, str]:
    """An exception's class and where it was raised. Its text may hold a prompt or a key and is left out."""
    trace = error.__traceback__
    where = ""
    while trace is not None:
        where = f"{trace.tb_frame.f_globals.get('__name__', '?')}:{trace.tb_lineno}"
        trace = trace.tb_next
    return type(error).__name__, where


def configure_logging(level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send every logger through the one JSON handler; uvicorn's access log stays off, ours replaces it."""
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"
    for name in ("httpx", "httpcore", "botocore", "boto3", "urllib3", "python_multipart"):
        logging.getLogger(name).setLevel(logging.WARNING)
