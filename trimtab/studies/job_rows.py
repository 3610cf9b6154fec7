"""How many rows a source has, without reading more of it than that takes."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO

from trimtab.data.readers import read_rows
from trimtab.data.sources import SourceConfig
from trimtab.errors import InputError

BLOCK = 1 << 20
MOST_BYTES = 1 << 30
"""Of a file of JSON lines, so much is counted."""
MOST_PARSED = 4 << 20
"""A CSV or JSON file of more bytes, whose rows only a parser tells apart, is not read to its end."""
FEWEST = 16
"""Rows that may stand for a whole file."""


def count_rows(source: SourceConfig, sample_rows: int) -> tuple[int | None, bool]:
    """Rows of a source as far as its limit, and whether that is exact; None where counting is not cheap.

    JSON lines are counted without decoding them. Of a large CSV or JSON file the bytes of its first
    ``sample_rows`` rows stand for all. Raises InputError for what cannot be read.
    """
    path = Path(source.path).expanduser()
    limit = source.limit
    if path.suffix in (".jsonl", ".ndjson") and path.is_file():
        found, exact = _count_lines(path)
    elif path.suffix == ".parquet" and path.is_file():
        found, exact = _parquet_rows(path), True
    elif not path.exists():
        return (limit if limit is not None and limit <= sample_rows else None), True
    elif (by_head := _by_head(path, sample_rows)) is not None:
        found, exact = by_head
    else:
        found, exact = sum(1 for _ in islice(read_rows(source.path, split=source.split), limit)), True
    if limit is not None and limit <= found:
        return limit, exact or 2 * limit <= found
    return found, exact


def _by_head(path: Path, rows: int) -> tuple[int, bool] | None:
    """Rows of a large CSV or JSON file by its size and its first ``rows``; None where that does not do."""
    if not path.is_file() or (size := path.stat().st_size) <= MOST_PARSED:
        return None
    try:
        if path.suffix.lower() == ".csv":
            header, seen, taken = _csv_head(path, rows)
        elif path.suffix.lower() == ".json":
            with path.open(encoding="utf-8-sig", newline="") as file:
                head = file.read(MOST_PARSED)
            if _are_lines(head):
                return _count_lines(path)
            header, (seen, taken) = 0, _array_head(head, rows)
        else:
            return None
    except (OSError, ValueError, RecursionError, csv.Error):  # the reader says what is wrong, and where
        return None
    if seen < min(rows, FEWEST) or header + taken >= size - 2:
        return None
    return max(seen + 1, round(seen * (size - header) / taken)), False


def _csv_head(path: Path, rows: int) -> tuple[int, int, int]:
    """Bytes of the header, how many of ``rows`` rows there are behind it, and their bytes."""
    read = 0

    def lines(file: IO[bytes]) -> Iterator[str]:
        nonlocal read
        for line in file:
            read += len(line)
            yield line.decode("utf-8", "replace")

    before = csv.field_size_limit(MOST_PARSED)
    try:
        with path.open("rb") as file:
            reader = csv.reader(lines(file), strict=True)
            next(reader, None)
            header = read
            seen = sum(1 for _ in islice(reader, rows))
            return header, seen, read - header
    finally:
        csv.field_size_limit(before)


def _array_head(head: str, rows: int) -> tuple[int, int]:
    """How many of ``rows`` elements of an array are whole in its head, and their bytes.

    Raises ValueError for what is no array.
    """
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\r\n,]*")
    at = len(head) - len(head.lstrip())
    if head[at : at + 1] != "[":
        raise ValueError("no array")
    at, seen = at + 1, 0
    while seen < rows:
        start = space.match(head, at)
        try:
            _, at = decoder.raw_decode(head, start.end() if start else at)
        except ValueError:  # the head ends within it
            break
        seen += 1
    return seen, len(head[:at].encode())


def _are_lines(head: str) -> bool:
    """JSON lines under another name: an object to a line."""
    first, _, rest = head.lstrip().partition("\n")
    if first[:1] != "{" or not rest.strip():
        return False
    try:
        json.loads(first)
    except ValueError:
        return False
    return True


def _count_lines(path: Path) -> tuple[int, bool]:
    """Lines that end, and a last one that does not. Blank lines, which are no rows, are counted too.

    Of a file over MOST_BYTES the beginning stands for all of it, and the count is not exact.
    """
    count, read, last = 0, 0, b"\n"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            while read < MOST_BYTES and (block := file.read(BLOCK)):
                count += block.count(b"\n")
                read += len(block)
                last = block
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if read < size:
        return round(count * size / read), False
    return count + (not last.endswith(b"\n")), True


def _parquet_rows(path: Path) -> int:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            return int(table.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"cannot read {path} as Parquet: {error}") from None
