"""Durable files below one local folder: a file is there whole or not at all, also after a power cut.

A new file gets a temporary name in its own folder, is written and synchronised, takes its name in one step, and then the
folder is synchronised. Names come checked; here only what the file system itself can do wrong is looked at: links that
lead out of the folder, and things that are no regular files.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from models_store.errors import StoreError

TEMPORARY_PREFIX = ".tmp-"
FILE_MODE = 0o640

# O_NONBLOCK: opening a named pipe must not wait for a writer.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

FileIdentity = tuple[int, int, int, int, int]
"""Device, inode, bytes, and the times of the last change of its bytes and of anything about it: what tells whether a file is
still the one that was read. No program can set the last of them."""

_NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})


@dataclass(frozen=True)
class FoundFile:
    """A file in the store: its name below the root, bytes, and seconds since the epoch of its last change."""

    path: str
    size: int
    modified: float

    @property
    def is_temporary(self) -> bool:
        return self.path.rpartition("/")[2].startswith(TEMPORARY_PREFIX)


def write_new(root: Path, files: Sequence[tuple[str, bytes]]) -> list[bool]:
    """Create files, all of them durable on return; False for one whose name was taken, which stays as it is.

    All are written before the first is synchronised, and all are named before the first folder is: the file system then
    commits many of them at once.
    """
    temporary: list[tuple[Path, Path]] = []
    folders: set[Path] = set()
    try:
        for name, data in files:
            target = _target(root, name, folders)
            source = _temporary_name(target.parent)
            temporary.append((source, target))
            _write(source, data)
        _sync(source for source, _ in temporary)
        created = [_give_new_name(source, target) for source, target in temporary]
    finally:
        for source, _ in temporary:
            source.unlink(missing_ok=True)
    _sync({*folders, *(target.parent for _, target in temporary)})
    return created


def replace(root: Path, name: str, data: bytes) -> None:
    """Write a file, whether or not one of that name is there."""
    folders: set[Path] = set()
    target = _target(root, name, folders)
    source = _temporary_name(target.parent)
    try:
        _write(source, data)
        _sync([source])
        source.replace(target)
    except BaseException:
        source.unlink(missing_ok=True)
        raise
    _sync({target.parent, *folders})


def read(root: Path, name: str, *, max_bytes: int) -> bytes:
    """The bytes of a regular file below ``root``.

    Raises:
        StoreError: ``missing_file``; ``bad_path`` where a link leads out of ``root``; ``bad_file`` where it is no
            regular file or larger than ``max_bytes``.
    """
    handle, _status = _open_regular(root, name, max_bytes)
    try:
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def read_into(root: Path, name: str, buffer: memoryview) -> tuple[int, FileIdentity]:
    """As ``read``, into a buffer that is used again: bytes read, and which file it was.

    Raises:
        StoreError: as ``read``; ``bad_file`` where the file is larger than the buffer.
    """
    handle, status = _open_regular(root, name, len(buffer))
    try:
        size = 0
        while size < status.st_size and (got := os.readv(handle, [buffer[size : status.st_size]])):
            size += got
        return size, _identity(status)
    finally:
        os.close(handle)


def read_slice(root: Path, name: str, identity: FileIdentity, start: int, length: int) -> bytes | None:
    """``length`` bytes from ``start`` of a file that was read before; None if it is not that file, unchanged, any more."""
    try:
        handle = os.open(f"{root}/{name}", _READ)  # a Path for each would intern a word for each
    except OSError:
        return None  # the whole file is read again, which says what is wrong
    try:
        if _identity(os.fstat(handle)) != identity:
            return None
        data = os.pread(handle, length, start)
        return data if len(data) == length else None
    finally:
        os.close(handle)


def touch(root: Path, name: str) -> None:
    """Set the time of last change to now: garbage collection takes only what has been left alone for long."""
    with suppress(FileNotFoundError):
        os.utime(root / name)


def delete(root: Path, name: str, *, older_than: float | None = None) -> bool:
    """Remove a file, or a link itself; with ``older_than``, only one last changed before (seconds since the epoch).

    Folders that became empty go too. False when nothing was removed.
    """
    path = root / name
    try:
        if older_than is not None and path.lstat().st_mtime >= older_than:
            return False
        path.unlink()
    except FileNotFoundError:
        return False
    for folder in path.parents:
        if folder == root:
            break
        try:
            folder.rmdir()
        except OSError:
            break
    return True


def walk(root: Path) -> Iterator[FoundFile]:
    """Every file and link below ``root``, in order of name; links are not followed."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        linked = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in sorted([*names, *linked]):
            path = Path(folder) / name
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue
            yield FoundFile(path.relative_to(root).as_posix(), status.st_size, status.st_mtime)


def _target(root: Path, name: str, new_folders: set[Path]) -> Path:
    """Where ``name`` goes; folders on the way are made, and those whose entries changed are added to ``new_folders``."""
    target = root / name
    missing = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    new_folders.update(folder.parent for folder in missing)
    if not target.parent.resolve().is_relative_to(root.resolve()):
        raise StoreError(f"{name} leads out of the store through a link", code="bad_path")
    return target


def _temporary_name(folder: Path) -> Path:
    return folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"


def _write(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    with os.fdopen(handle, "wb") as file:
        file.write(data)


def _give_new_name(source: Path, target: Path) -> bool:
    """Name a finished temporary file unless the name is taken: a hard link is the one step that never overwrites."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if target.exists():
            return False
        source.replace(target)
    return True


def _identity(status: os.stat_result) -> FileIdentity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _open_regular(root: Path, name: str, max_bytes: int) -> tuple[int, os.stat_result]:
    """A handle, which the caller closes, on a regular file of at most ``max_bytes`` below ``root``, and its status."""
    handle = _open_inside(root, name)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise StoreError(f"{name} is no regular file", code="bad_file")
        if status.st_size > max_bytes:
            raise StoreError(f"the file {name} has {status.st_size} bytes, at most {max_bytes} are allowed", code="bad_file")
    except BaseException:
        os.close(handle)
        raise
    return handle, status


def _open_inside(root: Path, name: str) -> int:
    try:
        return _open_without_links(root, name)
    except OSError:
        real = _resolve_inside(root, name)  # a link, which may lead to a place inside, or an error that it names
    try:
        return os.open(real, _READ)
    except FileNotFoundError as error:
        raise StoreError(f"the file {name} is missing", code="missing_file") from error
    except OSError as error:
        raise StoreError(f"the file {name} cannot be opened: {error.strerror}", code="bad_file") from error


def _open_without_links(root: Path, name: str) -> int:
    """Open folder by folder, none of them a link: what is opened lies below ``root``, at a sixth of the price of resolving.

    Raises:
        OSError: a link on the way, or anything else that is not there to be read.
    """
    *folders, last = name.split("/")
    if ".." in folders or last == "..":
        raise OSError(errno.EINVAL, "a name that leads upwards")
    current = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            inner = os.open(folder, _FOLDER, dir_fd=current)
            os.close(current)
            current = inner
        return os.open(last, _READ, dir_fd=current)
    finally:
        os.close(current)


def _resolve_inside(root: Path, name: str) -> Path:
    try:
        real = (root / name).resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(f"the file {name} is missing", code="missing_file") from error
    except (OSError, RuntimeError) as error:
        raise StoreError(f"{name} cannot be followed: {error}", code="bad_path") from error
    if not real.is_relative_to(root.resolve()):
        raise StoreError(f"{name} leads out of the store through a link", code="bad_path")
    return real


def _sync(paths: Iterable[Path]) -> None:
    """Wait until files are on the disk, or the names in folders are."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
