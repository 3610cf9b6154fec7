"""``trimtab explore``: parsing."""

from __future__ import annotations

import argparse

from trimtab.errors import InputError

EXPLORE = "one page that shows what fits: every method's memory for whatever you choose"


def explore(arguments: list[str], parser: argparse.ArgumentParser) -> int:
    """``trimtab explore [--out FILE | --serve [PORT]]``."""
    parser.add_argument("--out", metavar="FILE", help="where the page is written (default explorer.html)")
    parser.add_argument(
        "--serve",
        nargs="?",
        const="",
        metavar="PORT",
        help="serve the page to this machine's browser instead, until Ctrl-C (default port 8642)",
    )
    options = parser.parse_args(arguments)
    if options.serve is None:
        from trimtab.studies.explore_command import write_page

        print(write_page("explorer.html" if options.out is None else options.out))
        return 0
    if options.out is not None:
        raise InputError("trimtab explore: --out writes the page and --serve serves it: choose one")
    port = options.serve
    # str.isdigit knows digits that int does not.
    if port and not (port.isascii() and port.isdigit() and len(port) < 9):
        raise InputError(f"trimtab explore: --serve {port}: a port is a number from 0 to 65535")
    from trimtab.studies.explore_command import PORT, serve_page

    serve_page(int(port) if port else PORT)
    return 0
