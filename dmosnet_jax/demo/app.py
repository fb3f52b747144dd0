"""The page as a Starlette application: two forms, answered by the same page with what was found.

Uploads are bounded before they are read and decoded as untrusted files; one is worked on at a time. There is no script
in the page, and its content policy lets none in.
"""

import dataclasses
import pathlib
from typing import Any

import anyio
import jinja2
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data import transforms
from dmosnet_jax.evaluation.gallery import Gallery
from dmosnet_jax.evaluation.report import thumbnail
from dmosnet_jax.export.serve import Extractor

# Of a request with two photos; phones make files of five to ten.
MAX_BYTES = 32 * 2**20
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'"

_PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("dmosnet_jax", "demo"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


@dataclasses.dataclass(frozen=True)
class _Shown:
    """A picture on the page: JPEG in base64, "" where the file is gone, and what is said of it."""

    picture: str
    caption: str
    score: float | None = None
    same: bool | None = None


class _Bounded:
    """Refuses requests whose body is larger than `most` bytes, whatever they declare."""

    def __init__(self, app: ASGIApp, most: int):
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise HTTPException(413, f"more than {self._most // 2**20} MiB: give smaller photos")
            return message

        await self._app(scope, bounded, send)


class _Page:
    """What the two forms do."""

    def __init__(self, extractor: Extractor, gallery: Gallery | None, top_k: int):
        self._extractor, self._gallery, self._top_k = extractor, gallery, top_k
        self._one_at_a_time = anyio.CapacityLimiter(1)

    async def start(self, request: Request) -> Response:
        """The empty page."""
        del request
        return self._answer()

    async def compare(self, request: Request) -> Response:
        """Two photos: similarity and verdict."""
        return await self._work(self._compare, await _uploads(request, "first", "second"))

    async def search(self, request: Request) -> Response:
        """One photo: the gallery's most similar ones."""
        if self._gallery is None:
            raise HTTPException(404, "no gallery: start the page with --index=GALLERY")
        return await self._work(self._search, await _uploads(request, "photo"))

    async def failed(self, request: Request, error: Exception) -> Response:
        """The page with one line of what went wrong."""
        del request
        status = error.status_code if isinstance(error, HTTPException) else 400
        text = error.detail if isinstance(error, HTTPException) else str(error)
        return self._answer(error=text, status=status)

    async def _work(self, function: Any, uploads: list[tuple[str, bytes]]) -> Response:
        shown = await anyio.to_thread.run_sync(function, uploads, limiter=self._one_at_a_time)
        return self._answer(**shown)

    def _compare(self, uploads: list[tuple[str, bytes]]) -> dict[str, Any]:
        found = self._extractor.compare(*(_decoded(name, data) for name, data in uploads))
        photos = [_Shown(thumbnail(data, name), name) for name, data in uploads]
        return {"pair": {"photos": photos, "similarity": found.similarity, "same": found.same}}

    def _search(self, uploads: list[tuple[str, bytes]]) -> dict[str, Any]:
        assert self._gallery is not None
        ((name, data),) = uploads
        features = self._extractor(_decoded(name, data), normalised=True)
        found = self._gallery.search(features, self._top_k)
        files, roots, threshold = self._gallery.files, self._gallery.roots, self._extractor.threshold
        matches = [
            _Shown(
                _of_file(pathlib.Path(roots[row]) / files[row]),
                files[row],
                float(score),
                None if threshold is None else bool(score >= threshold),
            )
            for row, score in zip(found.indices[0], found.scores[0], strict=True)
        ]
        return {"ranking": {"query": _Shown(thumbnail(data, name), name), "matches": matches}}

    def _answer(self, *, status: int = 200, **shown: Any) -> Response:
        values: dict[str, Any] = {"error": None, "pair": None, "ranking": None} | shown
        page = _PAGES.get_template("page.html").render(
            model=self._extractor.model.name,
            threshold=self._extractor.threshold,
            images=None if self._gallery is None else len(self._gallery),
            **values,
        )
        headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
        return HTMLResponse(page, status, headers=headers)


async def _uploads(request: Request, *fields: str) -> list[tuple[str, bytes]]:
    """Name and content of the files of a form."""
    async with request.form(max_files=len(fields), max_fields=len(fields)) as form:
        found = []
        for field in fields:
            upload = form.get(field)
            if not isinstance(upload, UploadFile) or not upload.filename:
                raise HTTPException(400, f"no photo chosen ({field}): choose one")
            found.append((upload.filename[-100:], await upload.read()))
        return found


def _decoded(name: str, data: bytes) -> Any:
    try:
        return transforms.decode(data)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def _of_file(path: pathlib.Path) -> str:
    try:
        return thumbnail(path.read_bytes(), path.name)
    except (OSError, DataError):
        # The gallery has what was computed from it.
        return ""


def create(
    extractor: Extractor, gallery: Gallery | None = None, *, top_k: int = 12, host: str = "127.0.0.1"
) -> ASGIApp:
    """The application.

    Args:
        extractor: the network; its threshold decides whether two photos are of one person.
        gallery: to be searched, made by the same weights.
        top_k: images of it that are shown.
        host: address that the page is served on. On the loopback, requests must be for it by name: a page from
            elsewhere must not reach this one under a name of its own.
    """
    page = _Page(extractor, gallery, top_k)
    names = [*_LOOPBACK, "[::1]"] if host in _LOOPBACK else ["*"]
    return Starlette(
        routes=[
            Route("/", page.start),
            Route("/compare", page.compare, methods=["POST"]),
            Route("/search", page.search, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=names), Middleware(_Bounded, most=MAX_BYTES)],
        exception_handlers={HTTPException: page.failed, DataError: page.failed},
    )
