"""`retrieve serve`: who may be served where, the port, and the end."""

from __future__ import annotations

import errno
import ipaddress
import secrets
import socket
import sys
import threading
from pathlib import Path

from finetune.errors import UserError
from finetune.names import shown
from retrieval.gallery import Gallery
from retrieval.web import batching
from retrieval.web.batching import QueryBatcher

WAIT = 3  # seconds that answers under way have at the end
BACKLOG = 2048  # connections that may wait to be accepted
LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))


def serve(
    folder: Path, *, host: str = "127.0.0.1", port: int = 8000, token: str | None = None
) -> None:
    """Serve the page and its API until Ctrl-C. Port 0 takes a free one.

    Raises `UserError` where the extra `web` is missing, for another address than this machine's own
    without a token, and for an address that cannot be had.
    """
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn
    except ImportError as error:
        fix = "pip install 'regraft[web]'"
        raise UserError(
            f"the page needs packages that are not installed ({error.name})", fix=fix
        ) from error

    own = is_loopback(host)
    check_token(host, token)
    with Gallery(folder) as gallery, listen(host, port) as server, QueryBatcher(gallery) as batcher:
        from retrieval.web import api

        for text in gallery.warnings():
            print(f"warning: {text}", file=sys.stderr)
        name = socket.gethostname() if host in ("0.0.0.0", "::") else host
        address = f"http://{f'[{name}]' if ':' in name else name}:{server.getsockname()[1]}/"
        how = (
            "Ctrl-C ends it"
            if token is None
            else "open it with ?token=… at its end; Ctrl-C ends it"
        )
        app = api.create(batcher, hosts=LOOPBACK | {host.lower()} if own else None, token=token)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            timeout_graceful_shutdown=WAIT,
            backlog=BACKLOG,
            ws="none",
        )
        threading.Thread(target=batching.warm, args=(gallery,), daemon=True).start()
        try:
            # The socket listens already: who comes from now on is answered.
            print(f"{shown(folder.name)}, {len(gallery)} images: {address}  ({how})", flush=True)
            uvicorn.Server(config).run(sockets=[server])
        except KeyboardInterrupt:  # how a server is meant to end
            print("ended")


def check_token(host: str, token: str | None) -> None:
    """Refuse to show a gallery to other machines without a token."""
    if token is not None and not token.strip():
        raise UserError("the token is empty", where="--token", fix="write one, or leave it out")
    if token is None and not is_loopback(host):
        raise UserError(
            f"{host} can be reached from other machines, and nothing would keep them out",
            where="--host",
            fix=f"add --token TEXT, as in --token {secrets.token_urlsafe(12)}",
        )


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, which no other machine reaches."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises `UserError` naming the port, and another that is free."""
    try:
        family, _, _, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(where[:2], family=family, backlog=BACKLOG)
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(
            f"no address is called {host!r}", where="--host", fix="use 127.0.0.1"
        ) from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            fix = f"choose another: --port {_free_port()}"
            raise UserError(
                f"port {port} is in use by another program", where="--port", fix=fix
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            fix = f"choose one from 1024 on: --port {_free_port()}"
            raise UserError(
                f"port {port} needs the rights of an administrator", where="--port", fix=fix
            ) from error
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise UserError(
                f"{host} is no address of this machine", where="--host", fix="use 127.0.0.1"
            ) from error
        raise


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])
