"""The images of a job: where they are, what they are called, who trains and who judges, and what is wrong with them.

An `ImageSet` holds no pixels. It comes from a folder a class, a folder with train/ val/ test/, a CSV table or a named
set (`load`), or from loose files without labels (`load_unlabelled`). All bytes come through `ImageSet.read`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finetune import decode, folders, machine, named, names, splits, table
from finetune.columns import Layout
from finetune.errors import UserError, printable
from finetune.faults import FEW, Fault, Report, some
from finetune.faults import check_on_bad as check_on_bad
from finetune.faults import list_faults as list_faults

Ints = NDArray[np.int64]
T = TypeVar("T")
Progress = Callable[[int, int], None]

BATCH = 64  # files a thread takes at once
AS_NAMED = Layout()  # columns are found by their names
CHECK_SIDE = 256  # `check` decodes large JPEGs at a reduced scale that keeps this short side; all their bytes are read
WHAT_IS_READ = "give a folder with a folder per class (or train/, val/, test/ of them), a CSV with path,label, or a named set"


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with one label each; `labels` (n,) index `classes`, -1 means unlabelled.

    `paths` are POSIX, unique, and relative to `root`; `name` is what the user typed. `groups` name what belongs together
    (the empty text: nothing), `split` holds `train`, `val` or `test`, both None where not known. `ignored` are files in
    class folders that no image extension announces; `notes` are lines to be told. `source` makes the bytes of a named set.
    """

    name: str
    root: Path
    paths: tuple[str, ...]
    labels: Ints
    classes: tuple[str, ...]
    groups: tuple[str, ...] | None = None
    split: NDArray[np.str_] | None = None
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    source: Callable[[str], bytes] | None = dataclasses.field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def in_memory(self) -> bool:
        """Whether the images are no files: their bytes are made by `source`."""
        return self.source is not None

    def read(self, i: int) -> bytes:
        """The bytes of image i: the one place where they come from. Raises `UserError` where a file cannot be read."""
        if self.source is not None:
            return self.source(self.paths[i])
        try:
            # the hot path: building a Path costs as much as the call
            with open(os.path.join(self.root, self.paths[i]), "rb") as file:  # noqa: PTH118, PTH123
                return file.read()
        except OSError as error:
            raise UserError(
                f"cannot be read ({error.strerror})",
                where=self.root / self.paths[i],
                fix="mend or remove it; `finetune check` lists all such files",
            ) from error

    def subset(self, index: ArrayLike) -> ImageSet:
        """The images at `index`: positions, in their order, or a boolean mask."""
        chosen = np.asarray(index)
        at = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.int64)
        return dataclasses.replace(
            self,
            paths=tuple(self.paths[i] for i in at),
            labels=self.labels[at],
            groups=None if self.groups is None else tuple(self.groups[i] for i in at),
            split=None if self.split is None else self.split[at],
        )


# ------------------------------------------------------------------------------------------------------------ loading


def load(
    data: str | Path, *, test: str | Path | None = None, shots: int | None = None, seed: int = 0, layout: Layout = AS_NAMED
) -> ImageSet:
    """Find the images of `data`; nothing is decoded.

    `data` is a folder with a folder per class, a folder with train/ val/ test/ of them, a CSV, or a named set. The
    classes are those of the training part; another class in val or test is a `UserError`. `test` names more images in
    one of the same forms, all of which become the test part. With `shots` the splits are made at once, and that many
    training images a class are kept. `layout` says which columns of a CSV are what.
    """
    found = _open(str(data), layout)
    if test is not None:
        found = _with_test(found, _open(str(test), layout))
    if layout.given and not any(_is_table(Path(text).expanduser()) for text in (data, test) if text is not None):
        found = dataclasses.replace(
            found, notes=(*found.notes, f"{', '.join(layout.given)} is for CSV tables, and not used here")
        )
    if shots is None:
        return found
    if found.split is None or "test" not in found.split:
        found = make_splits(found, digests(found), seed=seed, val=0.0)
    return take_shots(found, shots, seed)


def load_unlabelled(folder_or_paths: str | Path | Sequence[str | Path]) -> ImageSet:
    """Images without labels: files in the order given, folders with all that is below them, sorted; each file once.

    One folder alone is the root of its paths, else their common folder is.
    """
    given = [folder_or_paths] if isinstance(folder_or_paths, str | Path) else list(folder_or_paths)
    name = str(given[0]) if len(given) == 1 else f"{len(given)} paths"
    root, paths, ignored = folders.gather(given)
    if not paths:
        raise UserError("holds no images", where=name, fix=f"known extensions: {' '.join(sorted(folders.EXTENSIONS))}")
    return ImageSet(name, root, paths, np.full(len(paths), -1, dtype=np.int64), (), ignored=ignored)


