"""From images to features: each image is looked at once, and what was read from it stays in the
store.

`extract` decodes in threads while the network runs, and asks the network only about files whose
bytes it has not seen.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from finetune import files, hardware, timings
from finetune.backbones import device
from finetune.backbones.device import Way
from finetune.data import decode, images
from finetune.data.images import Fault, ImageSet
from finetune.errors import UserError
from finetune.features import conversion, engine
from finetune.features.store import Rows, Space, Store
from finetune.names import shown
from finetune.network import Network, Tap
from finetune.progress import Progress

if TYPE_CHECKING:
    from finetune.backbones.stages import Backbone

AHEAD = 64  # images decoded ahead of the network: bounds the memory
COMMIT_BYTES = 4 << 20  # bytes of features a space, or
COMMIT_SECONDS = 15.0  # seconds, between two commits of the store: what a kill can lose
PART = 4096  # files whose sizes and times are compared with the store's at once
VIEWS = ("", "flip")
# images that are too few for timing the ways of running a network: one second would not come back
FEW = 64
# bad images that an error names: who mends them wants them all, but not a screen of ten thousand
NAMED = 20

Picture = NDArray[np.uint8] | Fault
# positions of images, and their features: one (b, width) array a tap
Batch = tuple[list[int], engine.Blocks]


class Changed(UserError):  # noqa: N818 — it says what happened to the file
    """A file whose bytes are no longer those of its digest: its features would be stored under a
    wrong name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(
            "has changed since it was first looked at", where=path, fix="run the same command again"
        )


@dataclass(frozen=True)
class Features:
    """Features of a set of images: `blocks[tap]` is `(n, width)` float32, not normalised, row i of
    `images.paths[i]`.

    `images` holds the images that could be read, `faults` those that could not; `spaces` names what
    made each block, and `way` the engine and precision of all of them. Blocks are memory-mapped
    where the rows stand together in the store.
    """

    blocks: dict[Tap, Rows]
    images: ImageSet
    digests: files.Digests
    faults: tuple[Fault, ...]
    spaces: dict[Tap, str]
    way: Way

    def __len__(self) -> int:
        return len(self.images)


