"""Which class of a model is which class of the data: by name, never by position unasked."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from patchword.data.class_names import IMAGENET, imagenet, synsets_named
from patchword.spec.parse import PatchwordError

logger = logging.getLogger("patchword")


def match_classes(data_classes: Sequence[str], model_classes: Sequence[str]) -> list[int]:
    """The model's class index for each class of the data, by name; -1 where the model has none.

    Where names differ, those of the same class of ImageNet-1k match: a WordNet id, an English name.
    Equal lists map one to one, even with repeated names. Raises `PatchwordError` where the data use
    a name whose meaning is open: that of several classes of the model, or of ImageNet; and where
    two names of the data mean one class.
    """
    if list(data_classes) == list(model_classes):
        return list(range(len(model_classes)))
    counts = Counter(model_classes)
    for name in data_classes:
        if counts[name] > 1:
            raise PatchwordError(
                f"the model has {counts[name]} classes named {name!r}; rename them in classes.json"
            )
    position = {name: index for index, name in enumerate(model_classes)}
    found = [position.get(name, -1) for name in data_classes]
    synsets = {n: synsets_named(n) for n, k in zip(data_classes, found, strict=True) if k < 0}
    if any(synsets.values()):
        _match_synsets(found, synsets, data_classes, model_classes)
    return found


def _match_synsets(
    found: list[int],
    synsets: Mapping[str, tuple[str, ...]],
    data_classes: Sequence[str],
    model_classes: Sequence[str],
) -> None:
    """Fill in the places of the names in `synsets`, which the model has not as such, by the ids of
    ImageNet that they may mean. Raises as `match_classes`."""
    known: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(model_classes):
        ids = synsets_named(name)
        if len(ids) == 1:
            known[ids[0]].append(index)
    taken = {index: name for name, index in zip(data_classes, found, strict=True) if index >= 0}
    for place, name in enumerate(data_classes):
        ids = synsets.get(name, ())
        indices = [index for synset in ids for index in known.get(synset, [])]
        if len(ids) > 1 and indices:
            raise PatchwordError(
                f"{name!r} is a name of {len(ids)} classes of ImageNet, {' and '.join(ids)}; "
                "rename it to the id that is meant"
            )
        if len(indices) == 1:
            found[place] = indices[0]
            other = taken.setdefault(indices[0], name)
            if other != name:
                raise PatchwordError(
                    f"the data's classes {other!r} and {name!r} are both the model's "
                    f"{model_classes[indices[0]]!r}; join them"
                )


def match_positions(data_classes: Sequence[str], count: int) -> list[int]:
    """The model's class index for each class of the data, where the model names none of its `count`
    classes: their order, which the log says is taken on trust. Raises `PatchwordError` if the
    data have not so many."""
    if len(data_classes) == count:
        logger.warning(
            "the model does not name its %s classes: the data's, in their order, are taken for "
            "them; --classes FILE names them",
            f"{count:,}",
        )
        return list(range(count))
    known = f", --classes {IMAGENET} if they are ImageNet's" if count == len(imagenet()) else ""
    raise PatchwordError(
        f"the model does not name its {count:,} classes, and the data have {len(data_classes):,}: "
        f"labels cannot be matched; name them with --classes FILE{known}"
    )
