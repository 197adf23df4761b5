"""The command line: one thin function per command."""

from __future__ import annotations

import csv
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Column, Table

from patchword.arguments import (
    CalibrateArguments,
    CheckArguments,
    ConvertArguments,
    DemoArguments,
    DoctorArguments,
    EvaluateArguments,
    ListArguments,
    ModelsArguments,
    PredictArguments,
    TrainArguments,
    read,
    read_train,
)
from patchword.parsing import Interrupted, PatchwordError, UsageError, nearest
from patchword.training.recipes import RECIPES, find_recipe
from patchword.weights.pretrained import PRETRAINED, find_pretrained

if TYPE_CHECKING:
    from patchword.specs import TrainSpec
    from patchword.workflows.checking import Checked
    from patchword.workflows.listing import Variant
    from patchword.workflows.measuring import Prediction
    from patchword.workflows.probing import ProbeName

err = Console(stderr=True, markup=False, emoji=False)  # names are shown as they are
out = Console(markup=False, emoji=False)


def train(arguments: Sequence[str]) -> int:
    """Train from scratch, or with --init transfer; the same command resumes."""
    args, spec = read_train(arguments)
    if args.sweep or args.runs != 1:
        return _sweep(args, spec)
    from patchword.workflows.training_run import train as run

    result = run(spec, out=args.out, overwrite=args.overwrite, console=err)
    return _show_run(result.run, result.summary, args.json)


def _sweep(args: TrainArguments, spec: TrainSpec) -> int:
    from patchword.facts import sweep_rows
    from patchword.workflows.sweeping import sweep

    done = sweep(
        spec,
        choose=args.sweep,
        repeats=args.runs,
        out=args.out,
        overwrite=args.overwrite,
        console=err,
    )
    if args.json:
        out.print_json(data={"run": str(done.run)} | done.to_dict())
        return 0
    table = _table("run", "top-1", "measured on")
    for row in sweep_rows(done.to_dict()):
        table.add_row(*row)
    out.print(table)
    for name, value in {"weights": done.run, "report": done.run / "report.html"}.items():
        out.print(f"{name:8}{value}", highlight=False, soft_wrap=True)
    return 0


def _show_run(run: Path, summary: dict[str, Any], as_json: bool) -> int:
    if as_json:
        out.print_json(data={"run": str(run)} | summary)
        return 0
    figures = {
        "top-1": "top1",
        "top-5": "top5",
        "balanced accuracy": "balanced",
        "calibration error": "ece",
    }
    shown = [f"{n} {100 * summary[key]:.2f} %" for n, key in figures.items() if key in summary]
    lines = {
        "result": f"{', '.join(shown)} on {summary['n']:,} {summary['split']} images",
        "weights": f"{run} ({summary['best_weights']} weights of step {summary['best_step']:,})",
        "report": str(run / "report.html"),
    }
    for name, value in lines.items():
        out.print(f"{name:8}{value}", highlight=False, soft_wrap=True)
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Accuracy, calibration, loss, and per class."""
    args = read(EvaluateArguments, arguments, "evaluate")
    settings = args.settings()
    probes = settings.pop("probe")
    if probes:
        return _show_probes(settings, probes, args.json)
    from patchword.workflows.measuring import evaluate as measure

    done = measure(**settings, console=err)
    result = done.classification
    err.print(f"split {done.split}: {done.why}", highlight=False)
    if args.json:
        out.print_json(data=result.to_dict() | {"split": done.split})
        return 0
    table = _table("images", "top-1", "top-5", "balanced", "loss", "calibration error", "Brier")
    table.add_row(
        f"{result.n:,}",
        *(f"{100 * share:.2f} %" for share in (result.top1, result.top5, result.balanced)),
        f"{result.loss:.4f}",
        f"{100 * result.ece:.2f} %",
        f"{result.brier:.4f}",
    )
    out.print(table)
    classes = _table("class", "images", "recall", "precision")
    for name, row in result.per_class.items():
        if row["n"]:
            classes.add_row(
                name, str(row["n"]), _percent(row["recall"]), _percent(row["precision"])
            )
    out.print(classes)
    return 0


def _show_probes(settings: dict[str, Any], probes: Sequence[ProbeName], as_json: bool) -> int:
    from patchword.workflows.probing import measure_probes

    done = measure_probes(**settings, probes=probes, console=err)
    said = f"split {done.split}: {done.why}; learned from {done.support:,} images of train"
    err.print(said, highlight=False, soft_wrap=True)
    if as_json:
        out.print_json(data=done.to_dict())
        return 0
    table = _table("probe", "", "top-1", "over seeds", whole=("probe",))
    for shots, row in (done.fewshot or {}).items():
        table.add_row("few-shot", f"{shots} a class", _percent(row.mean), f"± {_percent(row.std)}")
    for count, share in (done.knn or {}).items():
        table.add_row("nearest neighbours", f"k {count}", _percent(share), "")
    if done.logistic_probe is not None:
        regulariser = f"l2 {done.logistic_probe.l2:.0e}"
        table.add_row("logistic regression", regulariser, _percent(done.logistic), "")
    out.print(table)
    return 0


def _table(*names: str, whole: Sequence[str] = ()) -> Table:
    """A table that breaks what is too long for its column, but for those in `whole`, and cuts
    nothing off."""
    return Table(*(Column(name, overflow="fold", no_wrap=name in whole) for name in names))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def predict(arguments: Sequence[str]) -> int:
    """Classify files, folders, patterns, or a list on standard input."""
    args = read(PredictArguments, arguments, "predict")
    settings = args.settings()
    if args.top < 1:
        raise UsageError("--top must be 1 or more")
    if args.json and args.csv:
        raise UsageError("--json and --csv are two forms of one result; give one of them")
    if not args.images:
        raise UsageError("no images given; name files, folders or a pattern, or - to read a list")
    given = (_lines_in() if name == "-" else [name] for name in args.images)
    settings["images"] = [path for paths in given for path in paths]
    bad: dict[str, str] = {}
    from patchword.workflows.measuring import predict as classify

    found = classify(**settings, bad=bad)
    if args.json:
        out.print_json(data=[prediction.to_dict() for prediction in found])
    elif args.csv:
        _write_csv(found, args.abstain is not None)
    else:
        table = _table("image", "label", "probability", "then")
        for prediction in found:
            rest = prediction.top if prediction.label is None else prediction.top[1:]
            then = ", ".join(f"{label} {100 * p:.1f} %" for label, p in rest)
            label = "uncertain" if prediction.label is None else prediction.label
            table.add_row(prediction.path, label, f"{100 * prediction.probability:.1f} %", then)
        out.print(table)
    if args.abstain is not None:
        unsure = sum(prediction.abstained for prediction in found)
        said = f"{unsure} of {len(found)} images are uncertain: less than {args.abstain:g} sure"
        err.print(said, highlight=False)
    if bad:
        err.print(f"{len(bad)} of {len(bad) + len(found)} files could not be read", highlight=False)
    return 0


def _write_csv(found: Sequence[Prediction], may_abstain: bool) -> None:
    """The table as comma-separated values; where the model may abstain, with what it settled on."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    ranks = range(1, 1 + max(len(p.top) for p in found))
    settled = ["label", "abstained"] if may_abstain else []
    names = (f"{what}{k}" for k in ranks for what in ("label", "probability"))
    writer.writerow(["path", *settled, *names])
    for p in found:
        said = [p.label, str(p.abstained).lower()] if may_abstain else []
        writer.writerow([p.path, *said, *(x for pair in p.top for x in pair)])


