"""Galleries that are served: real pictures, the network of `galleries`, and requests without a
server, or to a real one."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import galleries
import httpx
from galleries import ENCODER
from PIL import Image

from finetune.data import decode
from finetune.data.images import Fault
from finetune.features import extraction
from retrieval import maintenance
from retrieval.gallery import Gallery
from retrieval.web import api
from retrieval.web.app import LOOPBACK
from retrieval.web.batching import QueryBatcher

BASE = "http://127.0.0.1:8000"
# a slash cannot be in a name, its lookalike can
EVIL = "<script>alert(1)</script>.png".replace("/", "∕")
HANDLER = '"><img src=x onerror=alert(1)>.png'


def install(patch: Callable[[Any, str, Any], None]) -> galleries.Asked:
    """The network of `galleries`, for files that are decoded first, as by the real one."""
    asked = galleries.install(patch)
    plain = extraction.stream

    def stream(
        source: Any, positions: Any, network: Any, opened: Any, faults: dict[int, Fault], **how: Any
    ) -> Any:
        good = []
        for i in positions:
            try:
                decode.decode(source.read(i))
                good.append(i)
            except decode.DecodeError as error:
                faults[i] = Fault(source.paths[i], error.kind, error.detail)
        return plain(source, good, network, opened, faults, **how)

    patch(extraction, "stream", stream)
    return asked


def make(folder: Path, count: int = 12) -> Path:
    """An index of `count` pictures in `folder/photos`: one of them twice, two with names that would
    be markup."""
    made = galleries.pictures(folder / "photos", count)
    (folder / "photos" / "more").mkdir()
    (folder / "photos" / "more" / "copy.png").write_bytes(made[0].read_bytes())
    made[1].rename(folder / "photos" / EVIL)
    made[2].rename(folder / "photos" / "more" / HANDLER)
    maintenance.build([folder / "photos"], folder / "photos.index", ENCODER)
    return folder / "photos.index"


def ask(app: Any, method: str, url: str, *, base: str = BASE, **how: Any) -> httpx.Response:
    """One request to an application, without a server."""

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=base) as client:
            return await client.request(method, url, **how)

    return asyncio.run(run())


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """The address of a real server of `app`, on a free port of this machine."""
    import uvicorn

    from retrieval.web.app import listen

    with listen("127.0.0.1", 0) as server:
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=1,
            ws="none",
            lifespan="off",
        )
        uvicorn_server = uvicorn.Server(config)
        thread = threading.Thread(
            target=uvicorn_server.run, kwargs={"sockets": [server]}, daemon=True
        )
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            uvicorn_server.should_exit = True
            thread.join(10)


@dataclass(frozen=True)
class Site:
    """A gallery that is served to requests without a server."""

    index: Path
    gallery: Gallery
    batcher: QueryBatcher
    app: Any
    asked: galleries.Asked

    @property
    def photos(self) -> Path:
        return self.index.parent / "photos"

    def get(self, url: str, **how: Any) -> httpx.Response:
        return ask(self.app, "GET", url, **how)

    def search(self, *pictures: tuple[str, bytes], **fields: Any) -> httpx.Response:
        return ask(
            self.app, "POST", "/api/search", files=[("files", one) for one in pictures], data=fields
        )

    def id_of(self, path: str) -> int:
        found = self.get("/api/images?limit=500").json()["images"]
        return next(image["id"] for image in found if path in (image["path"], *image["also"]))


def served(folder: Path, patch: Callable[[Any, str, Any], None]) -> Iterator[Site]:
    """A gallery in `folder`, open and served, for as long as the iterator is held."""
    asked = install(patch)
    index = make(folder)
    with Gallery(index) as gallery, QueryBatcher(gallery) as batcher:
        yield Site(index, gallery, batcher, api.create(batcher, hosts=LOOPBACK), asked)


def png(colour: tuple[int, int, int], side: int = 20) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(out, "PNG")
    return out.getvalue()


def locked(site: Site, token: str = "open sesame") -> Any:
    return api.create(site.batcher, token=token)
