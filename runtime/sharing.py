"""Moving artifacts between machines: any folder, bucket or Hugging Face repository fsspec reaches.

hf://owner/repository/path    gs://bucket/path    /mnt/shared/executables
"""

import contextlib
import io
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import fsspec
import huggingface_hub
from fsspec.implementations.local import LocalFileSystem

from runtime.artifacts import Refused, is_artifact_name, read_artifact, read_manifest_bytes
from runtime.errors import InputError, RunError
from runtime.files import atomic_path, open_regular
from runtime.text import printable
from runtime.trusted_folders import check_trusted, is_digest, make_folder, manifest_digest

_UNUSED_SECONDS = 30 * 86400.0


def push(folder: Path, destination: str) -> list[str]:
    """Copies every whole artifact of `folder` that `destination` lacks.

    An executable goes before its manifest, so that nobody finds half an artifact.

    Returns:
        The names of the manifests copied.

    Raises:
        RunError: the destination cannot be reached or written.
    """
    with _reaching(destination):
        filesystem, root = fsspec.url_to_fs(destination)
        if destination.startswith("hf://"):
            huggingface_hub.create_repo("/".join(root.split("/")[:2]), exist_ok=True)
        filesystem.makedirs(root, exist_ok=True)
    copied = []
    for path in sorted(folder.glob("*.json")):
        with _reaching(destination):
            if filesystem.exists(f"{root}/{path.name}"):
                continue
        try:
            artifact = read_artifact(path.name, lambda name: open_regular(folder / name))
        except Refused as refused:
            print(f"not pushed: {refused}")
            continue
        with _reaching(destination):
            for name, data in artifact.files.items():
                # Where the file system can, a file appears when it is whole.
                with filesystem.transaction, filesystem.open(f"{root}/{name}", "wb") as stream:
                    stream.write(data)
        copied.append(path.name)
    return copied


def pull(source: str, folder: Path, digest: str | None = None) -> list[str]:
    """Copies every whole artifact of `source` that `folder` lacks. Overwrites nothing.

    Args:
        digest: of the source's manifests, as `manifest_digest` returns it. None: a folder of this
            machine must be one that only the user can write; buckets and repositories are taken as
            they are.

    Returns:
        The names of the manifests copied.

    Raises:
        InputError: the source is no folder, others can write it, or its digest is another.
        RunError: the source cannot be reached, or the folder cannot be written.
    """
    with _reaching(source):
        filesystem, root = fsspec.url_to_fs(source)
        if not filesystem.isdir(root):
            raise InputError(f"{printable(source)} is not a folder")
        names = sorted(PurePosixPath(path).name for path in filesystem.ls(root, detail=False))

    if isinstance(filesystem, LocalFileSystem):
        if digest is None:
            check_trusted(Path(root), "--pull")

        def open_file(name: str) -> BinaryIO:
            return open_regular(Path(root, name))

    else:

        def open_file(name: str) -> BinaryIO:
            with _reaching(source):
                return filesystem.open(f"{root}/{name}", "rb")

    names = [name for name in names if name.endswith(".json")]
    manifests = None if digest is None else read_trusted_manifests(names, open_file, digest, source)
    copied = []
    for name in names:
        try:
            if _copy(name, open_file, folder, manifests):
                copied.append(name)
        except Refused as refused:
            print(f"not pulled: {refused}")
    return copied


def read_trusted_manifests(
    names: list[str], open_file: Callable[[str], BinaryIO], digest: str, source: str
) -> dict[str, bytes]:
    """Reads all manifests of a folder and compares their digest.

    Raises:
        InputError: they have another digest.
    """
    manifests = {}
    for name in names:
        try:
            manifests[name] = read_manifest_bytes(name, open_file)
        except Refused as refused:
            raise InputError(f"{printable(source)}: {refused}") from refused
        except OSError as error:
            raise InputError(f"{printable(source)}: {printable(str(error))}") from error
    found = manifest_digest(manifests)
    if found != digest:
        raise InputError(
            f"{printable(source)} has the digest {found}, not {digest} of --trust_executables"
        )
    return manifests


def trusted_copy(folder: Path, digest: str, cache: Path) -> Path:
    """Copies the artifacts of a folder that others can write to one of the user's own.

    Nobody can change them between the check and the loading then.

    Args:
        digest: of the folder's manifests.
        cache: the user's cache folder.

    Returns:
        The folder of the copies.

    Raises:
        InputError: the manifests have another digest, or others can change the cache.
        RunError: the copies cannot be written.
    """
    make_folder(cache)
    check_trusted(cache, "compilation cache")
    copies = cache / "trusted" / digest
    pull(str(folder.absolute()), copies, digest)
    if copies.is_dir():
        os.utime(copies)
    _remove_unused_copies(copies)
    return copies


def _remove_unused_copies(used: Path) -> None:
    """Deletes the copies beside `used` that no run has taken for a month."""
    month_ago = time.time() - _UNUSED_SECONDS
    with contextlib.suppress(FileNotFoundError):  # another process deletes them, too
        for folder in used.parent.iterdir():
            found = folder.lstat()
            old = stat.S_ISDIR(found.st_mode) and found.st_mtime < month_ago
            if old and is_digest(folder.name) and folder != used:
                shutil.rmtree(folder)


def _copy(
    name: str,
    open_file: Callable[[str], BinaryIO],
    folder: Path,
    manifests: Mapping[str, bytes] | None,
) -> bool:
    """Copies one artifact unless it is there.

    Args:
        manifests: those to use instead of the source's, which may have changed since.

    Raises:
        Refused: it is not whole, or a file of the folder is in its way.
        RunError: it cannot be written.
    """
    if is_artifact_name(name, "json") and _exists(folder / name):
        return False

    def open_checked(file: str) -> BinaryIO:
        return io.BytesIO(manifests[file]) if manifests and file in manifests else open_file(file)

    artifact = read_artifact(name, open_checked)
    new = {file: data for file, data in artifact.files.items() if not _same(folder / file, data)}
    make_folder(folder)
    for file, data in new.items():
        with atomic_path(folder / file) as temporary:
            temporary.write_bytes(data)
    return True


def _exists(path: Path) -> bool:
    """Whether a file has this name, links to nowhere included."""
    return path.exists(follow_symlinks=False)


def _same(path: Path, data: bytes) -> bool:
    """Whether a file is there already.

    Raises:
        Refused: one of other contents has its name.
    """
    if not _exists(path):
        return False
    try:
        with open_regular(path) as file:
            same = file.read(len(data) + 1) == data
    except (InputError, OSError):
        same = False
    if not same:
        raise Refused(f"{path.name}: {printable(str(path.parent))} has another file of this name")
    return True


@contextlib.contextmanager
def _reaching(place: str) -> Iterator[None]:
    """Turns what file systems raise into one line.

    Every plugin of fsspec has exceptions of its own: httpx's for `hf://`, aiohttp's and botocore's
    for buckets.

    Raises:
        RunError: naming the place and the reason.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:
        reason = " ".join(printable(str(error)).split()) or type(error).__name__
        raise RunError(f"cannot reach {printable(place)}: {reason}") from error
