"""Which folders may hold executables: those that only their user can change.

Loading an executable runs code: it is a pickle that holds machine code. JAX reads both with pickle
(`jax.experimental.serialize_executable`), so no container of this project could make a foreign
executable safe. A checksum in a manifest detects damage, not malice: whoever writes the executable
writes the manifest. So a folder is read only if its owner is the user or root and nobody else can
write it, or if the user names the digest of its manifests.
"""

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from runtime.errors import InputError
from runtime.text import printable

_MOST_LINKS = 40  # as Linux's limit
_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_trusted(folder: Path, what: str) -> None:
    """Checks that only the user and root can change the files of a folder.

    The folder and its files must belong to the user or root, and nobody else may write them. The
    same holds for every folder above and for symbolic links, except that sticky folders above, such
    as /tmp, may be writable: nobody can rename what others own there. Below a folder that only the
    user can enter, permissions do not matter. A private group, which has the user's name and no
    other members, counts as the user.

    Args:
        what: names the folder in the message, such as "--executables".

    Raises:
        InputError: naming the file or folder that others can change, and the reason.
    """
    try:
        path, private = _check_way(folder)
        with os.scandir(path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    if entry.is_symlink():
                        _check_way(Path(entry.path))
                    else:
                        _check(Path(entry.path), entry.stat(follow_symlinks=False), private)
    except _Untrusted as refusal:
        raise InputError(
            f"{what} {printable(str(folder))} may not hold executables, which are code: {refusal}"
        ) from None
    except OSError as error:
        raise InputError(f"{what} {printable(str(folder))}: {error.strerror}") from error


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it, that nobody else can write, whatever the umask.

    Raises:
        OSError: it cannot be made, or a file has its name.
    """
    missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
    for path in reversed(missing):
        path.mkdir(0o755, exist_ok=True)


def manifest_digest(manifests: Mapping[str, bytes]) -> str:
    """The digest that `--trust_executables` takes, of manifests by file name.

    Every manifest holds the checksum of its executable, so the digest covers both. It equals the
    output of ``LC_ALL=C sha256sum *.json | sha256sum`` in the folder.
    """
    lines = [
        f"{hashlib.sha256(manifests[name]).hexdigest()}  {name}\n" for name in sorted(manifests)
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def parse_digest(text: str) -> str:
    """An argparse type: a digest as `manifest_digest` returns it.

    Raises:
        ValueError: it is not 64 hexadecimal digits.
    """
    if not _DIGEST.fullmatch(text.lower()):
        raise ValueError(f"{text!r} is not 64 hexadecimal digits")
    return text.lower()


def is_digest(name: str) -> bool:
    """Whether a name is a digest as `manifest_digest` returns it."""
    return bool(_DIGEST.fullmatch(name))


class _Untrusted(Exception):
    """Somebody else can change a file; the message says why."""


def _check_way(path: Path) -> tuple[Path, bool]:
    """Checks a path, and every folder and link on the way to it.

    Returns:
        The path without links, and whether only the user can enter it or a folder above it.
    """
    real, links = _resolve(path)
    for link in links:
        _check_chain(link)
    return real, _check_chain(real)


def _resolve(path: Path) -> tuple[Path, list[Path]]:
    """A path without links, and the links that the system follows on the way, without links."""
    current, links = Path("/"), []
    pending = list(reversed(path.absolute().parts[1:]))
    while pending:
        part = pending.pop()
        if part == "..":
            current = current.parent
            continue
        place = current / part
        if not place.is_symlink():
            current = place
            continue
        links.append(place)
        if len(links) > _MOST_LINKS:
            raise _Untrusted(f"{printable(str(path))} has too many symbolic links")
        target = place.readlink()
        current = Path("/") if target.is_absolute() else current
        pending += reversed(target.parts[1:] if target.is_absolute() else target.parts)
    return current, links


def _check_chain(path: Path) -> bool:
    """Checks a path without links and the folders above it; see `_check_way` for the result."""
    private = False
    for place in (*reversed(path.parents), path):
        status = place.lstat()
        _check(place, status, private, sticky=place != path)
        entered_by_others = status.st_mode & 0o011 or not stat.S_ISDIR(status.st_mode)
        private = private or (not entered_by_others and status.st_uid == os.geteuid())
    return private


def _check(path: Path, status: os.stat_result, private: bool, *, sticky: bool = False) -> None:
    """Checks the owner and the permissions of one file.

    Args:
        private: only the user can reach it.
        sticky: allow a sticky folder that others can write.
    """
    shown = printable(str(path))
    if status.st_uid not in (0, os.geteuid()):
        raise _Untrusted(f"{shown} belongs to {_user(status.st_uid)}")
    if private or stat.S_ISLNK(status.st_mode) or (sticky and status.st_mode & stat.S_ISVTX):
        return
    by_others = status.st_mode & 0o002
    by_group = status.st_mode & 0o020 and not _is_private_group(path, status)
    if by_others or by_group:
        who = "everybody" if by_others else f"group {status.st_gid}"
        raise _Untrusted(
            f"{shown} can be written by {who} (mode {stat.S_IMODE(status.st_mode):o}); "
            f"chmod go-w it if its files are yours"
        )


def _is_private_group(path: Path, status: os.stat_result) -> bool:
    """Whether a group that may write is the user's alone, as with the umask 002 of many systems."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    if group.gr_name != user.pw_name or status.st_gid != user.pw_gid:
        return False
    # With an access control list, the group's bits are the upper bound of all entries.
    listed = hasattr(os, "listxattr") and "system.posix_acl_access" in os.listxattr(path)
    return not listed and set(group.gr_mem) <= {user.pw_name}


def _user(uid: int) -> str:
    import pwd

    try:
        return f"user {printable(pwd.getpwuid(uid).pw_name)}"
    except KeyError:
        return f"user {uid}"