def _lines_in() -> list[str]:
    """The lines of standard input as file names, whatever bytes are in them."""
    return [os.fsdecode(line) for line in sys.stdin.buffer.read().splitlines() if line]


def calibrate(arguments: Sequence[str]) -> int:
    """Make a model's probabilities honest, by a temperature fitted on validation images."""
    args = read(CalibrateArguments, arguments, "calibrate")
    settings = args.settings()
    from patchword.workflows.calibrating import calibrate_model

    done = calibrate_model(**settings, console=err)
    for part in done.parts:
        err.print(f"{part.role}: {part.part}: {part.why}", highlight=False, soft_wrap=True)
    if args.json:
        out.print_json(data=done.to_dict())
        return 0
    columns = ("images", "", "temperature", "top-1", "loss", "calibration error", "Brier")
    table = _table(*columns)
    for part in done.parts:
        temperatures = (1.0, done.calibration.temperature)
        for t, result in zip(temperatures, (part.before, part.after), strict=True):
            table.add_row(
                f"{result.n:,} ({part.part})",
                part.role,
                f"{t:.4g}",
                f"{100 * result.top1:.2f} %",
                f"{result.loss:.4f}",
                f"{100 * result.ece:.2f} %",
                f"{result.brier:.4f}",
            )
        table.add_section()
    out.print(table)
    stored = done.stored or "nowhere; --out FILE writes the calibrated model, --overwrite replaces"
    out.print(f"stored   {stored}", highlight=False, soft_wrap=True)
    return 0


def demo(arguments: Sequence[str]) -> int:
    """The main job on built-in real data, under two minutes."""
    args = read(DemoArguments, arguments, "demo")
    from patchword.workflows.training_run import train as run

    result = run("digits", out=args.out, overwrite=args.overwrite, seed=args.seed, console=err)
    return _show_run(result.run, result.summary, args.json)


def check(arguments: Sequence[str]) -> int:
    """What is wrong with a data set: damage, copies, leakage, labels."""
    args = read(CheckArguments, arguments, "check")
    settings = args.settings()
    from patchword.workflows import checking

    if args.undo:
        back = checking.undo(args.data)
        if args.json:
            out.print_json(data={"brought_back": [move.path for move in back]})
        else:
            out.print(f"brought back {_files(len(back))}", highlight=False)
        return 0
    done = checking.check(**settings, console=err)
    if args.json:
        out.print_json(data=done.to_dict())
    else:
        _show_check(done)
    return 1 if done.count("error") else 0


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count:,} files"


