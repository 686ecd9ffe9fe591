"""What the recipe trains on, made from novels: their text, the conversations in them, and a tokenizer.

    python recipes/checkpoint/prepare.py NOVELS.jsonl.xz FOLDER

Writes FOLDER/novels.jsonl.xz, FOLDER/talk.jsonl.xz and FOLDER/tokenizer/. NOVELS has a book a line,
its text in the field `text`, a paragraph a line.
"""

from __future__ import annotations

import json
import lzma
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOCABULARY = 2048
# Characters of a book, and of all books, that are used: the run reads no more than that.
BOOK, ALL = 600_000, 24_000_000
# Lines of a conversation at least, and characters of a line at most.
LINES, LONGEST = 2, 240
SPOKEN = re.compile(r'"([^"]+)"')


def conversations(text: str) -> Iterator[str]:
    """Runs of paragraphs that begin with speech, each as what is said, without the narration."""
    lines: list[str] = []
    for paragraph in [*text.split("\n"), "."]:
        if not paragraph:
            continue
        said = " ".join(part.strip() for part in SPOKEN.findall(paragraph))
        said = said[:-1] + "." if said.endswith((",", ";", ":")) else said
        if paragraph.startswith('"') and 0 < len(said) <= LONGEST:
            lines.append(said)
            continue
        if len(lines) >= LINES:
            yield "\n".join(lines) + "\n"
        lines = []


def train_tokenizer(texts: list[str]) -> Any:
    """Byte-level BPE in which every digit is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text[:60_000] for text in texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def write_lines(path: Path, texts: list[str]) -> None:
    """JSON lines with the field `text`."""
    with lzma.open(path, "wt", encoding="utf-8", preset=3) as handle:
        for text in texts:
            handle.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def main(source: str, target: str) -> None:
    """Read the books, write the three."""
    with lzma.open(source, "rt", encoding="utf-8") as handle:
        books = [json.loads(line)["text"] for line in handle]
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    talk = ["".join(conversations(book)) for book in books]
    write_lines(folder / "talk.jsonl.xz", [text for text in talk if text])
    novels, used = [], 0
    for book in books:
        if used < ALL:
            novels.append(book[:BOOK])
            used += len(novels[-1])
    write_lines(folder / "novels.jsonl.xz", novels)
    train_tokenizer(books).save_pretrained(folder / "tokenizer")
    print(f"{used:,} characters of text, {sum(map(len, talk)):,} of conversation, in {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
