"""What each family of models is called, tagged and cited as."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """How report and card speak of a family."""

    title: str
    tags: tuple[str, ...]
    """of the Hugging Face hub"""
    paper: str
    """what the architecture is called in its paper"""
    citation: str
    """BibTeX of that"""


_VIT = (
    "the Vision Transformer",
    """@inproceedings{dosovitskiy2021image,
  title     = {An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale},
  author    = {Alexey Dosovitskiy and Lucas Beyer and Alexander Kolesnikov and Dirk Weissenborn
               and Xiaohua Zhai and Thomas Unterthiner and Mostafa Dehghani and Matthias Minderer
               and Georg Heigold and Sylvain Gelly and Jakob Uszkoreit and Neil Houlsby},
  booktitle = {International Conference on Learning Representations},
  year      = {2021},
  url       = {https://openreview.net/forum?id=YicbFdNTTy}
}""",
)
_BIT = (
    "Big Transfer",
    """@inproceedings{kolesnikov2020big,
  title     = {Big Transfer (BiT): General Visual Representation Learning},
  author    = {Alexander Kolesnikov and Lucas Beyer and Xiaohua Zhai and Joan Puigcerver and
               Jessica Yung and Sylvain Gelly and Neil Houlsby},
  booktitle = {European Conference on Computer Vision},
  year      = {2020},
  url       = {https://arxiv.org/abs/1912.11370}
}""",
)
_MIXER = (
    "the MLP-Mixer",
    """@inproceedings{tolstikhin2021mixer,
  title     = {MLP-Mixer: An all-MLP Architecture for Vision},
  author    = {Ilya Tolstikhin and Neil Houlsby and Alexander Kolesnikov and Lucas Beyer and
               Xiaohua Zhai and Thomas Unterthiner and Jessica Yung and Andreas Steiner and
               Daniel Keysers and Jakob Uszkoreit and Mario Lucic and Alexey Dosovitskiy},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2021},
  url       = {https://arxiv.org/abs/2105.01601}
}""",
)


def family_of(model: str) -> Family:
    """The family of a variant, by its name."""
    if model.startswith("BiT-"):
        return Family("ResNet of Big Transfer (BiT)", ("resnet",), *_BIT)
    if model.startswith("Mixer-"):
        return Family("MLP-Mixer", ("mlp-mixer",), *_MIXER)
    if "+ViT-" in model:
        title = "Hybrid of ResNet and Vision Transformer"
        return Family(title, ("vision-transformer", "hybrid"), *_VIT)
    return Family("Vision Transformer", ("vision-transformer",), *_VIT)
