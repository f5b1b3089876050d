"""Making and changing galleries: build, add, remove, sync, compact.

Files are known by their content. A scan compares what lies in the folders with what the gallery remembers (path, size,
time); only files that differ are read, and only contents that the gallery has never seen go through the network. Whatever
a command does becomes visible in one commit at its end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import posixpath
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from finetune import features, folders
from finetune.errors import UserError
from finetune.features import Progress
from finetune.images import Fault, ImageSet
from finetune.store import Store
from retrieval import encode, merge, segments
from retrieval.encode import Encoded, Encoder
from retrieval.gallery import find_root
from retrieval.segments import Stored, Writer

SETTLED = 2_000_000_000  # ns: a file younger than this could change again within the clock's grain, and is read again
UNSETTLED = -1  # the time of such a file
WHITENING_SAMPLE = 50_000  # vectors that a whitening is fitted on

Bar = Callable[[str], contextlib.AbstractContextManager[Progress]]


@contextlib.contextmanager
def no_bar(_label: str) -> Iterator[Progress]:
    """Progress for those who do not watch."""
    yield lambda done, total: None


@dataclass(frozen=True)
class Change:
    """What a command did, in paths; `encoded` counts the contents that were new to the gallery. `images` is what it holds now.

    `faults` are files that could not be read and are left out.
    """

    added: int
    changed: int
    moved: int
    removed: int
    unchanged: int
    encoded: int
    images: int
    faults: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Found:
    """A file as a scan found it: POSIX path relative to the root, bytes, time of change in ns."""

    path: str
    size: int
    mtime: int


@dataclass(frozen=True)
class Plan:
    """What differs between the files and the gallery.

    `known` is path → (image, digest) of the paths at hand; `fresh` are the files that had to be read, with their `digests`;
    `have` is digest → image of the contents with a vector; `new` are the positions in `fresh` that need one, a position a
    content. `gone` are paths to forget, `old_faults` unreadable files that have not changed since.
    """

    root: Path
    known: dict[str, tuple[int, str]]
    fresh: tuple[Found, ...]
    digests: tuple[str, ...]
    have: dict[str, int]
    new: tuple[int, ...]
    gone: tuple[str, ...]
    unchanged: int
    old_faults: tuple[tuple[Found, Fault], ...] = ()
    scan_faults: tuple[Fault, ...] = ()


# ----------------------------------------------------------------------------------------------------------- commands


def build(
    given: Sequence[str | Path],
    folder: Path,
    encoder: Encoder,
    *,
    whiten: int | None = None,
    factory: str = "auto",
    recall: float = 0.99,
    on_bad: str = "stop",
    force: bool = False,
    bar: Bar = no_bar,
) -> Change:
    """Make a gallery in `folder` of the images in files and folders.

    `whiten` is the number of dimensions that PCA-whitening keeps, `factory` a faiss factory string or `auto`, `recall` what
    an approximate index has to reach. A gallery that is there already is only replaced with `force`, in one moment, and
    its contents keep their ids. Raises `UserError` for what a person can mend.
    """
    root, paths, _ = folders.gather(given)
    with segments.writing(folder, create=True, replace=force) as writer, contextlib.closing(Store()) as store:
        if not writer.is_new and not force:
            fix = "bring it up to date with `retrieve sync`, or build it again with --force"
            raise UserError("an index is here already", where=folder, fix=fix)
        found, bad = _scan(root, paths, folder)
        plan = _compare(None, root, found, (), store, on_bad, bad, bar)
        made = _encode(plan, encoder, store, on_bad, bar)
        if made is None or not len(made.images):
            raise UserError("holds no images that can be read", where=", ".join(map(str, given)), fix="give a folder of images")
        if whiten is not None:
            made = _whitened(made, whiten)
        number, stored = writer.write_vectors(made.blocks())
        kept, manifest = _manifest(writer, made.encoder)
        settings = {"factory": factory, "recall": recall}
        with bar("search index") as progress:
            progress(0, 1)
            search = merge.index_file(writer, folder / stored.name, [number], made.encoder.width, settings)
        meta = {
            "manifest": manifest,
            "root": {"absolute": str(root), "relative": _way(root, folder)},
            "search settings": settings,
            "search": search[1] if search else None,
        }
        change = _commit(writer, plan, made, (number, stored), meta, sources=_sources(given, root), replace=True,
                         files=[*kept, *([search[0]] if search else [])])  # fmt: skip
    return change


def add(folder: Path, given: Sequence[str | Path], *, on_bad: str = "stop", bar: Bar = no_bar) -> Change:
    """Add files, and all images in folders, to a gallery; what it knows already costs nothing."""
    with segments.writing(folder) as writer:
        root = find_root(writer.meta, folder)
        own, inside, _ = folders.gather(given)
        if not inside:
            raise UserError("holds no images", where=", ".join(map(str, given)), fix="give image files, or folders of them")
        paths = [posixpath.normpath(f"{_way(own, root)}/{path}") for path in inside]
        found, bad = _scan(root, paths, folder)
        return _update(writer, root, found, (), on_bad, bad, bar, _sources(given, root))


def remove(folder: Path, given: Sequence[str | Path]) -> Change:
    """Take images out of a gallery: paths as answers show them, or files and folders. The files themselves stay.

    A `sync` brings back what still lies in the gallery's folders.
    """
    with segments.writing(folder) as writer:
        root = find_root(writer.meta, folder)
        gone: dict[str, None] = {}
        prefixes = []
        for item in given:
            texts = (posixpath.normpath(Path(item).as_posix()), _way(Path(os.path.abspath(item)), root))  # noqa: PTH100
            text, paths = next(((text, found) for text in texts if (found := _below(writer, text))), ("", []))
            if not paths:
                fix = "give a path as `retrieve query` shows it, or a file or folder that was added"
                raise UserError("not in the gallery", where=item, fix=fix)
            gone |= dict.fromkeys(paths)
            prefixes.append(text)
        plan = _compare(writer, root, (), tuple(gone), None, "stop", (), no_bar)
        return _tended(writer, _commit(writer, plan, None, None, {}, forget=prefixes))


def sync(
    folder: Path, *, root: Path | None = None, on_bad: str = "stop", allow_empty: bool = False, bar: Bar = no_bar
) -> Change:
    """Make a gallery equal to its folders: files that came, changed, moved and went.

    `root` says where the folder of the images is now. A folder that is not there, or that holds no image at all where the
    gallery has some, is a `UserError` (a disk that is not mounted looks the same), unless `allow_empty`.
    """
    with segments.writing(folder) as writer:
        root = root.absolute() if root is not None else find_root(writer.meta, folder)
        known = [path for (path,) in writer.db.execute("select path from path")]
        paths: dict[str, None] = {}
        for (source,) in writer.db.execute("select path from source order by path").fetchall():
            place = Path(os.path.normpath(root / source))
            if not place.is_dir():
                fix = "mount or restore it; say where it is now with --root; or, if it is gone for good, `retrieve remove` it"
                raise UserError("the folder of the images is not there", where=place, fix=fix)
            paths |= dict.fromkeys(posixpath.normpath(posixpath.join(source, image)) for image in folders.walk(place).images)
        paths |= dict.fromkeys(path for path in known if path not in paths and os.path.lexists(root / path))
        found, bad = _scan(root, paths, folder)
        seen = {one.path for one in found}
        gone = tuple(path for path in known if path not in seen)
        if known and not seen and not allow_empty:
            fix = "is the disk mounted? If it is right, say so with --allow-empty"
            raise UserError(f"no image is left: all {len(known)} would be removed", where=root, fix=fix)
        return _update(writer, root, found, gone, on_bad, bad, bar, whole=True)


def compact(folder: Path, *, bar: Bar = no_bar) -> Change:
    """Merge all segments into one without the removed images, and make the search index again where there is one."""
    with segments.writing(folder) as writer, bar("compact") as progress:
        progress(0, 1)
        merge.tend(writer, everything=True)
        return Change(0, 0, 0, 0, _count(writer, "path"), 0, _alive(writer))


# -------------------------------------------------------------------------------------------------------- what differs


def _scan(root: Path, paths: Iterable[str], index: Path) -> tuple[list[Found], list[Fault]]:
    """Size and time of files; those that cannot be read are faults. The index itself is no part of its images."""
    found, faults = [], []
    own = _way(index.absolute(), root) + "/"
    young = time.time_ns() - SETTLED
    for path in paths:
        if path.startswith(own):
            continue
        full = os.path.join(root, path)  # noqa: PTH118: the hot path
        try:
            info = os.stat(full)  # noqa: PTH116
            if not os.access(full, os.R_OK):
                raise PermissionError(0, "no permission to read it")
        except OSError as error:
            faults.append(Fault(path, "unreadable", error.strerror or str(error)))
            continue
        found.append(Found(path, info.st_size, info.st_mtime_ns if info.st_mtime_ns < young else UNSETTLED))
    return found, faults


def _compare(
    writer: Writer | None,
    root: Path,
    found: Sequence[Found],
    gone: tuple[str, ...],
    store: Store | None,
    on_bad: str,
    bad: Sequence[Fault],
    bar: Bar,
) -> Plan:
    """Read what differs, and ask which of its contents the gallery knows. Without `writer`, it knows nothing."""
    if bad and on_bad == "stop":
        features.refuse(bad, str(root))
    known: dict[str, tuple[int, str]] = {}
    stats: dict[str, tuple[int, int]] = {}
    broken: dict[str, tuple[int, int, str, str]] = {}
    if writer is not None:
        query = "select path, image, digest, size, mtime from path join image on image.id = path.image where path in ({marks})"
        for path, image, digest, size, mtime in segments.select(writer.db, query, [*gone, *(one.path for one in found)]):
            known[path], stats[path] = (image, digest.hex()), (size, mtime)
        if on_bad == "skip":
            broken = {path: tuple(rest) for path, *rest in writer.db.execute("select path, size, mtime, kind, detail from fault")}
    fresh = [one for one in found if one.mtime == UNSETTLED or stats.get(one.path) != (one.size, one.mtime)]
    old = [one for one in fresh if one.mtime != UNSETTLED and broken.get(one.path, (0, 0))[:2] == (one.size, one.mtime)]
    fresh = [one for one in fresh if one not in old] if old else fresh
    digests: tuple[str, ...] = ()
    have: dict[str, int] = {}
    if fresh:
        assert store is not None
        with bar("read") as progress:
            progress(0, len(fresh))
            digests = features.digests(_image_set(root, fresh), store)
    if writer is not None:
        values = [bytes.fromhex(digest) for digest in dict.fromkeys(digests)]
        rows = segments.select(writer.db, "select digest, id from image where digest in ({marks})", values)
        have = {digest.hex(): number for digest, number in rows}
    first: dict[str, int] = {}
    for i, digest in enumerate(digests):
        if digest not in have:
            first.setdefault(digest, i)
    faults = tuple((one, Fault(one.path, broken[one.path][2], broken[one.path][3])) for one in old)
    unchanged = len(found) - len(fresh) - len(old)
    return Plan(root, known, tuple(fresh), digests, have, tuple(first.values()), gone, unchanged, faults, tuple(bad))


def _image_set(root: Path, found: Sequence[Found]) -> ImageSet:
    return ImageSet(str(root), root, tuple(one.path for one in found), np.full(len(found), -1, dtype=np.int64), ())


def _encode(plan: Plan, encoder: Encoder, store: Store, on_bad: str, bar: Bar) -> Encoded | None:
    """Features of the new contents of a plan, by way of the store: a killed build goes on where it was."""
    if not plan.new:
        return None
    source = _image_set(plan.root, [plan.fresh[i] for i in plan.new])
    with bar("features") as progress:
        return encode.from_store(encoder, source, [plan.digests[i] for i in plan.new], store, on_bad, progress)


def _update(
    writer: Writer,
    root: Path,
    found: Sequence[Found],
    gone: tuple[str, ...],
    on_bad: str,
    bad: Sequence[Fault],
    bar: Bar,
    sources: Sequence[str] = (),
    whole: bool = False,
) -> Change:
    with contextlib.closing(Store()) as store:
        plan = _compare(writer, root, found, gone, store, on_bad, bad, bar)
        made = None
        if plan.new:
            encoder = encode.from_manifest(writer.folder, writer.meta["manifest"])
            made = _encode(plan, encoder, store, on_bad, bar)
    segment = writer.write_vectors(made.blocks()) if made is not None and len(made.images) else None
    meta = {"root": {"absolute": str(root), "relative": _way(root, writer.folder)}}
    return _tended(writer, _commit(writer, plan, made, segment, meta, sources=sources, whole=whole))


def _tended(writer: Writer, change: Change) -> Change:
    """Merge segments where it is time. The change is safe already: what goes wrong here is a note, not a failure."""
    try:
        merge.tend(writer)
    except UserError as error:
        return dataclasses.replace(change, notes=(f"the index was not compacted: {error}",))
    return change


# ------------------------------------------------------------------------------------------------------- the one commit


def _commit(
    writer: Writer,
    plan: Plan,
    made: Encoded | None,
    segment: tuple[int, Stored] | None,
    meta: dict[str, Any],
    *,
    sources: Sequence[str] = (),
    files: Sequence[Stored] = (),
    forget: Sequence[str] = (),
    replace: bool = False,
    whole: bool = False,
) -> Change:
    """Make a plan visible. `replace`: nothing from before stays but the ids; `whole`: the plan has seen all files."""
    digest_of = {plan.fresh[i].path: plan.digests[i] for i in plan.new}
    broken = {digest_of[fault.path]: fault for fault in made.faults} if made else {}
    with writer.commit(**meta) as db:
        old = [number for (number,) in db.execute("select number from segment")] if replace else []
        if replace:
            for table in ("path", "source", "fault"):
                db.execute(f"delete from {table}")
            db.execute("delete from file where name not like 'segments/%'")
        if made is not None and segment is not None:
            number, stored = segment
            writer.add_segment(number, stored, made.encoder.width)
            rows = [(bytes.fromhex(digest_of[path]), number, row) for row, path in enumerate(made.images.paths)]
            db.executemany(
                "insert into image (digest, segment, row, alive) values (?, ?, ?, 1) on conflict (digest) do update set "
                "segment = excluded.segment, row = excluded.row, alive = 1",
                rows,
            )
        for stored in files:
            writer.keep(stored)
        _write_paths(writer, plan, broken, whole)
        db.executemany("insert or ignore into source (path) values (?)", [(source,) for source in sources])
        for prefix in forget:
            db.execute("delete from source where path = ? or path glob ?", (prefix, f"{_literal(prefix)}/*"))
        writer.drop_segments(old)
        change = _counted(writer, plan, broken, len(made.images) if made else 0)
    return change


def _write_paths(writer: Writer, plan: Plan, broken: dict[str, Fault], whole: bool) -> None:
    db = writer.db
    good = [(one, digest) for one, digest in zip(plan.fresh, plan.digests, strict=True) if digest not in broken]
    bad = [(one, broken[digest]) for one, digest in zip(plan.fresh, plan.digests, strict=True) if digest in broken]
    if whole:
        db.execute("delete from fault")
    db.executemany("delete from fault where path = ?", [(one.path,) for one, _ in good] + [(path,) for path in plan.gone])
    db.executemany(
        "insert or replace into fault (path, size, mtime, kind, detail) values (?, ?, ?, ?, ?)",
        [(one.path, one.size, one.mtime, fault.kind, fault.detail) for one, fault in (*plan.old_faults, *bad)],
    )
    dropped = [*plan.gone, *(one.path for one, _ in (*plan.old_faults, *bad))]
    db.executemany("delete from path where path = ?", [(path,) for path in dropped])
    values = [bytes.fromhex(digest) for digest in dict.fromkeys(digest for _, digest in good)]
    number = {d.hex(): i for d, i in segments.select(db, "select digest, id from image where digest in ({marks})", values)}
    db.executemany(
        "insert or replace into path (path, image, size, mtime) values (?, ?, ?, ?)",
        [(one.path, number[digest], one.size, one.mtime) for one, digest in good],
    )
    touched = {image for image, _ in plan.known.values()} | set(number.values())
    db.executemany(
        "update image set alive = exists (select 1 from path where path.image = image.id) where id = ?",
        [(image,) for image in touched],
    )


def _counted(writer: Writer, plan: Plan, broken: dict[str, Fault], encoded: int) -> Change:
    """Count paths: a new path is *moved* where its content lost another path in the same step, else *added*."""
    lost: dict[str, list[str]] = defaultdict(list)
    for path in plan.gone:
        if path in plan.known:
            lost[plan.known[path][1]].append(path)
    pairs = list(zip(plan.fresh, plan.digests, strict=True))
    for one, digest in pairs:
        if one.path in plan.known and plan.known[one.path][1] != digest:
            lost[plan.known[one.path][1]].append("")  # its path lives on with another content: nothing was removed
    added = changed = moved = unchanged = removed = 0
    faults = [fault for _, fault in plan.old_faults]
    for one, digest in pairs:
        if digest in broken:
            faults.append(Fault(one.path, broken[digest].kind, broken[digest].detail))
            removed += one.path in plan.known
        elif one.path in plan.known:
            same = plan.known[one.path][1] == digest
            unchanged, changed = unchanged + same, changed + (not same)
        elif lost[digest]:
            lost[digest].sort(reverse=True)  # paths that are gone come first
            lost[digest].pop(0)
            moved += 1
        else:
            added += 1
    removed += sum(path != "" for paths in lost.values() for path in paths)
    faults += plan.scan_faults
    return Change(added, changed, moved, removed, plan.unchanged + unchanged, encoded, _alive(writer), tuple(faults))


def _alive(writer: Writer) -> int:
    return int(writer.db.execute("select count(*) from image where alive = 1").fetchone()[0])


def _count(writer: Writer, table: str) -> int:
    return int(writer.db.execute(f"select count(*) from {table}").fetchone()[0])


# ------------------------------------------------------------------------------------------------------------- details


def _manifest(writer: Writer, encoder: Encoder) -> tuple[list[Stored], dict[str, Any]]:
    """The files that a query will need, written, and the manifest that names them."""
    from finetune import run

    number = writer.meta["generation"] + 1
    kept: dict[str, Stored] = {}
    if encoder.save_weights is not None:
        kept["weights file"] = writer.write_file(f"network/model-{number}.safetensors", encoder.save_weights)
    if (whitening := encoder.whitening) is not None:
        name = f"network/whitening-{number}.safetensors"
        kept["whitening file"] = writer.write_file(name, lambda path: encode.write_whitening(path, whitening))
    manifest = {
        "format": segments.FORMAT,
        "vector": encode.describe(encoder),
        "width": encoder.width,
        "networks": [network.to_json() for network in encoder.networks],
        "run": {"path": encoder.run[0], "digest": encoder.run[1]} if encoder.run else None,
        **{key: kept[key].name if key in kept else None for key in ("weights file", "whitening file")},
        "versions": run.versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return list(kept.values()), manifest


def _whitened(made: Encoded, dims: int) -> Encoded:
    """The same features under a whitening that is fitted on them, or on an even sample where they are many."""
    from retrieval import index

    raise NotImplementedError


def _sources(given: Sequence[str | Path], root: Path) -> list[str]:
    """The folders among what was given, as the root sees them: `sync` scans them."""
    whole = [Path(os.path.abspath(Path(item).expanduser())) for item in given]  # noqa: PTH100
    return [_way(path, root) for path in whole if path.is_dir()]


def _way(path: Path, start: Path) -> str:
    """The POSIX way from one folder to a path."""
    return Path(os.path.relpath(path, start.absolute())).as_posix()


def _below(writer: Writer, text: str) -> list[str]:
    """The gallery's paths that are `text`, or lie below it."""
    if text == ".":
        return [path for (path,) in writer.db.execute("select path from path where path not like '../%'")]
    query = "select path from path where path = ? or path glob ?"
    return [path for (path,) in writer.db.execute(query, (text, f"{_literal(text)}/*"))]


def _literal(text: str) -> str:
    """`text` with glob's special characters escaped."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)
