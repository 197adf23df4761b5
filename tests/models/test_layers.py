"""The fast paths of attention against the plain reference, dropout and stochastic depth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchword.models.attention import attention, attention_matmul, attention_reference, drop
from patchword.models.layers import Block, drop_patches, drop_path
from patchword.models.vit import ViT
from patchword.models.zoo import create_model

Attention = Callable[..., Tensor]
PATHS = {"dispatched": attention, "matmul": attention_matmul, "reference": attention_reference}

# Largest error relative to the largest value. bfloat16 keeps 8 bits: 2^-8 = 0.4 %, several times.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def draw(shape: tuple[int, ...], keys: int | None = None, seed: int = 0) -> list[Tensor]:
    """q, k, v and a gradient, float64."""
    generator = torch.Generator().manual_seed(seed)
    b, h, n, d = shape
    longer = (b, h, n if keys is None else keys, d)
    return [
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in (shape, longer, longer, shape)
    ]


def run(path: Attention, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of q, k and v, in `dtype`, as float64."""
    *inputs, gradient = (t.to(dtype) for t in tensors)
    inputs = [t.detach().requires_grad_() for t in inputs]
    output = path(*inputs)
    assert output.dtype is dtype
    output.backward(gradient)
    gradients = [t.grad.double() for t in inputs if t.grad is not None]
    return [output.detach().double(), *gradients]


