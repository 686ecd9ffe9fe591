"""Tune a model so that it learns from what it reads: initial weights and learning rates of its levels.

    python recipes/retention/meta_tune.py checkpoints/stories260K --out runs/meta --facts 4 --relations 1

Reads sessions of made-up facts with levels that update inside the graph, closes the context, reads other
text, asks, and takes the gradient of the answers' loss through the updates to where the levels began and to
the logarithms of their learning rates (arXiv 2512.24695, section 7; spec nested-learning f.5). What was
learned stays while the stream's next sessions are read. A second loss keeps old text, which the untuned model
wrote, as it was to that model, before a session and after it.

Relations, values and entities of these sessions are in no test of `nestor eval --suite retention`. Writes
into --out: model/, a folder as any other; rates.json, the learning rates and the options with which
`nestor eval` and `nestor retrofit` take them; results.json. The same command goes on where it was stopped.

With --control the same weights are trained for as many steps on the same sessions with their questions, as
ordinary text: what comes of it came of seeing sessions and questions.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
import tyro
from drawing import Drawer
from measuring import MOMENTS, WORDS, bits, measure
from options import Args
from rich.console import Console
from rich.progress import Progress
from tuner import Outer, Tuner

from nestor.cli.loading import load_model
from nestor.data import open_corpus, shipped_corpora
from nestor.data.tasks import FillerText
from nestor.errors import ConfigError
from nestor.evaluation.retention.arms import Arm, Rate, levels_of, rates_for, unit_steps
from nestor.evaluation.retention.old import written_by
from nestor.evaluation.retention.settings import RetentionSettings
from nestor.evaluation.subjects import Subject
from nestor.evaluation.suites import device_name, versions
from nestor.files import FileLock, write_json
from nestor.learning import Level
from nestor.models.decoder import NestorForCausalLM
from nestor.training.checkpoint import whole_folder
from nestor.training.config import ScheduleConfig
from nestor.training.schedule import lr_factor

# Seeds of old text that the suite does not draw.
_OLD_TRAINING, _OLD_HELD_OUT = 1000, 1001


class Run:
    """A model with what it is tuned on."""

    def __init__(self, args: Args) -> None:
        args.check()
        settings = args.suite()
        settings.check()
        self.args = args
        model, self.tokenizer = load_model(args.model, args.device, "float32")
        self.subject = Subject("untuned", model.requires_grad_(False), self.tokenizer)
        context = self.subject.context(args.context)
        shipped = all(name in shipped_corpora() for name in args.corpus)
        filler = FillerText(open_corpus(list(args.corpus), split="train" if shipped else "all"))
        self.drawer = Drawer(
            settings.spec(),
            filler,
            self.tokenizer,
            self.subject.prefix,
            args.periods[0],
            context,
            args.kinds,
        )
        self._check_length()
        self.levels = self._levels(settings, context)
        adaptive = [name for level in self.levels for name in level.parameters]
        names = adaptive if args.tune == "adaptive" else [name for name, _ in model.named_parameters()]
        alone = isinstance(model, NestorForCausalLM)
        together = min(args.together or args.streams, 1 if alone else args.streams)
        outer = Outer(
            args.learning_rate,
            args.rate_learning_rate,
            args.reach,
            args.caches,
            together,
            args.keep,
            args.clip,
        )
        self.tuner = Tuner(self.subject, self.levels, names, outer, control=args.control)
        self.old = self._old(args.old_passages, _OLD_TRAINING)
        self.beginnings = args.beginnings()
        self.held_out = self._old(64, _OLD_HELD_OUT)

    def _check_length(self) -> None:
        """A rate that no update is made with cannot be learned."""
        slowest = self.args.periods[-1]
        sessions = [self.drawer.draw([seed], 0).session for seed in range(8)]
        tokens = self.args.sessions * min(sum(one.shape[1] - 1 for one in parts) for parts in sessions)
        if tokens < slowest and not self.args.control:
            raise ConfigError(
                f"the sessions of a stream have {tokens} tokens, and the level of period {slowest} makes "
                f"no update; give a shorter period, more --sessions, --facts, --repeats or --filler"
            )

    def _levels(self, settings: RetentionSettings, context: int) -> list[Level]:
        args, arm = self.args, Arm("levels", "levels", self.args.periods, self.args.optimizer)
        if args.learning_rates:
            if len(args.learning_rates) != len(args.periods):
                raise ConfigError(
                    f"--learning-rates are {list(args.learning_rates)} for --periods {list(args.periods)}; "
                    f"give one for each"
                )
            rates = list(args.learning_rates)
        else:
            ids = [
                i for seed in range(8) for one in self.drawer.draw([seed], 1).session for i in one[0].tolist()
            ]
            units = unit_steps(arm, self.subject.model, ids, settings, context)
            rates = [rate.learning_rate for rate in rates_for(args.step, units)]
        given = [Rate(rate, args.largest_update) for rate in rates]
        return levels_of(arm, self.subject.model, given, settings, 0)[1]

    def _old(self, count: int, seed: int) -> torch.Tensor:
        """Passages that the untuned model writes, `[count, T]`."""
        rows = [
            [*self.subject.prefix, *ids]
            for begin in range(0, count, 64)
            for ids in written_by(
                self.subject, min(64, count - begin), self.args.old_length, seed + 10 * begin
            )
        ]
        return torch.tensor(rows, device=self.subject.model.device)

    def step(self, number: int) -> dict[str, float]:
        """A step of outer training on streams of its own."""
        args = self.args
        rng = np.random.default_rng([args.seed, number])
        first = args.seed * 10**7 + number * args.streams
        gap = int(rng.integers(args.stream(number)[1] + 1))
        streams = self.drawer.draw(range(first, first + args.streams), gap)
        chosen = rng.choice(len(self.old), args.streams, replace=len(self.old) < args.streams)
        factor = lr_factor(number, args.steps, ScheduleConfig(warmup=args.warmup))
        return self.tuner.step(
            streams.to(self.old.device), self.old[chosen][:, None], factor, fresh=number in self.beginnings
        )

    def measure(self, done: Callable[[], None]) -> dict[str, Any]:
        """Recall, and the bits of old text that was not trained on, of the model as it is now."""
        tuned = copy.deepcopy(self.subject.model)
        self.tuner.write(tuned)
        before, now = (bits(model, self.held_out) for model in (self.subject.model, tuned))
        levels = self.tuner.tuned_levels()
        recall = measure(
            tuned,
            levels,
            self.drawer,
            count=self.args.validation,
            sessions=self.args.sessions,
            gap=self.args.gap,
            done=done,
        )
        return {
            "learning_rates": self.tuner.rates(),
            "recall": recall,
            "old_bits_per_token": {"before": before, "now": now, "rise": now / before - 1},
        }

    def write(self) -> None:
        """The model's folder and the learning rates of its levels."""
        out, tuned = self.args.out, copy.deepcopy(self.subject.model)
        self.tuner.write(tuned)
        with whole_folder(out / "model", out / ".model.tmp") as folder:
            tuned.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        if not self.args.control:
            write_json(out / "rates.json", rates_as_options(self.args, self.tuner.rates()))


