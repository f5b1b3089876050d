"""The routes of `retrieve serve`: the page, its pictures, and the API that the page and programs
use.

Pictures are served by id alone, and only while a file still has the very bytes that the gallery
knows: whatever was put in the place of a file since, or a link to elsewhere, does not get out.
Every error is JSON: `{"detail": "…"}`.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.resources
import itertools
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path as File
from typing import Annotated

from fastapi import (
    APIRouter,
    FastAPI,
    Form,
    HTTPException,
    Path,
    Query,
    Request,
    Response,
    UploadFile,
)
from fastapi import File as Upload
from pydantic import BaseModel, Field
from starlette.types import ASGIApp

from finetune.data import decode
from finetune.names import shown
from retrieval.gallery import Gallery
from retrieval.hits import Hit
from retrieval.web import batching, refusals, security
from retrieval.web.batching import BadPictures, Desk, NoImage
from retrieval.web.thumbnails import Thumbs

UPLOAD = 25_000_000  # bytes of a request
PICTURES = 16  # pictures of one query
MOST = 500  # results of one query
READING = 32  # uploads held in memory at once
SHOWN = 1_000_000_000  # bytes of a file that is still shown

TYPES = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "GIF": "image/gif",
    "WebP": "image/webp",
    "TIFF": "image/tiff",
    "BMP": "image/bmp",
    "PNM": "image/x-portable-anymap",
    "JPEG 2000": "image/jp2",
    "AVIF": "image/avif",
}
# of faults of a picture; the others: 422
STATUS = {"not an image": 415, "unsupported": 415, "too large": 413}

# ------------------------------------------------------------------------------------------- models


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
        description="the file at `path` has another size or time than the index remembers"
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


# ---------------------------------------------------------------------------------------------- app


def create(
    desk: Desk,
    *,
    hosts: frozenset[str] | None = None,
    token: str | None = None,
    thumbs: Thumbs | None = None,
) -> ASGIApp:
    """The application behind its guard: see `guard.guarded`."""
    name = hashlib.sha256(os.fsencode(desk.gallery.folder.absolute())).hexdigest()[:8]
    return security.guarded(
        routed(desk, thumbs or Thumbs()), hosts=hosts, token=token, name=name, limit=UPLOAD
    )


def routed(desk: Desk, thumbs: Thumbs) -> FastAPI:
    """The routes alone, without a guard."""
    app = FastAPI(
        title="Regraft",
        summary="Put in an image, get the images like it.",
        docs_url=None,
        redoc_url=None,
        responses=refusals.EVERY,
    )
    app.include_router(page_routes())
    app.include_router(search_routes(desk))
    app.include_router(picture_routes(desk.gallery, thumbs))
    refusals.install(app)
    return app


def page_routes() -> APIRouter:
    """The page itself: three files, and nothing from elsewhere."""
    routes = APIRouter()

    def serve(path: str, name: str, kind: str) -> None:
        data = importlib.resources.files("retrieval.web").joinpath(name).read_bytes()

        @routes.get(path, include_in_schema=False)
        def send() -> Response:
            return Response(
                data, media_type=f"{kind}; charset=utf-8", headers={"cache-control": "no-cache"}
            )

    serve("/", "page.html", "text/html")
    serve("/page.css", "page.css", "text/css")
    serve("/page.js", "page.js", "text/javascript")
    return routes


def search_routes(desk: Desk) -> APIRouter:
    """What the gallery holds, and searches in it."""
    routes = APIRouter(prefix="/api", tags=["search"])
    reading = asyncio.Semaphore(READING)
    order: dict[int, list[int]] = {}  # generation → ids; touched by the desk's thread alone

    @routes.get("/info")
    async def info() -> About:
        """What is served, and what may be asked."""
        about = await asyncio.wrap_future(desk.call(lambda gallery: gallery.info()))
        known = {
            key: about[key]
            for key in ("images", "paths", "unreadable", "network", "search", "warnings")
        }
        return About(
            name=shown(desk.gallery.folder.name),
            max_upload=UPLOAD,
            max_pictures=PICTURES,
            max_k=MOST,
            **known,
        )

    @routes.get("/images")
    async def images(
        offset: Annotated[int, Query(ge=0, lt=2**63)] = 0,
        limit: Annotated[int, Query(ge=1, le=MOST)] = 50,
        spread: Annotated[
            bool, Query(description="from all over the gallery, instead of in the order they came")
        ] = False,
    ) -> ImageList:
        """Images of the gallery, part by part."""

        def some(gallery: Gallery) -> ImageList:
            now = gallery.now.generation
            if now not in order:
                order.clear()
                order[now] = gallery.ids()
            ids = order[now]
            at = range(offset, min(offset + limit, len(ids)))
            chosen = [ids[spread_out(i, len(ids)) if spread else i] for i in at]
            paths = gallery.now.paths(chosen)
            return ImageList(
                total=len(ids),
                offset=offset,
                images=[_item(number, paths[number]) for number in chosen],
            )

        return await asyncio.wrap_future(desk.call(some))

    @routes.post("/search")
    async def search(
        files: Annotated[
            list[UploadFile],
            Upload(description="one picture, or several that are one query: their mean"),
        ],
        k: Annotated[int, Form(ge=1, le=MOST, description="results")] = 10,
        threshold: Annotated[float | None, Form(ge=-1, le=1, description="the least score")] = None,
        keep_self: Annotated[
            bool, Form(description="of no effect: what is sent has no path that could be left out")
        ] = False,
        expand: Annotated[
            int, Form(ge=0, le=100, description="search again with the mean of so many results")
        ] = 0,
    ) -> Results:
        """The images most like pictures that are sent."""
        if len(files) > PICTURES:
            raise HTTPException(
                422, f"{len(files)} pictures are too many: at most {PICTURES} are one query"
            )
        async with reading:
            pictures = tuple([(_name(file.filename), await file.read()) for file in files])
            return await _ask(desk, batching.Query(pictures, None, k, threshold, expand, keep_self))

    @routes.get("/images/{number:int}/similar")
    async def similar(
        number: Id,
        k: K = 10,
        threshold: Threshold = None,
        keep_self: KeepSelf = False,
        expand: Expand = 0,
    ) -> Results:
        """The images most like one of the gallery."""
        return await _ask(desk, batching.Query((), number, k, threshold, expand, keep_self))

    return routes


def picture_routes(gallery: Gallery, thumbs: Thumbs) -> APIRouter:
    """Single images, and their files."""
    routes = APIRouter(tags=["images"])

    @routes.get("/api/images/{number:int}")
    def detail(number: Id) -> ImageDetail:
        """One image of the gallery, and what its file is."""
        digest, paths = _known(gallery, number)
        about = ImageDetail(**_item(number, paths).model_dump(), digest=digest)
        try:
            data = original(gallery, number)
            about.bytes, about.format = len(data), decode.format_of(data)
            about.width, about.height = decode.size(data)
        except HTTPException as error:
            about.problem = error.detail
        except decode.DecodeError as error:
            about.problem = f"{shown(paths[0])}: {error}"
        return about

    @routes.get("/thumbs/{number:int}", response_class=Response)
    def thumb(
        number: Id,
        request: Request,
        size: Annotated[
            str, Query(pattern="^(small|large)$", description="small: 320 pixels; large: 1600")
        ] = "small",
    ) -> Response:
        """An image made small, as JPEG or PNG."""
        digest, paths = _known(gallery, number)
        if gallery.file(number) is None:
            raise _gone(paths[0])
        tag = f'"{digest[:32]}-{size}"'
        if tag in request.headers.get("if-none-match", ""):
            return Response(
                status_code=304, headers={"etag": tag, "cache-control": "private, no-cache"}
            )
        try:
            data = thumbs.get(digest, size, lambda: original(gallery, number))
        except decode.DecodeError as error:
            raise HTTPException(422, f"{shown(paths[0])}: {error}") from error
        return _picture(data, {"etag": tag, "cache-control": "private, no-cache"})

    @routes.get("/files/{number:int}", response_class=Response)
    def file(number: Id) -> Response:
        """The file of an image, as it is."""
        return _picture(
            original(gallery, number), {"content-security-policy": "default-src 'none'; sandbox"}
        )

    return routes


# ------------------------------------------------------------------------------------------ answers


def original(gallery: Gallery, number: int) -> bytes:
    """The bytes of an image, from the first of its files that still has exactly them; else a 404 in
    words."""
    digest, paths = _known(gallery, number)
    root, found = gallery.root, None
    for path in paths:
        file = root / path
        try:
            if not file.is_file() or file.stat().st_size > SHOWN:
                continue
            data = file.read_bytes()
        except OSError:
            continue
        if hashlib.sha256(data).hexdigest() == digest:
            return data
        found = found or path
    if found is None:
        raise _gone(paths[0])
    raise HTTPException(
        404,
        f"{shown(found)} was changed since the index was made: "
        f"`retrieve sync` brings the index up to date",
    )


def _known(gallery: Gallery, number: int) -> tuple[str, tuple[str, ...]]:
    digest, paths = gallery.digest(number), gallery.paths(number)
    if digest is None or not paths:
        raise HTTPException(404, f"the gallery has no image {number}")
    return digest, paths


def _gone(path: str) -> HTTPException:
    return HTTPException(
        404, f"{shown(path)} is not there any more: `retrieve sync` brings the index up to date"
    )


def _picture(data: bytes, headers: dict[str, str]) -> Response:
    """The bytes decide the type, never the name: nothing that a browser would run gets out."""
    try:
        kind = TYPES[decode.format_of(data)]
    except decode.DecodeError as error:
        raise HTTPException(404, f"this is no picture any more: {error}") from error
    return Response(data, media_type=kind, headers=headers)


def _item(number: int, paths: Sequence[str]) -> ImageItem:
    return ImageItem(id=number, path=shown(paths[0]), also=list(map(shown, paths[1:])))


async def _ask(desk: Desk, query: batching.Query) -> Results:
    start = time.perf_counter()
    try:
        found = await asyncio.wrap_future(desk.ask(query))
    except NoImage as error:
        raise HTTPException(404, str(error)) from error
    except BadPictures as error:
        raise HTTPException(STATUS.get(error.kind, 422), str(error)) from error
    if query.image is not None:
        asked = [Asked(name=shown(desk.gallery.paths(query.image)[0]), id=query.image)]
    else:
        asked = [
            Asked(name=name, id=number)
            for (name, _), number in zip(query.pictures, found.known, strict=True)
        ]
    results = [_result(hit) for hit in found.hits]
    return Results(
        query=asked, results=results, images=found.images, seconds=time.perf_counter() - start
    )


def _result(hit: Hit) -> Result:
    return Result(
        **_item(hit.id, (hit.path, *hit.also)).model_dump(),
        score=hit.score,
        same=hit.same,
        missing=hit.path in hit.missing,
        changed=hit.path in hit.changed,
        missing_paths=[shown(path) for path in hit.missing],
        changed_paths=[shown(path) for path in hit.changed],
    )


def spread_out(i: int, n: int) -> int:
    """Where the i-th of n is taken from, so that the first few are from all over and none comes
    twice."""
    step = next(s for s in itertools.count(max(1, round(n * 0.618))) if math.gcd(s, n) == 1)
    return i * step % n


def _name(given: str | None) -> str:
    name = File((given or "").replace("\\", "/")).name
    return "".join(letter for letter in name if letter.isprintable())[:120] or "picture"
