"""A corpus as token ids in memory-mapped files, tokenised once and cached.

Layout of a cache entry, a folder named by a hash of the corpus' identity and the tokenizer's: `tokens.bin`
(all ids, document after document, little-endian unsigned integers), `offsets.npy` (int64, where each
document starts, and the end) and `meta.json`. The folder is written beside its final place and renamed, so
that it exists whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from nestor.data.corpora import Corpus
from nestor.data.tokenizers import encode_text, tokenizer_identity
from nestor.errors import DataError

_FORMAT = 1
_PROGRESS_AFTER = 2.0


class TokenizedCorpus:
    """Token ids of all documents of a corpus.

    Attributes:
        tokens: [n_tokens] unsigned integers (a read-only memory map, or an array).
        offsets: [n_documents + 1] int64; document i is `tokens[offsets[i]:offsets[i + 1]]`, never empty.
        identity: hash of tokens and offsets.
        label: name for messages.
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, identity: str, label: str) -> None:
        self.tokens = tokens
        self.offsets = offsets
        self.identity = identity
        self.label = label

    @classmethod
    def from_documents(
        cls, documents: Iterable[Sequence[int]], label: str = "documents in memory"
    ) -> TokenizedCorpus:
        """A corpus of token id lists in memory; empty documents are left out.

        Raises:
            DataError: there is no token.
        """
        arrays = [np.asarray(document, dtype=np.int64) for document in documents if len(document)]
        if not arrays:
            raise DataError(f"{label}: no document has a token")
        tokens = np.concatenate(arrays)
        offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int64)
        return cls(tokens, offsets, _digest(hashlib.sha256(tokens.tobytes()), offsets), label)

    @property
    def n_tokens(self) -> int:
        """Number of tokens of all documents."""
        return int(self.offsets[-1])

    @property
    def n_documents(self) -> int:
        """Number of documents that have a token."""
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """Ids of one document, [length] int64."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]].astype(np.int64)

    def __repr__(self) -> str:
        return f"TokenizedCorpus({self.label!r}, {self.n_documents} documents, {self.n_tokens} tokens)"


def tokenize(
    corpus: Corpus, tokenizer: Any, *, cache_dir: str | Path | None = None, progress: bool | None = None
) -> TokenizedCorpus:
    """Token ids of `corpus`, from the cache if this corpus has been tokenised by this tokenizer before.

    Args:
        cache_dir: folder of the cache; by default `default_cache_dir()`.
        progress: show a progress line once it takes longer than two seconds; by default if stderr is a
            terminal.

    Raises:
        DataError: the corpus is empty or bad, or the cache folder cannot be written.
    """
    identity = {"format": _FORMAT, "corpus": corpus.identity(), "tokenizer": tokenizer_identity(tokenizer)}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    root = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir() / "tokens"
    folder = root / key
    if (found := _open(folder, corpus.label)) is not None:
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=root))
    except OSError as error:
        raise DataError(
            f"the cache of token ids cannot be written to {root} ({error.strerror}); name another folder "
            "as cache_dir, or set XDG_CACHE_HOME"
        ) from error
    try:
        _write(unfinished, corpus, tokenizer, identity, sys.stderr.isatty() if progress is None else progress)
        _publish(unfinished, folder)
    except OSError as error:
        raise DataError(
            f"writing token ids to {root} failed ({error.strerror}); free some space there"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    result = _open(folder, corpus.label)
    if result is None:
        raise DataError(f"the cache entry {folder} was changed while it was opened; try again")
    return result


def default_cache_dir() -> Path:
    """Nestor's cache folder where the platform keeps them: on Linux `$XDG_CACHE_HOME` or `~/.cache`."""
    if configured := os.environ.get("XDG_CACHE_HOME"):
        return Path(configured) / "nestor"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "nestor" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "nestor"
    return Path.home() / ".cache" / "nestor"


def _open(folder: Path, label: str) -> TokenizedCorpus | None:
    """The cache entry, or None if it is absent or damaged (it is then made again)."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        offsets = np.load(folder / "offsets.npy", allow_pickle=False)
        dtype, digest = np.dtype(meta["dtype"]), str(meta["digest"])
        if (folder / "tokens.bin").stat().st_size != int(offsets[-1]) * dtype.itemsize:
            return None
        tokens = np.memmap(folder / "tokens.bin", dtype=dtype, mode="r")
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None
    return TokenizedCorpus(tokens, offsets, digest, label)


def _write(folder: Path, corpus: Corpus, tokenizer: Any, identity: dict[str, Any], show: bool) -> None:
    dtype = _token_dtype(tokenizer)
    with open(folder / "tokens.bin", "wb") as handle:
        offsets, digest = _write_tokens(handle, corpus, tokenizer, dtype, show)
        handle.flush()
        os.fsync(handle.fileno())
    np.save(folder / "offsets.npy", offsets, allow_pickle=False)
    meta = identity | {
        "dtype": dtype.str,
        "digest": digest,
        "documents": len(offsets) - 1,
        "tokens": int(offsets[-1]),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _write_tokens(
    handle: BinaryIO, corpus: Corpus, tokenizer: Any, dtype: np.dtype, show: bool
) -> tuple[np.ndarray, str]:
    """Write all tokens; returns the documents' offsets and the digest."""
    ends: list[int] = [0]
    running = hashlib.sha256()
    total = 0
    with _Progress(corpus.label, show) as report:
        for starts, text in corpus.pieces():
            if starts and total > ends[-1]:
                ends.append(total)
            ids = np.asarray(encode_text(tokenizer, text), dtype=dtype)
            data = ids.tobytes()
            handle.write(data)
            running.update(data)
            total += len(ids)
            report(total)
    if total > ends[-1]:
        ends.append(total)
    if total == 0:
        raise DataError(f"corpus {corpus.label} is empty: the tokenizer made no token of it")
    offsets = np.asarray(ends, dtype=np.int64)
    return offsets, _digest(running, offsets)


def _digest(tokens: Any, offsets: np.ndarray) -> str:
    """Finish the running hash of the tokens with where the documents lie."""
    tokens.update(offsets.tobytes())
    return tokens.hexdigest()[:24]


def _publish(unfinished: Path, folder: Path) -> None:
    """Rename into place. An entry that another process finished first is kept; a damaged one is replaced."""
    try:
        os.rename(unfinished, folder)
    except OSError:
        if _open(folder, "") is None:
            shutil.rmtree(folder)
            os.rename(unfinished, folder)


def _token_dtype(tokenizer: Any) -> np.dtype:
    entries = getattr(tokenizer, "text_vocab_size", None) or len(tokenizer)
    return np.dtype("<u1" if entries <= 1 << 8 else "<u2" if entries <= 1 << 16 else "<u4")


class _Progress:
    """Shows a line with the number of tokens, once the work has taken two seconds."""

    def __init__(self, label: str, show: bool) -> None:
        self._label, self._show = label, show
        self._started = time.monotonic()
        self._status: Any = None

    def __enter__(self) -> Self:
        return self

    def __call__(self, tokens: int) -> None:
        if not self._show or time.monotonic() - self._started < _PROGRESS_AFTER:
            return
        text = f"tokenising {self._label}: {tokens / 1e6:.1f} M tokens"
        if self._status is None:
            from rich.console import Console

            self._status = Console(stderr=True).status(text)
            self._status.start()
        self._status.update(text)

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()
