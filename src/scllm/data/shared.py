"""Temporary folders shared by all processes of a user on one machine: the first writes one, the last removes it."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

__all__ = ["locked", "shared_folder"]

# The folders in use and their locks. The key includes the process, because a forked process must not remove them.
_used: dict[tuple[int, Path], IO[str]] = {}


def shared_folder(name: str, write: Callable[[Path], None]) -> Path:
    """Return the folder of this name, writing it if it does not exist.

    It is kept until every process that uses it has ended. Folders left behind by killed processes are removed too.

    Parameters
    ----------
    name
        Name of the folder. It must identify everything that the content depends on.
    write
        Function that fills an empty folder. Other processes that ask for the same name wait until it is complete.

    Returns
    -------
    The folder, which must not be changed.
    """
    folder = _parent() / name
    if (os.getpid(), folder) in _used:
        return folder
    for lock in folder.parent.glob("*.lock"):
        if lock != _lock_of(folder):
            _remove_if_unused(lock)
    while True:
        handle = locked(_lock_of(folder), fcntl.LOCK_SH)
        if folder.is_dir():
            break
        handle.close()
        with locked(_lock_of(folder), fcntl.LOCK_EX):
            if not folder.is_dir():
                _write(folder, write)
    if not any(process == os.getpid() for process, _ in _used):
        atexit.register(_release, os.getpid())
    _used[os.getpid(), folder] = handle
    return folder


def _parent() -> Path:
    """Return the parent of these folders, which only this user can access."""
    parent = Path(tempfile.gettempdir()) / f"scllm-{os.getuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    if parent.stat().st_uid != os.getuid():
        raise OSError(f"Expected '{parent}' to belong to you, but it is another user's. Set TMPDIR to another folder.")
    return parent


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def locked(file: Path, kind: int) -> IO[str]:
    """Open and lock a file; waits for the lock, or raises ``BlockingIOError`` with ``LOCK_NB``."""
    while True:
        handle = file.open("w")
        try:
            fcntl.flock(handle, kind)
            # the previous holder of the lock may have removed the file
            if os.path.samestat(file.stat(), os.fstat(handle.fileno())):
                return handle
        except FileNotFoundError:
            pass
        except BaseException:
            handle.close()
            raise
        handle.close()


def _write(folder: Path, write: Callable[[Path], None]) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write(partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _release(process: int) -> None:
    """Remove the folders of this process that no other process uses."""
    for owner, folder in [*_used]:
        if owner == process == os.getpid():
            _used.pop((owner, folder)).close()
            _remove_if_unused(_lock_of(folder))


def _remove_if_unused(lock: Path) -> None:
    """Remove a folder and its lock, unless a process uses it or has just removed it."""
    try:
        handle = locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    with handle:
        shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
        shutil.rmtree(lock.with_suffix(".partial"), ignore_errors=True)
        lock.unlink(missing_ok=True)
