"""The two runs of a quickstart: their recipes, the models they start from, and their length.

A recipe is a training configuration. If a model trained by it is shipped (or given), the run goes on from
that model's weights; otherwise it starts from scratch. Both runs have the same number of steps and tokens.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from nestor.errors import ConfigError, FileFormatError
from nestor.files import write_json
from nestor.training.config import SourceConfig, TrainConfig, load_config

RECIPES = ("quick-transformer", "quick-titans-mag")
# Points of a training curve, and measurements on held-out text along it.
_LOGGED, _VALIDATED = 100, 8
_VALID_BATCHES = 4
# Part of the peak learning rate at which a run goes on whose recipe ends at zero.
_REST = 0.1


@dataclass(frozen=True)
class Origin:
    """The model that a run starts from, and what its training.json says of how it came to be."""

    path: str
    training: Mapping[str, Any]

    @property
    def words(self) -> str:
        """`12,000 steps (49.2 M tokens) on one H100, 2026-11-27`, as far as it is known."""
        told = self.training
        length = f"{told['steps']:,} steps ({told['tokens'] / 1e6:.1f} M tokens)"
        place = f" on {told['device']}" if told.get("device") else ""
        return length + place + (f", {str(told['date'])[:10]}" if told.get("date") else "")


@dataclass(frozen=True)
class Entrant:
    """One of the two models: its name, its recipe as given, and the configuration of its run here."""

    name: str
    recipe: str
    config: TrainConfig
    origin: Origin | None

    @property
    def final(self) -> Path:
        """Folder of the trained model."""
        return self.config.folder / "final"


def choose(
    recipes: Sequence[str], output: Path, seed: int, checkpoints: Path | None, from_scratch: bool
) -> list[Entrant]:
    """The two entrants, their runs still of the recipes' own length.

    Args:
        checkpoints: folder with a model folder for each recipe, of the recipe's name; None: the shipped ones.

    Raises:
        ConfigError: not two recipes, an unknown one, or `checkpoints` without a model for each.
    """
    if len(recipes) != 2:
        raise ConfigError(f"--recipes names {len(recipes)} configurations; the quickstart compares two")
    configs = [load_config(recipe) for recipe in recipes]
    text_of(configs[-1])
    names = [config.model.preset for config in configs]
    if names[0] == names[1]:
        names = [config.name for config in configs]
    if names[0] == names[1]:
        raise ConfigError(f"both recipes are named {names[0]!r}; give one of them another name")
    origins: list[Origin | None] = [None, None]
    if not from_scratch:
        origins = [_origin(config.name, checkpoints) for config in configs]
        if checkpoints is not None and None in origins:
            missing = checkpoints / configs[origins.index(None)].name
            raise ConfigError(f"{missing} holds no model; --checkpoints needs one for each recipe")
        if None in origins:
            # One model that was trained before and one that was not say nothing beside each other.
            origins = [None, None]
    return [
        Entrant(name, recipe, _here(config, output / name, seed, origin), origin)
        for name, recipe, config, origin in zip(names, recipes, configs, origins, strict=True)
    ]


def with_steps(entrant: Entrant, steps: int) -> Entrant:
    """The entrant with a run of `steps` steps, and what is logged, measured and saved along them."""
    every = -(-steps // _VALIDATED)
    config = with_run(
        entrant.config,
        steps=steps,
        tokens=0,
        log_every=max(1, steps // _LOGGED),
        eval_every=every,
        save_every=every,
    )
    return dataclasses.replace(entrant, config=config)


def with_run(config: TrainConfig, **settings: Any) -> TrainConfig:
    """`config` with some settings of its run replaced."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **settings))


def recall_source(config: TrainConfig) -> SourceConfig | None:
    """The first source of the recipe that plants facts."""
    return next((source for source in config.data.sources if source.task == "recall"), None)


def text_of(config: TrainConfig) -> tuple[str, ...]:
    """The corpora that the recipe reads as text, or that its facts are planted in.

    Raises:
        ConfigError: there are none.
    """
    texts = [source for source in config.data.sources if source.text]
    if not texts:
        raise ConfigError(f"{config.name} names no text, and the quickstart measures on text; add a source")
    plain = [source for source in texts if not source.task]
    return (plain or texts)[0].text


class Plan:
    """plan.json: what was asked for, and the number of steps that was found to fit. A command that is run
    again goes on with the same number."""

    def __init__(self, path: Path, request: Mapping[str, Any]) -> None:
        self.path = path
        self.request = json.loads(json.dumps(dict(request)))

    def load(self) -> dict[str, Any] | None:
        """The plan that is there, None if there is none.

        Raises:
            ConfigError: it was made for something else.
            FileFormatError: it cannot be read.
        """
        if not self.path.is_file():
            return None
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            asked = found["request"]
        except (ValueError, KeyError) as error:
            raise FileFormatError(f"{self.path} is not a plan of the quickstart; remove it") from error
        changed = [key for key, value in self.request.items() if asked.get(key) != value]
        if changed:
            listed = "; ".join(
                f"{key} was {asked.get(key)!r} and is {self.request[key]!r}" for key in changed
            )
            raise ConfigError(
                f"{self.path.parent} holds a quickstart of other settings: {listed}. Train again with "
                "--restart, or choose another folder with --output"
            )
        return found

    def save(self, steps: int, seconds_per_step: Mapping[str, float]) -> dict[str, Any]:
        """Write the plan, and return it."""
        plan = {"request": self.request, "steps": steps, "seconds_per_step": dict(seconds_per_step)}
        write_json(self.path, plan)
        return plan


def _here(config: TrainConfig, folder: Path, seed: int, origin: Origin | None) -> TrainConfig:
    """The recipe as it runs here. A run that goes on from a trained model begins at the learning rate at
    which the recipe's schedule ends: the full one would undo a part of what was learned."""
    batches = min(_VALID_BATCHES, config.run.eval_batches)
    config = with_run(config, out=str(folder), seed=seed, tracker="none", keep_last=1, eval_batches=batches)
    if origin is None:
        return config
    rest = config.schedule.final or _REST
    optimizer = dataclasses.replace(
        config.optimizer, lr=rest * config.optimizer.lr, muon_lr=rest * config.optimizer.muon_lr
    )
    model = dataclasses.replace(config.model, path=origin.path)
    return dataclasses.replace(config, model=model, optimizer=optimizer)


def _origin(name: str, checkpoints: Path | None) -> Origin | None:
    folder = (checkpoints or Path(str(resources.files("nestor"))) / "checkpoints") / name
    if not (folder / "config.json").is_file():
        return None
    path = folder / "training.json"
    try:
        training = json.loads(path.read_text(encoding="utf-8"))
        steps, tokens = int(training["steps"]), int(training["tokens"])
    except (OSError, ValueError, KeyError) as error:
        raise FileFormatError(
            f"{path} is missing or does not say how many steps and tokens the model was trained on"
        ) from error
    return Origin(str(folder), {**training, "steps": steps, "tokens": tokens})
