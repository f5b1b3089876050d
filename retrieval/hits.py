"""What a query found, and what has become of the files since: pure values, one look at the disk
per path."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

from finetune.names import shown, typed

SAME, MISSING, CHANGED = "the same file", "missing", "changed since"
# path → bytes and time of change in ns, as a gallery remembers them
Known = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Hit:
    """One image of an answer. `score` is the cosine; `also` are further paths of the same bytes,
    `similar` the paths of near-duplicates that were collapsed into it.

    `same`: it has the very bytes of the query. `missing` are those of its paths where no file is
    any more, `changed` those whose file has another size or time than the gallery remembers.
    """

    id: int
    path: str
    score: float
    also: tuple[str, ...] = ()
    similar: tuple[str, ...] = ()
    same: bool = False
    missing: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """`same`, `missing` and `changed` are there where they are true, and speak of `path`; the
        lists are of all paths."""
        lists = {
            "also": self.also,
            "similar": self.similar,
            "missing_paths": self.missing,
            "changed_paths": self.changed,
        }
        more = {name: [shown(path) for path in paths] for name, paths in lists.items() if paths}
        marks = {
            "same": self.same,
            "missing": self.path in self.missing,
            "changed": self.path in self.changed,
        }
        words = {name: True for name, is_so in marks.items() if is_so}
        return {"path": shown(self.path), "score": self.score, "id": self.id, **words, **more}

    def marks(self, path: str) -> list[str]:
        """What to know of one of the paths, in words."""
        words = (
            (SAME, self.same and path not in self.similar),
            (MISSING, path in self.missing),
            (CHANGED, path in self.changed),
        )
        return [word for word, is_so in words if is_so]


@dataclass(frozen=True)
class Answer:
    """What a query found, best first."""

    query: str
    hits: tuple[Hit, ...]
    parts: tuple[str, ...] = ()  # the query's images, where it has several

    def to_json(self) -> dict[str, Any]:
        return {"query": shown(self.query), "hits": [hit.to_json() for hit in self.hits]}

    def to_text(self) -> str:
        """A line per hit, below it a line for each further path; what is to be known of a path
        stands behind it."""
        lines = [shown(self.query)]
        for hit in self.hits:
            lines.append(f"  {hit.score:6.3f}  {_marked(hit, hit.path)}")
            lines += [f"          = {_marked(hit, path)}" for path in hit.also]
            lines += [f"          ≈ {_marked(hit, path)}" for path in hit.similar]
        return "\n".join(lines if self.hits else [*lines, "  nothing found"])


def _marked(hit: Hit, path: str) -> str:
    words = hit.marks(path)
    return f"{shown(path)}  ({', '.join(words)})" if words else shown(path)


def gone(root: Path, known: Known) -> tuple[list[str], list[str]]:
    """The paths where no file is any more, and those whose size or time is another: one look at
    each, no byte is read."""
    missing, changed = [], []
    for path, (size, mtime) in known.items():
        try:
            info = os.stat(os.path.join(root, path))
        except OSError:
            missing.append(path)
            continue
        if not S_ISREG(info.st_mode):
            missing.append(path)
        elif info.st_size != size or (
            mtime >= 0 and info.st_mtime_ns != mtime
        ):  # below 0: its time was not settled
            changed.append(path)
    return missing, changed


def advice(missing: Iterable[str], changed: Iterable[str], gallery: Path) -> tuple[str, ...]:
    """One line on files that are not what the gallery remembers; none where all are."""
    counts = ((len(set(missing)), MISSING), (len(set(changed)), CHANGED))
    words = " and ".join(f"{count} {word}" for count, word in counts if count)
    return (
        (
            f"of the files shown, {words}: `retrieve sync "
            f"{typed(gallery)}` brings the gallery up to date",
        )
        if words
        else ()
    )


def others(paths: Sequence[str], root: Path, file: Path) -> tuple[str, ...]:
    """The paths of an image that are not the file itself; a link to it is another path."""
    own = _place(file)
    return tuple(path for path in paths if _place(root / path) != own)


def _place(file: Path) -> Path:
    """Where a file is, whatever the way to its folder."""
    return Path(os.path.realpath(file.parent)) / file.name
