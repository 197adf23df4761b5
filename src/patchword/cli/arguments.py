"""What may be written after `patchword COMMAND`, and how it is read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import Positional

from patchword.spec.parse import UsageError, at_least, parse, to_dict
from patchword.spec.settled import read_config, renamed
from patchword.spec.train import LENGTHS, TrainSpec, with_length, without_rates
from patchword.training.recipes import base_spec, merge

T = TypeVar("T")
DATA = "a folder, a .csv manifest, parquet, digits, or hub:ORG/NAME"
Data = Annotated[Positional[str], tyro.conf.arg(metavar="DATA", help=DATA)]
Json = Annotated[bool, tyro.conf.arg(help="print the result as JSON")]


@dataclass(frozen=True, kw_only=True)
class TrainArguments(TrainSpec):
    """Train a Vision Transformer, or with --init fine-tune one. The same command resumes."""

    source: Annotated[Positional[str], tyro.conf.arg(metavar="DATA")]
    """a folder with a folder per class, a .csv manifest, parquet, digits, or hub:ORG/NAME"""
    config: str | None = None
    """a config.json to start from, such as that of another run: what was asked of it"""
    settled: bool = False
    """with --config: what that run found too, so that nothing is chosen anew"""
    out: str | None = None
    """the run directory, by default runs/DATA-MODEL"""
    overwrite: bool = False
    """delete what is in the run directory and start again"""
    sweep: bool = False
    """choose the learning rate among --rates on held-out images, then train on all of train"""
    runs: int = 1
    """how often to run, with seeds --seed, --seed + 1, ...: mean and standard deviation"""
    json: bool = False
    """print the result as JSON"""

    @property
    def spec(self) -> TrainSpec:
        """The settings of the run alone."""
        return TrainSpec(**_settings(self))


def sides(size: tuple[int, ...] | None) -> tuple[int, int] | None:
    """(height, width) of what --image-size was given. Raises `UsageError`."""
    if size is not None and (len(size) not in (1, 2) or min(size) < 1):
        raise UsageError("--image-size takes one or two numbers above 0")
    return None if size is None else (size[0], size[-1])


@dataclass(frozen=True, kw_only=True)
class CheckArguments:
    """Find what is wrong with a data set: unreadable images, copies and near copies, also between
    train and test, classes with alike names or few images, unusual images. Exit code 1 if there are
    errors."""

    data: Data
    fix: bool = False
    """move unreadable files and surplus copies of a folder to DATA.set-aside/, deleting nothing"""
    undo: bool = False
    """bring back what --fix has moved"""
    near: int = 10
    """bits of 64 that the perceptual hashes of near duplicates may differ in, 0 to 15"""
    workers: int | None = None
    """processes that read images; by default one per core, none for a few images"""
    json: Json = False

    def settings(self) -> dict[str, Any]:
        """What the command takes. Raises `UsageError` on what makes no sense."""
        at_least("--workers", self.workers, 0)
        if self.fix and self.undo:
            raise UsageError("--fix and --undo are opposites; give one of them")
        return {name: vars(self)[name] for name in ("data", "fix", "near", "workers")}


@dataclass(frozen=True, kw_only=True)
class ConvertArguments:
    """Write weights in another format; fail unless the model says the same before and after."""

    source: Annotated[Positional[str], tyro.conf.arg(metavar="IN")]
    """a run directory, a weight file or folder of any format, hub:ORG/NAME, or a name that
    `patchword models --pretrained` lists"""
    out: Annotated[Positional[str], tyro.conf.arg(metavar="OUT")]
    """the file to write (.safetensors, .npz, .pth as the format has them), or the folder"""
    format: str
    """patchword, huggingface, timm, torchvision or google-npz"""
    trust_pickle: bool = False
    """read IN even if it is a pickle (.pth): for files whose source you trust"""
    classes: str | None = None
    """names of IN's classes to store: imagenet, or a file of names, as in evaluate"""
    overwrite: bool = False
    """replace what is at OUT"""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    """Train, evaluate and inspect a small model on scikit-learn's digits, in about a minute."""

    out: str = "runs/demo"
    """the run directory"""
    seed: int = 0
    overwrite: bool = False
    """delete what is in the run directory and start again"""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class ListArguments:
    """What there is to choose from."""

    name: Annotated[Positional[str | None], tyro.conf.arg(metavar="[NAME]")] = None
    """one of them, in detail"""
    json: bool = False
    """print as JSON"""


