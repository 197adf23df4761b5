"""The fast paths of attention on the device, against Eq. 6 and 7 in float64 on the CPU."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from patchword.models.attention import attention, attention_matmul, attention_reference

pytestmark = pytest.mark.device

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
"""Relative, of the output and of each gradient, for inputs already rounded to the dtype."""
SHAPES = [
    (2, 3, 1, 64),
    (3, 1, 2, 16),
    (2, 2, 50, 80),
    (1, 3, 197, 64),
    (2, 2, 257, 72),
    (1, 2, 65, 88),
    (1, 2, 33, 104),
    (5, 3, 17, 8),
]
"""b, h, n, d: one token, class token and patches (odd), head widths of Ti, B, So400m, g, G, H."""
ABSENT = "No available kernel|No viable backend"
"""What torch says of a kernel that the device or the shape rules out."""
Distance = Callable[[Tensor, Tensor], float]


def drawn(
    shape: tuple[int, int, int, int], dtype: torch.dtype, queries: int | None = None
) -> list[Tensor]:
    """q, k, v and the gradient of the output, rounded to `dtype`, on the CPU."""
    b, h, n, d = shape
    asked = n if queries is None else queries
    rows = (asked, n, n, asked)
    return [torch.randn(b, h, length, d).to(dtype) for length in rows]


def differentiated(
    function: Callable[..., Tensor], tensors: list[Tensor], gradient: Tensor
) -> list[Tensor]:
    """The output, and the gradients of all inputs."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]


def agree(
    function: Callable[..., Tensor],
    inputs: list[Tensor],
    gradient: Tensor,
    device: torch.device,
    distance: Distance,
) -> None:
    """Output and gradients of a function on the device are within `TOLERANCE` of the plain ones."""
    wide = [tensor.double() for tensor in inputs]
    wanted = differentiated(attention_reference, wide, gradient.double())
    there = [tensor.to(device) for tensor in inputs]
    found = differentiated(function, there, gradient.to(device))
    for name, ours, theirs in zip(("out", "q", "k", "v", "bias"), found, wanted, strict=False):
        assert ours.dtype is inputs[0].dtype
        scale = theirs.norm()
        if scale < 1e-9:  # one key: the weights are 1, whatever q and k are
            assert ours.double().norm() < TOLERANCE[inputs[0].dtype], name
        else:
            assert distance(ours, theirs) < TOLERANCE[inputs[0].dtype], name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("function", [attention, attention_matmul])
def test_fast_paths_are_the_reference(
    function: Callable[..., Tensor],
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    device: torch.device,
    distance: Distance,
):
    *inputs, gradient = drawn(shape, dtype)
    agree(function, inputs, gradient, device, distance)


@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_few_queries_of_many_tokens(
    dtype: torch.dtype, queries: int, device: torch.device, distance: Distance
):
    """As in the last block, which computes the class token alone, and in the MAP head."""
    *inputs, gradient = drawn((3, 2, 197, 64), dtype, queries)
    agree(attention, inputs, gradient, device, distance)


@pytest.mark.parametrize(("queries", "tokens"), [(17, 17), (1, 50), (2, 50), (197, 197)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_bias_that_learns(
    dtype: torch.dtype, queries: int, tokens: int, device: torch.device, distance: Distance
):
    """The relative position embedding's, at numbers of tokens that no kernel is aligned to."""
    *inputs, gradient = drawn((2, 3, tokens, 16), dtype, queries)
    inputs.append(torch.randn(2, 3, queries, tokens).to(dtype))
    agree(attention, inputs, gradient, device, distance)


@pytest.mark.filterwarnings("ignore")  # torch says why a kernel will not take a shape
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernel", ["MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"])
def test_every_kernel_at_odd_shapes(
    kernel: str, dtype: torch.dtype, device: torch.device, distance: Distance
):
    """Each of PyTorch's kernels that the device has for a dtype, at every shape that it takes."""
    taken = 0
    for shape in SHAPES:
        *inputs, gradient = drawn(shape, dtype)
        try:
            with sdpa_kernel(getattr(SDPBackend, kernel)):
                agree(F.scaled_dot_product_attention, inputs, gradient, device, distance)
        except RuntimeError as error:
            if not re.search(ABSENT, str(error)):
                raise
        else:
            taken += 1
    if not taken:
        pytest.skip(f"{device.type} has no {kernel} for {dtype}")


@pytest.mark.filterwarnings("ignore")
def test_cudnn_where_it_is_used(device: torch.device, distance: Distance):
    """cuDNN's kernel, PyTorch's choice on an H100, with as many queries as it is ever given."""
    if device.type != "cuda":
        pytest.skip("cuDNN is of CUDA")
    for shape in SHAPES:
        if shape[2] == 1:  # `attention` never asks for it: see there
            continue
        *inputs, gradient = drawn(shape, torch.bfloat16)
        try:
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
                agree(F.scaled_dot_product_attention, inputs, gradient, device, distance)
        except RuntimeError as error:
            if not re.search(ABSENT, str(error)):
                raise
