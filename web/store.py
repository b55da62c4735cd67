"""The jobs of a folder as the API sees them. The folder is the only store: a restart loses nothing.

A request is a job's folder before it is answered. Everything else is read from what workers write
there. What changes is read at most five times a second, however many clients ask.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cogvideox.model.folder import ModelFolder
from cogvideox.model.presets import Preset, preset_for
from cogvideox.model.settings import DenoisingSettings, complete_settings, likely_condition
from jobs.claims import Claims
from jobs.estimate import Pace
from jobs.identity import make_job, model_digest
from jobs.jobfile import JsonSettings, Line, LineSettings, Parse
from jobs.records import (
    CANCEL_FILE,
    Job,
    read_job,
    read_state,
    record_path,
    write_job,
)
from jobs.service import delete_job, delete_leftovers
from runtime.errors import InputError
from runtime.files import WriteError, flush, write_json
from stages.encode import check_prompts
from stages.lora import LoraLibrary, parse_choice
from stages.preview import PREVIEW_FILE
from web.bodies import VideoBody
from web.errors import ApiError, bad_field, from_check
from web.uploads import Uploads
from web.video import Video, video_id

_FRESH_SECONDS = 0.2
_SCAN_SECONDS = 1.0  # between two looks for jobs that other processes add
_ID = re.compile(r"video_([0-9a-f]{16})", re.ASCII)
_MAX_SEED = 2**32
# Without "=", which parts a name from its weight.
_LORA_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_. -]{0,99}", re.ASCII)


class Store:
    """Makes, reads and deletes the jobs of a folder; any thread may call it."""

    def __init__(
        self,
        output_dir: Path,
        model: ModelFolder,
        name: str,
        parse: Parse,
        max_queue: int,
        lora_dir: Path | None,
        wake: Callable[[], None],
    ):
        """
        Args:
            name: of the model, as clients see it.
            parse: checks the settings of a video.
            max_queue: requests that may wait.
            lora_dir: holds the LoRA files that requests may name; None offers none.
            wake: tells the worker that there is something to do.

        Raises:
            ValueError: the model cannot compute the defaults of `parse`.

        Attributes:
            defaults: settings of a request that names none.
        """
        self.output_dir, self.model, self.name = output_dir, model, name
        self.max_queue, self._lora_dir = max_queue, lora_dir
        self._parse, self._wake = parse, wake
        self._uploads = Uploads(output_dir)
        self._digest, self._library = model_digest(model), LoraLibrary(model)
        # Fails now if the server's own options make no video.
        self.defaults = self._default_settings()
        self._lock = threading.RLock()
        self._videos: dict[str, Video] = {}  # by id; those that have ended are not read again
        self._ids: dict[str, str] = {}  # by the name of the folder
        self._canceled: set[str] = set()  # ids; a worker deletes them
        self._pace = Pace([], model, "", 1)
        self._paced = 0
        self._read_at = self._scanned_at = -_SCAN_SECONDS
        self._claims = Claims()

    def __enter__(self) -> Store:
        delete_leftovers(self.output_dir)
        self._claims.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._claims.__exit__(*error)

    @property
    def preset(self) -> Preset:
        return preset_for(self.model.transformer, self.model.vae.spatial_scale)

    def videos(self) -> list[Video]:
        """All videos, the oldest first."""
        with self._lock:
            self._refresh()
            found = [v for id_, v in self._videos.items() if id_ not in self._canceled]
        return sorted(found, key=lambda video: (video.created, video.state.job.line, video.id))

    def get(self, id_: str) -> Video:
        """Raises ApiError 404 if there is no such video."""
        with self._lock:
            self._refresh()
            if _ID.fullmatch(id_) and id_ in self._videos and id_ not in self._canceled:
                return self._videos[id_]
        raise ApiError(404, "not_found", "there is no such video", "video_id")

    def create(self, body: VideoBody) -> Video:
        """Makes a job, or finds the one that makes just this video; a failed one is tried again.

        Raises:
            ApiError: the model cannot make it, or too many requests wait.
        """
        job = self._job(body)
        with self._lock:
            self._refresh()
            id_ = video_id(job)
            known = self._videos.get(id_)
            if id_ in self._canceled:
                raise ApiError(
                    409, "being_deleted", "just this video is being deleted; try again",
                    headers={"Retry-After": "1"},
                )  # fmt: skip
            if known and known.status != "failed":
                return known
            try:
                self._check_room()
            except ApiError:
                self._drop_upload(Path(job.input.path) if job.input else None)
                raise
            with _disk_errors():
                if known:
                    for stage in known.state.records:
                        if known.state.records[stage].status == "failed":
                            record_path(known.state.folder, stage).unlink(missing_ok=True)
                    folder = known.state.folder
                    job = known.state.job
                else:
                    folder = self.output_dir / job.folder
                    write_job(folder, job)
                    flush(self.output_dir)
            self._ids[folder.name] = id_
            self._videos[id_] = self._read(job, folder)
            self._number()
            video = self._videos[id_]
        self._wake()
        return video

    def delete(self, id_: str) -> None:
        """Deletes a video; one that a worker makes is stopped by it after the running step.

        Raises:
            ApiError: there is no such video.
        """
        with self._lock:
            folder = self.get(id_).state.folder
            with _disk_errors():
                try:
                    claim = self._claims.take(folder)
                    if claim:
                        delete_job(folder)
                        self._claims.release(claim)
                        self._forget(id_)
                    else:
                        write_json(folder / CANCEL_FILE, {"canceled": time.time()})
                        self._canceled.add(id_)
                except FileNotFoundError:  # someone else deleted it
                    self._forget(id_)
            self._read_at = -_SCAN_SECONDS
        self._wake()

    def fail(self, folder_name: str) -> None:
        """Reads a job again whose record was written by this process."""
        with self._lock:
            self._read_at = -_SCAN_SECONDS
            if folder_name in self._ids:
                id_ = self._ids[folder_name]
                video = self._videos[id_]
                self._videos[id_] = self._read(video.state.job, video.state.folder)

    def _job(self, body: VideoBody) -> Job:
        if body.model is not None and body.model not in (self.name, self.name.split("/")[-1]):
            raise ApiError(
                404, "model_not_found", f"model: this server has {self.name} only", "model"
            )
        settings = dict(body.settings)
        settings.setdefault("seed", secrets.randbelow(_MAX_SEED))
        upload = self._uploads.keep(body.reference) if body.reference is not None else None
        if upload:
            settings["image"] = str(upload)
        try:
            if body.lora is not None:
                settings["lora"] = [self._lora(body.lora)]
            if body.seconds is not None:
                settings["num_frames"] = self._frames(body.seconds, settings)
            parsed = self._parsed(settings)
            job = make_job(Line(0, None, parsed), self.model, self._digest, self._library)
        except (ApiError, ValueError) as error:
            with self._lock:
                self._drop_upload(upload)
            if isinstance(error, ApiError):
                raise
            raise from_check(error, self._lora_dir, upload and upload.parent) from error
        return dataclasses.replace(job, accepted=time.time())

    def _default_settings(self) -> DenoisingSettings:
        wishes = self._parsed({"prompt": "any"})
        names = [field.name for field in dataclasses.fields(DenoisingSettings)]
        return complete_settings(
            {name: getattr(wishes, name) for name in names},
            self.model,
            any_size=wishes.allow_unsupported,
            condition=likely_condition(self.model, wishes.height, wishes.width),
        )

    def _drop_upload(self, upload: Path | None) -> None:
        """Deletes an upload that no video starts from."""
        used = {v.state.job.input.path for v in self._videos.values() if v.state.job.input}
        if upload and str(upload.resolve()) not in used:
            self._uploads.delete(upload)

    def loras(self) -> dict[str, Path]:
        """The LoRA files that requests may name, by their names without the suffix."""
        if self._lora_dir is None:
            return {}
        found = sorted(self._lora_dir.glob("*.safetensors"))
        return {path.stem: path for path in found if _LORA_NAME.fullmatch(path.stem)}

    def _lora(self, text: str) -> str:
        """The command line's form of NAME or NAME=WEIGHT."""
        choice, known = parse_choice(text), self.loras()
        if choice.file not in known:
            raise bad_field("lora", f"is none of: {', '.join(known) or 'this server offers none'}")
        return f"{known[choice.file]}={choice.weight!r}"

    def _parsed(self, settings: JsonSettings) -> LineSettings:
        parsed = self._parse(settings)
        check_prompts([parsed.prompt], parsed.negative_prompt)
        return parsed

    def _frames(self, seconds: float, settings: JsonSettings) -> int:
        """The number of frames that comes nearest to a length and that the model makes."""
        preset = self.preset
        fps = settings.get("fps", preset.fps)
        steps = round(seconds * (fps if isinstance(fps, int) else preset.fps) / preset.frame_step)
        most = (preset.max_frames - 1) // preset.frame_step
        return max(1, min(steps, most)) * preset.frame_step + 1

    def _check_room(self) -> None:
        waiting = sum(video.status == "queued" for video in self._videos.values())
        if waiting >= self.max_queue:
            raise ApiError(
                429, "queue_full", f"{waiting} requests wait already; try again later",
                headers={"Retry-After": "10"},
            )  # fmt: skip

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._read_at < _FRESH_SECONDS:
            return
        if now - self._scanned_at >= _SCAN_SECONDS:
            self._scan()
            self._scanned_at = now
        for id_, video in list(self._videos.items()):
            if not video.ended or id_ in self._canceled:
                if not os.path.exists(video.state.folder):
                    self._forget(id_)
                else:
                    self._videos[id_] = self._read(video.state.job, video.state.folder)
        self._number()
        self._read_at = time.monotonic()

    def _scan(self) -> None:
        """Finds the folders that other processes made, and misses those that they removed."""
        with os.scandir(self.output_dir) as entries:
            names = {e.name for e in entries if not e.name.startswith(".") and e.is_dir()}
        for name in self._ids.keys() - names:
            self._forget(self._ids[name])
        for name in names - self._ids.keys():
            folder = self.output_dir / name
            try:
                job = read_job(folder)
            except InputError:  # being made, or damaged; `status` names it
                continue
            id_ = video_id(job)
            if job.folder != name or not _ID.fullmatch(id_):
                continue
            self._ids[name] = id_
            self._videos[id_] = self._read(job, folder)
            if os.path.exists(folder / CANCEL_FILE):
                self._canceled.add(id_)

    def _forget(self, id_: str) -> None:
        video = self._videos.pop(id_, None)
        if video:
            self._ids.pop(video.state.folder.name, None)
            start = video.state.job.input
            if start:
                self._drop_upload(Path(start.path))
        self._canceled.discard(id_)

    def _read(self, job: Job, folder: Path) -> Video:
        state = read_state(job, folder, time.time(), lambda problem: None)
        completed = None
        if state.status == "done":
            completed = max(r.started + r.seconds for r in state.records.values())
        created = job.accepted
        if created is None:
            created = min((r.started for r in state.records.values()), default=0.0)
        return Video(state, created, completed, _version(folder / PREVIEW_FILE))

    def _number(self) -> None:
        """Counts the queue, and estimates when each video is done."""
        done = [v.state for v in self._videos.values() if v.status == "completed"]
        if len(done) != self._paced:
            self._pace, self._paced = Pace(done, self.model, "", 1), len(done)
        open_ = sorted(
            (v for v in self._videos.values() if not v.ended),
            key=lambda video: (video.status == "queued", video.created, video.state.job.line),
        )
        position, until = 0, 0.0
        known = True
        for video in open_:
            position += video.status == "queued"
            own = self._seconds_left(video)
            known = known and own is not None
            until += own or 0.0
            self._videos[video.id] = dataclasses.replace(
                video,
                position=position if video.status == "queued" else None,
                seconds_left=until if known else None,
            )

    def _seconds_left(self, video: Video) -> float | None:
        steps = video.state.steps
        if steps and steps.total:
            return steps.seconds_left(time.time())
        return self._pace.seconds(video.state.job)


def _version(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns // 1_000_000
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Turns errors of the disk into an answer."""
    try:
        yield
    except WriteError as error:
        raise ApiError(507, "no_space", "the disk is full or cannot be written") from error
