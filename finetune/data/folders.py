"""Images in folders: a fast walk that follows links without going round in circles, and what the
folders' names mean."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.data import decode
from finetune.data.csv_table import SPLIT_NAMES
from finetune.data.faults import some
from finetune.errors import UserError
from finetune.names import shown

EXTENSIONS = frozenset(
    (
        *(
            ".jpg",
            ".jpeg",
            ".jpe",
            ".jfif",
            ".jif",
            ".mpo",
            ".png",
            ".apng",
            ".gif",
            ".webp",
            ".tif",
            ".tiff",
        ),
        *(
            ".jp2",
            ".j2k",
            ".jpc",
            ".j2c",
            ".jpf",
            ".jpx",
            ".avif",
            ".avifs",
            ".heic",
            ".heif",
            ".hif",
        ),
        *(".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm", ".ico", ".pcx"),
        *(".tga", ".icb", ".vda", ".vst", ".sgi", ".rgb", ".rgba", ".bw"),
    )
)
# what operating systems leave behind
HIDDEN = frozenset(("__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir"))
# at least one beside run.json
OF_A_RUN = frozenset(("recipe.yaml", "metrics.json", "model.safetensors", "config.json"))
# at least one beside its README.txt
OF_THE_CACHE = frozenset(("features", "compiled", "networks", "thumbs"))
CACHE_MARK = b"This folder belongs to Regraft"
NAME_THEM = "name the images in a CSV with path,label[,split]"
SNIFFED = 10_000  # files whose first bytes are looked at, because their names announce no image
HEAD = 64  # bytes that are enough to know a format


@dataclass(frozen=True)
class Walk:
    """What lies below a folder, sorted POSIX paths relative to it: images by their extension, other
    files, and its folders.

    `results` are folders that hold a run, a gallery or a cache, each with a slash at its end: they
    are never data, and nothing below them is listed. `hidden` are the files and folders (with a
    slash) that are not looked at.
    """

    images: tuple[str, ...]
    others: tuple[str, ...]
    folders: tuple[str, ...]
    results: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scan:
    """A folder of labelled images: class names an image, splits where the folders say them, `known`
    classes (empty ones too).

    `ignored` are files in class folders that no extension announces as images, and folders of
    results (with a slash at the end); `aside` are files that belong to no class: hidden ones, and
    those beside the class folders.
    """

    paths: tuple[str, ...]
    classes: tuple[str, ...]
    split: tuple[str, ...] | None
    known: tuple[str, ...]
    ignored: tuple[str, ...]
    aside: tuple[str, ...] = ()


def walk(root: Path) -> Walk:
    """Everything below `root`. Each real folder is visited once, under its own name before any
    link's; hidden files are not seen.

    `folders` are the visited ones directly below `root`; one that holds results and no image is not
    among them. Names are bytes: any of them will do (`names`). A pipe, a socket or a device is no
    image, whatever it is called. Raises `UserError` where a folder cannot be read.
    """
    images: list[str] = []
    others: list[str] = []
    top: list[str] = []
    results: list[str] = []
    hidden: list[str] = []
    visited: set[tuple[int, int]] = set()
    waiting, links = [""], list[str]()
    while waiting or links:
        if not waiting:
            links.sort(reverse=True)
        here = waiting.pop() if waiting else links.pop()
        try:
            folder = f"{root}/{here}"
            info = os.stat(folder)
            if (info.st_dev, info.st_ino) in visited:
                continue
            visited.add((info.st_dev, info.st_ino))
            with os.scandir(folder) as found:
                entries = list(found)
            if here and holds_results(folder, {entry.name for entry in entries}):
                results.append(here)
                continue
            if here and "/" not in here[:-1]:
                top.append(here[:-1])
            for entry in entries:
                name = entry.name
                if name[0] == "." or name in HIDDEN:
                    hidden.append(f"{here}{name}{'/' * entry.is_dir()}")
                elif entry.is_dir():
                    (links if entry.is_symlink() else waiting).append(f"{here}{name}/")
                elif os.path.splitext(name)[1].lower() in EXTENSIONS and (
                    entry.is_file() or _dangles(entry)
                ):
                    images.append(here + name)
                else:
                    others.append(here + name)
        except OSError as error:
            raise UserError(
                f"the folder cannot be read ({error.strerror})",
                where=root / here,
                fix="mend its permissions",
            ) from error
    if results:  # runs/ with nothing but runs is no empty class
        bare = {path.partition("/")[0] for path in results} - {
            path.partition("/")[0] for path in images
        }
        top = [name for name in top if name not in bare]
        for name in bare - {path.partition("/")[0] for path in others if "/" in path}:
            results = [path for path in results if not path.startswith(f"{name}/")] + [f"{name}/"]
    return Walk(*(tuple(sorted(paths)) for paths in (images, others, top, results, hidden)))


def holds_results(folder: str | Path, names: Iterable[str]) -> bool:
    """Whether a folder of these `names` holds a run, finished or not, a gallery of `retrieve`, or
    the cache: never data."""
    names = set(names)
    if "gallery.sqlite" in names or ("run.json" in names and names & OF_A_RUN):
        return True
    if "checkpoints" in names:
        return any(
            os.path.exists(f"{folder}/checkpoints/{mark}")
            for mark in ("started.json", "lock.sqlite")
        )
    if "README.txt" in names and names & OF_THE_CACHE:
        return _first_bytes(f"{folder}/README.txt").startswith(CACHE_MARK)
    return False


def _first_bytes(path: str) -> bytes:
    """The beginning of a file; of a pipe, or what cannot be read, nothing."""
    try:
        if os.path.isfile(path):
            with open(path, "rb", buffering=0) as file:
                return file.read(HEAD)
    except OSError:
        pass
    return b""


def disguised(root: Path, others: Sequence[str]) -> dict[str, str]:
    """Files among `others` that are images by their first bytes, whatever their names say, with
    their formats.

    At most `SNIFFED` files are opened.
    """
    found = {}
    for path in [path for path in others if not path.endswith("/")][:SNIFFED]:
        try:
            found[path] = decode.format_of(_first_bytes(str(root / path)))
        except decode.DecodeError:
            continue
    return found


def told(root: Path, left: Sequence[str]) -> tuple[str, ...]:
    """What of a walk is no image, in lines: how many files of which kinds, images with wrong names,
    folders of results."""
    lines = []
    files = [path for path in left if not path.endswith("/")]
    if files:
        kinds = Counter(
            os.path.splitext(path)[1].lower() or "without an extension" for path in files
        ).most_common()
        words = ", ".join(f"{count} {shown(kind)}" for kind, count in kinds[:5]) + " …" * (
            len(kinds) > 5
        )
        lines.append(
            f"{len(files)} file{'s are' if len(files) > 1 else ' is'} left out, as no image "
            f"extension announces them: {words}"
        )
        if wrong := disguised(root, files):
            names = some([f"{shown(path)} ({kind})" for path, kind in wrong.items()])
            fix = "give them their extensions, or name them in a CSV (path,label)"
            lines.append(
                f"{len(wrong)} of them {'are images' if len(wrong) > 1 else 'is an image'} by the "
                f"first bytes: {names}; {fix}"
            )
    if results := [path for path in left if path.endswith("/")]:
        lines.append(
            f"left out, as results of Regraft are no data: "
            f"{some([shown(path) for path in results])}"
        )
    return tuple(lines)


def _dangles(entry: os.DirEntry[str]) -> bool:
    """Whether this is a link to nothing: it counts as an image, so that reading it names it."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def gather(given: Sequence[str | Path]) -> tuple[Path, tuple[str, ...], tuple[str, ...]]:
    """Files as they are given, and all that is below folders, each file once: (root, image paths
    relative to it, others).

    Others that end with a slash are folders of results (see `Walk`). One folder alone is the root,
    else the folder that all the files have in common.
    """
    full: list[str] = []
    others: list[str] = []
    for item in given:
        # Not resolved: links keep the names that the user knows.
        path = Path(os.path.abspath(Path(item).expanduser()))
        if path.is_dir():
            found = walk(path)
            full += [str(path / image) for image in found.images]
            others += [f"{path}/{other}" for other in (*found.others, *found.results)]
        elif path.exists():
            full.append(str(path))
        else:
            raise UserError("no such file or folder", where=item, fix="check the spelling")
    full = list(dict.fromkeys(full))
    if len(given) == 1 and path.is_dir():
        root = path
    else:
        root = (
            Path(os.path.commonpath([os.path.dirname(file) for file in full])) if full else Path()
        )
    cut = len(str(root).rstrip("/")) + 1
    outside = (
        Path(os.path.relpath(other, root)).as_posix() + "/" * other.endswith("/")
        for other in others
    )
    return root, tuple(file[cut:].replace(os.sep, "/") for file in full), tuple(outside)


