"""The command line: help, lists, errors in one line, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from patchword import create_model, list_models, load_model, save_model
from patchword.cli import main as cli
from patchword.cli.main import COMMANDS, main
from patchword.spec.parse import Interrupted
from patchword.training.recipes import RECIPES
from patchword.weights.pretrained import PRETRAINED

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line in this process: exit code, standard output, standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_the_commands(words: list[str], command: Command):
    code, out, _ = command(*words)
    assert code == 0
    assert all(f"  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, command: Command):
    code, out, _ = command(name, "--help")
    assert code == 0
    assert f"patchword {name}" in out
    assert "--json" in out


def test_binding_options_exist(command: Command):
    """Scripts of users name these."""
    _, out, _ = command("train", "--help")
    names = """model init recipe config out seed steps epochs time batch-size lr image-size
    eval-every checkpoint-every device precision workers"""
    for name in names.split():
        assert f"--{name} " in out, name
    _, out, _ = command("evaluate", "--help")
    assert "--split " in out


def test_version(command: Command):
    import patchword

    assert command("--version") == (0, f"{patchword.__version__}\n", "")


def one_line(err: str) -> str:
    """The only line of an error message."""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean train"),
        (["train", "digits", "--recipe", "cifar11"], "did you mean cifar10"),
        (["train", "digits", "--model", "ViT-X/16"], "unknown model 'ViT-X/16'"),
        (["train", "digits", "--model", "vit-ti/2"], "did you mean ViT-"),
        (["train", "digits", "--image-size", "9"], "image height 9 is not a multiple"),
        (["train", "digits", "--dropout", "1"], "dropout is 1.0"),
        (["train", "digits", "--steps", "5", "--epochs", "2"], "both set the length"),
        (["train", "digits", "--heads", "7"], "is not a multiple of heads 7"),
        (["train", "--config", "nowhere.json"], "--config nowhere.json cannot be read"),
        (["models", "ViT-Q/16"], "unknown model 'ViT-Q/16'"),
        (["models", "ViT-B/16", "--image-size", "225"], "not a multiple of the patch height 16"),
        (["models", "ViT-B/16", "--image-size", "0"], "one or two numbers above 0"),
        (["models", "ViT-B/16", "--classes", "-1"], "--classes is -1"),
        (["models", "--classes", "10"], "go with one variant"),
        (["models", "--pretrained", "vit-smol"], "unknown pretrained weights 'vit-smol'; did you"),
        (["train", "digits", "--model", "BiT-R50x1", "--pool", "map"], "no option 'pool'"),
        (["train", "digits", "--model", "Mixer-S/4", "--mlp-width", "9"], "mean tokens_mlp_width"),
        (["recipes", "jft"], "unknown recipe 'jft'; did you mean jft-"),
        (["predict", "x", "y", "--top", "0"], "--top must be 1 or more"),
        (["predict", "x"], "no images given"),
        (["predict", "x", "y", "--json", "--csv"], "give one of them"),
        (["evaluate", "x", "y", "--image-size", "1", "2", "3"], "one or two numbers"),
        (["convert", "hub:vit", "y", "--format", "timm"], "write hub:ORG/NAME"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(
    words: list[str],
    message: str,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*words)
    assert (code, out) == (2, "")
    line = one_line(err)
    assert line.startswith("patchword: ")
    assert message in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "digits", "--lr", "fast"], "fast"),
        (["train", "digits", "--no-such-flag", "1"], "--no-such-flag"),
        (["train"], "DATA a folder"),
        (["train", "--steps", "3"], "DATA a folder"),
        (["train", "--recipe", "digits"], "DATA a folder"),
        (["evaluate"], "MODEL a run directory"),
        (["train", "digits", "--device", "tpu"], "tpu"),
        (["doctor", "extra"], "extra"),
        (["train", "digits", "--recipe"], "--recipe"),
        (["train", "digits", "--lr", "-1"], "lr is -1.0"),
        (["train", "digits", "--batch-size", "0"], "batch_size is 0"),
        (["train", "digits", "--time", "soon"], "'soon' is no time"),
        (["train", "digits", "--parts", "3"], "not a multiple of parts 3"),
    ],
)
def test_the_parser_says_what_it_does_not_understand(
    words: list[str], message: str, command: Command
):
    """In a box of its own."""
    code, out, err = command(*words)
    assert (code, out) == (2, "")
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "no/such/folder"], "no data at 'no/such/folder'"),
        (["evaluate", "no-model", "digits"], "no such file or run directory: no-model"),
        (["predict", "no-model", "x.png"], "no such file or run directory: no-model"),
        (["train", "digits", "--init", "gone"], "no such file or run directory: gone"),
        (["evaluate", "vit-smal-augreg", "digits"], "did you mean vit-small-augreg"),
        (["convert", "gone", "m.pth", "--format", "timm"], "no such file or run directory: gone"),
    ],
)
def test_other_errors_are_one_line_and_exit_1(
    words: list[str],
    message: str,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(*words)
    assert code == 1
    assert message in one_line(err.replace("data digits", "\n"))


def test_configs_that_cannot_be_read(command: Command, tmp_path: Path):
    path = tmp_path / "c.json"
    for text, message in (
        ("{", "cannot be read"),
        ("[]", "holds no JSON object"),
        ('{"source": "digits", "sed": 1}', "unknown key 'sed'; did you mean seed"),
        ('{"source": "digits", "optim": 3}', "optim must be an object"),
        ('{"source": 3}', "source must be a string"),
        ('{"recipe": "nope"}', "unknown recipe 'nope'"),
        ('{"recipe": 3}', "recipe must be a string"),
    ):
        path.write_text(text)
        code, _, err = command("train", "--config", path)
        assert code == 2, err
        assert message in one_line(err)
    path.write_bytes(b"\xff\xfe\x00")
    code, _, err = command("train", "--config", path)
    assert code == 2
    assert "cannot be read" in one_line(err)


def test_models(command: Command):
    code, out, _ = command("models", "ViT-Ti/16", "--json")
    assert code == 0
    (row,) = json.loads(out)
    assert row["name"] == "ViT-Ti/16"
    assert row["parameters"] == 5_717_416
    assert row["gmacs"] == pytest.approx(1.25, abs=0.01)
    code, out, _ = command("models", "--json")
    assert [row["name"] for row in json.loads(out)] == list_models()
    code, out, _ = command("models", "ViT-B/16")
    assert "86,567,656" in out


def test_models_of_every_family(command: Command):
    _, out, _ = command("models", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    families = [row["family"] for row in rows.values()]
    assert list(dict.fromkeys(families)) == ["ViT", "hybrid", "BiT", "Mixer"]
    assert sorted(families, key=["ViT", "hybrid", "BiT", "Mixer"].index) == families
    shape = {"depth": 12, "width": 768, "mlp_width": 3072, "heads": 12}
    assert shape.items() <= rows["ViT-B/16"].items()
    assert (shape | {"stem_layers": [3, 4, 9]}).items() <= rows["R50+ViT-B/16"].items()
    assert {"layers": [3, 4, 6, 3], "width_factor": 2}.items() <= rows["BiT-R50x2"].items()
    assert rows["Mixer-B/16"]["tokens_mlp_width"] == 384
    for name, parameters, gmacs in (  # as timm counts them
        ("R50+ViT-B/16", 98_659_112, 21.5),
        ("BiT-R50x1", 25_549_352, 4.1),
        ("Mixer-B/16", 59_880_472, 12.6),
    ):
        assert rows[name]["parameters"] == parameters
        assert rows[name]["gmacs"] == pytest.approx(gmacs, abs=0.06)
    code, out, _ = command("models")
    assert code == 0
    assert all(name in out for name in rows)


@pytest.mark.parametrize("name", ["ViT-Ti/16", "R+ViT-Ti/16", "BiT-R50x1", "Mixer-S/16"])
def test_the_layers_of_a_model(name: str, command: Command):
    size = ("--image-size", "64", "96", "--classes", "10")
    (row,) = json.loads(command("models", name, *size, "--json")[1])
    *parts, total = row["layer_table"]
    for column in ("parameters", "macs", "activation_bytes"):
        assert total[column] == sum(part[column] for part in parts)
    assert total["parameters"] == row["parameters"]
    assert total["macs"] / 1e9 == pytest.approx(row["gmacs"])
    assert total["shape"] == [10]
    code, out, _ = command("models", name, *size)
    assert code == 0
    assert all(part["name"] in out for part in parts)
    assert f"{row['parameters']:,}" in out
    assert "64 x 96 pixels" in out


def test_pretrained_weights(command: Command):
    code, out, _ = command("models", "--pretrained", "--json")
    assert code == 0
    rows = json.loads(out)
    assert [row["name"] for row in rows] == list(PRETRAINED)
    code, out, _ = command("models", "--pretrained")
    assert code == 0
    assert all(row["name"] in out for row in rows)
    assert "cc-by-nc-4.0" in out
    code, out, _ = command("models", "--pretrained", "bit-r50x1")
    assert "timm/resnetv2_50x1_bit.goog_in21k_ft_in1k" in out
    assert "80.34" in out


def test_recipes(command: Command):
    code, out, _ = command("recipes", "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(out)] == list(RECIPES)
    code, out, _ = command("recipes", "jft-l16-7")
    assert code == 0
    assert "783 exaFLOPs" in out
    assert "table 3" in out
    assert "--recipe jft-l16-7" in out
    code, out, _ = command("recipes", "cifar10", "--json")
    (row,) = json.loads(out)
    assert {"name", "source", "expected", "settings", "command", "cost"} <= row.keys()
    code, out, _ = command("recipes")
    assert "digits" in out


def test_doctor(command: Command):
    code, out, _ = command("doctor", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["device"] in ("cpu", "cuda", "mps")
    assert found["training_precision"] in ("float32", "bfloat16")
    assert found["threads"] >= 1
    assert found["versions"]["torch"]
    for name, state in found["extras"].items():
        assert state == "installed" or f"pip install -c constraints.txt -e '.[{name}]'" in state
    code, out, _ = command("doctor")
    assert code == 0
    assert "free disk here" in out


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A weight file of patchword's own."""
    model = create_model("ViT-mu/8", 4, 16, width=64, heads=1, classes=("a", "b", "c", "d"))
    torch.nn.init.normal_(model.get_parameter("head.weight"))
    return save_model(model, tmp_path / "m.safetensors")


