"""The check of a set of images: every file decoded in full, and what is wrong with them as files
and as a set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from finetune.data import decode, folders, omissions, splits
from finetune.data import images as home
from finetune.data.columns import Layout
from finetune.data.faults import FEW, Fault, Report
from finetune.data.images import ImageSet
from finetune.errors import UserError
from finetune.progress import Progress

# large JPEGs are decoded at a reduced scale that keeps this short side; all their bytes are read
SIDE = 256


def check_data(
    data: str | Path,
    *,
    seed: int = 0,
    layout: Layout = home.AS_NAMED,
    progress: Progress | None = None,
) -> Report:
    """Check what `data` names, divided as a job with this seed would divide it; where it cannot be,
    that is a fault."""
    # what is left out is among the faults
    found = home.load(data, layout=layout, on_empty_class="skip")
    contents, faults = _inspect(found, None, progress)
    try:
        found = home.make_splits(found, contents, seed=seed)
    except UserError as error:
        faults.append(Fault(found.name, "cannot be split", f"{error.what} → {error.fix}"))
    return _report(found, contents, faults)


def check(
    images: ImageSet, digests: Sequence[str] | None = None, *, progress: Progress | None = None
) -> Report:
    """Decode every image fully and list what is wrong; nothing is raised for a bad file.

    Without `digests` they are taken on the way, so that each file is read once. `progress(done,
    total)` is called as images are done.
    """
    return _report(images, *_inspect(images, digests, progress))


def _inspect(
    images: ImageSet, digests: Sequence[str] | None, progress: Progress | None
) -> tuple[list[str], list[Fault]]:
    """The digest of every image ("" where it cannot be read), and what reading and decoding runs
    into."""

    def one(i: int) -> tuple[str, Fault | None]:
        digest = ""
        try:
            data = images.read(i)
            digest = hashlib.sha256(data).hexdigest() if digests is None else digests[i]
            decode.decode(data, short_side=SIDE)
        except decode.DecodeError as error:
            return digest, Fault(images.paths[i], error.kind, error.detail)
        except UserError as error:
            return "", Fault(images.paths[i], "unreadable", error.what)
        return digest, None

    contents: list[str] = []
    faults: list[Fault] = []
    for digest, fault in home.in_threads(one, range(len(images))):
        contents.append(digest)
        faults += [fault] if fault else []
        if progress:
            progress(len(contents), len(images))
    return contents, faults


def _report(images: ImageSet, digests: Sequence[str], faults: list[Fault]) -> Report:
    counts = home.counts(images, np.ones(len(images), dtype=bool))
    split = np.full(len(images), "") if images.split is None else images.split
    parts = {name: home.counts(images, split == name) for name in splits.SPLITS if name in split}
    train = parts.get("train", counts)
    same = splits.alike(digests)
    faults = [
        *faults,
        *(
            fault
            for fault in omissions.account(images)
            if fault.kind not in (omissions.RESULTS, omissions.ASIDE)
        ),
    ]
    if images.classes:
        faults += [
            Fault(images.paths[group[0]], home.TWO_LABELS, home.in_words(images, group))
            for group in home.two_labels(images, digests)
        ]
    faults += [
        Fault(name, home.EMPTY_CLASS, "no training images")
        for name, count in train.items()
        if not count
    ]
    if images.groups is not None and images.split is not None:
        torn = splits.torn(images.groups, images.split)
        faults += [
            Fault(images.paths[i], "group in several splits", f"{group!r} is in {names}")
            for group, (i, names) in torn.items()
        ]
    full = [count for count in counts.values() if count]
    return Report(
        name=images.name,
        images=len(images),
        faults=tuple(faults),
        classes=counts,
        parts=parts,
        duplicates=tuple(tuple(images.paths[i] for i in group) for group in same),
        across_splits=tuple(home.across_splits(images, digests)),
        imbalance=max(full) / min(full) if full else 1.0,
        few={name: count for name, count in train.items() if 0 < count < FEW},
        untested=tuple(home.untested(images)),
        notes=(
            *images.notes,
            *folders.told(images.root, [path for path in images.ignored if path.endswith("/")]),
        ),
    )