def scan(root: Path) -> Scan:
    """Read a folder per class, or train/, val/ and test/ of them.

    The class of an image is the first folder on its way (NFC), however deep it lies. An image
    outside of all class folders is a `UserError` that names it.
    """
    parts = _parts(root)
    if parts is None:
        return _by_class(root, "")
    paths: list[str] = []
    classes: list[str] = []
    split: list[str] = []
    known: tuple[str, ...] = ()
    ignored, aside = _beside(root, set(parts.values()))
    for name, folder in parts.items():
        found = _by_class(root / folder, f"{folder}/")
        paths += found.paths
        classes += found.classes
        split += [name] * len(found.paths)
        ignored += found.ignored
        aside += found.aside
        if name == "train":
            known = found.known
    return Scan(tuple(paths), tuple(classes), tuple(split), known, tuple(ignored), tuple(aside))


def _beside(root: Path, parts: set[str]) -> tuple[list[str], list[str]]:
    """What stands beside the folders of the splits: folders of results, then files and what is
    hidden."""
    results: list[str] = []
    aside: list[str] = []
    with os.scandir(root) as entries:
        for entry in entries:
            unseen = entry.name[0] == "." or entry.name in HIDDEN
            if entry.name not in parts:
                (results if entry.is_dir() and not unseen else aside).append(
                    entry.name + "/" * entry.is_dir()
                )
    return sorted(results), sorted(aside)


