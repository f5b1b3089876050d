"""Searchable galleries of images: built, opened, asked, kept up to date.

import retrieval
retrieval.build("photos/", "photos.gallery")
with retrieval.open("photos.gallery") as gallery:
    answers, faults = gallery.query("cat.jpg", k=10)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.errors import UserError

if TYPE_CHECKING:
    from retrieval.gallery import Gallery
    from retrieval.hits import Answer, Hit
    from retrieval.public import build, open  # noqa: A004 — as `gzip.open` is called
    from retrieval.storage.commit import ChangeSummary

__all__ = ["Answer", "ChangeSummary", "Gallery", "Hit", "UserError", "build", "open"]


def __getattr__(name: str) -> Any:
    # Imported at first use, so that `import retrieval` and `retrieve --help` load no heavy library.
    import importlib

    homes = {
        "build": "public",
        "open": "public",
        "Gallery": "gallery",
        "Answer": "hits",
        "Hit": "hits",
        "ChangeSummary": "storage.commit",
    }
    if name in homes:
        return getattr(importlib.import_module(f"retrieval.{homes[name]}"), name)
    raise AttributeError(f"module 'retrieval' has no attribute {name!r}")
