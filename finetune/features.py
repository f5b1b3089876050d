"""From images to features: each image is looked at once, and what was read from it stays in the store.

`extract` decodes in threads while the network runs, and asks the network only about files whose bytes it has not seen.
"""

from __future__ import annotations

import concurrent.futures
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from finetune import decode, engine, images
from finetune.errors import UserError
from finetune.images import ImageSet
from finetune.network import Network, Tap
from finetune.store import Rows, Space, Store

if TYPE_CHECKING:
    from finetune.backbone import Backbone

AHEAD = 8  # batches decoded ahead of the network: bounds the memory
COMMIT_ROWS = 1024  # rows, or
COMMIT_SECONDS = 15.0  # seconds, between two commits of the store: what a kill can lose
VIEWS = ("", "flip")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Features:
    """Features of a set of images: `blocks[tap]` is `(n, width)` float32, not normalised, row i of `images.paths[i]`.

    `images` holds the images that could be read, `faults` those that could not; `spaces` names what made each block.
    Blocks are memory-mapped where the rows stand together in the store.
    """

    blocks: dict[Tap, Rows]
    images: ImageSet
    digests: tuple[str, ...]
    faults: tuple[images.Fault, ...]
    spaces: dict[Tap, str]

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

    `load` gives the torch backbone where the network has to be converted; `known` are the digests, where the caller has
    them; `view` is "" or "flip" (mirrored left to right). Unreadable images: `on_bad` "stop" raises a `UserError` that
    names them all (after the others are safe in the store), "skip" leaves them out and lists them in `faults`.
    """
    if view not in VIEWS:
        raise UserError(f"no view is called {view!r}", where="view", fix=f"choose one of {VIEWS}")
    own_store = store is None
    store = store or Store()
    try:
        ids = tuple(known) if known is not None else digests(source, store)
        used, bits = engine.resolve(engine_name, precision)
        spaces = [store.space(about(network, tap, used, bits, view), network.width(tap)) for tap in taps]
        missing = _missing(store, spaces, ids)
        faults: dict[int, images.Fault] = {}
        if missing:
            runner = engine.open_runner(network, taps, load, engine=used, precision=bits)
            faults = _run(source, ids, missing, runner, network, store, spaces, view, progress)
        return _gather(source, ids, taps, store, spaces, faults, on_bad)
    finally:
        if own_store:
            store.close()


def about(network: Network, tap: Tap, engine_name: str, precision: str, view: str) -> dict[str, Any]:
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
        "network": engine.FORMAT,
    }


def digests(source: ImageSet, store: Store) -> tuple[str, ...]:
    """SHA-256 of every image's bytes; files that the store remembers by path, size and time are not read again."""
    if source.in_memory:
        return tuple(images.digest_of(source, range(len(source))))
    stats = []
    for path in source.paths:
        full = source.root / path
        try:
            info = full.stat()
        except OSError as error:
            raise UserError(
                f"cannot be read ({error.strerror})", where=full, fix="mend or remove it; `finetune check` lists all such files"
            ) from error
        stats.append((os.fspath(full.absolute()), info.st_size, info.st_mtime_ns))
    found = store.remembered(stats)
    unread = [i for i, digest in enumerate(found) if digest is None]
    for part in (unread[i : i + COMMIT_ROWS] for i in range(0, len(unread), COMMIT_ROWS)):
        fresh = list(images.digest_of(source, part))
        # A file written this very moment could change again within the clock's grain: it is not remembered.
        settled = time.time_ns() - 2_000_000_000
        store.remember([(*stats[i], digest) for i, digest in zip(part, fresh, strict=True) if stats[i][2] < settled])
        for i, digest in zip(part, fresh, strict=True):
            found[i] = digest
    return tuple(digest for digest in found if digest is not None)


def _missing(store: Store, spaces: Sequence[Space], ids: Sequence[str]) -> list[int]:
    """Positions whose content at least one space does not have, each content once, in order."""
    absent = np.zeros(len(ids), dtype=bool)
    for space in spaces:
        absent |= store.find(space, ids) < 0
    first: dict[str, int] = {}
    for i in np.flatnonzero(absent):
        first.setdefault(ids[i], int(i))
    return list(first.values())


def _run(
    source: ImageSet,
    ids: Sequence[str],
    missing: Sequence[int],
    runner: engine.Runner,
    network: Network,
    store: Store,
    spaces: Sequence[Space],
    view: str,
    progress: Progress | None,
) -> dict[int, images.Fault]:
    """Decode, run and store the missing images; returns those that could not be decoded."""
    faults: dict[int, images.Fault] = {}
    waiting: list[tuple[list[int], engine.Blocks]] = []

    def commit() -> None:
        if waiting:
            positions = [i for batch, _ in waiting for i in batch]
            blocks = [np.concatenate(parts) for parts in zip(*(outputs for _, outputs in waiting), strict=True)]
            waiting.clear()
            store.append(spaces, [ids[i] for i in positions], blocks)

    last = time.monotonic()
    try:
        for batch, outputs in stream(source, missing, network, runner, faults, view=view, progress=progress):
            waiting.append((batch, outputs))
            if sum(len(b) for b, _ in waiting) >= COMMIT_ROWS or time.monotonic() - last > COMMIT_SECONDS:
                commit()
                last = time.monotonic()
    finally:
        commit()  # Ctrl-C, too, keeps what the network has done
    return faults


