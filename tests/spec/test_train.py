"""Strict parsing, comparison and change of specs; every field is checked and read."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import patchword
from patchword.spec.data import AugmentSpec, DataSpec, PreprocessOptions
from patchword.spec.model import FAMILIES, PreprocessSpec, ViTSpec
from patchword.spec.parse import (
    PatchwordError,
    UsageError,
    changed,
    differences,
    nearest,
    parse,
    to_dict,
)
from patchword.spec.train import (
    ModelOptions,
    OptimSpec,
    PretrainSpec,
    TrainSpec,
    TuneSpec,
    seconds,
    with_length,
)

VIT: dict[str, Any] = {
    "depth": 2,
    "width": 24,
    "mlp_width": 48,
    "heads": 3,
    "patch_size": [4, 4],
    "image_size": [16, 16],
}

positive = st.integers(1, 10_000)
shares = st.floats(0, 0.99)
rates = st.floats(0, 1e3, allow_subnormal=False)


@st.composite
def vits(draw: st.DrawFn) -> ViTSpec:
    heads, patch = draw(st.integers(1, 8)), draw(st.tuples(st.integers(1, 32), st.integers(1, 32)))
    return ViTSpec(
        depth=draw(st.integers(1, 50)),
        width=4 * heads * draw(st.integers(2, 100)),
        mlp_width=draw(positive),
        heads=heads,
        patch_size=patch,
        image_size=(patch[0] * draw(st.integers(1, 9)), patch[1] * draw(st.integers(1, 9))),
        in_channels=draw(st.integers(1, 9)),
        num_classes=draw(st.integers(0, 30_000)),
        pool=draw(st.sampled_from(["token", "gap", "map"])),
        head=draw(st.sampled_from(["linear", "mlp"])),
        position=draw(st.sampled_from(["learned-1d", "sincos2d", "none"])),
        dropout=draw(shares),
        drop_path=draw(shares),
        layer_scale=draw(st.none() | shares),
        registers=draw(st.integers(0, 8)),
        qk_norm=draw(st.booleans()),
        probability=draw(st.sampled_from(["softmax", "sigmoid"])),
    )


@st.composite
def trainings(draw: st.DrawFn) -> TrainSpec:
    parts = draw(st.integers(1, 8))
    return TrainSpec(
        source=draw(st.text()),
        recipe=draw(st.none() | st.text()),
        image_size=draw(st.none() | st.lists(positive, min_size=1, max_size=2).map(tuple)),
        steps=draw(st.none() | positive),
        epochs=draw(st.none() | st.floats(0.1, 1000)),
        time=draw(st.none() | st.sampled_from(["30m", "2h", "90s"])),
        batch_size=parts * draw(st.integers(1, 99)),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        precision=draw(st.sampled_from(["auto", "float32", "bfloat16"])),
        workers=draw(st.none() | st.integers(0, 9)),
        options=ModelOptions(
            depth=draw(st.none() | positive), pool=draw(st.sampled_from([None, "gap"]))
        ),
        preprocess=PreprocessOptions(mean=(0.1, 0.2), crop_fraction=draw(st.none() | shares)),
        data=DataSpec(val_fraction=draw(st.floats(0, 0.4))),
        augment=AugmentSpec(flip=draw(st.booleans()), mixup=draw(rates)),
        optim=OptimSpec(lr=draw(rates), parts=parts, beta2=draw(shares)),
    )


@given(vits() | trainings())
def test_specs_survive_json(spec: ViTSpec | TrainSpec):
    assert parse(type(spec), json.loads(json.dumps(to_dict(spec)))) == spec
    assert differences(spec, parse(type(spec), to_dict(spec))) == []


@given(vits())
def test_derived_sizes(spec: ViTSpec):
    rows, columns = spec.grid
    assert (rows * spec.patch_size[0], columns * spec.patch_size[1]) == spec.image_size
    assert spec.prefix == spec.registers + (1 if spec.pool == "token" else 0)


def test_parsed_types_are_exact():
    spec = parse(ViTSpec, VIT | {"dropout": 0})
    assert type(spec.dropout) is float
    assert spec.image_size == (16, 16)
    assert parse(TrainSpec, {"source": "x", "epochs": 3}).epochs == 3.0
    assert parse(TrainSpec, {"source": "x", "image_size": [32, 48]}).size == (32, 48)
    assert parse(TrainSpec, {"source": "x", "image_size": [32]}).size == (32, 32)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"sorce": "x"}, "unknown key 'sorce'; did you mean source"),
        ({"source": "x", "optim": {"learning_rate": 1}}, "unknown key 'optim.learning_rate'"),
        ({"source": "x", "augment": {"mixpu": 1}}, "did you mean mixup"),
        ({}, "missing key source"),
        ([], "TrainSpec must be an object, not []"),
        ("digits", "must be an object"),
        ({"source": "x", "optim": None}, "optim must be an object, not None"),
        ({"source": None}, "source must be str, not None"),
        ({"source": "x", "steps": "10"}, "steps must be int, not '10'"),
        ({"source": "x", "steps": 10.0}, "steps must be int, not 10.0"),
        ({"source": "x", "steps": True}, "steps must be int, not True"),
        ({"source": "x", "batch_size": None}, "batch_size must be int, not None"),
        ({"source": "x", "epochs": "many"}, "epochs must be float, not 'many'"),
        ({"source": "x", "compile": 1}, "compile must be bool, not 1"),
        ({"source": "x", "device": "gpu"}, "device is 'gpu'; did you mean cpu"),
        ({"source": "x", "device": 3}, "device must be"),
        ({"source": "x", "image_size": ["a"]}, "image_size[0] must be int, not 'a'"),
        ({"source": "x", "image_size": {}}, "image_size must be"),
        ({"source": "x", "augment": {"crop_area": [0.1]}}, "augment.crop_area must be"),
        ({"source": "x", "preprocess": {"mean": [0.5, None, 0.5]}}, "preprocess.mean[1] must be"),
        ({"source": "x", "optim": {"loss": "softmx"}}, "optim.loss is 'softmx'; did you mean"),
    ],
)
def test_bad_json_is_named(data: Any, message: str):
    with pytest.raises(UsageError) as raised:
        parse(TrainSpec, data)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        *[(ViTSpec, {name: 0}) for name in ("depth", "width", "mlp_width", "heads", "in_channels")],
        *[(ViTSpec, {name: -1}) for name in ("num_classes", "registers")],
        *[(ViTSpec, {n: v}) for n in ("dropout", "drop_path") for v in (-0.1, 1.0, NAN)],
        *[(ViTSpec, {"norm_eps": value}) for value in (0.0, -1e-6, NAN, INF)],
        (ViTSpec, {"layer_scale": INF}),
        *[(TrainSpec, {"seed": seed}) for seed in (2**63, -(2**63) - 1)],
        (ViTSpec, {"heads": 5}),
        (ViTSpec, {"image_size": (16, 18)}),
        (ViTSpec, {"image_size": (0, 16)}),
        (ViTSpec, {"patch_size": (0, 4)}),
        (ViTSpec, {"patch_size": (-4, 4)}),
        (ViTSpec, {"width": 6, "position": "sincos2d"}),
        (PreprocessSpec, {"mean": (0.5,)}),
        (PreprocessSpec, {"std": (0.5, 0.0, 0.5)}),
        (PreprocessSpec, {"std": (0.5, INF, 0.5)}),
        (PreprocessSpec, {"mean": (0.5, NAN, 0.5)}),
        (PreprocessSpec, {"mean": (), "std": ()}),
        *[(PreprocessSpec, {"crop_fraction": value}) for value in (0.0, 1.1, NAN)],
        *[(DataSpec, {n: v}) for n in ("val_fraction", "test_fraction") for v in (-0.1, 1.0, NAN)],
        (DataSpec, {"val_fraction": 0.5, "test_fraction": 0.5}),
        (DataSpec, {"train_images": 0}),
        *[(PretrainSpec, {"mask_rate": value}) for value in (0.0, 1.0, -0.1, NAN)],
        *[(PretrainSpec, {"decoder_width": value}) for value in (4, 18, 20)],
        *[(PretrainSpec, {f"decoder_{name}": 0}) for name in ("depth", "width", "heads")],
        (PretrainSpec, {"probe_images": -1}),
        *[(AugmentSpec, {"crop_area": value}) for value in ((0.0, 1.0), (0.6, 0.5), (0.5, 1.1))],
        *[(AugmentSpec, {"crop_aspect": value}) for value in ((0.0, 1.0), (2.0, 1.0))],
        *[
            (AugmentSpec, {name: value})
            for name in ("rotate", "scale", "translate", "shear", "mixup", "cutmix")
            for value in (-1.0, NAN, INF)
        ],
        (AugmentSpec, {"pad": -1}),
        (AugmentSpec, {"scale": 1.0}),
        (AugmentSpec, {"erasing": 1.5}),
        (AugmentSpec, {"crop_aspect": (1.0, INF)}),
        (AugmentSpec, {"randaugment_layers": -1}),
        *[(AugmentSpec, {"randaugment_magnitude": value}) for value in (-1.0, 31.0, NAN)],
        *[
            (OptimSpec, {name: value})
            for name in ("lr", "warmup", "cooldown", "final_lr", "weight_decay", "clip")
            for value in (-1.0, NAN, INF)
        ],
        *[
            (OptimSpec, {name: value})
            for name in ("beta1", "beta2", "momentum", "label_smoothing", "average")
            for value in (-0.1, 1.0, NAN)
        ],
        (OptimSpec, {"parts": 0}),
        (OptimSpec, {"rsqrt_timescale": 0}),
        *[(OptimSpec, {"layer_decay": value}) for value in (0.0, 1.1, NAN)],
        (TuneSpec, {"last_blocks": -1}),
        (TuneSpec, {"lora_rank": 0}),
        *[(TuneSpec, {"lora_alpha": value}) for value in (0.0, NAN, INF)],
        *[
            (TrainSpec, {name: 0})
            for name in ("epochs", "images", "eval_every", "checkpoint_every", "log_every")
        ],
        (TrainSpec, {"steps": -1}),
        (OptimSpec, {"rates": (1e-3, 0.0)}),
        *[(TrainSpec, {"epochs": value}) for value in (NAN, INF)],
        (TrainSpec, {"batch_size": 0}),
        (TrainSpec, {"keep": 0}),
        (TrainSpec, {"workers": -1}),
        (TrainSpec, {"batch_size": 10, "optim": OptimSpec(parts=3)}),
        (TrainSpec, {"time": "soon"}),
        (TrainSpec, {"image_size": ()}),
        (TrainSpec, {"image_size": (1, 2, 3)}),
        (TrainSpec, {"image_size": (0,)}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_values_out_of_range_are_refused(cls: type, fields: dict[str, Any]):
    base: dict[str, Any] = {}
    if cls is ViTSpec:
        base = VIT | {"patch_size": (4, 4), "image_size": (16, 16)}
    if cls is TrainSpec:
        base = {"source": "x"}
    cls(**base)
    with pytest.raises(UsageError) as raised:
        cls(**(base | fields))
    named = " ".join(fields).replace("_size", "").replace("patch", "image")
    assert any(word in str(raised.value) for word in (*fields, named, "left to train"))


def test_specs_are_frozen_and_keyword_only():
    for cls in (ViTSpec, PreprocessSpec, DataSpec, AugmentSpec, OptimSpec, ModelOptions, TrainSpec):
        assert all(f.kw_only for f in dataclasses.fields(cls))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(OptimSpec(), "lr", 1.0)  # noqa: B010


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("2d", 172_800), ("45", 45), ("0.5", 0.5)],
)
def test_seconds(text: str, wanted: float):
    assert seconds(text) == wanted


@pytest.mark.parametrize("text", ["", "m", "0s", "-3m", "nan", "inf", "infh", "3 weeks", "1h30m"])
def test_no_seconds(text: str):
    with pytest.raises(UsageError, match="is no time; write 90s, 30m or 2h"):
        seconds(text)


@given(st.text(max_size=9), st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=20))
def test_nearest_names_some_of_the_options(name: str, options: list[str]):
    found = nearest(name, options)
    assert any(option in found for option in options)
    if name in options:
        assert f"did you mean {name}" in found


def test_nearest_ignores_case_and_gives_up_politely():
    assert nearest("VIT", ["ViT", "vit"]) == "; did you mean ViT, vit?"
    assert nearest("zzz", ["a", "b"]) == "; valid: a, b"
    assert nearest("zzz", map(str, range(100))).endswith(", ...")


def test_differences_name_the_fields():
    base = TrainSpec(source="x")
    other = dataclasses.replace(
        base, keep=5, seed=1, optim=OptimSpec(lr=1.0), workers=3, augment=AugmentSpec(pad=2)
    )
    assert differences(base, other) == ["seed", "keep", "workers", "augment.pad", "optim.lr"]
    assert differences(base, other, free=False) == ["seed", "augment.pad", "optim.lr"]
    free = {f.name for f in dataclasses.fields(TrainSpec) if f.metadata.get("free")}
    assert free == {
        "checkpoint_every",
        "keep",
        "workers",
        "on_nan",
        "on_save_error",
        "tensorboard",
        "trust_pickle",
    }


def test_changed_finds_names_in_groups():
    spec = changed(TrainSpec(source="x"), lr=0.5, steps=7, mixup=1, depth=3, image_size=(8, 8))
    assert spec.optim.lr == 0.5
    assert spec.steps == 7
    assert spec.augment.mixup == 1.0
    assert spec.options.given() == {"depth": 3}
    assert spec.image_size == (8, 8)
    with pytest.raises(UsageError, match="unknown setting 'lrr'; did you mean lr"):
        changed(spec, lrr=1)
    with pytest.raises(UsageError, match="lr must be float"):
        changed(spec, lr="fast")


def test_names_within_the_groups_are_unique():
    """`changed` and the flags find them without their group."""
    names = [f.name for f in dataclasses.fields(TrainSpec)]
    for group in (
        ModelOptions,
        PreprocessSpec,
        DataSpec,
        AugmentSpec,
        OptimSpec,
        TuneSpec,
        PretrainSpec,
    ):
        names += [f.name for f in dataclasses.fields(group)]
    assert len(set(names)) == len(names)


def test_one_length_replaces_another():
    base = TrainSpec(source="x", epochs=90)
    assert with_length(base, base) == base
    for name, value in (("steps", 5), ("images", 10), ("time", "3m")):
        spec = with_length(dataclasses.replace(base, **{name: value}), base)
        given = {n: getattr(spec, n) for n in ("steps", "epochs", "images", "time")}
        assert {n: v for n, v in given.items() if v is not None} == {name: value}
    with pytest.raises(UsageError, match="--steps and --time both set the length"):
        with_length(dataclasses.replace(base, steps=5, time="1m"), base)


SRC = Path(patchword.__file__).parent
READERS = {
    ViTSpec: ["models"],
    PreprocessSpec: ["data"],
    DataSpec: ["data", "run"],
    AugmentSpec: ["data"],
    OptimSpec: ["training", "objectives", "run"],
    TuneSpec: ["training"],
    PretrainSpec: ["objectives", "run"],
    TrainSpec: ["training", "objectives", "run"],
}


@pytest.mark.parametrize("cls", READERS, ids=lambda cls: cls.__name__)
def test_every_field_is_read_where_it_belongs(cls: type):
    """So that no key of a config is silently ignored."""
    read: set[str] = set()
    for folder in READERS[cls]:
        for file in (SRC / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    read.add(node.attr)
    # `recipe` says where the settings come from; the command line reads it
    unread = {f.name for f in dataclasses.fields(cls)} - read - {"recipe"}
    # probability: read by whoever turns logits into probabilities
    assert unread <= ({"probability"} if cls is ViTSpec else set())


def test_model_options_are_fields_of_a_family():
    """And of the type of one."""
    types: dict[str, set[str]] = {}
    for field in (f for family in FAMILIES.values() for f in dataclasses.fields(family)):
        types.setdefault(field.name, set()).add(str(field.type).removesuffix(" | None"))
    for option in dataclasses.fields(ModelOptions):
        assert str(option.type).removesuffix(" | None") in types[option.name]
    assert ModelOptions().given() == {}
    assert ModelOptions(dropout=0.0, qk_norm=False).given() == {"dropout": 0.0, "qk_norm": False}


@pytest.mark.parametrize("module", ["spec.train", "training.recipes", "weights.pretrained"])
def test_import_without_torch(module: str):
    code = (
        f"import patchword.{module}, sys; assert not {{'torch', 'numpy', 'PIL'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_usage_errors_are_value_errors():
    assert issubclass(UsageError, PatchwordError)
    assert issubclass(PatchwordError, ValueError)
