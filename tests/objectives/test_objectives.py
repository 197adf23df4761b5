"""What all objectives share: learning, precision, averaging, saving, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from settling import settled

from patchword.data.seeding import derived_seed
from patchword.models.vit import ViT
from patchword.models.zoo import create_model, macs
from patchword.objectives import RATES, check_objective, create_objective, training_macs
from patchword.objectives.base import Joined, body, parts_of
from patchword.spec.model import ViTSpec
from patchword.spec.parse import UsageError, changed
from patchword.spec.train import TrainSpec
from patchword.training.trainer import Trainer
from patchword.weights.load import load_model

MakeModel = Callable[..., ViT]
MakeSpec = Callable[..., TrainSpec]
CPU = torch.device("cpu")
both = pytest.mark.parametrize("objective", RATES)


def trainer_of(make_spec: MakeSpec, dtype: torch.dtype = torch.float32, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    options = {"depth": 2, "width": 32, "mlp_width": 64, "heads": 2, "pool": "gap", "dropout": 0.1}
    model = create_model("ViT-mu/4", 0, 16, **options)
    return Trainer(model, settled(make_spec(**settings), dtype))


def stripes(count: int) -> torch.Tensor:
    """Images of one direction and two colours each: what is masked can be known from the rest."""
    generator = torch.Generator().manual_seed(5)
    colours = torch.rand(count, 2, 3, generator=generator) * 2 - 1
    upright = (torch.arange(count) % 2 == 0)[:, None, None]
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    where = torch.where(upright, x // 4 % 2, y // 4 % 2)  # [n, 16, 16]
    return colours[torch.arange(count)[:, None, None], where].permute(0, 3, 1, 2).contiguous()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_falls(make_spec: MakeSpec, objective: str, dtype: torch.dtype):
    """On what can be predicted; MAE's patches get noise, as plain ones are normalised to zero."""
    trainer = trainer_of(make_spec, dtype, objective=objective, weight_decay=0.0)
    images = stripes(32)
    if objective == "mae":
        texture = torch.linspace(-1, 1, 16).view(4, 4).repeat(4, 4)
        images = images * 0.1 + texture * images[:, :1, :1, :1].sign()
    losses = []
    for step in range(150):
        trainer.progress.position = step
        losses.append(trainer.step(images, torch.zeros(32), 3e-3)[0])
    share = 0.75 if objective == "masked-patch" else 0.5
    assert sum(losses[-10:]) < share * sum(losses[:10])


@both
def test_micro_batches_add_up_to_the_mean_over_all(make_spec: MakeSpec, objective: str):
    """Each part corrupts the same number of patches, so that the mean of the parts' losses is that
    of the batch."""
    images = stripes(6)
    whole = trainer_of(make_spec, objective=objective, parts=3, batch_size=6)
    loss, _ = whole.step(images, torch.zeros(6), 0.0)
    parts = []
    for micro, chunk in enumerate(images.chunk(3)):
        torch.manual_seed(derived_seed(0, "model", 0, micro))
        parts.append(whole.objective.loss(whole.network, chunk, torch.zeros(2)).item())
    assert loss == pytest.approx(sum(parts) / 3, rel=1e-5)


@both
def test_draws_depend_on_the_position_alone(make_spec: MakeSpec, objective: str):
    images, losses = stripes(8), []
    for draws in (0, 7):
        trainer = trainer_of(make_spec, objective=objective)
        torch.rand(draws)
        trainer.progress.position = 5
        losses.append(trainer.step(images, torch.zeros(8), 0.0))
    trainer.progress.position = 6
    assert losses[0] == losses[1] != trainer.step(images, torch.zeros(8), 0.0)