def compare(ours: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    assert len(ours) == len(wanted) == 4
    for mine, plain in zip(ours, wanted, strict=True):
        assert mine.shape == plain.shape
        assert (mine - plain).abs().max() <= tolerance * plain.abs().max()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("shape", [(2, 3, 17, 8), (1, 1, 1, 4), (2, 2, 65, 64)])
def test_paths_equal_the_reference_with_gradients(
    path: Attention, dtype: torch.dtype, shape: tuple[int, int, int, int]
):
    tensors = draw(shape)
    compare(
        run(path, tensors, dtype),
        run(attention_reference, tensors, torch.float64),
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_paths_take_fewer_queries_than_keys(path: Attention, dtype: torch.dtype):
    """As the pooling head asks: one probe, many tokens."""
    tensors = draw((2, 3, 1, 8), keys=17)
    wanted = run(attention_reference, tensors, torch.float64)
    compare(run(path, tensors, dtype), wanted, TOLERANCE[dtype])


def test_a_single_query_is_kept_from_the_fused_kernels_of_accelerators(
    monkeypatch: pytest.MonkeyPatch,
):
    """cuDNN's backward pass has failed on it. The meta device stands for one that is not a CPU."""
    monkeypatch.delattr("torch.nn.functional.scaled_dot_product_attention")
    q, k, v, _ = (t.to("meta", torch.float32) for t in draw((2, 3, 1, 8), keys=17))
    assert attention(q, k, v).shape == (2, 3, 1, 8)
    with pytest.raises(AttributeError):
        attention(k, k, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference_equals_training(dtype: torch.dtype):
    """The result does not depend on the grad mode."""
    q, k, v, _ = (t.to(dtype) for t in draw((2, 3, 33, 16)))
    trained = attention(q, k, v)
    with torch.inference_mode():
        inferred = attention(q, k, v)
    wanted = attention_reference(q.double(), k.double(), v.double())
    for found in (trained, inferred):
        assert (found.double() - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()


def test_views_as_the_model_makes_them():
    """q, k and v are strided views of one product, not contiguous tensors."""
    qkv = torch.randn(2, 9, 3, 4, 8)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    wanted = attention_reference(q, k, v)
    for path in PATHS.values():
        torch.testing.assert_close(path(q, k, v), wanted, rtol=1e-5, atol=1e-5)


@settings(max_examples=25)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 20), st.integers(1, 16), st.integers(0, 99)
)
def test_attention_is_a_mean_of_the_values(b: int, h: int, n: int, d: int, seed: int):
    """The weights are positive and sum to 1: constant values come back, others stay in range."""
    q, k, v, _ = draw((b, h, n, d), seed=seed)
    for path in PATHS.values():
        torch.testing.assert_close(path(q, k, torch.ones_like(v)), torch.ones_like(v))
        mean = path(q, k, v)
        assert (mean <= v.amax(2, keepdim=True) + 1e-9).all()
        assert (mean >= v.amin(2, keepdim=True) - 1e-9).all()


def test_large_logits_do_not_overflow():
    q, k, v, _ = (t.float() for t in draw((1, 2, 9, 8)))
    for path in PATHS.values():
        assert path(1e4 * q, 1e4 * k, v).isfinite().all()


def test_dropout_scales_what_stays():
    x = torch.ones(200_000)
    dropped = drop(x, 0.25, training=True)
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    assert drop(x, 0.25, training=False) is x
    assert drop(x, 0.0, training=True) is x


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_stochastic_depth_drops_whole_images_and_keeps_the_mean(rate: float):
    count = 40_000
    y = torch.rand(count, 3, 2) + 1
    found = drop_path(y, rate, training=True)
    kept = (found != 0).all(dim=(1, 2))
    assert torch.equal(kept, (found != 0).any(dim=(1, 2)))
    torch.testing.assert_close(found[kept], y[kept] / (1 - rate))
    spread = (rate * (1 - rate) / count) ** 0.5
    assert abs(kept.double().mean().item() - (1 - rate)) < 5 * spread
    assert drop_path(y, rate, training=False) is y
    assert drop_path(y, 0.0, training=True) is y


def test_block_drops_each_branch_on_its_own():
    """Over many images all four of (attention, MLP) x (kept, dropped) occur."""
    block = Block(8, 2, 16, drop_path=0.5)
    for linear in (block.attention.qkv, block.attention.projection):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.ones_(linear.bias)  # every value is 1, so the branch adds 1
    torch.nn.init.zeros_(block.mlp.output.weight)
    torch.nn.init.constant_(block.mlp.output.bias, 10.0)
    added = block(torch.zeros(200, 3, 8))
    assert set(added.unique().tolist()) == {0.0, 2.0, 20.0, 22.0}


def test_patch_dropout_keeps_some_patches_in_order_and_all_leading_tokens():
    x = torch.arange(2 * 12).view(2, 12, 1).float()
    kept = drop_patches(x, prefix=2, rate=0.7)
    assert kept.shape == (2, 5, 1)
    assert torch.equal(kept[:, :2], x[:, :2])
    assert (kept[:, 1:].diff(dim=1) > 0).all()
    assert (kept[1] >= 12).all()
    chosen = {tuple(drop_patches(x, 2, 0.7)[0, 2:, 0].tolist()) for _ in range(20)}
    assert len(chosen) > 10
    assert drop_patches(x, prefix=0, rate=0.999).shape == (2, 1, 1)


def test_patch_dropout_of_a_model_acts_in_training_only():
    model = create_model("ViT-mu/4", 3, 16, patch_dropout=0.5, depth=2, pool="gap")
    assert isinstance(model, ViT)
    images = torch.randn(2, 3, 16, 16)
    seen: list[int] = []
    model.blocks[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    model.train()(images)
    model.eval()(images)
    assert seen == [8, 16]


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_a_bias_is_added_to_the_scaled_logits(path: Attention):
    """Of an equal bias for all keys nothing remains; minus infinity leaves a key out."""
    q, k, v, _ = (t.float() for t in draw((2, 3, 5, 4)))
    bias = torch.randn(2, 3, 5, 5)
    wanted = (q @ k.transpose(-2, -1) / 2 + bias).softmax(-1) @ v
    torch.testing.assert_close(path(q, k, v, bias), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(path(q, k, v, torch.full_like(bias, 3.0)), path(q, k, v))
    bias = torch.zeros_like(bias)
    bias[..., 4] = -torch.inf
    torch.testing.assert_close(path(q, k, v, bias), path(q, k[:, :, :4], v[:, :, :4]))