def _open(text: str, layout: Layout) -> ImageSet:
    text = names.written(text)
    path = Path(text).expanduser()
    if re.match(r"[a-z]{2,}:", text) and not path.exists():
        found = named.load(text)
        return ImageSet(text, Path(text), found.paths, found.labels, found.classes, split=found.split, source=found.source)
    if path.is_dir():
        return _from_folder(text, path)
    if _is_table(path):
        return _from_table(text, path, layout)
    what = "neither a folder nor a CSV" if path.exists() else "no such file or folder"
    raise UserError(what, where=text or "DATA", fix=WHAT_IS_READ)


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in (".csv", ".tsv") and path.is_file()


def _from_folder(name: str, root: Path) -> ImageSet:
    found = folders.scan(root)
    label = functools.cache(names.spelled)
    labels, classes = splits.class_numbers(name, list(map(label, found.classes)), found.split, map(label, found.known))
    split = None if found.split is None else np.array(found.split, dtype="<U5")
    return ImageSet(name, root, found.paths, labels, classes, split=split, ignored=found.ignored)


def _from_table(name: str, path: Path, layout: Layout) -> ImageSet:
    found = table.read(path, layout)
    rows = found.rows
    split = [row.split for row in rows] if rows[0].split else None
    labels, classes = splits.class_numbers(name, [printable(row.label) for row in rows], split, ())
    return ImageSet(
        name,
        found.root,
        tuple(row.path for row in rows),
        labels,
        classes,
        groups=tuple(row.group for row in rows) if any(row.group for row in rows) else None,
        split=None if split is None else np.array(split, dtype="<U5"),
        notes=found.notes,
    )


def with_classes(images: ImageSet, classes: Sequence[str]) -> ImageSet:
    """The same images with labels that index `classes`, which may be more; a class that is not among them fails by name."""
    words = [images.classes[label] if label >= 0 else "" for label in images.labels]
    known = list(map(printable, classes))  # a run of version 0.1.0 may have others
    return dataclasses.replace(images, labels=splits.numbered(images.name, words, known), classes=tuple(classes))


def _with_test(images: ImageSet, test: ImageSet) -> ImageSet:
    """Join the images of `--test` to the others as their test part."""
    if images.split is not None and "test" in images.split:
        raise UserError("there is a test part already", where=images.name, fix="leave out --test, or the test part")
    if images.in_memory or test.in_memory or test.split is not None:
        raise UserError("--test takes a folder per class, or a CSV without a split column", where=test.name)
    test = with_classes(test, images.classes)
    way = Path(os.path.relpath(test.root, images.root)).as_posix()
    moved = tuple(posixpath.normpath(f"{way}/{path}") for path in test.paths)
    if twice := set(moved) & set(images.paths):
        raise UserError(
            f"{len(twice)} images are among the others already: {names.shown(min(twice))}", where=test.name, fix="move them out"
        )
    before = np.full(len(images), "train") if images.split is None else images.split
    groups = None
    if images.groups is not None or test.groups is not None:
        groups = (images.groups or ("",) * len(images)) + (test.groups or ("",) * len(test))
    return dataclasses.replace(
        images,
        paths=images.paths + moved,
        labels=np.concatenate([images.labels, test.labels]),
        groups=groups,
        split=np.concatenate([before, np.full(len(test), "test", dtype="<U5")]),
        ignored=images.ignored + tuple(f"{way}/{path}" for path in test.ignored),
        notes=images.notes + tuple(f"{test.name}: {note}" for note in test.notes),
    )


# ------------------------------------------------------------------------------------------------- splits and content


def digest_of(images: ImageSet, positions: Iterable[int]) -> Iterator[str]:
    """SHA-256 of the bytes of the images at `positions`, in order, hashed in threads. Raises `UserError` as `read` does."""
    return _in_threads(lambda i: hashlib.sha256(images.read(i)).hexdigest(), positions)


