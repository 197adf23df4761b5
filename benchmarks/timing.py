"""Interleaved timing of several contenders, and the record of it."""

from __future__ import annotations

import json
import os
import platform
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "timm", "transformers", "torchvision", "vit-pytorch")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the benchmarks have in common."""

    model: str = "ViT-Ti/16"
    image_size: int = 224
    classes: int = 1000
    depth: int | None = None
    width: int | None = None
    """depth and width change the variant"""
    rounds: int = 15
    warmup: int = 3
    """calls of each contender before the first round"""
    include: tuple[str, ...] = ()
    """only contenders whose name contains one of these, and the baseline"""
    exclude: tuple[str, ...] = ()
    """no contender whose name contains one of these"""
    compile: bool = False
    """compiled contenders too"""
    device: Literal["cpu", "cuda"] = "cpu"
    seed: int = 0
    """of the weights, the images and the order"""
    save: bool = True
    """write the record into benchmarks/results"""

    @property
    def title(self) -> str:
        """The model in words, with what was changed."""
        changes = [
            f", {key} {getattr(self, key)}" for key in ("depth", "width") if getattr(self, key)
        ]
        return f"{self.model}{''.join(changes)}, {self.image_size} px"

    def wants(self, contender: str, baseline: str) -> bool:
        """Whether a contender runs."""
        if contender == baseline:
            return True
        included = not self.include or any(part in contender for part in self.include)
        compiled = self.compile or "compiled" not in contender
        return included and compiled and not any(part in contender for part in self.exclude)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleave(
    contenders: Mapping[str, Callable[[], object]], options: Options, calls: int
) -> dict[str, np.ndarray]:
    """Seconds of each call, `[rounds, calls]` by contender.

    After the warm-up calls, every round runs all contenders in an order of its own, so that
    what else the machine does falls on all of them alike.
    """
    console = Console(stderr=True)
    for name, call in contenders.items():
        console.print(f"[dim]warm-up: {name}")
        for _ in range(options.warmup):
            call()
    times = {name: np.zeros((options.rounds, calls)) for name in contenders}
    order, shuffler = list(contenders), random.Random(options.seed)
    for index in range(options.rounds):
        shuffler.shuffle(order)
        console.print(f"[dim]round {index + 1} of {options.rounds}")
        for name in order:
            synchronize(options.device)
            for call in range(calls):
                start = time.perf_counter()
                contenders[name]()
                synchronize(options.device)
                times[name][index, call] = time.perf_counter() - start
    return times


def spread(values: np.ndarray) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": float(middle), "q1": float(low), "q3": float(high)}


def summarize(times: Mapping[str, np.ndarray], baseline: str, images: int) -> list[dict[str, Any]]:
    """One row per contender, the fastest first.

    `seconds`: of a call (median and quartiles of the rounds' means); `ratio`: the baseline's time
    over the contender's, in the same round; `latency`: percentiles over all calls, seconds.
    """
    means = {name: values.mean(1) for name, values in times.items()}
    rows = [
        {
            "name": name,
            "seconds": spread(mean),
            "images_per_second": images / float(np.median(mean)),
            "ratio": spread(means[baseline] / mean) if baseline in means else None,
            "latency": {f"p{q}": float(np.percentile(times[name], q)) for q in (50, 99)},
            "rounds": mean.tolist(),
        }
        for name, mean in means.items()
    ]
    return sorted(rows, key=lambda row: row["seconds"]["median"])


def show(title: str, rows: Sequence[Mapping[str, Any]], baseline: str) -> None:
    """Print the rows of `summarize` as a table on stdout."""
    table = Table(title=title, caption=f"ratio: speed relative to {baseline}, by round")
    table.add_column("contender", no_wrap=True)
    for column in ("ms", "IQR", "p99", "images/s", "ratio", "IQR"):
        table.add_column(column, justify="right")
    for row in rows:
        seconds, ratio = row["seconds"], row["ratio"]
        table.add_row(
            row["name"],
            f"{1000 * seconds['median']:.1f}",
            f"{1000 * seconds['q1']:.1f}-{1000 * seconds['q3']:.1f}",
            f"{1000 * row['latency']['p99']:.1f}",
            f"{row['images_per_second']:.1f}",
            f"{ratio['median']:.2f}" if ratio else "",
            f"{ratio['q1']:.2f}-{ratio['q3']:.2f}" if ratio else "",
        )
    Console(width=100).print(table)


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if cpuinfo.exists() else []:
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    flags = set(fields.get("flags", "").split())
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "family": fields.get("cpu family"),
        "model": fields.get("model"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "flags": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile"}),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """That of the working tree, `-dirty` if files differ, or what `PATCHWORD_COMMIT` says."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent)
    except OSError:
        return os.environ.get("PATCHWORD_COMMIT")
    return result.stdout.strip() or os.environ.get("PATCHWORD_COMMIT")


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def headed(device: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """A record: `content` with machine, commit and command."""
    command = shlex.join(["python", *sys.argv])
    return {"machine": machine(device), "commit": commit(), "command": command, **content}


def record(name: str, device: str, content: Mapping[str, Any]) -> Path:
    """Write `results/NAME-MACHINE.json`, with machine, commit and command, and return its path."""
    whole = headed(device, content)
    here = whole["machine"]
    place = here["gpu"] or f"{here['cpu']} family {here['family']} {here['threads']} threads"
    path = RESULTS / f"{slug(name)}-{slug(place)}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n")
    return path
