"""API keys as text: making, reading, hashing, comparing. No database, no HTTP.

A key is `lk_<id>_<secret>`: 12 characters of a-z0-9 that may be shown and logged, then 256 random bits in base 62.
Since the secret has full entropy, its SHA-256 is stored without salt or pepper: there is nothing to guess or look up.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string
from dataclasses import dataclass, field

_ID_ALPHABET = string.ascii_lowercase + string.digits
_SECRET_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_SECRET_CHARS = 43  # 62 ** 43 > 2 ** 256
_FORM = re.compile(rf"lk_([a-z0-9]{{12}})_([0-9A-Za-z]{{{_SECRET_CHARS}}})")
_MISS = "0" * 64


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A new key. `text` is shown once and kept nowhere; it is left out of the representation."""

    id: str
    text: str = field(repr=False)

    @property
    def sha256(self) -> str:
        return hash_key(self.text)


def new_key() -> ApiKey:
    key_id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(12))
    number = int.from_bytes(secrets.token_bytes(32), "big")
    digits = []
    for _ in range(_SECRET_CHARS):
        number, digit = divmod(number, 62)
        digits.append(_SECRET_ALPHABET[digit])
    return ApiKey(key_id, f"lk_{key_id}_{''.join(digits)}")


def read_key_id(text: str) -> str | None:
    """The id in a key's text; None when this is no key of ours."""
    match = _FORM.fullmatch(text)
    return None if match is None else match.group(1)


def hash_key(text: str) -> str:
    return hashlib.sha256(b"lodger-api-key-v1\0" + text.encode()).hexdigest()


def is_right(text: str, stored_sha256: str | None) -> bool:
    """Compare in constant time; a miss (None) costs the same hash and comparison as a wrong secret."""
    return secrets.compare_digest(hash_key(text), stored_sha256 or _MISS) and stored_sha256 is not None