def extract(
    source: ImageSet,
    network: Network,
    taps: Sequence[Tap],
    load: Callable[[], Backbone],
    *,
    store: Store | None = None,
    engine_name: str = "auto",
    precision: str = "auto",
    view: str = "",
    on_bad: str = "stop",
    known: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Features:
    """Read `taps` of every image in one pass, running the network on unseen content alone.

    `load` gives the torch backbone where the network has to be converted; `known` are the digests,
    where the caller has them; `view` is "" or "flip" (mirrored left to right). Unreadable images:
    `on_bad` "stop" raises a `UserError` that names them all (after the others are safe in the
    store), "skip" leaves them out and lists them in `faults`. A file that no longer has the bytes
    of its digest raises `Changed`. `auto` is what is fastest here, unless more of the rows are
    stored in another way: `Features.way` says what it came to.
    """
    if view not in VIEWS:
        raise UserError(f"no view is called {view!r}", where="view", fix=f"choose one of {VIEWS}")
    images.check_on_bad(on_bad)
    own_store = store is None
    store = store or Store()
    try:
        ids = files.Digests.of(known) if known is not None else digests(source, store)
        if len(ids) != len(source):
            raise ValueError(f"{len(ids)} digests of {len(source)} images")
        asked = _Asked(network, tuple(taps), view, engine_name, precision)
        way = _settled(asked, store, ids, load)
        # Where nothing is known, the ways are timed while the first images are decoded.
        spaces = asked.spaces(store, way) if way else []
        missing = _missing(store, spaces, ids) if way else ids.first(np.arange(len(ids)))

        def opened() -> engine.Runner:
            nonlocal way
            words = (way.engine, way.precision) if way else (engine_name, precision)
            how = dict(zip(("engine", "precision"), words, strict=True))
            runner = engine.open_runner(network, taps, load, **how)
            if way is None:
                way = Way(runner.engine, runner.precision)
                spaces.extend(asked.spaces(store, way))
            return runner

        faults: dict[int, Fault] = {}
        _tell_damage(store)
        if len(missing):
            try:
                faults = _run(source, ids, missing, opened, network, store, spaces, view, progress)
            except Changed as error:
                # its size and time may be those of the old content
                store.forget([os.fspath(error.path.absolute())])
                raise
        assert way is not None
        return _gather(source, ids, asked.taps, way, store, spaces, faults, on_bad)
    finally:
        if own_store:
            store.close()


@dataclass(frozen=True)
class _Asked:
    """What is to be read, and what was said of how."""

    network: Network
    taps: tuple[Tap, ...]
    view: str
    engine_name: str
    precision: str

    def spaces(self, store: Store, way: Way) -> list[Space]:
        """The spaces of the taps, made where they are new."""
        return [store.space(*one) for one in self._keys(way)]

    def absent(self, store: Store, way: Way, ids: files.Digests) -> int:
        """How many contents the store does not have at all taps."""
        known = [store.known(*one) for one in self._keys(way)]
        spaces = [space for space in known if space is not None]
        if len(spaces) < len(known):
            return len(ids.first(np.arange(len(ids))))
        return len(_missing(store, spaces, ids))

    def _keys(self, way: Way) -> list[tuple[dict[str, Any], int]]:
        how = (way.engine, way.precision, self.view)
        return [(about(self.network, tap, *how), self.network.width(tap)) for tap in self.taps]


def _settled(
    asked: _Asked, store: Store, ids: files.Digests, load: Callable[[], Backbone]
) -> Way | None:
    """The way that makes the least work of what the store lacks; None where nothing is stored nor
    known, and it is to be timed.

    All rows of a set come from one way: where they are stored already, be it in the slower one,
    nothing is computed.
    """
    ways = device.ways(asked.engine_name, asked.precision, asked.taps)
    if len(ways) == 1:
        return ways[0]
    absent = {way: asked.absent(store, way, ids) for way in ways}
    fewest = min(ways, key=lambda way: absent[way])
    rates = timings.recall(engine.task(asked.network))
    if str(ways[0]) not in rates:
        if absent[fewest] < FEW:
            return fewest
        if min(absent.values()) == len(ids.first(np.arange(len(ids)))):
            return None
        words = (asked.engine_name, asked.precision)
        engine.fastest(asked.network, asked.taps, load, *words)
        rates = timings.recall(engine.task(asked.network))
    names = {str(way): way for way in ways}
    taken = names[timings.best(list(names), rates)] if rates else ways[0]
    slowest = min(rates.values(), default=1.0)
    seconds = {way: absent[way] / rates.get(str(way), slowest) for way in ways}
    better = min(ways, key=lambda way: seconds[way])
    return better if absent[better] < absent[taken] else taken


def about(
    network: Network, tap: Tap, engine_name: str, precision: str, view: str
) -> dict[str, Any]:
    """Everything that decides a feature besides the file: the description of its space."""
    return {
        "backbone": network.name,
        "weights": network.digest,
        "preprocess": network.to_json()["preprocess"],
        "decoder": decode.FORMAT,
        "tap": str(tap),
        "engine": engine_name,
        "precision": precision,
        "view": view,
        "network": conversion.FORMAT,
    }


def digests(source: ImageSet, store: Store) -> files.Digests:
    """SHA-256 of every image's bytes; files that the store remembers by path, size and time are not
    read again.

    Raises `UserError` naming the files that cannot be read.
    """
    if source.in_memory:
        return files.Digests.of(images.digests(source))
    # Names are put together and looked up one by one: for 50,000 files `os.path.join` and a context
    # manager cost a quarter.
    root, count = os.path.join(os.fspath(source.root.absolute()), ""), len(source)
    # size and mtime; in arrays and in parts, as there may be very many
    stats = np.full((count, 2), -1, dtype=np.int64)
    known: list[str | None] = []
    for part in _parts(count):
        entries = []
        for i in part:
            path, size, changed = root + source.paths[i], -1, -1
            try:
                info = os.stat(path)
                if info.st_mtime_ns < 2**63:
                    size, changed = info.st_size, info.st_mtime_ns
            except OSError:
                pass  # it cannot be read either, and is named below together with the others
            entries.append((path, size, changed))
        stats[part.start : part.stop] = [(size, changed) for _, size, changed in entries]
        known += store.remembered(entries)
    found = images.digests(source, known)
    # A file written this very moment could change again within the clock's grain: it is not
    # remembered.
    settled = time.time_ns() - 2_000_000_000
    for part in _parts(count):
        fresh = [
            (root + source.paths[i], *stats[i].tolist(), found[i])
            for i in part
            if known[i] is None and stats[i, 0] >= 0 and stats[i, 1] < settled
        ]
        if fresh:
            store.remember(fresh)
    return files.Digests.of(found)


def _parts(count: int) -> Iterator[range]:
    return (range(start, min(start + PART, count)) for start in range(0, count, PART))


def _missing(store: Store, spaces: Sequence[Space], ids: files.Digests) -> NDArray[np.int64]:
    """Positions whose content at least one space does not have, each content once, in order."""
    absent = np.zeros(len(ids), dtype=bool)
    for space in spaces:
        absent |= store.find(space, ids) < 0
    return ids.first(np.flatnonzero(absent))


def _tell_damage(store: Store) -> None:
    rows, count = store.damage()
    if rows:
        words = (
            f"{rows:,} damaged or missing row{'s' * (rows > 1)} in {count} file{'s' * (count > 1)}"
        )
        files.note(
            f"{shown(store.folder)}: {words} of features, "
            f"made again where their images are looked at"
        )


def _run(
    source: ImageSet,
    ids: files.Digests,
    missing: NDArray[np.int64],
    opened: Callable[[], engine.Runner],
    network: Network,
    store: Store,
    spaces: Sequence[Space],
    view: str,
    progress: Progress | None,
) -> dict[int, Fault]:
    """Decode, run and store the missing images; returns those that could not be decoded."""
    faults: dict[int, Fault] = {}
    waiting: list[Batch] = []
    held = 0  # bytes of features in them

    def commit() -> None:
        nonlocal held
        if waiting:
            positions, blocks = joined(waiting)
            try:
                store.append(spaces, ids.take(positions), blocks)
            except Exception:
                waiting.clear()  # a full disk is not tried twice; after Ctrl-C the last commit is
                raise
            waiting.clear()
            held = 0

    last = time.monotonic()
    try:
        for batch in stream(
            source, missing, network, opened, faults, view=view, ids=ids, progress=progress
        ):
            waiting.append(batch)
            held += sum(block.nbytes for block in batch[1])
            if held >= COMMIT_BYTES * len(spaces) or time.monotonic() - last > COMMIT_SECONDS:
                commit()
                last = time.monotonic()
    finally:
        commit()  # Ctrl-C, too, keeps what the network has done
    return faults


def stream(
    source: ImageSet,
    positions: Sequence[int] | NDArray[np.int64],
    network: Network,
    opened: Callable[[], engine.Runner],
    faults: dict[int, Fault],
    *,
    view: str = "",
    ids: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Generator[Batch, None, None]:
    """Decode images ahead and run them: `(positions, one (b, width) array a tap)` a batch, in
    order, past the store.

    `opened` gives the runner, and is called when decoding is under way: opening a network overlaps
    with the first images. What cannot be decoded is put into `faults`, by position. `ids` are the
    digests of all images of `source`: bytes that are not theirs raise `Changed`. Raises `UserError`
    where the network gives no number.
    """
    queue: deque[list[int]] = deque()  # the positions of every batch on its way through the network

    def batches(pictures: Iterable[tuple[int, Picture]], size: int) -> Iterator[NDArray[np.uint8]]:
        good: list[tuple[int, NDArray[np.uint8]]] = []
        for i, result in pictures:
            if isinstance(result, Fault):
                faults[i] = result
                continue
            good.append((i, result[:, ::-1] if view == "flip" else result))
            if len(good) == size:
                queue.append([i for i, _ in good])
                yield np.stack([pixels for _, pixels in good])
                good = []
        if good:
            queue.append([i for i, _ in good])
            yield np.stack([pixels for _, pixels in good])

    done, before = 0, len(faults)
    with decoding(source, positions, network, ids) as pictures:
        runner = opened()
        for outputs in runner.stream(batches(pictures, runner.batch)):
            batch = queue.popleft()
            for block in outputs:
                if not np.isfinite(block).all():
                    name = source.paths[
                        batch[int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])]
                    ]
                    raise UserError(
                        f"the network gives NaN for {shown(name)}",
                        where=network.name,
                        fix="try --precision float32",
                    )
            done += len(batch)
            yield batch, outputs
            # after the batch is taken: whoever stops the work from here loses none of it
            if progress:
                progress(done + len(faults) - before, len(positions))
    if progress and done < len(positions):  # the last images gave no batch
        progress(len(positions), len(positions))


