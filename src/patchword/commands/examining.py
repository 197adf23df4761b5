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
from patchword.session.device import processor, resolve_device, resolve_precision, usable_cores

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
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": _gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "free_disk_here_gib": _gib(shutil.disk_usage(".").free),
        "device": device.type,
        "training_precision": str(dtype).removeprefix("torch."),
        "gpus": [
            {
                "name": torch.cuda.get_device_name(i),
                "memory_gib": _gib(torch.cuda.get_device_properties(i).total_memory),
            }
            for i in range(torch.cuda.device_count())
        ],
        "compiler": shutil.which("g++") or shutil.which("clang++"),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "extras": {name: _extra(name, needs) for name, needs in EXTRAS.items()},
    }


def _gib(size: int) -> float:
    return round(size / 2**30, 1)


def _extra(name: str, needs: tuple[str, ...]) -> str:
    missing = [module for module in needs if importlib.util.find_spec(module) is None]
    if not missing:
        return "installed"
    return f"missing ({', '.join(missing)}): pip install -c constraints.txt -e '.[{name}]'"
