"""`patchword train --sweep` and `--runs`: the protocol of table 4, and repeated runs."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from patchword.data.registry import open_source
from patchword.data.sources import Source
from patchword.data.splits import Division, hold_out
from patchword.run import folder as runs
from patchword.run.reporting import report_run
from patchword.run.settle import assumed
from patchword.run.train import TrainResult, train_in
from patchword.session.session import Session
from patchword.spec.parse import PatchwordError, UsageError
from patchword.spec.train import TrainSpec
from patchword.training.checkpoint import link, replace_text
from patchword.training.log import read_lines
from patchword.training.loop import Diverged
from patchword.training.recipes import find_recipe, recipe_spec
from patchword.weights.load import load_model

AROUND = (0.1, 0.3, 1.0, 3.0)
"""Learning rates to try where the recipe names none, as shares of its own: table 4's steps."""


@dataclass(kw_only=True)
class SweepResult:
    """What a sweep, or the same run with several seeds, has found so far."""

    folder: Path
    rates: dict[str, dict[str, float] | None]
    """learning rate -> `top1` and `loss` on the held-out images, None if the loss was not finite;
    empty without a sweep"""
    chosen: float | None = None
    """the learning rate of the final runs"""
    split: str = "test"
    """what the final runs were measured on"""
    runs: list[dict[str, Any]]
    """of each final run: `run` (its folder), `seed`, `top1`, `loss`"""

    @property
    def mean(self) -> float | None:
        """Of the final runs' top-1, in [0, 1]; None before there is one."""
        return statistics.fmean(run["top1"] for run in self.runs) if self.runs else None

    @property
    def std(self) -> float | None:
        """Standard deviation (n - 1) of the final runs' top-1; None with fewer than two."""
        return statistics.stdev(run["top1"] for run in self.runs) if len(self.runs) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """`sweep.json`, and what `--json` prints."""
        return {
            "rates": self.rates,
            "chosen": self.chosen,
            "split": self.split,
            "runs": self.runs,
            "mean": self.mean,
            "std": self.std,
        }


