"""`retrieve serve`: the API, what is served, and the command."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import odd
import pytest
from children import HEARS_CTRL_C
from PIL import Image
from webs import Site, ask, locked, png

from finetune import files, names
from retrieval import maintenance
from retrieval.gallery import Gallery
from retrieval.web import api, security
from retrieval.web.thumbnails import Thumbs

# ---------------------------------------------------------------------------------------- searching


def test_info(site: Site) -> None:
    """The page learns what is served, and what may be sent."""
    about = site.get("/api/info").json()
    assert ("photos.index", 12, 13, 0) == tuple(
        about[key] for key in ("name", "images", "paths", "unreadable")
    )
    assert (api.UPLOAD, api.PICTURES, api.MOST) == (
        about["max_upload"],
        about["max_pictures"],
        about["max_k"],
    )


def test_an_upload_of_a_known_picture(site: Site) -> None:
    """It is known by its bytes: the files that have them come first, and are marked."""
    data = (site.photos / "0000.png").read_bytes()
    for how in ({}, {"threshold": 0.99}, {"keep_self": "true"}):
        found = site.search(("x.png", data), k=3, **how).json()
        assert [{"name": "x.png", "id": site.id_of("0000.png")}] == found["query"]
        best = found["results"][0]
        assert ("0000.png", ["more/copy.png"], True, 1.0) == (
            best["path"],
            best["also"],
            best["same"],
            best["score"],
        )
        assert not any(one["same"] for one in found["results"][1:])
    assert 12 == found["images"]


def test_an_upload_answers_as_the_library_does(site: Site, tmp_path: Path) -> None:
    """Scores, order and further paths are those of `Gallery.query`, also with a threshold and an
    expansion."""
    from finetune.data import images

    (tmp_path / "new.png").write_bytes(png((1, 2, 3)))
    for how in ({"k": 5}, {"k": 12, "threshold": 0.0}, {"k": 4, "expand": 2}):
        (expected,), _ = site.gallery.query(images.load_unlabelled(tmp_path / "new.png"), **how)
        found = site.search(("new.png", png((1, 2, 3))), **how).json()
        assert [None] == [one["id"] for one in found["query"]]
        assert [(hit.id, hit.path, hit.score, list(hit.also)) for hit in expected.hits] == [
            (hit["id"], hit["path"], pytest.approx(hit["score"]), hit["also"])
            for hit in found["results"]
        ]


def test_several_pictures_are_one_query(site: Site) -> None:
    """They are averaged, as the library does it; their copies in the gallery come first."""
    from finetune.data import images

    chosen = [site.photos / name for name in ("0005.png", "0006.png")]
    (expected,), _ = site.gallery.query(
        images.load_unlabelled(chosen), 12, together=True, keep_self=True
    )
    found = site.search(*((path.name, path.read_bytes()) for path in chosen), k=12).json()
    assert (2, 12, [True, True, False]) == (
        len(found["query"]),
        len(found["results"]),
        [r["same"] for r in found["results"][:3]],
    )
    assert [(hit.id, pytest.approx(hit.score)) for hit in expected.hits] == [
        (hit["id"], hit["score"]) for hit in found["results"]
    ]


def test_similar_to_an_image(site: Site) -> None:
    """An image of the gallery is a query by its id; the network is not asked."""
    number = site.id_of("0007.png")
    before = len(site.asked.contents)
    found = site.get(f"/api/images/{number}/similar?k=50").json()
    assert (11, number) == (len(found["results"]), found["query"][0]["id"])
    assert (
        "0007.png"
        == site.get(f"/api/images/{number}/similar?k=1&keep_self=true").json()["results"][0]["path"]
    )
    least = found["results"][2]["score"]
    assert 3 == len(
        site.get(f"/api/images/{number}/similar?k=50&threshold={least}").json()["results"]
    )
    assert before == len(site.asked.contents)
    double = site.id_of("0000.png")
    first = site.get(f"/api/images/{double}/similar?k=5").json()["results"][0]
    assert (double, "more/copy.png", [], True) == (
        first["id"],
        first["path"],
        first["also"],
        first["same"],
    )


def test_files_that_went_are_marked(site: Site) -> None:
    """A result says where its file is missing or was changed since, and for which of its paths."""
    (site.photos / "0005.png").unlink()
    (site.photos / "0000.png").unlink()
    with (site.photos / "0006.png").open("ab") as file:
        file.write(b"more")
    found = {
        one["path"]: one for one in site.search(("x.png", png((1, 2, 3))), k=12).json()["results"]
    }
    marks = {
        path: (one["missing"], one["changed"], one["missing_paths"], one["changed_paths"])
        for path, one in found.items()
    }
    assert (True, False, ["0005.png"], []) == marks["0005.png"]
    assert (True, ["more/copy.png"], ["0000.png"]) == (
        marks["0000.png"][0],
        found["0000.png"]["also"],
        marks["0000.png"][2],
    )
    assert (False, True, [], ["0006.png"]) == marks["0006.png"]
    assert (False, False, [], []) == marks["0007.png"]


def test_browsing(site: Site) -> None:
    """All images come part by part, each once, also spread over the gallery."""
    for how in ("", "&spread=true"):
        parts = [site.get(f"/api/images?offset={at}&limit=5{how}").json() for at in (0, 5, 10, 15)]
        assert [12, 12, 12, 12] == [part["total"] for part in parts]
        ids = [image["id"] for part in parts for image in part["images"]]
        assert (12, 12) == (len(ids), len(set(ids)))
    assert ["more/copy.png"] == next(
        i["also"] for part in parts for i in part["images"] if i["path"] == "0000.png"
    )


@pytest.mark.parametrize("n", [1, 2, 7, 36, 1000])
def test_spread_out_is_a_permutation(n: int) -> None:
    """Every image has its place, and the first few are far from each other."""
    order = [api.spread_out(i, n) for i in range(n)]
    assert list(range(n)) == sorted(order)
    assert n < 10 or min(abs(a - b) for a, b in itertools.pairwise(order)) > n // 10


def test_the_gallery_may_change_meanwhile(site: Site) -> None:
    """What another process adds and removes is found, and is not, from the next request on."""
    data = png((9, 9, 9))
    (site.photos / "late.png").write_bytes(data)
    maintenance.add(site.index, [site.photos / "late.png"])
    number = site.search(("q.png", data), k=1, keep_self="true").json()["results"][0]["id"]
    assert "late.png" == site.get(f"/api/images/{number}").json()["path"]
    maintenance.remove(site.index, ["late.png"])
    assert 12 == site.get("/api/info").json()["images"]
    assert 404 == site.get(f"/api/images/{number}").status_code
    assert 404 == site.get(f"/api/images/{number}/similar").status_code


def test_the_gallery_may_go_meanwhile(site: Site) -> None:
    """A gallery that was taken away is an answer in words."""
    site.index.rename(site.index.with_name("elsewhere.index"))
    answer = site.get("/api/info")
    assert (503, True) == (answer.status_code, "no such folder" in answer.json()["detail"])


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"", 422, "x.png: empty"),
        (b"hello", 415, "x.png: not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "SVG"),
        (png((1, 2, 3))[:60], 422, "x.png: truncated"),
        (b"P6 90000 90000 255 ", 413, "x.png: too large"),
    ],
)
def test_broken_uploads(site: Site, data: bytes, status: int, words: str) -> None:
    """What cannot be read is named, with what is wrong; a good one beside it does not help."""
    for pictures in ([("x.png", data)], [("good.png", png((1, 2, 3))), ("x.png", data)]):
        answer = site.search(*pictures)
        assert status == answer.status_code
        assert words in answer.json()["detail"]


@pytest.mark.parametrize(
    ("method", "url", "how", "status", "words"),
    [
        ("GET", "/api/images/3/similar?k=0", {}, 422, "k: must be at least 1, not '0'"),
        ("GET", "/api/images/3/similar?k=-1", {}, 422, "k: must be at least 1, not '-1'"),
        ("GET", "/api/images/3/similar?k=501", {}, 422, "k: must be at most 500, not '501'"),
        ("GET", "/api/images/3/similar?k=1e9", {}, 422, "k: must be a whole number, not '1e9'"),
        ("GET", "/api/images/3/similar?k=many", {}, 422, "k: must be a whole number, not 'many'"),
        (
            "GET",
            "/api/images/3/similar?threshold=nan",
            {},
            422,
            "threshold: must be at most 1, not 'nan'",
        ),
        (
            "GET",
            "/api/images/3/similar?threshold=x",
            {},
            422,
            "threshold: must be a number, not 'x'",
        ),
        (
            "GET",
            "/api/images/3/similar?keep_self=x",
            {},
            422,
            "keep_self: must be true or false, not 'x'",
        ),
        (
            "GET",
            "/api/images?limit=0&offset=x",
            {},
            422,
            "offset: must be a whole number, not 'x'; limit: must be at least 1",
        ),
        ("GET", "/api/images/99", {}, 404, "no image 99"),
        ("GET", "/api/images/99/similar", {}, 404, "no image 99"),
        ("GET", "/thumbs/99", {}, 404, "no image 99"),
        ("GET", "/thumbs/1?size=huge", {}, 422, "size: must be small or large, not 'huge'"),
        ("GET", f"/files/{10**30}", {}, 422, "number: must be less than 9223372036854775808"),
        ("GET", "/nothing", {}, 404, "nothing here"),
        ("GET", "/docs", {}, 404, "nothing here"),
        ("DELETE", "/api/info", {}, 405, "only GET, HEAD can be done here, not DELETE"),
        ("GET", "/api/search", {}, 405, "only POST can be done here, not GET"),
        ("POST", "/api/search", {}, 415, "multipart/form-data"),
        (
            "POST",
            "/api/search",
            {"json": {"k": 3}},
            415,
            "send pictures as multipart/form-data, not application/json",
        ),
        (
            "POST",
            "/api/search",
            {"files": {"other": b"x"}},
            422,
            "files: missing: send multipart/form-data",
        ),
        (
            "POST",
            "/api/search",
            {"files": {"files": (None, b"text")}},
            422,
            "files: must be pictures as files, not text: send",
        ),
        (
            "POST",
            "/api/search",
            {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
            400,
            "cannot be read",
        ),
        (
            "POST",
            "/api/search",
            {"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}},
            400,
            "send",
        ),
        ("POST", "/api/search", {"files": [("files", b"x")] * 1001}, 400, "holds too much"),
        (
            "POST",
            "/api/search",
            {"files": {"files": b"x"}, "data": {"k": "501"}},
            422,
            "k: must be at most 500",
        ),
        (
            "POST",
            "/api/search",
            {"files": {"files": b"x"}, "data": {"k": "9" * 9999}},
            422,
            f"not '{'9' * 60}…'",
        ),
        (
            "POST",
            "/api/search",
            {"files": {"files": b"x", "k": b"3"}},
            422,
            "k: must be a whole number, not a file",
        ),
        ("POST", "/api/search", {"files": [("files", b"x")] * 17}, 422, "17 pictures are too many"),
    ],
)
def test_errors_are_words(
    site: Site, method: str, url: str, how: dict[str, Any], status: int, words: str
) -> None:
    """Every error has its code, and a text of our own that names what is wrong and what would be
    right."""
    answer = ask(site.app, method, url, **how)
    assert status == answer.status_code, answer.text
    assert ["detail"] == list(answer.json())
    assert words in answer.json()["detail"]
    assert not any(
        word in answer.text.lower() for word in ("input should", "uploadfile", "<class", "string")
    )


@pytest.mark.parametrize(
    "url",
    [
        "/",
        "/page.css",
        "/page.js",
        "/openapi.json",
        "/api/info",
        "/api/images",
        "/api/images/3",
        "/api/images/3/similar",
        "/thumbs/3",
        "/files/3",
        "/thumbs/99",
        "/nothing",
        "/api/search",
    ],
)
def test_head_is_get_without_a_body(site: Site, url: str) -> None:
    """HEAD, as uptime checks ask it, has the status and the headers of GET, and no body."""
    head, get = ask(site.app, "HEAD", url), site.get(url)
    assert (get.status_code, b"") == (head.status_code, head.content)
    # it holds the seconds that it took
    changing = ("content-length",) if url.endswith("similar") else ()
    assert {k: v for k, v in get.headers.items() if k not in changing} == {
        k: v for k, v in head.headers.items() if k not in changing
    }
    assert 401 == ask(locked(site), "HEAD", "/api/info").status_code


def test_too_many_bytes(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is too large is refused by its announced length, and where it lies about it,
    as soon as it is."""
    monkeypatch.setattr(api, "UPLOAD", 1000)
    monkeypatch.setattr(security, "OVERHEAD", 500)
    small = api.create(site.batcher)
    assert 413 == ask(small, "POST", "/api/search", files={"files": bytes(2000)}).status_code
    sent = []

    async def stream() -> Any:
        yield b'--b\r\ncontent-disposition: form-data; name="files"; filename="x"\r\n\r\n'
        for _ in range(100):
            sent.append(1)
            yield bytes(100)

    answer = ask(
        small,
        "POST",
        "/api/search",
        content=stream(),
        headers={"content-type": "multipart/form-data; boundary=b"},
    )
    assert (413, True) == (answer.status_code, "too large" in answer.json()["detail"])
    assert len(sent) < 20
    assert 415 == ask(small, "POST", "/api/search", files={"files": bytes(900)}).status_code


