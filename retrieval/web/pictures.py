"""Single images of the gallery, and their files.

Pictures are served by id alone, and only while a file still has the very bytes that the gallery
knows: whatever was put in the place of a file since, or a link to elsewhere, does not get out.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request, Response

from finetune.data import decode
from finetune.names import shown
from retrieval.gallery import Gallery
from retrieval.web.models import Id, ImageDetail, item
from retrieval.web.thumbnails import Thumbs

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


def picture_routes(gallery: Gallery, thumbs: Thumbs) -> APIRouter:
    """Single images, and their files."""
    routes = APIRouter(tags=["images"])

    @routes.get("/api/images/{number:int}")
    def detail(number: Id) -> ImageDetail:
        """One image of the gallery, and what its file is."""
        digest, paths = _known(gallery, number)
        about = ImageDetail(**item(number, paths).model_dump(), digest=digest)
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
        f"{shown(found)} was changed since the gallery was made: "
        f"`retrieve sync` brings the gallery up to date",
    )


def _known(gallery: Gallery, number: int) -> tuple[str, tuple[str, ...]]:
    digest, paths = gallery.digest(number), gallery.paths(number)
    if digest is None or not paths:
        raise HTTPException(404, f"the gallery has no image {number}")
    return digest, paths


def _gone(path: str) -> HTTPException:
    return HTTPException(
        404, f"{shown(path)} is not there any more: `retrieve sync` brings the gallery up to date"
    )


def _picture(data: bytes, headers: dict[str, str]) -> Response:
    """The bytes decide the type, never the name: nothing that a browser would run gets out."""
    try:
        kind = TYPES[decode.format_of(data)]
    except decode.DecodeError as error:
        raise HTTPException(404, f"this is no picture any more: {error}") from error
    return Response(data, media_type=kind, headers=headers)
