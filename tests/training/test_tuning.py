"""What is trained: which weights, at what cost, and low-rank additions against their formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from settling import settled
from torch import Tensor, nn

from patchword.models.model import Model
from patchword.models.zoo import create_model
from patchword.spec.parse import UsageError, changed
from patchword.spec.train import TrainSpec, TuneSpec
from patchword.training.trainer import Trainer
from patchword.training.tuning import adapted_names, trained_count, trained_names
from patchword.weights.load import load_model

CPU = torch.device("cpu")
LAST = TuneSpec(tune="last", last_blocks=1)
LORA = TuneSpec(tune="lora")


def shaken(name: str = "ViT-mu/8", size: int = 16, **options: Any) -> Model:
    """A model whose logits depend on all weights."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"depth": 3} | options
    model = create_model(name, 5, size, **settings)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def trainer_of(model: Model, dtype: torch.dtype = torch.float32, **changes: Any) -> Trainer:
    return Trainer(model, settled(changed(TrainSpec(source="digits"), **changes), dtype))


def batch(images: int = 6, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, 3, size, size, generator=generator), torch.arange(images) % 5


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# Which -------------------------------------------------------------------------------------------

BLOCK = ("norm1", "norm2", "attention.qkv", "attention.projection", "mlp.hidden", "mlp.output")
TOP = {f"{name}.{kind}" for name in ("norm", "head") for kind in ("weight", "bias")}


def test_all_is_everything():
    model = shaken()
    assert trained_names(model, TuneSpec()) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_last_is_the_last_blocks_norm_and_head(count: int):
    found = trained_names(shaken(depth=2), TuneSpec(tune="last", last_blocks=count))
    wanted = {
        f"blocks.{i}.{name}.{kind}"
        for i in range(2 - count, 2)
        for name in BLOCK
        for kind in ("weight", "bias")
    }
    assert set(found) == wanted | TOP


def test_last_of_other_families():
    with torch.device("meta"):
        resnet = create_model("BiT-R50x1", 5, 64)
        mixer = create_model("Mixer-S/32", 5, 64)
    one = trained_names(resnet, LAST)
    assert {n.rsplit(".", 2)[0] for n in one if n.startswith("stages")} == {"stages.3.2"}
    assert set(one) >= TOP
    four = trained_names(resnet, TuneSpec(tune="last", last_blocks=4))
    inner = {".".join(n.split(".")[:3]) for n in four if n.startswith("stages")}
    assert inner == {"stages.2.5", "stages.3.0", "stages.3.1", "stages.3.2"}
    assert {n.split(".")[1] for n in trained_names(mixer, LAST) if "blocks" in n} == {"7"}


def test_too_many_blocks():
    with pytest.raises(UsageError, match="has 3 blocks, not the 4 of --last-blocks; give fewer"):
        trained_names(shaken(), TuneSpec(tune="last", last_blocks=4))


def test_additions_are_to_the_matrices_of_the_blocks():
    layers = ("attention.qkv", "attention.projection", "mlp.hidden", "mlp.output")
    wanted = {f"blocks.{i}.{name}.weight" for i in range(3) for name in layers}
    assert set(adapted_names(shaken(pool="map", head="mlp"))) == wanted
    assert set(trained_names(shaken(), LORA)) == wanted | TOP
    with torch.device("meta"):
        mixer = create_model("Mixer-S/32", 5, 64, depth=1)
        resnet = create_model("BiT-R50x1", 5, 64)
    parts = ("tokens.hidden", "tokens.output", "channels.hidden", "channels.output")
    assert set(adapted_names(mixer)) == {f"blocks.0.{name}.weight" for name in parts}
    with pytest.raises(UsageError, match="no matrices that --tune lora could add to"):
        trained_names(resnet, LORA)


@pytest.mark.parametrize("tune", ["all", "last", "lora"])
def test_the_count_is_that_of_what_the_optimiser_gets(tune: Any):
    model = shaken()
    tuning = TuneSpec(tune=tune, lora_rank=3)
    trainer = trainer_of(model, **vars(tuning))
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert trained_count(model, tuning) == sum(p.numel() for p in held)


def test_additions_are_decayed_as_the_matrices_are():
    """Both matrices of each; what goes with them, the last norm's weight, is not."""
    model = shaken()
    trainer = trainer_of(model, tune="lora", weight_decay=0.3)
    names = {p: name for name, p in trainer.trained.items()}
    groups = trainer.optimizer.param_groups
    decayed = {names[p] for g in groups if g["weight_decay"] == 0.3 for p in g["params"]}
    pairs = {f"{name}.{part}" for name in adapted_names(model) for part in ("down", "up")}
    assert decayed == pairs | {"head.weight"}


