"""Labelled texts whose classes arrive in sessions: CLINC150, Banking77 and DBpedia-14.

The data is not part of Nestor; a user names a folder that has the files, plain or as .xz:

- clinc150: clinc150_data_full.json or data_full.json. 150 intents of an assistant, 100 queries each for
  training and 30 for testing (Larson et al. 2019); queries out of scope are left out. CC BY 3.0,
  github.com/clinc/oos-eval `data/data_full.json`.
- banking77: banking77_train.csv and banking77_test.csv, or train.csv and test.csv, with columns text and
  category. 77 intents of a bank's customers, 10,003 and 3,080 queries (Casanueva et al. 2020). CC BY 4.0,
  github.com/PolyAI-LDN/task-specific-datasets `banking_data/`.
- dbpedia14: dbpedia14_14k.csv, columns label (0 to 13) and text, no header. 14 kinds of Wikipedia articles by
  their first sentences, 1,000 of each (Zhang, Zhao and LeCun 2015). CC BY-SA 3.0 and GFDL,
  github.com/KEAML-JLU/DeepTextClustering.

DBpedia-14 has no test part there: of each class the last tenth in the file is kept for testing. The 70
second-level classes of DBpedia, which arXiv 2512.24695 uses, are another data set.
"""

from __future__ import annotations

import csv
import io
import json
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nestor.data.corpora.sources import TextSource
from nestor.errors import ConfigError, DataError, suggest

SOURCES = {
    "clinc150": "CLINC150 (CC BY 3.0) is data/data_full.json of github.com/clinc/oos-eval",
    "banking77": "Banking77 (CC BY 4.0) is banking_data/ of github.com/PolyAI-LDN/task-specific-datasets",
    "dbpedia14": "DBpedia-14 (CC BY-SA 3.0 and GFDL), 14,000 rows, is in "
    "github.com/KEAML-JLU/DeepTextClustering",
}
DATASETS = tuple(SOURCES)
_DBPEDIA_CLASSES = (
    "company", "educational institution", "artist", "athlete", "office holder", "mean of transportation",
    "building", "natural place", "village", "animal", "plant", "album", "film", "written work",
)  # fmt: skip


class Labelled(NamedTuple):
    """A text and its class, in words."""

    text: str
    label: str


@dataclass(frozen=True)
class LabelledTexts:
    """Texts for training and for testing. No text is in both: those that are stay in the test part."""

    name: str
    train: tuple[Labelled, ...]
    test: tuple[Labelled, ...]

    def __post_init__(self) -> None:
        tested = {plain(one.text) for one in self.test}
        object.__setattr__(self, "train", tuple(one for one in self.train if plain(one.text) not in tested))

    @property
    def labels(self) -> tuple[str, ...]:
        """All classes, sorted."""
        return tuple(sorted({one.label for one in (*self.train, *self.test)}))

    def identity(self) -> list[str]:
        """What streams depend on, JSON-able: a hash of all texts and labels, wherever they are kept."""
        texts = (part for one in (*self.train, *self.test) for part in one)
        return [self.name, str(len(self.train)), *TextSource(tuple(texts)).identity()]


@dataclass(frozen=True)
class Session:
    """Classes that arrive together, what is read of them, and what they are tested with."""

    labels: tuple[str, ...]
    examples: tuple[Labelled, ...]
    tests: tuple[Labelled, ...]


def plain(text: str) -> str:
    """A text without differences of case and spacing."""
    return " ".join(text.casefold().split())


