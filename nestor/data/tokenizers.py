"""Tokenizers: UTF-8 bytes built in, any Hugging Face tokenizer by folder, file or hub name.

Three functions hide the differences between them from the rest of Nestor: `encode_text` (never adds special
tokens), `tokenizer_identity` (what a cache of token ids depends on) and `check_vocabulary`.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import lzma
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestor import files
from nestor.errors import DataError, FileFormatError

if TYPE_CHECKING:
    from transformers import BatchEncoding

SPECIAL_TOKENS = {"<bos>": 256, "<eos>": 257, "<pad>": 258, "<sep>": 259}
_MARK = "nestor_tokenizer"


class ByteTokenizer:
    """Text as UTF-8 bytes: ids 0..255 are the bytes, 256..259 are `<bos> <eos> <pad> <sep>`.

    It offers what Hugging Face code asks of a tokenizer (`__call__`, `encode`, `decode`, `batch_decode`,
    `pad_token_id`, `save_pretrained`) without importing transformers. Encoding never yields a special
    token: the text `<eos>` is five bytes. A saved folder also opens with `AutoTokenizer.from_pretrained`,
    with the same ids."""

    name = "bytes"
    vocab_size = 260
    #: Ids that encoding text can yield are below this; it lets token files use one byte a token.
    text_vocab_size = 256
    bos_token, eos_token, pad_token, sep_token = SPECIAL_TOKENS
    bos_token_id, eos_token_id, pad_token_id, sep_token_id = SPECIAL_TOKENS.values()
    all_special_ids = tuple(SPECIAL_TOKENS.values())
    all_special_tokens = tuple(SPECIAL_TOKENS)
    model_input_names = ("input_ids", "attention_mask")
    chat_template = None
    is_fast = False

    def __init__(self, padding_side: str = "left", model_max_length: int = 1 << 30) -> None:
        if padding_side not in ("left", "right"):
            raise DataError(f"padding_side is {padding_side!r}; it must be 'left' or 'right'")
        self.padding_side = padding_side
        self.model_max_length = model_max_length

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"ByteTokenizer(vocab_size={self.vocab_size})"

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The UTF-8 bytes of `text`; with `add_special_tokens`, `<bos>` in front."""
        ids = list(text.encode("utf-8"))
        return [self.bos_token_id, *ids] if add_special_tokens else ids

    def decode(self, ids: Any, skip_special_tokens: bool = True, **_: Any) -> str:
        """Text of `ids` (a list, array, tensor or one id). Bytes that are not UTF-8 become U+FFFD.

        Raises:
            DataError: an id is outside 0..259.
        """
        text, run = [], bytearray()
        for token in _id_list(ids):
            if 0 <= token < 256:
                run.append(token)
                continue
            if not 0 <= token < self.vocab_size:
                raise DataError(f"token id {token} is outside the byte tokenizer's 0..{self.vocab_size - 1}")
            text.append(run.decode("utf-8", errors="replace"))
            run.clear()
            if not skip_special_tokens:
                text.append(self.all_special_tokens[token - 256])
        text.append(run.decode("utf-8", errors="replace"))
        return "".join(text)

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = True, **_: Any) -> list[str]:
        """`decode` of every sequence."""
        return [self.decode(ids, skip_special_tokens=skip_special_tokens) for ids in sequences]

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        return_tensors: str | None = None,
        add_special_tokens: bool = False,
        padding_side: str | None = None,
        **_: Any,
    ) -> BatchEncoding:
        """Encode one text or several into `input_ids` and `attention_mask`, as Hugging Face tokenizers do.

        Several texts of different length need `padding=True` to become a tensor (`return_tensors="pt"`).
        """
        from transformers import BatchEncoding

        single = isinstance(text, str)
        texts: Sequence[str] = [text] if isinstance(text, str) else text
        rows = [self.encode(one, add_special_tokens=add_special_tokens) for one in texts]
        masks = [[1] * len(row) for row in rows]
        if padding:
            longest = max(map(len, rows), default=0)
            left = (padding_side or self.padding_side) == "left"
            rows = [_padded(row, longest, self.pad_token_id, left) for row in rows]
            masks = [_padded(mask, longest, 0, left) for mask in masks]
        if single and return_tensors is None:
            return BatchEncoding({"input_ids": rows[0], "attention_mask": masks[0]})
        if return_tensors is not None and len({len(row) for row in rows}) > 1:
            raise DataError("texts of different lengths cannot become one tensor: pass padding=True")
        return BatchEncoding({"input_ids": rows, "attention_mask": masks}, tensor_type=return_tensors)

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """One readable string per id (`"a"`, `"<0xE2>"`, `"<eos>"`)."""
        names = [self._token(token) for token in _id_list(ids)]
        return names[0] if isinstance(ids, int) else names

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Inverse of `convert_ids_to_tokens`."""
        table = self.get_vocab()
        return table[tokens] if isinstance(tokens, str) else [table[token] for token in tokens]

    def get_vocab(self) -> dict[str, int]:
        """Readable token strings to ids."""
        return {self._token(token): token for token in range(self.vocab_size)}

    def _token(self, token: int) -> str:
        if token >= 256:
            return self.all_special_tokens[token - 256]
        return chr(token) if 32 <= token < 127 else f"<0x{token:02X}>"

    def save_pretrained(self, folder: str | Path, **_: Any) -> tuple[str, ...]:
        """Write `tokenizer.json` and `tokenizer_config.json` into `folder`; returns their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        definition, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
        files.write_text(definition, _byte_level_twin().to_str())
        files.write_json(
            settings,
            {
                _MARK: self.name,
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": self.bos_token,
                "eos_token": self.eos_token,
                "pad_token": self.pad_token,
                "sep_token": self.sep_token,
                "padding_side": self.padding_side,
                "model_max_length": self.model_max_length,
                "clean_up_tokenization_spaces": False,
            },
        )
        return str(settings), str(definition)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **_: Any) -> ByteTokenizer:
        """Open a folder written by `save_pretrained`.

        Raises:
            FileFormatError: the folder holds another tokenizer.
        """
        settings = _read_settings(Path(folder))
        if settings.get(_MARK) != cls.name:
            raise FileFormatError(
                f"{folder} holds no byte tokenizer ({_MARK} is {settings.get(_MARK)!r} in its settings); "
                "use load_tokenizer(folder)"
            )
        return cls(padding_side=settings.get("padding_side", "left"))


