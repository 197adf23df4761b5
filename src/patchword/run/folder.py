"""The run directory: what is resolved once when a run starts, stored, and compared on resume."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

import patchword
from patchword.data.sources import Source
from patchword.data.splits import FILE as SPLITS
from patchword.data.splits import Division, divide, drawn, load_division, save_division
from patchword.models.model import Model
from patchword.models.zoo import (
    create_model,
    model_family,
    spec_from_dict,
    spec_to_dict,
    variant_name,
)
from patchword.objectives import RATES, check_objective
from patchword.session.device import (
    default_workers,
    processor,
    resolve_device,
    resolve_precision,
)
from patchword.spec.data import PreprocessOptions
from patchword.spec.model import ModelSpec, PreprocessSpec
from patchword.spec.parse import PatchwordError, UsageError, differences, nearest, parse, to_dict
from patchword.spec.train import ModelOptions, TrainSpec
from patchword.training.checkpoint import replace_text
from patchword.training.recipes import recipe_spec
from patchword.training.tuning import trained_names
from patchword.weights.load import describe_weights, transfer

logger = logging.getLogger("patchword")
CONFIG, SUMMARY = "config.json", "summary.json"
INIT = "init.json"
"""what the weights are that the run starts from: they themselves are needed only at the start"""
HEAD = "head.safetensors"
"""the model with a head on its frozen features, to use while the run goes on"""
SWEEP = "sweep.json"
"""in the folder of a sweep or of repeated runs"""


def default_run(source: Source, spec: TrainSpec) -> Path:
    """`runs/<data>-<model>`, for weights to transfer `runs/<data>-from-<their run or file>`; if not
    to classify, with the objective at the end."""
    name = spec.model or "model"
    if spec.init is not None:
        init = Path(spec.init)
        name = f"from-{init.stem if init.is_file() else init.resolve().name}"
    what = f"-{spec.objective}" if spec.self_supervised else ""
    return Path("runs") / f"{source.name}-{name}{what}".replace("/", "-")


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run directory for this process. Raises `PatchwordError` if another one holds it, or
    if the folder holds anything else; it is then left as it is."""
    if not is_run(run) and _strangers(run):
        raise PatchwordError(f"{run} exists and is not a run directory; choose another --out")
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PatchwordError(
                f"another process is training in {run}; stop it, or choose another --out"
            ) from None
        yield


def is_run(run: Path) -> bool:
    """Whether a folder is the directory of a run that was started."""
    return (run / CONFIG).exists() and (run / SPLITS).exists()


def clear(run: Path, spared: str | None = None) -> None:
    """Empty a run directory but for hidden entries and the one that is `spared`; what makes it one
    goes last."""
    last = [CONFIG, SPLITS]
    for entry in sorted(run.iterdir(), key=lambda entry: entry.name in last):
        if entry.name.startswith(".") or entry.name == spared:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _strangers(run: Path) -> list[str]:
    """What a folder holds that is not left by a run which was stopped before it started."""
    ours = {"environment.json", "classes.json", HEAD, INIT, SPLITS, f"{SPLITS}.tmp"}
    names = {entry.name for entry in run.iterdir()} if run.exists() else set()
    return sorted(name for name in names - ours if not name.startswith("."))


def stored_spec(run: Path) -> TrainSpec | None:
    """The resolved spec of a run that was started, None if there is none."""
    path = run / CONFIG
    if not path.exists():
        return None
    try:
        return parse(TrainSpec, json.loads(path.read_text(encoding="utf-8")), "")
    except ValueError as error:
        raise PatchwordError(
            f"{path} cannot be read: {error}; start again with --overwrite"
        ) from None


def resume_spec(asked: TrainSpec, stored: TrainSpec, division: Division, run: Path) -> TrainSpec:
    """`asked`, resolved; with what was measured or found when the run started, as stored.

    Raises `UsageError` naming the settings in which it differs from `stored`, but for those that
    cannot change the result.
    """
    filled = resolve(
        dataclasses.replace(
            asked,
            device=stored.device if asked.device == "auto" else asked.device,
            precision=stored.precision if asked.precision == "auto" else asked.precision,
            workers=stored.workers if asked.workers is None else asked.workers,
            image_size=stored.image_size if asked.may_enlarge else asked.image_size,
        ),
        division,
        _stored_start(run) if asked.init == stored.init else None,
    )
    optim = filled.optim
    if optim.rates:
        optim = dataclasses.replace(optim, lr=stored.optim.lr)
    if filled.probe and optim.accumulate == 1:
        optim = dataclasses.replace(optim, accumulate=stored.optim.accumulate)
    filled = dataclasses.replace(filled, optim=optim)
    if filled.steps is None and stored.steps is not None:
        every = filled.eval_every or stored.eval_every
        filled = with_steps(dataclasses.replace(filled, eval_every=every), stored.steps)
    changes = differences(filled, stored, free=False)
    if changes:
        raise UsageError(
            f"{run} was started with other settings of {', '.join(changes)}; "
            "give the same ones to resume, another --out, or --overwrite to start again"
        )
    return filled