def test_a_bug_is_an_answer(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody foresaw is said as JSON, and the next request is answered."""
    monkeypatch.setattr(Gallery, "info", lambda self: 1 / 0)
    answer = site.get("/api/info")
    assert (500, True) == (answer.status_code, "ZeroDivisionError" in answer.json()["detail"])
    assert 200 == site.get("/api/images").status_code


def test_openapi(site: Site) -> None:
    """The description names every route of the API with the type of its answer, and the page draws
    on nothing else."""
    described = site.get("/openapi.json").json()["paths"]
    expected = {
        "/api/info",
        "/api/images",
        "/api/search",
        "/api/images/{number}/similar",
        "/api/images/{number}",
    }
    assert expected | {"/thumbs/{number}", "/files/{number}"} == set(described)
    for path in expected:
        (operation,) = described[path].values()
        assert "$ref" in operation["responses"]["200"]["content"]["application/json"]["schema"]
        problem = "#/components/schemas/Problem"
        errors = {
            code: one["content"]["application/json"]["schema"]["$ref"]
            for code, one in operation["responses"].items()
        }
        assert {problem} == {schema for code, schema in errors.items() if code != "200"}
        assert {"401", "404", "422", "503"} <= set(errors)


# ----------------------------------------------------------------------------------------- pictures


def test_details(site: Site) -> None:
    """An image has its paths, digest, and what its file is."""
    about = site.get(f"/api/images/{site.id_of('0000.png')}").json()
    data = (site.photos / "0000.png").read_bytes()
    assert ("0000.png", ["more/copy.png"], hashlib.sha256(data).hexdigest()) == (
        about["path"],
        about["also"],
        about["digest"],
    )
    assert ("PNG", 40, 30, len(data), None) == tuple(
        about[key] for key in ("format", "width", "height", "bytes", "problem")
    )


def test_files_come_as_they_are(site: Site) -> None:
    """The bytes of the file, under a type that says what they are, and nothing that may run."""
    answer = site.get(f"/files/{site.id_of('0003.png')}")
    assert (site.photos / "0003.png").read_bytes() == answer.content
    assert ("image/png", "nosniff") == (
        answer.headers["content-type"],
        answer.headers["x-content-type-options"],
    )
    assert "sandbox" in answer.headers["content-security-policy"]


def test_thumbs_are_made_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small picture is kept in the cache by content: another server does not decode again, and a
    browser asks shortly."""
    number = site.id_of("0004.png")
    first = site.get(f"/thumbs/{number}")
    assert ("image/png", (40, 30)) == (
        first.headers["content-type"],
        Image.open(io.BytesIO(first.content)).size,
    )
    monkeypatch.setattr("retrieval.web.thumbnails.shrink", lambda *_: 1 / 0)
    again = api.create(site.batcher)
    assert first.content == ask(again, "GET", f"/thumbs/{number}").content
    answer = ask(
        again, "GET", f"/thumbs/{number}", headers={"if-none-match": first.headers["etag"]}
    )
    assert (304, b"") == (answer.status_code, answer.content)


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "no picture", "a folder"])
def test_a_damaged_thumb_is_made_again(tmp_path: Path, damage: str) -> None:
    """A browser never sees half a picture, and the next one comes from the cache again."""
    thumbs, data = Thumbs(tmp_path), png((9, 90, 200))
    expected = thumbs.get("ab" * 32, "small", lambda: data)
    (path,) = tmp_path.glob("*/*/*")
    whole = path.read_bytes()
    changed = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(
            {"cut": whole[:-20], "empty": b"", "changed": changed, "no picture": b"hello"}[damage]
        )

    assert expected == thumbs.get("ab" * 32, "small", lambda: data)
    if damage != "a folder":
        assert expected == thumbs.get("ab" * 32, "small", lambda: b"not asked for")


