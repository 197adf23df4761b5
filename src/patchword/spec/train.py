"""Everything that can be configured, as frozen keyword-only dataclasses.

Standard library only, so that the command line can build its help without importing torch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from patchword.spec import ranges
from patchword.spec.data import AugmentSpec, DataSpec, PreprocessOptions
from patchword.spec.model import (
    Activation,
    Distillation,
    HeadKind,
    Loss,
    Pool,
    Position,
    PositionAt,
)
from patchword.spec.parse import UsageError
from patchword.spec.ranges import Range, check_ranges, may_change, require


@dataclass(frozen=True, kw_only=True)
class OptimSpec:
    """Optimiser, schedule and loss."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = ranges.NOT_NEGATIVE(1e-3)
    """peak learning rate"""
    rates: tuple[float, ...] = ()
    """learning rates tried for a short while before the run; that with the lowest loss on the val
    part becomes --lr; with --sweep each is tried for a whole run"""
    schedule: Literal["cosine", "linear", "rsqrt", "constant"] = "cosine"
    warmup: float = ranges.NOT_NEGATIVE(0.05)
    """steps of linear warm-up; below 1, a share of the run"""
    cooldown: float = ranges.NOT_NEGATIVE(0.0)
    """steps of linear decay to zero at the end (rsqrt and constant); below 1, a share"""
    rsqrt_timescale: int = ranges.ONE_OR_MORE(10_000)
    final_lr: float = ranges.NOT_NEGATIVE(0.0)
    weight_decay: float = ranges.NOT_NEGATIVE(0.05)
    """adamw: decoupled, multiplied by the learning rate; sgd: added to the gradient"""
    decay_all: bool = False
    """decay biases, norms, tokens and position tables too"""
    layer_decay: float = ranges.SHARE(1.0)
    """learning rate of each block relative to the one above it: 0.75 is usual for fine-tuning, 1
    for the same everywhere; a ResNet's stages count as blocks"""
    beta1: float = ranges.BELOW_ONE(0.9)
    beta2: float = ranges.BELOW_ONE(0.999)
    momentum: float = ranges.BELOW_ONE(0.9)
    clip: float = ranges.NOT_NEGATIVE(1.0)
    """global gradient norm, 0 for no clipping"""
    parts: int = ranges.ONE_OR_MORE(1)
    """of a step, computed one after the other, where memory is short; --batch-size is that of the
    whole step, and images are mixed within a part"""
    loss: Loss = "softmax"
    label_smoothing: float = ranges.BELOW_ONE(0.0)
    average: float = ranges.BELOW_ONE(0.0)
    """decay of the exponential moving average of the weights, 0 for none (paper: 0.9999); over
    about the last tenth of the steps done at most"""

    def __post_init__(self) -> None:
        check_ranges(self)
        require(
            all(0 < rate < math.inf for rate in self.rates), f"rates {self.rates} must be positive"
        )


