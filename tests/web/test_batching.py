"""Many who ask at once: one batch, one answer each."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import galleries
import httpx
import pytest
import webs
from galleries import ENCODER
from webs import Site, png

from finetune.errors import UserError
from retrieval import maintenance
from retrieval.gallery import Gallery
from retrieval.web import api, batching
from retrieval.web.batching import Query, QueryBatcher


def test_a_thousand_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 uploads over real connections, 64 at a time: each gets its own picture, and few runs of
    the network serve all."""
    asked = webs.install(monkeypatch.setattr)
    photos = galleries.pictures(tmp_path / "photos", 300)
    index = tmp_path / "photos.index"
    maintenance.build([tmp_path / "photos"], index, ENCODER)
    # not in the gallery: these go through the network
    fresh = {i: png((i, 255 - i, 7)) for i in range(100)}
    with (
        Gallery(index) as gallery,
        QueryBatcher(gallery) as batcher,
        webs.running(api.create(batcher)) as base,
    ):
        expected = {
            i: batcher.ask(Query((("x", data),), k=2)).result().hits for i, data in fresh.items()
        }
        asked.contents.clear()
        runs: list[int] = []
        plain = Gallery.encode
        monkeypatch.setattr(
            Gallery,
            "encode",
            lambda self, source, *more: (runs.append(len(source)), plain(self, source, *more))[1],
        )

        async def one(client: httpx.AsyncClient, gate: asyncio.Semaphore, i: int) -> None:
            name = photos[i % 300].name
            data = fresh[i // 10] if i % 10 == 0 else photos[i % 300].read_bytes()
            async with gate:
                form = {"k": "2", "keep_self": "true"}
                answer = await client.post(
                    "/api/search", files={"files": (f"{i}.png", data)}, data=form
                )
            found = answer.json()
            assert (200, f"{i}.png", 2) == (
                answer.status_code,
                found["query"][0]["name"],
                len(found["results"]),
            )
            if i % 10 == 0:
                assert [(hit.id, hit.score) for hit in expected[i // 10]] == [
                    (hit["id"], hit["score"]) for hit in found["results"]
                ]
            else:
                assert (name, pytest.approx(1.0)) == (
                    found["results"][0]["path"],
                    found["results"][0]["score"],
                )

        async def everybody() -> None:
            gate = asyncio.Semaphore(64)
            async with httpx.AsyncClient(base_url=base, timeout=60, trust_env=False) as client:
                await asyncio.gather(*(one(client, gate, i) for i in range(1000)))

        asyncio.run(everybody())
    assert 100 == sum(runs) == len(asked.contents)
    assert len(runs) < 100


def test_waiting_queries_are_one_batch(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits while the batcher is busy is answered together, by one run of the network and one
    search a way of asking."""
    runs: list[int] = []
    searches: list[int] = []
    encode, search = Gallery.encode, Gallery.search
    monkeypatch.setattr(
        Gallery,
        "encode",
        lambda self, source, *more: (runs.append(len(source)), encode(self, source, *more))[1],
    )
    monkeypatch.setattr(
        Gallery,
        "search",
        lambda self, v, *more, **how: (searches.append(len(v)), search(self, v, *more, **how))[1],
    )
    started, busy = threading.Event(), threading.Event()
    held = site.batcher.call(lambda _: (started.set(), busy.wait(10))[1])
    assert started.wait(10)
    waiting = [site.batcher.ask(Query((("x", png((i, 0, 0))),), k=1 + i % 2)) for i in range(20)]
    busy.set()
    assert held.result()
    assert [1 + i % 2 for i in range(20)] == [len(one.result().hits) for one in waiting]
    assert {20} == {one.result().batch for one in waiting}
    assert ([20], [10, 10]) == (runs, searches)


def test_one_bad_query_spoils_no_other(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a batch fails as a whole, each is answered alone, and only the culprit gets the
    error."""
    encode = Gallery.encode

    def failing(self: Gallery, source: Any, *more: Any) -> Any:
        if any(source.read(i) == png((66, 6, 6)) for i in range(len(source))):
            raise UserError("the network gives NaN")
        return encode(self, source, *more)

    monkeypatch.setattr(Gallery, "encode", failing)
    busy = threading.Event()
    site.batcher.call(lambda _: busy.wait(10))
    waiting = [site.batcher.ask(Query((("x", png((i, 6, 6))),))) for i in (65, 66, 67)]
    missing = site.batcher.ask(Query(image=99))
    busy.set()
    assert 10 == len(waiting[0].result().hits) == len(waiting[2].result().hits)
    with pytest.raises(UserError, match="NaN"):
        waiting[1].result()
    with pytest.raises(batching.NoImage):
        missing.result()


def test_the_batcher_answers_before_it_closes(site: Site) -> None:
    """What waits at the end is answered; what comes later is refused."""
    batcher = QueryBatcher(site.gallery)
    waiting = [batcher.ask(Query(image=1, k=2)) for _ in range(100)]
    batcher.close()
    assert {2} == {len(one.result().hits) for one in waiting}
    with pytest.raises(UserError, match="closing"):
        batcher.ask(Query(image=1))


def test_who_leaves_is_not_answered(site: Site) -> None:
    """A query that was given up while it waited costs nothing."""
    busy = threading.Event()
    site.batcher.call(lambda _: busy.wait(10))
    left = site.batcher.ask(Query((("x", png((1, 1, 9))),)))
    assert left.cancel()
    busy.set()
    assert site.batcher.call(len).result()
    assert not any("IHDR" in text for text in site.asked.contents[12:])