def test_without_a_cache_pictures_are_made_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page is whole where nothing can be kept."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "file"))
    thumbs, data = Thumbs(), png((1, 2, 3))

    assert thumbs.get("ab" * 32, "small", lambda: data) == thumbs.get(
        "ab" * 32, "small", lambda: data
    )
    assert thumbs.folder is None


def test_large_pictures_become_small(tmp_path: Path) -> None:
    """A picture is fitted into the side, as JPEG; what is damaged stays damaged."""
    from finetune.data.decode import DecodeError

    out = io.BytesIO()
    Image.new("RGB", (3000, 1000), (200, 10, 10)).save(out, "JPEG")
    thumbs = Thumbs(tmp_path)
    for size, expected in (("small", (320, 107)), ("large", (1600, 533))):
        made = Image.open(io.BytesIO(thumbs.get("ab" * 32, size, out.getvalue)))
        assert ("JPEG", expected) == (made.format, made.size)
    with pytest.raises(DecodeError):
        thumbs.get("cd" * 32, "small", lambda: b"hello")


def test_thumbs_are_made_by_the_cores_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many pictures are decoded at once as this process has cores, not as many as the machine
    has."""
    monkeypatch.setattr("finetune.hardware.cores", lambda: 3)
    assert 3 == Thumbs(tmp_path)._places._initial_value


def test_thumbs_are_bounded(tmp_path: Path) -> None:
    """Beyond the limit the longest unused go; a cache that cannot be written costs nothing but
    time."""
    size = len(png((0, 0, 0)))
    thumbs = Thumbs(tmp_path, limit=10 * size)
    for i in range(30):
        name = f"{i:02x}" * 32
        thumbs.get(name, "small", lambda i=i: png((i, i, i)))
        for path in tmp_path.glob(f"*/*/{name}"):
            os.utime(path, (i, i))
    left = sorted(path.name[:2] for path in tmp_path.glob("*/*/*"))
    assert 0 < sum(path.stat().st_size for path in tmp_path.glob("*/*/*")) <= 10 * size
    assert "1d" == left[-1]
    (tmp_path / "file").write_text("")
    assert Thumbs(tmp_path / "file").get("ab" * 32, "small", lambda: png((1, 1, 1)))


def test_a_file_that_went(site: Site) -> None:
    """A file that is gone is a 404 in words, small and whole; another path of the same bytes takes
    its place."""
    number, double = site.id_of("0008.png"), site.id_of("0000.png")
    site.get(f"/thumbs/{number}")
    (site.photos / "0008.png").unlink()
    (site.photos / "0000.png").unlink()
    for url in (f"/thumbs/{number}", f"/files/{number}"):
        answer = site.get(url)
        assert (404, "0008.png is not there any more") == (
            answer.status_code,
            answer.json()["detail"].partition(":")[0],
        )
    assert "not there any more" in site.get(f"/api/images/{number}").json()["problem"]
    assert 200 == site.get(f"/files/{double}").status_code


def test_only_the_gallerys_bytes_get_out(site: Site, tmp_path: Path) -> None:
    """What was put in the place of a file since the build is not served: other files, or links out
    of the folder."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(png((250, 0, 0)))
    numbers = [site.id_of(f"{i:04d}.png") for i in (3, 4, 5)]
    (site.photos / "0003.png").unlink()
    (site.photos / "0003.png").symlink_to(secret)
    (site.photos / "0004.png").unlink()
    (site.photos / "0004.png").symlink_to("/etc/passwd")
    (site.photos / "0005.png").write_text("<script>alert(1)</script>")
    for number in numbers:
        for url in (f"/files/{number}", f"/thumbs/{number}"):
            answer = site.get(url)
            assert (404, True) == (answer.status_code, "was changed" in answer.json()["detail"])
        assert "was changed" in site.get(f"/api/images/{number}").json()["problem"]


