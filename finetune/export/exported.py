"""`finetune export`: a finished run as a folder for other programs, compared with the run before it
is there."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from finetune import files
from finetune.check import worst
from finetune.combining import members
from finetune.combining.members import Member
from finetune.data import images as image_sets
from finetune.data.images import ImageSet
from finetune.errors import UserError
from finetune.evaluation import ensemble
from finetune.export import agreement, card, formats, graph, timm_folder
from finetune.export.agreement import Agreement, Asked
from finetune.export.graph import Part
from finetune.names import shown
from finetune.progress import Bar, Say, no_bar, quiet

ABOUT = "export.json"
FORMAT = 1


def export(
    path: Path,
    to: str,
    out: Path | None = None,
    *,
    data: str | None = None,
    most: int = 200,
    force: bool = False,
    say: Say = quiet,
    bar: Bar = no_bar,
) -> dict[str, Any]:
    """Write the run in `path` as `to` (one of `formats.FORMATS`) into the folder `out`.

    The folder is there once its files, opened by their own program, say what the run says of up to
    `most` images: those of the run, its test images first, or those of `data`. Raises `UserError`
    where a library is missing, the format has no room for the run, the images are gone, or the
    answers differ. Returns what export.json holds.
    """
    formats.check_installed(to)
    (member,) = members.open_members([path], fewest=1)
    target = out or member.path.with_name(f"{member.path.name}-{to}")
    _check_free(target, force)
    model = member.open()
    if to == "timm":
        timm_folder.plain(model, path)
    images = _images(member, data, most)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with files.disk_errors(target):
            about = _fill(work, member, model, to, images, say, bar)
            work.chmod(0o755)
            if target.exists():
                shutil.rmtree(target)
            work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {"folder": shown(target), **about}


def _fill(
    work: Path,
    member: Member,
    model: ensemble.AnyModel,
    to: str,
    images: ImageSet,
    say: Say,
    bar: Bar,
) -> dict[str, Any]:
    rows, asked, program = _written(work, member, model, to, say)
    with bar("compare") as progress:
        own = agreement.answers(images, asked, progress)
    found = [_against(member, images, own, precision) for precision in _precisions(model)]
    checks = [one.check() for one in found]
    if worst(checks) == "fail":
        raise UserError(
            f"{program} does not say what the run says: {checks[0].value}",
            where=to,
            fix="nothing was written; try another format: " + ", ".join(formats.FORMATS),
        )
    about = {
        "format": FORMAT,
        "to": to,
        "run": member.about["digest"],
        "shipped": member.about["shipped"],
        "classes": list(model.classes),
        "input": {"name": formats.IMAGE, "layout": "NCHW", "type": "float32"},
        "output": "logits" if to == "timm" else "probabilities",
        "parts": rows,
        "compared": [{"program": program, **one.to_json()} for one in found],
        "checks": [check.to_json() for check in checks],
        "versions": member.about["versions"],
    }
    files.write_json(work / ABOUT, about)
    card.write(work, member, model, about)
    return about


def _written(
    work: Path, member: Member, model: ensemble.AnyModel, to: str, say: Say
) -> tuple[list[dict[str, Any]], list[Asked], str]:
    """The model written, and opened again by the program that it is for."""
    if to == "timm":
        own, head = timm_folder.plain(model, member.path)
        say(f"write      {own.network.name} as timm has it")
        timm_folder.write(own, head, work)
        program, ask = timm_folder.opened(work)
        pre = own.network.preprocess
        row = {"file": "model.safetensors", "weight": 1.0, **dataclasses.asdict(pre)}
        return [row], [Asked(pre, 1.0, ask)], program
    rows, asked, program = [], [], ""
    parts = graph.parts(model)
    for part in parts:
        say(f"write      {part.name} as {to}: {part.preprocess.size} × {part.preprocess.size}")
        folder = work if len(parts) == 1 else work / part.name
        folder.mkdir(exist_ok=True)
        file = folder / formats.FILES[to]
        formats.write(part, file, to, _inside(member, model, part))
        program, ask = formats.opened(file, to)
        name = file.relative_to(work).as_posix()
        rows.append({"file": name, "weight": part.weight, **dataclasses.asdict(part.preprocess)})
        asked.append(Asked(part.preprocess, part.weight, ask))
    return rows, asked, program


def _inside(member: Member, model: ensemble.AnyModel, part: Part) -> dict[str, Any]:
    """What each file holds besides its graph."""
    return {
        "labels": list(model.classes),
        "preprocess": dataclasses.asdict(part.preprocess),
        "weight": part.weight,
        "run": member.about["digest"],
    }


def _against(member: Member, images: ImageSet, own: Any, precision: str) -> Agreement:
    with ensemble.load(member.path, precision=precision) as model:
        said = model.predict(images).probabilities
    return agreement.compare(said.astype(np.float64), own, precision)


def _precisions(model: ensemble.AnyModel) -> list[str]:
    """float32, in which the file computes, and what the run itself uses where that is another."""
    named = model.members.values() if isinstance(model, ensemble.Ensemble) else [model]
    return ["float32", *sorted({one.precision for one in named} - {"float32", "auto"})]


def _images(member: Member, data: str | None, most: int) -> ImageSet:
    """At most `most` readable images: of `data`, or of the run with its test images first."""
    if data is not None:
        source = image_sets.load_unlabelled(data)
        order = np.arange(len(source))
    else:
        source, _ = members.scanned(member)
        tested = set(member.test.paths if member.test else ())
        late = np.array([shown(path) not in tested for path in source.paths])
        order = np.argsort(late, kind="stable")
        order = order[: int((~late).sum()) or None]
    step = max(1, -(-len(order) // most))
    chosen = source.subset(order[::step])
    bad = image_sets.unreadable(chosen)
    if len(bad) == len(chosen):
        fix = "give a folder of images with --data"
        raise UserError("no image could be read to compare on", where=data or member.path, fix=fix)
    return chosen.subset([i for i in range(len(chosen)) if i not in bad]) if bad else chosen


def _check_free(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError("is a file", where=target, fix="give another folder with -o")
    if not any(target.iterdir()):
        return
    if not (target / ABOUT).exists():
        what = "is a folder that no export wrote"
        raise UserError(what, where=target, fix="give another folder with -o")
    if not force:
        raise UserError(
            "an export is here already", where=target, fix="--force replaces it; or -o FOLDER"
        )


def text(result: dict[str, Any]) -> str:
    """The same for a person."""
    count = len(result["parts"])
    opened = "the file" if count == 1 else f"{count} files"
    lines = [f"compared   {result['compared'][0]['program']} opened {opened}"]
    for check in result["checks"]:
        lines.append(f"{check['status']:<10} {check['name']}: {check['value']}")
        lines += [f"           → {check['action']}"] if check["action"] else []
    return "\n".join([*lines, f"export     {result['folder']}/README.md"])
