"""Answers of a judging model on disk: JSON lines, appended one by one, so that nothing paid for is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import InputError


@dataclass(frozen=True, slots=True)
class Answer:
    """What an endpoint answered to one request."""

    content: str
    refusal: str = ""
    """Why it would not answer; empty if it did."""
    finish: str = ""
    """"stop", "length" (cut off), "content_filter", …"""
    prompt_tokens: int = 0
    completion_tokens: int = 0


def request_key(mode: str, body: dict[str, Any]) -> str:
    """Hash of the mode and of all that is sent: model, messages (the rubric in them), seed, limits."""
    text = json.dumps([mode, body], sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class AnswerCache:
    """Answers by key. Threads share it; other processes may append to the same file."""

    def __init__(self, path: str) -> None:
        """Reads ``path``, made with its folder where missing; empty keeps answers in memory only.

        Lines that cannot be read (a write cut short) are counted in ``damaged`` and asked for again.
        """
        self.path = Path(path) if path else None
        self.damaged = 0
        self._answers: dict[str, Answer] = {}
        self._read = 0
        """Bytes of the file that were read."""
        self._lock = threading.Lock()
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not self._catch_up():
                self._append(b"\n")
                self._catch_up()
        except OSError as error:
            raise InputError(f"judge: cannot use the cache {path}: {error.strerror or error}") from None

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Answer | None:
        """The answer, if there is one; also one that another process has written since."""
        found = self._answers.get(key)
        if found is None and self.path is not None:
            with self._lock, contextlib.suppress(OSError):
                self._catch_up()
            found = self._answers.get(key)
        return found

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer, on disk before this returns. Raises InputError when the disk refuses."""
        with self._lock:
            self._answers[key] = answer
            if self.path is None:
                return
            line = json.dumps({"key": key, **dataclasses.asdict(answer)}, ensure_ascii=True)
            try:
                self._append(line.encode() + b"\n")
            except OSError as error:
                raise InputError(f"judge: cannot write the cache {self.path}: {error.strerror}") from None

    def _append(self, data: bytes) -> None:
        assert self.path is not None
        # Unbuffered: one write, one line, also where several processes append; locked, for those of several
        # machines on one file system, which may not know where the file now ends.
        with self.path.open("ab", buffering=0) as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            file.write(data)

    def _catch_up(self) -> bool:
        """Read the lines that were written since the last time; False where the last one has no end."""
        assert self.path is not None
        if self.path.stat().st_size <= self._read:
            return True
        with self.path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._read += end
        for line in data[:end].splitlines():
            if line.strip():
                self._take(line)
        return end == len(data)

    def _take(self, line: bytes) -> None:
        try:
            values = json.loads(line)
            key, answer = values.pop("key"), Answer(**values)
            wanted = {f.name: type(f.default) for f in dataclasses.fields(Answer)} | {"content": str}
            kept = all(isinstance(getattr(answer, name), kind) for name, kind in wanted.items())
            if not kept or not isinstance(key, str):
                raise TypeError
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            self.damaged += 1
            return
        self._answers[key] = answer
