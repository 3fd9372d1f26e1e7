"""Parse a stranger's JSON: UTF-8 only, no duplicate keys, no NaN, bounded depth. The caller bounds the size first."""

from __future__ import annotations

import json
from typing import Any, NoReturn


class JsonRefused(ValueError):
    """The text is no JSON object that two parsers would read alike; the message is the end of a sentence."""


def parse_object(data: bytes, *, max_depth: int) -> dict[str, Any]:
    """Return the one object that `data` holds. Raises JsonRefused otherwise."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_constant)
        _check_depth(value, max_depth)
    except JsonRefused:
        raise
    except UnicodeDecodeError as exc:
        raise JsonRefused("it is not UTF-8") from exc
    except RecursionError as exc:
        raise JsonRefused("it is nested too deeply") from exc
    except json.JSONDecodeError as exc:
        raise JsonRefused(f"it is not JSON (line {exc.lineno}, column {exc.colno})") from exc
    except ValueError as exc:  # an integer of thousands of digits
        raise JsonRefused("a number in it is too long") from exc
    if not isinstance(value, dict):
        raise JsonRefused("it is not a JSON object")
    return value


def shown(text: str, limit: int = 160) -> str:
    """A stranger's text made safe for messages and logs: printable ASCII, at most `limit` characters."""
    safe = text[:limit].encode("unicode_escape", "backslashreplace").decode("ascii")
    return safe if len(text) <= limit and len(safe) <= limit else safe[: limit - 3] + "..."


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:  # programs disagree on which of the two values counts
            raise JsonRefused(f"the key {shown(key)} occurs twice")
        result[key] = value
    return result


def _constant(name: str) -> NoReturn:
    raise JsonRefused(f"{name} is not JSON")


def _check_depth(value: Any, left: int) -> None:
    if not isinstance(value, dict | list):
        return
    if left == 0:
        raise JsonRefused("it is nested too deeply")
    for child in value.values() if isinstance(value, dict) else value:
        _check_depth(child, left - 1)
