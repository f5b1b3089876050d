"""The check of a set of images: every file decoded in full, and what is wrong with them as files
and as a set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from finetune.data import csv_table, decode, folders, layouts, omissions, splits
from finetune.data import images as home
from finetune.data.columns import Layout
from finetune.data.faults import FEW, Fault, Report, Rules
from finetune.data.images import ImageSet
from finetune.errors import UserError
from finetune.progress import Progress

# large JPEGs are decoded at a reduced scale that keeps this short side; all their bytes are read
SIDE = 256
# everything that a rule can leave out is found and listed
LISTED = Rules(on_bad="skip", on_conflict="skip", on_empty_class="skip", on_stray="skip")
NOTED = (folders.LINK, folders.LOOP)  # left out, and nothing to be mended
WAYS = {  # the options with which a job goes on, by the kinds of faults
    csv_table.ROW: "--on-bad-image skip (images under two labels: --on-conflict skip, or first)",
    **dict.fromkeys(("unreadable", *decode.KINDS), "--on-bad-image skip"),
    home.TWO_LABELS: "--on-conflict skip, or first",
    home.EMPTY_CLASS: "--on-empty-class skip",
    layouts.STRAY: "--on-stray skip",
}


def check_data(
    data: str | Path,
    *,
    seed: int = 0,
    layout: Layout = home.AS_NAMED,
    progress: Progress | None = None,
) -> Report:
    """Check what `data` names, divided as a job with this seed would divide it; where it cannot be,
    that is a fault."""
    found = home.load(data, layout=layout, rules=LISTED)
    contents, faults = _inspect(found, None, progress)
    # images under two labels are faults already: the others are divided
    rest, kept = found.leave_out(omissions.conflicts(found, contents, LISTED))
    ids = [contents[i] for i in kept]
    try:
        rest = home.make_splits(rest, ids, seed=seed)
    except UserError as error:
        faults.append(Fault(found.name, "cannot be split", f"{error.what} → {error.fix}"))
    return _report(found, contents, faults, (rest, ids))


def check(
    images: ImageSet, digests: Sequence[str] | None = None, *, progress: Progress | None = None
) -> Report:
    """Decode every image fully and list what is wrong; nothing is raised for a bad file.

    Without `digests` they are taken on the way, so that each file is read once. `progress(done,
    total)` is called as images are done.
    """
    contents, faults = _inspect(images, digests, progress)
    return _report(images, contents, faults, (images, contents))


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


def _report(
    images: ImageSet,
    digests: Sequence[str],
    faults: Sequence[Fault],
    divided: tuple[ImageSet, Sequence[str]],
) -> Report:
    """The report on `images` with these contents; `divided` are those that could be, with
    theirs."""
    parted, ids = divided
    counts = home.counts(images, np.ones(len(images), dtype=bool))
    split = np.full(len(parted), "") if parted.split is None else parted.split
    parts = {name: home.counts(parted, split == name) for name in splits.SPLITS if name in split}
    train = parts.get("train", counts)
    left = omissions.account(images)
    all_faults = [*faults, *_by_rules(left)]
    if images.classes:
        all_faults += [
            Fault(images.paths[group[0]], home.TWO_LABELS, home.in_words(images, group))
            for group in home.two_labels(images, digests)
        ]
    all_faults += [
        Fault(name, home.EMPTY_CLASS, "no training images")
        for name, count in train.items()
        if not count
    ]
    if parted.groups is not None and parted.split is not None:
        torn = splits.torn(parted.groups, parted.split)
        all_faults += [
            Fault(parted.paths[i], "group in several splits", f"{group!r} is in {names}")
            for group, (i, names) in torn.items()
        ]
    full = [count for count in counts.values() if count]
    return Report(
        name=images.name,
        images=len(images),
        faults=tuple(all_faults),
        classes=counts,
        parts=parts,
        duplicates=tuple(tuple(images.paths[i] for i in group) for group in splits.alike(digests)),
        across_splits=tuple(home.across_splits(parted, ids)),
        imbalance=max(full) / min(full) if full else 1.0,
        few={name: count for name, count in train.items() if 0 < count < FEW},
        untested=tuple(home.untested(parted)),
        notes=(
            *images.notes,
            *(f"left out: {fault.to_text()}" for fault in left if fault.kind in NOTED),
            *folders.told(images.root, [path for path in images.ignored if path.endswith("/")]),
        ),
        ways=tuple(dict.fromkeys(WAYS[f.kind] for f in all_faults if f.kind in WAYS)),
    )


def _by_rules(left: Sequence[Fault]) -> list[Fault]:
    """What is left out, as faults: a line a file or row, and a line a class without training
    images."""
    faults, classes = list[Fault](), dict[str, list[Fault]]()
    for fault in left:
        if fault.kind == home.EMPTY_CLASS:
            classes.setdefault(fault.detail, []).append(fault)
        elif fault.kind not in (omissions.RESULTS, omissions.ASIDE, *NOTED):
            faults.append(fault)
    for detail, same in classes.items():
        more = f", nor for {len(same) - 1} more" if len(same) > 1 else ""
        faults.append(Fault(same[0].path, home.EMPTY_CLASS, f"{detail} for this image{more}"))
    return faults
