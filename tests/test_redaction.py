from __future__ import annotations

import json
import logging
import urllib.parse

import pytest

from launchers import ending
from pipeline.errors import ConfigError
from pipeline.redaction import printable, redact, redact_all


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://u:p@host/x", "http://u:[redacted]@host/x"),
        ("http://u:p@ss/w:d@host", "http://u:[redacted]@host"),
        ("http://u:1234@host", "http://u:[redacted]@host"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("https://ghp_x@host/", "https://[redacted]@host/"),
        ("postgresql+psycopg://me:pw@db/x", "postgresql+psycopg://me:[redacted]@db/x"),
        ("http://h/?access_key=abc&x=1", "http://h/?access_key=[redacted]&x=1"),
        ("override 'tracking.password=hunter2': unknown", "override 'tracking.password=[redacted]': unknown"),
        ("expected http://USER:PASSWORD@HOST:PORT, with", "expected http://USER:PASSWORD@HOST:PORT, with"),
        ('{"api_key": "hun ter2", "x": 1}', '{"api_key": "[redacted]", "x": 1}'),
        (
            '{"num_tokens": 1024, "uri": "http://h:80", "b": "x@y"}',
            '{"num_tokens": 1024, "uri": "http://h:80", "b": "x@y"}',
        ),
        ("Authorization: Bearer abc.def", "Authorization: [redacted]"),
        ("class_token: false", "class_token: false"),
        ("DB_PWD=hunter2 SLURM_JWT=eyJhbGci.x", "DB_PWD=[redacted] SLURM_JWT=[redacted]"),
        ("passphrase: abcdef", "passphrase: [redacted]"),
        ("Cookie: session=abcdef", "Cookie: [redacted]"),
        ("a correct-horse b", "a [redacted] b"),
    ],
)
def test_redact(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct-horse")
    monkeypatch.setenv("SOME_TOKEN", "a")  # too short to be looked for
    assert redact(text) == expected
    assert redact(expected) == expected


def test_secrets_of_the_environment_by_their_names_and_not_the_folder_of_the_shell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("SLURM_JWT", "DB_PWD", "KEY_PASSPHRASE", "SESSION_COOKIE"):
        monkeypatch.setenv(name, f"value-of-{name.lower()}")
        assert redact(f"it is value-of-{name.lower()} here") == "it is [redacted] here"
    for name in ("PWD", "OLDPWD"):
        monkeypatch.setenv(name, "/home/somebody")
    assert redact("/home/somebody/runs") == "/home/somebody/runs"


def test_what_is_logged_to_the_terminal_is_redacted() -> None:
    record = logging.makeLogRecord(
        {"msg": "cannot open %s", "args": ("http://me:hunter2@host",), "levelno": logging.INFO}
    )
    assert ending._Formatter("%(message)s").format(record) == "cannot open http://me:[redacted]@host"


def test_redacted_json_stays_json() -> None:
    state = {
        "note": "my password: ",
        "x": "abc",
        "api_key": "k",
        "tokens": 1024,
        "nested": [{"secret": "s"}, "http://u:p@h"],
    }
    assert json.loads(json.dumps(redact_all(state))) == {
        "note": "my password: ",
        "x": "abc",
        "api_key": "[redacted]",
        "tokens": 1024,
        "nested": [{"secret": "[redacted]"}, "http://u:[redacted]@h"],
    }


def test_a_message_is_one_printable_line() -> None:
    assert printable("a\n b\x1b[2J\u202e\ud800") == "a b\\x1b[2J\\u202e\\ud800"
    assert len(ConfigError("x" * 10_000).what) == 4001


def test_what_is_quoted_in_an_address_is_hidden_as_a_whole() -> None:
    quoted = urllib.parse.quote("p@ss/word", safe="")
    assert redact(f"http://me:{quoted}@host") == "http://me:[redacted]@host"
