"""Names and shapes of foreign weights to ours and back: one engine, one table of rules per format.

A rule says which of our tensors hold what which of theirs hold, and how; it is read in both
directions, so what a format reads it also writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patchword.spec.model import ModelSpec, PreprocessSpec
from patchword.spec.parse import PatchwordError
from patchword.weights.shapes import Shapes

Tensors = list[Tensor]


@dataclass(frozen=True)
class Op:
    """A change of shape and its inverse, from a rule's tensors to its tensors, both in order."""

    read: Callable[[Tensors], Tensors]
    """theirs to ours"""
    write: Callable[[Tensors], Tensors]
    """ours to theirs"""


def each(read: Callable[[Tensor], Tensor], write: Callable[[Tensor], Tensor]) -> Op:
    """An op on every tensor alone."""
    return Op(lambda ts: [read(t) for t in ts], lambda ts: [write(t) for t in ts])


SAME = Op(list, list)
TRANSPOSED = each(lambda t: t.t(), lambda t: t.t())
"""Flax's dense kernels are `[in, out]`, ours `[out, in]`."""


def joined(parts: int) -> Op:
    """Theirs are apart, ours one after the other along the first axis."""
    return Op(lambda ts: [torch.cat(ts)], lambda ts: list(ts[0].chunk(parts)))


JOINED = joined(3)
"""q, k and v."""


def viewed(ours: Sequence[int], theirs: Sequence[int]) -> Op:
    """The same numbers in the same order under another shape. Reading takes no other than
    theirs."""

    def read(tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) != tuple(theirs):
            raise ValueError(f"{list(tensor.shape)} is not {list(theirs)}")
        return tensor.reshape(*ours)

    return each(read, lambda t: t.reshape(*theirs))


def patches(patch: tuple[int, int], channels: int) -> Op:
    """A patch embedding stored as a convolution `[D, C, Ph, Pw]`; ours is `[D, Ph * Pw * C]`."""
    return each(
        lambda t: t.permute(0, 2, 3, 1).reshape(len(t), -1),
        lambda t: t.view(len(t), *patch, channels).permute(0, 3, 1, 2),
    )


def chain(first: Op, *others: Op) -> Op:
    """Reading applies the ops in this order, writing their inverses in the other."""
    ops = [first, *others]

    def read(tensors: Tensors) -> Tensors:
        for op in ops:
            tensors = op.read(tensors)
        return tensors

    def write(tensors: Tensors) -> Tensors:
        for op in reversed(ops):
            tensors = op.write(tensors)
        return tensors

    return Op(read, write)


@dataclass(frozen=True)
class Rule:
    """Names of ours and of theirs; `{i}` in both stands for the number of a block."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    op: Op = SAME


def rule(ours: str | tuple[str, ...], theirs: str | tuple[str, ...], op: Op = SAME) -> Rule:
    """A `Rule`; one name may be given as it is."""
    return Rule(
        (ours,) if isinstance(ours, str) else ours,
        (theirs,) if isinstance(theirs, str) else theirs,
        op,
    )


def layer(ours: str, theirs: str, op: Op = SAME) -> list[Rule]:
    """The rules of a layer's weight, through `op`, and of its bias, as it is."""
    return [rule(f"{ours}.weight", f"{theirs}.weight", op), rule(f"{ours}.bias", f"{theirs}.bias")]


def repeated(rules: Iterable[Rule], count: int) -> list[Rule]:
    """The rules with every `{i}` from 0 to `count` - 1."""

    def numbered(names: tuple[str, ...], i: int) -> tuple[str, ...]:
        return tuple(name.replace("{i}", str(i)) for name in names)

    rules = list(rules)
    return [
        Rule(numbered(r.ours, i), numbered(r.theirs, i), r.op) for i in range(count) for r in rules
    ]


def prefixed(rules: Iterable[Rule], prefix: str) -> list[Rule]:
    """The rules with `prefix` before each of their names."""
    return [Rule(r.ours, tuple(prefix + name for name in r.theirs), r.op) for r in rules]


def stacked(rules: Iterable[Rule], count: int) -> list[Rule]:
    """The rules of `count` blocks that theirs holds one after the other along a first axis of each
    tensor; `{i}` stands in our names alone."""

    def op(each_block: Op, ours: int) -> Op:
        def read(tensors: Tensors) -> Tensors:
            blocks = zip(*tensors, strict=True)
            return [value for block in blocks for value in each_block.read(list(block))]

        def write(tensors: Tensors) -> Tensors:
            starts = range(0, len(tensors), ours)
            blocks = [each_block.write(tensors[start : start + ours]) for start in starts]
            return [torch.stack(values) for values in zip(*blocks, strict=True)]

        return Op(read, write)

    return [
        Rule(
            tuple(name.replace("{i}", str(i)) for i in range(count) for name in r.ours),
            r.theirs,
            op(r.op, len(r.ours)),
        )
        for r in rules
    ]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a format made of a file's names, shapes and configuration."""

    spec: ModelSpec
    rules: list[Rule]
    preprocess: PreprocessSpec = field(default_factory=PreprocessSpec)
    classes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    """regular expressions of the names that the model does not need, such as another task's head"""
    notes: tuple[str, ...] = ()
    """what a user should know, such as what was assumed"""


@dataclass(frozen=True, kw_only=True)
class Written:
    """A model in a format's terms."""

    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    """`config.json` of a directory; empty where the format has none"""
    preprocessor: dict[str, Any] = field(default_factory=dict)
    """`preprocessor_config.json`"""


def read(
    tensor: Callable[[str], Tensor], shapes: Shapes, reading: Reading, where: str
) -> dict[str, Tensor]:
    """Our tensors from theirs; `tensor` gives one by name, `where` names the file in errors.

    Raises `PatchwordError` where tensors are missing, unexpected or misshapen for a rule; the first
    few are named, the rest counted.
    """
    expected = {name for r in reading.rules for name in r.theirs}
    leftover = [
        name
        for name in shapes
        if name not in expected and not any(re.fullmatch(p, name) for p in reading.ignored)
    ]
    problems = [f"{name} is missing" for name in sorted(expected - shapes.keys())]
    problems += [f"{name} is unexpected" for name in sorted(leftover)]
    fail_if(problems, where)
    ours: dict[str, Tensor] = {}
    for r in reading.rules:
        theirs = [tensor(name) for name in r.theirs]
        try:
            values = [value.contiguous() for value in r.op.read(theirs)]
            ours.update(zip(r.ours, values, strict=True))
        except (RuntimeError, ValueError, IndexError):
            problems += [f"{name} is {list(shapes[name])}" for name in r.theirs]
    fail_if(problems, where, "; that does not fit the rest")
    return ours


def write(tensors: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """Their tensors from ours. Raises `PatchwordError` if the rules leave one of ours out: the
    format cannot hold the model."""
    rules = list(rules)
    held = {name for r in rules for name in r.ours}
    lost = sorted(tensors.keys() - held)
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise PatchwordError(f"the format has no place for {', '.join(lost[:3])}{more}")
    theirs: dict[str, Tensor] = {}
    for r in rules:
        theirs.update(zip(r.theirs, r.op.write([tensors[name] for name in r.ours]), strict=True))
    return {name: value.detach().contiguous() for name, value in theirs.items()}


def fail_if(problems: list[str], where: str, end: str = "") -> None:
    """Raises `PatchwordError` with the first three of `problems` and the number of the others."""
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise PatchwordError(f"{where}: {', '.join(problems[:3])}{more}{end}")
