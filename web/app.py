"""The routes of the server: OpenAI's /v1/videos, health, metrics, events and the page."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import traceback
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.records import CONTACT_SHEET_FILE
from stages import files
from stages.preview import PREVIEW_FILE
from web.access import COOKIE, Access, Keys
from web.bodies import read_key_form, read_video_body
from web.describe import describe
from web.errors import ApiError, bad_field
from web.events import Events
from web.metrics import CONTENT_TYPE, Metrics
from web.page import card, login, page
from web.store import Store
from web.uploads import decode_image
from web.video import Video
from web.worker import Worker

# The page has a policy of its own in its head.
_PAGE_HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
}
_DECODERS = 2  # processes at once that decode uploads
_MAX_LIST = 100
_DEFAULT_LIST = 20
# What `content` sends, by OpenAI's names.
_VARIANTS = {
    "video": (files.VIDEO_FILE, "video/mp4"),
    "thumbnail": (CONTACT_SHEET_FILE, "image/png"),
    "spritesheet": (CONTACT_SHEET_FILE, "image/png"),
}


def make_app(store: Store, worker: Worker | None, key: str | None, loopback: bool) -> ASGIApp:
    """Makes the application.

    Args:
        worker: None if this server only accepts.
        key: that every request must carry; None lets everybody in.
        loopback: the server listens on this machine only.
    """
    api = _Api(store, worker)
    entrance = _Entrance(store, key)
    routes = [
        Route("/v1/videos", api.create, methods=["POST"]),
        Route("/v1/videos", api.list, methods=["GET"]),
        Route("/v1/videos/{id}", api.get, methods=["GET"]),
        Route("/v1/videos/{id}", api.delete, methods=["DELETE"]),
        Route("/v1/videos/{id}/content", api.content, methods=["GET"]),
        Route("/v1/videos/{id}/input", api.input, methods=["GET"]),
        Route("/v1/videos/{id}/preview", api.preview, methods=["GET"]),
        Route("/v1/videos/{id}/events", api.events_of_one, methods=["GET"]),
        Route("/v1/events", api.events_of_all, methods=["GET"]),
        Route("/v1/models", api.models, methods=["GET"]),
        Route("/v1/models/{id:path}", api.model, methods=["GET"]),
        Route("/", entrance.page, methods=["GET"]),
        Route("/login", entrance.login, methods=["POST"]),
        Route("/cards/{id}", api.card, methods=["GET"]),
        Route("/healthz", api.health, methods=["GET"]),
        Route("/metrics", api.metrics, methods=["GET"]),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        with store, worker or contextlib.nullcontext():
            yield

    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={ApiError: _refuse, HTTPException: _refuse_http, Exception: _defect},
        middleware=[Middleware(_Counting, metrics=api.counts)],
    )
    app.router.redirect_slashes = False  # an answer is this server's, or an error
    return Access(app, entrance.keys, loopback)


class _Api:
    """The handlers. Files are read in threads, so that no client waits for another's disk."""

    def __init__(self, store: Store, worker: Worker | None):
        self._store, self._worker = store, worker
        self.counts = Metrics()
        self._decoders = asyncio.Semaphore(_DECODERS)
        self._events = Events(store, self._describe)

    def _describe(self, video: Video) -> dict[str, Any]:
        return describe(video, self._store.name)

    async def create(self, request: Request) -> Response:
        body = await read_video_body(request)
        if body.reference is not None:
            async with self._decoders:
                image = await asyncio.to_thread(decode_image, body.reference)
            body = dataclasses.replace(body, reference=image)
        video = await asyncio.to_thread(self._store.create, body)
        return JSONResponse(self._describe(video))

    async def list(self, request: Request) -> Response:
        query = request.query_params
        limit, order, after = query.get("limit", ""), query.get("order", "desc"), query.get("after")
        count = int(limit) if limit.isascii() and limit.isdigit() and len(limit) < 4 else 0
        if limit and not 1 <= count <= _MAX_LIST:
            raise bad_field("limit", f"is not a number from 1 to {_MAX_LIST}")
        if order not in ("asc", "desc"):
            raise bad_field("order", "is neither asc nor desc")
        videos = await asyncio.to_thread(self._store.videos)
        if order == "desc":
            videos.reverse()
        if after is not None:
            ids = [video.id for video in videos]
            if after not in ids:
                raise bad_field("after", "is no video")
            videos = videos[ids.index(after) + 1 :]
        page = videos[: count or _DEFAULT_LIST]
        return JSONResponse({
            "object": "list",
            "data": [self._describe(video) for video in page],
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
            "has_more": len(page) < len(videos),
        })  # fmt: skip

    async def get(self, request: Request) -> Response:
        return JSONResponse(self._describe(await self._video(request)))

    async def delete(self, request: Request) -> Response:
        id_ = request.path_params["id"]
        await asyncio.to_thread(self._store.delete, id_)
        return JSONResponse({"id": id_, "object": "video.deleted", "deleted": True})

    async def content(self, request: Request) -> Response:
        variant = request.query_params.get("variant", "video")
        if variant not in _VARIANTS:
            raise bad_field("variant", f"is none of {', '.join(_VARIANTS)}")
        video = await self._video(request)
        if video.status != "completed":
            raise ApiError(409, "not_ready", f"this video is {video.status}", "video_id")
        name, kind = _VARIANTS[variant]
        return _file(video.state.folder / name, kind, f"{video.id}{Path(name).suffix}")

    async def input(self, request: Request) -> Response:
        video = await self._video(request)
        return _file(video.state.folder / files.INPUT_FILE, "image/png", f"{video.id}_input.png")

    async def preview(self, request: Request) -> Response:
        video = await self._video(request)
        try:
            # At once: the file may be replaced between two looks at it.
            picture = await asyncio.to_thread((video.state.folder / PREVIEW_FILE).read_bytes)
        except FileNotFoundError:
            raise ApiError(404, "not_found", "there is no preview yet", "video_id") from None
        return Response(picture, media_type="image/webp")

    async def card(self, request: Request) -> Response:
        video = await self._video(request)
        return HTMLResponse(await asyncio.to_thread(card, video))

    async def events_of_one(self, request: Request) -> Response:
        video = await self._video(request)
        return self._stream(request, video.id)

    async def events_of_all(self, request: Request) -> Response:
        return self._stream(request, None)

    def _stream(self, request: Request, id_: str | None) -> Response:
        self._events.check_room()
        stream = self._events.stream(request, id_)
        return StreamingResponse(stream, media_type="text/event-stream")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["id"] != self._store.name:
            raise ApiError(404, "model_not_found", "there is no such model", "model")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        preset = self._store.preset
        return {
            "id": self._store.name,
            "object": "model",
            "created": 0,
            "owned_by": "this server",
            "sizes": [f"{width}x{height}" for height, width in preset.sizes],
            "max_frames": preset.max_frames,
            "fps": preset.fps,
            "input_reference": self._store.model.transformer.image_to_video,
            "loras": list(self._store.loras()),
        }

    async def health(self, request: Request) -> Response:
        worker = self._worker.state if self._worker else "none"
        return JSONResponse({"status": "ok", "worker": worker})

    async def metrics(self, request: Request) -> Response:
        videos = await asyncio.to_thread(self._store.videos)
        up = self._worker is not None and self._worker.state == "running"
        starts = self._worker.starts if self._worker else 0
        return Response(self.counts.text(videos, up, starts), media_type=CONTENT_TYPE)

    async def _video(self, request: Request) -> Video:
        return await asyncio.to_thread(self._store.get, request.path_params["id"])


