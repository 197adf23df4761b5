"""The map of a data set's features, with the nearest neighbours of each mistake."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from patchword.commands.figure_folder import Folder, numbers
from patchword.data.images import BadImage
from patchword.data.sources import Source
from patchword.evaluation.matching import match_classes
from patchword.inspection.figures.drawing import short
from patchword.inspection.figures.features import Thumbnail, draw_feature_map
from patchword.inspection.tokens import nearest, pooled_map
from patchword.session.features import Features
from patchword.session.session import Session
from patchword.spec.parse import PatchwordError

NEIGHBOURS = 5
ROWS = 6
"""Mistakes that are shown with their neighbours, the surest first."""
CHUNK = 1024
"""Features whose similarity with all others is in memory at a time."""


def spread(indices: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the indices, evenly spaced."""
    if len(indices) <= most:
        return indices
    return indices[np.linspace(0, len(indices) - 1, most).round().astype(np.int64)]


class FeatureMap:
    """A part of a labelled source, to be mapped by the features of a model. Raises `UsageError` if
    the part does not exist."""

    def __init__(self, session: Session, source: Source, split: str | None, most: int) -> None:
        self.session, self.source, self.most = session, source, most
        self.name, self.why, self.part = session.part(source, split)

    def draw(self, folder: Folder) -> dict[str, Any]:
        """Draw `embedding` and return its numbers."""
        features = self.session.features(self.source, spread(self.part, self.most), self.name)
        labels = features.labels.numpy()
        classes = self.source.classes
        with self.session.console.status("mapping the features"):
            points = pooled_map(features.pooled)
            near = np.concatenate(list(_neighbours(features)))
        said = _by_head(self.session, self.source, features) or _by_neighbours(
            labels, near, classes
        )
        wrong = np.flatnonzero(said.labels != labels)
        wrong = wrong[np.argsort(-said.sure[wrong], kind="stable")]
        title = f"Features of {len(labels):,} images of {self.source.name} ({self.name})"
        drawn = draw_feature_map(
            points,
            labels,
            classes,
            mistakes=wrong.tolist(),
            rows=[self._row(features, at, said, near[at]) for at in wrong[:ROWS].tolist()],
            title=title,
        )
        folder.draw("embedding", drawn)
        same = labels[near[:, 0]] == labels if near.shape[1] else np.zeros(0)
        return {
            "part": self.name,
            "from": self.why,
            "images": len(labels),
            "classes": [*classes],
            "labels": labels.tolist(),
            "points": numbers(points),
            "nearest_of_same_class": numbers(same.mean()) if len(same) else None,
            "mistakes_by": said.by,
            "mistakes": [self._mistake(features, at, said, near[at]) for at in wrong.tolist()],
        }

    def _mistake(
        self, features: Features, at: int, said: _Said, near: np.ndarray
    ) -> dict[str, Any]:
        keys, classes = self.source.keys, self.source.classes
        labels, indices = features.labels.tolist(), features.indices.tolist()
        unit = torch.nn.functional.normalize(features.pooled[[at, *near.tolist()]].double())
        likeness = (unit[1:] @ unit[0]).tolist()
        return {
            "image": keys[indices[at]],
            "label": classes[labels[at]],
            "predicted": said.names[at],
            "neighbours": [
                {"image": keys[indices[k]], "label": classes[labels[k]], "cosine": numbers(cosine)}
                for k, cosine in zip(near.tolist(), likeness, strict=True)
            ],
        }

    def _row(self, features: Features, at: int, said: _Said, near: np.ndarray) -> list[Thumbnail]:
        classes, labels = self.source.classes, features.labels.tolist()
        true, given = (short(name, 12) for name in (classes[labels[at]], said.names[at]))
        row = [self._thumbnail(features, at, f"{true},\nsaid {given}", right=False)]
        for k in near.tolist():
            name = short(classes[labels[k]], 12)
            row.append(self._thumbnail(features, k, name, right=labels[k] == labels[at]))
        return row

    def _thumbnail(self, features: Features, at: int, caption: str, *, right: bool) -> Thumbnail:
        transform = self.session.transform
        try:
            image = transform(self.source.read(int(features.indices[at])))
        except BadImage:  # it could be read when its features were computed
            image = np.full((1, *transform.image_size), 255, np.uint8)
        return Thumbnail(image.transpose(1, 2, 0), caption, right)


def _neighbours(features: Features) -> Iterator[np.ndarray]:
    """int64 `[b, k]`, the nearest of each image, the nearest first."""
    for start in range(0, len(features.labels), CHUNK):
        stop = min(start + CHUNK, len(features.labels))
        yield nearest(features.pooled, np.arange(start, stop), NEIGHBOURS)


@dataclass(frozen=True, eq=False)
class _Said:
    """The class that each image was taken for."""

    by: str
    """head or neighbours"""
    labels: np.ndarray
    """int64 `[n]`, positions in the source's classes; -1 for a class that it does not have"""
    names: list[str]
    sure: np.ndarray
    """float `[n]`: the probability, or the share of the neighbours"""


@torch.inference_mode()
def _by_head(session: Session, source: Source, features: Features) -> _Said | None:
    """What the model's head says, or None if it does not know the source's classes."""
    net = session.net
    if net.head is None or not net.classes:
        return None
    try:
        theirs = match_classes(source.classes, net.classes)
    except PatchwordError:
        return None
    if min(theirs) < 0:
        return None
    pooled = features.pooled.to(session.device)
    sure, chosen = net.probabilities(net.classify(pooled).float()).max(dim=1)
    ours = np.full(len(net.classes), -1, np.int64)
    ours[theirs] = np.arange(len(theirs))
    picked = chosen.cpu().numpy()
    return _Said("head", ours[picked], [net.classes[k] for k in picked], sure.cpu().numpy())


def _by_neighbours(labels: np.ndarray, near: np.ndarray, classes: Sequence[str]) -> _Said:
    """The most frequent label of each image's neighbours `[n, k]`, of equals the nearest's; its own
    where there are none."""
    found, sure = labels, np.zeros(len(labels))
    if near.shape[1]:
        votes = labels[near]
        counts = (votes[:, :, None] == votes[:, None]).sum(axis=2)
        found = votes[np.arange(len(votes)), counts.argmax(axis=1)]
        sure = counts.max(axis=1) / votes.shape[1]
    return _Said("neighbours", found, [str(classes[k]) for k in found.tolist()], sure)
