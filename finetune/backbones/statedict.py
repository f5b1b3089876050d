"""A dictionary of tensors from any file of weights: read as data, never as code, and taken out of
what it is wrapped in.

Training programs save weights inside a checkpoint, under prefixes of data parallelism, of
compilation or of the module around them. What was taken, and what was left out, is told in notes.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import files
from finetune.errors import UserError

if TYPE_CHECKING:  # torch is imported where tensors are read
    from torch import Tensor

AVERAGED = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "model_state_dict_ema",
    "params_ema",
    "ema",
    "teacher",
)
WRAPPERS = (
    *AVERAGED,
    "state_dict",
    "model_state_dict",
    "model",
    "student",
    "module",
    "net",
    "params",
    "weights",
)
SHARD = re.compile(r"-(\d+)-of-(\d+)\.\w+$")
MOST_HEADER = 100_000_000  # bytes of a safetensors header, by its format
CUT_SHORT = ("central directory", "unexpected EOF", "Ran out of input", "EOFError", "truncated")
ALONE = (
    "where it was made, save the tensors alone: torch.save(model.state_dict(), "
    "'weights.pth'), and give that file"
)
AGAIN = "copy or download it again"


@dataclass(frozen=True)
class StateDict:
    """Tensors by name, notes on where in the file they were, and the `arch` that the file says it
    is of."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    arch: str | None = None