def test_convert(command: Command, weights: Path, tmp_path: Path):
    """There and back, with proof."""
    for format, name in (("timm", "t.pth"), ("huggingface", "folder"), ("torchvision", "v.pth")):
        target = tmp_path / name
        code, out, err = command("convert", weights, target, "--format", format)
        assert code == 0, err
        found, written, parity = out.splitlines()
        assert found == f"found    {weights}: patchword weights of ViT-1x64/8, 16x16 px, 4 classes"
        assert written.startswith(f"written  {target}")
        assert f"{format} weights of ViT-1x64/8, 16x16 px, 4 classes" in written
        assert parity.startswith("parity   worst logit difference ")
        assert 0 <= float(parity.split()[4]) < (1e-2 if format == "torchvision" else 1e-5)
        back = [target, tmp_path / "back.safetensors", "--format", "patchword"]
        flags = ["--overwrite", "--trust-pickle", "--json"]
        code, out, err = command("convert", *back, *flags)
        assert code == 0, err
        row = json.loads(out)
        assert row["found"]["format"] == format
        assert row["written"] == {
            "path": str(tmp_path / "back.safetensors"),
            "format": "patchword",
            "model": "ViT-1x64/8",
            "image_size": [16, 16],
            "num_classes": 4,
            "notes": [],
        }
        assert row["worst_logit_difference"] < 1e-5 < row["largest_logit"]


