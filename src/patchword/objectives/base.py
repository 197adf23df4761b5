"""What an objective is."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from patchword.models.model import Model
from patchword.objectives.pictures import Pictures
from patchword.spec.batch import Forward


class Objective:
    """What training minimises, and the parts that are trained for it besides the model.

    `parts(model, images, *draws)` turns normalised images `[B, C, H, W]` and random draws into
    predictions; it is None where the model's own output is all there is to compare.
    """

    parts: nn.Module | None = None

    def network(self, model: Model) -> nn.Module:
        """What computes: the model, with the parts if there are any."""
        return model if self.parts is None else Joined(model, self.parts)

    def loss(self, network: Forward, images: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch, a float32 scalar.

        `network` computes what `network(model)` does, perhaps in another precision. `images` float
        `[B, C, H, W]`, normalised; `targets` as the data have them. Random numbers come from
        torch's default generator.
        """
        raise NotImplementedError

    def pictures(self, network: Forward, images: Tensor) -> Pictures:
        """Images beside what the network saw of them and predicts, where it predicts pixels."""
        raise NotImplementedError


class Joined(nn.Module):
    """A model and the parts of an objective as one module: called with images alone the model, with
    draws of the objective too its predictions."""

    def __init__(self, model: Model, parts: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.parts = parts

    def forward(self, images: Tensor, *draws: Tensor) -> Tensor:
        return self.parts(self.model, images, *draws) if draws else self.model(images)


def body(network: nn.Module) -> Model:
    """The model in what an objective's `network` gave."""
    return network.model if isinstance(network, Joined) else cast(Model, network)


def parts_of(network: nn.Module) -> nn.Module | None:
    """The objective's parts in it, None if there are none."""
    return network.parts if isinstance(network, Joined) else None