def rates_as_options(args: Args, rates: list[float]) -> dict[str, Any]:
    """Learning rates of levels, and how commands are told of them."""
    periods, given = (" ".join(f"{x:.6g}" for x in numbers) for numbers in (args.periods, rates))
    limit, fixed = f"{args.largest_update:g}", f"{args.fixed:g}"
    return {
        "periods": list(args.periods),
        "learning_rates": rates,
        "largest_update": args.largest_update,
        "optimizer": args.optimizer,
        "fixed": args.fixed,
        "nestor eval": f"--retention.periods {periods} --retention.learning-rates {given} "
        f"--retention.largest-update {limit} --retention.optimizers {args.optimizer} "
        f"--retention.fixed {fixed}",
        "nestor retrofit": f"--periods {periods} --learning-rates {given} --largest-update {limit} "
        f"--optimizer {args.optimizer} --fixed {fixed}",
    }


def main(args: Args) -> dict[str, Any]:
    """Tune, or go on, and write what came of it. The result is what results.json holds.

    Raises:
        ConfigError: a setting, or a folder of other settings.
    """
    args.check()
    with FileLock(args.out):
        return _main(args)


def _main(args: Args) -> dict[str, Any]:
    run, saved = Run(args), args.out / "training.safetensors"
    result = _begin(args, run)
    if saved.exists():
        notes = run.tuner.load(saved)
        if notes["digest"] != args.digest:
            raise ConfigError(f"{args.out} has been tuned with other settings; name another --out")
        result = json.loads(notes["result"])
    started, before, kept = time.perf_counter(), result["seconds"], len(result["losses"])

    def keep() -> None:
        result["seconds"] = before + time.perf_counter() - started
        run.tuner.save(saved, {"digest": args.digest, "result": json.dumps(result)})

    with Progress(console=Console(stderr=True)) as bars:
        task = bars.add_task("tuning", total=args.steps, completed=len(result["losses"]))
        for number in range(len(result["losses"]), args.steps + 1):
            last = number == args.steps
            if (last or number % args.measure_every == 0) and result["measured"][-1:] != [number]:
                part = bars.add_task(
                    f"recall after {number} steps", total=len(WORDS) * args.validation * args.sessions
                )
                found = run.measure(lambda part=part: bars.advance(part))
                result["history"].append({"step": number, **found})
                result["measured"].append(number)
                bars.console.print(_line(result["history"][-1]))
            over = args.minutes is not None and time.perf_counter() - started > 60 * args.minutes
            # What streams have learned is not kept, so a run goes on where they begin anew.
            whole = number in run.beginnings
            if last or (whole and (over or number >= kept + args.save_every)):
                keep()
                kept = number
            if last or (whole and over):
                break
            result["losses"].append(run.step(number))
            bars.advance(task)
    # Of a run that was stopped too: the model as it is so far.
    run.write()
    write_json(args.out / "results.json", result)
    if number < args.steps:
        print(f"stopped after {number} steps; the same command goes on")
    print(_advice(args, run))
    return result


