"""What a training run is made of: the model, the data, the optimiser, the schedule, and the run itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from nestor.errors import ConfigError, suggest
from nestor.training.settings import apply_overrides, build, flatten, plain, read_toml, write_toml

TASKS = ("recall", "mqar")

# Settings that may differ between a run and its continuation: they change neither the weights that the steps
# so far gave nor what the coming ones compute.
FREE_ON_RESUME = frozenset(
    {
        "name",
        "run.out",
        "run.device",
        "run.log_every",
        "run.save_every",
        "run.keep_last",
        "run.tracker",
        "run.prefetch",
        "run.data_workers",
        "run.compile",
        "run.activation_checkpointing",
    }
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to train: a preset at a size, with settings of `NestorConfig` replaced, or a saved model."""

    preset: str = "transformer"
    size: str = "quick"
    overrides: dict[str, Any] = field(default_factory=dict)
    #: Folder of a saved model to start from. Preset and size are then not used; overrides replace settings of
    #: the saved model that its weights do not depend on.
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Text, or a task that makes its own documents (out of the text, as far as it needs some)."""

    #: A shipped corpus, file, folder, glob or `hf:NAME`; several are read as one corpus.
    text: tuple[str, ...] = ()
    #: `recall` (facts planted in the text) or `mqar` (associative recall of tokens); empty for plain text.
    task: str = ""
    #: Share of the lanes, relative to the other sources.
    weight: float = 1.0
    #: Field of a JSON line or dataset row that holds the text.
    field: str = "text"
    #: Keyword arguments of the task.
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how it is cut into batches."""

    sources: tuple[SourceConfig, ...] = (SourceConfig(text=("shakespeare",)),)
    #: Held-out text. Empty: the part `valid_fraction` of the text sources, which training then does not see.
    valid: tuple[SourceConfig, ...] = ()
    valid_fraction: float = 0.05
    #: `bytes`, or a Hugging Face tokenizer (folder, file or hub name).
    tokenizer: str = "bytes"
    #: Tokens of a lane in one step (T).
    sequence_length: int = 256
    #: Lanes of one step over all processes and micro-batches (B); a step trains on B x T tokens.
    batch_size: int = 16


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW for every parameter, or Muon, AdaMuon or M3 for the hidden matrices and AdamW for the rest."""

    name: Literal["adamw", "muon", "adamuon", "m3"] = "adamw"
    lr: float = 1e-3
    #: Of AdamW; AdaMuon and M3 take the second for their own second moments.
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    #: On weights of two and more dimensions; norms, biases and other vectors are never decayed.
    weight_decay: float = 0.1
    #: Largest norm of the gradient of a step; 0 does not clip.
    clip: float = 1.0
    #: Peak learning rate of the hidden matrices under Muon, AdaMuon and M3, in AdamW's units (their updates
    #: are scaled to the size of AdamW's); 0 takes `lr`.
    muon_lr: float = 0.0
    #: What stays from step to step of the momentum that they orthogonalise.
    muon_momentum: float = 0.95
    #: Of a continuum (`hope-attention`): steps from update to update of each block, from the fastest to the
    #: slowest, with the mean of their gradients. Empty: all blocks in every step.
    block_steps: tuple[int, ...] = ()
    #: M3's slow momentum takes in the gradients of so many steps at once, when the last of them is over.
    m3_slow_period: int = 10
    #: How much the slow momentum's direction counts beside the fast one's; 0: not at all.
    m3_slow_weight: float = 0.3
    #: What stays of the slow momentum from one of its updates to the next.
    m3_slow_momentum: float = 0.9
    #: M3's second moments are of the gradients, as in the paper, or of the orthogonalised fast momentum.
    m3_v_source: Literal["gradient", "orthogonal", "none"] = "gradient"


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rates move over the steps; see `nestor.training.schedule`."""

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    #: Steps of linear warm-up; a value below 1 is a fraction of all steps.
    warmup: float = 0.02
    #: Fraction of the steps over which `wsd` decays at the end.
    decay: float = 0.2
    #: What is left of the peak at the end of cosine and wsd.
    final: float = 0.1


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, where, and how a run computes, saves and reports."""

    #: Folder of the run; empty: `runs/NAME`.
    out: str = ""
    #: Length of the run in steps, or in tokens (rounded up to a step); exactly one of them is given.
    steps: int = 0
    tokens: int = 0
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    #: Micro-batches of a step: the lanes are computed in this many parts. The result does not depend on it.
    accumulation: int = 1
    activation_checkpointing: bool = False
    #: `reset`: every segment starts from a fresh State. `carry`: from the State its lane reached (gradient
    #: stopped). `pass`: from what the memories of another lane hold, an unrelated sequence. `fitted-noise`:
    #: memories from noise like what training text makes of them; `random-noise`: from noise of one size.
    state_mode: Literal["reset", "carry", "pass", "fitted-noise", "random-noise"] = "reset"
    #: Share of the segments that start from a fresh State in any mode, drawn anew in each step.
    fresh_share: float = 0.0
    #: Standard deviation of `random-noise`, on every number of a memory's matrices.
    noise: float = 0.1
    #: Steps between measurements on held-out text, and batches of one; 0 never measures.
    eval_every: int = 200
    eval_batches: int = 16
    save_every: int = 500
    #: Newest checkpoints that are kept, beside the best.
    keep_last: int = 2
    log_every: int = 10
    seed: int = 0
    #: torch.compile of each block: faster on a GPU, after a minute or so of compilation.
    compile: bool = False
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    #: Under torchrun: a replica per process, or parameters sharded over the processes.
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    device: Literal["auto", "cpu"] = "auto"
    #: Batches made ahead of time.
    prefetch: int = 2
    #: Processes that make them, each some of the lanes; 0: a thread of the training process.
    data_workers: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run: equal configurations give equal weights on one CPU."""

    name: str = "run"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check(self)

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.run.out).expanduser() if self.run.out else Path("runs") / self.name

    @property
    def tokens_per_step(self) -> int:
        """B x T."""
        return self.data.batch_size * self.data.sequence_length

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.run.steps or -(-self.run.tokens // self.tokens_per_step)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """From nested plain values. In `data.sources` a string stands for a text source.

        Raises:
            ConfigError: a key is unknown, a value impossible; the message names both.
        """
        values = dict(values)
        if isinstance(values.get("data"), Mapping):
            values["data"] = dict(values["data"])
            for key in ("sources", "valid"):
                if key in values["data"]:
                    values["data"][key] = _as_sources(values["data"][key])
        return build(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """As nested plain values."""
        return plain(self)

    def to_toml(self) -> str:
        """As TOML text that `load_config` reads back equal."""
        return write_toml(self.to_dict())

    def differences(self, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Settings in which a continuation `other` of this run would differ in what it computes."""
        mine, theirs = flatten(self.to_dict()), flatten(other.to_dict())
        keys = sorted((mine.keys() | theirs.keys()) - FREE_ON_RESUME)
        return {key: (mine.get(key), theirs.get(key)) for key in keys if mine.get(key) != theirs.get(key)}


def load_config(name: str | Path, overrides: Sequence[tuple[str, Any]] = ()) -> TrainConfig:
    """The configuration in a TOML file, or of a shipped name, with dotted keys replaced.

    Raises:
        ConfigError: no such file or name, unknown key, impossible value.
    """
    path = find_config(name)
    values = {"name": path.stem, **read_toml(path)}
    if isinstance(values.get("data"), dict) and "sources" in values["data"]:
        values["data"]["sources"] = _as_sources(values["data"]["sources"])
    values = apply_overrides(values, overrides, TrainConfig)
    given = {key for key, _ in overrides}
    # The length of a run is one of two settings: naming one on the command line replaces the other.
    for one, other in (("steps", "tokens"), ("tokens", "steps")):
        if f"run.{one}" in given and f"run.{other}" not in given:
            values.setdefault("run", {}).pop(other, None)
    return TrainConfig.from_dict(values)


def shipped_configs() -> dict[str, str]:
    """Name and first comment line of every configuration that comes with Nestor."""
    found = {}
    for entry in resources.files("nestor.configs").iterdir():
        if entry.name.endswith(".toml"):
            first = entry.read_text(encoding="utf-8").splitlines()[0]
            found[entry.name.removesuffix(".toml")] = first.lstrip("# ").strip()
    return dict(sorted(found.items()))


def find_config(name: str | Path) -> Path:
    """Path of a configuration file, or of a shipped one by its name."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = Path(str(resources.files("nestor.configs"))) / f"{name}.toml"
    if shipped.is_file():
        return shipped
    names = shipped_configs()
    hint = suggest(str(name), names) or "`nestor train --list` shows the shipped ones."
    raise ConfigError(f"{name!r} is neither a TOML file nor the name of a shipped configuration. {hint}")


def check(config: TrainConfig) -> None:
    """Refuse what cannot work, before anything is built.

    Raises:
        ConfigError: names the setting, its value, and what it must be.
    """
    data, optimizer, schedule, run = config.data, config.optimizer, config.schedule, config.run
    _require(bool(config.name) and "/" not in config.name, "name", config.name, "a word without slashes")
    for key, value, least in (
        ("data.sequence_length", data.sequence_length, 1),
        ("data.batch_size", data.batch_size, 1),
        ("run.accumulation", run.accumulation, 1),
        ("run.keep_last", run.keep_last, 1),
        ("run.log_every", run.log_every, 1),
        ("run.eval_batches", run.eval_batches, 1),
        ("run.prefetch", run.prefetch, 0),
        ("run.data_workers", run.data_workers, 0),
        ("run.eval_every", run.eval_every, 0),
        ("run.save_every", run.save_every, 0),
        ("run.steps", run.steps, 0),
        ("run.tokens", run.tokens, 0),
        ("run.seed", run.seed, 0),
        ("optimizer.weight_decay", optimizer.weight_decay, 0),
        ("optimizer.clip", optimizer.clip, 0),
        ("optimizer.muon_lr", optimizer.muon_lr, 0),
        ("optimizer.m3_slow_period", optimizer.m3_slow_period, 1),
        ("optimizer.m3_slow_weight", optimizer.m3_slow_weight, 0),
        ("schedule.warmup", schedule.warmup, 0),
    ):
        _require(value >= least, key, value, f"at least {least}")
    _require(optimizer.lr > 0, "optimizer.lr", optimizer.lr, "above 0")
    _require(optimizer.eps > 0, "optimizer.eps", optimizer.eps, "above 0")
    for i, beta in enumerate(optimizer.betas):
        _require(0 <= beta < 1, f"optimizer.betas.{i}", beta, "at least 0 and below 1")
    for i, steps in enumerate(optimizer.block_steps):
        _require(steps >= 1, f"optimizer.block_steps.{i}", steps, "at least 1")
    for key in ("muon_momentum", "m3_slow_momentum"):
        _require(0 <= getattr(optimizer, key) < 1, f"optimizer.{key}", getattr(optimizer, key), "in [0, 1)")
    _require(0 < schedule.decay <= 1, "schedule.decay", schedule.decay, "above 0 and at most 1")
    _require(0 <= schedule.final <= 1, "schedule.final", schedule.final, "between 0 and 1")
    _require(0 <= run.fresh_share <= 1, "run.fresh_share", run.fresh_share, "between 0 and 1")
    _require(run.noise >= 0, "run.noise", run.noise, "at least 0")
    _require(0 < data.valid_fraction < 1, "data.valid_fraction", data.valid_fraction, "between 0 and 1")
    _require(bool(data.sources), "data.sources", list(data.sources), "at least one source")
    for source in (*data.sources, *data.valid):
        _check_source(source, data)
    if (run.steps > 0) == (run.tokens > 0):
        raise ConfigError(
            f"run.steps is {run.steps} and run.tokens is {run.tokens}; give exactly one of them, the length "
            "of the run"
        )
    if data.batch_size % run.accumulation:
        raise ConfigError(
            f"data.batch_size is {data.batch_size}, which run.accumulation {run.accumulation} does not "
            "divide; make the lanes a multiple of the micro-batches"
        )
    if run.state_mode == "pass" and data.batch_size // run.accumulation < 2:
        raise ConfigError(
            "run.state_mode 'pass' hands a State to another lane, so each micro-batch needs at least 2; "
            f"data.batch_size is {data.batch_size} in {run.accumulation} parts"
        )


def _check_source(source: SourceConfig, data: DataConfig) -> None:
    _require(source.weight > 0, "the weight of a source", source.weight, "above 0")
    if not source.task and not source.text:
        raise ConfigError(
            "a source of data.sources names neither text nor task; give one, such as text = 'book.txt'"
        )
    if source.task and source.task not in TASKS:
        raise ConfigError(
            f"a source has task {source.task!r}; there are {', '.join(TASKS)}. {suggest(source.task, TASKS)}"
        )
    if source.task == "recall" and not source.text and not any(s.text for s in data.sources if not s.task):
        raise ConfigError("the recall task plants facts in text, and no source names any; give it `text`")


def _require(good: bool, key: str, value: Any, wanted: str) -> None:
    if not good:
        raise ConfigError(f"{key} is {value!r}; it must be {wanted}")


def _as_sources(value: Any) -> list[Any]:
    items = value if isinstance(value, (list, tuple)) else [value]
    return [{"text": [item]} if isinstance(item, str) else item for item in items]
