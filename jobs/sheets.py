"""Tables in text files as shops and spreadsheets write them: packed or not, in any usual encoding, with any usual delimiter.

A row that can't be split is given with what can be told of it, and the next line is read as a row of its own: a quote that
is never closed takes no other row with it.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import functools
import gzip
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from orderstream.errors import OrderstreamError

BYTES_MAX = 256 * 1024 * 1024
"""Of a table, unpacked: it is checked whole before anything of it is sent.  Online Retail II has 95 MB."""

PIPED_BYTES_MAX = 1024 * 1024 * 1024
"""Of what comes through a pipe: it is kept in a file of its own until the command ends."""

BROKEN_MAX = 1_000
"""Rows of a file that can't be split; behind so many nothing is told of the others."""

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}

_MAC = "__MACOSX/"


class Row(NamedTuple):
    """A row: the number of its first line, its cells, and why it can't be read (then the cells are a guess); else empty."""

    line: int
    cells: list[str]
    fault: str


@dataclass(frozen=True, slots=True)
class Sheet:
    """A text of lines, without their ends."""

    file: Path
    encoding: str
    lines: list[str]
    start: int
    """How many lines stand before the one with the columns' names: ``sep=;``, which Excel reads."""

    def head(self, delimiter: str) -> list[str]:
        """Return the names of the columns, were this the delimiter; of no file that is a table at all, its first line."""
        if self.start >= len(self.lines):
            return []
        try:
            return [cell.strip() for cell in next(csv.reader(self.lines[self.start :], delimiter=delimiter), [])]
        except csv.Error:
            return [self.lines[self.start].strip()]

    def rows(self, delimiter: str) -> Iterator[Row]:
        """Yield the rows behind the names, each with a cell a column; with a fault as they are; empty ones are left out.

        Raises:
            OrderstreamError: more than :data:`BROKEN_MAX` rows can't be split.
        """
        width, first, broken = len(self.head(delimiter)), self.start, 0
        at = first + 1
        while at < len(self.lines):
            begin = at
            rows = csv.reader(
                (self.lines[n] + "\n" for n in range(begin, len(self.lines))), delimiter=delimiter, strict=True
            )
            why = ""
            while not why:
                try:
                    cells = next(rows, None)
                except csv.Error as error:
                    why = f"no CSV: {error}"
                    break
                if cells is None:
                    return
                end = begin + rows.line_num
                if any(cell.strip() for cell in cells):
                    why = self._fault(cells, width, delimiter, range(at + 1, end))
                    if not why:
                        yield Row(at + 1, [cell.strip() for cell in cells], "")
                at = at if why else end
            broken += 1
            if broken > BROKEN_MAX:
                raise OrderstreamError(
                    f"{self.file}: more than {BROKEN_MAX:,} rows can't be read, the last one in line {at + 1}: {why}"
                )
            guess = [cell.strip(' "') for cell in self.lines[at].split(delimiter)]
            if any(guess):
                yield Row(at + 1, guess, why)
            at += 1

    def _fault(self, cells: list[str], width: int, delimiter: str, more: range) -> str:
        if len(cells) != width:
            return f"{len(cells)} columns, expected {width}"
        if any(self.lines[n].count(delimiter) >= width - 1 for n in more):
            return "a quote is open until behind a line that is a row of its own"
        return ""


def is_piped(file: Path) -> bool:
    """Tell whether this is standard input (``-``) or a pipe: it can be read once, and no name says what is in it."""
    return str(file) == "-" or str(file).startswith(("/dev/stdin", "/dev/fd/")) or file.is_fifo()


@functools.cache
def _spooled(file: Path) -> IO[bytes]:
    """Return what comes through a pipe, as a file."""
    spool = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the command ends
    with contextlib.nullcontext(sys.stdin.buffer) if str(file) == "-" else file.open("rb") as source:
        while part := source.read(1024 * 1024):
            if spool.tell() + len(part) > PIPED_BYTES_MAX:
                raise OrderstreamError(f"{file}: more than {PIPED_BYTES_MAX // 1024**2} MiB: give it as a file")
            spool.write(part)
    return spool


