"""lineage.json: what a run was made from, on what it ran, how it went; enough to repeat it.

Written when the run starts (``"status": "running"``), at each checkpoint and at the end, whole each time: a
killed run leaves one that says "running". Files are hashed once, by a thread beside the first steps. No
secret gets into it (see ``redact``).
"""

from __future__ import annotations

import json
import os
import threading
import tomllib
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trimtab.errors import InputError, Lost
from trimtab.registry.ancestry import (
    FILE,
    ancestors,
    config_digest,
    entries,
    read_lineage,
    run_digest,
)
from trimtab.registry.digests import Stopped, digests_of
from trimtab.registry.files import write_atomic
from trimtab.registry.inputs import Input, entry, hashed, inputs_of
from trimtab.registry.process import this_process
from trimtab.registry.redact import redact
from trimtab.registry.scores import finite, schedules, scores, seeds, with_last
from trimtab.registry.surroundings import code, surroundings

FORMAT = 1


class Lineage:
    """The lineage of the run in ``out``, from :meth:`begin` to :meth:`finish` or :meth:`stop`.

    Every write raises InputError where the folder cannot be written.
    """

    def __init__(self, out: Path, method: str) -> None:
        self.out, self.method = out, method
        self.values: dict[str, Any] = {}
        self._inputs: list[Input] = []
        self._hashing: threading.Thread | None = None
        self._stop = threading.Event()
        self._began = self._ended = False

    def begin(
        self,
        counts: dict[str, Any],
        computing: dict[str, Any],
        *,
        total: int | None,
        resumed: bool,
        parent: str,
        plan: dict[str, Any] | None = None,
    ) -> None:
        """A sitting begins; config.toml is there. Returns at once: what is large is hashed beside the run.

        ``counts``: steps, tokens, seconds so far, and the like; ``computing``: dtype, kernels, threads;
        ``total``: the steps planned, None where a budget ends the run; ``resumed``: earlier sittings count;
        ``plan``: what memory and time this sitting was planned to take, if it was.
        """
        config = tomllib.loads((self.out / "config.toml").read_text(encoding="utf-8"))
        earlier = self._earlier() if resumed else {}
        self._inputs = inputs_of(config)
        named = [entry(item) for item in self._inputs]
        runs = ancestors(named, parent, self.out)
        if not parent and runs and runs[0]["role"] == "parent":
            parent = runs[0]["path"]
        now, around = _now(), surroundings()
        sitting = {
            "started": now,
            "ended": None,
            "from_step": counts["steps"],
            "to_step": counts["steps"],
            "config_sha256": config_digest(config),
            "computing": computing,
            **{key: around[key] for key in ("packages", "python", "hardware", "environment")},
            "process": this_process(),
            **({"processes": len(counts["processes"])} if "processes" in counts else {}),
            "inputs_changed": [],
        }
        self.values = {
            "format": FORMAT,
            "method": self.method,
            "status": "running",
            "reason": "",
            "started": earlier.get("started") or now,
            "ended": None,
            "parent": parent,
            "model": (config.get("model") or {}).get("path"),
            **counts,
            "plan": plan,
            "seeds": seeds(config),
            "config_sha256": sitting["config_sha256"],
            "out": str(self.out),
            "working_directory": os.getcwd(),
            "computing": computing,
            "schedules": schedules(config, total),
            "scores": {},
            "inputs": named,
            "ancestors": runs,
            "outputs": {},
            "digest": None,
            "code": {},
            **around,
            "sittings": [*entries(earlier, "sittings"), sitting],
        }
        self._began, self._ended = True, False
        self._write()
        self._hashing = threading.Thread(
            target=self._hash, args=(entries(earlier, "inputs"), sitting), name="lineage", daemon=True
        )
        self._hashing.start()

    def update(self, counts: dict[str, Any]) -> None:
        """At a checkpoint: how far the run is. Hashes nothing."""
        if not self._began or self._ended:
            return
        self.values |= counts
        self.values["sittings"][-1]["to_step"] = counts["steps"]
        self._score()
        self._write()

    def finish(self, counts: dict[str, Any], facts: dict[str, Any]) -> None:
        """The run is done and its ``model/`` written. ``facts``: what the method says of itself."""
        if self._hashing is not None:
            self._hashing.join()
        self.values |= counts
        self.values |= facts
        self._score()
        model = self.out / "model"
        with suppress(OSError):
            digest, files = digests_of(model, "model")
            self.values["outputs"]["model"] = {"sha256": digest, "files": files}
        with suppress(OSError):
            digest, _ = digests_of(self.out / "metrics.jsonl", "file")
            self.values["outputs"]["metrics.jsonl"] = {"sha256": digest}
        if "beta" in facts and "beta" in self.values["schedules"]:
            self.values["schedules"]["beta"]["end"] = facts["beta"]
        self._end("finished", "")
        self.values["digest"] = run_digest(self.values)
        self._write()
        self._ended = True

    def stop(self, error: BaseException | None) -> None:
        """The run ends before it is done, for this reason. Never raises: another error is on its way."""
        self._stop.set()
        if not self._began or self._ended:
            return
        self._ended = True
        self._score()
        self._end("stopped", _reason(error))
        with suppress(InputError):
            self._write()

    def _end(self, status: str, reason: str) -> None:
        now = _now()
        sitting = self.values["sittings"][-1]
        self.values |= {"status": status, "reason": reason, "ended": now}
        sitting |= {"ended": now, "to_step": self.values["steps"]}
        if reason:
            sitting["reason"] = reason

    def _score(self) -> None:
        found = scores(self.out / "metrics.jsonl", self.values.get("model_step"))
        self.values["scores"] = found
        self.values["schedules"] = with_last(self.values["schedules"], found.get("train", {}))

    def _hash(self, earlier: list[dict[str, Any]], sitting: dict[str, Any]) -> None:
        """Beside the run: digests of all inputs and of the code, each put in as it is known."""
        before = {item.get("role"): item.get("sha256") for item in earlier}
        try:
            self.values["code"] = code()
            for number, item in enumerate(self._inputs):
                found = hashed(item, stop=self._stop.is_set)
                self.values["inputs"][number] = found
                was = before.get(item.role)
                if was is not None and found["sha256"] is not None and was != found["sha256"]:
                    sitting["inputs_changed"].append(item.role)
        except Stopped:
            return

    def _earlier(self) -> dict[str, Any]:
        try:
            return read_lineage(self.out)
        except InputError:
            return {}

    def _write(self) -> None:
        text = json.dumps(finite(redact(self.values)), indent=2)
        try:
            write_atomic(self.out / FILE, text + "\n")
        except OSError as error:
            raise InputError(f"{self.out}: cannot write {FILE}: {error.strerror}") from None


def _reason(error: BaseException | None) -> str:
    if error is None:
        return "ended before it was done"
    text = " ".join(str(error).split())[:500]
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, InputError | Lost):
        return text
    return f"{type(error).__name__}: {text}".removesuffix(": ")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
