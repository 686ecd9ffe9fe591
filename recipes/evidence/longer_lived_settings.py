"""Settings of longer_lived.py, and the ways of reading a long text that it compares."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from nestor.cli.loading import Dtype
from nestor.data.tasks.needle import NEEDLE_KINDS
from nestor.errors import ConfigError, DataError, suggest
from nestor.files import write_json

Part = Literal["train", "cost", "documents", "needles", "zeroshot"]
PARTS: tuple[Part, ...] = ("train", "cost", "documents", "needles", "zeroshot")
RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Arm:
    """One way of reading.

    Attributes:
        window, stride, forget: of `WindowedDecoder`. branch: with the trained memory. levels: weights learn.
        zeroshot: zero-shot tasks are asked of it; their texts are shorter than a window, so that those who
            differ in windows alone would say the same.
        needles: needles are asked of it.
        baseline: the arm that it is compared with. control: the same without what earlier windows said.
    """

    name: str
    about: str
    window: int
    stride: int | None = None
    branch: bool = False
    levels: bool = False
    forget: bool = False
    zeroshot: bool = False
    needles: bool = True
    baseline: str | None = None
    control: str | None = None


@dataclass
class Training:
    """Training of the branches on books as streams; nothing else of the model is trained."""

    minutes: float = 8.0
    """Of training, the first step not counted."""
    steps: int | None = None
    """In place of minutes."""
    layers: tuple[int, ...] = ()
    """Beside which layers; none: --training.count of them, with equal distances."""
    count: int = 4
    """Layers with a branch."""
    chunk_size: int = 64
    """Tokens of a memory that share an anchor."""
    window: int = 2048
    """Tokens that attention sees in training; short, so that the memory is needed."""
    segment: int = 8192
    """Tokens of a step and lane, through whose windows gradients flow; the memory goes on after it."""
    lanes: int = 8
    """Books that are read side by side."""
    learning_rate: float = 1e-3
    """At its peak: it rises over the first twentieth, and falls over the last third."""
    clip: float = 1.0
    """Greatest norm of a gradient."""
    seed: int = 0
    """Of weights, and of the order of the books."""
    save_seconds: float = 60.0
    """From checkpoint to checkpoint."""


@dataclass
class Args:
    """A small trained model made longer-lived: levels that learn, a memory beside attention, or both.

    Examples:
      python recipes/evidence/longer_lived.py smollm2 --data ../shared/data
      python recipes/evidence/longer_lived.py smollm2 --data ../shared/data --workers 8 --device cuda
      python recipes/evidence/longer_lived.py smollm2 --data ../shared/data --parts train --training.minutes 4
      python recipes/evidence/longer_lived.py smollm2 --data ../shared/data --parts zeroshot
      python recipes/evidence/longer_lived.py --table-only
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")] = "smollm2"
    """A folder with a model (recipes/retrofit/smollm2.py makes one), or an id on the Hugging Face hub."""
    data: Path = Path("../shared/data")
    """Folder with text/novels-*.jsonl.xz and bench/zeroshot/*.jsonl.xz."""
    name: str = "longer_lived"
    """Of the result's files."""
    out: Path = Path("runs/evidence/longer_lived")
    """Folder of pieces; the same command goes on where it was stopped."""
    parts: tuple[Part, ...] = PARTS
    """What to run; zeroshot needs nestor[eval]."""
    arms: tuple[str, ...] = ()
    """Which ways of reading to run; none given: all, which are "as it is", "levels", "branch", "forgetful
    branch" and "both", each also with ", short" for the shorter window, "sliding" and "branch, sliding"."""
    table_only: bool = False
    """Make table and plots from the committed result."""
    window: int = 8192
    """Tokens that attention sees: the model's context."""
    short: int = 2048
    """A shorter window, in which there is more to remember."""
    tokens: int = 65_536
    """Of each long document."""
    documents: int | None = None
    """How many of the held-out ones; none given: all."""
    bins: int = 16
    """Stretches of a document."""
    periods: tuple[int, ...] = (512, 4096)
    """Of the levels."""
    rate: float = 3e-4
    """Of the levels' Adam: the best in recipes/retrofit."""
    lengths: tuple[int, ...] = (4096, 8192, 16_384, 32_768)
    """Of the texts with a needle, in tokens."""
    variants: tuple[str, ...] = ("passkey", "number", "word")
    """Kinds of needles."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where they lie."""
    needles: int = 3
    """Of each kind, length and depth."""
    tasks: tuple[str, ...] = ("arc_easy", "piqa", "openbook_qa", "lambada_openai")
    """Zero-shot tasks."""
    limit: int | None = 500
    """Items of each task."""
    batch_size: int = 16
    """Of zero-shot tasks."""
    cost_tokens: int = 16_384
    """Tokens over which speed and memory are measured, by one process alone."""
    workers: int = 1
    """Processes for documents, needles and zero-shot tasks."""
    device: str = "auto"
    """cpu, cuda ...; with several workers cuda is all GPUs in turn. Training takes the first."""
    dtype: Dtype = "auto"
    """Of the model's weights."""
    training: Training = field(default_factory=Training)

    def check(self) -> None:
        """Raises ConfigError for what is out of range or unknown."""
        known = self.all_arms()
        for name in self.arms:
            if name not in known:
                raise ConfigError(f"no arm {name!r}; there are {', '.join(known)}. {suggest(name, known)}")
        for name in self.variants:
            if name not in NEEDLE_KINDS:
                raise ConfigError(f"no needle {name!r}; there are {', '.join(NEEDLE_KINDS)}")
        if self.training.segment % self.training.window or self.tokens % self.bins:
            raise ConfigError(
                f"a segment of {self.training.segment} must be a multiple of its window of "
                f"{self.training.window}, and {self.tokens} tokens one of {self.bins} bins"
            )
        if not 0 < self.short < self.window or min(self.tokens, self.needles, *self.lengths) < 1:
            raise ConfigError("short must be below window, and tokens, needles and lengths above 0")

    def all_arms(self) -> dict[str, Arm]:
        """By name, the model as it is first."""

        def within(window: int, end: str = "") -> list[Arm]:
            base, about = "as it is" + end, f"windows of {window:,} tokens, each read for itself"
            zeroshot = not end
            return [
                Arm(base, about, window, zeroshot=zeroshot),
                Arm("levels" + end, f"{about}; levels learn", window, levels=True, zeroshot=zeroshot,
                    needles=zeroshot, baseline=base),
                Arm("branch" + end, f"windows of {window:,} tokens; memory branches know what was before",
                    window, branch=True, zeroshot=zeroshot, baseline=base, control="forgetful branch" + end),
                Arm("forgetful branch" + end, f"{about}; memory branches begin anew with each of them",
                    window, branch=True, forget=True, baseline=base),
                Arm("both" + end, f"as `branch{end}`, and levels learn", window, branch=True, levels=True,
                    zeroshot=zeroshot, needles=zeroshot, baseline=base),
            ]  # fmt: skip

        stride = self.window // 4
        about = f"a window of {self.window:,} tokens that slides by {stride:,}"
        sliding = [
            Arm("sliding", about, self.window, stride, baseline="as it is"),
            Arm("branch, sliding", f"{about}; memory branches", self.window, stride, branch=True,
                baseline="sliding"),
        ]  # fmt: skip
        found = [*within(self.window), *sliding, *within(self.short, ", short")]
        return {arm.name: arm for arm in found}

    def chosen(self) -> list[Arm]:
        """The arms to run."""
        known = self.all_arms()
        return [known[name] for name in (self.arms or known)]

    @property
    def branch_file(self) -> Path:
        """The trained branches."""
        return self.out / "branches.safetensors"

    def text(self, name: str) -> Path:
        """A file of texts. Raises DataError: it is not there."""
        path = self.data / "text" / f"{name}.jsonl.xz"
        found = path if path.is_file() else path.with_suffix("")
        if not found.is_file():
            raise DataError(f"there is no {path} and no {found.name} beside it; give the folder with --data")
        return found

    def wanted(self, arm: Arm, documents: int) -> dict[str, list[tuple[Any, ...]]]:
        """By part, all that an arm is to have."""
        found: dict[str, list[tuple[Any, ...]]] = {
            "cost": [] if arm.forget else [()],
            "documents": [(index,) for index in range(documents)],
        }
        needles = [(variant, length) for length in self.lengths for variant in self.variants]
        found["needles"] = list(needles) if arm.needles else []
        found["zeroshot"] = [(task,) for task in self.tasks] if arm.zeroshot else []
        return found

    def trained_branches(self) -> str:
        """A digest of the trained branches, whose file need not be where pieces are only put together.

        Raises:
            ConfigError: there are none.
        """
        if self.branch_file.is_file():
            return blake2b(self.branch_file.read_bytes(), digest_size=16).hexdigest()
        kept = self.out / "training.json"
        found = json.loads(kept.read_text(encoding="utf-8")).get("branches") if kept.is_file() else None
        if found is None:
            raise ConfigError(f"there is no {self.branch_file}; run --parts train first")
        return str(found)

    def piece(self, part: str, arm: Arm, *which: Any) -> Path:
        """Where a piece is kept."""
        name = "-".join([arm.name.replace(", ", "-").replace(" ", "-"), *map(str, which)])
        return self.out / part / f"{name}.json"

    def settings(self, part: str, arm: Arm) -> dict[str, Any]:
        """What a piece depends on."""
        names = {
            "cost": ("cost_tokens",),
            "documents": ("tokens", "bins"),
            "needles": ("depths", "needles"),
            "zeroshot": ("limit", "tokens"),
        }[part]
        if arm.levels:
            names = (*names, "periods", "rate")
        found = {"arm": asdict(arm), **{name: getattr(self, name) for name in names}}
        if arm.branch:
            found["branches"] = self.trained_branches()
        return json.loads(json.dumps(found))


def kept(path: Path, settings: dict[str, Any]) -> Any:
    """The result in a file; None if there is none.

    Raises:
        ConfigError: it is of other settings. DataError: the file is none of this program.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before, result = found["settings"], found["result"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a piece of this program ({error!r}); remove it") from error
    other = {key: before.get(key) for key, value in settings.items() if before.get(key) != value}
    if other:
        now = {key: settings[key] for key in other}
        raise ConfigError(f"{path} is of {other}, and this run has {now}; name another folder with --out")
    return result


def keep(path: Path, settings: dict[str, Any], result: Any) -> None:
    """Write a piece."""
    write_json(path, {"settings": settings, "result": result})
