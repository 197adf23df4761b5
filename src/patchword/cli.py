"""The command line: one thin function per command."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Column, Table
from tyro.conf import Positional

from patchword.parsing import Interrupted, PatchwordError, UsageError, nearest, parse, to_dict
from patchword.specs import LENGTHS, Device, Precision, TrainSpec, with_length
from patchword.training.recipes import RECIPES, base_spec, find_recipe, merge

T = TypeVar("T")
err = Console(stderr=True, markup=False, emoji=False)  # names are shown as they are
out = Console(markup=False, emoji=False)


@dataclass(frozen=True, kw_only=True)
class TrainArguments(TrainSpec):
    """Train a Vision Transformer, or with --init fine-tune one. The same command resumes."""

    source: Annotated[Positional[str], tyro.conf.arg(metavar="DATA")]
    """a folder with a folder per class, a .csv manifest, parquet, digits, or hub:ORG/NAME"""
    config: str | None = None
    """a config.json to start from, such as that of another run"""
    out: str | None = None
    """the run directory, by default runs/DATA-MODEL"""
    overwrite: bool = False
    """delete what is in the run directory and start again"""
    json: bool = False
    """print the result as JSON"""


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Measure a model: accuracy, loss, calibration, recall and precision per class."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """a run directory or a .safetensors file"""
    data: Annotated[Positional[str], tyro.conf.arg(metavar="DATA")]
    """a folder, a .csv manifest, parquet, digits, or hub:ORG/NAME"""
    split: str | None = None
    """train, val, test or all; by default test, else val, else what the run held out, else all"""
    image_size: tuple[int, ...] | None = None
    """one side, or height and width, in pixels; by default the model's"""
    batch_size: int | None = None
    device: Device = "auto"
    precision: Precision = "float32"
    workers: int | None = None
    on_bad_image: Literal["skip", "fail"] = "skip"
    json: bool = False
    """print the result as JSON"""


@dataclass(frozen=True, kw_only=True)
class PredictArguments:
    """Classify images."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """a run directory or a .safetensors file"""
    images: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGES...")]
    """files, folders, patterns, or - for a list on standard input"""
    top: int = 5
    """classes to give for each image"""
    image_size: tuple[int, ...] | None = None
    """one side, or height and width, in pixels; by default the model's"""
    batch_size: int | None = None
    device: Device = "auto"
    precision: Precision = "float32"
    workers: int | None = None
    json: bool = False
    """print a JSON list of {path, label, probability, top}"""
    csv: bool = False
    """print comma-separated values"""


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    """Train, evaluate and inspect a small model on scikit-learn's digits, in about a minute."""

    out: str = "runs/demo"
    """the run directory"""
    seed: int = 0
    overwrite: bool = False
    """delete what is in the run directory and start again"""
    json: bool = False
    """print the result as JSON"""


@dataclass(frozen=True, kw_only=True)
class ListArguments:
    """What there is to choose from."""

    name: Annotated[Positional[str | None], tyro.conf.arg(metavar="[NAME]")] = None
    """one of them, in detail"""
    json: bool = False
    """print as JSON"""


def train(arguments: Sequence[str]) -> int:
    """Train from scratch, or with --init transfer; the same command resumes."""
    base = _base_spec(arguments)
    values = {f.name: getattr(base, f.name) for f in dataclasses.fields(TrainSpec)}
    args = _parse(
        TrainArguments, arguments, "train", default=TrainArguments(**values), flatten=True
    )
    lengths = [f"--{name}" for name in LENGTHS if _option(arguments, name) is not None]
    if len(lengths) > 1:
        raise UsageError(f"{' and '.join(lengths)} both set the length of the run; give one")
    spec = with_length(
        TrainSpec(**{f.name: getattr(args, f.name) for f in dataclasses.fields(TrainSpec)}), base
    )
    from patchword.workflows.training_run import train as run

    result = run(spec, out=args.out, overwrite=args.overwrite, console=err)
    return _show_run(result.run, result.summary, args.json)


def _base_spec(arguments: Sequence[str]) -> TrainSpec:
    """The settings of --config or --recipe, which the flags are laid over."""
    given = {name: _option(arguments, name) for name in ("config", "recipe", "init")}
    if given["config"] is None:
        base = base_spec(_source(arguments), given["recipe"], given["init"])
    else:
        base = _config_spec(Path(given["config"]), given["recipe"], given["init"])
    return dataclasses.replace(base, source=base.source or tyro.MISSING)


def _source(arguments: Sequence[str]) -> str:
    """The source, before the real parser is built: the first word, else `digits` if it is there;
    others need not be told apart."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0]
    values = ("--out", "--init", "--config")
    pairs = zip(["", *arguments], arguments, strict=False)
    found = any(word == "digits" and before not in values for before, word in pairs)
    return "digits" if found else ""


def _config_spec(path: Path, recipe: str | None, init: str | None) -> TrainSpec:
    """The settings of a config file, laid over those of its recipe, or of `recipe`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} holds no JSON object; give a run's config.json")
    for name in ("source", "recipe", "init"):
        if not isinstance(values.get(name), str | None):
            raise UsageError(f"--config {path}: {name} must be a string, not {values[name]!r}")
    named, weights = recipe or values.get("recipe"), init or values.get("init")
    base = base_spec(values.get("source") or "", named, weights)
    length = next((name for name in LENGTHS if values.get(name) is not None), None)
    if length is not None:  # with steps, the length that was found, not how it was asked for
        values |= {name: None for name in LENGTHS if name != length}
    return parse(TrainSpec, merge(to_dict(base), values))


