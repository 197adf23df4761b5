"""Device, precision, compilation: applied to a model from outside."""

from __future__ import annotations

import copy
import ctypes
import functools
import os
import platform
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from patchword.inspection.recorder import Network, twin
from patchword.spec.parse import PatchwordError
from patchword.spec.train import Device, Precision


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices natively (avx512_bf16 or amx_bf16)."""
    try:
        return bool(re.search(r"\b(avx512_bf16|amx_bf16)\b", Path("/proc/cpuinfo").read_text()))
    except OSError:
        return False


def resolve_device(device: Device = "auto") -> torch.device:
    """The named device, or the best there is. Raises `PatchwordError` if it is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if device == "auto":
        device = "cuda" if there["cuda"] else "mps" if there["mps"] else "cpu"
    if not there[device]:
        raise PatchwordError(f"this machine has no {device} device; use --device cpu")
    return torch.device(device)


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of the training step: as named, or bfloat16 where the device is faster with it."""
    if precision == "auto":
        fast = (device.type == "cpu" and cpu_has_bfloat16()) or (
            device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        )
        precision = "bfloat16" if fast else "float32"
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def evaluation_twin(model: Network, device: torch.device | str) -> Network:
    """A copy of a model in evaluation mode on `device`, which shares the tensors if the model lies
    there already. The model stays as it is."""
    place = torch.empty(0, device=device).device  # cuda is cuda:0
    if all(tensor.device == place for tensor in (*model.parameters(), *model.buffers())):
        return twin(model)
    return copy.deepcopy(model).to(device).eval()


def default_workers() -> int:
    """Loader processes where the user names no number: one a core, eight at most."""
    return min(8, usable_cores())


def eval_workers(asked: int | None, images: int) -> int:
    """Loader processes for one pass over so many images, where the user may have named a number."""
    if asked is not None:
        return asked
    return default_workers() if images > 256 else 0


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The CPU's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def make_deterministic() -> None:
    """Allow only deterministic kernels from here on, in the whole process (CUDA; the CPU's are
    deterministic at a fixed number of threads)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def keep_memory() -> None:
    """Have the C library keep freed memory for the next step instead of returning it to the
    system (glibc on Linux; elsewhere nothing happens).

    A step allocates and frees the same activations every time; without this, Linux clears their
    pages anew at each step: 11,000 page faults and 6 % of the time of a ViT-Ti/16 step.
    """
    trim_threshold, mmap_threshold = -1, -3
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)


class Working:
    """The copy of a model that computes: in `dtype`, compiled if asked.

    In float32 it is the model itself. In bfloat16 it is a copy whose weights follow the float32
    master weights after each update, and whose gradients are added up in float32 on the master's:
    half the memory traffic of autocast, which converts the weights at every use.
    """

    def __init__(self, master: nn.Module, dtype: torch.dtype, compiled: bool = False) -> None:
        self.master = master
        self.dtype = dtype
        self.module = master
        if dtype is not torch.float32:
            self.module = copy.deepcopy(master).to(dtype)
        self._run = torch.compile(self.module) if compiled else self.module
        self._mine: list[Tensor] = list(self.module.parameters())
        self._masters: list[Tensor] = list(master.parameters())

    def __call__(self, inputs: Tensor, *draws: Tensor) -> Tensor:
        """What it puts out, in float32, for normalised images of any float dtype: logits, or with
        an objective's draws its predictions."""
        return self._run(inputs.to(self.dtype), *draws).float()

    def train(self, mode: bool = True) -> None:
        """Dropout and stochastic depth on or off."""
        self.module.train(mode)

    @torch.no_grad()
    def collect(self) -> None:
        """Add this copy's gradients to the master's."""
        if self.module is self.master:
            return
        for mine, master in zip(self._mine, self._masters, strict=True):
            if mine.grad is None:
                continue
            if master.grad is None:
                master.grad = mine.grad.float()
            else:
                master.grad.add_(mine.grad)
            mine.grad = None

    @torch.no_grad()
    def refresh(self, *, frozen: bool = False) -> None:
        """Take over the master's weights, those that do not train only with `frozen`."""
        if self.module is self.master:
            return
        pairs = zip(self._mine, self._masters, strict=True)
        chosen = [(mine, master) for mine, master in pairs if frozen or master.requires_grad]
        torch._foreach_copy_([mine for mine, _ in chosen], [master for _, master in chosen])
