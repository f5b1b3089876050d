"""Images in folders: a fast walk that follows links without going round in circles, and what of it
is no image."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.data import decode
from finetune.data.faults import Fault, some
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
SNIFFED = 10_000  # files whose first bytes are looked at, because their names announce no image
HEAD = 64  # bytes that are enough to know a format
# why a link to a folder is left out
LINK, LOOP = ("read under another name", "a link that goes round in a circle")


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
    again: tuple[tuple[str, str], ...] = ()

    def linked(self, prefix: str = "") -> tuple[Fault, ...]:
        """The links to folders that are listed under another name, as what is left out."""
        return tuple(
            Fault(
                prefix + link,
                LOOP if link.startswith(other) or other == "./" else LINK,
                f"a link to {shown(other)}, whose images are read there",
            )
            for link, other in self.again
        )


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
    again: list[tuple[str, str]] = []
    visited: dict[tuple[int, int], str] = {}
    waiting, links = [""], list[str]()
    while waiting or links:
        if not waiting:
            links.sort(reverse=True)
        here = waiting.pop() if waiting else links.pop()
        try:
            folder = f"{root}/{here}"
            info = os.stat(folder)
            before = visited.setdefault((info.st_dev, info.st_ino), here or "./")
            if before != (here or "./"):
                again.append((here, before))
                continue
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
                    hidden.append(f"{here}{name}{'/' * is_folder(entry)}")
                elif is_folder(entry):
                    (links if entry.is_symlink() else waiting).append(f"{here}{name}/")
                elif os.path.splitext(name)[1].lower() in EXTENSIONS and (
                    _is_file(entry) or _dangles(entry)
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
    for paths in (images, others, top, results, hidden):
        paths.sort()
    return Walk(
        tuple(images),
        tuple(others),
        tuple(top),
        tuple(results),
        tuple(hidden),
        tuple(sorted(again)),
    )


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
    pipes = [path for path in files if os.path.splitext(path)[1].lower() in EXTENSIONS]
    if pipes:
        words = some([f"{shown(path)} ({special(str(root / path))})" for path in pipes])
        lines.append(f"left out, as no regular file: {words}")
        files = [path for path in files if path not in {*pipes}]
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


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one; a link that leads nowhere is none."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or through a folder that may not be entered
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def special(path: str) -> str:
    """What a path leads to that is there and no regular file, as in "a pipe"; else no text."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return ""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "")


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