def _show_check(done: Checked) -> None:
    if done.moved:
        moved = f"moved {_files(len(done.moved))} to {done.aside}; --undo brings them back"
        out.print(moved, highlight=False, soft_wrap=True)
    if done.findings:
        table = _table("", "finding", "how many", "examples", "what to do", whole=("", "how many"))
        for finding in done.findings:
            examples = [" = ".join(item.names[:3]) for item in finding.items[:3]]
            about = [f" ({item.about})" if item.about else "" for item in finding.items]
            shown = "\n".join(a + b for a, b in zip(examples, about, strict=False))
            row = (finding.what, f"{finding.count:,}", shown, finding.advice)
            table.add_row(finding.severity, *row, end_section=True)
        out.print(table)
    counts = {kind: done.count(kind) for kind in ("error", "warning", "note")}
    named = [f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items() if count]
    found = f"found {', '.join(named)}" if named else "found nothing wrong"
    about = f"{done.images:,} images of {len(done.source.classes):,} classes: {found}"
    out.print(about, highlight=False, soft_wrap=True)


def convert(arguments: Sequence[str]) -> int:
    """Weights to another library's format and back."""
    args = read(ConvertArguments, arguments, "convert")
    from patchword.workflows.converting import convert as run

    settings = {name: value for name, value in vars(args).items() if name != "json"}
    done = run(**settings)
    if args.json:
        out.print_json(data=done.to_dict())
        return 0
    for name, value in {
        "found": done.found,
        "written": done.written,
        "parity": done.parity,
    }.items():
        out.print(f"{name:9}{value}", highlight=False, soft_wrap=True)
    return 0


def models(arguments: Sequence[str]) -> int:
    """The variants, one of them in detail, and well-known weights."""
    args = read(ModelsArguments, arguments, "models")
    settings = args.settings()
    if args.pretrained:
        return _show_pretrained(args)
    from patchword.workflows import listing

    if args.name:
        return _show_layers(listing.variant(args.name, **settings), args.json)
    rows = listing.variants()
    if args.json:
        out.print_json(data=[row.to_dict() for row in rows])
        return 0
    columns = ("model", "family", "layers", "width", "MLP", "heads", "parameters", "GMACs")
    table = _table(*columns, whole=("model", "family", "parameters", "GMACs"))
    for row, following in zip(rows, [*rows[1:], rows[-1]], strict=True):
        table.add_row(
            *(row.name, row.family, *row.cells),
            *(f"{row.parameters:,}", f"{row.macs / 1e9:.2f}"),
            end_section=row.family != following.family,
        )
    out.print(table)
    out.print("GMACs for one image of 224 x 224 pixels", highlight=False)
    return 0


def _show_layers(found: Variant, as_json: bool) -> int:
    from patchword.workflows.listing import layers

    rows = layers(found)
    if as_json:
        out.print_json(data=[found.to_dict() | {"layer_table": [vars(row) for row in rows]}])
        return 0
    columns = ("layer", "output", "parameters", "MACs", "activations (MiB)")
    table = _table(*columns, whole=("layer", "parameters"))
    for row in rows:
        if row is rows[-1]:
            table.add_section()
        shape = " x ".join(map(str, row.shape))
        memory = f"{row.activation_bytes / 2**20:.2f}"
        table.add_row(row.name, shape, f"{row.parameters:,}", f"{row.macs:,}", memory)
    out.print(table)
    height, width = found.spec.image_size
    out.print(f"for one image of {height} x {width} pixels, in float32", highlight=False)
    return 0


def _show_pretrained(args: ModelsArguments) -> int:
    rows = [find_pretrained(args.name)] if args.name else list(PRETRAINED.values())
    if args.json:
        out.print_json(data=[vars(row) for row in rows])
    elif args.name:
        for key, value in vars(rows[0]).items():
            shown = "none: features" if value is None else value
            out.print(f"{key.replace('_', ' '):11}{shown}", highlight=False, soft_wrap=True)
    else:
        columns = ("name", "hub id", "licence", "pixels", "top-1")
        table = _table(*columns, whole=("name", "licence"))
        for row in rows:
            top1 = "features" if row.top1 is None else f"{row.top1:.2f} %"
            table.add_row(row.name, row.hub, row.licence, str(row.image_size), top1)
        out.print(table)
        about = "top-1 on ImageNet, measured by timm; --init, evaluate and predict take the name"
        out.print(about, highlight=False, soft_wrap=True)
    return 0


def recipes(arguments: Sequence[str]) -> int:
    """The recipes, with source and expected result."""
    args = read(ListArguments, arguments, "recipes")
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
        table = _table("recipe", "what", "source")
        for row in rows:
            table.add_row(row.name, row.title, row.source)
        out.print(table)
    return 0


def doctor(arguments: Sequence[str]) -> int:
    """What this machine can do."""
    args = read(DoctorArguments, arguments, "doctor")
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


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": demo,
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "check": check,
    "calibrate": calibrate,
    "convert": convert,
    "models": models,
    "recipes": recipes,
    "doctor": doctor,
}


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
