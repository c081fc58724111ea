"""Names and values as MLflow accepts them."""

from __future__ import annotations

import hashlib
import posixpath
import re

KEY_LENGTH = 250
PARAM_LENGTH = 6000
TAG_LENGTH = 8000


def entity_key(key: str) -> str:
    """`key` as MLflow accepts it: other characters become `_`, a key beyond the limit ends in a short digest."""
    clean = posixpath.normpath(re.sub(r"[^\w\-. :/]", "_", key)).lstrip("/.") or "_"
    if len(clean) <= KEY_LENGTH:
        return clean
    return f"{clean[: KEY_LENGTH - 9]}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def entity_value(text: str, limit: int) -> str:
    """`text` within `limit` characters; one that is cut says how long it was. Bytes of a path that are not UTF-8 are
    escaped."""
    text = text.encode(errors="backslashreplace").decode()
    note = f" ... [cut, {len(text)} characters]"
    return text if len(text) <= limit else text[: limit - len(note)] + note