def _only_results(folder: Path) -> bool:
    """Whether a folder holds results of Regraft, itself or further down, and no image beside
    them."""
    found = walk(folder)
    return holds_results(folder, os.listdir(folder)) or bool(found.results and not found.images)  # noqa: PTH208


def _parts(root: Path) -> dict[str, str] | None:
    """The folders that hold the splits, by split; None where the folders are classes."""
    with os.scandir(root) as entries:
        seen = sorted(
            (entry.name, entry.is_dir())
            for entry in entries
            if entry.name[0] != "." and entry.name not in HIDDEN
        )
    inside = [name for name, is_folder in seen if is_folder]
    named = [name for name in inside if name.lower() in SPLIT_NAMES]
    found = {SPLIT_NAMES[name.lower()]: name for name in named}
    if "train" in found:
        inside = [name for name in inside if name in named or not _only_results(root / name)]
    if "train" not in found or (
        len(named) == 1 and (len(inside) > 1 or not _holds_folders(root / found["train"]))
    ):
        return None
    if len(found) < len(named):
        twice = [
            name
            for name in named
            if sum(SPLIT_NAMES[name.lower()] == SPLIT_NAMES[other.lower()] for other in named) > 1
        ]
        raise UserError(
            f"several folders for one split: {', '.join(twice)}",
            where=root,
            fix=f"keep one, or {NAME_THEM}",
        )
    others = [name for name in inside if name not in named]
    if others:
        raise UserError(
            f"{', '.join(named)} look like splits, {', '.join(others[:3])} does not",
            where=root,
            fix=f"keep only train, val and test here, rename the classes, or {NAME_THEM}",
        )
    stray = [
        name
        for name, is_folder in seen
        if not is_folder and os.path.splitext(name)[1].lower() in EXTENSIONS
    ]
    _refuse_stray(stray, root, bool(inside))
    return {name: found[name] for name in ("train", "val", "test") if name in found}


