"""What ``trimtab explore`` does: one page with the planner's formulas in it, written or served."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from trimtab.errors import InputError
from trimtab.planning import explorer
from trimtab.planning.explorer.contents import contents

PORT = 8642
"""Where the page is served unless another port is asked for."""
FOLDER = Path(explorer.__file__).parent
STYLES = Path(str(files("trimtab"))) / "evaluation" / "pages" / "templates"
"""Whose style the page shares; nothing of the evaluation is imported for it."""


def explorer_page() -> str:
    """The page: HTML, script, style and formulas, nothing else is fetched."""
    environment = Environment(
        loader=FileSystemLoader([FOLDER, STYLES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found = contents()
    script = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in ("evaluate.js", "page.js"))
    drawn = [{**method, "drawing": Markup(method["drawing"])} for method in found.methods]
    return environment.get_template("page.html.j2").render(
        **{**found.said, "methods": drawn},
        data=Markup(_json(found.data)),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _json(data: dict[str, Any]) -> str:
    """As a script element may hold it: no < that could end the element, no NaN."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def write_page(out: str) -> Path:
    """Write the page to the file ``out``. Raises InputError for a name that is no page's, or no place."""
    path = Path(out)
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"trimtab explore: --out {out}: a page's name ends in .html")
    if path.is_dir():
        raise InputError(f"trimtab explore: --out {out} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise InputError(f"trimtab explore: --out {out}: there is no folder {path.parent}")
    page = explorer_page()
    path.write_text(page, encoding="utf-8")
    return path


@contextmanager
def served(port: int = PORT) -> Iterator[ThreadingHTTPServer]:
    """A server of the page on 127.0.0.1; 0 takes any free port. Raises InputError where the port is taken."""
    if not 0 <= port <= 65535:
        raise InputError(f"trimtab explore: --serve {port}: a port is a number from 0 to 65535")
    page = explorer_page().encode()

    class Handler(BaseHTTPRequestHandler):
        """The one page, and nothing of the disk."""

        def do_GET(self) -> None:
            self._answer(send=True)

        def do_HEAD(self) -> None:
            self._answer(send=False)

        def _answer(self, *, send: bool) -> None:
            if self.path.split("?")[0] not in ("/", "/index.html", "/explorer.html"):
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            if send:
                self.wfile.write(page)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the terminal shows the address."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise InputError(
            f"trimtab explore: port {port} cannot be had ({error.strerror}): name another, --serve {port + 1}"
            if port < 65535
            else f"trimtab explore: port {port} cannot be had ({error.strerror}): name another"
        ) from error
    try:
        yield server
    finally:
        server.server_close()


def serve_page(port: int = PORT) -> None:
    """Serve until Ctrl-C."""
    with served(port) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}/  (Ctrl-C ends)", flush=True)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            print("\nended")