def test_convert_stores_the_names_of_the_classes(
    command: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    plain = create_model("ViT-mu/8", 1000, 16, activation="gelu_tanh")
    path = save_model(plain, tmp_path / "m.safetensors")
    for format, name in (("patchword", "p.safetensors"), ("huggingface", "h"), ("timm", "t")):
        target = tmp_path / name
        words = ("convert", path, target, "--format", format, "--classes", "imagenet")
        assert command(*words)[0] == 0
        assert load_model(target).classes[134] == "crane bird"
    assert "class names" not in caplog.text
    target = tmp_path / "g.npz"
    words = ("convert", path, target, "--format", "google-npz", "--classes", "imagenet")
    assert command(*words)[0] == 0
    assert f"{target} has no place for the class names" in caplog.text


def test_convert_says_when_a_file_does_not_tell_all(
    command: Command, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """The difference is that of the model as others read it who know what the log says."""
    several = save_model(
        create_model("ViT-mu/8", 0, 16, width=64, heads=8), tmp_path / "several.safetensors"
    )
    words = ("convert", several, tmp_path / "t.pth", "--format", "timm")
    code, out, _ = command(*words, "--json")
    assert code == 0
    assert json.loads(out)["worst_logit_difference"] < 1e-5
    assert json.loads(out)["read_with"] == {"heads": 8}
    assert "t.pth does not tell heads=8; say so when loading it" in caplog.text
    code, out, _ = command(*words, "--overwrite")
    assert code == 0
    assert out.splitlines()[2].endswith(", read with heads=8")


def test_convert_writes_nothing_unasked(command: Command, weights: Path, tmp_path: Path):
    target = tmp_path / "t.pth"
    target.write_text("mine")
    code, _, err = command("convert", weights, target, "--format", "timm")
    assert code == 1
    assert "exists; pass overwrite=True" in one_line(err)
    assert target.read_text() == "mine"
    code, _, err = command("convert", weights, tmp_path / "x.pth", "--format", "keras")
    assert code == 2
    assert "writes no format 'keras'; valid: patchword, huggingface" in one_line(err)


def test_pickles_need_trust(command: Command, weights: Path, tmp_path: Path):
    """By every command that reads weights."""
    pickled = tmp_path / "t.pth"
    assert command("convert", weights, pickled, "--format", "timm")[0] == 0
    image = tmp_path / "x.png"
    Image.new("RGB", (16, 16)).save(image)
    for words in (
        ["predict", pickled, image],
        ["evaluate", pickled, "digits"],
        ["convert", pickled, tmp_path / "y.safetensors", "--format", "patchword"],
        ["train", "digits", "--init", pickled, "--steps", "1", "--out", tmp_path / "run"],
    ):
        code, _, err = command(*words)
        assert code == 1
        assert "--trust-pickle" in err.replace("\n", " ")
    code, out, err = command("predict", pickled, image, "--trust-pickle", "--json")
    assert code == 0, err
    assert json.loads(out)[0]["label"] in ("0", "1", "2", "3")


def test_unexpected_errors_are_one_line_unless_debugged(
    command: Command, monkeypatch: pytest.MonkeyPatch
):
    def broken(_: object) -> int:
        raise KeyError("secret [b]")

    monkeypatch.setitem(COMMANDS, "doctor", broken)
    code, _, err = command("doctor")
    assert code == 1
    assert "unexpected KeyError: 'secret [b]'; --debug shows where" in one_line(err)
    with pytest.raises(KeyError):
        cli.main(["doctor", "--debug"])


def test_signals_have_their_exit_codes(command: Command, monkeypatch: pytest.MonkeyPatch):
    for error, code in (
        (Interrupted("stopped by SIGTERM after step 3", 15), 143),
        (Interrupted("stopped by SIGINT after step 3", 2), 130),
        (KeyboardInterrupt(), 130),
    ):

        def stopped(_: object, error: BaseException = error) -> int:
            raise error

        monkeypatch.setitem(COMMANDS, "doctor", stopped)
        assert command("doctor")[0] == code


@pytest.mark.parametrize(
    "start", [[sys.executable, "-m", "patchword"], [str(Path(sys.executable).parent / "patchword")]]
)
def test_installed_command(start: list[str]):
    """As a user runs it, in a process of its own: results on stdout, errors on stderr."""
    done = subprocess.run(
        [*start, "recipes", "nothing"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "unknown recipe 'nothing'" in one_line(done.stderr)


# check -------------------------------------------------------------------------------------------


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Noise images in two classes; one file is broken."""
    root = tmp_path / "pets"
    for k, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(4):
            noise = torch.randint(
                256, (40, 48, 3), generator=torch.Generator().manual_seed(9 * k + i)
            )
            Image.fromarray(noise.to(torch.uint8).numpy()).save(root / name / f"{i}.png")
    (root / "dog/broken.png").write_bytes(b"broken")
    return root


def test_check_says_what_is_wrong_and_exits_with_1(command: Command, pets: Path):
    code, out, err = command("check", pets)
    assert code == 1
    assert "unreadable images" in out
    assert "9 images of 2 classes: found 1 error" in out
    assert "read 9 images" in err
    code, out, _ = command("check", pets, "--json")
    assert code == 1
    shown = json.loads(out)
    assert (shown["images"], shown["errors"], shown["warnings"], shown["notes"]) == (9, 1, 0, 0)
    assert shown["findings"][0]["code"] == "unreadable"
    assert shown["findings"][0]["items"] == [
        {"names": ["dog/broken.png"], "about": "not an image of a known format"}
    ]


def test_check_fixes_and_undoes(command: Command, pets: Path):
    code, out, _ = command("check", pets, "--fix")
    assert code == 0
    assert "moved 1 file to" in out
    assert not (pets / "dog/broken.png").exists()
    assert command("check", pets)[:2] == (0, "8 images of 2 classes: found nothing wrong\n")
    assert command("check", pets, "--undo")[:2] == (0, "brought back 1 file\n")
    assert (pets / "dog/broken.png").read_bytes() == b"broken"
    code, out, _ = command("check", pets, "--fix", "--json")
    assert code == 0
    moved = json.loads(out)["set_aside"]
    assert moved["folder"] == f"{pets}.set-aside"
    assert [move["path"] for move in moved["files"]] == ["dog/broken.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--near", "16"], "--near is 16; use 0 to 15 bits"),
        (["--workers", "-1"], "--workers is -1; use 0 or more"),
        (["--fix", "--undo"], "--fix and --undo are opposites"),
    ],
)
def test_check_refuses_what_makes_no_sense(words, message: str, command: Command, pets: Path):
    code, _, err = command("check", pets, *words)
    assert code == 2
    assert message in one_line(err)


def test_check_fixes_folders_only(command: Command):
    code, _, err = command("check", "digits", "--fix")
    assert code == 2
    assert "--fix moves files of a folder" in one_line(err)