class StreamDecoder:
    """Text of a growing sequence of ids, a piece at a time: `push` returns only characters that are complete.

    A byte-level token can end inside a UTF-8 character; such bytes are held back until the character is
    whole. `finish` gives what is left, with U+FFFD for bytes that never completed. The pieces concatenate
    to the decoding of the whole sequence."""

    #: Ids decoded together with the new ones: some tokenizers treat the first token of a text differently.
    _CONTEXT = 8

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []
        self._given = 0

    def push(self, ids: Any) -> str:
        """Add one id or several; returns the text that became complete."""
        tokens = _id_list(ids)
        if isinstance(self.tokenizer, ByteTokenizer):
            return "".join(map(self._push_byte, tokens))
        return "".join(map(self._push_token, tokens))

    def finish(self) -> str:
        """The text still held back."""
        if isinstance(self.tokenizer, ByteTokenizer):
            return self._bytes.decode(b"", final=True)
        return self._take(self._text(self._ids))

    def _push_byte(self, token: int) -> str:
        if token < 256:
            return self._bytes.decode(bytes([token]))
        cut = self._bytes.decode(b"", final=True)
        self._bytes.reset()
        return cut + self.tokenizer.decode([token], skip_special_tokens=self.skip_special_tokens)

    def _push_token(self, token: int) -> str:
        self._ids.append(token)
        text = self._text(self._ids)
        return "" if text.endswith("\ufffd") else self._take(text)

    def _take(self, text: str) -> str:
        new = text[len(self._text(self._ids[: self._given])) :]
        self._ids = self._ids[max(0, len(self._ids) - self._CONTEXT) :]
        self._given = len(self._ids)
        return new

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=self.skip_special_tokens)