def read_labelled(name: str, folder: str | Path) -> LabelledTexts:
    """A data set by its name in `DATASETS`, from the folder with its files.

    Raises:
        ConfigError: an unknown name.
        DataError: a file is missing (the message says where to get it) or not as described above.
    """
    if name not in DATASETS:
        raise ConfigError(
            f"there is no data set {name!r}; there are {', '.join(DATASETS)}. "
            f"{suggest(name, DATASETS)}".rstrip()
        )
    read = {"clinc150": _clinc150, "banking77": _banking77, "dbpedia14": _dbpedia14}[name]
    try:
        train, test = read(Path(folder))
    except (KeyError, ValueError, IndexError, TypeError, csv.Error, lzma.LZMAError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the files of {name} in {folder} are not as they should be ({error!r})") from error
    return LabelledTexts(name, tuple(train), tuple(test))


def class_sessions(
    data: LabelledTexts,
    *,
    seed: int,
    classes: int,
    examples: int,
    tests: int,
    sessions: int | None = None,
    held_out: bool = False,
) -> list[Session]:
    """All classes in an order drawn by `seed`, so many a session, with so many texts of each.

    A session's examples are in mixed order. The last one has the classes that are left.

    Args:
        tests: of each class at most; from the test part, or with `held_out` from the training part, other
            texts than the examples: a stream on which settings may be chosen.
        sessions: the first so many; None: until all classes have come.

    Raises:
        ConfigError: a number below 1.
        DataError: a class with too few texts.
    """
    for what, value in (
        ("classes", classes),
        ("examples", examples),
        ("tests", tests),
        ("sessions", sessions),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{what} is {value}; it must be at least 1")
    rng = np.random.default_rng((seed, int(held_out)))
    order = [data.labels[i] for i in rng.permutation(len(data.labels))]
    groups = [tuple(order[start : start + classes]) for start in range(0, len(order), classes)][:sessions]
    train, test = _by_label(data.train), _by_label(data.test)
    found = []
    for labels in groups:
        read: list[Labelled] = []
        asked: list[Labelled] = []
        for label in labels:
            pool = _shuffled(rng, train.get(label, []))
            others = pool[examples:] if held_out else _shuffled(rng, test.get(label, []))
            if len(pool) < examples or not others:
                raise DataError(
                    f"class {label!r} of {data.name} has {len(pool)} texts for training and {len(others)} "
                    f"left for testing; ask for fewer than {examples} examples"
                )
            read += pool[:examples]
            asked += others[:tests]
        found.append(Session(labels, tuple(_shuffled(rng, read)), tuple(asked)))
    return found


def _by_label(texts: Sequence[Labelled]) -> dict[str, list[Labelled]]:
    """Texts of each class, each text once."""
    found: dict[str, dict[str, Labelled]] = {}
    for one in texts:
        found.setdefault(one.label, {}).setdefault(plain(one.text), one)
    return {label: list(group.values()) for label, group in found.items()}


def _shuffled(rng: np.random.Generator, items: list[Labelled]) -> list[Labelled]:
    return [items[i] for i in rng.permutation(len(items))]


def _clinc150(folder: Path) -> tuple[list[Labelled], list[Labelled]]:
    parts = json.loads(_file(folder, "clinc150", "clinc150_data_full.json", "data_full.json"))
    train, test = (
        [Labelled(_line(text), _words(label)) for text, label in parts[part]] for part in ("train", "test")
    )
    return train, test


def _banking77(folder: Path) -> tuple[list[Labelled], list[Labelled]]:
    found = []
    for part in ("train", "test"):
        rows = csv.DictReader(io.StringIO(_file(folder, "banking77", f"banking77_{part}.csv", f"{part}.csv")))
        found.append([Labelled(_line(row["text"]), _words(row["category"])) for row in rows])
    return found[0], found[1]


def _dbpedia14(folder: Path) -> tuple[list[Labelled], list[Labelled]]:
    rows = list(csv.reader(io.StringIO(_file(folder, "dbpedia14", "dbpedia14_14k.csv"))))
    train: list[Labelled] = []
    test: list[Labelled] = []
    for number, name in enumerate(_DBPEDIA_CLASSES):
        mine = [Labelled(_line(text), name) for label, text in rows if int(label) == number]
        kept = -(-len(mine) * 9 // 10)
        train += mine[:kept]
        test += mine[kept:]
    return train, test


def _file(folder: Path, name: str, *choices: str) -> str:
    """Text of the first of the files that is there, plain or as .xz."""
    for choice in choices:
        for path in (folder / choice, folder / f"{choice}.xz"):
            if path.is_file():
                opened = lzma.open if path.suffix == ".xz" else open
                with opened(path, "rt", encoding="utf-8", newline="") as file:
                    return str(file.read())
    raise DataError(
        f"the folder {folder} has no {' or '.join(choices)} (nor that with .xz). {SOURCES[name]}: "
        f"put it there"
    )


def _line(text: str) -> str:
    """On one line, with single spaces."""
    return " ".join(text.split())


def _words(label: str) -> str:
    """`Refund_not_showing_up` as it would be said: `refund not showing up`."""
    return " ".join(label.replace("_", " ").replace("?", " ").lower().split())
