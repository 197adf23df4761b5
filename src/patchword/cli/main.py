"""The command line: one thin function per command."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.logging import RichHandler

from patchword.cli import tables
from patchword.cli.arguments import (
    CalibrateArguments,
    CheckArguments,
    ConvertArguments,
    DemoArguments,
    DoctorArguments,
    EvaluateArguments,
    ExplainArguments,
    InspectArguments,
    ListArguments,
    ModelsArguments,
    PredictArguments,
    TrainArguments,
    read,
    read_train,
)
from patchword.cli.tables import err, out
from patchword.report.words import count, sweep_rows
from patchword.spec.parse import Interrupted, PatchwordError, UsageError, nearest
from patchword.training.recipes import RECIPES, find_recipe
from patchword.weights.pretrained import PRETRAINED, find_pretrained

if TYPE_CHECKING:
    from patchword.commands.listing import Variant
    from patchword.commands.probing import ProbeName
    from patchword.spec.train import TrainSpec


def train(arguments: Sequence[str]) -> int:
    """Train from scratch, or with --init transfer; the same command resumes."""
    args, spec = read_train(arguments)
    if args.sweep or args.runs != 1:
        return _sweep(args, spec)
    from patchword.run.train import train as run

    result = run(spec, out=args.out, overwrite=args.overwrite, console=err)
    if args.json:
        out.print_json(data={"run": str(result.folder)} | result.summary)
    else:
        tables.show_run(result.folder, result.summary)
    return 0


def _sweep(args: TrainArguments, spec: TrainSpec) -> int:
    from patchword.run.sweep import sweep

    done = sweep(
        spec,
        choose=args.sweep,
        repeats=args.runs,
        out=args.out,
        overwrite=args.overwrite,
        console=err,
    )
    if args.json:
        out.print_json(data={"run": str(done.folder)} | done.to_dict())
        return 0
    tables.show_sweep(done, sweep_rows(done.to_dict()))
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Accuracy, calibration, loss, and per class."""
    args = read(EvaluateArguments, arguments, "evaluate")
    settings = args.settings()
    probes, layer = settings.pop("probe"), settings.pop("layer")
    if probes:
        return _probe(settings | ({"layer": layer} if layer else {}), probes, args.json)
    if layer:
        raise UsageError("--layer goes with --probe: say which, fewshot, knn or logistic")
    from patchword.session.measuring import evaluate as measure

    done = measure(**settings, console=err)
    result = done.classification
    err.print(f"split {done.split}: {done.why}", highlight=False)
    if args.json:
        out.print_json(data=result.to_dict() | {"split": done.split})
        return 0
    tables.show_classification(result)
    return 0


def _probe(settings: dict[str, Any], probes: Sequence[ProbeName], as_json: bool) -> int:
    from patchword.commands.probing import measure_probes

    done = measure_probes(**settings, probes=probes, console=err)
    said = f"split {done.split}: {done.why}; learned from {done.support:,} images of train"
    said += f"; features {done.layer}"
    err.print(said, highlight=False, soft_wrap=True)
    if as_json:
        out.print_json(data=done.to_dict())
    else:
        tables.show_probes(done)
    return 0


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
    settings["images"] = _paths(args.images)
    bad: dict[str, str] = {}
    from patchword.session.measuring import predict as classify

    found = classify(**settings, bad=bad)
    if args.json:
        out.print_json(data=[prediction.to_dict() for prediction in found])
    elif args.csv:
        tables.write_csv(found, args.abstain is not None)
    else:
        tables.show_predictions(found)
    if args.abstain is not None:
        unsure = sum(prediction.abstained for prediction in found)
        said = f"{unsure} of {len(found)} images are uncertain: less than {args.abstain:g} sure"
        err.print(said, highlight=False)
    if bad:
        err.print(f"{len(bad)} of {len(bad) + len(found)} files could not be read", highlight=False)
    return 0


def inspect(arguments: Sequence[str]) -> int:
    """The paper's figures: filters, positions, attention, tokens, a map of features."""
    args = read(InspectArguments, arguments, "inspect")
    settings = args.settings()
    settings["images"] = _paths(args.images)
    bad: dict[str, str] = {}
    from patchword.commands.inspecting import inspect_model

    done = inspect_model(**settings, bad=bad, console=err)
    for name, reason in done.summary["skipped"].items():
        err.print(f"no {name}: {reason}", highlight=False, soft_wrap=True)
    if args.json:
        print(json.dumps(done.summary))
    else:
        tables.show_inspection(done.out, done.summary)
    if bad:
        err.print(f"{count(len(bad), 'file')} could not be read", highlight=False)
    return 0