def _begin(args: Args, run: Run) -> dict[str, Any]:
    sizes = {name: x.numel() for name, x in run.subject.model.named_parameters()}
    return {
        "format": "nestor-meta-tune",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(run.subject.model.device),
        "versions": versions(),
        "settings": {**json.loads(json.dumps(asdict(args), default=str)), "out": None, "device": None},
        "weights": {"tuned": sum(sizes[name] for name in run.tuner.values), "all": sum(sizes.values())},
        "chance": 1 / (1 + args.distractors),
        "seconds": 0.0,
        "losses": [],
        "history": [],
        "measured": [],
    }


def _line(found: dict[str, Any]) -> str:
    parts = []
    for words in WORDS:
        shares = [found["recall"][words][moment]["recall"]["estimate"] for moment in MOMENTS]
        parts.append(f"{words} {' / '.join(f'{share:.0%}' for share in shares)}")
    rates = " ".join(f"{rate:.3g}" for rate in found["learning_rates"])
    rise = found["old_bits_per_token"]["rise"]
    return (
        f"step {found['step']}: recall of {', '.join(parts)} ({' / '.join(MOMENTS)}); old text {rise:+.1%}; "
        f"rates {rates}"
    )


def _advice(args: Args, run: Run) -> str:
    command = f"nestor eval {args.out / 'model'} --suite retention"
    if not args.control:
        command += " " + rates_as_options(args, run.tuner.rates())["nestor eval"]
    return f"{args.out / 'model'}, {args.out / 'results.json'}\n{command}"


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