def load_tokenizer(name_or_path: str | Path) -> Any:
    """Open a tokenizer: `"bytes"`, a folder, a `tokenizer.json` or `tokenizer.json.xz` file, or a hub name.

    A folder may be one written by `save_pretrained` (of a tokenizer or of a Nestor model whose
    configuration says `tokenizer_name`). Code from a repository is never run (`trust_remote_code` stays
    off).

    Raises:
        DataError: there is no such tokenizer.
        FileFormatError: the file is not a tokenizer definition.
    """
    name = str(name_or_path)
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_definition(path)
    if path.suffix in (".json", ".xz") or name.startswith((".", "/", "~")):
        raise DataError(f"no tokenizer at {name}: the path does not exist")
    return _from_hub(name)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of `text` without special tokens, whatever the tokenizer."""
    if isinstance(tokenizer, ByteTokenizer):
        return tokenizer.encode(text)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # The wrapper warns about every text longer than the model it was made for; the backend does not.
        return backend.encode(text, add_special_tokens=False).ids
    return tokenizer.encode(text, add_special_tokens=False)


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """`encode_text` of every text; in parallel, and without holding the interpreter, where that can be."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [encode_text(tokenizer, text) for text in texts]
    return [one.ids for one in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def tokenizer_identity(tokenizer: Any) -> str:
    """A short string that changes whenever the ids of some text would change."""
    if isinstance(tokenizer, ByteTokenizer):
        return "bytes"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    definition = (
        backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )
    return f"{type(tokenizer).__name__}-{hashlib.sha256(definition.encode()).hexdigest()[:16]}"


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Refuse a tokenizer that has ids the model's embedding lacks. A larger embedding (padding) is fine.

    Raises:
        DataError: the tokenizer has more entries than `vocab_size`.
    """
    entries = len(tokenizer)
    if entries > vocab_size:
        raise DataError(
            f"the tokenizer has {entries} entries and the model's vocab_size is {vocab_size}: "
            f"ids from {vocab_size} on have no embedding. Use the tokenizer the model was trained with, "
            f"or train with vocab_size={entries}"
        )


def _from_folder(folder: Path) -> Any:
    settings = _read_settings(folder)
    if settings.get(_MARK) == ByteTokenizer.name:
        return ByteTokenizer.from_pretrained(folder)
    if settings.get("tokenizer_class") not in (None, "PreTrainedTokenizerFast") or any(
        (folder / name).is_file() for name in ("tokenizer.model", "spiece.model", "vocab.json")
    ):
        return _from_hub(str(folder))
    for name in ("tokenizer.json", "tokenizer.json.xz"):
        if (folder / name).is_file():
            return (
                _from_hub(str(folder))
                if settings and name == "tokenizer.json"
                else _from_definition(folder / name)
            )
    model = folder / "config.json"
    if (
        model.is_file()
        and json.loads(model.read_text(encoding="utf-8")).get("tokenizer_name") == ByteTokenizer.name
    ):
        return ByteTokenizer()
    raise DataError(
        f"{folder} holds no tokenizer: it needs a tokenizer.json (save_pretrained of a tokenizer writes one)"
    )


def _from_definition(path: Path) -> Any:
    """Wrap a bare tokenizer.json; beginning, end and padding are taken from its special tokens by their
    usual names."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    opener = lzma.open if path.suffix == ".xz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as handle:
            backend = Tokenizer.from_str(handle.read())
    except Exception as error:  # tokenizers raises a bare Exception for a bad definition
        raise FileFormatError(f"{path} is not a tokenizer definition (tokenizer.json): {error}") from error
    known = {token.content for token in backend.get_added_tokens_decoder().values()} | {"<|endoftext|>"}
    usual = {
        "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "[BOS]", "<|endoftext|>"),
        "eos_token": ("</s>", "<eos>", "<|end_of_text|>", "[EOS]", "<|endoftext|>", "<|im_end|>"),
        "pad_token": ("<pad>", "[PAD]", "<|pad|>"),
        "unk_token": ("<unk>", "[UNK]"),
    }
    special = {}
    for role, names in usual.items():
        found = [name for name in names if name in known and backend.token_to_id(name) is not None]
        if found:
            special[role] = found[0]
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def _from_hub(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError and others for the same cause
        raise DataError(
            f"no tokenizer {name!r}: it is not 'bytes', not a folder or file here, and could not be "
            f"opened as a Hugging Face tokenizer ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        ) from error


def _byte_level_twin() -> Any:
    """A `tokenizers.Tokenizer` with the same ids: byte-level BPE without merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {symbol: byte for byte, symbol in _byte_symbols().items()} | SPECIAL_TOKENS
    twin = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    twin.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    twin.decoder = decoders.ByteLevel()
    twin.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return twin


def _byte_symbols() -> dict[int, str]:
    """The printable character by which byte-level BPE writes each byte (the GPT-2 convention)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(f"{path} is not valid JSON: {error}") from error
    return settings if isinstance(settings, dict) else {}


def _id_list(ids: Any) -> list[int]:
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    return [ids] if isinstance(ids, int) else [int(token) for token in ids]


def _padded(row: list[int], length: int, value: int, left: bool) -> list[int]:
    filling = [value] * (length - len(row))
    return filling + row if left else row + filling
