"""`patchword doctor`: what this machine can do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from typing import Any

import torch

import patchword
from patchword.training.parallel import resolve_device, resolve_precision
from patchword.workflows.runs import processor

PACKAGES = ("torch", "numpy", "pillow", "safetensors", "tyro", "rich", "matplotlib", "scikit-learn")
EXTRAS = {"hub": ("datasets", "huggingface_hub", "pyarrow"), "tensorboard": ("tensorboard",)}


def examine() -> dict[str, Any]:
    """Devices, precision, threads, versions, free disk and missing extras, as JSON values."""
    device = resolve_device("auto")
    dtype = resolve_precision("auto", device)
    return {
        "patchword": patchword.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": _gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "free disk here": _gib(shutil.disk_usage(".").free),
        "device": device.type,
        "training precision": str(dtype).removeprefix("torch."),
        "GPUs": {
            torch.cuda.get_device_name(i): _gib(torch.cuda.get_device_properties(i).total_memory)
            for i in range(torch.cuda.device_count())
        }
        or "none",
        "C++ compiler for --compile": shutil.which("g++") or shutil.which("clang++") or "none",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "extras": {name: _extra(name, needs) for name, needs in EXTRAS.items()},
    }


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _extra(name: str, needs: tuple[str, ...]) -> str:
    missing = [module for module in needs if importlib.util.find_spec(module) is None]
    if not missing:
        return "installed"
    return f"missing ({', '.join(missing)}): pip install -c constraints.txt -e '.[{name}]'"
