"""Finished and unfinished runs, listed and compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune import files
from finetune.errors import UserError
from finetune.names import shown
from finetune.run import CHECKPOINTS, MANIFEST, METRICS, STARTED, load_run

UNTESTED = ("folds/top1", "cv/top1", "choice/top1")  # the accuracy of a run without test images


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """One row a run in `folder`, by name. `status` is complete, unfinished, or what is wrong with
    it."""
    if not folder.is_dir():
        raise UserError("no such folder", where=folder, fix="give the folder that holds your runs")
    rows = []
    for path in sorted(folder.iterdir()):
        row: dict[str, Any] = {
            "run": shown(path.name),
            "status": "unfinished",
            "shipped": None,
            "test/top1": None,
            "seconds": None,
            "ended": None,
        }
        if (path / MANIFEST).exists():
            try:
                info = load_run(path)
                row |= {key: info.get(key) for key in ("status", "shipped", "seconds", "ended")}
                judged = files.read_json(path / METRICS) if METRICS in info["files"] else {}
                # A run without test images is judged on training images that it had not been fitted
                # on, if on any.
                row |= {
                    key: judged.get(key)
                    for key in ("test/top1", *UNTESTED)
                    if key == "test/top1" or key in judged
                }
            except UserError as error:
                row["status"] = str(error).splitlines()[0]
        elif not (path / CHECKPOINTS / STARTED).exists():
            continue
        rows.append(row)
    return rows


def compare(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """One row a run: what it ships, its metrics, and each key of `recipe` in `run.json` in which
    the runs differ."""
    infos = [load_run(path) for path in paths]
    recipes = [_flat(info.get("recipe", {})) for info in infos]
    differing = sorted(
        {
            key
            for one in recipes
            for key in one
            if len({json.dumps(other.get(key)) for other in recipes}) > 1
        }
    )
    rows = []
    for path, info, settings in zip(paths, infos, recipes, strict=True):
        judged = files.read_json(path / METRICS) if METRICS in info["files"] else {}
        rows.append(
            {
                "run": shown(path),
                "shipped": info.get("shipped"),
                **judged,
                "seconds": info.get("seconds"),
            }
            | {key: settings.get(key) for key in differing}
        )
    return rows


def rows_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows for a person: a line each; where they have many columns, a column each."""
    if not rows:
        return "no runs are here"
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    if len(names) > 7:
        cells = [list(column) for column in zip(*cells, strict=True)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _cell(value: object) -> str:
    if isinstance(value, Mapping) and "difference" in value:  # two classifiers on the same images
        return _cell(value["difference"])
    if isinstance(value, Mapping) and {"value", "low", "high"} <= set(value):
        return f"{value['value']:.3f} ({value['low']:.3f}–{value['high']:.3f})"
    if isinstance(value, float):
        return f"{value:.4g}"
    return (
        "–"
        if value is None
        else value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False)
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return flat