@pytest.mark.parametrize(
    "path",
    [
        "../../etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/etc/passwd",
        "%2e%2e%2f%2e%2e%2fetc/passwd",
        "//etc/passwd",
        "%2fetc%2fpasswd",
        "/etc/passwd",
        "..%5c..%5cetc",
        "1/../../etc/passwd",
        "%00",
        "0003.png",
        "-1",
        "1.0",
        "１",
    ],
)
def test_no_path_is_served(site: Site, path: str) -> None:
    """Pictures are asked for by number: no path, however written, reaches a file."""
    for folder in ("files", "thumbs", "page.css", "."):
        answer = site.get(f"/{folder}/{path}")
        assert answer.status_code in (404, 422), answer.text
        assert b"root:" not in answer.content


def test_the_page_is_self_contained(site: Site) -> None:
    """The page and what it loads come from here alone, under a policy that allows nothing else."""
    page = site.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for url, kind in (
        ("/", "text/html"),
        ("/page.css", "text/css"),
        ("/page.js", "text/javascript"),
    ):
        answer = site.get(url)
        assert (200, True) == (answer.status_code, answer.headers["content-type"].startswith(kind))
        assert "http" not in answer.text.replace("http://www.w3.org/2000/svg", "")
        assert " style=" not in answer.text
        assert " onclick=" not in answer.text


