"""No network: every command works with sockets blocked, and none so much as asks for one.

The block is an audit hook in every Python process that is started, workers too: it refuses what
would leave the machine, and notes it in a file, so that what a library swallows is seen as well.
"""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from patchword.cli.main import COMMANDS

BLOCK = """
import os, socket, sys

def refuse(event, arguments):
    if not event.startswith("socket."):
        return
    made_for = getattr(arguments[0], "family", None) if arguments else None
    asks = event.startswith("socket.get") and event != "socket.gethostname"
    sends = event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind")
    if asks or sends and made_for != socket.AF_UNIX:
        with open(os.environ["ATTEMPTS"], "a") as file:
            print(event, arguments[1:] if sends else arguments, file=file)
        raise PermissionError("no network in tests")

sys.addaudithook(refuse)
"""
"""As `sitecustomize`, which Python imports at its start."""

COMMAND_LINES = """
import json, sys
import datasets, huggingface_hub
from patchword.cli.main import main
from patchword.run import finish as finishing
from patchword.run import pretraining
from patchword.run import train as training

real = training.train

def train(data, **options):  # the demo gives a name, and takes a minute
    return real(data, **options | {"steps": 10, "workers": 2} if data == "digits" else options)

training.train = train
codes = []
for words in json.loads(sys.argv[1]):
    codes.append(main(words))
    finishing.report_run = pretraining.report = lambda *_: None  # the first has one
print("CODES", codes)
"""


@pytest.fixture
def blocked(tmp_path):
    """`blocked(arguments)`: Python with these, and what it and its children wanted of sockets."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(BLOCK)
    attempts = tmp_path / "attempts"
    attempts.touch()
    path = [str(tmp_path / "site"), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "ATTEMPTS": str(attempts)}

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        return done, attempts.read_text().splitlines()

    return run


@pytest.fixture
def rows(tmp_path):
    """Parquet with 12 pictures of each of three classes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    files = []
    for k in range(36):
        buffer = io.BytesIO()
        pixels = rng.integers(80 * (k % 3), 80 * (k % 3) + 80, (16, 16, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
        files.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(
        pa.table({"image": files, "label": [k % 3 for k in range(36)]}), tmp_path / "rows.parquet"
    )
    (tmp_path / "image.png").write_bytes(files[0]["bytes"])
    return "rows.parquet"


@pytest.mark.usefixtures("rows")
def test_every_command_works_without_a_network(blocked, tmp_path):
    """With the extras: parquet is read, TensorBoard's files are written."""
    short = "--batch-size 8 --steps 4 --device cpu --workers 2"
    tiny = f"--model ViT-mu/8 --image-size 16 --mixup 0 {short}"
    lines = [
        "demo --out demo",
        f"train rows.parquet --out run {tiny} --crop inception --tensorboard",
        f"train rows.parquet --out tuned --init run {short}",
        f"train rows.parquet --out mae --objective mae {tiny}",
        "evaluate run rows.parquet --json",
        "evaluate run rows.parquet --probe knn",
        "predict run image.png",
        "inspect run image.png --out figures --data rows.parquet",
        "explain run image.png --out why",
        "check rows.parquet",
        "calibrate run rows.parquet --overwrite",
        "convert run as-timm.safetensors --format timm",
        "convert run as-huggingface --format huggingface",
        "models ViT-mu/8",
        "models --pretrained",
        "recipes",
        "doctor",
    ]
    words = [line.split() for line in lines]
    assert {first for first, *_ in words} == COMMANDS.keys()
    done, attempts = blocked("-c", COMMAND_LINES, json.dumps(words))
    assert attempts == []
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.rpartition("CODES")[2])
    assert codes == [0] * len(lines), done.stderr
    assert (tmp_path / "demo/report.html").exists()
    assert list((tmp_path / "run/tensorboard").iterdir())


@pytest.mark.long
def test_the_libraries_that_benchmarks_compare_with_load_without_a_network(blocked):
    code = """
from peers import define_torchvision_operators
define_torchvision_operators()
import timm, torchvision, transformers, vit_pytorch
"""
    done, attempts = blocked("-c", code)
    assert done.returncode == 0, done.stderr
    assert attempts == []


def test_the_block_blocks(blocked, tmp_path):
    """In this process, in a thread, in children, and where the error is swallowed."""
    code = """
import multiprocessing, socket, threading, urllib.request

def ask(port):
    try:
        socket.create_connection(("127.0.0.1", port))
    except OSError:
        pass

if __name__ == "__main__":
    ask(1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto(b"here", ("127.0.0.1", 2))
        except OSError:
            pass
    threads = [threading.Thread(target=ask, args=(3,))]
    threads += [multiprocessing.get_context(kind).Process(target=ask, args=(port,))
                for kind, port in (("fork", 4), ("spawn", 5))]
    for thread in threads:
        thread.start()
        thread.join()
    urllib.request.urlopen("http://patchword.invalid")
"""
    (tmp_path / "program.py").write_text(code)
    done, attempts = blocked("program.py")
    assert done.returncode == 1
    assert "no network in tests" in done.stderr
    for port in range(1, 6):
        assert any(f"'127.0.0.1', {port}" in line for line in attempts), port
    assert any("patchword.invalid" in line for line in attempts)


def test_a_source_that_the_user_names_is_the_only_one_that_asks(blocked):
    """So the block would see what the hub's libraries do."""
    done, attempts = blocked("-m", "patchword", "evaluate", "hub:some/vit", "digits")
    assert done.returncode == 1
    assert "hub:some/vit cannot be fetched" in done.stderr
    assert any("huggingface.co" in line for line in attempts)
