"""What a run found out beside what was asked of it, and how both are stored.

Standard library only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

from patchword.spec.model import PreprocessSpec
from patchword.spec.parse import UsageError, differences, parse, to_dict
from patchword.spec.train import LENGTHS, ModelOptions, OptimSpec, TrainSpec

DeviceName = Literal["cpu", "cuda", "mps"]
PrecisionName = Literal["float32", "bfloat16"]

GROUPS = {"mask_rate": "pretrain", "lr": "optim", "parts": "optim"}
"""Where the request has those values of `Settled` that it keeps in a group."""
ANYTHING = {"device": "auto", "precision": "auto", "workers": None}
"""What leaves these settings to the run, whatever it was started with."""

RESOLVED = {"model", "image_size", "steps", "eval_every", "log_every", "pretrain.mask_rate"}
"""What earlier versions stored as found where the request had None, beside the preprocessing."""


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A run's settings with nothing left open: what was asked for, and what the run found where the
    request leaves a choice. Made once, when a run starts (`run.settle`), and stored."""

    request: TrainSpec
    model: str
    """the variant, such as ViT-S/16"""
    image_size: tuple[int, int]
    """(height, width) in pixels"""
    options: ModelOptions
    """those that the model's family has"""
    preprocess: PreprocessSpec
    device: DeviceName
    precision: PrecisionName
    """of the training step"""
    workers: int
    mask_rate: float
    """share of the patches that are hidden; 0 where labels are learned"""
    steps: int
    eval_every: int
    checkpoint_every: int
    log_every: int
    """steps between evaluations, checkpoints and log lines"""
    lr: float
    """peak learning rate"""
    parts: int
    """of a step, computed one after the other"""

    @cached_property
    def optim(self) -> OptimSpec:
        """Those of the request, at the rate and in the parts that were found."""
        return dataclasses.replace(self.request.optim, lr=self.lr, parts=self.parts)

    def values(self) -> dict[str, Any]:
        """What was found, as JSON."""
        return {name: value for name, value in to_dict(self).items() if name != "request"}

    def to_dict(self) -> dict[str, Any]:
        """`config.json`."""
        return {"request": to_dict(self.request), "settled": self.values()}

    def asked_again(self, request: TrainSpec) -> Settled:
        """The same for a request that differs only in what may change: how often checkpoints are
        written, and the number of workers, follow it if it names them. The share of hidden patches,
        which objectives read from the request, is what was found."""
        if self.mask_rate:
            pretrain = dataclasses.replace(request.pretrain, mask_rate=self.mask_rate)
            request = dataclasses.replace(request, pretrain=pretrain)
        return dataclasses.replace(
            self,
            request=request,
            workers=self.workers if request.workers is None else request.workers,
            checkpoint_every=request.checkpoint_every or self.checkpoint_every,
        )

    def pinned(self) -> TrainSpec:
        """A request that leaves nothing open: it settles to this."""
        flat = flatten(self.to_dict())
        flat["optim"] = flat["optim"] | {"rates": []}
        return parse(TrainSpec, flat | {name: None for name in LENGTHS if name != "steps"})


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """One flat object of a `config.json`: the request with what was found in its place. Files of
    of earlier versions are flat already."""
    request, settled = _object(config, "request"), _object(config, "settled")
    if request is None:
        return config
    flat = dict(request)
    for name, value in (settled or {}).items():
        group = GROUPS.get(name)
        if group is None:
            flat[name] = value
        elif name != "mask_rate" or value:
            flat[group] = (_object(flat, group) or {}) | {name: value}
    return flat


def _object(values: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The JSON object of that name, None if there is none."""
    value = values.get(name)
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


@dataclass(frozen=True)
class Stored:
    """What a `config.json` holds."""

    request: TrainSpec
    settled: Settled | None
    """None of a folder of several runs"""
    earlier: bool = False
    """of an earlier version, when only what was found was stored: it stands for the request too"""

    def conflicts(self, asked: TrainSpec) -> list[str]:
        """Dotted names of the settings that may change a result and in which what is asked for is
        neither what the run was asked for nor what it found."""
        pinned = self.request if self.settled is None else self.settled.pinned()
        found = set(differences(asked, pinned, free=False))
        return [
            name
            for name in differences(asked, self.request, free=False)
            if name in found and not self._left_open(name, asked)
        ]

    def _left_open(self, name: str, asked: TrainSpec) -> bool:
        """Whether a setting is left to the run, or asked for in other words."""
        group, _, field = name.rpartition(".")
        value = getattr(getattr(asked, group) if group else asked, field)
        if name in ANYTHING and value == ANYTHING[name]:
            return True
        if name == "image_size" and value and self.settled:  # one side, or both
            return asked.size == self.settled.image_size
        if not self.earlier:
            return False
        chosen = {"optim.lr": bool(asked.optim.rates), "optim.parts": asked.probe}
        resolved = name in RESOLVED or group == "preprocess"
        return (resolved and value is None) or chosen.get(name, False)


def read_config(config: Any) -> Stored:
    """A `config.json`, parsed. Raises `UsageError` on unknown keys and values."""
    if not isinstance(config, dict):
        raise UsageError("a config is a JSON object, as a run's config.json")
    values = cast("dict[str, Any]", config)
    if "request" in values:
        request = parse(TrainSpec, values["request"], "request")
        settled = _object(values, "settled")
        if settled is None:
            return Stored(request, None)
        found = settled | {"request": values["request"]}
        return Stored(request, parse(Settled, found, "settled"))
    request = parse(TrainSpec, renamed(values))
    if request.steps is None or request.log_every is None:  # not of one run, or written by hand
        return Stored(request, None, earlier=True)
    flat = to_dict(request)
    found = {f.name: flat[f.name] for f in dataclasses.fields(Settled) if f.name in flat}
    found |= {name: flat[group][name] for name, group in GROUPS.items()}
    found["mask_rate"] = found["mask_rate"] or 0.0
    found["image_size"] = list(request.size)
    return Stored(request, parse(Settled, found | {"request": flat}), earlier=True)


def renamed(values: dict[str, Any]) -> dict[str, Any]:
    """A flat config with today's name of the parts of a step."""
    optim = _object(values, "optim")
    if optim is None or "accumulate" not in optim:
        return values
    rest = {name: value for name, value in optim.items() if name != "accumulate"}
    return values | {"optim": rest | {"parts": optim["accumulate"]}}
