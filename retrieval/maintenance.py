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
from finetune.data.images import Fault, list_faults
from finetune.errors import UserError
from finetune.features import extraction
from finetune.features.store import Store
from finetune.lock import NO_WAIT, Wait
from finetune.names import from_database, meant
from finetune.progress import Bar, no_bar
from retrieval import compaction, database, diff, encode, segments
from retrieval import frame as framing
from retrieval.diff import Change, Found, Plan
from retrieval.encode import Encoded
from retrieval.encoder import Encoder, describe, from_manifest
from retrieval.frame import Frame
from retrieval.segments import Stored, find_root
from retrieval.whitening import whiten
from retrieval.writer import Writer, writing

HERE_ALREADY = "bring it up to date with `retrieve sync`, or build it again with --force"
WHITENING_SAMPLE = 50_000  # vectors that a whitening is fitted on

# ----------------------------------------------------------------------------------------- commands


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
) -> Change:
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
    wait = dataclasses.replace(wait, other="choose another folder with -o")
    with (
        writing(folder, create=True, replace=force, wait=wait) as writer,
        contextlib.closing(Store()) as store,
    ):
        if not writer.is_new and not force:
            raise UserError("an index is here already", where=folder, fix=HERE_ALREADY)
        found, bad = diff.scan(root, paths, folder)
        plan = diff.compare(None, root, found, (), store, on_bad, bad, bar)
        encoder, looks = _framed(plan, encoder, frame, _sources(given, root), store, bar)
        if frame == "auto" and not encoder.run:
            say(f"frame      {looks.name}: {looks.why}")
        made = _encode(plan, encoder, store, on_bad, bar)
        if made is None or not len(made.images):
            bad = [*(fault for _, fault in diff.bad_files(plan, made)), *plan.scan_faults]
            what = f"no image here can be read; {list_faults(bad, extraction.NAMED)}"
            raise UserError(
                what, where=", ".join(map(str, given)), fix="mend them, or give other images"
            )
        if whiten is not None:
            made = _whitened(made, whiten)
        number, stored = writer.write_vectors(made.blocks())
        kept, manifest = _manifest(writer, made.encoder, looks)
        settings = {"factory": factory, "recall": recall, "memory_mb": memory_mb}
        table = segments.open_table(folder / stored.name, made.encoder.width)
        with bar("search index") as progress:
            search = compaction.index_file(
                writer, table, [number], settings, lambda part, _: progress(round(100 * part), 100)
            )
        meta = {
            "manifest": manifest,
            "root": {"absolute": str(root), "relative": diff.way(root, folder)},
            "search settings": settings,
            "search": search[1] if search else None,
        }
        files = [*kept, *([search[0]] if search else [])]
        segment = (number, stored)
        done = diff.commit(
            writer,
            plan,
            made,
            segment,
            meta,
            sources=_sources(given, root),
            files=files,
            replace=True,
        )
        return _noted(done, folders.told(root, others))


def check_build(given: Sequence[str | Path], folder: Path, force: bool) -> None:
    """Raise the `UserError` of a build that cannot succeed, before a network is loaded for it."""
    root, inside, others = folders.gather(given)
    if not inside:
        raise _no_images(given, folders.told(root, others))
    if not force and segments.is_index(folder):
        raise UserError("an index is here already", where=folder, fix=HERE_ALREADY)


def add(
    folder: Path,
    given: Sequence[str | Path],
    *,
    on_bad: str = "stop",
    wait: Wait = NO_WAIT,
    bar: Bar = no_bar,
) -> Change:
    """Add files, and all images in folders, to a gallery; what it knows already costs nothing."""
    with writing(folder, wait=wait) as writer:
        root = find_root(writer.meta, folder)
        own, inside, others = folders.gather(given)
        left = folders.told(own, others)
        if not inside:
            raise _no_images(given, left)
        paths = [posixpath.normpath(f"{diff.way(own, root)}/{path}") for path in inside]
        found, bad = diff.scan(root, paths, folder)
        return _noted(
            _update(writer, root, found, (), on_bad, bad, bar, _sources(given, root)), left
        )


def remove(folder: Path, given: Sequence[str | Path], *, wait: Wait = NO_WAIT) -> Change:
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
        plan = diff.compare(writer, root, (), tuple(gone), None, "stop", (), no_bar)
        return _tended(writer, diff.commit(writer, plan, None, None, {}, forget=prefixes))


