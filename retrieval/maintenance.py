"""Making and changing galleries: build, add, remove, sync, compact.

Files are known by their content. A scan compares what lies in the folders with what the gallery
remembers (path, size, time); only files that differ are read, and only contents that the gallery
has never seen go through the network. Whatever a command does becomes visible in one commit at its
end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import posixpath
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data import folders
from finetune.data.images import list_faults
from finetune.errors import UserError
from finetune.features import extraction
from finetune.features.store import Store
from finetune.lock import NO_WAIT, Wait
from finetune.names import from_database, meant
from finetune.progress import Bar, no_bar
from retrieval import encode
from retrieval import frame as framing
from retrieval.encode import Encoded
from retrieval.encoder import Encoder, describe, from_manifest
from retrieval.frame import Frame
from retrieval.storage import compaction, database, diff, segments
from retrieval.storage.commit import ChangeSummary, Commit, alive, commit, count_paths
from retrieval.storage.diff import FileDiff, Scan
from retrieval.storage.segments import Stored, find_root
from retrieval.storage.writer import Writer, writing
from retrieval.whitening import whiten

HERE_ALREADY = "bring it up to date with `retrieve sync`, or build it again with --force"
WHITENING_SAMPLE = 50_000  # vectors that a whitening is fitted on

# ----------------------------------------------------------------------------------------- commands

MOUNTED = "is the disk mounted? If it is right, say so with --allow-empty"


def build(
    given: Sequence[str | Path],
    folder: Path,
    encoder: Encoder,
    *,
    whiten: int | None = None,
    factory: str = "auto",
    recall: float = 0.99,
    memory_mb: float | None = None,
    frame: str | None = None,
    on_bad: str = "stop",
    force: bool = False,
    wait: Wait = NO_WAIT,
    bar: Bar = no_bar,
    say: Callable[[str], None] = lambda text: None,
) -> ChangeSummary:
    """Make a gallery in `folder` of the images in files and folders.

    `frame` is `crop`, `squash` or `auto` (measured, with the reason for `say`); None looks as the
    encoder does. `whiten` is the number of dimensions that PCA-whitening keeps, `factory` a faiss
    factory string or `auto`, `recall` what an approximate index has to reach, `memory_mb` what its
    codes may take. A gallery that is there already is only replaced with `force`, in one moment,
    and its contents keep their ids. `wait` says how long to wait for another writer, here as below.
    Raises `UserError` for what a person can mend.
    """
    check_build(given, folder, force)
    framing.check(encoder, frame)
    root, paths, others = folders.gather(given)
    other = dataclasses.replace(wait, other="choose another folder with -o")
    with (
        writing(folder, create=True, replace=force, wait=other) as writer,
        contextlib.closing(Store()) as store,
    ):
        if not writer.is_new and not force:
            raise UserError("a gallery is here already", where=folder, fix=HERE_ALREADY)
        found = diff.scan(root, paths, folder)
        changes = diff.compare(None, found, store=store, on_bad=on_bad, bar=bar)
        sources = _sources(given, root)
        encoder, looks = _framed(encoder, frame, changes, sources=sources, store=store, bar=bar)
        if frame == "auto" and not encoder.run:
            say(f"frame      {looks.name}: {looks.why}")
        made = _encode(changes, encoder, store, on_bad, bar)
        if made is None or not len(made.images):
            raise _none_readable(given, changes, made)
        if whiten is not None:
            made = _whitened(made, whiten)
        segment = writer.write_vectors(made.blocks())
        files, manifest = _manifest(writer, made.encoder, looks)
        settings = {"factory": factory, "recall": recall, "memory_mb": memory_mb}
        search = _search_index(writer, segment, made.encoder.width, settings, bar)
        meta = {
            "manifest": manifest,
            "root": {"absolute": str(root), "relative": diff.way(root, folder)},
            "search settings": settings,
            "search": search[1] if search else None,
        }
        files = [*files, search[0]] if search else files
        beside = Commit(meta, sources, files, replace=True)
        done = commit(writer, changes, made, segment, beside)
        return _noted(done, folders.told(root, others))


def check_build(given: Sequence[str | Path], folder: Path, force: bool) -> None:
    """Raise the `UserError` of a build that cannot succeed, before a network is loaded for it."""
    root, inside, others = folders.gather(given)
    if not inside:
        raise _no_images(given, folders.told(root, others))
    if not force and segments.is_gallery(folder):
        raise UserError("a gallery is here already", where=folder, fix=HERE_ALREADY)


def add(
    folder: Path,
    given: Sequence[str | Path],
    *,
    on_bad: str = "stop",
    wait: Wait = NO_WAIT,
    bar: Bar = no_bar,
) -> ChangeSummary:
    """Add files, and all images in folders, to a gallery; what it knows already costs nothing."""
    with writing(folder, wait=wait) as writer:
        root = find_root(writer.meta, folder)
        own, inside, others = folders.gather(given)
        left = folders.told(own, others)
        if not inside:
            raise _no_images(given, left)
        paths = [posixpath.normpath(f"{diff.way(own, root)}/{path}") for path in inside]
        beside = Commit(sources=_sources(given, root))
        found = diff.scan(root, paths, folder)
        return _noted(_update(writer, found, beside, on_bad=on_bad, bar=bar), left)


def remove(folder: Path, given: Sequence[str | Path], *, wait: Wait = NO_WAIT) -> ChangeSummary:
    """Take images out of a gallery: paths as answers show them, or files and folders. The files
    themselves stay.

    A `sync` brings back what still lies in the gallery's folders.
    """
    with writing(folder, wait=wait) as writer:
        root = find_root(writer.meta, folder)
        gone: dict[str, None] = {}
        prefixes = []
        for item in given:
            told = posixpath.normpath(Path(item).as_posix())
            texts = (
                *([told, meant(told)] if told != "." else []),
                diff.way(Path(os.path.abspath(item)), root),
            )
            text = next(
                (
                    text
                    for text in texts
                    if _below(writer, text, "path") or _below(writer, text, "source")
                ),
                None,
            )
            if text is None:
                fix = "give a path as `retrieve query` shows it, or a file or folder that was added"
                raise UserError("not in the gallery", where=item, fix=fix)
            gone |= dict.fromkeys(_below(writer, text, "path"))
            prefixes.append(text)
        changes = diff.compare(
            writer, Scan(root, gone=tuple(gone)), store=None, on_bad="stop", bar=no_bar
        )
        done = commit(writer, changes, None, None, Commit(forget=prefixes))
        return _compacted_if_due(writer, done)


def sync(
    folder: Path,
    *,
    root: Path | None = None,
    on_bad: str = "stop",
    allow_empty: bool = False,
    wait: Wait = NO_WAIT,
    bar: Bar = no_bar,
) -> ChangeSummary:
    """Make a gallery equal to its folders: files that came, changed, moved and went.

    `root` says where the folder of the images is now. A folder that is not there, or from which all
    images would go, is a `UserError` (an unmounted disk looks the same), unless `allow_empty`.
    """
    with writing(folder, wait=wait) as writer:
        root = root.absolute() if root is not None else find_root(writer.meta, folder)
        known = [from_database(path) for (path,) in writer.db.execute("select path from path")]
        paths: dict[str, None] = {}
        left: list[str] = []
        emptied: list[tuple[Path, str]] = []
        for (value,) in writer.db.execute("select path from source order by path").fetchall():
            source = from_database(value)
            place = Path(os.path.normpath(root / source))
            if not place.is_dir():
                fix = (
                    "mount or restore it; say where it is now with --root; or, "
                    "if it is gone for good, `retrieve remove` it"
                )
                raise UserError("the folder of the images is not there", where=place, fix=fix)
            walked = folders.walk(place)
            if not walked.images:
                emptied.append((place, source))
            paths |= dict.fromkeys(
                posixpath.normpath(posixpath.join(source, image)) for image in walked.images
            )
            left += [posixpath.join(source, other) for other in (*walked.others, *walked.results)]
        paths |= dict.fromkeys(
            path for path in known if path not in paths and os.path.lexists(root / path)
        )
        found = diff.scan(root, paths, folder)
        seen = {one.path for one in found.files}
        gone = tuple(path for path in known if path not in seen)
        if known and not seen and not allow_empty:
            what = f"no image is left: all {len(known)} would be removed"
            raise UserError(what, where=root, fix=MOUNTED)
        for place, source in emptied if not allow_empty else ():
            if lost := sum(diff.is_below(path, source) for path in gone):
                what = f"no image is left in this folder: its {lost} would be removed"
                raise UserError(what, where=place, fix=MOUNTED)
        found = dataclasses.replace(found, gone=gone)
        done = _update(writer, found, Commit(whole=True), on_bad=on_bad, bar=bar)
        return _noted(done, folders.told(root, left))


def compact(folder: Path, *, wait: Wait = NO_WAIT, bar: Bar = no_bar) -> ChangeSummary:
    """Merge all segments into one without the removed images, and make the search index again where
    there is one."""
    with writing(folder, wait=wait) as writer, bar("compact") as progress:
        progress(0, 1)
        compaction.compact_if_due(writer, everything=True)
        return ChangeSummary(0, 0, 0, 0, count_paths(writer), 0, alive(writer))


def _encode(
    changes: FileDiff, encoder: Encoder, store: Store, on_bad: str, bar: Bar
) -> Encoded | None:
    """Features of the new contents of a diff, by way of the store: a killed build goes on where it
    was."""
    if not changes.new:
        return None
    images, digests = changes.new_contents()
    with bar("features") as progress:
        made = encode.from_store(encoder, images, digests, store, progress)
    if made.faults and on_bad == "stop":
        extraction.refuse([fault for _, fault in diff.bad_files(changes, made)], images.name)
    return made


def _update(writer: Writer, found: Scan, beside: Commit, *, on_bad: str, bar: Bar) -> ChangeSummary:
    """Make a gallery follow a scan, in one commit."""
    with contextlib.closing(Store()) as store:
        changes = diff.compare(writer, found, store=store, on_bad=on_bad, bar=bar)
        made = None
        if changes.new:
            encoder = from_manifest(writer.folder, writer.meta["manifest"])
            made = _encode(changes, encoder, store, on_bad, bar)
    segment = writer.write_vectors(made.blocks()) if made is not None and len(made.images) else None
    root = {"absolute": str(found.root), "relative": diff.way(found.root, writer.folder)}
    beside = dataclasses.replace(beside, meta={"root": root})
    return _compacted_if_due(writer, commit(writer, changes, made, segment, beside))


def _noted(change: ChangeSummary, lines: Sequence[str]) -> ChangeSummary:
    return dataclasses.replace(change, notes=(*change.notes, *lines))


def _compacted_if_due(writer: Writer, change: ChangeSummary) -> ChangeSummary:
    """Merge segments where it is time. The change is safe already: what goes wrong here is a note,
    not a failure."""
    try:
        compaction.compact_if_due(writer)
    except UserError as error:
        return dataclasses.replace(change, notes=(f"the gallery was not compacted: {error}",))
    return change


# ------------------------------------------------------------------------------------------ details


def _framed(
    encoder: Encoder,
    asked: str | None,
    changes: FileDiff,
    *,
    sources: Sequence[str],
    store: Store,
    bar: Bar,
) -> tuple[Encoder, Frame]:
    """The encoder that looks at the pictures of a new gallery in the frame that was asked for, and
    why it does."""
    if encoder.run or asked is None:
        why = "as the run was trained" if encoder.run else "as the network looks"
        return encoder, Frame(framing.seen(encoder), why)
    if asked != "auto":
        encoder = framing.framed(encoder, asked)
        return encoder, Frame(framing.seen(encoder), "as was asked")
    images, digests = changes.new_contents()
    places = sorted(sources, key=len, reverse=True)
    classes = [framing.first_folder(path, places) for path in images.paths]
    with bar("frame") as progress:
        progress(0, 1)
        looks = framing.choose(encoder, images, digests, classes, store)
        progress(1, 1)
    if looks.name != framing.seen(encoder):
        encoder = framing.framed(encoder, looks.name)
    return encoder, looks


def _manifest(
    writer: Writer, encoder: Encoder, looks: Frame
) -> tuple[list[Stored], dict[str, Any]]:
    """The files that a query will need, written, and the manifest that names them."""
    from finetune import run

    number = writer.meta["generation"] + 1
    kept: dict[str, Stored] = {}
    if encoder.save_weights is not None:
        kept["weights file"] = writer.write_file(
            f"network/model-{number}.safetensors", encoder.save_weights
        )
    if (whitening := encoder.whitening) is not None:
        name = f"network/whitening-{number}.safetensors"
        kept["whitening file"] = writer.write_file(name, whitening.save)
    manifest = {
        "format": database.FORMAT,
        "vector": describe(encoder),
        "width": encoder.width,
        "networks": [network.to_json() for network in encoder.networks],
        "frame": {"name": looks.name, "why": looks.why},
        "run": {"path": encoder.run[0], "digest": encoder.run[1]} if encoder.run else None,
        **{
            key: kept[key].name if key in kept else None
            for key in ("weights file", "whitening file")
        },
        "versions": run.versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return list(kept.values()), manifest


def _search_index(
    writer: Writer, segment: tuple[int, Stored], width: int, settings: dict[str, Any], bar: Bar
) -> tuple[Stored, dict[str, Any]] | None:
    """The search index over a new segment, where one is wanted: its file, and what is known of
    it."""
    number, stored = segment
    table = segments.open_table(writer.folder / stored.name, width)
    with bar("search index") as progress:
        return compaction.index_file(
            writer, table, [number], settings, lambda part, _: progress(round(100 * part), 100)
        )


def _whitened(made: Encoded, dims: int) -> Encoded:
    """The same features under a whitening that is fitted on them, or on an even sample where they
    are many."""
    step = max(1, -(-len(made.images) // WHITENING_SAMPLE))
    sample = np.concatenate(list(made.blocks(np.arange(0, len(made.images), step))))
    encoder = dataclasses.replace(made.encoder, whitening=whiten(sample, dims))
    return dataclasses.replace(made, encoder=encoder)


def _none_readable(
    given: Sequence[str | Path], changes: FileDiff, made: Encoded | None
) -> UserError:
    bad = [*(fault for _, fault in diff.bad_files(changes, made)), *changes.scan.faults]
    what = f"no image here can be read; {list_faults(bad, extraction.NAMED)}"
    return UserError(what, where=", ".join(map(str, given)), fix="mend them, or give other images")


def _no_images(given: Sequence[str | Path], left: Sequence[str]) -> UserError:
    what = "holds no images" + "".join(f"; {line}" for line in left)
    fix = (
        f"give a folder of images, or image files; in folders they are known by "
        f"{' '.join(sorted(folders.EXTENSIONS))}"
    )
    return UserError(what, where=", ".join(map(str, given)), fix=fix)


def _sources(given: Sequence[str | Path], root: Path) -> list[str]:
    """The folders among what was given, as the root sees them: `sync` scans them."""
    whole = [Path(os.path.abspath(Path(item).expanduser())) for item in given]
    return [diff.way(path, root) for path in whole if path.is_dir()]


def _below(writer: Writer, text: str, table: str) -> list[str]:
    """The paths in a table (`path` or `source`) that are `text`, or lie below it."""
    condition, values = ("true", []) if text == "." else database.below(text)
    found = [
        from_database(path)
        for (path,) in writer.db.execute(f"select path from {table} where {condition}", values)
    ]
    return [path for path in found if text != "." or not path.startswith("../")]