def sweep(
    spec: TrainSpec,
    *,
    choose: bool = True,
    repeats: int = 1,
    out: str | Path | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> SweepResult:
    """Choose the learning rate on held-out images and train with it on all of train (table 4);
    without `choose` only repeat the run. The same call on the same directory resumes.

    The rates are `spec.optim.rates`, else the recipe's, else four around the learning rate. One run
    with each goes to `out/sweep/lr-RATE`: it does not see the test part, is measured after its
    last step on the images it held out, and keeps no weights. Then `repeats` runs with seeds
    `spec.seed`, `spec.seed + 1`, ... go to `out/run-0`, `out/run-1`, ...: after a sweep on all of
    train, with the weights of the last step; without one as `train` does them, and with the length
    that `time` gave the first. All share one test part. Raises what `train` does, and `UsageError`
    if there is nothing to choose on or to measure.
    """
    console = console or Console(stderr=True, markup=False, emoji=False)
    if repeats < 1:
        raise UsageError(f"--runs is {repeats}; use 1 or more")
    if spec.self_supervised:
        raise UsageError(
            f"--sweep and --runs compare accuracies, which --objective {spec.objective} has none "
            "of; give each run its --lr and --out"
        )
    source = open_source(spec.source)
    kind = "sweep" if choose else "runs"
    folder = Path(out) if out is not None else Path(f"{runs.default_run(source, spec)}-{kind}")
    if choose:
        spec = replace(spec, optim=replace(spec.optim, rates=rates_of(spec)))
        development, final = _divisions(source, spec)
    else:
        development = final = runs.open_division(None, source, spec)
    with runs.locked(folder):
        _start(folder, spec, source, final, overwrite)
        each = _at_one_size(spec, final) if choose else spec
        job = _Sweep(folder, each, source, repeats, console)
        if choose:
            job.train_on_all(final, job.try_rates(development))
        else:
            job.repeat()
        return job.finish(" --sweep" if choose else "")


def rates_of(spec: TrainSpec) -> tuple[float, ...]:
    """The learning rates to sweep, rising: the user's, else the recipe's if its learning rate was
    not changed, else `AROUND` the learning rate."""
    rates, rate = spec.optim.rates, spec.optim.lr
    if not rates and spec.recipe and recipe_spec(spec.recipe, "").optim.lr == rate:
        rates = find_recipe(spec.recipe).rates
    return tuple(sorted(set(rates or (float(f"{share * rate:.3g}") for share in AROUND))))


def _divisions(source: Source, spec: TrainSpec) -> tuple[Division, Division]:
    """The division of the sweep's runs, without a test part, and that of the final runs, without a
    val part.

    What an ordinary run would hold out to choose its weights chooses the learning rate, and then
    goes back into train. Of data with train and val alone, as ImageNet comes, val is the test.
    """
    if spec.time is not None:
        raise UsageError(
            "--time does not go with --sweep, whose runs are equally long; use --steps or --epochs"
        )
    ordinary, nothing = runs.open_division(None, source, spec), np.zeros(0, np.int64)
    train, val, test = ordinary["train"], ordinary["val"], ordinary["test"]
    if set(source.parts) == {"train", "val"}:
        test = val
        train, (val,) = hold_out(source.labels, train, [spec.data.val_fraction], spec.seed)
    if not len(val):
        raise UsageError("--sweep has no images to choose on; give --val-fraction 0.1")
    if not len(test):
        raise UsageError(
            "--sweep has no images to measure the final runs on; give --test-fraction 0.1"
        )
    everything = np.sort(np.concatenate([train, val]))
    development = {"train": train, "val": val, "test": nothing}
    return development, {"train": everything, "val": nothing, "test": test}


def _start(
    folder: Path, request: TrainSpec, source: Source, division: Division, overwrite: bool
) -> None:
    """Record what is asked for in the directory of the whole. Raises `UsageError` if it differs
    from what is there."""
    stored = None if overwrite else runs.stored_config(folder)
    if stored is None:
        assumed(request, division)  # raises what a run would
        runs.check_init_outlives(folder, request)
        runs.clear(folder)
        runs.store(folder, request, None, source, division)
    elif (folder / "checkpoints").exists():
        raise UsageError(f"{folder} holds a single run; give another --out, or --overwrite")
    else:
        runs.open_division(folder, source, request)
        runs.check_same(folder, request, stored)


def _at_one_size(spec: TrainSpec, division: Division) -> TrainSpec:
    """The spec at the resolution of its weights, where a run by itself would compare another: the
    final runs have no val part to do so on, and the rate is chosen for theirs."""
    if not spec.may_enlarge:
        return spec
    return replace(spec, image_size=assumed(spec, division).image_size)


class _Sweep:
    """The runs of one directory; every finished one is recorded in `sweep.json`."""

    def __init__(
        self, folder: Path, spec: TrainSpec, source: Source, repeats: int, console: Console
    ) -> None:
        self.folder = folder
        self.spec = spec
        self.source = source
        self.repeats = repeats
        self.console = console
        stored = _read(folder / runs.SWEEP)
        self.found = SweepResult(folder=folder, rates=stored.get("rates", {}), runs=[])
        self.first: TrainResult | None = None
        self.before = 0
        """runs that come before the final ones"""

    def try_rates(self, division: Division) -> float:
        """One run with each learning rate; the best of them, of equals that with the lower loss.
        One rate leaves nothing to try."""
        rates = self.spec.optim.rates
        self.before = len(rates) if len(rates) > 1 else 0
        for number, rate in enumerate(rates[: self.before], 1):
            run = self.folder / "sweep" / f"lr-{rate}"
            if str(rate) not in self.found.rates:
                self.say(number, f"learning rate {rate:g}, measured on held-out images")
                self.found.rates[str(rate)] = self.try_rate(run, rate, division)
                self.record()
            for name in ("checkpoints", "best", "last"):  # only the figures are needed
                _remove(run / name)
        return self.choose()

    def try_rate(self, run: Path, rate: float, division: Division) -> dict[str, float] | None:
        """Top-1 and loss on the held-out images after the last step, of the weights that a final
        run would keep."""
        spec = _with_rate(replace(self.spec, keep=1), rate)
        found = assumed(spec, division)
        last, often = max(1, found.steps), max(1, math.ceil(found.steps / 10))
        every = self.spec.checkpoint_every or often
        spec = replace(spec, eval_every=last, checkpoint_every=every)
        try:
            self.train(run, spec, division)
        except Diverged as error:
            self.console.print(f"learning rate {rate:g}: {error}", highlight=False, soft_wrap=True)
            return None
        weights = "average" if spec.optim.average else "raw"
        lines = [ln for ln in read_lines(run / "evaluations.jsonl") if ln["weights"] == weights]
        return {"top1": lines[-1]["top1"], "loss": lines[-1]["loss"]}

    def choose(self) -> float:
        """The best learning rate. Raises `PatchwordError` if the loss was finite with none."""
        rates = self.spec.optim.rates
        if not self.before:
            return rates[0]
        done = {rate: row for rate in rates if (row := self.found.rates[str(rate)])}
        if not done:
            raise PatchwordError("the loss was finite with none of the rates; give lower --rates")
        best = max(done, key=lambda rate: (done[rate]["top1"], -done[rate]["loss"]))
        self.console.print(
            f"learning rate {best:g}: top-1 {done[best]['top1']:.2%} on held-out images",
            highlight=False,
        )
        for edge, what in ((rates[0], "lowest"), (rates[-1], "highest")):
            if best == edge:
                hint = f"it is the {what} of those tried; --rates takes others"
                self.console.print(hint, highlight=False)
        return best

    def train_on_all(self, division: Division, rate: float) -> None:
        """The final runs: nothing is held out, so the last weights are kept."""
        self.found.chosen = rate
        spec = replace(self.spec, data=replace(self.spec.data, val_fraction=0.0))
        spec = _with_rate(spec, rate)
        for k in range(self.repeats):
            seeded = replace(spec, seed=spec.seed + k)
            self.add(k, seeded, division, f"learning rate {rate:g} on all of train")

    def repeat(self) -> None:
        """The first run as `train` does it, the others with what it settled on and other seeds."""
        self.add(0, self.spec, None, "as asked")
        run = self.folder / "run-0"
        stored = runs.stored_config(run)
        settled = stored.settled if stored else None
        spec = self.spec if settled is None else settled.pinned()
        self.found.chosen = spec.optim.lr
        division = runs.open_division(run, self.source, spec)
        for k in range(1, self.repeats):
            self.add(k, replace(spec, seed=spec.seed + k), division, "the same")

    def add(self, k: int, spec: TrainSpec, division: Division | None, what: str) -> None:
        """Final run `k`, unless it is finished."""
        run = self.folder / f"run-{k}"
        summary = _read(run / runs.SUMMARY)
        if not summary.get("finished"):
            self.say(self.before + k + 1, f"{what}, seed {spec.seed}")
            trained = self.train(run, spec, division)
            self.first = trained if k == 0 else self.first
            summary = trained.summary
        row = {"run": run.name, "seed": spec.seed} | {n: summary[n] for n in ("top1", "loss")}
        self.found.runs.append(row)
        self.found.split = summary["split"]
        self.record()

    def train(self, run: Path, spec: TrainSpec, division: Division | None) -> TrainResult:
        """Train in a directory of its own, on `division` or on what the request makes."""
        return train_in(
            run, spec, self.source, division, began=time.monotonic(), console=self.console
        )

    def say(self, number: int, what: str) -> None:
        """Which run begins."""
        total = self.before + self.repeats
        self.console.print(f"\nrun {number} of {total}: {what}", highlight=False, soft_wrap=True)

    def record(self) -> None:
        """Write `sweep.json`."""
        replace_text(self.folder / runs.SWEEP, json.dumps(self.found.to_dict(), indent=1))

    def finish(self, flags: str) -> SweepResult:
        """Point at the first run's weights, and write the summary and the report of the whole,
        which names `flags` in its command line."""
        first, path = self.folder / "run-0", self.folder / runs.SUMMARY
        before = _read(path)
        if before.get("finished") and before.get("sweep") == self.found.to_dict():
            text = f"{self.folder} is finished; --overwrite trains it again"
            self.console.print(text, highlight=False, soft_wrap=True)
            return self.found
        for name in ("best", "last"):
            if (first / name).exists():
                link(self.folder / name, first / name)
        summary = _read(first / runs.SUMMARY) | {"sweep": self.found.to_dict(), "finished": False}
        replace_text(path, json.dumps(summary, indent=1))
        result = self.first.result if self.first else None
        if result is None:
            session = Session(first)
            result = session.measure(self.source, session.part(self.source, self.found.split)[2])
        flags += f" --runs {self.repeats}" if self.repeats > 1 else ""
        model = load_model(self.folder)
        report_run(self.folder, model, self.source, result, self.found.split, flags)
        replace_text(path, json.dumps(summary | {"finished": True}, indent=1))
        return self.found


def _with_rate(spec: TrainSpec, rate: float) -> TrainSpec:
    """The spec with this learning rate alone."""
    return replace(spec, optim=replace(spec.optim, lr=rate, rates=()))


def _remove(path: Path) -> None:
    """Remove a folder or a link, if it is there."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _read(path: Path) -> dict[str, Any]:
    """A JSON file of ours, empty if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
