"""What the API says where it cannot answer: every error is JSON, `{"detail": "…"}`, in words of our
own."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from finetune.errors import UserError

SHOWN = 60  # letters of a value that is not understood
FORM = (
    "send multipart/form-data with pictures as files in `files`, as `curl -F files=@cat.jpg` does"
)
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a number",
    "bool": "true or false",
}
BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


class Problem(BaseModel):
    """What went wrong, in words."""

    detail: str


EVERY: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": words}
    for code, words in {
        400: "Not understood",
        401: "The token is missing or wrong",
        403: "Asked by a page of another origin",
        404: "Not here",
        405: "Another method is answered here",
        413: "Too large",
        415: "Not pictures",
        422: "A value that cannot be used",
        500: "A bug",
        503: "The gallery cannot be read at the moment",
    }.items()
}


def install(app: FastAPI) -> None:
    """Let `app` answer every error in our words."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _plain)
    app.add_exception_handler(UserError, _mendable)
    app.add_exception_handler(Exception, _bug)


def _refused(status: int, detail: str, headers: Any = None) -> Response:
    return JSONResponse({"detail": detail}, status, headers)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _refused(422, "; ".join(dict.fromkeys(_words(one) for one in error.errors())))


def _words(one: dict[str, Any]) -> str:
    """What is wrong with one value: its name, what it must be, what it is."""
    name = [str(part) for part in one["loc"] if not isinstance(part, int)][-1]
    if name == "files":
        return (
            f"files: "
            f"{'missing' if one['type'] == 'missing' else 'must be pictures as files, not text'}: "
            f"{FORM}"
        )
    if one["type"] == "missing":
        return f"{name}: missing"
    return f"{name}: must be {_wanted(one)}, not {_given(one.get('input'))}"


def _given(value: Any) -> str:
    if not isinstance(value, str):
        return repr(value) if isinstance(value, int | float) else "a file"
    return repr(value if len(value) <= SHOWN else f"{value[:SHOWN]}…")


def _wanted(one: dict[str, Any]) -> str:
    kind, context = str(one["type"]), one.get("ctx", {})
    if kind in BOUNDS:
        word, key = BOUNDS[kind]
        return (
            f"{word} {context[key]:g}"
            if isinstance(context[key], float)
            else f"{word} {context[key]}"
        )
    if kind == "string_pattern_mismatch":
        return str(context["pattern"]).strip("^$()").replace("|", " or ")
    return KINDS.get(kind.partition("_")[0], "another kind of value: see /openapi.json")


async def _plain(request: Request, error: Exception) -> Response:
    """The framework's own refusals, and those of the routes."""
    assert isinstance(error, HTTPException)
    detail, headers = error.detail, error.headers
    if error.status_code == 404 and detail == "Not Found":
        detail = "there is nothing here: see /openapi.json"
    elif error.status_code == 405:
        allowed = dict(headers or {}).get("Allow", "").replace("GET", "GET, HEAD")
        detail, headers = (
            f"only {allowed} can be done here, not {request.method}: see /openapi.json",
            {"allow": allowed},
        )
    elif error.status_code == 400:
        detail = f"this form cannot be read, or holds too much: {FORM}"
    return _refused(error.status_code, detail, headers)


async def _mendable(_: Request, error: Exception) -> Response:
    return _refused(503, str(error))


async def _bug(_: Request, error: Exception) -> Response:
    return _refused(500, f"the server met a bug ({type(error).__name__}); its window says more")
