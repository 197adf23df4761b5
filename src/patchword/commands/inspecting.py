"""`patchword inspect`: the paper's figures of a model, on the user's images."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from patchword.commands.feature_map import FeatureMap, spread
from patchword.commands.figure_folder import Folder, file_names, numbers
from patchword.data.registry import open_source
from patchword.data.sources import Source
from patchword.inspection.attention import (
    attention_maps,
    entropy_of,
    measure_attention,
    query_token,
    rollout,
    uniform_distance,
)
from patchword.inspection.figures.attention import (
    draw_attention_distance,
    draw_attention_maps,
    draw_rollout,
)
from patchword.inspection.figures.drawing import Format
from patchword.inspection.figures.embedding import draw_filters, shown_patches
from patchword.inspection.figures.features import draw_tokens
from patchword.inspection.of_model import NotApplicable, model_filters, model_positions
from patchword.inspection.recorder import require_vit
from patchword.inspection.tokens import token_components
from patchword.models.model import Model
from patchword.models.vit import ViT
from patchword.models.zoo import variant_name
from patchword.session.features import eval_batch_size
from patchword.session.session import Images, Loading, Session
from patchword.spec.parse import PatchwordError, UsageError, at_least

OF_DATA = 128
"""Images taken from the data set where no others are named: as many as in figure 7 of the paper."""
PICTURES = 8
"""Images of which rollout, attention and tokens are drawn, by default."""
MAPPED = 2000
"""Images of the data set that are mapped, by default."""


@dataclass(frozen=True)
class Inspection:
    """What was drawn, and where it lies."""

    out: Path
    summary: dict[str, Any]
    """`summary.json`: every number in the figures; `skipped` says why a figure is missing"""


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What the figures are made from."""

    session: Session
    source: Source
    indices: np.ndarray
    folder: Folder

    @property
    def net(self) -> Model:
        return self.session.net

    @property
    def batch_size(self) -> int:
        """Images whose attention is in memory at a time."""
        return self.session.batch_size or min(32, eval_batch_size(self.net))

    def images(self, what: str) -> Iterator[tuple[Tensor, np.ndarray]]:
        """The images that can be read, uint8 `[b, C, H, W]`, and their positions in the source,
        with progress."""
        return self.session.readable(self.source, self.indices, what, batch_size=self.batch_size)

    def first(self, count: int) -> _Pictures:
        """The first images that can be read."""
        images, at = [], []
        for some, places in self.images("pictures"):
            images.append(some)
            at.append(places)
            if sum(map(len, at)) >= count:
                break
        chosen = torch.cat(images)[:count]
        keys = [self.source.keys[int(index)] for index in np.concatenate(at)[:count]]
        return _Pictures(file_names(keys), keys, chosen.numpy(), self.session.inputs(chosen))


@dataclass(frozen=True)
class _Pictures:
    """The images that are drawn one by one."""

    names: list[str]
    """of the files"""
    keys: list[str]
    images: np.ndarray
    """uint8 `[n, C, H, W]`"""
    inputs: Tensor

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, `[H, W, C]`)."""
        return zip(self.names, self.images.transpose(0, 2, 3, 1), strict=True)

    def said(self, key: str | None, values: Iterable[Any]) -> dict[str, Any]:
        """What is known of each picture, under its name; values that are dictionaries need no
        `key`."""
        rows = zip(self.names, self.keys, values, strict=True)
        return {
            "pictures": {
                name: {"image": image} | (value if key is None else {key: value})
                for name, image, value in rows
            }
        }


def inspect_model(
    model: str | Path | Model,
    images: Images = (),
    *,
    out: str | Path,
    data: str | Path | None = None,
    split: str | None = None,
    query: tuple[int, int] | None = None,
    pictures: int = PICTURES,
    mapped: int = MAPPED,
    format: Format = "png",
    overwrite: bool = False,
    bad: dict[str, str] | None = None,
    **loading: Unpack[Loading],
) -> Inspection:
    """Draw what `model` has learned and what it looks at in `images`, into the folder `out`.

    `images` are those of `predict`; without any, 128 of `data` spread evenly. `data`, a labelled
    source, is what the feature map is of: its part `split` (by default as in `evaluate`), at most
    `mapped` images spread evenly. Averages are over all images; the first `pictures` that can be
    read are drawn one by one. `query` is the patch (row, column), from 0, whose attention is shown
    instead of the class token's. `bad`, if given, receives path -> reason of what cannot be read.
    `model` and `loading` are those of `Session`.

    Raises `PatchwordError` if the model is missing or damaged, no image can be read, or `out` holds
    files and `overwrite` is not set; `UsageError` on numbers out of range.
    """
    at_least("pictures", pictures, 0)
    at_least("mapped", mapped, 1)
    folder = Folder(Path(out), format, overwrite)
    session = Session(model, precision="float32", **loading)
    if isinstance(session.net, ViT):
        query_token(session.net.spec, query)
    features = None
    if data is not None:
        features = FeatureMap(session, open_source(str(data)), split, mapped)
    source, indices = _chosen(session, images, features)
    work = _Work(session=session, source=source, indices=indices, folder=folder)
    shown = work.first(max(pictures, 1))
    folder.prepare()
    figures = _figures(work, shown, query, pictures > 0, features)
    summary = folder.finish(_drawn(work, figures))
    if bad is not None:
        bad |= session.bad
    return Inspection(folder.path, summary)


def _figures(
    work: _Work,
    shown: _Pictures,
    query: tuple[int, int] | None,
    one_by_one: bool,
    features: FeatureMap | None,
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Each figure's name, and what draws it and returns its numbers."""
    figures: dict[str, Callable[[], dict[str, Any]]] = {
        "filters": lambda: _filters(work),
        "position_similarity": lambda: _positions(work, shown.inputs),
        "attention_distance": lambda: _distance(work),
    }
    if one_by_one:
        figures["rollout"] = lambda: _rollouts(work, shown)
        figures["attention"] = lambda: _maps(work, shown, query)
        figures["tokens"] = lambda: _tokens(work, shown)
    if features is not None:
        figures["embedding"] = lambda: features.draw(work.folder)
    return figures


