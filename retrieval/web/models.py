"""What the API takes and gives: its values in words, which `/openapi.json` shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import Path, Query
from pydantic import BaseModel, Field

from finetune.names import shown

MOST = 500  # results of one query


class About(BaseModel):
    """What is served, and what may be asked."""

    name: str
    images: int
    paths: int = Field(description="files: several of the same bytes are one image")
    unreadable: int
    network: str
    search: str
    warnings: list[str]
    max_upload: int = Field(description="bytes of a request")
    max_pictures: int = Field(description="pictures of one query")
    max_k: int


class ImageItem(BaseModel):
    """One image of the gallery."""

    id: int
    path: str = Field(
        description=r"what cannot be printed is written as bytes, \xNN, and a backslash as \\"
    )
    also: list[str] = Field(description="further paths of the same bytes")


class ImageList(BaseModel):
    """A part of the gallery's images."""

    total: int
    offset: int
    images: list[ImageItem]


class ImageDetail(ImageItem):
    """One image and its file; `problem` says why the file cannot be shown."""

    digest: str = Field(description="SHA-256 of the bytes")
    format: str | None = None
    width: int | None = Field(None, description="pixels, as stored")
    height: int | None = None
    bytes: int | None = None
    problem: str | None = None


class Result(ImageItem):
    """An image of an answer."""

    score: float = Field(description="cosine: 1 is the same direction")
    same: bool = Field(description="it has the very bytes of the query, and comes first")
    missing: bool = Field(description="there is no file at `path` any more")
    changed: bool = Field(
        description="the file at `path` has another size or time than the gallery remembers"
    )
    missing_paths: list[str] = Field(description="of `path` and `also`")
    changed_paths: list[str] = Field(description="of `path` and `also`")


class Asked(BaseModel):
    """A picture of the query; `id` where the gallery has it."""

    name: str
    id: int | None


class Results(BaseModel):
    """An answer, best first."""

    query: list[Asked]
    results: list[Result]
    images: int = Field(description="images that were searched")
    seconds: float


Id = Annotated[int, Path(ge=0, lt=2**63)]
K = Annotated[int, Query(ge=1, le=MOST, description="results")]
Threshold = Annotated[float | None, Query(ge=-1, le=1, description="the least score")]
KeepSelf = Annotated[bool, Query(description="show the image's own path, too")]
Expand = Annotated[
    int,
    Query(
        ge=0, le=100, description="search again with the mean of the query and its first results"
    ),
]


def item(number: int, paths: Sequence[str]) -> ImageItem:
    return ImageItem(id=number, path=shown(paths[0]), also=list(map(shown, paths[1:])))