def explain(arguments: Sequence[str]) -> int:
    """Why images have their class: rollout, occlusion, and what they are worth."""
    args = read(ExplainArguments, arguments, "explain")
    settings = args.settings()
    settings["images"] = _paths(args.images)
    bad: dict[str, str] = {}
    from patchword.commands.explaining import explain_images

    done = explain_images(**settings, bad=bad, console=err)
    if args.json:
        print(json.dumps(done.to_dict()))
    else:
        tables.show_explanations(done)
    if bad:
        err.print(f"{count(len(bad), 'file')} could not be read", highlight=False)
    return 0


def _paths(given: Sequence[str]) -> list[str]:
    """IMAGES of the command line, with what standard input lists for each -."""
    return [path for name in given for path in (_lines_in() if name == "-" else [name])]


def _lines_in() -> list[str]:
    """The lines of standard input as file names, whatever bytes are in them."""
    return [os.fsdecode(line) for line in sys.stdin.buffer.read().splitlines() if line]


def calibrate(arguments: Sequence[str]) -> int:
    """Make a model's probabilities honest, by a temperature fitted on validation images."""
    args = read(CalibrateArguments, arguments, "calibrate")
    settings = args.settings()
    from patchword.commands.calibrating import calibrate_model

    done = calibrate_model(**settings, console=err)
    for part in done.parts:
        err.print(f"{part.role}: {part.part}: {part.why}", highlight=False, soft_wrap=True)
    if args.json:
        out.print_json(data=done.to_dict())
        return 0
    tables.show_calibration(done)
    return 0


def demo(arguments: Sequence[str]) -> int:
    """The main job on built-in real data, under two minutes."""
    args = read(DemoArguments, arguments, "demo")
    from patchword.run.train import train as run

    result = run("digits", out=args.out, overwrite=args.overwrite, seed=args.seed, console=err)
    if args.json:
        out.print_json(data={"run": str(result.folder)} | result.summary)
    else:
        tables.show_run(result.folder, result.summary)
    return 0


def check(arguments: Sequence[str]) -> int:
    """What is wrong with a data set: damage, copies, leakage, labels."""
    args = read(CheckArguments, arguments, "check")
    settings = args.settings()
    from patchword.commands import checking

    if args.undo:
        back = checking.undo(args.data)
        if args.json:
            out.print_json(data={"brought_back": [move.path for move in back]})
        else:
            tables.say(f"brought back {count(len(back), 'file')}")
        return 0
    done = checking.check(**settings, console=err)
    if args.json:
        out.print_json(data=done.to_dict())
    else:
        tables.show_check(done)
    return 1 if done.count("error") else 0


def convert(arguments: Sequence[str]) -> int:
    """Weights to another library's format and back."""
    args = read(ConvertArguments, arguments, "convert")
    from patchword.commands.converting import convert as run

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
        return _pretrained(args)
    from patchword.commands import listing

    if args.name:
        return _layers(listing.variant(args.name, **settings), args.json)
    rows = listing.variants()
    if args.json:
        out.print_json(data=[row.to_dict() for row in rows])
        return 0
    tables.show_variants(rows)
    return 0


def _layers(found: Variant, as_json: bool) -> int:
    from patchword.commands.listing import layers

    rows = layers(found)
    if as_json:
        out.print_json(data=[found.to_dict() | {"layer_table": [vars(row) for row in rows]}])
    else:
        tables.show_layers(found, rows)
    return 0


def _pretrained(args: ModelsArguments) -> int:
    rows = [find_pretrained(args.name)] if args.name else list(PRETRAINED.values())
    if args.json:
        out.print_json(data=[vars(row) for row in rows])
    else:
        tables.show_pretrained(rows, detail=args.name is not None)
    return 0


def recipes(arguments: Sequence[str]) -> int:
    """The recipes, with source and expected result."""
    args = read(ListArguments, arguments, "recipes")
    rows = [find_recipe(args.name)] if args.name else list(RECIPES.values())
    from patchword.commands.listing import recipe_cost

    if args.json:
        out.print_json(
            data=[vars(row) | {"command": row.command, "cost": recipe_cost(row)} for row in rows]
        )
    else:
        tables.show_recipes(rows, recipe_cost, detail=args.name is not None)
    return 0


def doctor(arguments: Sequence[str]) -> int:
    """What this machine can do."""
    args = read(DoctorArguments, arguments, "doctor")
    from patchword.commands.examining import examine

    found = examine()
    if args.json:
        out.print_json(data=found)
        return 0
    tables.show_machine(found)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": demo,
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "inspect": inspect,
    "explain": explain,
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
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it notes each table of a PDF's fonts
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
