"""Secrets never reach a record: values of secret-looking keys, passwords in addresses, well-known token shapes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

HIDDEN = "[redacted]"

# A key is secret by one of its words: `hf_token` and `apiKey` are, `tokenizer` is not.
_SECRET_KEY = re.compile(
    r"(?:^|[^a-z])(?:tokens?|secrets?|passwords?|passwd|api[_\-. ]?keys?|access[_\-. ]?keys?|private[_\-. ]?keys?|"
    r"credentials?|authorization)(?:[^a-z]|$)"
)
_COUNT_KEY = re.compile(r"(?:^|[^a-z])tokens(?:[^a-z]|$)")  # `evaluation.tokens: 16384` is a count
_FILE = re.compile(r"(?:~?/|\.{1,2}/|[A-Za-z]:[\\/])|.*\.(?:npy|safetensors)$")  # a data source says `tokens:PATH`
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_NUMBER = re.compile(r"[+-]?\d[\d_,]*(?:\.\d*)?(?:[eE][+-]?\d+)?$")
_HARMLESS = re.compile(r"(?i)(?:null|none|true|false|~|\[\]|\{\})?$")

_USER_INFO = re.compile(r"(?<=://)[^/\s\"']+@")
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_\-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w\-]{16,}"
    r"|xox[abprs]-[\w\-]{10,}|A[KS]IA[A-Z0-9]{16}|dapi[0-9a-f]{32}|eyJ[\w\-]{10,}\.[\w\-]{10,}\.[\w\-]+)"
    r"|(?i:(?<=bearer ))[\w\-.=+/]{8,}"
)
# key: value, key=value, "key": "value", in YAML, JSON, INI, a query string or a command line. What follows a colon
# directly is not a key: `int8:token:dyn` is a spec.
_PAIR = re.compile(
    r"""(?<![\w:])(?P<key>[A-Za-z_][\w.\-]*)(?P<link>\\?["']?[ \t]*[:=][ \t]*)"""
    r"""(?P<value>"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|\\"[^"\\\n]*\\"|[^\s"',;&}\])\[{]+)?"""
)
_SHORTEST = 8  # characters of a secret environment variable worth searching for: shorter ones are words


def is_secret(key: str, value: object = "unknown") -> bool:
    """Whether a value under `key` must not be recorded.

    A key is secret when one of its words is token, secret, password, api_key, access_key, private_key, credential or
    authorization, in any case and plural. Under a plural `tokens` numbers are counts and paths are data; true, false,
    null and the empty string hide nothing.
    """
    words = _CAMEL.sub("_", key).lower()
    if not _SECRET_KEY.search(words):
        return False
    text = str(value).strip().strip("\"'")
    plain = _COUNT_KEY.search(words) and (_NUMBER.match(text) or _FILE.match(text))
    return not _HARMLESS.match(text) and not plain


def redact_value(key: str, value: Any) -> str:
    """`value` as text, hidden when `key` is secret, else with the secrets inside it hidden."""
    return HIDDEN if is_secret(key, value) else redact(str(value))


def redact(text: str) -> str:
    """`text` without passwords in addresses, values of secret keys, known token shapes, secrets of the environment."""
    for secret in _environment_secrets():
        text = text.replace(secret, HIDDEN)
    text = _SHAPES.sub(HIDDEN, _USER_INFO.sub(f"{HIDDEN}@", text))
    return "".join(_without_secret_pairs(text))


def _without_secret_pairs(text: str) -> Iterator[str]:
    at = 0
    while found := _PAIR.search(text, at):
        value = found["value"]
        if value and is_secret(found["key"], value):
            quote = '\\"' if value.startswith('\\"') else value[0] if value[0] in "\"'" else ""
            yield f"{text[at : found.start('value')]}{quote}{HIDDEN}{quote}"
            at = found.end()
        else:  # look inside the value too: it may be an address or a line of such pairs
            yield text[at : found.end("link")]
            at = found.end("link")
    yield text[at:]


def _environment_secrets() -> list[str]:
    """Values of secret-looking environment variables, longest first so that none leaves a part of another."""
    found = {v for k, v in os.environ.items() if len(v) >= _SHORTEST and is_secret(k, v)}
    return sorted((v for v in found if not os.path.isabs(v)), key=len, reverse=True)
