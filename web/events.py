"""Server-sent events: what has changed about videos, as it changes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request

from web.errors import ApiError
from web.store import Store
from web.video import Video

_POLL_SECONDS = 0.25
_PING_SECONDS = 15.0
MAX_LISTENERS = 64


class Events:
    """Streams of changes; a client that leaves ends its stream."""

    def __init__(self, store: Store, describe: Callable[[Video], dict[str, Any]]):
        self._store, self._describe = store, describe
        self._listeners = 0

    def check_room(self) -> None:
        """Raises ApiError 429 if too many clients listen."""
        if self._listeners >= MAX_LISTENERS:
            raise ApiError(
                429, "too_many_listeners", f"{MAX_LISTENERS} clients listen already",
                headers={"Retry-After": "10"},
            )  # fmt: skip

    async def stream(self, request: Request, id_: str | None) -> AsyncIterator[str]:
        """Yields an event for each video, then one for each change.

        Args:
            id_: of the one video to follow, until it has ended; None follows all, without end.
        """
        self._listeners += 1
        sent: dict[str, str] = {}
        ended: dict[str, float] = {}
        last = time.monotonic()
        try:
            while not await request.is_disconnected():
                videos = await asyncio.to_thread(self._store.videos)
                if id_ is not None:
                    videos = [video for video in videos if video.id == id_]
                for event in self._changes(videos, sent, ended):
                    last = time.monotonic()
                    yield event
                if id_ is not None and (id_ in ended or id_ not in sent):
                    return
                if time.monotonic() - last > _PING_SECONDS:
                    last = time.monotonic()
                    yield ": still here\n\n"
                await asyncio.sleep(_POLL_SECONDS)
        finally:
            self._listeners -= 1

    def _changes(
        self, videos: list[Video], sent: dict[str, str], ended: dict[str, float]
    ) -> list[str]:
        found = []
        for video in videos:
            # A video that has ended stays as it is, unless it was deleted and made again.
            if ended.get(video.id) == video.created:
                continue
            text = json.dumps(self._describe(video))
            if sent.get(video.id) != text:
                sent[video.id] = text
                found.append(f"event: video\ndata: {text}\n\n")
            if video.ended:
                ended[video.id] = video.created
            else:
                ended.pop(video.id, None)
        for id_ in sent.keys() - {video.id for video in videos}:
            del sent[id_]
            ended.pop(id_, None)
            found.append(f"event: deleted\ndata: {json.dumps({'id': id_})}\n\n")
        return found
