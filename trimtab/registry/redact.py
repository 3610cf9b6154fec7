"""Secrets taken out of what is written down: lineage, reports, configurations, log lines.

What counts as a secret: a value whose key names a credential (``api_key``, ``hf_token``, ``password`` …),
the user part and the credentials in the query of an address, text in the form of a known kind of key, and
whatever equals the value of an environment variable that holds a secret. It is replaced by ``[redacted]``;
everything else stays as it is, so ``max_tokens``, ``tokenizer`` and ``token_budget`` do too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

REDACTED = "[redacted]"

ALWAYS = {
    *("apikey", "password", "passwd", "passphrase", "secret", "secrets", "authorization"),
    *("credential", "credentials", "cookie", "bearer"),
}
"""A key with one of these words is a credential's."""
PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("signing", "key"), ("auth", "key")}
"""One with these words side by side, too."""
LAST = {"token", "auth"}
"""And one that ends in these, unless a tokenizer's own token is meant."""
TEXT_TOKENS = {
    *("bos", "eos", "pad", "unk", "sep", "cls", "mask", "stop", "end", "start", "image", "audio"),
    *("video", "special", "extra", "additional", "per", "by", "new", "last", "next", "first"),
}
QUERY = {"key", "sig", "signature", "code"}
"""Names that are credentials in an address's query only."""
SHORTEST = 8
"""Characters from which the value of a secret variable is looked for inside other text."""

KNOWN_FORMS = re.compile(
    r"""\b(?: sk-[\w-]{16,}              # model endpoints
        | hf_[A-Za-z0-9]{20,}
        | gh[pousr]_[A-Za-z0-9]{20,} | github_pat_\w{20,} | glpat-[\w-]{16,}
        | AKIA[0-9A-Z]{16} | xox[abprs]-[\w-]{10,}
        | eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}   # JSON web tokens
    )""",
    re.VERBOSE,
)
BEARER = re.compile(r"\b(Bearer|Basic)\s+(?=\S{8,})(?=\S*\d)\S+")
PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S
)
USER = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^\s/@?#\"']+@")
PARAMETER = re.compile(r"([?&;])([\w.~%-]+)=([^&;#\s\"']+)")


def redact(values: Any) -> Any:
    """A copy of plain data (mappings, lists, text, numbers) without secrets; the same data twice the same.

    Anything that is none of these becomes text first. Variables that the data names themselves (a key that
    ends in ``_env``, such as ``api_key_env``) count as secret, whatever they are called.
    """
    return _walk(values, _secret_values(_named_variables(values)), hidden=False)


def redact_text(text: str) -> str:
    """The same for one text."""
    return _clean(text, _secret_values([]))


def is_secret_name(name: str) -> bool:
    """Whether a key, by its last dotted part, names a credential. A path is no name."""
    if "/" in name or "\\" in name:
        return False
    words = _words(name.rpartition(".")[2])
    if not words or words[-1] in ("env", "file", "path"):  # says where the secret is, which is none
        return False
    if ALWAYS & set(words) or PAIRS & set(pairwise(words)):
        return True
    return words[-1] in LAST and not TEXT_TOKENS & set(words[:-1])


def _words(name: str) -> list[str]:
    """``hfToken``, ``HF_TOKEN`` and ``hf-token`` are hf, token."""
    apart = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name)
    return [word for word in re.split(r"[^a-z0-9]+", apart.lower()) if word]


def _walk(values: Any, secrets: list[str], *, hidden: bool) -> Any:
    if isinstance(values, Mapping):
        return {
            _clean(key, secrets) if isinstance(key, str) else key: _walk(
                value, secrets, hidden=hidden or _hides(key, value)
            )
            for key, value in values.items()
        }
    if isinstance(values, list | tuple | set | frozenset):
        return [_walk(value, secrets, hidden=hidden) for value in values]
    if values is None or isinstance(values, bool):
        return values
    if isinstance(values, int | float):
        return REDACTED if hidden else values
    text = str(values)
    if hidden:
        return REDACTED if text else text
    return _clean(text, secrets)


def _hides(key: object, value: object) -> bool:
    """What stands under this key is a secret: all of it, where it is a mapping or a list."""
    if not isinstance(key, str):
        return False
    if key.endswith("_env"):  # the key itself, where the name of its variable belongs
        return isinstance(value, str) and re.fullmatch(r"\w*", value) is None
    # A number of that name counts tokens; a password may be one.
    counted = isinstance(value, int | float) and _words(key)[-1:] and _words(key)[-1] in LAST
    return is_secret_name(key) and not counted


def _clean(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        if text == secret or (len(secret) >= SHORTEST and secret in text):
            text = text.replace(secret, REDACTED)
    text = PRIVATE_KEY.sub(REDACTED, text)
    text = KNOWN_FORMS.sub(REDACTED, text)
    text = BEARER.sub(rf"\1 {REDACTED}", text)
    if "://" in text:
        text = USER.sub(rf"\1{REDACTED}@", text)
        text = PARAMETER.sub(_parameter, text)
    return text


def _parameter(found: re.Match[str]) -> str:
    mark, name, value = found.groups()
    if value == REDACTED or not (is_secret_name(name) or name.lower() in QUERY):
        return found[0]
    return f"{mark}{name}={REDACTED}"


def _secret_values(named: Iterable[str]) -> list[str]:
    """Values of the environment's secrets, the longest first, so that none is cut by another."""
    found = {value for name in named if len(value := os.environ.get(name, "").strip()) >= 4}
    for name, value in os.environ.items():
        secret = is_secret_name(name) or name.upper().endswith("_KEY")
        # Short ones and paths would be found in anything.
        if secret and len(value.strip()) >= SHORTEST and not os.path.exists(value.strip()):
            found.add(value.strip())
    return sorted(found, key=lambda value: (-len(value), value))


def _named_variables(values: Any) -> list[str]:
    """The environment variables that the data names."""
    if isinstance(values, Mapping):
        named = [str(v) for k, v in values.items() if isinstance(k, str) and k.endswith("_env")]
        return named + [name for value in values.values() for name in _named_variables(value)]
    if isinstance(values, list | tuple):
        return [name for value in values for name in _named_variables(value)]
    return []