def joined(batches: Sequence[Batch]) -> Batch:
    """Several batches of `stream` as one."""
    positions = [i for batch, _ in batches for i in batch]
    return positions, [
        np.concatenate(parts) for parts in zip(*(blocks for _, blocks in batches), strict=True)
    ]


@contextlib.contextmanager
def decoding(
    source: ImageSet, positions: Iterable[int], network: Network, ids: Sequence[str] | None = None
) -> Iterator[Iterator[tuple[int, Picture]]]:
    """Decode images ahead, in threads, from now on: gives them in order, each with its position.

    A picture is the network's input `(size, size, 3)` uint8, or a `Fault` where it cannot be had.
    Raises `Changed` where the bytes of an image are not those of its digest in `ids`.
    """
    pre = network.preprocess

    def one(i: int) -> Picture:
        try:
            data = source.read(i)
        except UserError as error:
            return Fault(source.paths[i], "unreadable", error.what)
        except decode.DecodeError as error:  # of a picture in memory
            return Fault(source.paths[i], error.kind, error.detail)
        if ids is not None and hashlib.sha256(data).hexdigest() != ids[i]:
            raise Changed(source.root / source.paths[i])
        try:
            return decode.to_input(data, pre)
        except decode.DecodeError as error:
            return Fault(source.paths[i], error.kind, error.detail)

    with concurrent.futures.ThreadPoolExecutor(max_workers=hardware.cores()) as pool:
        coming = ((int(i), pool.submit(one, int(i))) for i in positions)
        running: deque[tuple[int, concurrent.futures.Future[Picture]]] = deque()

        def results() -> Iterator[tuple[int, Picture]]:
            while running:
                position, future = running.popleft()
                result = future.result()
                running.extend(itertools.islice(coming, 1))
                yield position, result

        try:
            running.extend(itertools.islice(coming, AHEAD))
            yield results()
        finally:
            for _, future in running:
                future.cancel()