def sync(
    folder: Path,
    *,
    root: Path | None = None,
    on_bad: str = "stop",
    allow_empty: bool = False,
    wait: Wait = NO_WAIT,
    bar: Bar = no_bar,
) -> Change:
    """Make a gallery equal to its folders: files that came, changed, moved and went.

    `root` says where the folder of the images is now. A folder that is not there, or that holds no
    image at all where the gallery has some, is a `UserError` (a disk that is not mounted looks the
    same), unless `allow_empty`.
    """
    with writing(folder, wait=wait) as writer:
        root = root.absolute() if root is not None else find_root(writer.meta, folder)
        known = [from_database(path) for (path,) in writer.db.execute("select path from path")]
        paths: dict[str, None] = {}
        left: list[str] = []
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
            paths |= dict.fromkeys(
                posixpath.normpath(posixpath.join(source, image)) for image in walked.images
            )
            left += [posixpath.join(source, other) for other in (*walked.others, *walked.results)]
        paths |= dict.fromkeys(
            path for path in known if path not in paths and os.path.lexists(root / path)
        )
        found, bad = diff.scan(root, paths, folder)
        seen = {one.path for one in found}
        gone = tuple(path for path in known if path not in seen)
        if known and not seen and not allow_empty:
            fix = "is the disk mounted? If it is right, say so with --allow-empty"
            raise UserError(
                f"no image is left: all {len(known)} would be removed", where=root, fix=fix
            )
        return _noted(
            _update(writer, root, found, gone, on_bad, bad, bar, whole=True),
            folders.told(root, left),
        )


def compact(folder: Path, *, wait: Wait = NO_WAIT, bar: Bar = no_bar) -> Change:
    """Merge all segments into one without the removed images, and make the search index again where
    there is one."""
    with writing(folder, wait=wait) as writer, bar("compact") as progress:
        progress(0, 1)
        compaction.tend(writer, everything=True)
        return Change(0, 0, 0, 0, diff.count_paths(writer), 0, diff.alive(writer))


def _encode(plan: Plan, encoder: Encoder, store: Store, on_bad: str, bar: Bar) -> Encoded | None:
    """Features of the new contents of a plan, by way of the store: a killed build goes on where it
    was."""
    if not plan.new:
        return None
    source = diff.image_set(plan.root, [plan.fresh[i] for i in plan.new])
    with bar("features") as progress:
        made = encode.from_store(
            encoder, source, [plan.digests[i] for i in plan.new], store, progress
        )
    if made.faults and on_bad == "stop":
        extraction.refuse([fault for _, fault in diff.bad_files(plan, made)], source.name)
    return made


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
        plan = diff.compare(writer, root, found, gone, store, on_bad, bad, bar)
        made = None
        if plan.new:
            encoder = from_manifest(writer.folder, writer.meta["manifest"])
            made = _encode(plan, encoder, store, on_bad, bar)
    segment = writer.write_vectors(made.blocks()) if made is not None and len(made.images) else None
    meta = {"root": {"absolute": str(root), "relative": diff.way(root, writer.folder)}}
    return _tended(
        writer, diff.commit(writer, plan, made, segment, meta, sources=sources, whole=whole)
    )


def _noted(change: Change, lines: Sequence[str]) -> Change:
    return dataclasses.replace(change, notes=(*change.notes, *lines))


def _tended(writer: Writer, change: Change) -> Change:
    """Merge segments where it is time. The change is safe already: what goes wrong here is a note,
    not a failure."""
    try:
        compaction.tend(writer)
    except UserError as error:
        return dataclasses.replace(change, notes=(f"the index was not compacted: {error}",))
    return change


# ------------------------------------------------------------------------------------------ details


def _framed(
    plan: Plan, encoder: Encoder, asked: str | None, sources: Sequence[str], store: Store, bar: Bar
) -> tuple[Encoder, Frame]:
    """The encoder that looks at the pictures of a new gallery in the frame that was asked for, and
    why it does."""
    if encoder.run or asked is None:
        return encoder, Frame(
            framing.seen(encoder),
            "as the run was trained" if encoder.run else "as the network looks",
        )
    if asked != "auto":
        encoder = framing.framed(encoder, asked)
        return encoder, Frame(framing.seen(encoder), "as was asked")
    source = diff.image_set(plan.root, [plan.fresh[i] for i in plan.new])
    places = sorted(sources, key=len, reverse=True)
    classes = [framing.first_folder(path, places) for path in source.paths]
    with bar("frame") as progress:
        progress(0, 1)
        looks = framing.choose(encoder, source, [plan.digests[i] for i in plan.new], classes, store)
        progress(1, 1)
    return encoder if looks.name == framing.seen(encoder) else framing.framed(
        encoder, looks.name
    ), looks


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


def _whitened(made: Encoded, dims: int) -> Encoded:
    """The same features under a whitening that is fitted on them, or on an even sample where they
    are many."""
    step = max(1, -(-len(made.images) // WHITENING_SAMPLE))
    sample = np.concatenate(list(made.blocks(np.arange(0, len(made.images), step))))
    encoder = dataclasses.replace(made.encoder, whitening=whiten(sample, dims))
    return dataclasses.replace(made, encoder=encoder)


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