# -------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("times", [1, 2])
def test_the_command(site: Site, times: int) -> None:
    """The address is printed once it answers, a search over it works, and Ctrl-C (also twice) ends
    it at once, and well."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); "
        f"import webs; webs.install(setattr)\n"
    )
    code += HEARS_CTRL_C + "from retrieval.cli import main; main()"
    words = [sys.executable, "-c", code, "serve", str(site.index), "--port", "0"]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as server:
        assert server.stdout is not None
        address = next(word for word in server.stdout.readline().split() if word.startswith("http"))
        data = (site.photos / "0003.png").read_bytes()
        found = httpx.post(
            f"{address}api/search",
            files={"files": data},
            data={"keep_self": "true"},
            trust_env=False,
        ).json()
        for _ in range(times):
            server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=20)
    assert "0003.png" == found["results"][0]["path"]
    assert (0, "ended\n", "") == (server.returncode, out, err)


def test_the_cache_says_what_it_holds() -> None:
    """The folder of small pictures is part of the cache, and of its README."""
    assert Thumbs().folder == files.cache_dir("thumbs")
    assert "thumbs/" in (files.cache_dir() / "README.txt").read_text()


# -------------------------------------------------------------------------------------------- names


def test_files_of_any_name_are_found_again(site: Site) -> None:
    """The API shows a name in its printable form, and gives the picture, the file and what is like
    it by its id."""
    odd.need(site.photos / "try")
    for i, name in enumerate(odd.NAMES):
        (site.photos / name).write_bytes(png((i, 255 - i, 7 * i)))
    maintenance.add(site.index, [site.photos])
    for i, name in enumerate(odd.NAMES):
        number = site.id_of(names.shown(name))
        about = site.get(f"/api/images/{number}").json()
        assert (name, None) == (names.meant(about["path"]), about["problem"])
        assert png((i, 255 - i, 7 * i)) == site.get(f"/files/{number}").content
        assert 200 == site.get(f"/thumbs/{number}").status_code
    number = site.id_of(names.shown(odd.NAMES[0]))
    found = site.get(f"/api/images/{number}/similar?k=50").json()
    assert names.shown(odd.NAMES[0]) == found["query"][0]["name"]
    assert set(odd.NAMES[1:]) <= {names.meant(hit["path"]) for hit in found["results"]}
    (site.photos / odd.NAMES[0]).unlink()
    assert (
        rf"{names.shown(odd.NAMES[0])} is not there"
        in site.get(f"/files/{number}").json()["detail"]
    )
