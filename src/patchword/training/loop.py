"""The one training loop."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from patchword.spec.batch import Batch, Evaluator, Forward
from patchword.spec.parse import Interrupted, PatchwordError
from patchword.spec.settled import Settled
from patchword.training.checkpoint import Checkpoints, damage
from patchword.training.clock import Clock
from patchword.training.criterion import TOP1, Criterion
from patchword.training.log import Lines, LiveLine, duration, write_csv
from patchword.training.optim import learning_rate
from patchword.training.signals import watch_signals
from patchword.training.trainer import FILES, HeadValues, Trainer

logger = logging.getLogger("patchword")


class TrainingError(PatchwordError):
    """The run stopped because it had to; the message says at which step and what is saved."""


class Diverged(TrainingError):
    """The loss or the gradient norm was not finite."""


def due(step: int, every: int, total: int) -> bool:
    """Whether something done every `every` steps, and at the end, is done after `step` updates."""
    return step == total or (step > 0 and step % every == 0)


class Feed(Protocol):
    """Where the batches come from: those of the positions from `start` to `stop`."""

    def __call__(self, start: int, stop: int) -> Generator[Batch, None, None]: ...


Prepare = Callable[[Batch, int], "tuple[Tensor, Tensor]"]
"""A batch and its position to augmented, normalised images on the device, and targets."""


def name_bad(index: int, reason: str, locate: Callable[[int], str], named: set[int]) -> None:
    """Log an unreadable image, but for those `named`, to which it is added."""
    if index not in named:
        named.add(index)
        logger.warning("skipped an unreadable image: %s: %s", locate(index), reason)


class _CutShort(Exception):
    """A signal came during an evaluation."""


@dataclass(kw_only=True)
class Loop:
    """A trainer, its data and evaluators, and the folder that a run writes to."""

    trainer: Trainer
    feed: Feed
    prepare: Prepare
    evaluators: dict[str, Evaluator]
    """by split; the one named `val` chooses the best weights"""
    checkpoints: Checkpoints
    metrics: Lines
    evaluations: Lines
    live: LiveLine
    steps_per_epoch: float
    locate: Callable[[int], str]
    """where the image at a position of the source is"""
    named: set[int] = field(default_factory=set)
    """positions of the unreadable images that the log has named, shared with the evaluators"""
    criterion: Criterion = TOP1
    """what the best weights are chosen by"""
    extra_log: Callable[[dict[str, Any]], None] = lambda line: None
    ready_head: HeadValues | None = None
    """a head for the frozen body, measured as step 0 and kept if training does not better it"""
    signals: list[int] = field(default_factory=list)
    """those received while training"""
    saved: int = field(init=False)
    """step of the newest checkpoint"""

    def fit(self) -> None:
        """Train to the last step, from wherever the trainer is.

        Raises `Interrupted` after SIGTERM or SIGINT, and `TrainingError` on a loss that is not
        finite or a checkpoint that cannot be written, as the request's policies say.
        """
        total = self.settled.steps
        with watch_signals(self.signals), self.live:
            self.saved = self.trainer.progress.step
            self.check_best()
            self.evaluate_if_missed()
            if self.saved == 0 and (total == 0 or self.settled.request.on_nan == "rollback"):
                self.save()
            while self.trainer.progress.step < total:
                progress = self.trainer.progress
                stop = progress.position + total - progress.step
                with closing(self.feed(progress.position, stop)) as batches:
                    self.follow(batches)
        if self.saved != total:
            raise TrainingError(
                f"trained to step {total}, which could not be saved; {self.last_good()}; "
                "free some space and run the same command"
            )

    @property
    def settled(self) -> Settled:
        """The settings of the run."""
        return self.trainer.settled

    def follow(self, batches: Generator[Batch, None, None]) -> None:
        """Train on batches, to their end or to the first whose update is not finite."""
        settled, progress = self.settled, self.trainer.progress
        clock, total = Clock(progress), settled.steps
        for batch in clock.waiting(batches):
            rate = learning_rate(progress.step, total, settled.optim)
            self.note_bad(batch)
            loss, norm = self.trainer.step(*self.prepare(batch, progress.position), rate)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.fail_or_roll_back(loss, norm)
                return
            progress.count(loss)
            clock.count(len(batch.labels))
            self.show(clock, rate, norm)
            if due(progress.step, settled.eval_every, total):
                with clock.paused():
                    self.evaluate()
            if due(progress.step, settled.checkpoint_every, total) or self.signals:
                with clock.paused():
                    self.save()
            self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Raise `Interrupted` after a signal."""
        if self.signals:
            step = self.trainer.progress.step
            if self.saved != step:
                logger.warning("the last checkpoint is that of step %d", self.saved)
            name = signal.Signals(self.signals[0]).name
            raise Interrupted(f"stopped by {name} after step {step}", self.signals[0])

    def note_bad(self, batch: Batch) -> None:
        """Keep count of unreadable images, and name each once."""
        for index, reason in batch.bad:
            if str(index) not in self.trainer.progress.bad:
                self.trainer.progress.bad[str(index)] = reason
                name_bad(index, reason, self.locate, self.named)

    def show(self, clock: Clock, rate: float, norm: float) -> None:
        """Move the live line; at log points, write a line of metrics."""
        progress, total = self.trainer.progress, self.settled.steps
        loss = progress.loss_sum / progress.loss_count
        left = (total - progress.step) * clock.seconds_per_step()
        epoch = progress.position / self.steps_per_epoch
        self.live.show(
            f"step {progress.step}/{total}  epoch {epoch:.2f}  loss {loss:.4f}  "
            f"lr {rate:.2e}  {clock.images_per_second():.0f} images/s  "
            f"data wait {clock.wait_share():.0%}  {duration(left)} left",
            last=progress.step == total,
        )
        if due(progress.step, self.settled.log_every, total):
            line = {
                "step": progress.step,
                "epoch": round(epoch, 4),
                "images": progress.step * self.settled.request.batch_size,
                "lr": rate,
                "loss": loss,
                "grad_norm": norm,
                "images_per_s": round(clock.images_per_second(), 1),
                "data_wait": round(clock.wait_share(), 4),
                "time": round(progress.seconds, 2),
            }
            progress.loss_sum, progress.loss_count = 0.0, 0
            clock.restart_window()
            self.append(self.metrics, line)
            self.extra_log(line)

    def evaluate(self) -> None:
        """Measure the raw and the averaged weights; keep the best on the val part.

        A signal cuts it short without a trace; the resumed run makes up for it.
        """
        trainer, progress = self.trainer, self.trainer.progress
        lines: list[dict[str, Any]] = []
        val: dict[str, dict[str, Any]] = {}
        for weights, network in trainer.networks.items():
            for split, evaluator in self.evaluators.items():
                started = time.monotonic()
                try:
                    result = evaluator(self.stoppable(network.eval()))
                except _CutShort:
                    return
                line = {"step": progress.step, "split": split, "weights": weights} | result
                lines.append(line | {"time": round(time.monotonic() - started, 2)})
                if split == "val":
                    val[weights] = result
        for line in lines:
            self.append(self.evaluations, line)
            self.extra_log(line)
        progress.evaluated = progress.step
        if val:
            self.keep_best(val)

    def stoppable(self, network: nn.Module) -> Forward:
        """The network, for an evaluation that a signal ends."""

        def forward(images: Tensor, *draws: Tensor) -> Tensor:
            if self.signals:
                raise _CutShort
            return network(images, *draws)

        return forward

    def evaluate_if_missed(self) -> None:
        """Measure the ready head before the first step, and make up for an evaluation that a signal
        cut short before the checkpoint was saved."""
        progress = self.trainer.progress
        wanted = due(progress.step, self.settled.eval_every, self.settled.steps)
        wanted |= progress.step == 0 and self.ready_head is not None
        if wanted and progress.evaluated < progress.step:
            with self.trainer.wearing(self.ready_head if progress.step == 0 else None):
                self.evaluate()
            self.stop_if_asked()

    def keep_best(self, val: dict[str, dict[str, Any]]) -> None:
        """Write weights just measured as `best`, the average first, if they are as good as any were
        before, and no worse than the head that the run began with.

        As good is what lies within a standard error of the best: such a difference says nothing,
        the best of many noisy figures is lucky, and weights from the end of the schedule are the
        better bet.
        """
        trainer, progress, by = self.trainer, self.trainer.progress, self.criterion
        values = {weights: by.value(val[weights]) for weights in reversed(val)}
        seen = [value for value in (*values.values(), progress.top) if value is not None]
        progress.top = by.top(seen)
        if progress.step == 0:
            progress.ready = progress.top
        for weights, value in values.items():
            bars = (by.bar(progress.top, val[weights]), progress.ready)
            if not all(bar is None or by.holds(value, bar) for bar in bars):
                continue
            write = partial(trainer.write_weights, weights=weights, names=FILES["raw"])
            if self.guard(lambda write=write: self.checkpoints.save_best(progress.position, write)):
                progress.best, progress.best_weights = value, weights
                progress.best_step, progress.best_position = progress.step, progress.position
            break
        if progress.best is not None:
            logger.info(
                "step %d: %s on val %s; kept %s (step %d, %s weights)",
                progress.step,
                by.name,
                by.shown(by.top(values.values())),
                by.shown(progress.best),
                progress.best_step,
                progress.best_weights,
            )

    def check_best(self) -> None:
        """After a resume: forget the best weights if they are damaged, or were replaced by those
        of a later step that is yet to be trained again."""
        progress = self.trainer.progress
        if progress.best is None:
            return
        problem = damage(self.checkpoints.best_folder(progress.best_position))
        if problem is not None:
            logger.warning(
                "the best weights, of step %d, are no longer there (%s); choosing among those to "
                "come",
                progress.best_step,
                problem,
            )
            self.checkpoints.forget_best()
            progress.best, progress.best_step = None, 0
            progress.top = progress.ready = None

    def save(self) -> None:
        """Write a checkpoint."""
        progress = self.trainer.progress
        for lines in (self.metrics, self.evaluations):
            self.guard(lines.flush)
        self.guard(partial(write_csv, self.metrics.path))
        self.guard(lambda: self.checkpoints.save(progress.step, self.trainer.write))
        newest = self.checkpoints.steps()[:1]
        self.saved = int(newest[0].name.removeprefix("step-")) if newest else 0

    def append(self, lines: Lines, line: dict[str, Any]) -> None:
        """Write a line of a log."""
        self.guard(lambda: lines.append(line))

    def guard(self, write: Callable[[], Any]) -> bool:
        """Write to the disk; a failure is reported, and fatal if the spec says so."""
        try:
            write()
            return True
        except OSError as error:
            step = self.trainer.progress.step
            message = f"cannot save at step {step}: {error.strerror or error}; {self.last_good()}"
            if self.settled.request.on_save_error == "stop":
                raise TrainingError(
                    f"{message}; free some space and run the same command"
                ) from error
            logger.error("%s; going on", message)
            return False

    def last_good(self) -> str:
        """Names the newest checkpoint."""
        newest = self.checkpoints.steps()[:1]
        return f"last good checkpoint: {newest[0]}" if newest else "there is no checkpoint yet"

    def fail_or_roll_back(self, loss: float, norm: float) -> None:
        """The update was not applied: stop, or go back and pass over the batches up to here."""
        progress = self.trainer.progress
        message = (
            f"loss {loss}, gradient norm {norm} at step {progress.step + 1}: update not applied; "
            f"{self.last_good()}"
        )
        if self.settled.request.on_nan == "stop":
            raise Diverged(f"{message}; try a lower --lr, or --on-nan rollback")
        if progress.rollbacks >= 10:
            raise Diverged(f"{message}; that was rollback {progress.rollbacks}, giving up")
        newest = self.checkpoints.newest()
        if newest is None:
            raise TrainingError(f"{message}; nothing to roll back to")
        logger.warning("%s; rolling back, passing over these batches", message)
        self.trainer.read(*newest)
        back = self.trainer.progress
        self.metrics = Lines(self.metrics.path, back.step)
        self.evaluations = Lines(self.evaluations.path, back.evaluated)
        self.trainer.progress = replace(
            progress,
            step=back.step,
            position=progress.position + 1,
            loss_sum=back.loss_sum,
            loss_count=back.loss_count,
            evaluated=back.evaluated,
            rollbacks=progress.rollbacks + 1,
        )
        self.saved = back.step
        self.evaluate_if_missed()