def test_decay_shrinks_additions():
    """Without a gradient (a zero head), by 1 - learning rate x decay a step, 1e-6."""
    model = shaken()
    assert model.head is not None
    nn.init.zeros_(model.head.weight)
    trainer = trainer_of(model, tune="lora", weight_decay=0.5, clip=0.0)
    before = {name: p.detach().clone() for name, p in additions(trainer).items()}
    trainer.step(*batch(), 0.1)
    for name, p in additions(trainer).items():
        torch.testing.assert_close(p.detach(), before[name] * 0.95, rtol=1e-6, atol=1e-7)


# At what cost ------------------------------------------------------------------------------------


def kept_bytes(trainer: Trainer, images: Tensor) -> int:
    """What a forward pass keeps for the backward pass, but for parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = trainer.working(images)
    assert held.requires_grad
    return sum(seen.values())


def test_nothing_is_kept_or_computed_below_the_last_blocks():
    """Of 8 blocks one trains: less than a sixth of the activations are kept (a class token's last
    block is cheaper than the others: all tokens are pooled here)."""
    images, labels = batch()
    settings: dict[str, Any] = {"depth": 8, "pool": "gap"}
    whole = kept_bytes(trainer_of(shaken(**settings)), images)
    trainer = trainer_of(shaken(**settings), tune="last", last_blocks=1)
    assert kept_bytes(trainer, images) < whole / 6
    F.cross_entropy(trainer.working(images), labels).backward()
    got = {name for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert got == set(trainer.trained)


@pytest.mark.parametrize("tune", ["last", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rest_stays_and_the_optimiser_holds_no_more(tune: str, dtype: torch.dtype):
    model = shaken()
    before = weights(model)
    trainer = trainer_of(model, dtype, tune=tune, last_blocks=1, weight_decay=0.1)
    for _ in range(2):
        trainer.step(*batch(), 0.01)
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    tuning = trainer.settled.request.tuning
    assert moved == set(trained_names(model, tuning))
    slots = {id(p) for p in trainer.optimizer.state}
    assert slots == {id(p) for p in trainer.trained.values()}
    for mine, master in zip(
        trainer.working.module.parameters(), trainer.model.parameters(), strict=True
    ):
        assert torch.equal(mine, master.to(dtype))


# Low-rank additions ------------------------------------------------------------------------------


def lora(dtype: torch.dtype = torch.float32, **changes: Any) -> Trainer:
    settings = {"tune": "lora", "lora_rank": 3, "lora_alpha": 7.0, "clip": 0.0} | changes
    return trainer_of(shaken(), dtype, **settings)


def additions(trainer: Trainer) -> dict[str, nn.Parameter]:
    assert trainer.adapters is not None
    return trainer.adapters.parameters


def shake_additions(trainer: Trainer) -> None:
    assert trainer.adapters is not None
    with torch.no_grad():
        for p in trainer.adapters.parameters.values():
            p.add_(0.1 * torch.randn_like(p))
    trainer.adapters.merge()
    trainer.working.refresh()


def test_they_start_from_the_given_weights():
    trainer = lora()
    before = weights(trainer.model)
    found = additions(trainer)
    assert trainer.adapters is not None
    trainer.adapters.merge()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    for name, p in found.items():
        rank = p.shape[1 if name.endswith(".up") else 0]
        assert rank == 3
        if name.endswith(".up"):
            assert not p.any()
        else:
            limit = 1 / math.sqrt(p.shape[1])
            assert p.abs().max() <= limit
            assert p.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.2)
    drawn = [p for name, p in found.items() if name.endswith("qkv.weight.down")]
    assert not torch.equal(drawn[0], drawn[1])
    again = additions(lora())
    assert all(torch.equal(p, again[name]) for name, p in found.items())


def by_formula(trainer: Trainer, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's weights as functions of what is trained."""
    found = additions(trainer)
    values: dict[str, Tensor] = dict(trainer.model.named_parameters())
    for name in base:
        values[name] = base[name] + 7 / 3 * found[f"{name}.up"] @ found[f"{name}.down"]
    return values