def _gather(
    source: ImageSet,
    ids: files.Digests,
    taps: Sequence[Tap],
    way: Way,
    store: Store,
    spaces: Sequence[Space],
    faults: dict[int, Fault],
    on_bad: str,
) -> Features:
    reasons = {ids[i]: fault for i, fault in faults.items()}
    of = [reasons.get(digest) for digest in ids] if reasons else []
    bad = [Fault(source.paths[i], fault.kind, fault.detail) for i, fault in enumerate(of) if fault]
    if bad and on_bad == "stop":
        refuse(bad, source.name)
    keep = (
        np.array([i for i, fault in enumerate(of) if not fault], dtype=np.int64)
        if bad
        else np.arange(len(source))
    )
    kept = source if len(keep) == len(source) else source.subset(keep)
    good = ids.take(keep)
    blocks = {tap: store.read(space, good) for tap, space in zip(taps, spaces, strict=True)}
    return Features(
        blocks,
        kept,
        good,
        tuple(bad),
        {tap: space.key for tap, space in zip(taps, spaces, strict=True)},
        way,
    )


def refuse(faults: Sequence[Fault], where: str) -> NoReturn:
    """Name the images that could not be read (the first of very many), and how to go on."""
    raise UserError(
        images.list_faults(faults, NAMED),
        where=where,
        fix="mend or remove them, or go on without them: --on-bad-image skip",
    )


def save(output: Path, X: Rows, source: ImageSet, manifest: dict[str, Any]) -> None:
    """Write features to `.npz` (arrays `X`, `y`, `paths`, `classes`, and `manifest` as JSON text;
    no pickle) or `.parquet`.

    Paths are written as `names.shown` shows them.
    Raises `UserError` where pyarrow, which writes Parquet, is not installed.
    """
    paths = list(map(shown, source.paths))
    with files.atomic(output) as temporary:
        if output.suffix == ".npz":
            with temporary.open("wb") as file:
                np.savez(
                    file,
                    X=X,
                    y=source.labels,
                    paths=np.array(paths),
                    classes=np.array(source.classes),
                    manifest=np.array(json.dumps(manifest)),
                )
            return
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(
                "writing Parquet needs pyarrow",
                where=output,
                fix="pip install pyarrow, or name the file .npz",
            ) from error
        labels = [source.classes[label] if label >= 0 else None for label in source.labels]
        flat = pyarrow.FixedSizeListArray.from_arrays(
            pyarrow.array(np.ascontiguousarray(X).reshape(-1)), X.shape[1]
        )
        table = pyarrow.table({"path": paths, "label": labels, "features": flat})
        pyarrow.parquet.write_table(
            table.replace_schema_metadata({"regraft": json.dumps(manifest)}), temporary
        )
