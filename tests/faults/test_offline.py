"""No network: the main commands work with sockets blocked."""

import json
import sys

from PIL import Image

BLOCKED = """
import runpy, socket, sys

def blocked(*args, **options):
    raise SystemExit(f"network: {args}")

class Local(socket.socket):
    def connect(self, address):
        if self.family != socket.AF_UNIX:
            blocked(address)
        super().connect(address)

    def connect_ex(self, address):
        if self.family != socket.AF_UNIX:
            blocked(address)
        return super().connect_ex(address)

socket.socket = Local
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = blocked
sys.argv = ["patchword", *sys.argv[1:]]
runpy.run_module("patchword.cli.main", run_name="__main__", alter_sys=True)
"""


def test_train_evaluate_and_predict_without_a_network(tmp_path, command, shell):
    run, image = tmp_path / "run", tmp_path / "image.png"
    Image.new("L", (8, 8), 128).save(image)
    blocked = [sys.executable, "-c", BLOCKED]
    trained = shell([*blocked, *command(run, workers=2, crop="inception")[3:]])
    assert trained.returncode == 0, trained.stderr
    assert (run / "report.html").exists()
    evaluated = shell([*blocked, "evaluate", str(run), "digits", "--json"])
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["n"] == 359
    predicted = shell([*blocked, "predict", str(run), str(image), "--json"])
    assert predicted.returncode == 0, predicted.stderr
    assert json.loads(predicted.stdout)[0]["path"] == str(image)


def test_the_block_blocks(shell):
    code = BLOCKED.split("sys.argv")[0]
    for call in (
        "socket.create_connection(('127.0.0.1', 9))",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
    ):
        done = shell([sys.executable, "-c", f"{code}\n{call}"])
        assert done.returncode == 1
        assert done.stderr.startswith("network:")
