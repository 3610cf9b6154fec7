"""Requests to an OpenAI-compatible endpoint: tried again, spaced, cached and counted.

What is transient (time-outs, HTTP 408, 409, 425, 429 and 5xx, a body that is no chat completion) is tried
again after 1, 2, 4 … seconds, less a fixed share that differs from request to request, or after what
Retry-After says. What only the user can mend (a wrong key, address or model, a server that is not there)
ends in one InputError. The key is read from the environment, sent, and appears nowhere else.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol

from trimtab import __version__
from trimtab.errors import InputError
from trimtab.groups import stable_hash
from trimtab.parallel.limits import processes
from trimtab.rewards.answer_cache import Answer
from trimtab.rewards.judge_config import JudgeConfig

TRANSIENT = frozenset({408, 409, 425, 429})
LONGEST_BACKOFF_S = 60.0
LONGEST_RETRY_AFTER_S = 600.0
GIVE_UP_AFTER = 10
"""Questions in a row without any answer, after which the endpoint is taken to be down."""
LARGEST_BODY = 16 * 2**20


class Counts(Protocol):
    """Where the client counts; the judge's costs are one."""

    calls: int
    retries: int
    failures: int
    prompt_tokens: int
    completion_tokens: int


class NoAnswer(Exception):
    """The endpoint gave no answer to one question; the message says why."""


class Stopped(Exception):
    """Another thread ended the work."""


