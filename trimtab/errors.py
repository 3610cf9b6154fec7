"""The exceptions that are raised in one room and answered in another: bad input, an early end, no number."""

from __future__ import annotations

import re

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What could drive a terminal, turn a line about, or fail to be printed: messages quote data."""


class InputError(Exception):
    """Bad input: says what is wrong, where, and what to do, in one line.

    The command line prints it as ``error: …`` and exits with code 2, without a traceback. Library
    callers may catch it. Anything else that escapes is a fault of Trimtab's own.
    """

    def __init__(self, message: str) -> None:
        super().__init__(CONTROL.sub(_spelt, " ".join(message.split())))


def _spelt(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


class NotFinite(ArithmeticError):
    """A loss or a gradient is NaN or infinite; says which. The weights were not touched."""


class Terminated(Exception):
    """SIGTERM ended the run behind a checkpoint; says which. The command line exits with code 143."""


class Lost(Exception):
    """This process ends because another of its run did: says which, or nothing where another says it.

    ``code`` is the exit code: 75 where a process was lost, which resuming mends, else that of the process
    that ended first.
    """

    def __init__(self, message: str = "", code: int = 75) -> None:
        super().__init__(message)
        self.code = code
