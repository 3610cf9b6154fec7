"""The ``trimtab`` command: set the C allocator, then hand over to ``trimtab.cli.main``.

glibc reads its tunables before Python starts, so they can only be set by starting again; nothing heavy
has been imported by then. Training allocates and frees large tensors all the time: without these settings
glibc returns the pages to the system and faults them in again, which was up to half of a step's time.
TRIMTAB_ALLOCATOR=default leaves the allocator alone.
"""

from __future__ import annotations

import os
import platform
import sys

TUNABLES = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.mmap_threshold=34359738368",
        "glibc.malloc.trim_threshold=34359738368",
        "glibc.malloc.top_pad=268435456",
    )
)


def wants_allocator(environment: dict[str, str]) -> bool:
    """True where the process should be started again with the tunables."""
    return (
        platform.libc_ver()[0] == "glibc"
        and "GLIBC_TUNABLES" not in environment
        and environment.get("TRIMTAB_ALLOCATOR", "tuned") != "default"
    )


def main() -> None:
    """Entry point of the ``trimtab`` command."""
    if wants_allocator(dict(os.environ)):
        environment = {**os.environ, "GLIBC_TUNABLES": TUNABLES}
        os.execve(sys.executable, [sys.executable, "-m", "trimtab.cli.main", *sys.argv[1:]], environment)
    from trimtab.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