class _Failure(Exception):
    """One request that failed."""

    def __init__(self, reason: str, retry_after_s: float | None = None, status: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.retry_after_s, self.status = reason, retry_after_s, status

    @property
    def final(self) -> bool:
        """The server will not answer this request however often it is sent."""
        return 400 <= self.status < 500 and self.status not in TRANSIENT


class _Unreachable(Exception):
    """Nothing listens at the address, or it cannot be trusted."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host, and turn the request into a GET."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class ChatClient:
    """One endpoint; safe to use from several threads."""

    def __init__(
        self,
        config: JudgeConfig,
        counts: Counts,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        """``clock`` and ``sleep`` in seconds. Raises InputError when the key's variable is not set."""
        base = config.base_url.rstrip("/").removesuffix("/chat/completions")
        self.url = f"{base}/chat/completions"
        self.config = config
        self.stop = threading.Event()
        self._counts = counts
        self._clock, self._sleep = clock, sleep or self.stop.wait
        self._key = _read_key(config.api_key_env)
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._failed_in_a_row = 0

    @property
    def notes(self) -> list[str]:
        """A warning where the key travels in the clear."""
        address = urllib.parse.urlsplit(self.url)
        local = address.hostname in ("localhost", "127.0.0.1", "::1")
        if not self._key or address.scheme == "https" or local:
            return []
        return [f"judge: {self.url} is not https: the key and all texts travel unencrypted"]

    def post(self, body: dict[str, Any]) -> Answer:
        """The answer to one request.

        Raises NoAnswer once the tries are used up, InputError for what only the user can mend and when
        no question is answered any more, Stopped when ``stop`` was set.
        """
        data = json.dumps(body).encode()
        last = ""
        for attempt in range(self.config.retries + 1):
            self._wait_for_turn()
            with self._lock:
                self._counts.calls += 1
                self._counts.retries += attempt > 0
            try:
                answer = self._send(data)
            except _Failure as failure:
                last = failure.reason
                if failure.final:
                    break
                if attempt < self.config.retries:
                    self._hold_off(failure, attempt, data)
            except _Unreachable as error:
                last = str(error)
                if attempt == self.config.retries:
                    raise InputError(
                        f"judge: cannot reach {self.url}: {last}; check base_url and that the server runs "
                        "(answers so far are in the cache)"
                    ) from None
                self._hold_off(_Failure(last), attempt, data)
            else:
                with self._lock:
                    self._failed_in_a_row = 0
                    self._counts.prompt_tokens += answer.prompt_tokens
                    self._counts.completion_tokens += answer.completion_tokens
                return answer
        with self._lock:
            self._counts.failures += 1
            self._failed_in_a_row += 1
            failed = self._failed_in_a_row
        if failed >= GIVE_UP_AFTER:
            raise InputError(
                f"judge: {self.url} answered none of {failed} questions in a row, the last: {last}; "
                "mend that and run again (answers so far are in the cache)"
            )
        raise NoAnswer(last)

    def _wait_for_turn(self) -> None:
        """Until the rate limit, and whatever the server asked for, allow the next request."""
        spacing = 60.0 / self.config.requests_per_minute if self.config.requests_per_minute else 0.0
        spacing *= processes()  # the limit is the account's, and every process of a run asks
        with self._lock:
            now = self._clock()
            start = max(now, self._free_at)
            if spacing:
                self._free_at = start + spacing
        if start > now:
            self._sleep(start - now)
        if self.stop.is_set():
            raise Stopped

    def _hold_off(self, failure: _Failure, attempt: int, data: bytes) -> None:
        share = stable_hash(attempt, data) / 2**64  # so that threads that failed together part ways
        wait = min(LONGEST_BACKOFF_S, 2.0**attempt) * (1 - share / 2)
        if failure.retry_after_s is not None:
            if failure.retry_after_s > LONGEST_RETRY_AFTER_S:
                raise InputError(
                    f"judge: {self.url} asks to wait {failure.retry_after_s:.0f} s ({failure.reason}); run "
                    "again then (answers so far are in the cache)"
                )
            wait = max(wait, failure.retry_after_s)
        if failure.status == 429:
            with self._lock:  # the limit is the account's, so all threads wait
                self._free_at = max(self._free_at, self._clock() + wait)
        else:
            self._sleep(wait)
            if self.stop.is_set():
                raise Stopped

    # ---------------------------------------------------------------- one request

    def _send(self, data: bytes) -> Answer:
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "User-Agent": f"trimtab/{__version__}",
        }
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, data=data, headers=headers, method="POST")
        late = f"no answer within {self.config.timeout_s:g} s"
        try:
            with self._opener.open(request, timeout=self.config.timeout_s) as response:
                raw = self._read(response)
        except urllib.error.HTTPError as error:
            with error:
                return self._refused(error)
        except TimeoutError:
            raise _Failure(late) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _Failure(late) from None
            if isinstance(error.reason, ConnectionRefusedError | socket.gaierror | ssl.SSLError):
                raise _Unreachable(self._shown(error.reason)) from None
            raise _Failure(f"connection failed: {self._shown(error.reason)}") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Failure(f"connection failed: {self._shown(error)}") from None
        except ValueError as error:  # a name that is no host's
            raise _Unreachable(self._shown(error)) from None
        return self._answer(raw)

    def _read(self, response: Any) -> bytes:
        """The body, within the time-out as a whole: a server that drips would else hold a thread for ever."""
        ends = time.monotonic() + self.config.timeout_s
        parts: list[bytes] = []
        while part := response.read1(65536):
            parts.append(part)
            if time.monotonic() > ends:
                raise TimeoutError
            if sum(map(len, parts)) > LARGEST_BODY:
                raise _Failure(f"an answer of more than {LARGEST_BODY >> 20} MiB")
        return b"".join(parts)

    def _answer(self, raw: bytes) -> Answer:
        try:
            payload = json.loads(raw)
            if payload.get("error"):
                raise _Failure(f"answered with the error {self._shown(_error_text(payload))}")
            choice = payload["choices"][0]
            message = choice["message"]
            usage = payload.get("usage") or {}
            content, refusal = message.get("content"), message.get("refusal")
            if isinstance(content, list):  # some servers answer in typed parts
                content = "".join(str(part.get("text", "")) for part in content)
            finish = str(choice.get("finish_reason") or "")
            if finish == "content_filter" and not refusal:
                refusal = "the server's content filter"
            return Answer(  # a server that repeats its request must not bring the key into the cache
                content=self._without_key(str(content or "")),
                refusal=self._without_key(str(refusal or "")),
                finish=self._without_key(finish),
                prompt_tokens=int(usage.get("prompt_tokens") or 0),
                completion_tokens=int(usage.get("completion_tokens") or 0),
            )
        except (LookupError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            shown = self._shown(raw[:65536].decode("utf-8", "replace"))
            raise _Failure(f"answered with no chat completion: {shown}") from None

    def _refused(self, error: urllib.error.HTTPError) -> Answer:
        """A status other than 2xx: an InputError, a failure to try again, or a content filter's refusal."""
        try:
            payload = json.loads(self._read(error))
            text = self._shown(_error_text(payload) or error.reason)
            filtered = "content_filter" in json.dumps(payload)
        except (ValueError, OSError, http.client.HTTPException, RecursionError, _Failure):
            text, filtered = self._shown(error.reason), False
        status = error.code
        said = f"HTTP {status} ({text})"
        mends = {
            401: self._key_hint(),
            402: "the account has no credit",
            403: self._key_hint(),
            404: "check base_url (what stands before /chat/completions) and model",
            405: "check base_url (what stands before /chat/completions)",
        }
        if 300 <= status < 400:
            where = str(error.headers.get("Location", "?")).partition("?")[0].rpartition("@")[2]
            mends[status] = f"it redirects to {self._shown(where)}: correct base_url"
        if status in mends:
            raise InputError(f"judge: {self.url} answered {said}: {mends[status]}")
        if status == 400 and filtered:
            return Answer("", refusal=text or "the server's content filter", finish="content_filter")
        raise _Failure(said, _retry_after(error.headers.get("Retry-After")), status)

    def _key_hint(self) -> str:
        if self.config.api_key_env:
            return f"check the key in the environment variable {self.config.api_key_env}"
        return "name the environment variable that holds the key in api_key_env"

    def _shown(self, value: object) -> str:
        """A server's words for a message: one short line, the key taken out."""
        text = self._without_key(" ".join(str(value).split()))
        return text if len(text) <= 160 else text[:159] + "…"

    def _without_key(self, text: str) -> str:
        """The text with the key taken out, also where it was quoted for an address or for JSON."""
        for form in dict.fromkeys((self._key, urllib.parse.quote(self._key, safe=""), self._key_in_json)):
            text = text.replace(form, "…") if form else text
        return text

    @property
    def _key_in_json(self) -> str:
        return json.dumps(self._key)[1:-1].replace("/", "\\/")


def _read_key(variable: str) -> str:
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(f"judge: the environment variable {variable} (api_key_env) is not set")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InputError(f"judge: the environment variable {variable} holds no key: spaces or odd characters")
    return key


def _error_text(payload: object) -> str:
    """The message of an error body, in the shapes that servers use."""
    if not isinstance(payload, dict):
        return ""
    found = payload.get("error", payload.get("message", payload.get("detail", "")))
    if isinstance(found, dict):
        found = found.get("message", found)
    return str(found or "")


def _retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header, which holds seconds or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        when = email.utils.parsedate_to_datetime(value)
        return max(0.0, (when.astimezone(UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError, TypeError):
        return None