def digests(images: ImageSet, known: Sequence[str | None] | None = None) -> list[str]:
    """SHA-256 of every image; those that are `known` are not read. Files that cannot be read are all named."""
    failed: list[str] = []
    found = [""] * len(images) if known is None else [digest or "" for digest in known]

    def one(i: int) -> str:
        try:
            return hashlib.sha256(images.read(i)).hexdigest()
        except UserError as error:
            failed.append(f"{names.shown(images.paths[i])}: {error.what}")
            return ""

    new = [i for i, digest in enumerate(found) if not digest]
    for i, digest in zip(new, _in_threads(one, new), strict=True):
        found[i] = digest
    if failed:
        what = f"{len(failed)} of {len(images)} images fail; {some(sorted(failed))}"
        raise UserError(what, where=images.name, fix="mend or remove them; `finetune check` lists all such files")
    return found


def group_ids(images: ImageSet, digests: Sequence[str]) -> Ints:
    """Number what must stay together: images with the same bytes, and those of one group. `(n,)`."""
    return splits.components(len(images), digests, images.groups or ())


def make_splits(images: ImageSet, digests: Sequence[str], *, seed: int, test: float = 0.2, val: float = 0.15) -> ImageSet:
    """Say for each image who sees it: train, val or test, stratified by class and by the seed.

    Parts that were given stay as they are. Where no test part is given, the fraction `test` of the training images
    becomes one; where no val part is given, the fraction `val` of the rest, unless that is less than 100 images:
    then all of them train, and cross-validation selects. Images with the same bytes or the same group are not separated;
    each class keeps a training image. Raises `UserError` for one content under two labels, for a class without training
    images, and where no test part can be made.
    """
    if len(digests) != len(images):
        raise ValueError(f"{len(digests)} digests of {len(images)} images")
    if (images.labels < 0).any():
        raise UserError("images without labels cannot be split", where=images.name, fix=WHAT_IS_READ)
    if torn := _two_labels(images, digests):
        what = f"{len(torn)} file{'s' * (len(torn) > 1)} under two labels: {some([_in_words(images, group) for group in torn])}"
        raise UserError(what, where=images.name, fix="remove the wrong one of each; `finetune check` lists them all")
    _need_training_images(images)
    made = splits.assign(images.labels, group_ids(images, digests), images.split, seed=seed, test=test, val=val)
    if "test" not in made:
        raise UserError(
            f"no image can be held out for the test: {len(images)} images are too few, or their groups too large",
            where=images.name,
            fix="add images, or name test images with --test",
        )
    return dataclasses.replace(images, split=made)


def across_splits(images: ImageSet, digests: Sequence[str]) -> list[tuple[str, ...]]:
    """Groups of paths with the same bytes in more than one part: what is judged was seen before. Given parts alone have any."""
    split = np.full(len(images), "") if images.split is None else images.split
    groups = [group for group in splits.alike(digests) if len(set(split[group].tolist())) > 1]
    return [tuple(images.paths[i] for i in group) for group in groups]


def class_counts(images: ImageSet, part: str) -> dict[str, int]:
    """How many images of each class a part has."""
    return _counts(images, np.full(len(images), part == "train") if images.split is None else images.split == part)


def take_shots(images: ImageSet, shots: int, seed: int) -> ImageSet:
    """Keep `shots` training images a class and the test part. A val part is dropped: it would be more labels."""
    if shots < 1:
        raise UserError(f"{shots} images a class", where="shots", fix="1 is the least")
    if images.split is None:
        raise ValueError("make_splits comes before take_shots")
    return images.subset(splits.shots(images.labels, images.split, shots, seed))


def check_parts(images: ImageSet) -> None:
    """Refuse a split set in which a class has no training image, or nothing is left for the test."""
    _need_training_images(images)
    if images.split is None or "test" not in images.split:
        raise UserError("no test image is left", where=images.name, fix="mend the test images; `finetune check` lists bad ones")


def _need_training_images(images: ImageSet) -> None:
    if len(images.classes) < 2:
        raise UserError(f"one class alone ({', '.join(images.classes)})", where=images.name, fix="two are the least")
    train = images.labels if images.split is None else images.labels[images.split == "train"]
    counts = np.bincount(train, minlength=len(images.classes))
    if empty := [name for name, count in zip(images.classes, counts, strict=True) if not count]:
        what = f"{len(empty)} class{'es' * (len(empty) > 1)} without training images: {some(empty)}"
        raise UserError(what, where=images.name, fix="add images, or remove the folder")


def _two_labels(images: ImageSet, digests: Sequence[str]) -> list[list[int]]:
    return [group for group in splits.alike(digests) if len({int(images.labels[i]) for i in group}) > 1]


def _in_words(images: ImageSet, group: Sequence[int]) -> str:
    return " = ".join(f"{names.shown(images.paths[i])} ({images.classes[images.labels[i]]})" for i in group)


