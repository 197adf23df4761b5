"""The command line: one thin function per command."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.logging import RichHandler

import patchword
from patchword.cli import tables
from patchword.cli.arguments import (
    CheckArguments,
    ConvertArguments,
    DemoArguments,
    DoctorArguments,
    ListArguments,
    ModelsArguments,
    TrainArguments,
    read,
    read_train,
)
from patchword.cli.looking import (
    CalibrateArguments,
    EvaluateArguments,
    ExplainArguments,
    InspectArguments,
    PredictArguments,
)
from patchword.cli.tables import err, out
from patchword.report.words import count, sweep_rows
from patchword.spec.parse import Interrupted, PatchwordError, UsageError, nearest
from patchword.training.recipes import RECIPES, find_recipe
from patchword.weights.pretrained import PRETRAINED, find_pretrained

if TYPE_CHECKING:
    from patchword.spec.train import TrainSpec


def _with_images(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a command, with what standard input lists for each - among the images."""
    given = settings["images"]
    images = [path for name in given for path in (_lines_in() if name == "-" else [name])]
    return settings | {"images": images}


def _lines_in() -> list[str]:
    """The lines of standard input as file names, whatever bytes are in them."""
    return [os.fsdecode(line) for line in sys.stdin.buffer.read().splitlines() if line]


def _note(line: str) -> None:
    """A line beside the result, on standard error."""
    err.print(line, highlight=False, soft_wrap=True)


def _give(as_json: bool, data: Any, show: Callable[..., None], *shown: Any, **how: Any) -> int:
    """The result on standard output: `data` as JSON, or what `show` makes of it. Returns 0."""
    if as_json:
        out.print_json(data=data)
    else:
        show(*shown, **how)
    return 0


def _give_seen(as_json: bool, bad: Mapping[str, str], data: Any, *shown: Any) -> int:
    """The same of images, some of which may be `bad`; on one line, as the JSON is long."""
    if as_json:
        print(json.dumps(data))
    else:
        _give(False, data, *shown)
    if bad:
        _note(f"{count(len(bad), 'file')} could not be read")
    return 0


def train(arguments: Sequence[str]) -> int:
    """Train from scratch, or with --init transfer; the same command resumes."""
    args, spec = read_train(arguments)
    return _sweep(args, spec) if args.sweep or args.runs != 1 else _train(args, spec)


def demo(arguments: Sequence[str]) -> int:
    """The main job on built-in real data, under two minutes."""
    args = read(DemoArguments, arguments, "demo")
    return _train(args, "digits", seed=args.seed)


def _train(args: TrainArguments | DemoArguments, spec: TrainSpec | str, **settings: Any) -> int:
    done = patchword.train(spec, out=args.out, overwrite=args.overwrite, console=err, **settings)
    data = {"run": str(done.folder)} | done.summary
    return _give(args.json, data, tables.show_run, done.folder, done.summary)


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
    data = {"run": str(done.folder)} | done.to_dict()
    return _give(args.json, data, tables.show_sweep, done, sweep_rows(data))


def evaluate(arguments: Sequence[str]) -> int:
    """Accuracy, calibration, loss, and per class."""
    args = read(EvaluateArguments, arguments, "evaluate")
    settings = args.settings()
    if args.probe:
        from patchword.commands.probing import measure_probes

        probing = measure_probes(**settings, console=err)
        learned = f"learned from {probing.support:,} images of train; features {probing.layer}"
        _note(f"split {probing.split}: {probing.why}; {learned}")
        return _give(args.json, probing.to_dict(), tables.show_probes, probing)
    done = patchword.evaluate(**settings, console=err)
    result = done.classification
    _note(f"split {done.split}: {done.why}")
    data = result.to_dict() | {"split": done.split}
    return _give(args.json, data, tables.show_classification, result)


def predict(arguments: Sequence[str]) -> int:
    """Classify files, folders, patterns, or a list on standard input."""
    args = read(PredictArguments, arguments, "predict")
    settings, bad = _with_images(args.settings()), dict[str, str]()
    found = patchword.predict(**settings, bad=bad)
    if args.csv:
        tables.write_csv(found, args.abstain is not None)
    else:
        _give(args.json, [row.to_dict() for row in found], tables.show_predictions, found)
    if args.abstain is not None:
        unsure = sum(prediction.abstained for prediction in found)
        _note(f"{unsure} of {len(found)} images are uncertain: less than {args.abstain:g} sure")
    if bad:
        _note(f"{len(bad)} of {len(bad) + len(found)} files could not be read")
    return 0