def _chosen(
    session: Session, images: Images, features: FeatureMap | None
) -> tuple[Source, np.ndarray]:
    """A source and the positions in it of the images to look at."""
    if images:
        source = session.images(images)
        return source, np.arange(len(source))
    if features is None:
        raise UsageError("no images given; name files, folders or a pattern, or --data DATA")
    return features.source, spread(features.part, OF_DATA)


def _drawn(work: _Work, figures: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """Each figure's numbers, and why others do not apply."""
    found: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name, draw in figures.items():
        own = name in ("attention_distance", "embedding")  # they say how far they are
        with nullcontext() if own else work.session.console.status(name.replace("_", " ")):
            try:
                found[name] = draw()
            except NotApplicable as reason:
                skipped[name] = str(reason)
    spec = work.net.spec
    return {
        "model": variant_name(spec),
        "image_size": [*spec.image_size],
        "images": len(work.indices),
        "unreadable": dict(work.session.bad),
        "skipped": skipped,
    } | found


def _filters(work: _Work) -> dict[str, Any]:
    components, explained = model_filters(work.net)
    work.folder.draw("filters", draw_filters(components, explained))
    total = numbers(explained.sum())
    return {"explained": numbers(explained), "total": total, "components": numbers(components, 4)}


def _positions(work: _Work, inputs: Tensor) -> dict[str, Any]:
    positions = model_positions(work.net, inputs)
    work.folder.draw("position_similarity", positions.draw())
    rows, cols = (shown_patches(count) for count in positions.values.shape[:2])
    return {
        "position": positions.kind,
        "unit": positions.unit,
        **asdict(positions.structure),
        "rows": rows.tolist(),
        "columns": cols.tolist(),
        "values": numbers(positions.values[np.ix_(rows, cols)], 4),
    }


def _distance(work: _Work) -> dict[str, Any]:
    vit = _with_attention(work.net)
    found = measure_attention(
        vit, (work.session.inputs(images) for images, _ in work.images("attention distance"))
    )
    uniform = uniform_distance(vit.spec)
    drawn = draw_attention_distance(found.distance, uniform=uniform, images=found.images)
    work.folder.draw("attention_distance", drawn)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["layer", "head", "distance_pixels", "entropy_nats"])
    for place, distance in np.ndenumerate(found.distance):
        writer.writerow([*place, f"{distance:.6g}", f"{found.entropy[place]:.6g}"])
    work.folder.write("attention_distance.csv", table.getvalue().encode())
    means = found.distance.mean(axis=1)
    growth = np.nan
    if len(means) > 1 and np.ptp(means) > 0:
        growth = np.corrcoef(np.arange(len(means)), means)[0, 1]
    return {
        "images": found.images,
        "pixels": numbers(found.distance),
        "layer_means": numbers(means),
        "uniform": numbers(uniform),
        "correlation_with_depth": numbers(growth),
        "entropy": numbers(found.entropy),
    }


def _rollouts(work: _Work, shown: _Pictures) -> dict[str, Any]:
    masks = rollout(_with_attention(work.net), shown.inputs)
    for (name, image), mask in zip(shown, masks, strict=True):
        work.folder.draw(f"rollout/{name}", draw_rollout(image, mask))
    return shown.said("mask", (numbers(mask) for mask in masks))


def _maps(work: _Work, shown: _Pictures, query: tuple[int, int] | None) -> dict[str, Any]:
    vit = _with_attention(work.net)
    asked = "class token" if query_token(vit.spec, None) is not None else "patches (mean)"
    found: list[dict[str, Any]] = []
    for (name, image), inputs in zip(shown, shown.inputs, strict=True):
        maps = attention_maps(vit, inputs[None], query)[0]
        shares = maps / np.maximum(maps.sum(axis=(2, 3), keepdims=True), np.finfo(float).tiny)
        rows = torch.from_numpy(shares).flatten(2)[:, :, None]  # [layers, heads, 1, N]
        entropy = entropy_of(rows).numpy()
        drawn = draw_attention_maps(image, maps, entropy, query, asked)
        work.folder.draw(f"attention/{name}", drawn)
        found.append({"entropy": numbers(entropy), "maps": numbers(maps, 4)})
    said = {"query": None, "of": asked}
    if query is not None:
        said = {"query": [*query], "of": f"patch {query[0]},{query[1]}"}
    return said | shown.said(None, found)


def _tokens(work: _Work, shown: _Pictures) -> dict[str, Any]:
    """One set of colours for all pictures."""
    with torch.inference_mode():
        parts = [work.net.features(part) for part in shown.inputs.split(work.batch_size)]
    colours = token_components(torch.cat([part.tokens for part in parts]), parts[0].grid)
    for (name, image), values in zip(shown, colours, strict=True):
        work.folder.draw(f"tokens/{name}", draw_tokens(image, values))
    return shown.said("colours", (numbers(values, 4) for values in colours))


def _with_attention(net: Model) -> ViT:
    try:
        return require_vit(net)
    except PatchwordError as error:
        raise NotApplicable(str(error)) from None