def _in_threads(work: Callable[[int], T], positions: Iterable[int]) -> Iterator[T]:
    """`work` of each position, in order; a few batches are under way at a time, so that memory stays small."""
    todo = list(positions)
    with ThreadPoolExecutor(max_workers=min(16, machine.cores() + 1)) as pool:
        for part in pool.map(lambda at: [work(i) for i in todo[at : at + BATCH]], range(0, len(todo), BATCH)):
            yield from part


# ----------------------------------------------------------------------------------------------------------- the check


def check_data(data: str | Path, *, seed: int = 0, layout: Layout = AS_NAMED, progress: Progress | None = None) -> Report:
    """Check what `data` names, divided as a job with this seed would divide it; where it cannot be, that is a fault."""
    found = load(data, layout=layout)
    contents, faults = _inspect(found, None, progress)
    try:
        found = make_splits(found, contents, seed=seed)
    except UserError as error:
        faults.append(Fault(found.name, "cannot be split", error.what))
    return _report(found, contents, faults)


def check(images: ImageSet, digests: Sequence[str] | None = None, *, progress: Progress | None = None) -> Report:
    """Decode every image fully and list what is wrong; nothing is raised for a bad file.

    Without `digests` they are taken on the way, so that each file is read once. `progress(done, total)` is called as
    images are done.
    """
    return _report(images, *_inspect(images, digests, progress))


def _inspect(images: ImageSet, digests: Sequence[str] | None, progress: Progress | None) -> tuple[list[str], list[Fault]]:
    """The digest of every image ("" where it cannot be read), and what reading and decoding runs into."""

    def one(i: int) -> tuple[str, Fault | None]:
        digest = ""
        try:
            data = images.read(i)
            digest = hashlib.sha256(data).hexdigest() if digests is None else digests[i]
            decode.decode(data, short_side=CHECK_SIDE)
        except decode.DecodeError as error:
            return digest, Fault(images.paths[i], error.kind, error.detail)
        except UserError as error:
            return "", Fault(images.paths[i], "unreadable", error.what)
        return digest, None

    contents: list[str] = []
    faults: list[Fault] = []
    for digest, fault in _in_threads(one, range(len(images))):
        contents.append(digest)
        faults += [fault] if fault else []
        if progress:
            progress(len(contents), len(images))
    return contents, faults


def _report(images: ImageSet, digests: Sequence[str], faults: list[Fault]) -> Report:
    counts = _counts(images, np.ones(len(images), dtype=bool))
    split = np.full(len(images), "") if images.split is None else images.split
    parts = {name: _counts(images, split == name) for name in splits.SPLITS if name in split}
    train = parts.get("train", counts)
    same = splits.alike(digests)
    faults = [*faults, *(Fault(path, _why_ignored(path), "left alone") for path in images.ignored)]
    if images.classes:
        faults += [
            Fault(images.paths[group[0]], "two labels", _in_words(images, group)) for group in _two_labels(images, digests)
        ]
    faults += [Fault(name, "empty class", "no training images") for name, count in train.items() if not count]
    if images.groups is not None and images.split is not None:
        torn = splits.torn(images.groups, images.split)
        faults += [
            Fault(images.paths[i], "group in several splits", f"{group!r} is in {where}") for group, (i, where) in torn.items()
        ]
    full = [count for count in counts.values() if count]
    return Report(
        name=images.name,
        images=len(images),
        faults=tuple(faults),
        classes=counts,
        parts=parts,
        duplicates=tuple(tuple(images.paths[i] for i in group) for group in same),
        across_splits=tuple(across_splits(images, digests)),
        imbalance=max(full) / min(full) if full else 1.0,
        few={name: count for name, count in train.items() if 0 < count < FEW},
        notes=images.notes,
    )


def _why_ignored(path: str) -> str:
    named_so = os.path.splitext(path)[1].lower() in folders.EXTENSIONS  # noqa: PTH122
    return "a pipe, a socket or a device" if named_so else "not an image extension"


def _counts(images: ImageSet, mask: NDArray[np.bool_]) -> dict[str, int]:
    labels = images.labels[mask]
    return dict(zip(images.classes, np.bincount(labels[labels >= 0], minlength=len(images.classes)).tolist(), strict=True))


def short_side(images: ImageSet, i: int) -> int:
    """The short side of image i in pixels, from its header. Raises `DecodeError` and `UserError`."""
    return min(decode.size(images.read(i)))
