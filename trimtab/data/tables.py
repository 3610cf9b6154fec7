"""Rows of columnar files and of Hugging Face data sets, in values that JSON can hold.

Each row comes with its number, from 0; a `BadRow` stands where a row cannot be decoded. Nothing is unpickled
and no data set's own code is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from trimtab.data.formats import BadRow, Row
from trimtab.errors import InputError


def parquet_rows(file: Path) -> Iterator[tuple[int, object]]:
    """The rows of a Parquet file. Raises InputError for one that is none, or is damaged."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in _batch_rows(batch):
                    yield number, row
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise InputError(f"cannot read {file} as Parquet ({reason(error)}): write the file anew") from error


def _batch_rows(batch: Any) -> list[object]:
    """A batch's rows; taken one by one where some cannot be read, so that these alone are bad."""
    try:
        return [_plain_row(row) for row in batch.to_pylist()]
    except (ValueError, OverflowError):  # broken UTF-8, a date that Python has no form for
        return [_row_at(batch, place) for place in range(batch.num_rows)]


def _row_at(batch: Any, place: int) -> object:
    try:
        [row] = batch.slice(place, 1).to_pylist()
    except (ValueError, OverflowError) as error:
        return BadRow("unsupported value", f"a cell that cannot be read ({reason(error)})", "mend the cell")
    return _plain_row(row)


def hub_rows(path: str, split: str) -> Iterator[tuple[int, object]]:
    """The rows of ``owner/name`` or ``owner/name:configuration``. Raises InputError where that fails."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"no file or folder {path}, and a data set of that name needs the package datasets: "
            "correct the path, or pip install 'trimtab[hub]'"
        ) from error
    if int(datasets.__version__.split(".")[0]) < 4:  # older ones can run a data set's own code
        raise InputError(f"datasets {datasets.__version__} is too old to read {path}: install 4 or newer")
    name, _, configuration = path.partition(":")
    if name.count("/") > 1 or ".." in name or "\\" in name or path.count(":") > 1 or "://" in path:
        raise InputError(f"no file or folder {path}, and no data set has such a name: write owner/name")
    try:
        rows = enumerate(datasets.load_dataset(name, configuration or None, split=split))
    except Exception as error:  # the package raises many kinds, its dependencies more
        raise InputError(
            f"no file or folder {path}, and no data set of that name with split {split!r} "
            f"({reason(error)}): correct the path, the split or the configuration (owner/name:configuration)"
        ) from error
    while True:
        try:
            number, row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # a cell that cannot be decoded, a file that is gone
            raise InputError(f"cannot read {path} [{split}] ({reason(error)}): mend the data set") from error
        yield number, _plain_row(row)


def reason(error: BaseException) -> str:
    """The first line of an error's words."""
    said = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
    return str(said) or type(error).__name__


def _plain_row(row: Row) -> object:
    """The row in values that JSON can hold, since groups wait in checkpoints as JSON."""
    try:
        return _plain(row)
    except TypeError as error:
        return BadRow("unsupported value", f"a column holds {error}", "remove the column or make it text")


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Decimal):
        return float(value)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(type(value).__name__)
