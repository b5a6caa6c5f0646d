"""One at a time: locks on files, which end with the process that holds them, however it ends."""

import errno
import glob
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mogan.disk.shards import numbers_of
from mogan.errors import UserError

try:
    import fcntl
except ModuleNotFoundError:  # Windows: one process a folder, the user's care
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # a file system that has none


@contextmanager
def locked(descriptor: int) -> Iterator[None]:
    """Hold an open file's lock; waits for who has it."""
    if fcntl is None:
        yield
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


@contextmanager
def alone_in(folder: Path, shard: str | None = None) -> Iterator[None]:
    """Be the only one that works in a folder, which must be there; of those with a ``shard``, one for each.

    On Linux the lock holds between machines too where the file system is NFS. A kill leaves the file and lets go of the lock.

    Raises:
        UserError: another process is at work there.
    """
    with _alone(folder / LOCK, folder, shard):
        yield


@contextmanager
def alone_at(file: Path, shard: str | None = None) -> Iterator[None]:
    """Be the only one that makes a file, whose folder must be there; of those with a ``shard``, one for each.

    Raises:
        UserError: another process makes it.
    """
    with _alone(file.with_name(f".{file.name}{LOCK}"), file, shard):
        yield


@contextmanager
def _alone(lock: Path, place: Path, shard: str | None) -> Iterator[None]:
    if shard is None:
        with _hold(lock, place):
            yield
        return
    number, count = numbers_of(shard)
    own = lock.with_name(f"{lock.name}-{number}-of-{count}")
    with _hold(lock, place, share=True), _hold(own, place):
        for other in lock.parent.glob(
            f"{glob.escape(lock.name)}-*-of-*"
        ):  # after our own: one of two that start at once sees it
            if other.name.rpartition("-of-")[2] != str(count) and _held(other):
                raise UserError(
                    f"shards of another number ({other.name.removeprefix(f'{lock.name}-').replace('-of-', '/')} beside {shard}) are "
                    f"at work in {place}: wait for them, or give the same number of shards"
                )
        yield


def _held(path: Path) -> bool:
    """Whether a process holds the lock of a file; a killed one leaves the file alone."""
    if fcntl is None:
        return False
    with suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in NO_LOCKS
    return False


@contextmanager
def _hold(path: Path, place: Path, share: bool = False) -> Iterator[None]:
    """Hold the lock of a file of its own, and take the file away at the end: a folder should show nothing of it."""
    if fcntl is None:
        yield
        return
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if share else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno in NO_LOCKS:
                print(f"{place}: this file system has no locks; make sure that nothing else works there")
                yield
                return
            raise UserError(
                f"another command is at work in {place}{f' ({holder})' if holder else ''}: wait for it, or give another --out"
            ) from error
        if _is(path, descriptor):
            break
        os.close(descriptor)  # whoever had it has just taken the file away
    try:
        if not share:
            with suppress(OSError):  # of a full disk, which the work tells of with the name of a file
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        with suppress(OSError):
            if share:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