def _file(path: Path, kind: str, name: str) -> Response:
    if not path.is_file():
        raise ApiError(404, "not_found", "the file was removed", "video_id")
    return FileResponse(
        path, media_type=kind, filename=name, content_disposition_type="inline",
        headers={"Cache-Control": "private, no-cache"},
    )  # fmt: skip


class _Entrance:
    """The page, or if a key is missing the form that asks for it."""

    def __init__(self, store: Store, key: str | None):
        self._store, self.keys = store, Keys(key)

    async def page(self, request: Request) -> Response:
        if not self.keys.admit(request.headers):
            return HTMLResponse(login(self._store.name, ""), 401, _PAGE_HEADERS)
        videos = await asyncio.to_thread(self._store.videos)
        return HTMLResponse(await asyncio.to_thread(page, self._store, videos), 200, _PAGE_HEADERS)

    async def login(self, request: Request) -> Response:
        if not self.keys.match(await read_key_form(request)):
            return HTMLResponse(login(self._store.name, "Wrong key."), 401, _PAGE_HEADERS)
        answer = RedirectResponse("/", 303)
        secure = request.url.scheme == "https"
        answer.set_cookie(
            COOKIE, self.keys.session(), httponly=True, samesite="strict", secure=secure
        )
        return answer


class _Counting:
    """Counts the answers by the route that made them."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            route = scope.get("route")
            path = route.path if isinstance(route, Route) else "other"
            method = scope["method"] if path != "other" else "other"
            self._metrics.count(method, path, status, time.perf_counter() - start)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
    headers = dict(error.headers) if error.headers else None
    return ApiError(error.status_code, code, error.detail, headers=headers).response()


async def _defect(request: Request, error: Exception) -> Response:
    traceback.print_exception(error)
    return ApiError(500, "internal_error", "the server has a defect; its log says more").response()