@dataclasses.dataclass(frozen=True)
class Start:
    """The model of the weights that a run starts from."""

    spec: ModelSpec
    preprocess: PreprocessSpec


def _start(init: str, trust_pickle: bool) -> Start:
    file = describe_weights(init, trust_pickle=trust_pickle)
    return Start(file.spec, file.preprocess)


def _stored_start(run: Path) -> Start | None:
    try:
        values = json.loads((run / INIT).read_text(encoding="utf-8"))
        return Start(spec_from_dict(values["model"]), parse(PreprocessSpec, values["preprocess"]))
    except (OSError, ValueError, LookupError):
        return None


def resolve(spec: TrainSpec, division: Division, start: Start | None = None) -> TrainSpec:
    """Everything automatic but a length in time, made definite; `start` is what the weights of
    `init` are, if they need not be looked at.

    Raises `UsageError` if the model or the length is missing, the weights of `init` are of another
    model than the one named, or the model has no such option.
    """
    device = resolve_device(spec.device)
    dtype = resolve_precision(spec.precision, device)
    base, size, model = PreprocessSpec(), spec.image_size or (224,), spec.model
    if spec.init is not None:
        start = start or _start(spec.init, spec.trust_pickle)
        base, model, family = start.preprocess, variant_name(start.spec), type(start.spec)
        size = spec.image_size or start.spec.image_size
        if spec.model not in (None, model):
            raise UsageError(
                f"--init {spec.init} holds {model}, not {spec.model}; leave out --model, or use "
                "another --recipe"
            )
    elif spec.enlarge != 1:
        raise UsageError(
            "--enlarge compares resolutions by the features of weights; give some with --init, or "
            "use another --recipe"
        )
    elif spec.tuning.tune != "all":
        raise UsageError(
            f"--tune {spec.tuning.tune} keeps most weights as they are; give some with --init"
        )
    elif model is None:
        raise UsageError("no model given; use --model ViT-S/16, or --init WEIGHTS")
    else:
        family = model_family(model)
    pretrain = spec.pretrain
    if spec.self_supervised and pretrain.mask_rate is None:
        pretrain = dataclasses.replace(pretrain, mask_rate=RATES[spec.objective])
    spec = dataclasses.replace(
        spec,
        model=model,
        image_size=size,
        device=device.type,
        precision=str(dtype).removeprefix("torch."),
        workers=default_workers() if spec.workers is None else spec.workers,
        preprocess=parse(PreprocessOptions, to_dict(spec.preprocess.over(base))),
        options=fitting_options(spec, model, family),
        pretrain=pretrain,
    )
    steps, train_images = spec.steps, len(division["train"])
    if spec.epochs is not None:
        steps = max(1, round(spec.epochs * train_images / spec.batch_size))
    elif spec.images is not None:
        steps = max(1, round(spec.images / spec.batch_size))
    elif spec.time is not None:
        return spec
    elif steps is None:
        raise UsageError("no length given; use --epochs, --steps, --images or --time")
    return with_steps(spec, steps)


def fitting_options(spec: TrainSpec, model: str, family: type[ModelSpec]) -> ModelOptions:
    """The options that the model's family has. Those of the recipe that it lacks are left out: most
    recipes were written for ViT. Raises `UsageError` if one lacks that the recipe does not give."""
    usual = recipe_spec(spec.recipe, "").options.given() if spec.recipe else {}
    known = {field.name for field in dataclasses.fields(family)}
    kept: dict[str, Any] = {}
    for name, value in spec.options.given().items():
        if name in known:
            kept[name] = value
        elif usual.get(name) != value:
            fields = [f.name for f in dataclasses.fields(ModelOptions) if f.name in known]
            raise UsageError(f"{model} has no option {name!r}{nearest(name, fields)}")
    return ModelOptions(**kept)


