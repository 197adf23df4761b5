"""`patchword inspect`: which files it writes, and that the summary holds what the arrays give."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from patchword import PatchwordError, UsageError, create_model, load_model, save_model
from patchword.commands.figure_folder import file_names, numbers
from patchword.commands.inspecting import inspect_model
from patchword.data.registry import open_source
from patchword.data.transforms import EvalTransform, to_input
from patchword.inspection.attention import (
    attention_distance,
    attention_entropy,
    attention_maps,
    rollout,
    uniform_distance,
)
from patchword.inspection.embedding import embedding_filters, position_similarity
from patchword.inspection.tokens import token_components
from patchword.models.model import Model

Command = Callable[..., tuple[int, str, str]]
AsJson = Callable[..., Any]
MakePhotos = Callable[..., Path]
CLASSES = ("blue", "green", "red")


def perturbed(model: Model) -> Model:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.classes = CLASSES[: model.spec.num_classes]
    return model.eval()


def small(**options: Any) -> Model:
    return perturbed(create_model("ViT-mu/8", 3, (16, 24), depth=2, **options))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A ViT of two layers for images of 2 x 3 patches."""
    return save_model(small(), tmp_path / "m.safetensors")


@pytest.fixture(scope="module")
def pictures(make_photos: MakePhotos, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 5 pictures."""
    return make_photos(tmp_path_factory.mktemp("inspect") / "photos", 5)


def normalised(model: Model, folder: Path, indices: list[int]) -> torch.Tensor:
    source = open_source(str(folder))
    spec = model.spec
    transform = EvalTransform(spec.image_size, spec.in_channels, model.preprocess)
    images = np.stack([transform(source.read(i)) for i in indices])
    return to_input(torch.from_numpy(images), model.preprocess)


def whole(path: Path) -> bool:
    """Whether a PNG decodes, a PDF ends."""
    if path.suffix == ".pdf":
        content = path.read_bytes()
        return content.startswith(b"%PDF-") and content.rstrip().endswith(b"%%EOF")
    with Image.open(path) as image:
        image.load()
        return image.format == "PNG" and min(image.size) > 100


@pytest.mark.parametrize("kind", ["png", "pdf"])
def test_every_figure_is_written_and_whole(
    kind: str,
    weights: Path,
    pictures: Path,
    tmp_path: Path,
    command: Command,
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level("INFO")
    out = tmp_path / "out"
    code, said, err = command(
        *("inspect", weights, pictures / "red", pictures / "blue/00.jpg"),
        *("--data", pictures, "--out", out, "--format", kind, "--pictures", 2, "--workers", 0),
    )
    assert code == 0, err
    single = ["filters", "position_similarity", "attention_distance", "embedding"]
    each = [f"{f}/{name}" for f in ("rollout", "attention", "tokens") for name in ("00", "01")]
    drawn = [out / f"{name}.{kind}" for name in (*single, *each)]
    assert all(map(whole, drawn))
    summary = json.loads((out / "summary.json").read_text())
    written = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert written == set(summary["files"])
    assert len(written) == len(drawn) + 2  # the CSV, the summary
    assert "over 6 images" in said
    assert "15 images of all" in said
    assert "same row" in said
    assert {record.name for record in caplog.records} <= {"patchword"}


def test_the_summary_holds_what_the_arrays_give(
    weights: Path, pictures: Path, tmp_path: Path, as_json: AsJson
):
    out = tmp_path / "out"
    found = as_json(
        *("inspect", weights, pictures, "--out", out, "--query", "1,2", "--batch-size", 4),
        *("--pictures", 3, "--workers", 0),
    )
    assert found == json.loads((out / "summary.json").read_text())
    model: Any = load_model(weights)
    every = normalised(model, pictures, list(range(15)))
    images = every[:3]
    close: Any = {"rtol": 2e-3, "atol": 2e-5}

    distance, entropy = attention_distance(model, every), attention_entropy(model, every)
    row = found["attention_distance"]
    np.testing.assert_allclose(row["pixels"], distance, **close)
    np.testing.assert_allclose(row["entropy"], entropy, **close)
    np.testing.assert_allclose(row["layer_means"], distance.mean(1), **close)
    assert row["uniform"] == pytest.approx(uniform_distance(model.spec), rel=1e-5)
    assert row["correlation_with_depth"] == (1 if np.diff(distance.mean(1)) > 0 else -1)
    assert row["images"] == found["images"] == 15
    with (out / "attention_distance.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["layer"]), int(r["head"])) for r in rows] == list(np.ndindex(2, 2))
    np.testing.assert_allclose(
        [float(r["distance_pixels"]) for r in rows], distance.ravel(), **close
    )
    np.testing.assert_allclose([float(r["entropy_nats"]) for r in rows], entropy.ravel(), **close)

    filters, explained = embedding_filters(model.patch_embedding.weight, (8, 8), 3)
    np.testing.assert_allclose(found["filters"]["explained"], explained, **close)
    np.testing.assert_allclose(found["filters"]["components"], filters, **close)
    similarity = position_similarity(model.positions[0]()[0, 1:], (2, 3))
    np.testing.assert_allclose(found["position_similarity"]["values"], similarity, **close)

    maps, masks = attention_maps(model, images, (1, 2)), rollout(model, images)
    with torch.no_grad():
        tokens, grid = model.features(images)[1:]
    colours = token_components(tokens, grid)
    assert found["attention"]["query"] == [1, 2]
    assert list(found["rollout"]["pictures"]) == ["00", "01", "02"]
    for k, name in enumerate(("00", "01", "02")):
        shown = {f: found[f]["pictures"][name] for f in ("rollout", "attention", "tokens")}
        assert shown["rollout"]["image"].endswith(name + (".png" if k % 2 else ".jpg"))
        np.testing.assert_allclose(shown["rollout"]["mask"], masks[k], **close)
        np.testing.assert_allclose(shown["attention"]["maps"], maps[k], **close)
        np.testing.assert_allclose(shown["tokens"]["colours"], colours[k], rtol=0, atol=2e-3)
        share = maps[k] / maps[k].sum((2, 3), keepdims=True)
        wanted = -(share * np.log(share)).sum((2, 3))
        np.testing.assert_allclose(shown["attention"]["entropy"], wanted, **close)


def test_the_map_lists_each_mistake_with_its_neighbours(
    weights: Path, pictures: Path, tmp_path: Path, as_json: AsJson
):
    found = as_json("inspect", weights, "--data", pictures, "--out", tmp_path / "o", "--workers", 0)
    assert found["images"] == 15  # those of the data
    row, model = found["embedding"], load_model(weights)
    source = open_source(str(pictures))
    with torch.no_grad():
        pooled = model.pooled_features(normalised(model, pictures, list(range(15))))
        sure, said = (best.numpy() for best in model.classify(pooled).softmax(1).max(1))
    unit = torch.nn.functional.normalize(pooled.double())
    likeness = (unit @ unit.T).fill_diagonal_(-2)
    wrong = np.flatnonzero(said != source.labels)
    assert row["mistakes_by"] == "head"
    surest_first = wrong[np.argsort(-sure[wrong])].tolist()
    assert [m["image"] for m in row["mistakes"]] == [source.keys[i] for i in surest_first]
    assert len(wrong) > 1
    for mistake in row["mistakes"]:
        at = list(source.keys).index(mistake["image"])
        assert mistake["predicted"] == CLASSES[said[at]]
        assert mistake["label"] == CLASSES[source.labels[at]] != mistake["predicted"]
        nearest = likeness[at].topk(5)
        cosines = [n["cosine"] for n in mistake["neighbours"]]
        np.testing.assert_allclose(cosines, nearest.values, atol=1e-4)
        assert mistake["neighbours"][0]["image"].startswith(mistake["neighbours"][0]["label"])
    assert np.shape(row["points"]) == (15, 2)
    assert row["labels"] == source.labels.tolist()
    same = source.labels[likeness.argmax(1).numpy()] == source.labels
    assert row["nearest_of_same_class"] == pytest.approx(same.mean(), abs=1e-4)


def test_models_that_do_not_know_the_classes_are_asked_for_neighbours(
    pictures: Path, tmp_path: Path
):
    model = perturbed(create_model("ViT-mu/8", 0, 16))
    row = inspect_model(
        model, data=pictures, out=tmp_path / "o", workers=0, pictures=0, mapped=9
    ).summary["embedding"]
    assert row["mistakes_by"] == "neighbours"
    assert row["images"] == 9
    assert row["labels"] == [0, 0, 0, 1, 1, 1, 2, 2, 2]  # evenly spread
    assert all(m["label"] != m["predicted"] for m in row["mistakes"])


@pytest.mark.parametrize(
    ("name", "options", "applies"),
    [
        ("ViT-mu/8", {"pool": "gap", "position": "none", "registers": 2}, "fdrat"),
        ("ViT-mu/8", {"position": "rotary"}, "fpdrat"),
        ("ViT-mu/8", {"position": "relative"}, "fpdrat"),
        ("R50+ViT-B/16", {"width": 32, "heads": 2, "mlp_width": 32, "depth": 1}, "pdrat"),
        ("Mixer-S/16", {"depth": 1}, "ft"),
        ("BiT-R50x1", {"layers": (1, 1, 1, 1)}, "t"),
    ],
)
def test_what_does_not_apply_is_said_and_the_rest_is_drawn(
    name: str,
    options: dict[str, Any],
    applies: str,
    pictures: Path,
    tmp_path: Path,
    command: Command,
):
    model = perturbed(create_model(name, 3, 32, **options))
    path = save_model(model, tmp_path / "m.safetensors")
    words = ("inspect", path, pictures / "red", "--data", pictures, "--workers", 0)
    code, _, err = command(*words, "--out", tmp_path / "o", "--pictures", 1)
    assert code == 0, err
    letters = {
        "f": "filters",
        "p": "position_similarity",
        "d": "attention_distance",
        "r": "rollout",
        "a": "attention",
        "t": "tokens",
    }
    for letter, figure in letters.items():
        made = (tmp_path / "o" / figure).exists() or (tmp_path / "o" / f"{figure}.png").exists()
        assert made == (letter in applies)
        assert (f"no {figure}: " in err) == (letter not in applies)
    assert (tmp_path / "o/embedding.png").exists()
    summary = json.loads((tmp_path / "o/summary.json").read_text())
    assert set(summary["skipped"]) == {letters[k] for k in letters if k not in applies}


def test_another_resolution_and_grid(weights: Path, pictures: Path, tmp_path: Path):
    found = inspect_model(
        weights, pictures, out=tmp_path / "o", image_size=(32, 16), workers=0, pictures=1
    ).summary
    assert found["image_size"] == [32, 16]
    (mask,) = [row["mask"] for row in found["rollout"]["pictures"].values()]
    assert np.shape(mask) == (4, 2)


def test_nothing_is_overwritten_unless_asked(
    weights: Path, pictures: Path, tmp_path: Path, command: Command
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    words = ("inspect", weights, "--out", out, "--workers", 0, "--pictures", 1)
    code, _, err = command(*words, pictures / "red/00.jpg")
    assert code == 1
    assert "is not empty; give another --out, or pass --overwrite" in err
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    assert command(*words, pictures / "red/00.jpg", "--overwrite")[0] == 0
    assert (out / "rollout/00.png").exists()
    assert command(*words, pictures / "red/01.png", "--overwrite")[0] == 0
    assert [p.name for p in (out / "rollout").iterdir()] == ["01.png"]  # no figures of before
    assert (out / "mine.txt").read_text() == "keep"


def test_a_damaged_summary_deletes_nothing_elsewhere(weights: Path, pictures: Path, tmp_path: Path):
    out, other = tmp_path / "out", tmp_path / "other.txt"
    out.mkdir()
    other.write_text("keep")
    for text in (json.dumps({"files": ["../other.txt", str(other), 3]}), "[]", "{"):
        (out / "summary.json").write_text(text)
        inspect_model(weights, pictures, out=out, overwrite=True, workers=0, pictures=0)
        assert other.exists()


def test_files_that_cannot_be_read_are_named(
    weights: Path, pictures: Path, tmp_path: Path, command: Command
):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    words = ("inspect", weights, "--workers", 0, "--pictures", 2)
    code, _, err = command(*words, bad, pictures / "red/00.jpg", "--out", tmp_path / "o")
    assert code == 0
    assert "1 file could not be read" in err
    summary = json.loads((tmp_path / "o/summary.json").read_text())
    assert list(summary["unreadable"]) == [str(bad)]
    assert summary["attention_distance"]["images"] == 1
    code, _, err = command(*words, bad, "--out", tmp_path / "p")
    assert code == 1
    assert "none of 1 images can be read" in err
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no images given"),
        (("x.png", "--query", "3"), "--query is '3'; give ROW,COL"),
        (("x.png", "--query", "-1,2"), "--query is '-1,2'"),
        (("x.png", "--pictures", "-1"), "--pictures is -1; use 0 or more"),
        (("x.png", "--mapped", "0"), "--mapped is 0"),
        (("x.png", "--split", "val"), "--split names a part of --data"),
    ],
)
def test_usage_errors(
    words: tuple[str, ...], message: str, weights: Path, tmp_path: Path, command: Command
):
    code, out, err = command("inspect", weights, *words, "--out", tmp_path / "o")
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert not (tmp_path / "o").exists()


def test_a_query_off_the_grid(weights: Path, pictures: Path, tmp_path: Path, command: Command):
    words = ("inspect", weights, pictures, "--out", tmp_path / "o", "--query", "2,0")
    code, _, err = command(*words)
    assert code == 2
    assert "query 2,0 is not on the grid of 2 x 3 patches; use 0,0 to 1,2" in err
    assert not (tmp_path / "o").exists()


def test_a_model_has_its_own_size(pictures: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="a model has its own"):
        inspect_model(small(), pictures, out=tmp_path / "o", image_size=32)
    (tmp_path / "file").write_text("x")
    with pytest.raises(PatchwordError, match="is a file"):
        inspect_model(small(), pictures, out=tmp_path / "file")


def test_images_from_a_list(
    weights: Path,
    pictures: Path,
    tmp_path: Path,
    as_json: AsJson,
    monkeypatch: pytest.MonkeyPatch,
):
    class Input:
        buffer = (tmp_path / "list").open("wb+")

    Input.buffer.write(f"{pictures / 'red'}\n{pictures / 'blue/00.jpg'}\n".encode())
    Input.buffer.seek(0)
    monkeypatch.setattr("sys.stdin", Input)
    found = as_json("inspect", weights, "-", "--out", tmp_path / "o", "--workers", 0)
    Input.buffer.close()
    assert found["images"] == 6


def test_names_of_files():
    keys = ["a/x.jpg", "b/x.png", "b/X.jpg", "data.parquet[3]", "ü b.jpg", "c/x-2.png"]
    names = file_names(keys)
    assert names[:3] == ["x", "x-2", "X-3"]
    assert names[3] == "data.parquet-3"
    assert len({name.casefold() for name in names}) == len(keys)
    assert all(name and "/" not in name for name in names)


def test_numbers_are_plain_json():
    values = np.array([[1 / 3, np.nan], [np.inf, 2]])
    assert numbers(values, 3) == [[0.333, None], [None, 2.0]]
    assert numbers(np.float64(1.5)) == 1.5


def test_classes_without_names_are_named(
    make_photos: MakePhotos, tmp_path: Path, as_json: Callable[..., Any]
) -> None:
    root = make_photos(tmp_path / "data", 3)
    for before, after in (("red", "n01440764"), ("green", "goldfish"), ("blue", "n02012849")):
        (root / before).rename(root / after)
    path = save_model(create_model("ViT-mu/8", 1000, 16), tmp_path / "m.safetensors")
    words = ("inspect", path, "--data", root, "--split", "all", "--pictures", 0, "--workers", 0)
    said = {}
    for name, more in (("plain", ()), ("named", ("--classes", "imagenet"))):
        said[name] = as_json(*words, "--out", tmp_path / name, *more)["embedding"]["mistakes_by"]
    assert said == {"plain": "neighbours", "named": "head"}