@both
def test_the_parts_are_a_function_of_the_seed(make_spec: MakeSpec, objective: str):
    """And drawing them disturbs no other draw."""
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(9)
        model = create_model("ViT-mu/4", 0, 16)
        parts = create_objective(make_spec(objective=objective, seed=seed), model).parts
        assert parts is not None
        found.append((parts.get_parameter("mask_token").clone(), torch.rand(1).item()))
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][0], found[2][0])
    assert found[0][1] == found[1][1] == found[2][1]


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_restored_bit_for_bit(
    tmp_path: Path, make_spec: MakeSpec, objective: str, dtype: torch.dtype
):
    """The parts are trained, averaged, saved in files of their own, and go on as they were."""
    images = stripes(8)
    kept, restored = (
        trainer_of(make_spec, dtype, objective=objective, average=0.9) for _ in range(2)
    )
    assert kept.objective.parts is not None
    fresh = {name: p.clone() for name, p in kept.objective.parts.named_parameters()}
    for _ in range(3):
        kept.step(images, torch.zeros(8), 0.01)
        kept.progress.step += 1
    kept.write(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"objective.safetensors", "average-objective.safetensors"} <= names
    restored.read(tmp_path, json.loads((tmp_path / "state.json").read_text()))
    for trainer in (kept, restored):
        trainer.step(images, torch.zeros(8), 0.01)
    for name, network in kept.networks.items():
        other = restored.networks[name]
        assert isinstance(network, Joined)
        pairs = zip(network.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        parts = parts_of(network)
        assert parts is not None
        assert all(not torch.equal(p, fresh[name]) for name, p in parts.named_parameters())
    raw, average = kept.networks.values()
    name = "patch_embedding.weight"
    assert not torch.equal(body(raw).get_parameter(name), body(average).get_parameter(name))


@both
def test_what_is_saved_is_a_plain_model(tmp_path: Path, make_spec: MakeSpec, objective: str):
    trainer = trainer_of(make_spec, objective=objective)
    trainer.step(stripes(8), torch.zeros(8), 0.01)
    trainer.write(tmp_path)
    model = load_model(tmp_path)
    assert model.spec.num_classes == 0
    assert model(stripes(2)).shape == (2, 32)
    assert not any("mask" in name or "objective" in name for name, _ in model.named_parameters())


def test_classification_has_no_parts_and_is_the_model_itself(make_spec: MakeSpec):
    model = create_model("ViT-mu/4", 10, 16)
    trainer = Trainer(model, settled(make_spec()))
    assert trainer.network is trainer.model is model
    assert trainer.objective.parts is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probe": True}, "--probe goes with --objective classification, not mae"),
        ({"balance": "sampler"}, "--balance"),
        ({"tune": "lora"}, "--tune"),
        ({"mixup": 0.2}, "--mixup"),
        ({"cutmix": 0.2}, "--cutmix"),
        ({"patch_dropout": 0.2}, "--patch-dropout"),
        ({"label_smoothing": 0.1}, "--label-smoothing"),
        ({"objective": "classification", "mask_rate": 0.5}, "--mask-rate, --predict, .* go with"),
        ({"mask_rate": 1.0}, "mask_rate is 1.0"),
        ({"decoder_width": 30}, "decoder_width is 30"),
        ({"decoder_depth": 0}, "decoder_depth is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        changed(TrainSpec(source="x"), **{"objective": "mae"} | settings)


@both
@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("Mixer-S/16", 32, "is for a ViT, not Mixer-S/16"),
        ("BiT-R50x1", 32, "is for a ViT"),
        ("R50+ViT-B/16", 32, "does not go with the hybrid R50.ViT-B/16"),
        ("ViT-Ti/16", 16, "two patches or more"),
    ],
)
def test_models_it_is_not_for_are_refused(
    make_spec: MakeSpec, objective: str, name: str, size: int, message: str
):
    with torch.device("meta"):
        model = create_model(name, 0, size)
    with pytest.raises(UsageError, match=message):
        check_objective(make_spec(objective=objective), model.spec)
    check_objective(make_spec(), model.spec)  # classification takes any


def test_patches_too_small_to_be_down_sized_are_refused(make_spec: MakeSpec):
    spec = create_model("ViT-mu/2", 0, 16).spec
    with pytest.raises(UsageError, match="use --predict mean"):
        check_objective(make_spec(objective="masked-patch", predict="4x4"), spec)
    check_objective(make_spec(objective="masked-patch"), spec)


def test_the_cost_of_masked_patch_is_that_of_the_model_and_the_head(make_spec: MakeSpec):
    spec = create_model("ViT-mu/4", 0, 16).spec
    assert isinstance(spec, ViTSpec)
    head = 8 * spec.width * 512
    assert training_macs(make_spec(objective="masked-patch"), spec) == macs(spec) + head
    assert training_macs(make_spec(), spec) == macs(spec)


def test_an_unknown_objective_is_refused(make_spec: MakeSpec):
    """Not taken for another one."""
    spec = make_spec()
    object.__setattr__(spec, "objective", "rotation")
    with pytest.raises(UsageError, match="unknown objective 'rotation'"):
        create_objective(spec, create_model("ViT-mu/4", 0, 16))