@dataclass(frozen=True, kw_only=True)
class TuneSpec:
    """Which of the weights are trained. A new head and the last norm always are; saved weights are
    whole and plain with any."""

    tune: Literal["all", "last", "lora"] = "all"
    """`all` weights; `last`: only the last blocks; `lora`: small matrices added to those of every
    block, which are merged when saved"""
    last_blocks: int = ranges.ZERO_OR_MORE(2)
    """with `--tune last`: how many blocks to train, 0 for the head and the last norm alone"""
    lora_rank: int = ranges.ONE_OR_MORE(8)
    """with `--tune lora`: rank of what is added to a matrix"""
    lora_alpha: float = ranges.POSITIVE(16.0)
    """with `--tune lora`: what is added is multiplied by alpha / rank"""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class PretrainSpec:
    """Self-supervision, with --objective masked-patch (section 4.6) or mae (arXiv 2111.06377)."""

    mask_rate: float | None = Range(lambda value: 0 < value < 1, "it must be between 0 and 1")(None)
    """share of an image's patches that are corrupted or left out; by default 0.5 for masked-patch
    and 0.75 for mae"""
    predict: Literal["mean", "4x4", "pixels"] = "mean"
    """of masked-patch, from each corrupted patch: its mean colour in 3 bits a channel, 4x4 such
    colours of the down-sized patch, or all its pixels"""
    decoder_depth: int = ranges.ONE_OR_MORE(8)
    """blocks of the decoder of mae"""
    decoder_width: int = ranges.ONE_OR_MORE(512)
    decoder_heads: int = ranges.ONE_OR_MORE(16)
    probe_images: int = ranges.ZERO_OR_MORE(2000)
    """labelled images at most, of train and of val each, by whose features progress is measured;
    0 for the loss alone"""

    def __post_init__(self) -> None:
        check_ranges(self)
        width, heads = self.decoder_width, self.decoder_heads
        require(
            width >= 8 and width % 4 == 0 and width % heads == 0,
            f"decoder_width is {width}; it must be a multiple of 4 and of decoder_heads {heads}, 8 "
            "or more",
        )


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Changes to the named variant; None leaves the variant's own value. Each is a field of a
    family's spec, and `resolve` says which of them a family lacks."""

    depth: int | None = None
    width: int | None = None
    mlp_width: int | None = None
    heads: int | None = None
    layers: tuple[int, int, int, int] | None = None
    """blocks per stage of a BiT ResNet"""
    width_factor: int | None = None
    """of a BiT ResNet's channels"""
    tokens_mlp_width: int | None = None
    """of a Mixer, over the patches"""
    channels_mlp_width: int | None = None
    """of a Mixer, over the channels"""
    pool: Pool | None = None
    head: HeadKind | None = None
    position: Position | None = None
    position_at: PositionAt | None = None
    dropout: float | None = None
    drop_path: float | None = None
    layer_scale: float | None = None
    registers: int | None = None
    qk_norm: bool | None = None
    activation: Activation | None = None
    patch_dropout: float | None = None
    distillation: Distillation | None = None

    def given(self) -> dict[str, Any]:
        """The options that are set, as keyword arguments of `create_model`."""
        return {key: value for key, value in vars(self).items() if value is not None}