@dataclass(frozen=True, kw_only=True)
class ModelsArguments(ListArguments):
    """The variants with parameters and cost; with a name, its layers one by one."""

    image_size: tuple[int, ...] | None = None
    """of the model in detail: one side, or height and width, in pixels; by default 224"""
    classes: int | None = None
    """of the model in detail; by default 1000"""
    pretrained: bool = False
    """list weights that --init, evaluate and predict take by name, and fetch from the hub"""

    def settings(self) -> dict[str, Any]:
        """How large the model in detail is. Raises `UsageError` on numbers out of range, and where
        there is none."""
        size, classes = sides(self.image_size), self.classes
        at_least("--classes", classes, 0)
        given = {"image_size": size, "num_classes": classes}
        values = {name: value for name, value in given.items() if value is not None}
        if values and (self.name is None or self.pretrained):
            raise UsageError("--image-size and --classes go with one variant; name it")
        return values


@dataclass(frozen=True, kw_only=True)
class DoctorArguments:
    """Devices, precision, threads, versions, free disk, and missing extras."""

    json: bool = False
    """print as JSON"""


def read(cls: type[T], words: Sequence[str], command: str, **options: Any) -> T:
    """The arguments of a command. Exits with 2 where they make no sense, with 0 after --help."""
    return tyro.cli(cls, prog=f"patchword {command}", args=list(words), **options)


@dataclass(frozen=True, kw_only=True)
class _Base:
    """The words of `patchword train` that decide what its other settings are by default."""

    config: str | None = None
    settled: bool = False
    recipe: str | None = None
    init: str | None = None
    objective: str | None = None
    out: str | None = None
    """not of use here, but no source either"""
    steps: str | None = None
    epochs: str | None = None
    images: str | None = None
    time: str | None = None
    lr: str | None = None
    rates: tuple[str, ...] | None = None


def read_train(words: Sequence[str]) -> tuple[TrainArguments, TrainSpec]:
    """The arguments of `patchword train`, and the request that they make with --config or --recipe.
    Raises `UsageError`."""
    given, rest = tyro.cli(_Base, args=list(words), return_unknown_args=True, add_help=False)
    lengths = [f"--{name}" for name in LENGTHS if getattr(given, name) is not None]
    if len(lengths) > 1:
        raise UsageError(f"{' and '.join(lengths)} both set the length of the run; give one")
    base = _base_spec(given, "digits" if "digits" in rest else "")
    default = TrainArguments(**_settings(base))
    args = read(
        TrainArguments, words, "train", default=default, config=(tyro.conf.OmitArgPrefixes,)
    )
    spec = with_length(args.spec, base)
    if given.lr is not None and given.rates is None:
        spec = without_rates(spec)
    return args, spec


def _settings(spec: TrainSpec) -> dict[str, Any]:
    return {f.name: getattr(spec, f.name) for f in dataclasses.fields(TrainSpec)}


def _base_spec(given: _Base, source: str) -> TrainSpec:
    """The settings of --config or --recipe, which the flags are laid over."""
    if given.config is not None:
        base = _config_spec(Path(given.config), given)
        return dataclasses.replace(base, source=base.source or tyro.MISSING)
    if given.settled:
        raise UsageError("--settled goes with --config FILE, whose run it repeats")
    base = base_spec(source, given.recipe, given.init, given.objective)
    return dataclasses.replace(base, source=tyro.MISSING)


def _config_spec(path: Path, given: _Base) -> TrainSpec:
    """The request of a config file, or with --settled all of it, laid over that of its recipe or of
    the one that is given."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UsageError(f"--config {path} holds no JSON object; give a run's config.json")
    if given.settled:
        settled = read_config(config).settled
        if settled is None:
            raise UsageError(
                f"--config {path} holds nothing that a run found; give the config.json of one run"
            )
        return settled.pinned()
    values = config.get("request", renamed(config))
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} holds no request; give a run's config.json")
    for name in ("source", "recipe", "init", "objective"):
        if not isinstance(values.get(name), str | None):
            raise UsageError(f"--config {path}: {name} must be a string, not {values[name]!r}")
    recipe, init = given.recipe or values.get("recipe"), given.init or values.get("init")
    base = base_spec(values.get("source") or "", recipe, init, values.get("objective"))
    length = next((name for name in LENGTHS if values.get(name) is not None), None)
    if length is not None:  # with steps, in a file of an earlier version, the length that was found
        values = values | {name: None for name in LENGTHS if name != length}
    if "request" not in config and length == "steps" and isinstance(values.get("optim"), dict):
        values = merge(values, {"optim": {"rates": []}})  # as has the rate of that run
    return parse(TrainSpec, merge(to_dict(base), values))
