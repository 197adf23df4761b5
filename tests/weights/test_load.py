"""Models from weight files: other resolutions, transfer, foreign formats, what was found."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from patchword import Model, PatchwordError, UsageError, create_model, load_model, save_model
from patchword.models.position import resample_position_embedding
from patchword.spec.model import ViTSpec
from patchword.weights.load import describe_weights, read_weights, transfer

Make = Callable[..., Model]
Same = Callable[[Model, Model], bool]


# Another resolution ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [48, (16, 40), (64, 32)])
@pytest.mark.parametrize("options", [{}, {"pool": "gap", "registers": 2}], ids=str)
def test_other_resolutions_resample_and_say_so(
    tmp_path: Path,
    size: Any,
    options: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    scattered: Make,
):
    model = scattered(**options)
    path = save_model(model, tmp_path / "m.safetensors")
    with caplog.at_level(logging.WARNING, "patchword"):
        loaded = load_model(path, image_size=size)
    pair = (size, size) if isinstance(size, int) else size
    assert loaded.spec.image_size == pair
    assert loaded(torch.zeros(1, 3, *pair)).shape == (1, 4)
    rows, columns = pair[0] // 8, pair[1] // 8
    assert f"position table resampled from 4x4 to {rows}x{columns} patches" in caplog.text
    assert str(path) in caplog.text
    before, after = model.state_dict(), loaded.state_dict()
    wanted = resample_position_embedding(before["positions.0.table"], (4, 4), (rows, columns))
    assert torch.equal(after["positions.0.table"], wanted)
    assert all(torch.equal(before[n], after[n]) for n in before if n != "positions.0.table")


def test_the_same_resolution_changes_and_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, scattered: Make, same: Same
):
    model = scattered()
    path = save_model(model, tmp_path / "m.safetensors")
    with caplog.at_level(logging.INFO, "patchword"):
        assert same(load_model(path, image_size=32), model)
        assert same(load_model(path, image_size=(32, 32)), model)
    assert caplog.text == ""


def test_fixed_tables_are_computed_for_the_new_grid(tmp_path: Path, scattered: Make):
    path = save_model(scattered(position="sincos2d"), tmp_path / "m.safetensors")
    loaded = load_model(path, image_size=(16, 48))
    fresh = create_model("ViT-mu/8", 4, (16, 48), position="sincos2d")
    ours, theirs = dict(loaded.named_buffers()), dict(fresh.named_buffers())
    assert torch.equal(ours["positions.0.table"], theirs["positions.0.table"])


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path, scattered: Make):
    path = save_model(scattered(), tmp_path / "m.safetensors")
    for size in (33, (32, 12), 0):
        with pytest.raises(UsageError, match=r"not a multiple of the patch|must be at least 1"):
            load_model(path, image_size=size)


# Transfer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"head": "mlp"}, {"pool": "gap", "registers": 2}, {"pool": "map"}], ids=str
)
def test_transfer_keeps_the_body_and_replaces_the_head(
    tmp_path: Path, options: dict[str, Any], caplog: pytest.LogCaptureFixture, scattered: Make
):
    model = scattered(**options)
    path = save_model(model, tmp_path / "m.safetensors")
    with caplog.at_level(logging.WARNING, "patchword"):
        tuned = transfer(path, num_classes=9, image_size=(48, 32), dropout=0.1)
    assert "resampled from 4x4 to 6x4" in caplog.text
    changes = {"num_classes": 9, "dropout": 0.1, "head": "linear", "image_size": (48, 32)}
    assert vars(tuned.spec) == vars(model.spec) | changes
    assert not any(name.startswith("pre_logits") for name in tuned.state_dict())
    assert tuned.classes == ()
    assert tuned.preprocess == model.preprocess
    before, after = model.state_dict(), tuned.state_dict()
    assert not after["head.weight"].any()
    assert not after["head.bias"].any()
    body = {n for n in before if not n.startswith(("head.", "pre_logits.", "positions.0.table"))}
    assert {n for n in after if not n.startswith(("head.", "positions.0.table"))} == body
    assert all(torch.equal(before[name], after[name]) for name in body)
    wanted = resample_position_embedding(before["positions.0.table"], (4, 4), (6, 4))
    assert torch.equal(after["positions.0.table"], wanted)
    assert not tuned(torch.randn(1, 3, 48, 32)).any()


def test_transfer_of_features_without_a_head(tmp_path: Path):
    path = save_model(create_model("ViT-mu/8", 0, 32), tmp_path / "m.safetensors")
    tuned = transfer(path, num_classes=3, image_size=(32, 32))
    assert tuned(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_transfer_refuses_what_changes_the_body(tmp_path: Path, scattered: Make):
    path = save_model(scattered(), tmp_path / "m.safetensors")
    with pytest.raises(PatchwordError, match=r"patch_embedding\.weight is"):
        transfer(path, num_classes=3, image_size=(32, 32), in_channels=1)
    cases: list[dict[str, Any]] = [
        {"depth": 2},
        {"registers": 1},
        {"width": 64},
        {"position": "none"},
    ]
    for options in cases:
        with pytest.raises(PatchwordError, match=r"missing|unexpected|not \["):
            transfer(path, num_classes=3, image_size=(32, 32), **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("BiT-R50x1", {"layers": (1, 1, 1, 1)}),
        ("Mixer-S/16", {"depth": 1, "width": 32}),
        ("ViT-mu/8", {"distillation": "head"}),
        ("R+ViT-Ti/16", {"depth": 1}),
    ],
)
def test_transfer_of_every_family(
    tmp_path: Path, name: str, options: dict[str, Any], scattered: Make
):
    model = scattered(name, 32, **options)
    path = save_model(model, tmp_path / "m.safetensors")
    tuned = transfer(path, num_classes=9, image_size=(32, 32))
    assert not tuned(torch.randn(2, 3, 32, 32)).any()
    assert all(p.requires_grad for p in tuned.parameters())
    before, after = model.state_dict(), tuned.state_dict()
    assert before.keys() == after.keys()
    for key, value in after.items():
        fresh = key.startswith(("head.", "distillation_head."))
        assert not value.any() if fresh else torch.equal(value, before[key])


@pytest.mark.parametrize(("format", "name"), [("google-npz", "m.npz"), ("torchvision", "m.pth")])
def test_a_narrow_hidden_layer_of_the_head_is_kept_and_replaced_by_transfer(
    tmp_path: Path, scattered: Make, same: Same, format: str, name: str
):
    activation = "gelu_tanh" if format == "google-npz" else "gelu"
    model = scattered(head="mlp", head_width=7, activation=activation)
    path = save_model(model, tmp_path / "m.safetensors")
    assert same(load_model(path), model)
    foreign = save_model(model, tmp_path / name, format=format)
    hints: dict[str, Any] = {} if format == "google-npz" else {"heads": 2}
    loaded = load_model(foreign, trust_pickle=True, **hints)
    assert loaded.spec == model.spec
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-5)
    tuned = transfer(path, num_classes=3, image_size=(32, 32))
    assert isinstance(tuned.spec, ViTSpec)
    assert (tuned.spec.head, tuned.spec.head_width) == ("linear", None)
    for refusing in ("timm", "huggingface"):
        with pytest.raises(PatchwordError, match=r"head mlp|hidden layer in the head"):
            save_model(model, tmp_path / refusing, format=refusing)


def test_a_fresh_hidden_layer_of_the_head_is_drawn(tmp_path: Path, scattered: Make):
    path = save_model(scattered(), tmp_path / "m.safetensors")
    tuned = transfer(path, num_classes=3, image_size=(32, 32), head="mlp").state_dict()
    assert tuned["pre_logits.weight"].std().item() == pytest.approx(32**-0.5, rel=0.15)
    assert not tuned["pre_logits.bias"].any()
    assert not tuned["head.weight"].any()


def test_a_mixer_keeps_its_size(tmp_path: Path, scattered: Make):
    path = save_model(scattered("Mixer-S/16", 32, depth=1), tmp_path / "m.safetensors")
    with pytest.raises(PatchwordError, match="images of its own size only, 32 x 32"):
        load_model(path, image_size=64)


# Foreign formats ---------------------------------------------------------------------------------


def test_what_was_found_is_said(tmp_path: Path, scattered: Make, caplog: pytest.LogCaptureFixture):
    model = scattered(heads=2, width=64)
    path = save_model(model, tmp_path / "m.safetensors", format="timm")
    with caplog.at_level(logging.INFO, "patchword"):
        loaded = load_model(path, heads=2)
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert line.startswith(f"{path}: timm weights of ViT-1x64/8, 32x32 px, 4 classes; ")
    assert loaded.spec == model.spec
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images), model(images), rtol=1e-5, atol=1e-5)
    file = describe_weights(path, heads=2)
    assert (file.format, file.model, file.spec) == ("timm", "ViT-1x64/8", model.spec)
    assert file.notes == read_weights(path, heads=2)[1].notes
    assert str(file) == line


def test_hints_win_and_unknown_ones_are_named(tmp_path: Path, scattered: Make):
    path = save_model(scattered(), tmp_path / "m.safetensors", format="timm")
    cases: list[dict[str, Any]] = [{"heads": 4}, {"activation": "gelu_tanh"}, {"norm_eps": 1e-5}]
    for hints in cases:
        spec = vars(load_model(path, **hints).spec)
        assert hints.items() <= spec.items()
    with pytest.raises(UsageError, match="unknown key 'head_count'; did you mean"):
        load_model(path, head_count=2)
    with pytest.raises(UsageError, match="width 32 is not a multiple of heads 3"):
        load_model(path, heads=3)
    ours = save_model(scattered(), tmp_path / "ours.safetensors")
    with pytest.raises(UsageError, match="itself says its heads; leave that out"):
        load_model(ours, heads=2)


def test_image_sizes_that_are_not_square(tmp_path: Path, scattered: Make):
    """A bare file does not tell them: the size that is asked for is, where the table has so many
    entries."""
    model = scattered(size=(16, 40))
    path = save_model(model, tmp_path / "m.safetensors", format="timm")
    with pytest.raises(PatchwordError, match="for no square image; say which"):
        load_model(path, heads=2)
    loaded = load_model(path, heads=2, image_size=(16, 40))
    assert loaded.spec.image_size == (16, 40)
    images = torch.randn(2, 3, 16, 40)
    torch.testing.assert_close(loaded(images), model(images), rtol=1e-5, atol=1e-5)


def test_foreign_tables_are_resampled(
    tmp_path: Path, scattered: Make, caplog: pytest.LogCaptureFixture
):
    model = scattered()
    folder = save_model(model, tmp_path / "hf", format="huggingface")
    loaded = load_model(folder, image_size=48)
    assert "position table resampled from 4x4 to 6x6 patches for 48x48 px" in caplog.text
    wanted = resample_position_embedding(model.state_dict()["positions.0.table"], (4, 4), (6, 6))
    torch.testing.assert_close(loaded.state_dict()["positions.0.table"], wanted)
    tuned = transfer(folder, num_classes=9, image_size=(48, 48))
    torch.testing.assert_close(tuned.state_dict()["positions.0.table"], wanted)


def test_half_precision_is_read_as_float32(tmp_path: Path, scattered: Make):
    path = save_model(scattered(), tmp_path / "m.safetensors", format="timm")
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        tensors = {name: value.to(dtype) for name, value in load_file(path).items()}
        save_file(tensors, tmp_path / "other.safetensors")
        loaded = load_model(tmp_path / "other.safetensors", heads=2).state_dict()
        assert all(value.dtype is torch.float32 for value in loaded.values())
        assert torch.equal(loaded["norm.weight"], tensors["norm.weight"].float())


def test_wrong_foreign_tensors_are_named(tmp_path: Path, scattered: Make):
    path = save_model(scattered(), tmp_path / "m.safetensors", format="timm")
    tensors = load_file(path)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"norm.bias": None}, r"norm\.bias is missing"),
        ({"extra.thing": torch.zeros(1)}, r"extra\.thing is unexpected"),
        ({"norm.bias": torch.zeros(9)}, r"norm\.bias is \[9\]"),
        ({"norm.bias": torch.full((32,), torch.nan)}, r"norm\.bias has values that are not finite"),
        ({"norm.bias": torch.full((32,), torch.inf)}, r"norm\.bias has values that are not finite"),
        (
            {"norm.bias": torch.full((32,), 1e300, dtype=torch.float64)},
            r"norm\.bias has values that are not fin",
        ),
        (
            {"norm.bias": torch.zeros(32, dtype=torch.int64)},
            r"norm\.bias is torch\.int64, not float",
        ),
    ]
    for changes, message in cases:
        values = {n: v for n, v in (tensors | changes).items() if v is not None}
        save_file(values, path)
        with pytest.raises(PatchwordError, match=message) as raised:
            load_model(path, heads=2)
        assert str(raised.value).startswith(str(path))


def test_values_that_are_not_finite_are_refused_in_our_own_files_too(
    tmp_path: Path, scattered: Make
):
    model = scattered()
    with torch.no_grad():
        dict(model.named_parameters())["norm.weight"][3] = torch.nan
    path = save_model(model, tmp_path / "m.safetensors")
    with pytest.raises(PatchwordError, match=r"norm\.weight has values that are not finite"):
        load_model(path)


def test_unknown_names_show_some_and_the_known_formats(tmp_path: Path):
    path = tmp_path / "other.safetensors"
    save_file({"lstm.w": torch.zeros(3), "lstm.b": torch.zeros(3)}, path)
    with pytest.raises(PatchwordError, match=r"no format that patchword knows.*lstm\.b, lstm\.w"):
        load_model(path)


def test_describing_reads_no_tensor(tmp_path: Path, scattered: Make):
    """Values that are not finite go unnoticed."""
    model = scattered(activation="gelu_tanh", heads=2)
    path = save_model(model, tmp_path / "m.npz", format="google-npz")
    assert describe_weights(path).spec == model.spec
    timm = save_model(model, tmp_path / "timm.safetensors", format="timm")
    tensors = {n: torch.full_like(v, torch.nan) for n, v in load_file(timm).items()}
    save_file(tensors, tmp_path / "nan.safetensors")
    assert describe_weights(tmp_path / "nan.safetensors", heads=2).model == "ViT-mu/8"


def test_loading_does_not_wait_for_the_compiler(tmp_path: Path, scattered: Make):
    """Importing it takes longer than a small model."""
    path = save_model(scattered(), tmp_path / "m.safetensors")
    code = (
        "import sys, patchword; "
        f"patchword.load_model({str(path)!r}); "
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout == "False\n"
