"""What a gallery holds and how it was made: as JSON, and in a few lines for a person."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from finetune.names import from_database, shown
from retrieval.encoder import frame_words, run_digest
from retrieval.storage.segments import Snapshot

NO_IMAGES = "this gallery holds no images"
FILL = "`retrieve add` puts some in, and `retrieve sync` those that lie in its folders"


def warnings(now: Snapshot) -> tuple[str, ...]:
    """What a person should know before trusting an answer: that there is no image, a run that
    was trained again."""
    empty = () if len(now) else (f"{NO_IMAGES}: {FILL}",)
    run = now.meta["manifest"].get("run")
    path = Path(run["path"]) if run else Path()
    if run and (path / "run.json").is_file() and run_digest(path) != run["digest"]:
        stale = (
            f"stale: the run {shown(path)} was trained again after this "
            f"gallery was built; build it again with --force"
        )
        return (*empty, stale)
    return empty


def about(now: Snapshot, root: Path) -> dict[str, Any]:
    """What the gallery holds and how it was made, as JSON."""
    index, manifest = now.meta.get("search"), now.meta["manifest"]
    counts = {
        name: now.db.execute(f"select count(*) from {name}").fetchone()[0]
        for name in ("path", "fault")
    }
    (size,) = now.db.execute("select coalesce(sum(bytes), 0) from file").fetchone()
    return {
        "images": len(now),
        "paths": counts["path"],
        "unreadable": counts["fault"],
        "root": shown(root),
        "folders": [
            shown(from_database(path))
            for (path,) in now.db.execute("select path from source order by path")
        ],
        "network": f"{manifest['networks'][0]['name']}: {manifest['networks'][0]['source']}",
        "frame": frame_words(manifest),
        "width": manifest["width"],
        "vector": manifest["vector"],
        "run": {**manifest["run"], "path": shown(manifest["run"]["path"])}
        if manifest.get("run")
        else None,
        "search": index["words"] if index else "exact",
        "search rows": index["rows"] if index else None,
        "segments": len(now.segments),
        "removed rows": int(np.count_nonzero(now.dead)),
        "bytes": size,
        "generation": now.generation,
        "created": manifest["created"],
        "versions": manifest["versions"],
        "warnings": list(warnings(now)),
    }


def to_text(about: dict[str, Any]) -> str:
    """What `about` says, for a person: a few lines."""
    vector, run, versions = about["vector"], about["run"], about["versions"]
    files = f"{about['paths']:,} files" + (
        f", {about['unreadable']:,} unreadable ones left out" * bool(about["unreadable"])
    )
    places = "" if about["folders"] in ([], ["."]) else f": {', '.join(about['folders'])}"
    views = "".join(
        f", {name} {', '.join(map(str, vector[name]))}"
        for name in ("scales", "views")
        if len(vector[name]) > 1
    )
    waste = f" and {about['removed rows']:,} removed rows" * bool(about["removed rows"])
    later = f"; last changed in generation {about['generation']}" * (about["generation"] > 1)
    lines = {
        "images": f"{about['images']:,} in {files}",
        "folder": f"{about['root']}{places}",
        "vectors": f"{about['width']} numbers from "
        f"{' + '.join(vector['taps'])}{views}{', whitened' * bool(vector['whitening'])}",
        "network": f"{about['network']}, by {vector['engine']} in {vector['precision']}",
        "run": run["path"] if run else "",
        "search": about["search"]
        + (
            f" ({about['search rows']:,} rows)"
            if about["search rows"]
            else ": every vector is compared"
        ),
        "size": f"{about['bytes'] / 1e6:,.1f} MB in {about['segments']} "
        f"segment{'s' * (about['segments'] != 1)}{waste}",
        "made": f"{about['created']} by Regraft {versions.get('regraft', '?')}{later}",
    }
    return "\n".join(f"  {key:<9}{value}" for key, value in lines.items() if value)