def check_init_outlives(run: Path, spec: TrainSpec) -> None:
    """Raise `UsageError` if a run in `run` would overwrite the weights that it starts from."""
    if spec.init is not None and Path(spec.init).resolve().is_relative_to(run.resolve()):
        raise UsageError(
            f"--init {spec.init} lies in {run}, which the run would overwrite; give another --out"
        )


def with_steps(spec: TrainSpec, steps: int) -> TrainSpec:
    """The spec with its length in steps, and what depends on it."""
    eval_every = spec.eval_every or max(1, math.ceil(steps / 10))
    return dataclasses.replace(
        spec,
        steps=steps,
        eval_every=eval_every,
        checkpoint_every=spec.checkpoint_every or eval_every,
        log_every=spec.log_every or max(1, min(50, steps // 100)),
    )


def build_model(spec: TrainSpec, source: Source, *, quiet: bool = False) -> Model:
    """The model that a run starts from, a pure function of the resolved spec and the data. Raises
    `UsageError` if it has no such parts as are to be trained, or is not one for the objective. The
    log says what weights it comes from, unless `quiet`.

    A self-supervised one has no head, whatever the labels of the data.
    With the sigmoid loss a fresh model's head starts at a bias of -log K, so that every class
    begins improbable, as in the authors' public code: -10 for ImageNet-21k, -6.9 for ImageNet
    (big_vision, vit_i21k and vit_i1k).
    """
    torch.manual_seed(spec.seed)
    options: dict[str, Any] = spec.options.given() | {"probability": spec.optim.loss}
    classes = () if spec.self_supervised else source.classes
    count = len(classes)
    if spec.init is not None:
        model = transfer(
            spec.init,
            num_classes=count,
            image_size=spec.size,
            trust_pickle=spec.trust_pickle,
            quiet=quiet,
            **options,
        )
    else:
        model = create_model(spec.model or "", count, spec.size, source.channels, **options)
        if spec.optim.loss == "sigmoid" and model.head is not None:
            torch.nn.init.constant_(model.head.bias, -math.log(count))
    model.preprocess = spec.preprocess.over(model.preprocess)
    model.classes = classes
    trained_names(model, spec.tuning)  # raises before the run starts
    check_objective(spec, model.spec)
    return model


def open_division(run: Path | None, source: Source, spec: TrainSpec) -> Division:
    """The division saved with `run`, or without one that which the spec makes. Raises
    `PatchwordError` if there are labels to learn and nothing to tell apart."""
    if len(source.classes) < 2 and not spec.self_supervised:
        raise PatchwordError(
            f"{source.name} has one class ({', '.join(source.classes)}); give the folder above it, "
            "with a folder per class"
        )
    if run is not None:
        return load_division(run / SPLITS, source)
    data = spec.data
    division = divide(source, val=data.val_fraction, test=data.test_fraction, seed=spec.seed)
    if data.train_images is None:
        return division
    return division | {
        "train": drawn(source.labels, division["train"], data.train_images, spec.seed)
    }


def store(run: Path, spec: TrainSpec, source: Source, division: Division) -> None:
    """Write what a run is, `config.json` last: with it the run counts as started."""
    save_division(run / SPLITS, source, division)
    replace_text(run / "classes.json", json.dumps(list(source.classes), indent=0))
    replace_text(run / "environment.json", json.dumps(environment(source), indent=1))
    if spec.init is not None:
        start = _start(spec.init, spec.trust_pickle)
        values = {"model": spec_to_dict(start.spec), "preprocess": to_dict(start.preprocess)}
        replace_text(run / INIT, json.dumps(values, indent=1))
    replace_text(run / CONFIG, json.dumps(to_dict(spec), indent=1))


def environment(source: Source) -> dict[str, Any]:
    """Versions, threads, commit and data of this run; what the result may depend on."""
    return {
        "patchword": patchword.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "platform": platform.platform(),
        "processor": processor(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "data_fingerprint": source.fingerprint,
    }


def note_changes(run: Path, source: Source) -> None:
    """Say what is not as it was when the run started."""
    path = run / "environment.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    now = environment(source)
    if before.get("data_fingerprint") == source.size_fingerprint:  # of an earlier version
        del now["data_fingerprint"]
    changes = [
        f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]
    ]
    if changes:
        logger.warning(
            "not as when the run started, so it may not resume bit for bit: %s", "; ".join(changes)
        )


def _git(*arguments: str) -> str | None:
    """What git says of the checkout that patchword runs from, None if it is not in one."""
    command = ["git", "-C", os.fspath(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
