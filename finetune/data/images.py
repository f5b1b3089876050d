"""The images of a job: where they are, what they are called, who trains and who judges.

An `ImageSet` holds no pixels. It comes from a folder a class, a folder with train/ val/ test/, a
CSV table or a named set (`load`), or from loose files without labels (`load_unlabelled`). All bytes
come through `ImageSet.read`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finetune import hardware, names
from finetune.data import csv_table, datasets, decode, folders, layouts, splits
from finetune.data.columns import Layout
from finetune.data.faults import STOP, Fault, Rules, some
from finetune.data.faults import TWO_LABELS as TWO_LABELS
from finetune.data.faults import check_on_bad as check_on_bad
from finetune.data.faults import list_faults as list_faults
from finetune.errors import UserError, printable

Ints = NDArray[np.int64]
T = TypeVar("T")

BATCH = 64  # files a thread takes at once
PACKED = (".zip", ".tar", ".tgz", ".gz", ".7z", ".rar", ".xz", ".bz2")  # archives
AS_NAMED = Layout()  # columns are found by their names
# why images are left out
EMPTY_CLASS, IN_LATER_PART = ("empty class", "in a later part too")
WHAT_IS_READ = (
    "give a folder with a folder per class (or train/, val/, test/ of them), a CSV with "
    "path,label, or a named set"
)


@dataclass(frozen=True)
class Correction:
    """A label that a table corrected: the image's path, its class before, and now."""

    path: str
    given: str
    corrected: str


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with one label each; `labels` (n,) index `classes`, -1 means unlabelled.

    `paths` are POSIX, unique, and relative to `root`; `name` is what the user typed. `groups` name
    what belongs together (the empty text: nothing), `split` holds `train`, `val` or `test`, both
    None where not known. `source` makes the bytes of a named set. What lies there and is not among
    the images: `left_out` by a rule, each with its reason; `ignored` are files in class folders
    that no image extension announces, and folders of results, which end with a slash; `aside` is
    hidden or stands beside the class folders. `notes` are lines to be told; `corrections` say which
    labels are not those that were given.
    """

    name: str
    root: Path
    paths: tuple[str, ...]
    labels: Ints
    classes: tuple[str, ...]
    groups: tuple[str, ...] | None = None
    split: NDArray[np.str_] | None = None
    ignored: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()
    left_out: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()
    corrections: tuple[Correction, ...] = ()
    source: Callable[[str], bytes] | None = dataclasses.field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def in_memory(self) -> bool:
        """Whether the images are no files: their bytes are made by `source`."""
        return self.source is not None

    def read(self, i: int) -> bytes:
        """The bytes of image i: the one place where they come from. Raises `UserError` where a file
        cannot be read."""
        if self.source is not None:
            return self.source(self.paths[i])
        return read_file(os.path.join(self.root, self.paths[i]))

    def leave_out(self, gone: Mapping[int, tuple[str, str]]) -> tuple[ImageSet, Ints]:
        """The images without those at the positions `gone`, which are remembered with kind and
        detail; the positions kept."""
        keep = np.array([i for i in range(len(self)) if i not in gone], dtype=np.int64)
        if not gone:
            return self, keep
        left = tuple(Fault(self.paths[i], *gone[i]) for i in sorted(gone))
        return dataclasses.replace(self.subset(keep), left_out=self.left_out + left), keep

    def accounted(self, way: str = "") -> dict[str, tuple[Any, ...]]:
        """What is no image of the set, and the notes, by the names of the fields; paths as seen
        from another folder by `way`."""

        def seen(path: str) -> str:
            return posixpath.normpath(way + path) + "/" * path.endswith("/") if way else path

        left = tuple(dataclasses.replace(fault, path=seen(fault.path)) for fault in self.left_out)
        return {
            "ignored": tuple(map(seen, self.ignored)),
            "aside": tuple(map(seen, self.aside)),
            "left_out": left,
            "notes": self.notes,
        }

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


def read_file(path: str) -> bytes:
    """The bytes of a file. Raises `UserError` where it cannot be read; a pipe is not even opened:
    that may never end."""
    if what := folders.special(path):
        fix = "give the images below it" if what == "a folder" else "give the file of an image"
        raise UserError(f"not a regular file ({what})", where=path, fix=fix)
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:  # a name with a NUL inside is a ValueError
        why = error.strerror if isinstance(error, OSError) else error
        fix = "mend or remove it; `finetune check` lists all such files"
        raise UserError(f"cannot be read ({why})", where=path, fix=fix) from error


# ------------------------------------------------------------------------------------------ loading


def load(
    data: str | Path,
    *,
    test: str | Path | None = None,
    shots: int | None = None,
    seed: int = 0,
    layout: Layout = AS_NAMED,
    rules: Rules = STOP,
) -> ImageSet:
    """Find the images of `data`; nothing is decoded.

    `data` is a folder with a folder per class, a folder with train/ val/ test/ of them, a CSV, or a
    named set. The classes are those of the training part; another class in val or test is a
    `UserError`, or left out with its images where the `rules` say so; they also say what rows of a
    table at fault do, and images outside of the class folders. `test` names more images in one of
    the same forms, all of which become the test part. With `shots` the splits are made at once, and
    that many training images a class are kept. `layout` says which columns of a CSV are what.
    """
    skip = rules.on_empty_class == "skip"
    found = _labelled(*_open(str(data), layout, rules, test), skip)
    if test is not None:
        found = _with_test(found, _labelled(*_open(str(test), layout, rules), skip), skip)
    found = _told_of_layout(found, layout, data, test)
    if shots is None:
        return found
    if found.split is None or "test" not in found.split:
        found = make_splits(found, digests(found), seed=seed, val=0.0)
    return take_shots(found, shots, seed)


def load_to_judge(
    data: str | Path,
    classes: Sequence[str],
    *,
    layout: Layout = AS_NAMED,
    rules: Rules = STOP,
) -> ImageSet:
    """The images of `data` on which a model of these `classes` is judged: its test part where it
    has one, else all of them.

    Images of other classes are a `UserError`, or left out where the rules say so.
    """
    pictures, words, _ = _open(str(data), layout, rules)
    if pictures.split is not None and "test" in pictures.split:
        test = np.flatnonzero(pictures.split == "test").tolist()
        pictures, words = pictures.subset(test), [words[i] for i in test]
    known = set(map(printable, classes))
    if rules.on_empty_class == "skip":
        other = {
            i: (EMPTY_CLASS, f"the model does not know {word!r}")
            for i, word in enumerate(words)
            if printable(word) not in known
        }
        pictures, kept = pictures.leave_out(other)
        words = [words[i] for i in kept]
    labels = _numbered(pictures.name, words, classes, splits.LEAVE_CLASSES_OUT)
    pictures = dataclasses.replace(pictures, labels=labels, classes=tuple(classes))
    return _told_of_layout(pictures, layout, data)


def _told_of_layout(
    found: ImageSet, layout: Layout, data: str | Path, test: str | Path | None = None
) -> ImageSet:
    """The set, with a note where options of tables were given and there is no table."""
    if layout.given and not any(
        _is_table(Path(text).expanduser()) for text in (data, test) if text is not None
    ):
        found = dataclasses.replace(
            found,
            notes=(*found.notes, f"{', '.join(layout.given)} is for CSV tables, and not used here"),
        )
    return found


def load_unlabelled(folder_or_paths: str | Path | Sequence[str | Path]) -> ImageSet:
    """Images without labels: files in the order given, folders with all that is below them, sorted;
    each file once.

    One folder alone is the root of its paths, else their common folder is.
    """
    given = [folder_or_paths] if isinstance(folder_or_paths, str | Path) else list(folder_or_paths)
    name = str(given[0]) if len(given) == 1 else f"{len(given)} paths"
    root, paths, ignored = folders.gather(given)
    if not paths:
        why = "".join(f"; {line}" for line in folders.told(root, ignored))
        raise UserError(
            f"holds no images{why}",
            where=name,
            fix=f"known extensions: {' '.join(sorted(folders.EXTENSIONS))}",
        )
    return ImageSet(name, root, paths, np.full(len(paths), -1, dtype=np.int64), (), ignored=ignored)


_Opened = tuple[ImageSet, Sequence[str], Sequence[str]]


def _open(text: str, layout: Layout, rules: Rules, test: str | Path | None = None) -> _Opened:
    """The images that `text` names, without labels; the class name of each; known classes."""
    text = names.written(text)
    path = Path(text).expanduser()
    if re.match(r"[a-z]{2,}:", text) and not path.exists():
        return _from_named_set(text)
    if path.is_dir():
        return _from_folder(text, path, rules, test)
    if _is_table(path):
        return _from_table(text, path, layout, rules)
    fix = WHAT_IS_READ
    if text.lower().endswith(PACKED) and path.is_file():
        fix = "unpack it, and give the folder that comes out"
    what = "neither a folder nor a CSV" if path.exists() else "no such file or folder"
    raise UserError(what, where=text or "DATA", fix=fix)


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in (".csv", ".tsv") and path.is_file()


def _unlabelled(name: str, root: Path, paths: tuple[str, ...], **more: Any) -> ImageSet:
    return ImageSet(name, root, paths, np.full(len(paths), -1, dtype=np.int64), (), **more)


def _from_named_set(text: str) -> _Opened:
    found = datasets.load(text)
    words = [found.classes[label] for label in found.labels]
    pictures = _unlabelled(text, Path(text), found.paths, split=found.split, source=found.source)
    return pictures, words, found.classes


def _from_folder(name: str, root: Path, rules: Rules, test: str | Path | None) -> _Opened:
    judged = None if test is None else Path(names.written(str(test))).expanduser()
    found = layouts.scan(root, on_stray=rules.on_stray, test=judged)
    note = layouts.alike_inside(found.paths, found.classes) if found.split is None else ""
    pictures = _unlabelled(
        name,
        root,
        found.paths,
        split=None if found.split is None else np.array(found.split, dtype="<U5"),
        ignored=found.ignored,
        aside=found.aside,
        left_out=found.left_out,
        notes=(*found.notes, note) if note else found.notes,
    )
    label = functools.cache(names.spelled)
    return pictures, list(map(label, found.classes)), list(map(label, found.known))


def _from_table(name: str, path: Path, layout: Layout, rules: Rules) -> _Opened:
    found = csv_table.read(path, layout, rules)
    rows = found.rows
    pictures = _unlabelled(
        name,
        found.root,
        tuple(row.path for row in rows),
        groups=tuple(row.group for row in rows) if any(row.group for row in rows) else None,
        split=np.array([row.split for row in rows], dtype="<U5") if rows[0].split else None,
        left_out=found.left_out,
        notes=found.notes,
    )
    return pictures, [row.label for row in rows], ()


def _labelled(images: ImageSet, words: Sequence[str], known: Sequence[str], skip: bool) -> ImageSet:
    """The images with labels from class names. With `skip`, those of classes that the training part
    lacks are left out."""
    split = None if images.split is None else images.split.tolist()
    if skip and split is not None and "train" in split:
        trained = {
            *known,
            *(word for word, part in zip(words, split, strict=True) if part == "train"),
        }
        images, kept = images.leave_out(
            {i: _untrained(word) for i, word in enumerate(words) if word not in trained}
        )
        words, split = [words[i] for i in kept], [split[i] for i in kept]
    if images.in_memory:  # a named set has its own order of classes
        labels = splits.numbered(images.name, words, known)
        return dataclasses.replace(images, labels=labels, classes=tuple(known))
    labels, classes = splits.class_numbers(images.name, words, split, known)
    return dataclasses.replace(images, labels=labels, classes=classes)


def _untrained(name: str) -> tuple[str, str]:
    return EMPTY_CLASS, f"no training image of {name!r} is left"


def with_classes(images: ImageSet, classes: Sequence[str], way: str = "") -> ImageSet:
    """The same images with labels that index `classes`, which may be more; a class that is not
    among them fails by name."""
    words = [images.classes[label] if label >= 0 else "" for label in images.labels]
    labels = _numbered(images.name, words, classes, way)
    return dataclasses.replace(images, labels=labels, classes=tuple(classes))


def _numbered(name: str, words: Sequence[str], classes: Sequence[str], way: str) -> Ints:
    """Positions of class names in `classes`. A run of version 0.1.0 and a table may have some that
    cannot be printed, which others write as they are shown."""
    text = functools.cache(printable)
    return splits.numbered(name, list(map(text, words)), list(map(text, classes)), way)


def _with_test(images: ImageSet, test: ImageSet, skip: bool) -> ImageSet:
    """Join the images of `--test` to the others as their test part; those that are among the others
    are test images now."""
    if images.split is not None and "test" in images.split:
        raise UserError(
            "there is a test part already",
            where=images.name,
            fix="leave out --test, or the test part",
        )
    if images.in_memory or test.in_memory or test.split is not None:
        fix = (
            "name one of its parts"
            if test.split is not None and not test.in_memory
            else "give files"
        )
        raise UserError(
            "--test takes a folder per class, or a CSV without a split column",
            where=test.name,
            fix=fix,
        )
    if skip:
        known = set(map(printable, images.classes))
        words = [test.classes[label] for label in test.labels]
        test, _ = test.leave_out(
            {i: _untrained(word) for i, word in enumerate(words) if printable(word) not in known}
        )
    test = with_classes(test, images.classes, splits.LEAVE_CLASSES_OUT)
    way = names.way(Path(test.root).absolute(), Path(images.root).absolute())
    moved = [_seen_from(images.root, test.root, way, path) for path in test.paths]
    images = _moved_to_test(images, test, set(moved))
    before = np.full(len(images), "train") if images.split is None else images.split
    groups = None
    if images.groups is not None or test.groups is not None:
        groups = (images.groups or ("",) * len(images)) + (test.groups or ("",) * len(test))
    ours, theirs = images.accounted(), test.accounted(f"{way}/")
    joined: Any = {key: tuple(dict.fromkeys((*ours[key], *theirs[key]))) for key in ours}
    return dataclasses.replace(
        images,
        paths=images.paths + tuple(moved),
        labels=np.concatenate([images.labels, with_classes(test, images.classes).labels]),
        groups=groups,
        split=np.concatenate([before, np.full(len(test), "test", dtype="<U5")]),
        **joined,
    )


def _seen_from(root: Path, folder: Path, way: str, path: str) -> str:
    """A path of `folder`, to which `way` leads, as seen from `root`."""
    if path.startswith(".."):
        return names.way(Path(folder, path).absolute(), Path(root).absolute())
    return posixpath.normpath(f"{way}/{path}")


def _moved_to_test(images: ImageSet, test: ImageSet, theirs: set[str]) -> ImageSet:
    """The images without those that `--test` names, too; a class folder that held nothing else is
    no class."""
    rest = np.array([path not in theirs for path in images.paths], dtype=bool)
    if rest.all():
        return images
    if not rest.any():
        fix = (
            "leave out --test: a part of the images is then held "
            "out by itself; or name a part of them"
        )
        raise UserError(
            "every image is a test image: none is left for training", where=test.name, fix=fix
        )
    count = int((~rest).sum())
    what = f"{count} image{'s' * (count > 1)} of {images.name} {'are' if count > 1 else 'is'}"
    note = f"{what} among those of --test too: for the test alone"
    left = images.subset(rest)
    emptied = (
        set(np.unique(images.labels).tolist())
        - set(np.unique(left.labels).tolist())
        - set(np.unique(test.labels).tolist())
    )
    classes = tuple(name for i, name in enumerate(images.classes) if i not in emptied)
    return dataclasses.replace(with_classes(left, classes), notes=(*left.notes, note))


# ------------------------------------------------------------------------------- splits and content


def digest_of(images: ImageSet, positions: Iterable[int]) -> Iterator[str]:
    """SHA-256 of the bytes of the images at `positions`, in order, hashed in threads. Raises
    `UserError` as `read` does."""
    return in_threads(lambda i: hashlib.sha256(images.read(i)).hexdigest(), positions)


def contents(images: ImageSet) -> list[str]:
    """SHA-256 of every image, in order; of one that cannot be read, the empty text."""

    def one(i: int) -> str:
        try:
            return hashlib.sha256(images.read(i)).hexdigest()
        except UserError:
            return ""

    return list(in_threads(one, range(len(images))))


def digests(images: ImageSet, known: Sequence[str | None] | None = None) -> list[str]:
    """SHA-256 of every image; those that are `known` are not read. Files that cannot be read are
    all named."""
    failed: list[str] = []
    found = [""] * len(images) if known is None else [digest or "" for digest in known]

    def one(i: int) -> str:
        try:
            return hashlib.sha256(images.read(i)).hexdigest()
        except UserError as error:
            failed.append(f"{names.shown(images.paths[i])}: {error.what}")
            return ""

    new = [i for i, digest in enumerate(found) if not digest]
    for i, digest in zip(new, in_threads(one, new), strict=True):
        found[i] = digest
    if failed:
        what = f"{len(failed)} of {len(images)} images fail; {some(sorted(failed))}"
        fix = (
            "mend or remove them (`finetune check` lists all), "
            "or go on without them: --on-bad-image skip"
        )
        raise UserError(what, where=images.name, fix=fix)
    return found


def unreadable(images: ImageSet) -> dict[int, tuple[str, str]]:
    """Positions of files that cannot be opened, with kind and detail for `leave_out`."""

    def one(i: int) -> str:
        path = images.root / images.paths[i]
        if what := folders.special(str(path)):
            return f"not a regular file ({what})"
        try:
            path.open("rb").close()
        except OSError as error:
            return error.strerror or str(error)
        return ""

    found = enumerate([] if images.in_memory else in_threads(one, range(len(images))))
    return {i: ("unreadable", why) for i, why in found if why}


def group_ids(images: ImageSet, digests: Sequence[str]) -> Ints:
    """Number what must stay together: images with the same bytes, and those of one group.
    `(n,)`."""
    return splits.components(len(images), digests, images.groups or ())


def make_splits(
    images: ImageSet, digests: Sequence[str], *, seed: int, test: float = 0.2, val: float = 0.15
) -> ImageSet:
    """Say for each image who sees it: train, val or test, stratified by class and by the seed.

    Parts that were given stay as they are. Where no test part is given, the fraction `test` of the
    training images becomes one; where no val part is given, the fraction `val` of the rest, unless
    that is less than 100 images: then all of them train, and cross-validation selects. A fraction
    of 0 makes no such part. Images with the same bytes or the same group are not separated; each
    class keeps a training image. Raises `UserError` for one content under two labels, for a class
    without training images, and where no test part can be made.
    """
    if len(digests) != len(images):
        raise ValueError(f"{len(digests)} digests of {len(images)} images")
    if (images.labels < 0).any():
        raise UserError(
            "images without labels cannot be split", where=images.name, fix=WHAT_IS_READ
        )
    if torn := two_labels(images, digests):
        what = (
            f"{len(torn)} file{'s' * (len(torn) > 1)} under two labels: "
            f"{some([in_words(images, group) for group in torn])}"
        )
        fix = (
            "remove the wrong one of each (`finetune check` lists them all), or leave them out: "
            "--on-conflict skip, or first"
        )
        raise UserError(what, where=images.name, fix=fix)
    _need_training_images(images)
    together = group_ids(images, digests)
    made = splits.assign(images.labels, together, images.split, seed=seed, test=test, val=val)
    if "test" not in made and test:
        raise UserError(
            f"no image can be held out for the test: {_why_none(images, together)}",
            where=images.name,
            fix="add images, name test images with --test, "
            "or train on all without a test: --test none",
        )
    return dataclasses.replace(images, split=made)


def _why_none(images: ImageSet, together: Ints) -> str:
    """Why each image is needed for the training."""
    if np.bincount(images.labels).max() == 1:
        return f"each of the {len(images.classes)} classes has one image alone"
    few = f"{len(images)} images of {len(images.classes)} classes are too few"
    if len(np.unique(together)) == len(images):
        return few
    return f"{few}, or what must stay together (groups, copies) is too large a part of a class"


def all_for_training(images: ImageSet) -> ImageSet:
    """The same images without a test part: what was given as one trains, and a note says so."""
    if images.split is None or "test" not in images.split:
        return images
    count = int((images.split == "test").sum())
    note = (
        f"the {count} image{'s' * (count > 1)} of the test part "
        f"are for training: no test was asked for"
    )
    split = np.where(images.split == "test", "train", images.split)
    return dataclasses.replace(images, split=split, notes=(*images.notes, note))


def across_splits(images: ImageSet, digests: Sequence[str]) -> list[tuple[str, ...]]:
    """Groups of paths with the same bytes in more than one part: what is judged was seen before.
    Given parts alone have any."""
    split = np.full(len(images), "") if images.split is None else images.split
    groups = [group for group in splits.alike(digests) if len(set(split[group].tolist())) > 1]
    return [tuple(images.paths[i] for i in group) for group in groups]


def class_counts(images: ImageSet, part: str) -> dict[str, int]:
    """How many images of each class a part has."""
    return counts(
        images,
        np.full(len(images), part == "train") if images.split is None else images.split == part,
    )


def counts(images: ImageSet, mask: NDArray[np.bool_]) -> dict[str, int]:
    """How many of the images in `mask` each class has, by name."""
    labels = images.labels[mask]
    return dict(
        zip(
            images.classes,
            np.bincount(labels[labels >= 0], minlength=len(images.classes)).tolist(),
            strict=True,
        )
    )


def take_shots(images: ImageSet, shots: int, seed: int) -> ImageSet:
    """Keep `shots` training images a class and the test part. A val part is dropped: it would be
    more labels."""
    if shots < 1:
        raise UserError(f"{shots} images a class", where="shots", fix="1 is the least")
    if images.split is None:
        raise ValueError("make_splits comes before take_shots")
    return images.subset(splits.shots(images.labels, images.split, shots, seed))


def check_parts(images: ImageSet, tested: bool = True) -> None:
    """Refuse a split set in which a class has no training image, or, where it is to be `tested`,
    nothing is left for that."""
    _need_training_images(images)
    if tested and (images.split is None or "test" not in images.split):
        fix = (
            "mend the test images (`finetune check` lists bad ones), "
            "name others with --test, or do without: --test none"
        )
        raise UserError("no test image is left", where=images.name, fix=fix)


def _need_training_images(images: ImageSet) -> None:
    if len(images.classes) < 2:
        below = layouts.deeper(images.paths) if Path(images.name).expanduser().is_dir() else ""
        fix = (
            f"the classes seem to lie deeper: give {Path(images.name) / below}"
            if below
            else "two are the least"
        )
        what = f"one class alone ({images.classes[0]})" if images.classes else "no class is left"
        raise UserError(what, where=images.name, fix=fix)
    if empty := untrained(images):
        what = f"{len(empty)} class{'es' * (len(empty) > 1)} without training images: {some(empty)}"
        fix = "add images, remove the folder, or leave such classes out: --on-empty-class skip"
        raise UserError(what, where=images.name, fix=fix)


def untrained(images: ImageSet) -> list[str]:
    """The classes without training images."""
    return _lacking(images, "train")


def untested(images: ImageSet) -> list[str]:
    """The classes without test images, where there is a test part."""
    return _lacking(images, "test") if images.split is not None and "test" in images.split else []


def _lacking(images: ImageSet, part: str) -> list[str]:
    labels = images.labels if images.split is None else images.labels[images.split == part]
    counts = np.bincount(labels, minlength=len(images.classes))
    return [name for name, count in zip(images.classes, counts, strict=True) if not count]


def two_labels(images: ImageSet, digests: Sequence[str]) -> list[list[int]]:
    """Positions of images with the same bytes and different labels, a list a content."""
    return [
        group for group in splits.alike(digests) if len({int(images.labels[i]) for i in group}) > 1
    ]


def in_words(images: ImageSet, group: Sequence[int]) -> str:
    """Images with the same bytes, each with its label."""
    return " = ".join(
        f"{names.shown(images.paths[i])} ({images.classes[images.labels[i]]})" for i in group
    )


def in_threads(work: Callable[[int], T], positions: Iterable[int]) -> Iterator[T]:
    """`work` of each position, in order; a few batches are under way at a time, so that memory
    stays small."""
    todo = list(positions)
    with ThreadPoolExecutor(max_workers=min(16, hardware.cores() + 1)) as pool:
        for part in pool.map(
            lambda at: [work(i) for i in todo[at : at + BATCH]], range(0, len(todo), BATCH)
        ):
            yield from part


def short_side(images: ImageSet, i: int) -> int:
    """The short side of image i in pixels, from its header. Raises `DecodeError` and
    `UserError`."""
    return min(decode.size(images.read(i)))
