"""Access control and response headers: host names, the token, the size of uploads."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OVERHEAD = 100_000  # bytes of a request beside its pictures

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; display: grid; place-items: center;
  min-height: 90vh; margin: 0 1rem; }
form { display: flex; gap: .5rem; flex-wrap: wrap; }
label { flex: 1 0 100%; }
input, button { font: inherit; padding: .5rem .9rem; border-radius: .6rem;
  border: 1px solid #8888; }
button { background: #256b4a; color: #fff; border-color: transparent; cursor: pointer; }
"""
ASK = f"""<!doctype html><html lang=en><meta charset=utf-8><title>The token, please</title>
<meta name=viewport content="width=device-width"><style>{STYLE}</style>
<main><h1>This gallery is locked</h1><p>WORDS</p>
<form method=get action=./><label for=token>Token</label>
<input id=token name=token type=password autocomplete=current-password autofocus required>
<button>Open</button></form></main></html>
"""
ASK_POLICY = (
    f"default-src 'none'; style-src "
    f"'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def guarded(
    app: ASGIApp, *, hosts: frozenset[str] | None, token: str | None, name: str, limit: int
) -> ASGIApp:
    """`app` behind the door: requests for other `hosts` (None: any), without the `token` (None:
    none is needed), from pages of other origins, or of more than `limit` bytes do not reach it.
    `name` tells the cookies of several galleries apart."""
    secret = None if token is None else token.encode()
    cookie = f"regraft-{name}"
    # The cookie is not the token: who reads it cannot use it elsewhere.
    pass_ = (
        "" if secret is None else hmac.new(secret, b"regraft cookie", hashlib.sha256).hexdigest()
    )

    async def door(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await app(scope, receive, send)
            return
        request = Request(scope)
        given = request.query_params.get("token")
        fresh = (
            secret is not None
            and given is not None
            and hmac.compare_digest(given.encode(errors="replace"), secret)
        )

        bare = scope["method"] == "HEAD"  # as GET, without a body
        if bare:
            scope = {**scope, "method": "GET"}

        async def answer(message: Message) -> None:
            if bare and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for key, value in HEADERS.items():
                    headers.setdefault(key, value)
                if fresh:
                    headers.append(
                        "set-cookie", f"{cookie}={pass_}; Path=/; HttpOnly; SameSite=Strict"
                    )
            await send(message)

        refusal = (
            wrong_host(request, hosts)
            or wrong_origin(request)
            or wrong_kind(request)
            or too_large(request, limit)
        )
        if (
            refusal is None
            and secret is not None
            and not (fresh or may_enter(request, secret, cookie, pass_))
        ):
            refusal = ask(request, given is not None)
        if refusal is not None:
            await refusal(scope, receive, answer)
            return
        await app(scope, counted(receive, limit), answer)

    return door


def refuse(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"detail": detail}, status, headers)


def wrong_host(request: Request, hosts: frozenset[str] | None) -> Response | None:
    """A page elsewhere can point its own name at this machine (DNS rebinding): only our own names
    are answered."""
    if hosts is None:
        return None
    given = request.headers.getlist("host")
    try:
        found = urlsplit(f"//{given[0]}").hostname if len(given) == 1 else None
    except ValueError:
        found = None
    if found in hosts:
        return None
    return refuse(
        400, f"the host {', '.join(given)!r} is not served here: use {' or '.join(sorted(hosts))}"
    )


def wrong_origin(request: Request) -> Response | None:
    origin = request.headers.get("origin")
    if request.method in ("GET", "HEAD", "OPTIONS") or origin is None:
        return None
    if urlsplit(origin).netloc == request.headers.get("host"):
        return None
    return refuse(403, "a page of another origin may not ask here")


def wrong_kind(request: Request) -> Response | None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.method != "POST" or kind == "multipart/form-data":
        return None
    given = f"not {kind}" if kind else "and say so in the content type"
    return refuse(415, f"send pictures as multipart/form-data, {given}")


def too_large(request: Request, limit: int) -> Response | None:
    text = request.headers.get("content-length", "0")
    if not (text.isascii() and text.isdigit()):
        return refuse(400, f"the content length {text!r} is no number")
    if int(text) <= limit + OVERHEAD:
        return None
    return refuse(413, words_for_size(limit))


def words_for_size(limit: int) -> str:
    return f"too large: at most {limit // 1_000_000} MB can be sent at once"


def counted(receive: Receive, limit: int) -> Receive:
    """`receive` that stops where more bytes come than are allowed, whatever the headers said."""
    total = 0

    async def call() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > limit + OVERHEAD:
            raise HTTPException(413, words_for_size(limit))
        return message

    return call


def may_enter(request: Request, secret: bytes, cookie: str, pass_: str) -> bool:
    """Whether a request knows the token: as a bearer, or by the cookie that it got for it."""
    kind, _, value = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and hmac.compare_digest(
        value.strip().encode("latin-1", "replace"), secret
    ):
        return True
    found = request.cookies.get(cookie, "")
    return hmac.compare_digest(found.encode(errors="replace"), pass_.encode())


def ask(request: Request, tried: bool) -> Response:
    """The response to a missing or wrong token (a form for browsers)."""
    words = "This token is not the right one." if tried else "Whoever started it has the token."
    headers = {"www-authenticate": "Bearer"}
    if request.url.path == "/" and "text/html" in request.headers.get("accept", ""):
        return HTMLResponse(
            ASK.replace("WORDS", words), 401, {**headers, "content-security-policy": ASK_POLICY}
        )
    return refuse(
        401,
        "the token is missing or wrong: send it as `Authorization: "
        "Bearer …`, or open the page with ?token=…",
        headers,
    )