@contextlib.contextmanager
def opened(file: Path) -> Iterator[tuple[str, IO[bytes] | gzip.GzipFile]]:
    """Open a file, or standard input; if it is packed by gzip or zip, what is in it.  Give the name, in small letters, and
    the bytes.

    Raises:
        OrderstreamError: it is not there, is damaged, or is no text that this could be about.
    """
    piped = is_piped(file)
    if not file.is_file() and (not piped or file.is_dir() or not (str(file) == "-" or file.exists())):
        raise OrderstreamError(f"{file}: no such file")
    name = file.name.lower()
    try:
        with contextlib.nullcontext(_spooled(file)) if piped else file.open("rb") as stream:
            stream.seek(0)
            begin = stream.read(4)
            stream.seek(0)
            if begin[:2] == b"\x1f\x8b":
                with gzip.open(stream) as inner:
                    yield name.removesuffix(".gz"), inner
            elif begin == b"PK\x03\x04":
                with zipfile.ZipFile(stream) as archive, _only_member(file, archive) as inner:
                    yield inner.name.lower(), inner
            elif begin == b"\xd0\xcf\x11\xe0":
                raise OrderstreamError(f"{file}: a workbook of Excel: save its sheet as CSV")
            else:
                yield name, stream
    except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise OrderstreamError(f"{file}: damaged: {error}") from error


def _only_member(file: Path, archive: zipfile.ZipFile) -> IO[bytes]:
    names = [one for one in archive.namelist() if not one.endswith("/") and not one.startswith(_MAC)]
    if "[Content_Types].xml" in names:
        raise OrderstreamError(f"{file}: a workbook of Excel: save its sheet as CSV")
    if len(names) != 1:
        inside = ", ".join(names[:10]) or "nothing"
        raise OrderstreamError(f"{file}: expected one file in it, there are {len(names)}: {inside}: unpack it")
    try:
        return archive.open(names[0])
    except RuntimeError as error:  # a password, or a method that Python has not
        raise OrderstreamError(f"{file}: {names[0]} can't be unpacked: {error}") from None


def decoded(file: Path, data: bytes) -> tuple[str, str]:
    """Return the text of bytes, and in which encoding they are.

    Raises:
        OrderstreamError: they are no text.
    """
    text, encoding = _decoded(file, data)
    if "\0" in text:
        line = len(_lines(text[: text.index("\0")]))
        raise OrderstreamError(
            f"{file}: line {line}: no text: it has a NUL, a byte of 0; take it out, or export it again"
        )
    return text, encoding


def _decoded(file: Path, data: bytes) -> tuple[str, str]:
    begin = data[:4096]
    low, high = begin[0::2].count(0), begin[1::2].count(0)  # every second byte of ASCII in UTF-16
    encoding = ""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif max(low, high) > len(begin) / 8 and not min(low, high):
        encoding = "utf-16-le" if high else "utf-16-be"
    if encoding:
        try:
            return data.decode(encoding), "UTF-16"
        except UnicodeDecodeError as error:
            raise OrderstreamError(f"{file}: begins as UTF-16, but: {error}") from None
    for encoding, title in (("utf-8-sig", "UTF-8"), ("cp1252", "Windows-1252")):
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode(encoding), title
    return data.decode("latin-1"), "Latin-1"


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")  # at no other sign, as splitlines does


def read_sheet(file: Path) -> Sheet:
    """Read a file whole.

    Raises:
        OrderstreamError: it can't be read, is empty, or has more than :data:`BYTES_MAX`.
    """
    with opened(file) as (_, stream):
        data = stream.read(BYTES_MAX + 1)
    if len(data) > BYTES_MAX:
        raise OrderstreamError(
            f"{file}: more than {BYTES_MAX // 1024**2} MiB, which is read whole: split it, between two orders"
        )
    text, encoding = decoded(file, data)
    lines = _lines(text)
    start = 1 if lines and lines[0].lower().startswith("sep=") else 0
    if not any(line.strip() for line in lines[start:]):
        raise OrderstreamError(f"{file}: empty")
    return Sheet(file, encoding, lines, start)
