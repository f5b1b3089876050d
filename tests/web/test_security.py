"""Who may come in to what `retrieve serve` serves: hosts, pages, tokens and ports."""

from __future__ import annotations

import socket
import sys
from typing import Any

import pytest
import webs
from webs import Site, ask, locked, png

from finetune.errors import UserError
from retrieval.web import app


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "localhost:8000", "localhost", "[::1]:8000", "LOCALHOST:1"]
)
def test_own_hosts(site: Site, host: str) -> None:
    """This machine's own names are answered."""
    assert 200 == site.get("/api/info", headers={"host": host}).status_code


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "evil.example:8000",
        "",
        "localhost@evil.example",
        "[::1",
    ],
)
def test_foreign_hosts(site: Site, host: str) -> None:
    """A foreign name that points at this machine is refused, whatever is asked for."""
    for url in ("/", "/page.js", "/api/info", "/thumbs/1", "/files/1", "/openapi.json"):
        answer = site.get(url, headers={"host": host})
        assert (400, True) == (answer.status_code, "not served here" in answer.json()["detail"])


def test_foreign_pages(site: Site) -> None:
    """A page of another origin can neither send pictures nor embed ours."""
    how = {"files": {"files": png((1, 2, 3))}, "headers": {"origin": "http://evil.example"}}
    assert 403 == ask(site.app, "POST", "/api/search", **how).status_code
    how["headers"] = {"origin": webs.BASE}
    assert 200 == ask(site.app, "POST", "/api/search", **how).status_code
    assert "same-origin" == site.get("/thumbs/1").headers["cross-origin-resource-policy"]


@pytest.mark.parametrize(
    "url",
    [
        "/",
        "/page.css",
        "/page.js",
        "/api/info",
        "/api/images",
        "/thumbs/1",
        "/files/1",
        "/openapi.json",
        "/x",
    ],
)
def test_every_route_needs_the_token(site: Site, url: str) -> None:
    """Without the token nothing is answered; with it as a bearer, everything."""
    door = locked(site)
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "open sesame"},
        {"cookie": "regraft-1=open sesame"},
    ):
        answer = ask(door, "GET", url, headers=headers)
        assert (401, "Bearer") == (answer.status_code, answer.headers["www-authenticate"])
    assert 401 == ask(door, "GET", f"{url}?token=wrong").status_code
    answer = ask(door, "GET", url, headers={"authorization": "Bearer open sesame"})
    assert (404 if url == "/x" else 200, False) == (
        answer.status_code,
        "set-cookie" in answer.headers,
    )


def test_the_token_becomes_a_cookie(site: Site) -> None:
    """?token= once, then a cookie that scripts cannot read, that other sites cannot send, and that
    is not the token."""
    door = locked(site, "ключ 1")
    first = ask(door, "GET", "/", params={"token": "ключ 1"})
    text = first.headers["set-cookie"]
    assert 200 == first.status_code
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(text.split("; "))
    pair = text.partition(";")[0]
    for others in ("", 'odd="x; [y]=1; '):
        assert 200 == ask(door, "GET", "/api/info", headers={"cookie": others + pair}).status_code
    assert (
        401
        == ask(locked(site, "another"), "GET", "/api/info", headers={"cookie": pair}).status_code
    )
    assert 401 == ask(door, "GET", "/api/info", headers={"cookie": pair[:-1]}).status_code


def test_a_person_is_asked_for_the_token(site: Site) -> None:
    """A browser gets a form instead of JSON, and is told when the token was wrong."""
    door = locked(site)
    answer = ask(door, "GET", "/", headers={"accept": "text/html"})
    assert (401, True) == (answer.status_code, "name=token" in answer.text)
    assert (
        "not the right one" in ask(door, "GET", "/?token=x", headers={"accept": "text/html"}).text
    )


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_other_machines_need_a_token(host: str, site: Site) -> None:
    """Any other address than this machine's own is refused without a token."""
    with pytest.raises(UserError, match="--token"):
        app.serve(site.index, host=host)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "::1"])
def test_own_addresses(host: str) -> None:
    """The addresses of this machine alone need none; an empty token is none."""
    app.check_token(host, None)
    with pytest.raises(UserError, match="empty"):
        app.check_token(host, " ")


def test_a_port_in_use(site: Site) -> None:
    """The port is named, and another one that is free."""
    with app.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} is in use.*\n.*--port \d+"):
            app.serve(site.index, port=port)


def test_no_such_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is none is said."""

    def nowhere(*_: Any, **__: Any) -> Any:
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    with pytest.raises(UserError, match="no address is called"):
        app.listen("no.such.host", 8000)


@pytest.mark.parametrize("name", ["fastapi", "uvicorn", "python_multipart"])
def test_without_the_extra(name: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a package of the extra is missing, the command that installs it is said."""
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install 'regraft\[web\]'"):
        app.serve(site.index)
