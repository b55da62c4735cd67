"""Counts of a server in the text format of Prometheus."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence

from web.video import Video

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_STATUSES = ("queued", "in_progress", "completed", "failed")


class Metrics:
    """Counts answers; any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: Counter[tuple[str, str, int]] = Counter()
        self._seconds: dict[tuple[str, str], float] = {}

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts an answer.

        Args:
            route: the pattern of the path, not the path, of which there are too many.
        """
        with self._lock:
            self._answers[method, route, status] += 1
            key = method, route
            self._seconds[key] = self._seconds.get(key, 0.0) + seconds

    def text(self, videos: Sequence[Video], worker_up: bool, worker_starts: int) -> str:
        return "\n".join([*self._lines(videos, worker_up, worker_starts), ""])

    def _lines(self, videos: Sequence[Video], worker_up: bool, worker_starts: int) -> Iterator[str]:
        by_status = Counter(video.status for video in videos)
        done = [video.state.seconds for video in videos if video.status == "completed"]
        yield from _head("cogvideox_videos", "gauge", "Videos by status.")
        for status in _STATUSES:
            yield f'cogvideox_videos{{status="{status}"}} {by_status[status]}'
        yield from _head("cogvideox_video_seconds", "summary", "Seconds of work a video.")
        yield f"cogvideox_video_seconds_sum {sum(done):.3f}"
        yield f"cogvideox_video_seconds_count {len(done)}"
        yield from _head("cogvideox_worker_up", "gauge", "Whether this server's worker runs.")
        yield f"cogvideox_worker_up {int(worker_up)}"
        yield from _head("cogvideox_worker_starts_total", "counter", "Starts of the worker.")
        yield f"cogvideox_worker_starts_total {worker_starts}"
        with self._lock:
            answers, seconds = dict(self._answers), dict(self._seconds)
        yield from _head("cogvideox_http_requests_total", "counter", "Answers.")
        for (method, route, status), count in sorted(answers.items()):
            labels = f'method="{method}",route="{route}",status="{status}"'
            yield f"cogvideox_http_requests_total{{{labels}}} {count}"
        yield from _head("cogvideox_http_seconds_total", "counter", "Seconds of all answers.")
        for (method, route), total in sorted(seconds.items()):
            labels = f'method="{method}",route="{route}"'
            yield f"cogvideox_http_seconds_total{{{labels}}} {total:.6f}"


def _head(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP {name} {text}", f"# TYPE {name} {kind}"