def inspect(arguments: Sequence[str]) -> int:
    """The paper's figures: filters, positions, attention, tokens, a map of features."""
    args = read(InspectArguments, arguments, "inspect")
    settings, bad = _with_images(args.settings()), dict[str, str]()
    from patchword.commands.inspecting import inspect_model

    done = inspect_model(**settings, bad=bad, console=err)
    for name, reason in done.summary["skipped"].items():
        _note(f"no {name}: {reason}")
    return _give_seen(args.json, bad, done.summary, tables.show_inspection, done.out, done.summary)


def explain(arguments: Sequence[str]) -> int:
    """Why images have their class: rollout, occlusion, and what they are worth."""
    args = read(ExplainArguments, arguments, "explain")
    settings, bad = _with_images(args.settings()), dict[str, str]()
    from patchword.commands.explaining import explain_images

    done = explain_images(**settings, bad=bad, console=err)
    return _give_seen(args.json, bad, done.to_dict(), tables.show_explanations, done)


def calibrate(arguments: Sequence[str]) -> int:
    """Make a model's probabilities honest, by a temperature fitted on validation images."""
    args = read(CalibrateArguments, arguments, "calibrate")
    settings = args.settings()
    from patchword.commands.calibrating import calibrate_model

    done = calibrate_model(**settings, console=err)
    for part in done.parts:
        _note(f"{part.role}: {part.part}: {part.why}")
    return _give(args.json, done.to_dict(), tables.show_calibration, done)


def check(arguments: Sequence[str]) -> int:
    """What is wrong with a data set: damage, copies, leakage, labels."""
    args = read(CheckArguments, arguments, "check")
    settings = args.settings()
    from patchword.audit.fix import undo
    from patchword.commands import checking

    if args.undo:
        back = [move.path for move in undo(args.data)]
        said = f"brought back {count(len(back), 'file')}"
        return _give(args.json, {"brought_back": back}, tables.say, said)
    done = checking.check(**settings, console=err)
    _give(args.json, done.to_dict(), tables.show_check, done)
    return 1 if done.count("error") else 0


def convert(arguments: Sequence[str]) -> int:
    """Weights to another library's format and back."""
    args = read(ConvertArguments, arguments, "convert")
    from patchword.commands import converting

    done = converting.convert(**{name: x for name, x in vars(args).items() if name != "json"})
    shown = {"found": done.source, "written": done.written, "parity": done.parity}
    return _give(args.json, done.to_dict(), tables.say_pairs, shown, 9)


def models(arguments: Sequence[str]) -> int:
    """The variants, one of them in detail, and well-known weights."""
    args = read(ModelsArguments, arguments, "models")
    settings = args.settings()
    from patchword.commands import listing

    if args.pretrained:
        known = [find_pretrained(args.name)] if args.name else list(PRETRAINED.values())
        data, detail = [vars(row) for row in known], args.name is not None
        return _give(args.json, data, tables.show_pretrained, known, detail=detail)
    if args.name:
        found = listing.variant(args.name, **settings)
        layers = listing.layers(found)
        data = [found.to_dict() | {"layer_table": [vars(row) for row in layers]}]
        return _give(args.json, data, tables.show_layers, found, layers)
    rows = listing.variants()
    return _give(args.json, [row.to_dict() for row in rows], tables.show_variants, rows)


def recipes(arguments: Sequence[str]) -> int:
    """The recipes, with source and expected result."""
    args = read(ListArguments, arguments, "recipes")
    rows = [find_recipe(args.name)] if args.name else list(RECIPES.values())
    from patchword.commands.listing import recipe_cost

    data = [vars(row) | {"command": row.command, "cost": recipe_cost(row)} for row in rows]
    detail = args.name is not None
    return _give(args.json, data, tables.show_recipes, rows, recipe_cost, detail=detail)


def doctor(arguments: Sequence[str]) -> int:
    """What this machine can do."""
    args = read(DoctorArguments, arguments, "doctor")
    from patchword.commands.examining import examine

    found = examine()
    return _give(args.json, found, tables.show_machine, found)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    command.__name__: command
    for command in (
        *(demo, train, evaluate, predict, inspect, explain),
        *(check, calibrate, convert, models, recipes, doctor),
    )
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
