"""Showing how hard each piece of a text was written into a memory."""

from collections.abc import Sequence

from rich.text import Text

Pieces = Sequence[tuple[str, float]]

# From hardly written to written hardest: backgrounds of the 256-colour palette, with a readable foreground.
SHADES = (
    "default",
    "white on grey19",
    "white on grey27",
    "black on gold3",
    "black on orange3",
    "white on red3",
)


def coloured(pieces: Pieces) -> Text:
    """The pieces as one text, each with a shade for its share of the strongest write."""
    strongest = max((value for _, value in pieces), default=0.0) or 1.0
    text = Text()
    for piece, value in pieces:
        shade = min(int(value / strongest * len(SHADES)), len(SHADES) - 1)
        text.append(piece, style=SHADES[shade])
    text.rstrip()
    return text


def hardest(pieces: Pieces, count: int = 5) -> list[tuple[str, float]]:
    """The words with the strongest writes, as (word, share of the strongest), strongest first.

    A word is as strong as its strongest token; of a word that occurs again, the strongest occurrence counts.
    """
    words: dict[str, float] = {}
    word, strength = "", 0.0
    for piece, value in [*pieces, (" ", 0.0)]:
        for character in piece:
            if not character.isspace():
                word += character
                strength = max(strength, value)
            elif word:
                words[word] = max(words.get(word, 0.0), strength)
                word, strength = "", 0.0
    strongest = max(words.values(), default=0.0) or 1.0
    ranked = sorted(words.items(), key=lambda item: -item[1])
    return [(word, value / strongest) for word, value in ranked[:count]]
