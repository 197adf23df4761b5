"""What may be written after the commands that look at images with a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from patchword.cli.arguments import Data, Json, sides
from patchword.spec.parse import UsageError, at_least
from patchword.spec.train import Device, Precision


@dataclass(frozen=True, kw_only=True)
class _LoadArguments:
    """How a command loads a model, and feeds it with images."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """a run directory, a weight file or folder of any format, hub:ORG/NAME, or a name that
    `patchword models --pretrained` lists"""
    image_size: tuple[int, ...] | None = None
    """one side, or height and width, in pixels; by default the model's"""
    batch_size: int | None = None
    """images at a time; changes speed and memory only"""
    device: Device = "auto"
    workers: int | None = None
    """processes that read images; by default one per core, none for a few images"""
    trust_pickle: bool = False
    """read MODEL even if it is a pickle (.pth): for files whose source you trust"""
    classes: str | None = None
    """names of MODEL's classes, if it has none or others: imagenet (ImageNet-1k), or a file: a JSON
    list (a run's classes.json), a JSON object from index to name, or a name a line"""
    json: Json = False

    def settings(self) -> dict[str, Any]:
        """What the function of this command takes. Raises `UsageError` on numbers out of range."""
        at_least("--batch-size", self.batch_size, 1)
        at_least("--workers", self.workers, 0)
        values = vars(self) | {"image_size": sides(self.image_size)}
        return {name: value for name, value in values.items() if name not in ("json", "csv")}


@dataclass(frozen=True, kw_only=True)
class _ModelArguments(_LoadArguments):
    """How a command runs a model."""

    precision: Precision = "float32"


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments(_ModelArguments):
    """Measure a model: accuracy, loss, calibration, recall and precision per class."""

    data: Data
    split: str | None = None
    """train, val, test or all; by default test, else val, else what the run held out, else all"""
    probe: tyro.conf.UseAppendAction[tuple[Literal["fewshot", "knn", "logistic"], ...]] = ()
    """instead, measure what the model's features are worth: fewshot, knn or logistic, fitted to the
    train part without training the model; several, if given several times"""
    layer: Literal["pre-logits", "pooled"] | None = None
    """with --probe: probe after the hidden layer of the model's head, if it has one, or before"""
    on_bad_image: Literal["skip", "fail"] = "skip"
    """what to do with an image that cannot be read"""

    def settings(self) -> dict[str, Any]:
        """What `evaluate` takes, or with --probe `measure_probes`."""
        values = super().settings()
        probes, layer = values.pop("probe"), values.pop("layer")
        if layer and not probes:
            raise UsageError("--layer goes with --probe: say which, fewshot, knn or logistic")
        given = {"probes": probes, "layer": layer}
        return values | {name: value for name, value in given.items() if value}


@dataclass(frozen=True, kw_only=True)
class PredictArguments(_ModelArguments):
    """Classify images."""

    images: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGES...")]
    """files, folders, patterns, or - for a list on standard input"""
    top: int = 5
    """classes to give for each image"""
    abstain: float | None = None
    """give no label to images whose top probability is below this, such as 0.9"""
    csv: bool = False
    """print comma-separated values"""

    def settings(self) -> dict[str, Any]:
        """What `predict` takes. Raises `UsageError` on what makes no sense."""
        values = super().settings()
        if self.top < 1:
            raise UsageError("--top must be 1 or more")
        if self.json and self.csv:
            raise UsageError("--json and --csv are two forms of one result; give one of them")
        if not self.images:
            raise UsageError(
                "no images given; name files, folders or a pattern, or - to read a list"
            )
        return values


@dataclass(frozen=True, kw_only=True)
class InspectArguments(_LoadArguments):
    """Draw what a model has learned and what it looks at: filters, position similarity, attention
    distance over all images; rollout, attention maps and patch tokens of the first; a map of the
    features of a data set. With summary.json, which holds the numbers."""

    images: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGES...")] = ()
    """files, folders, patterns, or - for a list on standard input; with --data alone, 128 images
    of DATA"""
    out: str
    """the folder to write to"""
    data: str | None = None
    """a labelled folder, .csv manifest, parquet, digits, or hub:ORG/NAME, whose features are
    mapped"""
    split: str | None = None
    """the part of --data: train, val, test or all; by default as in evaluate"""
    query: str | None = None
    """ROW,COL, from 0: the patch whose attention is shown, instead of the class token's"""
    pictures: int = 8
    """images to draw rollout, attention and tokens of; the averages are over all"""
    mapped: int = 2000
    """images of --data to map at most, evenly spread"""
    format: Literal["png", "pdf"] = "png"
    """pdf: vector graphics for papers"""
    overwrite: bool = False
    """replace the figures that are in --out"""

    def settings(self) -> dict[str, Any]:
        """What the command takes. Raises `UsageError` on what makes no sense."""
        values = super().settings()
        if not self.images and self.data is None:
            raise UsageError("no images given; name files, folders or a pattern, or --data DATA")
        if self.split is not None and self.data is None:
            raise UsageError("--split names a part of --data DATA; give both")
        at_least("--pictures", self.pictures, 0)
        at_least("--mapped", self.mapped, 1)
        return values | {"query": _patch(self.query)}


@dataclass(frozen=True, kw_only=True)
class ExplainArguments(_LoadArguments):
    """Show why images have their class: which patches speak for it, by gradient-weighted rollout
    and by occlusion, whether both agree, and how much they are worth (deletion and insertion). One
    picture for each image."""

    images: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE...")]
    """files, folders, patterns, or - for a list on standard input"""
    label: Annotated[str | None, tyro.conf.arg(name="class", metavar="NAME")] = None
    """the class to explain; by default each image's most probable one"""
    out: str | None = None
    """the picture, .png or .pdf; for several images a folder; by default explain-IMAGE.png here"""
    window: int | None = None
    """patches a side to take away at a time for occlusion; by default 1 up to 16 x 16 patches, and
    at finer grids so many that an image needs no more than 256 passes"""
    overwrite: bool = False
    """replace pictures that exist"""

    def settings(self) -> dict[str, Any]:
        """What the command takes. Raises `UsageError` on what makes no sense."""
        if not self.images:
            raise UsageError("no images given; name files, folders or a pattern")
        at_least("--window", self.window, 1)
        return super().settings()


def _patch(text: str | None) -> tuple[int, int] | None:
    """(row, column) of what --query was given. Raises `UsageError`."""
    if text is None:
        return None
    row, comma, column = text.partition(",")
    if not comma or not row.strip().isdecimal() or not column.strip().isdecimal():
        raise UsageError(f"--query is {text!r}; give ROW,COL, such as 0,5")
    return int(row), int(column)


@dataclass(frozen=True, kw_only=True)
class CalibrateArguments(_ModelArguments):
    """Fit the temperature of a model's probabilities on validation images, and store it."""

    data: Data
    split: str = "val"
    """the part to fit on; or half/half, or 30/70: that share of the validation images (of all, if
    the data have no parts) fits, the rest reports"""
    seed: int = 0
    """of the division by --split half/half"""
    out: str | None = None
    """a .safetensors file to write the calibrated model to"""
    overwrite: bool = False
    """replace what is at --out; without --out, the best weights of the run directory MODEL, or the
    file MODEL"""
    on_bad_image: Literal["skip", "fail"] = "skip"
    """what to do with an image that cannot be read"""
