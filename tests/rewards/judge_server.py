"""An OpenAI-compatible endpoint on this machine that answers by a script, and a clock without waiting."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], Any]
"""Status, headers, and the body: bytes as they are, anything else as JSON."""


def chat(content: str | None, *, finish: str = "stop", refusal: str | None = None) -> Reply:
    """A chat completion of 100 prompt and 10 completion tokens."""
    choice = {
        "message": {"role": "assistant", "content": content, "refusal": refusal},
        "finish_reason": finish,
    }
    return 200, {}, {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}


class Server:
    """``script`` sees each request's body and gives the reply; ``requests`` holds (path, headers, body)."""

    def __init__(self) -> None:
        self.script: Callable[[dict[str, Any]], Reply] = lambda body: chat('{"winner": "tie"}')
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.release = threading.Event()
        """What a script waits for that keeps its client waiting."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), body))
                status, headers, answer = outer.script(body)
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client gave up, as it should

            do_GET = do_POST

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [body for _, _, body in self.requests]

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def shown(body: dict[str, Any]) -> list[str]:
    """The responses in the order in which a question shows them."""
    parts = body["messages"][1]["content"].split("\n\n")
    return ["\n".join(part.split("\n")[1:-1]) for part in parts if part.startswith("[response")]


class Clock:
    """Time that passes only by sleeping; ``slept`` holds every pause in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.slept.append(seconds)
            self.now += seconds
