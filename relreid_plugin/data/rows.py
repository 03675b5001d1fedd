"""Rows of a CSV file, however a spreadsheet wrote it: encoding, separator, header, quotes and line ends."""

from __future__ import annotations

import codecs
import csv
import datetime
import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import UserError, did_you_mean
from .files import why_not_regular

_BOMS = (  # the longer ones first: UTF-32's begins like UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
MISSING = ("nan", "NaN", "NAN", "<NA>", "N/A", "n/a", "#N/A", "null", "NULL", "None")
"""What programs write where there is no value."""

_NUMBER_LIKE = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")

SPLITS = ("train", "query", "gallery")


class Rows:
    """A CSV file with a header, opened by iterating over it.

    Args:
        path: The file: UTF-8, or UTF-16 or UTF-32 with a byte-order mark; separated by comma, semicolon, tab or bar.
        required: Columns that must be there; case and spaces around them do not matter.
        optional: Further columns whose case does not matter.
        layout: How the file should look, for messages.

    Attributes:
        header: The columns, known ones in lower case.
        line: Line of the row that was read last.

    Raises:
        UserError: No such file, another encoding, no such columns or one of them twice; while iterating, a row with more
            cells than columns, broken quotes or an overlong cell. The sentence names the file and the line.
    """

    def __init__(self, path: str | Path, required: Sequence[str], optional: Sequence[str] = (), *, layout: str) -> None:
        self.path = Path(path)
        reason = why_not_regular(self.path)
        if reason:
            raise UserError(f"table '{self.path}' {reason}; it should be {layout}.")
        text = _decoded(self.path)
        known = (*required, *optional)
        separator = _separator(text, known)
        self._reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=separator != "\t", strict=True
        )
        self._layout, self.header = layout, []
        first = next((cells for cells in self._read() if any(map(str.strip, cells))), [])
        self.header = [name if (low := name.casefold()) not in known else low for name in map(str.strip, first)]
        while self.header and not self.header[-1] and len(self.header) > 1:  # a separator at the end of the line
            self.header.pop()
        for column in required:
            if column not in self.header:
                near = did_you_mean(column, [name for name in self.header if name]) if any(self.header) else ""
                raise UserError(
                    f"{self.path}, line {max(1, self.line)}: no column '{column}' in the header (read with the separator "
                    f"{SEPARATORS[separator]}{near if 'did you' in near else ''}); it should be {layout}."
                )
        twice = next((name for name, count in Counter(self.header).items() if name and count > 1), "")
        if twice:
            raise UserError(f"{self.path}, line {self.line}: the header has the column '{twice}' twice; keep one of them.")

    @property
    def line(self) -> int:
        """Line of the row that was read last."""
        return self._reader.line_num

    @property
    def where(self) -> str:
        """File and line of the row that was read last, for messages."""
        return f"{self.path}, line {self.line}"

    def _read(self) -> Iterator[list[str]]:
        while True:
            try:
                yield next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                reason = " ".join(str(error).split())
                if "field limit" in reason:
                    reason = f"a cell has more than {csv.field_size_limit()} characters; is a quote not closed?"
                elif "unexpected end" in reason:
                    reason = "a quote is not closed"
                raise UserError(f"{self.path}, line {max(1, self.line)}: not a row of a CSV file ({reason}).") from None

    def __iter__(self) -> Iterator[dict[str, str]]:
        width = len(self.header)
        for cells in self._read():
            if not any(cell.strip() for cell in cells):
                continue
            if any(cell.strip() for cell in cells[width:]):
                raise UserError(
                    f"{self.where}: {len(cells)} cells for {width} columns; put quotes around a cell that holds the "
                    "separator."
                )
            cells += [""] * (width - len(cells))
            yield {name: cell.strip() for name, cell in zip(self.header, cells)}

    def value(self, row: dict[str, str], column: str) -> str:
        """Return a cell that must be filled in.

        Raises:
            UserError: It is empty, or says that there is no value.
        """
        if not row[column]:
            raise UserError(f"{self.where}: the column '{column}' is empty.")
        if row[column] in MISSING:
            raise UserError(
                f"{self.where}: the column '{column}' holds '{row[column]}', which stands for a missing value; give it one."
            )
        return row[column]

    def split(self, row: dict[str, str]) -> str:
        """Return the split of a row: train, query or gallery.

        Raises:
            UserError: Another one.
        """
        split = self.value(row, "split")
        if split.lower() not in SPLITS:
            raise UserError(f"{self.where}: unknown split '{split}'{did_you_mean(split, SPLITS)}")
        return split.lower()

    def camera(self, row: dict[str, str]) -> str | None:
        """Return the camera of a row as written, or None where the cell is empty or the column missing.

        Raises:
            UserError: A number below 0 or with a fraction, or a word that stands for a missing value.
        """
        if not row.get("camid"):
            return None
        camera = self.value(row, "camid")
        if _NUMBER_LIKE.fullmatch(camera) and not (camera.isascii() and camera.isdigit()):
            raise UserError(f"{self.where}: camid must be an integer from 0, or a name, got '{camera}'.")
        return camera

    def seconds(self, row: dict[str, str], column: str) -> float:
        """Return a cell as seconds; dates and times are seconds since 1970.

        Raises:
            UserError: It is neither a number nor a date in ISO 8601.
        """
        found = as_seconds(row[column])
        if not math.isfinite(found):
            raise UserError(
                f"{self.where}: the column '{column}' holds '{row[column]}'; give seconds, or a date like "
                "2024-05-01T12:30:00."
            )
        return found

    def file(self, row: dict[str, str], column: str) -> str:
        """Return the file that a cell names, relative to the CSV file's folder or absolute, there or not.

        Backslashes are folders' separators where there is no file with backslashes in its name.
        """
        written = row[column]
        file = os.path.normpath(self.path.parent / written)
        if "\\" in written and not os.path.isfile(file):
            file = os.path.normpath(self.path.parent / written.replace("\\", "/"))
        return file


def as_seconds(text: str) -> float:
    """Return a number, or a date and time in ISO 8601 (without a zone: UTC) as seconds since 1970; else NaN."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        return float("nan")
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.timezone.utc)).timestamp()


def _decoded(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"table '{path}' cannot be read ({error.strerror}).") from None
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: not a CSV file in {encoding.upper()} ({error.reason}); save it as UTF-8."
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(
            f"{path}, line {line}: not a CSV file in {encoding.upper()} (it holds NUL bytes, as UTF-16 without a "
            "byte-order mark does); save it as UTF-8."
        )
    return text


def _separator(text: str, known: Sequence[str]) -> str:
    """The separator that finds the most known columns in the first line; a comma where none finds any."""
    first = next((line for line in io.StringIO(text, newline=None) if line.strip()), "")

    def found(separator: str) -> int:
        try:
            names = next(csv.reader([first], delimiter=separator, skipinitialspace=separator != "\t"), [])
        except csv.Error:
            return 0
        return len({name.strip().casefold() for name in names} & set(known))

    return max(SEPARATORS, key=found)