def stream(
    source: ImageSet,
    positions: Sequence[int],
    network: Network,
    runner: engine.Runner,
    faults: dict[int, images.Fault],
    *,
    view: str = "",
    progress: Progress | None = None,
) -> Iterator[tuple[list[int], engine.Blocks]]:
    """Decode images ahead and run them: `(positions, one (b, width) array a tap)` a batch, in order, past the store.

    What cannot be decoded is put into `faults`, by position. Raises `UserError` where the network gives no number.
    """
    queue: deque[list[int]] = deque()  # the positions of every batch on its way through the network

    def batches() -> Iterator[NDArray[np.uint8]]:
        good: list[tuple[int, NDArray[np.uint8]]] = []
        for i, result in decoded(source, positions, network):
            if isinstance(result, images.Fault):
                faults[i] = result
                continue
            good.append((i, result[:, ::-1] if view == "flip" else result))
            if len(good) == engine.BATCH:
                queue.append([i for i, _ in good])
                yield np.stack([pixels for _, pixels in good])
                good = []
        if good:
            queue.append([i for i, _ in good])
            yield np.stack([pixels for _, pixels in good])

    done = 0
    for outputs in runner.stream(batches()):
        batch = queue.popleft()
        for block in outputs:
            if not np.isfinite(block).all():
                name = source.paths[batch[int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])]]
                raise UserError(f"the network gives NaN for {name}", where=network.name, fix="try --precision float32")
        done += len(batch)
        if progress:
            progress(done + len(faults), len(positions))
        yield batch, outputs


def decoded(
    source: ImageSet, positions: Iterable[int], network: Network
) -> Iterator[tuple[int, NDArray[np.uint8] | images.Fault]]:
    """Network input `(size, size, 3)` uint8 of images, in order, decoded ahead in threads; a `Fault` where that fails."""
    pre = network.preprocess

    def one(i: int) -> NDArray[np.uint8] | images.Fault:
        try:
            return decode.to_input(source.read(i), pre)
        except decode.DecodeError as error:
            return images.Fault(source.paths[i], error.kind, error.detail)

    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count() or 2) as pool:
        running: deque[tuple[int, concurrent.futures.Future[Any]]] = deque()
        try:
            for i in positions:
                running.append((i, pool.submit(one, i)))
                if len(running) >= AHEAD * engine.BATCH:
                    position, future = running.popleft()
                    yield position, future.result()
            while running:
                position, future = running.popleft()
                yield position, future.result()
        finally:
            for _, future in running:
                future.cancel()


def _gather(
    source: ImageSet,
    ids: Sequence[str],
    taps: Sequence[Tap],
    store: Store,
    spaces: Sequence[Space],
    faults: dict[int, images.Fault],
    on_bad: str,
) -> Features:
    reasons = {ids[i]: fault for i, fault in faults.items()}
    bad = [images.Fault(source.paths[i], reasons[d].kind, reasons[d].detail) for i, d in enumerate(ids) if d in reasons]
    if bad and on_bad == "stop":
        refuse(bad, source.name)
    keep = np.array([i for i, d in enumerate(ids) if d not in reasons], dtype=np.int64)
    kept = source if len(keep) == len(source) else source.subset(keep)
    good = tuple(ids[i] for i in keep)
    blocks = {tap: store.read(space, store.find(space, good)) for tap, space in zip(taps, spaces, strict=True)}
    return Features(blocks, kept, good, tuple(bad), {tap: space.key for tap, space in zip(taps, spaces, strict=True)})


def refuse(faults: Sequence[images.Fault], where: str) -> NoReturn:
    """Name the images that could not be read, and how to go on."""
    raise UserError(images.list_faults(faults), where=where, fix="mend or remove them, or go on without them: --on-bad-image skip")


def neighbours(
    X: Rows, k: int, *, queries: Rows | None = None, block: int = 1024
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Exact cosine k-nearest neighbours, block by block: `(scores, positions)`, both `(q, k)`, the best first.

    Without `queries`, every row is a query and is left out of its own answer. Ties go to the lower position. A row of
    zeros has score 0 with everything.
    """
    base = _unit(X)
    leave_one_out = queries is None
    asked = base if queries is None else _unit(queries)
    k = min(k, len(base) - leave_one_out)
    scores, positions = np.empty((len(asked), k), np.float32), np.empty((len(asked), k), np.int64)
    for start in range(0, len(asked), block):
        similarity = asked[start : start + block] @ base.T
        rows = np.arange(len(similarity))
        if leave_one_out:
            similarity[rows, start + rows] = -np.inf
        best = np.argpartition(-similarity, min(k, similarity.shape[1] - 1), axis=1)[:, :k]
        order = np.lexsort((best, -np.take_along_axis(similarity, best, 1)), axis=1)
        best = np.take_along_axis(best, order, 1)
        positions[start : start + block] = best
        scores[start : start + block] = np.take_along_axis(similarity, best, 1)
    return scores, positions


def _unit(X: Rows) -> Rows:
    x = np.asarray(X, dtype=np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
