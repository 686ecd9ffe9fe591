"""Read text files into documents, a piece at a time.

A *piece* is `(starts, text)`: `starts` says that a new document begins with it. A long text file comes as
many pieces of about one mebibyte, cut after a line end, so that no file is held in memory as a whole. A
plain text file is one document; a JSON-lines file is one document a line."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from nestor.errors import DataError, suggest

Piece = tuple[bool, str]

TEXT_SUFFIXES = (".txt", ".md", ".text", ".rst")
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
COMPRESSED = (".xz", ".gz")
_BLOCK = 1 << 20
_FOREIGN = (
    ".parquet",
    ".arrow",
    ".csv",
    ".tsv",
    ".zip",
    ".tar",
    ".zst",
    ".bz2",
    ".pdf",
    ".docx",
    ".epub",
    ".html",
)


def kind_of(path: Path) -> str | None:
    """`"text"`, `"json"` or None (not a corpus file), by the name's ending, compression set aside."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    return "text" if last in TEXT_SUFFIXES else "json" if last in JSON_SUFFIXES else None


def read_pieces(path: Path, field: str = "text") -> Iterator[Piece]:
    """Pieces of one file. A name without a known ending is read as plain text.

    Raises:
        DataError: not UTF-8 (with the byte's offset), not JSON lines, a line without `field`, a damaged
            archive, or a format that is not text.
    """
    kind = kind_of(path)
    if kind is None and path.suffix.lower() in _FOREIGN:
        raise DataError(
            f"{path}: {path.suffix} files are not read directly; convert it to .txt or .jsonl, or open "
            "a dataset folder with hf:FOLDER"
        )
    try:
        with _open(path) as handle:
            yield from _json_lines(handle, path, field) if kind == "json" else _plain_text(handle, path)
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path} is damaged or not a {path.suffix} file: {error}; copy it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return open(path, "rb")


def _plain_text(handle: BinaryIO, path: Path) -> Iterator[Piece]:
    offset, pending, starts = 0, b"", True
    while block := handle.read(_BLOCK):
        data = pending + block
        cut = data.rfind(b"\n") + 1 or _character_boundary(data)
        text = _decode(data[:cut], path, offset)
        if text:
            yield starts, text
            starts = False
        offset, pending = offset + cut, data[cut:]
    if text := _decode(pending, path, offset):
        yield starts, text


def _json_lines(handle: BinaryIO, path: Path, field: str) -> Iterator[Piece]:
    offset = 0
    for number, line in enumerate(handle, start=1):
        text = _decode(line, path, offset)
        offset += len(line)
        if text.strip() and (document := _field(text, field, path, number)):
            yield True, document


def _field(line: str, field: str, path: Path, number: int) -> str:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line)
    except ValueError as error:
        advice = ""
        if number == 1 and line.lstrip().startswith(("[", "{")):
            advice = "; the file may be one JSON value over several lines: write one object a line"
        raise DataError(f"{where} is not JSON ({error}){advice}") from error
    if isinstance(record, list):
        raise DataError(
            f"{where} is a JSON array; write one object a line (for example: jq -c '.[]' {path.name})"
        )
    if not isinstance(record, dict):
        raise DataError(
            f"{where} is a JSON {type(record).__name__}; an object with the field {field!r} is wanted"
        )
    if field not in record:
        names = ", ".join(map(repr, record)) or "nothing"
        raise DataError(
            f"{where} has no field {field!r}; it has {names}. {suggest(field, list(record))} "
            "Name the field with `field`"
        )
    if not isinstance(record[field], str):
        raise DataError(f"{where}: field {field!r} is {type(record[field]).__name__}; a string is wanted")
    return record[field]


def _character_boundary(data: bytes) -> int:
    """Length of `data` without a UTF-8 character that is cut by its end."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if length > back else len(data)
        if byte < 0x80:
            break
    return len(data)


def _decode(data: bytes, path: Path, offset: int) -> str:
    if offset == 0:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(
                f"{path} is UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8 {path.name} > utf8.txt"
            )
        # A byte-order mark is no text.
        if data.startswith(b"\xef\xbb\xbf"):
            data, offset = data[3:], 3
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = offset + error.start
        note = " of the decompressed text" if path.suffix.lower() in COMPRESSED else ""
        raise DataError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {place}{note} ({error.reason}). "
            f"If it is an older encoding, convert it: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > utf8.txt"
        ) from error
