"""One process's share of a batch: claims free jobs, runs their stages, and records the results.

Stage 1 runs for all jobs first, with one load of the text encoder. Then jobs are denoised, shape by
shape, while a thread decodes the previous video. Any number of processes may work on one folder.
"""

from __future__ import annotations

import dataclasses
import errno
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from cogvideox.model.folder import ModelFolder
from jobs.claims import Claim, Claims, is_claimed
from jobs.gallery import Gallery
from jobs.mirror import Mirror
from jobs.options import BatchOptions
from jobs.records import (
    INPUTS,
    OUTPUTS,
    STAGES,
    Job,
    StageRecord,
    checksum,
    read_records,
    worker_name,
    write_record,
)
from runtime.errors import InputError, RunError
from runtime.files import write_json
from stages import files
from stages.denoise import StoppedBetweenSteps
from stages.session import Session, Shape

ENCODE, DENOISE, DECODE = STAGES
# What a job may need besides one of its stages.
DONE, FAILED, CONFIG = "done", "failed", "config"

_DECODES_WAITING = 2
_POLL_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Counts:
    """How many jobs of a batch are done (all wanted stages are), failed, and left."""

    done: int
    failed: int
    left: int


class Ledger:
    """Tells what each job needs next, from its records and the checksums of its files."""

    def __init__(self, output_dir: Path, stages: Sequence[str], retry_failed: bool):
        """
        Args:
            stages: the wanted ones.
            retry_failed: ignore failures that were recorded before now.
        """
        self._output_dir = output_dir
        self._stages = stages
        self._forget_before = time.time() if retry_failed else 0.0
        self._checksums: dict[Path, tuple[tuple[int, ...], str]] = {}
        self._done: set[Job] = set()  # checked once a run

    def next(self, job: Job) -> str:
        """The first wanted stage whose files are missing or differ; or CONFIG, FAILED or DONE."""
        if job in self._done:
            return DONE
        folder = self._output_dir / job.folder
        records = read_records(folder)
        failed = [record for record in records.values() if record.status == "failed"]
        if any(record.started >= self._forget_before for record in failed):
            return FAILED
        for stage in self._stages:
            if not self._is_good(folder, stage, records):
                return stage
        if not _config_is_good(folder, records):
            return CONFIG
        self._done.add(job)
        return DONE

    def lacks(self, job: Job, stages: Sequence[str]) -> bool:
        """Whether files of these stages are missing or differ from their records."""
        folder = self._output_dir / job.folder
        records = read_records(folder)
        return not all(self._is_good(folder, stage, records) for stage in stages)

    def count(self, jobs: Sequence[Job]) -> Counts:
        states = [self.next(job) for job in jobs]
        done, failed = states.count(DONE), states.count(FAILED)
        return Counts(done, failed, len(jobs) - done - failed)

    def checksums(self, folder: Path, names: Sequence[str]) -> dict[str, str]:
        """The sha256 of files by name. A file is read again only if it changed.

        Raises:
            FileNotFoundError: a file is missing.
        """
        return {name: self._checksum(folder / name) for name in names}

    def _checksum(self, path: Path) -> str:
        stat = path.stat()
        version = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if self._checksums.get(path, (None,))[0] != version:
            self._checksums[path] = version, checksum(path)
        return self._checksums[path][1]

    def _is_good(self, folder: Path, stage: str, records: dict[str, StageRecord]) -> bool:
        """Whether a stage's files are the recorded ones, made from the files recorded now."""
        record = records.get(stage)
        if record is None or record.status != "done":
            return False
        made: dict[str, str] = {}
        for before in STAGES[: STAGES.index(stage)]:
            made |= records[before].outputs if before in records else {}
        if any(made.get(name) != value for name, value in record.inputs.items()):
            return False
        try:
            return self.checksums(folder, OUTPUTS[stage]) == record.outputs
        except FileNotFoundError:
            return False


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
        self._session = Session(model, stop, self._abort)
        self._stages = options.stages
        self._gallery = Gallery(self._output_dir)
        self.ledger = Ledger(self._output_dir, self._stages, options.retry_failed)
        self._expiry = options.claim_expiry
        self._mirror = Mirror(options.mirror, self._output_dir) if options.mirror else None
        self._unprepared: dict[tuple[str, Shape], Exception] = {}
        self._videos_since: float | None = None
        self._done_before = 0

    def check(self) -> None:
        """Checks everything that needs no weights.

        Raises:
            ValueError: a job cannot be computed.
        """
        requests = [self._options.request(job) for job in self._jobs]
        self._session.check(requests, self._stages, self._output_dir)

    def fetch(self) -> None:
        """Fetches files that this machine lacks from the mirror."""
        if self._mirror:
            fetched = self._mirror.pull(self._jobs)
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
            RunError: the disk is full.
        """
        self._gallery.update(now=True)
        with Claims(self._expiry) as self._claims:
            try:
                waiting = False
                while not self._stop.is_set():
                    needs = {job: self.ledger.next(job) for job in self._jobs}
                    todo = {job: need for job, need in needs.items() if need not in (DONE, FAILED)}
                    if not todo:
                        break
                    light = [job for job, need in todo.items() if need in (ENCODE, CONFIG)]
                    worked = self._encode(light) + self._make_videos(list(todo))
                    if not worked:
                        if not waiting:
                            print(f"waiting for {len(todo)} job(s) of other processes")
                        self._stop.wait(_POLL_SECONDS)
                    waiting = not worked
            except BaseException:
                self._abort.set()
                raise
        self._gallery.update(now=True)
        return self.ledger.count(self._jobs)

    def _encode(self, jobs: Sequence[Job]) -> int:
        """Runs stage 1 of all free jobs; returns how many it worked on."""
        worked = 0
        for job, claim in self._taken(jobs):
            need = self.ledger.next(job)
            if need == CONFIG:
                self._restore_config(job)
            elif need == ENCODE:
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
                        decodes.popleft().result()
                else:
                    self._finish(job, claim)
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
            claim = self._claims.take(self._output_dir / job.folder)
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
            yield from groups[shape]

    def _do(self, stage: str, job: Job, claim: Claim) -> None:
        """Runs one stage of a claimed job and writes its record; records a failure, not raises."""
        folder = self._output_dir / job.folder
        self._restore_config(job)
        earlier = read_records(folder).get(stage)
        attempt = earlier.attempt + 1 if earlier else 1
        record = StageRecord(stage, "running", attempt, worker_name(), time.time())
        write_record(folder, record)
        try:
            end = self._work(stage, job)
        except StoppedBetweenSteps:
            end = {"status": "interrupted"}
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                write_record(folder, dataclasses.replace(record, status="interrupted"))
                raise RunError(f"the disk of {self._output_dir} is full") from error
            line = " ".join(str(error).split()) or type(error).__name__
            if not isinstance(error, ValueError | RunError):
                line = f"{type(error).__name__}: {line}"
            end = {"status": "failed", "error": line, "traceback": traceback.format_exc()}
            print(f"failed: {job.folder}: {stage}: {line}")
        except BaseException:
            write_record(folder, dataclasses.replace(record, status="interrupted"))
            raise
        if self._claims.holds(claim):
            write_record(folder, dataclasses.replace(record, **end))
        else:
            print(f"warning: another process has taken over {job.folder}; this one was too slow")

    def _work(self, stage: str, job: Job) -> dict:
        """Runs a stage; returns the last fields of its record."""
        folder, key = self._output_dir / job.folder, (stage, job.shape)
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
            "inputs": self.ledger.checksums(folder, INPUTS[stage]),
            "outputs": self.ledger.checksums(folder, OUTPUTS[stage]),
            "section": files.read_config(folder)[stage],
        }

    def _restore_config(self, job: Job) -> None:
        """Writes generation_config.json from the records if it is damaged or missing."""
        folder = self._output_dir / job.folder
        records = read_records(folder)
        if not _config_is_good(folder, records):
            sections = {r.stage: r.section for r in records.values() if r.status == "done"}
            version = {"format_version": files.FORMAT_VERSION}
            write_json(folder / files.CONFIG_FILE, version | sections)


def _config_is_good(folder: Path, records: dict[str, StageRecord]) -> bool:
    sections = {r.stage: r.section for r in records.values() if r.status == "done"}
    if not sections:
        return True
    try:
        config = files.read_config(folder)
    except InputError:
        return False
    return all(config.get(stage) == section for stage, section in sections.items())
