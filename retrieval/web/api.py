"""The routes of `retrieve serve`: the page, its pictures, and the API that the page and programs
use.

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
from pathlib import Path as File
from typing import Annotated

from fastapi import (
    APIRouter,
    FastAPI,
    Form,
    HTTPException,
    Query,
    Response,
    UploadFile,
)
from fastapi import File as Upload
from starlette.types import ASGIApp

from finetune.names import shown
from retrieval.gallery import Gallery
from retrieval.hits import Hit
from retrieval.web import batching, refusals, security
from retrieval.web.batching import BadPictures, NoImage, QueryBatcher
from retrieval.web.models import (
    MOST,
    About,
    Asked,
    Expand,
    Id,
    ImageList,
    K,
    KeepSelf,
    Result,
    Results,
    Threshold,
    item,
)
from retrieval.web.pictures import picture_routes
from retrieval.web.thumbnails import Thumbs

UPLOAD = 25_000_000  # bytes of a request
PICTURES = 16  # pictures of one query
READING = 32  # uploads held in memory at once

# of faults of a picture; the others: 422
STATUS = {"not an image": 415, "unsupported": 415, "too large": 413}

# ---------------------------------------------------------------------------------------------- app


def create(
    batcher: QueryBatcher,
    *,
    hosts: frozenset[str] | None = None,
    token: str | None = None,
    thumbs: Thumbs | None = None,
) -> ASGIApp:
    """The application behind its guard: see `security.guarded`."""
    name = hashlib.sha256(os.fsencode(batcher.gallery.folder.absolute())).hexdigest()[:8]
    return security.guarded(
        routed(batcher, thumbs or Thumbs()), hosts=hosts, token=token, name=name, limit=UPLOAD
    )


def routed(batcher: QueryBatcher, thumbs: Thumbs) -> FastAPI:
    """The routes alone, without a guard."""
    app = FastAPI(
        title="Regraft",
        summary="Find the images most similar to a query image.",
        docs_url=None,
        redoc_url=None,
        responses=refusals.EVERY,
    )
    app.include_router(page_routes())
    app.include_router(list_routes(batcher))
    app.include_router(search_routes(batcher))
    app.include_router(picture_routes(batcher.gallery, thumbs))
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


def list_routes(batcher: QueryBatcher) -> APIRouter:
    """What the gallery holds."""
    routes = APIRouter(prefix="/api", tags=["search"])
    order: dict[int, list[int]] = {}  # generation → ids; touched by the batcher's thread alone

    @routes.get("/info")
    async def info() -> About:
        """What is served, and what may be asked."""
        about = await asyncio.wrap_future(batcher.call(lambda gallery: gallery.info()))
        known = {
            key: about[key]
            for key in ("images", "paths", "unreadable", "network", "search", "warnings")
        }
        return About(
            name=shown(batcher.gallery.folder.name),
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
                images=[item(number, paths[number]) for number in chosen],
            )

        return await asyncio.wrap_future(batcher.call(some))

    return routes


def search_routes(batcher: QueryBatcher) -> APIRouter:
    """Searches in the gallery."""
    routes = APIRouter(prefix="/api", tags=["search"])
    reading = asyncio.Semaphore(READING)

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
            return await _ask(
                batcher, batching.Query(pictures, None, k, threshold, expand, keep_self)
            )

    @routes.get("/images/{number:int}/similar")
    async def similar(
        number: Id,
        k: K = 10,
        threshold: Threshold = None,
        keep_self: KeepSelf = False,
        expand: Expand = 0,
    ) -> Results:
        """The images most like one of the gallery."""
        return await _ask(batcher, batching.Query((), number, k, threshold, expand, keep_self))

    return routes


# ------------------------------------------------------------------------------------------ answers


async def _ask(batcher: QueryBatcher, query: batching.Query) -> Results:
    start = time.perf_counter()
    try:
        found = await asyncio.wrap_future(batcher.ask(query))
    except NoImage as error:
        raise HTTPException(404, str(error)) from error
    except BadPictures as error:
        raise HTTPException(STATUS.get(error.kind, 422), str(error)) from error
    if query.image is not None:
        asked = [Asked(name=shown(batcher.gallery.paths(query.image)[0]), id=query.image)]
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
        **item(hit.id, (hit.path, *hit.also)).model_dump(),
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
