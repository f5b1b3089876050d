"""A contact sheet: answers as one HTML page that holds its own thumbnails, so that it opens
anywhere, without network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO
from pathlib import Path

from PIL import Image

from finetune.data import decode
from finetune.names import shown
from retrieval.hits import Answer, Hit

SIDE = 192  # pixels of a thumbnail's longer side
QUALITY = 80

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem auto; max-width: 80rem;
  padding: 0 1rem; }
section { margin-bottom: 2.5rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .75rem; }
figure { margin: 0; padding: .5rem; border: 1px solid #8884; border-radius: .5rem; }
figure.query { border: 2px solid #2a7de1; }
.picture { height: 9rem; display: flex; align-items: center; justify-content: center; }
img { max-width: 100%; max-height: 9rem; border-radius: .25rem; }
figcaption { font-size: .8rem; overflow-wrap: anywhere; }
.score { font-variant-numeric: tabular-nums; font-weight: 600; }
.more { opacity: .7; }
.mark { display: inline-block; border: 1px solid; border-radius: 1rem; padding: 0 .5rem;
  margin: .15rem .25rem 0 0; }
"""


def page(answers: Sequence[Answer], root: Path, title: str) -> str:
    """The page of `answers`; hits are read below `root`, queries where their names say. What cannot
    be shown says so."""
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>"]
    parts.append(
        f"<meta name=viewport "
        f'content="width=device-width"><style>{STYLE}</style><h1>{escape(title)}</h1>'
    )
    for answer in answers:
        parts.append(f"<section><h2>{_name(answer.query)}</h2><div class=grid>")
        parts += [_figure(Path(name), name, "query", "") for name in answer.parts]
        for hit in answer.hits:
            more = _marks(hit, hit.path)
            more += "".join(
                f"<div class=more>= {_name(path)} {_marks(hit, path)}</div>" for path in hit.also
            )
            more += "".join(
                f"<div class=more>≈ {_name(path)} {_marks(hit, path)}</div>" for path in hit.similar
            )
            parts.append(
                _figure(
                    root / hit.path, hit.path, "", f"<div class=score>{hit.score:.3f}</div>", more
                )
            )
        parts.append("</div>")
        if not answer.hits:
            parts.append("<p>Nothing was found.</p>")
        parts.append("</section>")
    return "\n".join([*parts, "</html>\n"])


def _name(path: str) -> str:
    return escape(shown(path))


def _marks(hit: Hit, path: str) -> str:
    return "".join(f"<span class=mark>{word}</span>" for word in hit.marks(path))


def _figure(file: Path, name: str, kind: str, score: str, more: str = "") -> str:
    try:
        picture = (
            f'<img alt="{_name(name)}" src="data:image/jpeg;base64,{thumbnail(file.read_bytes())}">'
        )
    except (OSError, decode.DecodeError) as error:
        picture = f"<span>cannot be shown: {escape(_why(error))}</span>"
    return (
        f'<figure class="{kind}"><div class=picture>{picture}</div>'
        f"<figcaption>{score}<div>{_name(name)}</div>{more}</figcaption></figure>"
    )


def _why(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def thumbnail(data: bytes) -> str:
    """A JPEG of at most `SIDE` pixels per side, as base64 text. Raises `DecodeError`."""
    image = decode.decode(data, short_side=SIDE)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    out = BytesIO()
    image.save(out, "JPEG", quality=QUALITY)
    return base64.b64encode(out.getvalue()).decode()
