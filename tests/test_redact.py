"""Secrets are hidden, and what only looks like one is not."""

import pytest

from wrapq.redact import HIDDEN, is_secret, redact, redact_value


@pytest.mark.parametrize(
    "key",
    [
        "token",
        "hf_token",
        "tracking.token",
        "HF_TOKEN",
        "apiKey",
        "api-key",
        "aws_secret_access_key",
        "db.password",
        "credentials",
        "clientSecret",
        "Authorization",
        "model.options.API_KEY",
        "tokens",
    ],
)
def test_secret_keys(key: str) -> None:
    assert is_secret(key, "abc")
    assert redact_value(key, "abc") == HIDDEN


@pytest.mark.parametrize(
    "key, value",
    [
        ("model.tokenizer", "demo"),
        ("evaluation.tokens", 16384),
        ("evaluation.tokens", "16384"),
        ("granularity", "token"),
        ("per_token", True),
        ("tokens", "/data/rows.npy"),
        ("tokens", "rows.safetensors"),
        ("hf_token", None),
        ("hf_token", ""),
        ("calibration.source", "tokens"),
        ("secretary", "Ann"),
    ],
)
def test_what_is_no_secret(key: str, value: object) -> None:
    assert redact_value(key, value) == str(value)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("token: abc", "token: [redacted]"),
        ("a:\n  hf_token: abc  # mine", "a:\n  hf_token: [redacted]  # mine"),
        ("{hf: {token: abc}}", "{hf: {token: [redacted]}}"),
        ('{"api_key": "a b", "tokens": 12}', '{"api_key": "[redacted]", "tokens": 12}'),
        (r'"line": "{\"secret\": \"abc\"}"', r'"line": "{\"secret\": \"[redacted]\"}"'),
        ("uri: https://h/?token=abc&x=1", "uri: https://h/?token=[redacted]&x=1"),
        ("postgresql://me:p@ss@host/db", "postgresql://[redacted]@host/db"),
        ("https://ghp_x@host", "https://[redacted]@host"),
        ("run model.password='a b' x=1", "run model.password='[redacted]' x=1"),
        ("Authorization: Bearer abcdef0123", "Authorization: [redacted] [redacted]"),
        ("got hf_abcdefghijklmnopqrst here", "got [redacted] here"),
    ],
)
def test_text(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "tokens:/data/rows.npy gives 3 samples",
        "tokens:rows.npy",
        "input: int8:token:dyn",
        '["int8:token:dyn"]',
        "granularity: token\n  dynamic: true",
        "token:\n  dynamic: true",
        "tokens: 65,536",
        "tokenizer: gpt2",
        "https://host:8080/a?b=c",
        "seen 12 tokens (of 13)",
        "tokens:/data/ids.npy",
        "calibration on tokens:ids.safetensors, 64 samples",
    ],
)
def test_plain_text_is_left_alone(text: str) -> None:
    assert redact(text) == text


def test_values_of_secret_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct-horse-battery")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert redact("failed with correct-horse-battery, false") == f"failed with {HIDDEN}, false"
