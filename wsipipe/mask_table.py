"""What is known of the nuclei of a mask: a CSV beside it with the column `id` and another, a row a nucleus."""

import csv
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from wsipipe.errors import DataError, one_line

MOST_TOLD = 20  # ids in one message


class MaskRow(NamedTuple):
    """A row: its line in the file, from 1; the value of the nucleus in the mask; the other column without blanks round
    it, None where the row ends before it.
    """

    line: int
    number: int
    value: str | None


def read_mask_table(path: Path, column: str) -> list[MaskRow]:
    """The rows of a table, each of another nucleus.

    Raises
    ------
    DataError
        If the file cannot be read, lacks a column, or holds an id that is no whole number or repeats.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, strict=True)
            if not {"id", column} <= set(table.fieldnames or ()):
                raise DataError(f"{path} does not begin with the columns id,{column}")
            rows = [MaskRow(table.line_num, _number(path, table.line_num, row["id"]), row[column]) for row in table]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} must be a table of id and {column}: {one_line(error)}") from error
    for row in rows:
        if "\n" in (row.value or ""):
            raise DataError(f"{path}, line {row.line}: {column} goes over two lines; is a quotation mark left open?")
    if twice := sorted(number for number, count in Counter(row.number for row in rows).items() if count > 1):
        more = f" and {len(twice) - MOST_TOLD} more" if len(twice) > MOST_TOLD else ""
        raise DataError(f"{path}: the ids {twice[:MOST_TOLD]}{more} repeat; give each nucleus one row")
    return [row._replace(value=row.value and row.value.strip()) for row in rows]


def _number(path: Path, line: int, text: str | None) -> int:
    if not (text or "").strip().isdecimal():
        raise DataError(f"{path}, line {line}: {text!r} is not the number of a nucleus")
    return int(text or "")
