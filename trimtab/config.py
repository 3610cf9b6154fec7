"""Configuration: TOML plus dotted overrides into strict pydantic models. No torch.

A section is a pydantic model whose fields carry their documentation; the command line's ``--help`` and
the docs read it from there. Whatever is wrong ends in one line that names the key, the file and the line.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from trimtab.errors import InputError


class Section(BaseModel):
    """Base of every configuration section: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


DEEPEST = 32
"""Tables and lists within each other, at most: no option needs more."""
PLACES = {
    *("path", "out", "parent", "resume", "tokenizer", "chat_template", "reference", "rubric_file", "cache"),
    *("data_root", "base", "name"),
}
"""Options, by their last part, that name a file or a folder."""
SECRET_NAME = re.compile(
    r"(?:.*[_-])?(?:api[_-]?key|secret|password|passwd|authorization|(?:access|api|auth|bearer|hf)[_-]?token)",
    re.IGNORECASE,
)
"""Names under which people write secrets."""
SECRET = (
    "a secret has no place in a configuration, which runs copy: put it into an environment variable "
    "(a judge's is named in api_key_env)"
)
SECRET_ADDRESS = re.compile(
    r"[a-z][a-z0-9+.-]*://(?:[^/?#\s@]*:[^/?#\s@]+@|\S*[?&](?:key|sig|signature|token|[a-z_-]*"
    r"(?:api[_-]?key|secret|password|[_-]token))=[^&\s])",
    re.IGNORECASE,
)
"""An address with a password, or with a key among its parameters."""

C = TypeVar("C", bound=BaseModel)


def load_config(model: type[C], file: str | Path | None = None, overrides: dict[str, Any] | None = None) -> C:
    """Read ``file`` (TOML), put ``overrides`` ({"train.lr": "1e-5"}) on top, and validate.

    Override values that are strings are read as TOML values where they are ones, else as plain strings.
    Raises InputError for a missing file, broken TOML, an unknown key or a wrong type.
    """
    text = "" if file is None else _read(Path(file))
    given = overrides or {}
    verbatim: set[str] = set()
    while True:
        values = tomllib.loads(text)
        for key, value in given.items():
            if isinstance(value, str) and key not in verbatim:
                value = parse_value(value)
            _put(values, key, copy.deepcopy(value) if isinstance(value, dict) else value)
        location, problem = next(_unusable(values, []), ([], ""))
        if problem:
            key = ".".join(location)
            raise InputError(f"{_where(location, file, text, given)}: {key}: {problem}")
        try:
            return model.model_validate(values)
        except ValidationError as error:
            # A name such as 2024 or true reads as a TOML value; where text is wanted, it is the text.
            wanted = {".".join(map(str, p["loc"])) for p in error.errors() if p["type"] == "string_type"}
            wanted = {key for key in wanted - verbatim if isinstance(given.get(key), str)}
            if not wanted:
                raise InputError(_describe(error, model, file, text, given)) from None
            verbatim |= wanted


def _read(path: Path) -> str:
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such configuration file")
        text = path.read_text(encoding="utf-8")
        tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, or thousands of brackets
        raise InputError(f"{path}: TOML beyond what can be read: shorten the number or the nesting") from None
    return text


def parse_value(text: str) -> Any:
    """``"3"`` → 3, ``"true"`` → True, ``"[1, 2]"`` → list; anything that is not TOML stays a string."""
    try:
        read = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    # A text of several lines may hold further keys; and no option takes a date.
    return text if len(read) > 1 or hasattr(read["value"], "isoformat") else read["value"]


def dump_toml(config: BaseModel) -> str:
    """The resolved configuration as TOML, every field written out with its documentation above it."""
    lines: list[str] = []
    _dump(config, "", lines)
    return "\n".join(lines).lstrip() + "\n"


def fields(model: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str, Any]]:
    """Every leaf option as (dotted key, type, documentation, default), for help texts and docs."""
    out: list[tuple[str, str, str, Any]] = []
    for name, info in model.model_fields.items():
        annotation = info.annotation
        key = f"{prefix}{name}"
        section = _section(annotation)
        if section is not None:
            out += fields(section, f"{key}.")
        else:
            default = info.get_default(call_default_factory=True) if not info.is_required() else ...
            out.append((key, _type_name(annotation), info.description or "", default))
    return out


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, also where it may be left out (``Section | None``)."""
    parts = [part for part in (get_args(annotation) or (annotation,)) if part is not type(None)]
    if len(parts) == 1 and get_origin(annotation) not in (list, dict, tuple) and isinstance(parts[0], type):
        return parts[0] if issubclass(parts[0], BaseModel) else None
    return None


def _names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key that a file may hold, those of lists of sections without their numbers."""
    out: list[str] = []
    for name, info in model.model_fields.items():
        parts = [info.annotation, *get_args(info.annotation)]
        inner = next((p for p in parts if isinstance(p, type) and issubclass(p, BaseModel)), None)
        out.append(f"{prefix}{name}")
        if inner is not None and get_origin(info.annotation) is not dict:
            out += _names(inner, f"{prefix}{name}.")
    return out


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is None:
        return getattr(annotation, "__name__", str(annotation))
    if str(origin) == "typing.Literal":
        return "|".join(str(a) for a in arguments)
    if arguments and type(None) in arguments:
        return "|".join(_type_name(a) for a in arguments if a is not type(None))
    if origin in (list, dict, tuple):
        return f"{origin.__name__}[{', '.join(_type_name(a) for a in arguments)}]"
    return "|".join(_type_name(a) for a in arguments)


