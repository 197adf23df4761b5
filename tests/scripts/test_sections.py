"""What scripts/on_gpu.sh makes of sections that pass, fail, or do not end."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "scripts" / "gpu"


@pytest.fixture(scope="module")
def sections() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_sections", FOLDER / "sections.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_sections"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("code", "limit", "left", "status"),
    [
        ("print('fine')", 60, 60, "passed"),
        ("import sys; print('gone'); sys.exit(3)", 60, 60, "failed (exit code 3)"),
        ("import time; time.sleep(100)", 1, 60, "too slow"),
        ("print('fine')", 60, 4, "no time left"),
    ],
)
def test_how_a_section_ends(
    sections: ModuleType, tmp_path: Path, code: str, limit: float, left: float, status: str
):
    section = sections.Section("one", [sys.executable, "-c", code], limit, lambda: {"a": 1})
    result = sections.run(section, tmp_path / "log", dict(os.environ), left)
    assert result.status == status
    if status.startswith("failed"):
        assert "gone" in sections.tail(tmp_path / "log")


def test_the_record_and_the_exit_code(
    sections: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """A section that fails does not keep the next from running."""

    def chosen(device: str, quick: bool, work: Path) -> list[object]:
        codes = {"bad": "import sys; sys.exit(1)", "good": "pass", "left out": "exit(1)"}
        return [
            sections.Section(name, [sys.executable, "-c", code], 60, lambda: None)
            for name, code in codes.items()
        ]

    monkeypatch.setattr(sections, "sections", chosen)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(sys, "argv", ["sections.py", "--only", "bad", "--only", "good"])
    assert sections.main() == 1
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    found = {section["name"]: section["status"] for section in record["sections"]}
    assert found == {"environment": "passed", "bad": "failed (exit code 1)", "good": "passed"}
    assert record["sections"][0]["found"]["versions"]["torch"]
    assert "failed (exit code 1)" in capsys.readouterr().out


def test_wheels_are_unpacked_where_they_are_newer(
    sections: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, version in (("numpy", "0.1"), ("pytest", "99.0"), ("no_such_thing", "1.0")):
        with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "")
    monkeypatch.setattr(sections, "WHEELS", tmp_path)
    unpacked = sections.unpack_wheels(tmp_path / "site")
    assert [line.split()[0] for line in unpacked] == ["no_such_thing", "pytest"]
    assert not (tmp_path / "site" / "numpy.py").exists()


def test_every_command_names_what_is_there(sections: ModuleType, tmp_path: Path):
    """On a GPU too, where nothing can be tried here: scripts exist and take those options."""
    for device, quick in (("cuda", False), ("cpu", True)):
        found = sections.sections(device, quick, tmp_path)
        assert [section.name for section in found[:2]] == ["tests", "digits"]
        assert sections.TOTAL <= 8 * 60
        for section in found:
            script = section.command[1]
            assert script == "-m" or (sections.ROOT / script).is_file()