ObjectiveName = Literal["classification", "masked-patch", "mae"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """One training run. None and "auto" are resolved once, when the run starts, and stored."""

    source: str
    """what to train on: a folder, a .csv file, parquet, digits, or hub:NAME"""
    recipe: str | None = None
    """where the defaults come from; `patchword recipes` lists them"""
    model: str | None = None
    """variant, such as ViT-S/16; by default that of --init, else of the recipe"""
    init: str | None = None
    """weights to start from: a run directory, a weight file or folder, hub:ORG/NAME, or a name that
    `patchword models --pretrained` lists"""
    trust_pickle: bool = may_change(False)
    """read --init even if it is a pickle (.pth): for files whose source you trust"""
    objective: ObjectiveName = "classification"
    """what is learned: the labels, or without them the colours of corrupted patches (masked-patch)
    or the pixels of patches that the model did not see (mae)"""
    probe: bool = False
    """before training, fit a logistic regression to the frozen features of --init: it is the best
    model until training, which starts from a head of zeros (section 3.2), betters it"""
    image_size: tuple[int, ...] | None = None
    """one side, or height and width, in pixels; by default that of --init, else 224"""
    enlarge: float = Range(lambda value: 1 <= value <= 4, "it must be between 1 and 4")(1.0)
    """without --image-size: how many times the resolution of --init is tried beside it; taken if a
    head on frozen features is better there on the val part, and --time allows 5 epochs"""
    steps: int | None = ranges.ZERO_OR_MORE(None)
    epochs: float | None = ranges.POSITIVE(None)
    images: int | None = ranges.POSITIVE(None)
    time: str | None = None
    """length of the run, one of: steps, epochs, images seen, or time such as 30m, 2h, 90s"""
    batch_size: int = ranges.ONE_OR_MORE(128)
    seed: int = Range(lambda value: -(2**63) <= value < 2**63, "it must fit 64 bits")(0)
    device: Device = "auto"
    precision: Precision = "auto"
    """of the training step; master weights and evaluation are float32"""
    compile: bool = False
    deterministic: bool = False
    """only deterministic kernels: bit-exact resume on CUDA"""
    eval_every: int | None = ranges.POSITIVE(None)
    """steps between evaluations on the val part; by default ten times a run"""
    checkpoint_every: int | None = ranges.POSITIVE(None, free=True)
    """steps between checkpoints; by default at every evaluation"""
    keep: int = ranges.ONE_OR_MORE(2, free=True)
    """checkpoints kept, the newest ones; best/ is kept besides"""
    log_every: int | None = ranges.POSITIVE(None)
    workers: int | None = ranges.ZERO_OR_MORE(None, free=True)
    """loader processes; the batches are the same with any number"""
    on_nan: Literal["stop", "rollback"] = may_change("stop")
    on_save_error: Literal["stop", "continue"] = may_change("stop")
    tensorboard: bool = may_change(False)
    options: ModelOptions = ModelOptions()
    preprocess: PreprocessOptions = PreprocessOptions()
    data: DataSpec = DataSpec()
    augment: AugmentSpec = AugmentSpec()
    optim: OptimSpec = OptimSpec()
    tuning: TuneSpec = TuneSpec()
    pretrain: PretrainSpec = PretrainSpec()

    def __post_init__(self) -> None:
        if self.image_size is not None:
            require(len(self.image_size) in (1, 2), "image_size takes one or two numbers")
            require(min(self.image_size) >= 1, f"image_size is {self.image_size}; use 1 or more")
        check_ranges(self)
        require(
            self.batch_size % self.optim.parts == 0,
            f"batch_size {self.batch_size} is not a multiple of parts {self.optim.parts}",
        )
        if self.time is not None:
            seconds(self.time)
        if self.self_supervised:
            self._check_pretraining()
        else:
            require(
                self.pretrain == PretrainSpec(),
                "--mask-rate, --predict, --decoder-... and --probe-images go with --objective "
                "masked-patch or mae; leave them out, or use another --recipe",
            )

    def _check_pretraining(self) -> None:
        """What asks for labels, or says how to use them, is refused."""
        asked = {
            "--probe": self.probe,
            "--enlarge": self.enlarge != 1,
            "--balance": self.data.balance != "none",
            "--tune": self.tuning.tune != "all",
            "--mixup": self.augment.mixup > 0,
            "--cutmix": self.augment.cutmix > 0,
            "--label-smoothing": self.optim.label_smoothing > 0,
            "--patch-dropout": bool(self.options.patch_dropout),
        }
        for flag, given in asked.items():
            require(
                not given,
                f"{flag} goes with --objective classification, not {self.objective}; leave it out, "
                "or use another --recipe",
            )

    @property
    def self_supervised(self) -> bool:
        """Whether the labels of the data are not learned: they may be missing."""
        return self.objective != "classification"

    @property
    def may_enlarge(self) -> bool:
        """Whether the run chooses its resolution when it starts."""
        return self.enlarge > 1 and self.image_size is None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        size = self.image_size or (224,)
        return (size[0], size[-1])


def seconds(duration: str) -> float:
    """Seconds of `"90s"`, `"30m"`, `"1.5h"`, `"2d"`; a bare number is seconds."""
    scale = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    number, unit = (duration[:-1], duration[-1]) if duration[-1:] in scale else (duration, "s")
    try:
        value = float(number) * scale[unit]
    except ValueError:
        value = math.nan
    require(value > 0 and math.isfinite(value), f"{duration!r} is no time; write 90s, 30m or 2h")
    return value


LENGTHS = ("steps", "epochs", "images", "time")


def with_length(spec: TrainSpec, base: TrainSpec) -> TrainSpec:
    """`spec` with one length: where it differs from `base`, what it changed replaces what `base`
    had. Raises `UsageError` if two lengths were given."""
    given = [n for n in LENGTHS if getattr(spec, n) not in (None, getattr(base, n))]
    if len(given) > 1:
        flags = " and ".join(f"--{name}" for name in given)
        raise UsageError(f"{flags} both set the length of the run; give one of them")
    if given:
        spec = dataclasses.replace(spec, **{n: None for n in LENGTHS if n != given[0]})
    return spec


def without_rates(spec: TrainSpec) -> TrainSpec:
    """`spec` for a learning rate that was given: none are tried."""
    return dataclasses.replace(spec, optim=dataclasses.replace(spec.optim, rates=()))