def _option(arguments: Sequence[str], name: str) -> str | None:
    """The last value of --name, before the real parser is built."""
    found = None
    for word, following in zip(arguments, [*arguments[1:], None], strict=False):
        if word == f"--{name}":
            found = following
        elif word.startswith(f"--{name}="):
            found = word.partition("=")[2]
    return found


def _show_run(run: Path, summary: dict[str, Any], as_json: bool) -> int:
    if as_json:
        out.print_json(data={"run": str(run)} | summary)
        return 0
    lines = {
        "result": f"top-1 {100 * summary['top1']:.2f} %, top-5 {100 * summary['top5']:.2f} %, "
        f"calibration error {100 * summary['ece']:.2f} % on {summary['n']:,} {summary['split']} "
        "images",
        "weights": f"{run} ({summary['best_weights']} weights of step {summary['best_step']:,})",
        "report": str(run / "report.html"),
    }
    for name, value in lines.items():
        out.print(f"{name:8}{value}", highlight=False, soft_wrap=True)
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Accuracy, loss, calibration, and per class."""
    args = _parse(EvaluateArguments, arguments, "evaluate")
    _check_loading(args)
    from patchword.workflows.measuring import evaluate as measure

    values: dict[str, Any] = vars(args) | {"image_size": _size(args.image_size)}
    del values["json"]
    done = measure(**values, console=err)
    result = done.classification
    err.print(f"split {done.split}: {done.why}", highlight=False)
    if args.json:
        out.print_json(data=result.to_dict() | {"split": done.split})
        return 0
    table = Table("images", "top-1", "top-5", "loss", "calibration error")
    table.add_row(
        f"{result.n:,}",
        f"{100 * result.top1:.2f} %",
        f"{100 * result.top5:.2f} %",
        f"{result.loss:.4f}",
        f"{100 * result.ece:.2f} %",
    )
    out.print(table)
    classes = Table("class", "images", "recall", "precision")
    for name, row in result.per_class.items():
        if row["n"]:
            classes.add_row(
                name, str(row["n"]), _percent(row["recall"]), _percent(row["precision"])
            )
    out.print(classes)
    return 0


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _size(values: tuple[int, ...] | None) -> tuple[int, int] | None:
    if values is None:
        return None
    if len(values) not in (1, 2) or min(values) < 1:
        raise UsageError("--image-size takes one or two numbers above 0")
    return values[0], values[-1]


def _check_loading(args: EvaluateArguments | PredictArguments) -> None:
    if args.batch_size is not None and args.batch_size < 1:
        raise UsageError(f"--batch-size is {args.batch_size}; use 1 or more")
    if args.workers is not None and args.workers < 0:
        raise UsageError(f"--workers is {args.workers}; use 0 or more")


def predict(arguments: Sequence[str]) -> int:
    """Classify files, folders, patterns, or a list on standard input."""
    args = _parse(PredictArguments, arguments, "predict")
    _check_loading(args)
    if args.top < 1:
        raise UsageError("--top must be 1 or more")
    if not args.images:
        raise UsageError("no images given; name files, folders or a pattern, or - to read a list")
    images = [path for name in args.images for path in (_lines_in() if name == "-" else [name])]
    from patchword.workflows.measuring import predict as classify

    values: dict[str, Any] = vars(args) | {"images": images, "image_size": _size(args.image_size)}
    for name in ("json", "csv"):
        del values[name]
    bad: dict[str, str] = {}
    found = classify(**values, bad=bad)
    if args.json:
        out.print_json(data=[prediction.to_dict() for prediction in found])
    elif args.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        ranks = range(1, 1 + max((len(p.top) for p in found), default=0))
        writer.writerow(
            ["path", *(f"{what}{k}" for k in ranks for what in ("label", "probability"))]
        )
        for prediction in found:
            writer.writerow([prediction.path, *(x for pair in prediction.top for x in pair)])
    else:
        names = ("image", "label", "probability", "then")
        table = Table(*(Column(name, overflow="fold") for name in names))
        for prediction in found:
            then = ", ".join(f"{label} {100 * p:.1f} %" for label, p in prediction.top[1:])
            table.add_row(
                prediction.path, prediction.label, f"{100 * prediction.probability:.1f} %", then
            )
        out.print(table)
    if bad:
        err.print(f"{len(bad)} of {len(bad) + len(found)} files could not be read", highlight=False)
    return 0 if found else 1


def _lines_in() -> list[str]:
    """The lines of standard input as file names, whatever bytes are in them."""
    return [os.fsdecode(line) for line in sys.stdin.buffer.read().splitlines() if line]


def demo(arguments: Sequence[str]) -> int:
    """The main job on built-in real data, under two minutes."""
    args = _parse(DemoArguments, arguments, "demo")
    from patchword.workflows.training_run import train as run

    result = run("digits", out=args.out, overwrite=args.overwrite, seed=args.seed, console=err)
    return _show_run(result.run, result.summary, args.json)


def models(arguments: Sequence[str]) -> int:
    """The variants, with parameters and cost."""
    args = _parse(ListArguments, arguments, "models")
    from patchword.models.zoo import list_models, model_cost, model_spec

    names = [args.name] if args.name else list_models()
    rows: list[dict[str, Any]] = []
    for name in names:
        size = 224
        spec = model_spec(name, image_size=size)
        parameters, macs = model_cost(spec)
        rows.append(
            {
                "name": name,
                "depth": spec.depth,
                "width": spec.width,
                "mlp_width": spec.mlp_width,
                "heads": spec.heads,
                "parameters": parameters,
                "gmacs": macs / 1e9,
            }
        )
    if args.json:
        out.print_json(data=rows)
        return 0
    table = Table("model", "depth", "width", "MLP", "heads", "parameters", "GMACs at 224 px")
    for row in rows:
        *shape, parameters, gmacs = list(row.values())
        table.add_row(*map(str, shape), f"{parameters:,}", f"{gmacs:.2f}")
    out.print(table)
    return 0


def recipes(arguments: Sequence[str]) -> int:
    """The recipes, with source and expected result."""
    args = _parse(ListArguments, arguments, "recipes")
    rows = [find_recipe(args.name)] if args.name else list(RECIPES.values())
    from patchword.workflows.runs import recipe_cost

    if args.json:
        out.print_json(
            data=[vars(row) | {"command": row.command, "cost": recipe_cost(row)} for row in rows]
        )
    elif args.name:
        row = rows[0]
        about = {
            "title": row.title,
            "source": row.source,
            "expected": row.expected,
            "cost": recipe_cost(row),
            "command": row.command,
        }
        for key, value in about.items():
            out.print(f"{key:9}{value}", highlight=False, soft_wrap=True)
        out.print_json(data=row.settings)
    else:
        table = Table("recipe", "what", "source")
        for row in rows:
            table.add_row(row.name, row.title, row.source)
        out.print(table)
    return 0


def doctor(arguments: Sequence[str]) -> int:
    """What this machine can do."""
    args = _parse(_DoctorArguments, arguments, "doctor")
    from patchword.workflows.machine import examine

    found = examine()
    if args.json:
        out.print_json(data=found)
        return 0
    table = Table(show_header=False)
    for key, value in found.items():
        if isinstance(value, dict):
            value = "\n".join(f"{name}: {state}" for name, state in value.items())
        elif isinstance(value, list):
            value = "\n".join(f"{row['name']}, {row['memory_gib']} GiB" for row in value)
        table.add_row(key.replace("_gib", " (GiB)").replace("_", " "), str(value or "none"))
    out.print(table)
    return 0


@dataclass(frozen=True, kw_only=True)
class _DoctorArguments:
    """Devices, precision, threads, versions, free disk, and missing extras."""

    json: bool = False
    """print as JSON"""


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": demo,
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "models": models,
    "recipes": recipes,
    "doctor": doctor,
}


def _parse(
    cls: type[T], arguments: Sequence[str], command: str, default: Any = None, flatten: bool = False
) -> T:
    extra = {} if default is None else {"default": default}
    config = (tyro.conf.OmitArgPrefixes,) if flatten else ()
    return tyro.cli(cls, prog=f"patchword {command}", args=list(arguments), config=config, **extra)


def _help() -> str:
    lines = ["usage: patchword COMMAND ... [--help]", ""]
    lines += [f"  {name:10}{(run.__doc__ or '').strip()}" for name, run in COMMANDS.items()]
    lines += ["", "every command takes --help, and --debug to show where an error comes from"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 1 failed, 2 usage, 130 or 143 after a signal."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    handler = RichHandler(console=err, show_path=False, show_time=False, markup=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may hold more than UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        import patchword

        out.print(patchword.__version__, highlight=False)
        return 0
    try:
        if arguments[0] not in COMMANDS:
            raise UsageError(f"unknown command {arguments[0]!r}{nearest(arguments[0], COMMANDS)}")
        return COMMANDS[arguments[0]](arguments[1:])
    except Interrupted as stop:
        err.print(f"{stop}; run the same command to go on", highlight=False, soft_wrap=True)
        return stop.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        sys.stdout = None  # whoever read our output has gone; nothing is left to flush
        return 1
    except Exception as error:
        if debug:
            raise
        message = " ".join(str(error).split())
        if not isinstance(error, PatchwordError | OSError):
            kind = type(error).__name__
            message = f"unexpected {kind}: {message}; --debug shows where, please report it"
        err.print(f"patchword: {message}", style="red", highlight=False, soft_wrap=True)
        return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    sys.exit(main())
