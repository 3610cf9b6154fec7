"""What is taken out before anything is written, and what must stay."""

from __future__ import annotations

import json

import pytest

from trimtab.registry.redact import REDACTED, is_secret_name, redact, redact_text


@pytest.mark.parametrize(
    "name",
    [
        *("api_key", "apiKey", "x-api-key", "judge.args.api_key", "OPENAI_API_KEY", "hf_token", "token"),
        *("password", "Authorization", "client_secret", "aws_secret_access_key", "basic_auth", "private_key"),
    ],
)
def test_names_of_credentials(name: str) -> None:
    assert is_secret_name(name)
    assert redact({name: "xyz"}) == {name: REDACTED}
    assert redact({"a": [{name: {"deep": ["xyz", 12]}}]}) == {"a": [{name: {"deep": [REDACTED, REDACTED]}}]}


@pytest.mark.parametrize(
    "name",
    [
        *("max_tokens", "tokenizer", "token_budget", "eos_token", "per_token", "tokens", "key", "author"),
        *(
            "api_key_env",
            "password_file",
            "data/secret/pairs.jsonl",
            "secret.jsonl",
            "keyboard",
            "stop_token",
        ),
    ],
)
def test_names_that_only_look_like_it(name: str) -> None:
    assert not is_secret_name(name)
    assert redact({name: "xyz"}) == {name: "xyz"}


def test_numbers_of_tokens_stay_and_numbers_under_a_password_go() -> None:
    assert redact({"token": 7, "password": 7, "secret": None, "secrets": True}) == {
        "token": 7,
        "password": REDACTED,
        "secret": None,
        "secrets": True,
    }


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://me:pw@host/v1", f"https://{REDACTED}@host/v1"),
        ("git+https://abc@host/x.git", f"git+https://{REDACTED}@host/x.git"),
        ("http://h/?key=abc&n=2&access_token=d", f"http://h/?key={REDACTED}&n=2&access_token={REDACTED}"),
        ("http://h/?monkey=1#a@b", "http://h/?monkey=1#a@b"),
        ("mail a@b.org, see http://h/a@b", "mail a@b.org, see http://h/a@b"),
        ("Authorization: Bearer abc123def456", f"Authorization: Bearer {REDACTED}"),
        ("the Bearer instrument", "the Bearer instrument"),
        ("used sk-abcdefghijklmnopqrst here", f"used {REDACTED} here"),
        ("hf_abcdefghijklmnopqrstuv", REDACTED),
        ("task-sk-1 hf_model", "task-sk-1 hf_model"),
    ],
)
def test_text(text: str, clean: str) -> None:
    assert redact_text(text) == clean
    assert redact_text(clean) == clean, "what is clean stays as it is"


def test_values_of_secret_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "correct-horse")
    monkeypatch.setenv("MY_JUDGE", "pony1")
    monkeypatch.setenv("SHORT_TOKEN", "train")
    monkeypatch.setenv("PLAIN", "not-a-secret-at-all")
    values = {
        "a": "with correct-horse in it",
        "correct-horse": 1,
        "split": "train",
        "plain": "not-a-secret-at-all",
        "judge": {"api_key_env": "MY_JUDGE"},
        "b": "pony1",
        "c": "ponytail pony1",
    }
    clean = redact(values)
    assert clean["a"] == f"with {REDACTED} in it"
    assert clean[REDACTED] == 1
    # What is as short as a word is secret only where it stands alone and its variable is named.
    assert (clean["split"], clean["plain"]) == ("train", "not-a-secret-at-all")
    assert clean["judge"] == {"api_key_env": "MY_JUDGE"}
    assert (clean["b"], clean["c"]) == (REDACTED, "ponytail pony1")
    assert redact(clean) == clean


def test_a_key_put_where_its_variable_belongs() -> None:
    assert redact({"api_key_env": "ab/cd+ef"}) == {"api_key_env": REDACTED}


def test_other_objects_become_text_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X_PASSWORD", "longenough1")

    class Odd:
        def __str__(self) -> str:
            return "it says longenough1"

    assert json.dumps(redact({"odd": Odd(), "many": ("longenough1",)})).count("longenough1") == 0
