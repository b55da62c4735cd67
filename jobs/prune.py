"""Delete the folders of superseded jobs: those whose line of the job file has changed."""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from pathlib import Path

from jobs.claims import CLAIMS_FOLDER, Claims, is_claims_file
from jobs.gallery import Gallery
from jobs.mirror import Mirror
from jobs.records import Job, JobState, is_job_file, read_batch
from jobs.superseded import find_superseded
from runtime.errors import InputError, RunError, checking_input
from runtime.text import printable

_TEMPORARY = re.compile(r"\.(.+?\.[a-z0-9]+)\..+\.tmp")


@dataclasses.dataclass(frozen=True)
class PruneOptions:
    """Options of `batch.py prune`, by the names of the command line."""

    folder: Path
    dry_run: bool = False
    yes: bool = False
    mirror: str | None = None


def run(options: PruneOptions) -> None:
    """Lists the superseded jobs and, with `yes`, deletes this project's files in their folders.

    Files of others stay, with their folder. So do jobs that a process works on. Copies in the
    mirror are deleted first, so that the same command finds the job again if the mirror fails.

    Raises:
        InputError: the folder cannot be read, or there is something to delete without `yes`.
        ValueError: the mirror's URL is of no known kind.
        RunError: the mirror cannot be written.
    """
    with checking_input():
        mirror = Mirror(options.mirror, options.folder) if options.mirror else None
    states = read_batch(options.folder)
    superseded = find_superseded(options.folder, states)
    old = [state for state in states if _is_ours(state) and state.job.id in superseded]
    old = [state for state in old if not state.claimed]
    for state in old:
        size = sum(path.lstat().st_size for path in state.folder.iterdir())
        print(printable(f"superseded: {state.folder.name}, {size / 1e6:,.1f} MB"))
    if not old:
        print("no job is superseded")
        return
    if options.dry_run:
        return
    if not options.yes:
        raise InputError(f"nothing was deleted; --yes deletes the {len(old)} folder(s) above")
    with Claims() as claims:
        for state in old:
            if claims.take(state.folder) is None:
                print(printable(f"kept {state.folder.name}: a process works on it"))
                continue
            if mirror:
                _delete_copies(mirror, state.job)
            kept = delete_folder(state.folder)
            if kept:
                print(printable(f"kept {state.folder.name}: not of this project: {kept[0]}"))
            else:
                print(printable(f"deleted {state.folder.name}"))
    Gallery(options.folder).update(now=True)


def _is_ours(state: JobState) -> bool:
    """Whether the folder is that of its job, and no link to another one."""
    return state.folder.name == state.job.folder and not state.folder.is_symlink()


def _delete_copies(mirror: Mirror, job: Job) -> None:
    try:
        deleted = mirror.delete(job)
    except Exception as error:  # of any file system
        raise RunError(f"{job.folder} was not deleted in the mirror: {error}") from error
    print(printable(f"deleted {deleted} file(s) of {job.folder} in the mirror"))


def delete_folder(path: Path) -> list[str]:
    """Deletes a job's files, its claims last; returns the names of what stays."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        for name in os.listdir(folder):
            unfinished = _TEMPORARY.fullmatch(name)
            if is_job_file(unfinished[1] if unfinished else name):
                _unlink(name, folder)
        kept = [name for name in os.listdir(folder) if name != CLAIMS_FOLDER]
        if kept:
            return kept
        claims = os.open(CLAIMS_FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
        try:
            for name in os.listdir(claims):
                if is_claims_file(name):
                    _unlink(name, claims)
            kept = [f"{CLAIMS_FOLDER}/{name}" for name in os.listdir(claims)]
        finally:
            os.close(claims)
        if not kept:
            os.rmdir(CLAIMS_FOLDER, dir_fd=folder)
            path.rmdir()
        return kept
    finally:
        os.close(folder)


def _unlink(name: str, folder: int) -> None:
    """Removes a regular file."""
    if stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=folder)
