"""``python -m trimtab``: the ``trimtab`` command, as a launcher of processes starts it."""

from __future__ import annotations

from trimtab.cli.launch import main

if __name__ == "__main__":
    main()
