"""Features of photos, from files to pooled vectors: patchword's path against timm's, in one run;
and the few-shot solver against scikit-learn's Ridge.

    python benchmarks/features.py --images 64 --rounds 7
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from sklearn.linear_model import Ridge
from torch import Tensor

import peers
import timing
from patchword.data.files import image_files
from patchword.data.registry import open_source
from patchword.data.sources import Source
from patchword.evaluation.fewshot import BIAS, L2, fit_least_squares
from patchword.evaluation.linear import EPSILON
from patchword.models.vit import ViT
from patchword.session.features import extract

BASELINE = "timm"


@dataclass(frozen=True, kw_only=True)
class Options(timing.Options):
    """Options of this benchmark."""

    data: str | None = None
    """a folder with a folder per class; by default photos of noise, made for the run"""
    images: int = 128
    """images of one call"""
    side: tuple[int, int] = (375, 500)
    """height and width of the photos made"""
    batch_size: int = 32
    rounds: int = 9
    warmup: int = 1
    solver: tuple[tuple[int, int, int], ...] = ((425, 192, 17), (20_000, 768, 100))
    """images, width and classes of the few-shot problems"""


# The features ------------------------------------------------------------------------------------


def make_photos(folder: Path, options: Options) -> None:
    """Smooth noise as JPEG files of quality 90 in two classes."""
    rng = np.random.default_rng(options.seed)
    height, width = options.side
    for i in range(options.images):
        small = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        path = folder / str(i % 2) / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)


def timm_path(model: ViT, paths: list[str], options: Options) -> Callable[[], Tensor]:
    """`forward_features` and pooling over the same files, with timm's own transform."""
    peer: Any = peers.build("timm", model).eval().to(options.device)
    data = importlib.import_module("timm.data")
    mean, std = model.preprocess.mean, model.preprocess.std
    transform = data.create_transform(
        options.image_size,
        interpolation=model.preprocess.interpolation,
        mean=mean,
        std=std,
        crop_pct=model.preprocess.crop_fraction,
    )

    def features() -> Tensor:
        rows: list[Tensor] = []
        with torch.inference_mode():
            for start in range(0, len(paths), options.batch_size):
                chunk = paths[start : start + options.batch_size]
                images = [transform(Image.open(path).convert("RGB")) for path in chunk]
                batch = torch.stack(images).to(options.device)
                tokens = peer.forward_features(batch)
                rows.append(peer.forward_head(tokens, pre_logits=True).float().cpu())
        return torch.cat(rows)

    return features


def our_path(
    model: ViT, source: Source, indices: np.ndarray, options: Options, precision: str
) -> Callable[[], Tensor]:
    """`extract`, without its cache."""

    def features() -> Tensor:
        return extract(
            model,
            source,
            indices,
            device=options.device,
            batch_size=options.batch_size,
            precision=precision,
            cache=False,
        ).pooled

    return features


def measure_features(options: Options) -> dict[str, Any]:
    """Rows of all contenders, and how far their features are from timm's."""
    model = peers.from_options(options)
    with contextlib.ExitStack() as stack:
        folder = options.data
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            make_photos(Path(folder), options)
        source = open_source(folder)
        indices = np.arange(min(options.images, len(source)))
        paths = [str(path) for path, _ in image_files(folder)]
        paths = sorted(paths)[: len(indices)]
        calls: dict[str, Callable[[], Tensor]] = {BASELINE: timm_path(model, paths, options)}
        for precision in ("float32", "bfloat16"):
            name = f"patchword {precision}"
            if options.wants(name, BASELINE):
                calls[name] = our_path(model, source, indices, options, precision)
        wanted = calls[BASELINE]()
        apart = {
            name: float((call() - wanted).norm() / wanted.norm()) for name, call in calls.items()
        }
        rows = timing.summarize(timing.interleave(calls, options, 1), BASELINE, len(indices))
    title = f"{options.title}, features of {len(indices)} photos, in one process"
    timing.show(title, rows, BASELINE)
    return {"images": len(indices), "relative_difference_from_timm": apart, "rows": rows}


# The solver --------------------------------------------------------------------------------------


def measure_solver(options: Options, count: int, width: int, classes: int) -> dict[str, Any]:
    """One few-shot problem, solved by both; scikit-learn's design matrix is made by hand."""
    generator = torch.Generator().manual_seed(options.seed)
    features = torch.randn(count, width, generator=generator)
    labels = torch.arange(count) % classes

    def ours() -> Tensor:
        weight, bias = fit_least_squares(features, labels, classes)
        return torch.addmm(bias, features[:64].double(), weight.T)

    def theirs() -> Tensor:
        raw = features.double().numpy()
        mean, std = raw.mean(0), raw.std(0) + EPSILON
        design = np.pad((raw - mean) / std, ((0, 0), (0, 1)), constant_values=BIAS)
        targets = np.where(labels.numpy()[:, None] == np.arange(classes), 1.0, -1.0)
        model = Ridge(alpha=L2, fit_intercept=False, solver="cholesky").fit(design, targets)
        return torch.from_numpy(model.predict(design[:64]))

    apart = float((ours() - theirs()).abs().max())
    calls = {"scikit-learn Ridge": theirs, "patchword": ours}
    rows = timing.summarize(timing.interleave(calls, options, 1), "scikit-learn Ridge", count)
    timing.show(f"few-shot, {count:,} x {width}, {classes} classes", rows, "scikit-learn Ridge")
    return {
        "problem": {"images": count, "width": width, "classes": classes},
        "largest_logit_difference": apart,
        "rows": rows,
    }


def main(options: Options) -> None:
    content: dict[str, Any] = {"settings": asdict(options), "baseline": BASELINE}
    content["features"] = measure_features(options)
    content["solver"] = [measure_solver(options, *problem) for problem in options.solver]
    if options.save:
        print(timing.record(f"features {options.title}", options.device, content))


if __name__ == "__main__":
    main(tyro.cli(Options))
