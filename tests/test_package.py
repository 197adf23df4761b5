"""The package from outside: what importing it loads, and the names it offers."""

import pkgutil
import subprocess
import sys

import pytest

import patchword

OPTIONAL = {
    "datasets",
    "huggingface_hub",
    "pyarrow",
    "tensorboard",
    "timm",
    "transformers",
    "torchvision",
    "matplotlib",
    "sklearn",
    "tyro",
}


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running `code`."""
    report = "import sys; print('LOADED', *{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return set(result.stdout.rpartition("LOADED")[2].split())


def test_import_loads_no_optional_package():
    loaded = loaded_by("import patchword")
    assert "patchword" in loaded
    assert loaded.isdisjoint(OPTIONAL)


def test_public_functions_load_no_extra():
    extras = {"datasets", "huggingface_hub", "onnx", "onnxscript", "pyarrow", "tensorboard"}
    names = ("create_model", "load_model", "train", "evaluate", "predict")
    loaded = loaded_by(f"from patchword import {', '.join(names)}")
    assert "torch" in loaded
    assert loaded.isdisjoint(extras)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_is_built_without_torch(arguments: list[str]):
    loaded = loaded_by(
        f"import sys; sys.argv = ['patchword', *{arguments}]\n"
        "from patchword.cli.main import main\n"
        "try:\n"
        "    code = main()\n"
        "except SystemExit as stop:\n"
        "    code = stop.code\n"
        "assert not code, code"
    )
    assert "tyro" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "sklearn", "matplotlib", "PIL"})


def test_public_names_are_few_and_resolve():
    names = patchword.__all__
    assert 5 <= len(names) <= 25
    assert len(set(names)) == len(names)
    assert all(getattr(patchword, name) is not None for name in names)
    assert set(names) <= set(dir(patchword))


def test_no_public_name_is_also_a_module():
    modules = {module.name for module in pkgutil.iter_modules(patchword.__path__)}
    assert {"spec", "models", "training", "cli"} <= modules
    assert modules.isdisjoint(patchword.__all__)


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = patchword.no_such_name