def read(path: Path) -> StateDict:
    """The tensors of a weight file; the averaged ones where it has them. What holds anything but
    data is refused unopened."""
    import torch

    loaded = _opened(path)
    top, notes = loaded, []
    while isinstance(loaded, dict) and (
        key := next((k for k in WRAPPERS if isinstance(loaded.get(k), dict) and loaded[k]), "")
    ):
        notes.append(f"its {key}, averaged weights" if key in AVERAGED else f"its {key}")
        loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise UserError("holds no dictionary of tensors", where=path, fix=ALONE)
    tensors = {str(key): value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise UserError(f"holds no tensors ({len(loaded)} other entries)", where=path, fix=ALONE)
    if others := [str(key) for key, value in loaded.items() if not isinstance(value, torch.Tensor)]:
        notes.append(f"without {counted(others, 'entry', 'entries')} that are no tensors")
    arch = top.get("arch")
    found = StateDict(tensors, tuple(notes), arch if isinstance(arch, str) else None)
    return _without_wrapping(found)


def _without_wrapping(found: StateDict) -> StateDict:
    """Names without what `torch.compile` and data parallelism put into them."""
    tensors, notes = found.tensors, list(found.notes)
    for mark, everywhere in (("_orig_mod.", True), ("module.", False)):
        if everywhere and any(mark in key for key in tensors):
            tensors = {key.replace(mark, ""): value for key, value in tensors.items()}
        elif not everywhere and all(key.startswith(mark) for key in tensors):
            tensors = {key.removeprefix(mark): value for key, value in tensors.items()}
        else:
            continue
        notes.append(f"without the prefix {mark}")
    return replace(found, tensors=tensors, notes=tuple(notes))


def without_prefix(found: StateDict, own: Collection[str]) -> StateDict:
    """The tensors of the part that has the names `own` behind a prefix, such as Lightning's
    `model.`; others are left out.

    Of two parts that fit equally well, the averaged one is taken. Where no prefix makes most names
    fit, nothing changes.
    """
    counts: Counter[str] = Counter()
    for key in found.tensors:
        for prefix in ("", *(key[: dot.end()] for dot in re.finditer(r"\.", key))):
            counts[prefix] += key[len(prefix) :] in own

    def rank(prefix: str) -> tuple[int, bool, int]:
        return counts[prefix], bool(re.search(r"ema|teacher|averag", prefix)), -len(prefix)

    best = max(counts, key=rank)
    if not best or 2 * counts[best] < len(own) or counts[best] <= counts[""]:
        return found
    tensors = {
        key.removeprefix(best): value
        for key, value in found.tensors.items()
        if key.startswith(best)
    }
    notes = [*found.notes, f"without the prefix {best}"]
    if left := [key for key in found.tensors if not key.startswith(best)]:
        notes.append(f"{counted(left, 'tensor', 'tensors')} left out")
    return replace(found, tensors=tensors, notes=tuple(notes))


def counted(names: Collection[str], one: str, more: str) -> str:
    """`3 tensors (a, b, …)`: how many, and the first of them."""
    first = list(names)[:3]
    return (
        f"{len(names)} {one if len(names) == 1 else more} "
        f"({', '.join(first)}{', …' if len(names) > 3 else ''})"
    )


# ------------------------------------------------------------------------------------------ opening


def _opened(path: Path) -> Any:
    """What a file holds, memory-mapped where that is possible; a `UserError` says why it holds no
    weights."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
        _refuse_by_look(path, head)
        with files.in_text(path) as plain:  # a link, where a name is not UTF-8: names are bytes
            return _loaded(plain, head)
    except (UserError, MemoryError):
        raise
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror or error})", where=path, fix="check its permissions"
        ) from error
    except (
        Exception
    ) as error:  # torch and safetensors raise a dozen types for one fact: these are no weights
        raise _refused(path, head, error) from error


def _loaded(path: Path, head: bytes) -> Any:
    import torch

    if _header_length(head):
        from safetensors.torch import load_file

        return load_file(path)
    # Plain options are what training programs put beside the weights; they can hold no code.
    with (
        torch.serialization.safe_globals([argparse.Namespace]),
        path.open("rb") as file,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # what torch warns of is refused in our words
        if path.suffix != ".safetensors" and zipfile.is_zipfile(path):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return torch.load(file, map_location="cpu", weights_only=True)


def _header_length(head: bytes) -> int:
    """The length of the JSON header that a safetensors file begins with; 0 for any other file."""
    length = int.from_bytes(head[:8], "little")
    return length if len(head) > 8 and head[8:9] == b"{" and length <= MOST_HEADER else 0


def _refuse_by_look(path: Path, head: bytes) -> None:
    """Refuse what is known at a glance: nothing, a part, a page, a pointer, an archive, half a
    file."""
    size = path.stat().st_size
    if not head:
        raise UserError("is empty", where=path, fix=AGAIN)
    if part := SHARD.search(path.name):
        fix = (
            "save it in one piece (save_pretrained: max_shard_size='100GB'), "
            "or join the parts with safetensors.torch"
        )
        raise UserError(
            f"is part {int(part[1])} of {int(part[2])} of the weights", where=path, fix=fix
        )
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            "is a pointer of Git LFS, not the weights",
            where=path,
            fix="run `git lfs pull` where it came from",
        )
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(
            "is a web page, not weights",
            where=path,
            fix="download the file itself, not the page that shows it",
        )
    if head.startswith(b"\x1f\x8b") or head[257:262] == b"ustar":
        raise UserError(
            "is an archive, not weights",
            where=path,
            fix="unpack it, and give the weight file inside",
        )
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise UserError(
            f"was cut short: its end is missing ({size:,} bytes are here)", where=path, fix=AGAIN
        )
    if length := _header_length(head):
        with path.open("rb") as file:
            file.seek(8)
            header = file.read(length)
        try:
            told = max(
                (
                    entry["data_offsets"][1]
                    for key, entry in json.loads(header).items()
                    if key != "__metadata__"
                ),
                default=0,
            )
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            told = 0  # half a header, or none: safetensors itself judges the rest
        if size < 8 + length + told:
            raise UserError(
                f"was cut short: {size:,} bytes of {8 + length + told:,} are here",
                where=path,
                fix=AGAIN,
            )


def _refused(path: Path, head: bytes, error: Exception) -> UserError:
    """Why torch or safetensors cannot read it, in our words: torch's own advise to trust the
    file."""
    words = f"{type(error).__name__}: {error}"
    if "TorchScript" in words:
        return UserError("is a TorchScript program, not weights", where=path, fix=ALONE)
    if any(sign in words for sign in CUT_SHORT):
        return UserError(
            f"was cut short ({path.stat().st_size:,} bytes are here)", where=path, fix=AGAIN
        )
    if head.startswith((b"PK", b"\x80")):  # a pickle, bare or in torch's archive
        held = re.search(r"(?:GLOBAL|global|class|function) ([\w.]+\.[\w.]+)", words)
        what = (
            f"holds more than tensors{f' ({held[1]})' if held else ''}, "
            f"and is not opened: that could run code"
        )
        return UserError(what, where=path, fix=ALONE)
    what = f"cannot be read as weights: it begins with {head[:12]!r}"
    return UserError(what, where=path, fix=f"give a safetensors file or a state dict; {ALONE}")