def _holds_folders(folder: Path) -> bool:
    return any(entry.is_dir() for entry in folder.iterdir() if entry.name[0] != ".")


def _by_class(root: Path, prefix: str) -> Scan:
    found = walk(root)
    _refuse_stray([path for path in found.images if "/" not in path], root, bool(found.folders))
    if not found.images:
        why = "".join(f"; {line}" for line in told(root, (*found.others, *found.results)))
        raise UserError(
            f"holds no images{why}",
            where=root,
            fix=f"give each class a folder with its images, or {NAME_THEM}",
        )
    ignored = tuple(prefix + path for path in (*found.others, *found.results) if "/" in path)
    # Files beside the class folders (a README, a licence) belong to no class and are none of our
    # business.
    aside = tuple(
        prefix + path
        for path in (*found.hidden, *(path for path in found.others if "/" not in path))
    )
    names = {name: unicodedata.normalize("NFC", name) for name in found.folders}
    classes = tuple(names[path[: path.index("/")]] for path in found.images)
    known = tuple(dict.fromkeys(names.values()))
    return Scan(tuple(prefix + path for path in found.images), classes, None, known, ignored, aside)


def _refuse_stray(stray: list[str], root: Path, has_folders: bool) -> None:
    if not stray:
        return
    few = ", ".join(stray[:3]) + " …" * (len(stray) > 3)
    count = f"{len(stray)} image{'s' * (len(stray) > 1)}"
    if has_folders:
        raise UserError(
            f"{count} outside of the class folders: {few}",
            where=root,
            fix=f"move them into one, or away; or {NAME_THEM}",
        )
    raise UserError(
        f"{count} without class folders: {few}",
        where=root,
        fix="give each class a folder, or a CSV with path,label; "
        "images without labels are for `finetune predict`",
    )


def deeper(paths: Sequence[str]) -> str:
    """Where the classes seem to lie when all images are below one folder: that folder's path, or
    the empty text.

    `10/red/1.jpg` and `10/blue/2.jpg` lie in 10, which holds the folders red and blue and no image
    itself.
    """
    below = [path.rpartition("/")[0] for path in paths]
    common = os.path.commonpath(below) if below and all(below) else ""
    inside = {path[len(common) + 1 :].partition("/")[0] for path in below}
    return common if common and len(inside) > 1 and "" not in inside else ""


def alike_inside(paths: Sequence[str], classes: Sequence[str]) -> str:
    """A line where every class folder holds folders of the same names, or those of splits, and no
    image: what it looks like."""
    inside: dict[str, set[str]] = {}
    for path, name in zip(paths, classes, strict=True):
        inside.setdefault(name, set()).add(
            path.partition("/")[2].rpartition("/")[0].partition("/")[0]
        )
    names = set().union(*inside.values())
    if len(inside) < 2 or "" in names or len(names) < 2:
        return ""
    few = some([shown(name) for name in sorted(names)])
    if all(name.lower() in SPLIT_NAMES for name in names):
        fix = "put the classes into train/ and test/, or give a CSV with path,label,split"
        what = (
            f"the class folders hold {few}: they look like parts, "
            f"but the images of all are taken together"
        )
        return f"{what}; to keep them apart, {fix}"
    if any(here != names for here in inside.values()):
        return ""
    first = shown(min(inside))
    fix = f"give one of the folders ({first}), or a CSV with path,label"
    return (
        f"each of the {len(inside)} class folders holds the same folders "
        f"({few}); if these are the classes, {fix}"
    )
