"""One process's share of a batch: claims free jobs, runs their stages, and records the results.

Stage 1 runs for all jobs first, with one load of the text encoder. Then jobs are denoised, shape by
shape, while a thread decodes the previous video. Any number of processes may work on one folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from cogvideox.model.folder import ModelFolder
from jobs.claims import Claim, Claims, is_claimed
from jobs.gallery import Gallery
from jobs.ledger import CONFIG, DONE, FAILED, Counts, Ledger, config_is_good, recorded_sections
from jobs.mirror import Mirror
from jobs.options import BatchOptions
from jobs.records import (
    STAGES,
    Job,
    StageRecord,
    inputs,
    outputs,
    record_path,
    worker_name,
    write_job,
    write_record,
)
from jobs.steps import STEPS_FILE, show_activity, show_steps
from runtime.errors import InputError, RunError
from runtime.files import write_json
from runtime.open_folder import OpenFolder
from runtime.progress import working
from runtime.text import printable
from stages import files
from stages.denoise import StoppedBetweenSteps
from stages.lora import LoraChoice
from stages.session import Session, Shape

ENCODE, DENOISE, DECODE = STAGES
# These errors concern the disk, not one job.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_DECODES_WAITING = 2
_POLL_SECONDS = 2.0


class Runner:
    """Works on the jobs of a batch until none is left."""

    def __init__(
        self,
        jobs: Sequence[Job],
        model: ModelFolder,
        options: BatchOptions,
        stop: threading.Event,
        rank: int = 0,
    ):
        """
        Args:
            stop: ends the run after the running stage, or at a checkpoint.
            rank: of this process among those started together; each begins with another shape.
        """
        self._jobs = jobs
        self._options = options
        self._output_dir = options.output_dir
        self._stop = stop
        self._abort = threading.Event()
        self._rank = rank
        self._session = Session(model, stop, self._abort, show_steps, show_activity)
        self._stages = options.stages
        self._gallery = Gallery(self._output_dir)
        self.ledger = Ledger(self._output_dir, self._stages, options.retry_failed)
        self._expiry = options.claim_expiry
        self._mirror = Mirror(options.mirror, self._output_dir) if options.mirror else None
        self._unprepared: dict[tuple[str, Shape, tuple[LoraChoice, ...]], Exception] = {}
        self._videos_since: float | None = None
        self._done_before = 0

    def check(self) -> None:
        """Checks everything that needs no weights.

        Raises:
            ValueError: a job cannot be computed.
        """
        requests = [self._options.request(job) for job in self._jobs]
        with working(f"checking {len(requests)} job(s): importing JAX, starting the devices"):
            self._session.check(requests, self._stages, self._output_dir)

    def fetch(self) -> None:
        """Fetches files that this machine lacks from the mirror.

        Raises:
            RunError: the mirror cannot be read.
        """
        if self._mirror:
            try:
                fetched = self._mirror.pull(self._jobs)
            except Exception as error:  # of any file system
                raise RunError(f"the mirror cannot be read: {error}") from error
            print(f"{fetched} file(s) fetched from the mirror")

    def copy(self) -> None:
        """Copies the files that the mirror lacks.

        Raises:
            RunError: the mirror cannot be written.
        """
        if self._mirror is None:
            return
        for job in self._jobs:
            try:
                self._mirror.push(job)
            except Exception as error:  # of any file system
                raise RunError(
                    f"{job.folder} was not copied to the mirror; the same command will retry: "
                    f"{error}"
                ) from error

    def mesh(self, shape: Shape) -> dict[str, int]:
        """The mesh of the transformer for a shape that `check` has passed."""
        return self._session.mesh(shape)

    def run(self) -> Counts:
        """Works until no job is left or `stop` is set; waits for jobs of other processes.

        Raises:
            RunError: the disk is full, or the output folder was removed.
        """
        with OpenFolder(self._output_dir) as self._folder, Claims(self._expiry) as self._claims:
            self._gallery.update(now=True)
            try:
                self._work_until_done()
                self._folder.check()
            except BaseException:
                self._abort.set()
                raise
        self._gallery.update(now=True)
        return self.ledger.count(self._jobs)

    def _work_until_done(self) -> None:
        waiting = looked_again = False
        while not self._stop.is_set():
            self._folder.check()
            needs = {job: self.ledger.next(job) for job in self._jobs}
            todo = {job: need for job, need in needs.items() if need not in (DONE, FAILED)}
            if not todo:
                if looked_again:
                    return
                # Files of finished jobs may have been removed since.
                self.ledger.forget_done()
                looked_again = True
                continue
            looked_again = False
            light = [job for job, need in todo.items() if need in (ENCODE, CONFIG)]
            worked = self._encode(light) + self._make_videos(list(todo))
            if not worked:
                if not waiting:
                    print(f"waiting for {len(todo)} job(s) of other processes")
                self._stop.wait(_POLL_SECONDS)
            waiting = not worked

    def _encode(self, jobs: Sequence[Job]) -> int:
        """Runs stage 1 of all free jobs; returns how many it worked on."""
        worked = 0
        with contextlib.ExitStack() as stack:
            for job, claim in self._taken(jobs):
                need = self.ledger.next(job)
                if need == CONFIG:
                    self._repair_config(job)
                elif need == ENCODE:
                    if not worked:
                        stack.enter_context(working(f"encoding {len(jobs)} prompt(s)"))
                    self._do(ENCODE, job, claim)
                worked += need in (CONFIG, ENCODE)
                self._finish(job, claim)
        self._session.release_text_encoder()
        return worked

    def _make_videos(self, jobs: Sequence[Job]) -> int:
        """Runs stages 2 and 3 of all free jobs; returns how many it worked on."""
        worked = 0
        decodes: deque[Future] = deque()
        pool = ThreadPoolExecutor(1, "decode")
        try:
            for job, claim in self._taken(self._by_shape(jobs)):
                need = self.ledger.next(job)
                worked += need in (DENOISE, DECODE)
                if need in (DENOISE, DECODE) and self._videos_since is None:
                    self._videos_since = time.monotonic()
                    self._done_before = self.ledger.count(self._jobs).done
                if need == DENOISE:
                    self._do(DENOISE, job, claim)
                    need = self.ledger.next(job)
                if need == DECODE and not self._stop.is_set():
                    decodes.append(pool.submit(self._decode, job, claim))
                    while len(decodes) > _DECODES_WAITING or decodes and decodes[0].done():
                        _wait_for(decodes.popleft())
                else:
                    self._finish(job, claim)
            if decodes:
                with working(f"decoding {len(decodes)} more video(s)"):
                    for decode in decodes:
                        decode.result()
        except BaseException:
            self._abort.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return worked

    def _decode(self, job: Job, claim: Claim) -> None:
        if not self._stop.is_set():
            self._do(DECODE, job, claim)
        self._finish(job, claim)

    def _release(self, job: Job, claim: Claim) -> None:
        try:
            if self._mirror:
                self._mirror.push(job)
        except Exception as error:  # of any file system; the next copy retries
            print(f"warning: {job.folder} was not copied to the mirror: {error}")
        (self._output_dir / job.folder / STEPS_FILE).unlink(missing_ok=True)
        self._claims.release(claim)

    def _finish(self, job: Job, claim: Claim) -> None:
        self._release(job, claim)
        if not self._stop.is_set() and self.ledger.next(job) in (DONE, FAILED):
            print(f"{self._progress()}: {job.folder}")
            self._gallery.update()

    def _progress(self) -> str:
        counts = self.ledger.count(self._jobs)
        line = f"[{counts.done} done, {counts.failed} failed, {counts.left} left]"
        made = counts.done - self._done_before
        if not made or self._videos_since is None:
            return line
        each = (time.monotonic() - self._videos_since) / made
        eta = time.strftime("%H:%M:%S", time.localtime(time.time() + each * counts.left))
        return f"{line} {each:.1f} s a video, ETA {eta}"

    def _taken(self, jobs: Sequence[Job] | Iterator[Job]) -> Iterator[tuple[Job, Claim]]:
        """Claims and yields the jobs that no other process works on."""
        for job in jobs:
            if self._stop.is_set():
                return
            if self.ledger.next(job) in (DONE, FAILED):
                continue
            self._folder.check()
            folder = self._output_dir / job.folder
            try:
                write_job(folder, job)
                claim = self._claims.take(folder)
            except (OSError, InputError) as error:
                self._require_disk(error)
                self.ledger.fail(job, f"cannot be claimed: {error}")
                continue
            if claim:
                yield job, claim

    def _by_shape(self, jobs: Sequence[Job]) -> Iterator[Job]:
        """Yields the jobs shape by shape, next the shape that the fewest others work on."""
        groups: dict[Shape, list[Job]] = {}
        for job in jobs:
            groups.setdefault(job.shape, []).append(job)
        order = list(groups)
        order = order[self._rank % len(order) :] + order[: self._rank % len(order)]
        while order:
            now = time.time()
            claimed = {
                shape: sum(is_claimed(self._output_dir / j.folder, now) for j in groups[shape])
                for shape in order
            }
            shape = min(order, key=claimed.__getitem__)
            order.remove(shape)
            # Jobs with the same LoRAs come together: a change loads weights.
            loras = list(dict.fromkeys(job.loras for job in groups[shape]))
            yield from sorted(groups[shape], key=lambda job: loras.index(job.loras))

    def _do(self, stage: str, job: Job, claim: Claim) -> None:
        """Runs one stage of a claimed job and writes its record; records a failure, not raises."""
        if not self._still_holds(job, claim):
            return
        earlier = self.ledger.records(job).get(stage)
        attempt = earlier.attempt + 1 if earlier else 1
        record = StageRecord(stage, "interrupted", attempt, worker_name(), time.time())
        try:
            self._check_record_path(stage, job)
            self._restore_config(job)
            end = self._work(stage, job)
        except StoppedBetweenSteps:
            end = {}
        except Exception as error:
            self._folder.check()
            self._require_disk(error)
            line = " ".join(str(error).split()) or type(error).__name__
            if not isinstance(error, ValueError | RunError):
                line = f"{type(error).__name__}: {line}"
            end = {"status": "failed", "error": line, "traceback": traceback.format_exc()}
            print(f"failed: {job.folder}: {stage}: {printable(line)}")
        except BaseException:
            self._write_record(record, job, claim)
            raise
        self._write_record(dataclasses.replace(record, **end), job, claim)

    def _still_holds(self, job: Job, claim: Claim) -> bool:
        """Whether the job is still this process's; a process that slept too long has lost it."""
        self._folder.check()
        if self._claims.holds(claim):
            return True
        if claim.path.exists():
            print(f"warning: another process has taken over {job.folder}; this one was too slow")
        else:
            print(f"warning: the folder of {job.folder} was removed; it will be made again")
        return False

    def _write_record(self, record: StageRecord, job: Job, claim: Claim) -> None:
        """Writes how a stage ended, if the job is still this process's."""
        if not self._still_holds(job, claim):
            return
        try:
            write_record(self._output_dir / job.folder, record)
        except OSError as error:
            self._require_disk(error)
            self.ledger.fail(job, f"its record cannot be written: {error}")

    def _check_record_path(self, stage: str, job: Job) -> None:
        """Checks that the record can be written, before the work.

        Raises:
            InputError: a folder is in its place.
        """
        path = record_path(self._output_dir / job.folder, stage)
        if path.is_dir():
            raise InputError(f"{path} is a folder; delete it")

    def _require_disk(self, error: BaseException) -> None:
        """Raises RunError if an error says that the disk is full or read-only."""
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
                raise RunError(
                    f"{self._output_dir} cannot be written: {cause.strerror}; the same command "
                    "resumes when it can"
                ) from error
            cause = cause.__cause__ or cause.__context__

    def _work(self, stage: str, job: Job) -> dict:
        """Runs a stage; returns the last fields of its record."""
        folder = self._output_dir / job.folder
        key = (stage, job.shape, job.loras if stage == DENOISE else ())
        request = self._options.request(job)
        if key in self._unprepared:  # preparing would fail again
            raise self._unprepared[key]
        try:
            self._session.prepare(stage, request)
        except Exception as error:
            self._unprepared[key] = error
            raise
        start = time.perf_counter()
        self._session.run(stage, request)
        return {
            "status": "done",
            "seconds": round(time.perf_counter() - start, 4),
            "inputs": self.ledger.checksums(folder, inputs(job, stage)),
            "outputs": self.ledger.checksums(folder, outputs(job, stage)),
            "section": files.read_config(folder)[stage],
        }

    def _repair_config(self, job: Job) -> None:
        """Restores the config of a job that needs nothing else; the job fails if that fails."""
        try:
            self._restore_config(job)
        except OSError as error:
            self._require_disk(error)
            self.ledger.fail(job, f"its {files.CONFIG_FILE} cannot be written: {error}")

    def _restore_config(self, job: Job) -> None:
        """Writes generation_config.json from the records if it is damaged or missing."""
        folder = self._output_dir / job.folder
        records = self.ledger.records(job)
        if not config_is_good(folder, records):
            version = {"format_version": files.FORMAT_VERSION}
            write_json(folder / files.CONFIG_FILE, version | recorded_sections(records))


def _wait_for(decode: Future) -> None:
    if not decode.done():
        with working("waiting for the decoder"):
            decode.result()
    decode.result()
