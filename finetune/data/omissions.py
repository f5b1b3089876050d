"""What is left out of a set of images, by which rule, and the account of it.

A rule is asked for where a whole set is at fault, which nobody can mend file by file: one content
under two labels, one content in two parts, a class without training images. What a rule leaves out
stays known in `ImageSet.left_out`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from finetune.data import folders, images, splits
from finetune.data.csv_table import ROW
from finetune.data.faults import Fault, Rules, some
from finetune.data.images import ImageSet, Ints
from finetune.errors import UserError
from finetune.files import Digests
from finetune.names import shown

# why files that are no images are
RESULTS, NO_IMAGE, ASIDE = ("results", "not an image extension", "beside the images")
SPECIAL = "no regular file"
FLATTERS = "which flatters the accuracy"


def apply(pictures: ImageSet, ids: Digests, rules: Rules) -> tuple[ImageSet, Digests]:
    """Leave out what the rules of a recipe say, before the set is divided. Raises `UserError` where
    a rule says stop."""
    for gone in (conflicts, _leaks):
        pictures, kept = pictures.leave_out(gone(pictures, ids, rules))
        ids = ids.take(kept)
    if rules.on_empty_class == "skip":
        pictures, kept = without_untrained(pictures)
        ids = ids.take(kept)
    return pictures, ids


def conflicts(pictures: ImageSet, ids: Sequence[str], rules: Rules) -> dict[int, tuple[str, str]]:
    """Images of a content that stands under two labels: all of them, or all but the first by
    path."""
    gone = {}
    # `make_splits` stops
    for group in images.two_labels(pictures, ids) if rules.on_conflict != "stop" else ():
        order = sorted(group, key=lambda i: pictures.paths[i])
        for i in order[1:] if rules.on_conflict == "first" else order:
            gone[i] = (images.TWO_LABELS, images.in_words(pictures, order))
    return gone


def _leaks(pictures: ImageSet, ids: Sequence[str], rules: Rules) -> dict[int, tuple[str, str]]:
    """Copies of test images in the training and validation parts, and of validation images in the
    training part."""
    if pictures.split is None or rules.on_leak == "tell":
        return {}
    if rules.on_leak == "stop":
        if words := leaks(pictures, ids):
            fix = (
                "remove the copies, or leave them out of the training: "
                "--on-leak skip; --on-leak tell goes on with them"
            )
            raise UserError(words, where=pictures.name, fix=fix)
        return {}
    gone = {}
    ranks = np.array([splits.SPLITS.index(part) for part in pictures.split.tolist()])
    for group in splits.alike(ids):
        last = group[int(ranks[group].argmax())]
        for i in group:
            if ranks[i] < ranks[last]:
                gone[i] = (
                    images.IN_LATER_PART,
                    f"the same image is {shown(pictures.paths[last])} of the "
                    f"{pictures.split[last]} part",
                )
    return gone


def without_untrained(pictures: ImageSet) -> tuple[ImageSet, Ints]:
    """The images and classes without the classes that have no training image, and the positions
    kept."""
    empty = dict.fromkeys(images.untrained(pictures))
    if not empty:
        return pictures, np.arange(len(pictures))
    names = [pictures.classes[label] for label in pictures.labels]
    gone = {
        i: (images.EMPTY_CLASS, f"no training image of {name!r} is left")
        for i, name in enumerate(names)
        if name in empty
    }
    note = (
        f"left out {len(empty)} class{'es' * (len(empty) > 1)} without training images: "
        f"{some(list(map(shown, empty)))}"
    )
    rest, kept = pictures.leave_out(gone)
    rest = images.with_classes(rest, [name for name in pictures.classes if name not in empty])
    return dataclasses.replace(rest, notes=(*rest.notes, note)), kept


def leaks(pictures: ImageSet, ids: Sequence[str]) -> str:
    """A warning where the parts that were given share content, else no text: the accuracy then
    flatters."""
    twice = images.across_splits(pictures, ids)
    if not twice:
        return ""
    words = f"{len(twice)} image{'s' * (len(twice) > 1)} in more than one part, {FLATTERS}"
    return f"{words}: {some([' = '.join(map(shown, group)) for group in twice])}"


def told(pictures: ImageSet) -> tuple[str, ...]:
    """What is left out, and the notes, a line each: counts and the first names."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for fault in pictures.left_out:
        if fault.kind != ROW:  # a note counts these
            what = "folder" if fault.path.endswith("/") else "image"
            kinds.setdefault((what, fault.kind), []).append(shown(fault.path))
    lines = [
        f"{len(paths)} {what}{'s' * (len(paths) > 1)} left out ({kind}): {some(paths)}"
        for (what, kind), paths in kinds.items()
    ]
    return (*pictures.notes, *lines, *folders.told(pictures.root, pictures.ignored))


def account(pictures: ImageSet) -> tuple[Fault, ...]:
    """Everything below the folder of the images that is not among them, each with the reason.

    Every file there is one of `paths`, or is named here; a name that ends with a slash stands for
    all that is below it.
    """
    wrong = folders.disguised(pictures.root, pictures.ignored)
    return (
        *pictures.left_out,
        *(_ignored(pictures, path, wrong) for path in pictures.ignored),
        *(Fault(path, ASIDE, "of no class") for path in pictures.aside),
    )


def _ignored(pictures: ImageSet, path: str, wrong: dict[str, str]) -> Fault:
    if path.endswith("/"):
        return Fault(path, RESULTS, "a run, a gallery or the cache")
    if what := folders.special(str(pictures.root / path)):
        return Fault(path, SPECIAL, what)
    though = f", though its first bytes are {wrong[path]}" if path in wrong else ""
    return Fault(path, NO_IMAGE, f"left alone{though}")