def gradients_of(
    trainer: Trainer, logits: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    images, labels = batch()
    for p in trainer.trained.values():
        p.grad = None
    out = logits(images)
    F.cross_entropy(out, labels).backward()
    trainer.working.collect()
    return out.detach(), {
        n: p.grad.clone() for n, p in trainer.trained.items() if p.grad is not None
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_logits_and_gradients_are_those_of_the_formula(dtype: torch.dtype, tolerance: float):
    """Relative to the largest, against autograd through base + alpha / rank * up @ down; in float32
    and with a working copy in bfloat16. The class token's last block reads the qkv weight itself.
    """
    trainer = lora(dtype)
    base = {name: value for name, value in weights(trainer.model).items() if "blocks" in name}
    base = {name: value for name, value in base.items() if name in adapted_names(trainer.model)}
    assert len(base) == 3 * 4
    shake_additions(trainer)
    values = by_formula(trainer, base)
    logits, found = gradients_of(trainer, trainer.working)
    wanted_logits, wanted = gradients_of(
        trainer, lambda images: torch.func.functional_call(trainer.model, values, (images,))
    )
    assert found.keys() == wanted.keys() == trainer.trained.keys()
    assert (logits - wanted_logits).abs().max() < tolerance * wanted_logits.abs().max()
    for name, value in wanted.items():
        assert (found[name] - value).norm() < tolerance * value.norm() + 1e-7, name
    assert all(p.grad is None for n, p in trainer.model.named_parameters() if n in base)


def test_micro_batches_of_additions_add_up():
    """1e-5 relative in float32, over two SGD steps."""
    found = []
    for parts in (1, 3):
        trainer = lora(parts=parts, batch_size=6, optimizer="sgd", clip=0.5)
        for _ in range(2):
            trainer.step(*batch(), 0.1)
        found.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_learn_a_batch(dtype: torch.dtype):
    trainer = lora(dtype)
    losses = [trainer.step(*batch(), 0.01)[0] for _ in range(40)]
    assert losses[-1] < 0.2 * losses[0]


def test_what_is_saved_is_merged_and_loads_anywhere(tmp_path: Path):
    """Bit for bit the trained weights, under the plain names; logits within 1e-5, as the memory of
    a file is aligned otherwise."""
    trainer = lora(average=0.5)
    for step in range(3):
        trainer.progress.step = step
        trainer.step(*batch(), 0.01)
    trainer.write(tmp_path)
    assert trainer.average is not None
    for name, model in (("model", trainer.model), ("average", trainer.average.model)):
        loaded = load_model(tmp_path / f"{name}.safetensors")
        found, wanted = weights(loaded), weights(model)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[key]) for key, value in found.items())
        images = batch()[0]
        torch.testing.assert_close(loaded(images), model.eval()(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tune", ["last", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_restored_bit_for_bit(tmp_path: Path, tune: str, dtype: torch.dtype):
    """Even into a trainer that started from other weights."""

    def fresh(model: Model) -> Trainer:
        return trainer_of(model, dtype, tune=tune, last_blocks=1, average=0.9, layer_decay=0.7)

    kept, restored = fresh(shaken()), fresh(create_model("ViT-mu/8", 5, 16, depth=3))
    for _ in range(3):
        kept.step(*batch(), 0.01)
        kept.progress.step += 1
    kept.write(tmp_path)
    restored.read(tmp_path, vars(kept.progress))
    losses = [[trainer.step(*batch(), 0.01) for _ in range(3)] for trainer in (kept, restored)]
    assert losses[0] == losses[1]
    assert kept.average is not None
    assert restored.average is not None
    for a, b in ((kept.model, restored.model), (kept.average.model, restored.average.model)):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_layer_decay_reaches_the_update():
    """SGD without momentum: each weight moves by the rate of its layer times its gradient."""
    trainer = trainer_of(
        shaken(), optimizer="sgd", momentum=0.0, weight_decay=0.0, clip=0.0, layer_decay=0.5
    )
    before = weights(trainer.model)
    images, labels = batch()
    F.cross_entropy(trainer.model(images), labels).backward()
    gradients = {n: p.grad.clone() for n, p in trainer.trained.items() if p.grad is not None}
    trainer.optimizer.zero_grad()
    trainer.step(images, labels, 0.1)
    for name, scale in (("patch_embedding.weight", 1 / 16), ("blocks.1.mlp.hidden.bias", 1 / 4)):
        moved = before[name] - trainer.trained[name].detach()
        torch.testing.assert_close(moved, 0.1 * scale * gradients[name], rtol=1e-3, atol=1e-6)
