"""The one exception that means "the user can mend this": printed as one line, exit code 2."""

from __future__ import annotations


class InputError(Exception):
    """Bad input: says what is wrong, where, and what to do, in one line.

    The command line prints it as ``error: …`` and exits with code 2, without a traceback. Library
    callers may catch it. Anything else that escapes is a fault of Trimtab's own.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
