"""The two main plots of a quickstart side by side, as one PNG for a README.

python -m nestor.quickstart.picture runs/quickstart/results.json docs/images/quickstart.png
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np

from nestor.errors import FileFormatError
from nestor.evaluation.summary import figures_of
from nestor.files import atomic_write

FIGURES = ("recall-by-distance", "perplexity-by-position")


def draw(result: Mapping[str, Any]) -> np.ndarray:
    """Recall by distance and bits per byte by position, [height, width, 4] float32 in 0..1."""
    plots = {figure.name: figure.plot for figure in figures_of(result["evaluation"])}
    pictures = [matplotlib.image.imread(io.BytesIO(plots[name].light)) for name in FIGURES]
    height = max(picture.shape[0] for picture in pictures)
    padded = [np.pad(p, ((0, height - p.shape[0]), (0, 0), (0, 0)), constant_values=1.0) for p in pictures]
    return np.concatenate(padded, axis=1)


def write_picture(results: Path, out: Path) -> Path:
    """Draw the picture of a results.json into the PNG `out`; returns its path.

    Raises:
        FileFormatError: the file is not the results of a quickstart.
    """
    try:
        picture = draw(json.loads(results.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError) as error:
        raise FileFormatError(f"{results} does not hold the results of a quickstart ({error!r})") from error
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as temporary:
        matplotlib.image.imsave(temporary, picture, format="png")
    return out


def main(argv: Sequence[str]) -> int:
    """`RESULTS OUT`."""
    if len(argv) != 2:
        print("usage: python -m nestor.quickstart.picture RESULTS.json OUT.png", file=sys.stderr)
        return 2
    try:
        print(write_picture(Path(argv[0]), Path(argv[1])))
    except FileFormatError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
