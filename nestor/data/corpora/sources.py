"""Where documents come from: a file, a Hugging Face dataset, strings in memory. And from a name to these."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nestor.data.corpora.reading import JSON_SUFFIXES, TEXT_SUFFIXES, Piece, kind_of, read_pieces
from nestor.errors import DataError, suggest

#: Names of the corpora inside the package (licences: README.md beside the files).
SHIPPED = {"shakespeare": "tinyshakespeare.txt.xz", "classics": "classics-cc0.jsonl.xz"}
_DATASET_MARKS = ("dataset_info.json", "dataset_dict.json")


class Source(Protocol):
    """A source yields its documents as pieces, always in the same order, and says what that order depends
    on."""

    def pieces(self) -> Iterator[Piece]: ...

    def identity(self) -> list[Any]: ...


@dataclass(frozen=True)
class FileSource:
    """One text or JSON-lines file."""

    path: Path
    field: str = "text"

    def pieces(self) -> Iterator[Piece]:
        return read_pieces(self.path, self.field)

    def identity(self) -> list[Any]:
        stat = self.path.stat()
        return ["file", str(self.path.resolve()), stat.st_size, stat.st_mtime_ns, self.field]


@dataclass(frozen=True)
class TextSource:
    """Documents in memory."""

    texts: tuple[str, ...]

    def pieces(self) -> Iterator[Piece]:
        return ((True, text) for text in self.texts if text)

    def identity(self) -> list[Any]:
        digest = hashlib.sha256()
        for text in self.texts:
            data = text.encode("utf-8")
            digest.update(len(data).to_bytes(8, "little") + data)
        return ["text", digest.hexdigest()]


@dataclass(frozen=True)
class DatasetSource:
    """A column of a Hugging Face dataset."""

    dataset: Any
    field: str
    label: str

    def pieces(self) -> Iterator[Piece]:
        for row in self.dataset.select_columns([self.field]):
            text = row[self.field]
            if not isinstance(text, str):
                raise DataError(
                    f"{self.label}: field {self.field!r} is {type(text).__name__}; a string is wanted"
                )
            if text:
                yield True, text

    def identity(self) -> list[Any]:
        return ["dataset", self.label, self.dataset._fingerprint, self.field]


def find_sources(spec: str, field: str) -> list[Source]:
    """Sources that `spec` names (see `open_corpus`), in a fixed order.

    Raises:
        DataError: nothing is there.
    """
    if spec in SHIPPED:
        return [FileSource(Path(__file__).parent / SHIPPED[spec])]
    if spec.startswith("hf:"):
        return [_named_dataset(spec, field)]
    path = Path(spec).expanduser()
    if path.is_file():
        return [FileSource(path, field)]
    if path.is_dir():
        if any((path / mark).is_file() for mark in _DATASET_MARKS):
            return [_saved_dataset(path, None, field)]
        return list(_folder(path, field))
    if glob.has_magic(spec):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        sources = [FileSource(name, field) for name in found if name.is_file()]
        if not sources:
            raise DataError(f"no file matches {spec!r}")
        return list(sources)
    raise DataError(f"no corpus {spec!r}: {_what_exists(path)}")


def _folder(path: Path, field: str) -> list[FileSource]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    visible = [
        file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    found = [FileSource(file, field) for file in visible if kind_of(file)]
    if not found:
        kinds = ", ".join(TEXT_SUFFIXES + JSON_SUFFIXES)
        seen = (
            f"; it has {len(visible)} other files, such as {visible[0].name}" if visible else "; it is empty"
        )
        raise DataError(f"folder {path} holds no corpus file ({kinds}, also as .xz or .gz){seen}")
    return found


def _what_exists(path: Path) -> str:
    if path.parent.is_dir():
        names = [entry.name for entry in path.parent.iterdir()]
        hint = suggest(path.name, names + list(SHIPPED))
    else:
        hint = f"the folder {path.parent} does not exist"
    return f"no such file or folder. {hint} Shipped corpora: {', '.join(SHIPPED)}; a dataset is named hf:NAME"


def _named_dataset(spec: str, field: str) -> DatasetSource:
    name, _, rest = spec.removeprefix("hf:").partition(":")
    split, _, column = rest.partition(":")
    name, _, config = name.partition("@")
    split, column = split or "train", column or field
    path = Path(name).expanduser()
    if any((path / mark).is_file() for mark in _DATASET_MARKS):
        return _saved_dataset(path, split, column)
    datasets = _datasets()
    try:
        dataset = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # datasets raises errors of its own, of the hub client and of fsspec
        first = str(error).splitlines()[0] if str(error) else ""
        raise DataError(
            f"dataset {name!r} (split {split!r}) cannot be opened: {type(error).__name__}: {first}. "
            "The form is hf:NAME[@CONFIG][:SPLIT[:FIELD]]"
        ) from error
    return _checked(dataset, column, spec)


def _saved_dataset(path: Path, split: str | None, field: str) -> DatasetSource:
    datasets = _datasets()
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"{path} looks like a saved dataset and cannot be opened: {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        wanted = split or "train"
        if wanted not in dataset:
            raise DataError(
                f"dataset {path} has no split {wanted!r}; it has {', '.join(dataset)}: hf:{path}:SPLIT"
            )
        dataset = dataset[wanted]
    return _checked(dataset, field, str(path))


def _checked(dataset: Any, field: str, label: str) -> DatasetSource:
    if field not in dataset.column_names:
        names = list(dataset.column_names)
        raise DataError(f"{label} has no field {field!r}; it has {', '.join(names)}. {suggest(field, names)}")
    return DatasetSource(dataset, field, label)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "Hugging Face datasets are read with the package `datasets`: pip install datasets"
        ) from error
    return datasets
