"""Log lines: whole, in order, none lost; the live line where there is no terminal."""

import errno
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from patchword.training.log import Lines, LiveLine, duration, read_lines, write_csv


def steps(path):
    return [line["step"] for line in read_lines(path)]


def test_lines_are_appended_and_cut_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = Lines(path, 0)
    assert not path.exists()
    for step in range(1, 8):
        lines.append({"step": step, "loss": 1 / step})
    assert read_lines(path) == [{"step": k, "loss": 1 / k} for k in range(1, 8)]
    lines = Lines(path, 4)
    assert steps(path) == [1, 2, 3, 4]
    lines.append({"step": 5, "loss": 0.0})
    assert steps(path) == [1, 2, 3, 4, 5]
    Lines(path, 0)
    assert path.read_bytes() == b""


@given(cut=st.integers(0, 60), last=st.integers(0, 5))
def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path_factory, cut, last):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    whole = b"".join(json.dumps({"step": k, "name": "\u2028é"}).encode() + b"\n" for k in range(4))
    path.write_bytes(whole[: len(whole) - cut])
    wanted = [k for k in range(whole[: len(whole) - cut].count(b"\n")) if k <= last]
    lines = Lines(path, last)
    assert steps(path) == wanted
    lines.append({"step": 9})
    assert steps(path) == [*wanted, 9]
    assert path.read_bytes().endswith(b"\n")


def test_lines_that_could_not_be_written_come_with_the_next(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    lines = Lines(path, 0)
    lines.append({"step": 1})
    opened = type(path).open

    def half(self, *args, **options):
        """The disk fills up in the middle of the line."""
        with opened(self, "ab") as file:
            file.write(b'{"st')
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "open", half)
        for step in (2, 3):
            with pytest.raises(OSError, match="No space"):
                lines.append({"step": step})
        with pytest.raises(OSError, match="No space"):
            lines.flush()
    assert steps(path) == [1]
    lines.flush()
    assert steps(path) == [1, 2, 3]
    lines.append({"step": 4})
    lines.flush()
    assert steps(path) == [1, 2, 3, 4]


def test_damaged_lines_are_named_and_left_out(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2\n\xff\xfe\n[3]\n{"loss": 1}\n{"step": 6}\n')
    assert steps(path) == [1, 6]
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{path}: line {k} is damaged and left out" for k in (2, 3, 4, 5)]


def test_the_table_holds_the_same_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_csv(path)
    assert not path.with_suffix(".csv").exists()
    lines = Lines(path, 0)
    for step in (1, 2):
        lines.append({"step": step, "loss": 0.1 * step})
    write_csv(path)
    assert path.with_suffix(".csv").read_text().splitlines() == ["step,loss", "1,0.1", "2,0.2"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0:00"), (9.6, "0:10"), (75, "1:15"), (3599.6, "1:00:00"), (90061, "25:01:01")],
)
def test_duration(value, text):
    assert duration(value) == text


def test_live_line_without_a_terminal(monkeypatch):
    """A line every so often and the last one, without control characters or wrapping."""
    now = [0.0]
    monkeypatch.setattr("patchword.training.log.time.monotonic", lambda: now[0])
    text = io.StringIO()
    with LiveLine(Console(file=text, width=20), every=10) as live:
        for second in range(25):
            now[0] = float(second)
            live.show(f"step {second} [of many more] {'-' * 30}", last=second == 24)
    lines = text.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["10", "20", "24"]
    assert all(line.endswith("[of many more] " + "-" * 30) for line in lines)
    assert "\x1b" not in text.getvalue()


def test_live_line_on_a_terminal_leaves_nothing_behind():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=40)
    with LiveLine(console) as live:
        live.show("step 1 " + "-" * 80)
    assert text.getvalue().rstrip("\n").endswith("\x1b[?25h\r\x1b[1A\x1b[2K")
