"""What a bare machine has: device, versions, and which modules are missing.

    python scripts/gpu/environment.py RESULT.json

Imports nothing of patchword's, so that it says what is missing instead of failing on it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path

NEEDED = {
    "torch": "everything",
    "numpy": "everything",
    "PIL": "everything",
    "safetensors": "everything",
    "rich": "everything",
    "sklearn": "the digits",
    "matplotlib": "figures and reports",
    "pytest": "the tests",
    "hypothesis": "the tests",
}
OPTIONAL = {
    "tyro": "the command line: training is called from Python instead",
    "triton": "compiled steps on a GPU",
    "timm": "nothing here: the comparison with other libraries is not run",
    "transformers": "nothing here",
    "torchvision": "nothing here",
}
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}


def version(module: str) -> str | None:
    """The version of an importable module, None if it is missing."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(module, module))
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def device() -> dict[str, object]:
    """What torch says of the GPU, or of the CPU where there is none."""
    import torch

    found: dict[str, object] = {"type": "cuda" if torch.cuda.is_available() else "cpu"}
    if found["type"] == "cuda":
        facts = torch.cuda.get_device_properties(0)
        found |= {
            "name": facts.name,
            "memory_gib": round(facts.total_memory / 2**30, 1),
            "capability": f"{facts.major}.{facts.minor}",
            "multiprocessors": facts.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
            "tf32_products": torch.backends.cuda.matmul.allow_tf32,
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        }
    return found


def main() -> int:
    """Exit code 1 if something is missing that the sections need."""
    versions = {name: version(name) for name in NEEDED | OPTIONAL}
    missing = [name for name in NEEDED if versions[name] is None]
    for name, use in (NEEDED | OPTIONAL).items():
        if versions[name] is None:
            print(f"missing: {name} (for {use})", file=sys.stderr)
    found = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "versions": versions,
        "missing": missing,
        "device": device() if "torch" not in missing else None,
    }
    Path(sys.argv[1]).write_text(json.dumps(found))
    print(json.dumps(found, indent=1))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