def _unusable(value: Any, location: list[str]) -> Iterator[tuple[list[str], str]]:
    """Where values stand that no option means, and that files, requests or paths could not hold."""
    if isinstance(value, dict | list | tuple):
        if len(location) > DEEPEST:
            yield location, f"nested more than {DEEPEST} deep: flatten it"
            return
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            place = [*location, str(key)]
            if _half_pair(str(key)):
                yield location, "a key holds half of a surrogate pair: write it as UTF-8"
            elif isinstance(inner, str) and inner and SECRET_NAME.fullmatch(str(key)):
                yield place, SECRET
            else:
                yield from _unusable(inner, place)
    elif isinstance(value, str):
        if _half_pair(value):
            yield location, "holds half of a surrogate pair: write it as UTF-8"
        elif "\0" in value and location[-1] in PLACES:
            yield location, "holds a NUL, which no path does: remove it"
        elif SECRET_ADDRESS.match(value):
            yield location, "an address with a password or a key in it: leave that out, or runs would copy it"
    elif isinstance(value, int) and value.bit_length() > 63:
        yield location, "a whole number of more than 63 bits: use a smaller one"
    elif hasattr(value, "isoformat"):
        yield location, "a date or time, which no option takes: put it in quotes"


def _half_pair(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise InputError(f"--{key}: {parent!r} is a single value, not a section")
        values = inner
    values[last] = value


def _describe(
    error: ValidationError, model: type[BaseModel], file: str | Path | None, text: str, given: dict[str, Any]
) -> str:
    """The first problem, in one line: what, where, what to do."""
    problems = error.errors()
    # A misspelt section is also a missing one; what was misspelt is the better news.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    location = [str(part) for part in problem["loc"] if not str(part).startswith("function-")]
    key = ".".join(location)
    where = _where(location, file, text, given)
    if problem["type"] != "value_error":  # --steps.more makes a section of a number
        where = next((f"--{name}" for name in given if name.startswith(f"{key}.")), where)
    if problem["type"] == "extra_forbidden":
        plain = ".".join(part for part in location if not part.isdigit())
        known = _names(model)
        elsewhere = [name for name in known if name.split(".")[-1] == location[-1]]
        near = difflib.get_close_matches(plain, elsewhere or known, n=1, cutoff=0.0 if elsewhere else 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{where}: unknown key {key!r}{hint}"
    if problem["type"] == "missing":
        return f"{where}: {key!r} is required"
    got = problem.get("input")
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(got, dict) else f" (got {got!r})"
    named = key or "configuration"
    return f"{where}: {message}{shown}" if where == named else f"{where}: {named}: {message}{shown}"


def _where(location: list[str], file: str | Path | None, text: str, given: dict[str, Any]) -> str:
    """The option that gave a value, or else its place in the file."""
    where = _position(file, text, location)
    for size in range(len(location) + 1):
        # A whole section handed over by a caller is no option of the command line.
        if not isinstance(given.get(outer := ".".join(location[:size]), {}), dict):
            where = f"--{outer}"
    return where


def _position(file: str | Path | None, text: str, location: list[str]) -> str:
    """``file:line`` of a key in TOML text; the section's line when the key is not there."""
    if file is None:
        return "configuration"
    section = ""
    line_of: dict[str, int] = {}
    tables: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*(\[\[?)\s*([^\]]+?)\s*\]", line):
            section = ""
            for part in header[2].replace('"', "").replace(" ", "").split("."):
                section = f"{section}.{part}" if section else part
                if header[1] == "[" and section in tables:  # [a.b] below [[a]] belongs to the last a
                    section = f"{section}.{tables[section]}"
            line_of.setdefault(section, number)
            if header[1] == "[[":
                tables[section] = tables.get(section, -1) + 1
                section = f"{section}.{tables[section]}"
                line_of[section] = number
        elif assignment := re.match(r"\s*([\w.\-\"]+)\s*=", line):
            name = assignment[1].replace('"', "")
            line_of.setdefault(f"{section}.{name}" if section else name, number)
    for size in range(len(location), 0, -1):
        if at := line_of.get(".".join(location[:size])):
            return f"{file}:{at}"
    return str(file)


def _dump(config: BaseModel, prefix: str, lines: list[str]) -> None:
    inner: list[tuple[str, BaseModel]] = []
    if prefix:
        lines.append(f"\n[{prefix}]")
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            inner.append((f"{prefix}.{name}" if prefix else name, value))
        elif value is None:
            lines.append(f"# {name} is not set: {info.description or ''}".rstrip(": "))
        else:
            comment = f"  # {info.description}" if info.description else ""
            lines.append(f"{name} = {toml_value(value)}{comment}")
    for name, section in inner:
        _dump(section, name, lines)


def toml_value(value: Any) -> str:
    """One value as TOML writes it, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, BaseModel):
        return toml_value(value.model_dump(exclude_none=True))
    if isinstance(value, dict):
        pairs = [f"{toml_value(str(k))} = {toml_value(v)}" for k, v in value.items() if v is not None]
        return "{ " + ", ".join(pairs) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    # JSON's escapes are TOML's, but TOML also wants the delete character escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
