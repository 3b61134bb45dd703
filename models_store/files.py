"""Files in the two storages, by alias and name: written once, checksummed, never outside their root.

A ``FileSystemStorage`` gets durable local files (``local_files``); another storage is used through Django's own
interface, and a name other than the one asked for is refused. No rule of the domain lives here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from django.core.files.base import ContentFile
from django.core.files.storage import FileSystemStorage, Storage, storages

from aivo_site.environment import BASE_DIR
from models_store import local_files
from models_store.errors import StoreError
from models_store.local_files import FileIdentity, FoundFile

MAIN_MODELS = "main_models"
LEARNER_MODELS = "learner_models"
ALIASES = (MAIN_MODELS, LEARNER_MODELS)

DEFAULT_MAX_BYTES = 256 * 1024 * 1024
MAX_NAME = 300

_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class StoredFile:
    """A complete file: its name below the storage's root, sha256 in hexadecimal, and bytes."""

    path: str
    sha256: str
    size: int


def checksum(data: bytes | memoryview) -> str:
    """sha256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def check_name(path: str) -> str:
    """``path`` itself, if it names a file below the root: segments of letters, digits, ``.``, ``_``, ``-``, none hidden.

    Raises:
        StoreError: ``bad_path``.
    """
    segments = path.split("/")
    if len(path) > MAX_NAME or not all(_SEGMENT.fullmatch(segment) for segment in segments):
        raise StoreError(
            f"path must be at most {MAX_NAME} characters of letters, digits, '.', '_', '-' and '/', no part beginning with '.', "
            f"not {path[:80]!a}",
            code="bad_path",
        )
    return path


def write_file(*, alias: str, path: str, data: bytes) -> StoredFile:
    """Create one immutable file; writing the same bytes again changes nothing.

    Raises:
        StoreError: ``bad_path``; ``already_exists`` when the name is taken by other bytes.
    """
    return write_files(alias=alias, files=[(path, data)])[0]


def write_files(*, alias: str, files: Sequence[tuple[str, bytes]]) -> list[StoredFile]:
    """Create several immutable files, each durable on return; cheaper than one by one.

    Raises:
        StoreError: as ``write_file``, of the first that fails; others may have been created.
    """
    for path, _ in files:
        check_name(path)
    created = _create(storages[alias], files)
    stored = []
    for (path, data), is_new in zip(files, created, strict=True):
        if not is_new:
            _keep_identical(alias, path, data)
        stored.append(StoredFile(path=path, sha256=checksum(data), size=len(data)))
    return stored


def replace_file(*, alias: str, path: str, data: bytes) -> StoredFile:
    """Write a file that may change, such as a pointer or a checkpoint; readers see the old one or the new one.

    Raises:
        StoreError: ``bad_path``.
    """
    check_name(path)
    storage = storages[alias]
    root = _local_root(storage)
    if root is not None:
        local_files.replace(root, path, data)
    else:
        storage.delete(path)
        if not _save_new(storage, path, data):
            raise StoreError(f"the name {path} was taken while it was written", code="already_exists")
    return StoredFile(path=path, sha256=checksum(data), size=len(data))


def read_file(*, alias: str, path: str, sha256: str, max_bytes: int = DEFAULT_MAX_BYTES) -> bytes:
    """The bytes of a file, verified.

    Raises:
        StoreError: ``checksum_mismatch`` with both sums, ``missing_file``, ``bad_path``, ``bad_file`` (too large, or no
            regular file).
    """
    data = read_unverified(alias=alias, path=path, max_bytes=max_bytes)
    _verify(path, data, sha256)
    return data


def read_file_into(
    *, alias: str, path: str, sha256: str, buffer: memoryview, verified: FileIdentity | None = None
) -> tuple[memoryview, FileIdentity | None]:
    """As ``read_file``, into ``buffer``, which many reads share: the part of it that holds the file, and which file it was.

    The identity serves ``read_unchanged``; None in a storage of no local files.

    Args:
        verified: which file had this sum when it was read before: that one, unchanged, is not summed again.

    Raises:
        StoreError: as ``read_file``; ``bad_file`` where the file is larger than the buffer.
    """
    check_name(path)
    root = _local_root(storages[alias])
    identity: FileIdentity | None = None
    if root is not None:
        size, identity = local_files.read_into(root, path, buffer)
        data = buffer[:size]
    else:
        data = memoryview(read_unverified(alias=alias, path=path, max_bytes=len(buffer)))
    if identity is None or identity != verified:
        _verify(path, data, sha256)
    return data, identity


def read_unchanged(*, alias: str, path: str, identity: FileIdentity | None, start: int, length: int) -> bytes | None:
    """A part of a file that was read and verified before; None if that cannot be known, and it has to be read whole again."""
    root = _local_root(storages[alias])
    if root is None or identity is None:
        return None
    return local_files.read_slice(root, path, identity, start, length)


def read_unverified(*, alias: str, path: str, max_bytes: int = DEFAULT_MAX_BYTES) -> bytes:
    """The bytes of a file that no checksum stands for.

    Raises:
        StoreError: ``missing_file``, ``bad_path``, ``bad_file``.
    """
    check_name(path)
    storage = storages[alias]
    root = _local_root(storage)
    if root is not None:
        return local_files.read(root, path, max_bytes=max_bytes)
    if not storage.exists(path):
        raise StoreError(f"the file {path} is missing", code="missing_file")
    if storage.size(path) > max_bytes:
        raise StoreError(f"the file {path} has {storage.size(path)} bytes, at most {max_bytes} are allowed", code="bad_file")
    with storage.open(path, "rb") as file:
        return bytes(file.read())


def delete_file(*, alias: str, path: str, older_than: float | None = None) -> bool:
    """Remove a file; with ``older_than``, only one last changed before (seconds since the epoch).

    Temporary files and links are removed too; a link's target stays.

    Returns:
        whether something was removed.
    """
    storage = storages[alias]
    root = _local_root(storage)
    if root is not None:
        return local_files.delete(root, path, older_than=older_than)
    if not storage.exists(path) or (older_than is not None and storage.get_modified_time(path).timestamp() >= older_than):
        return False
    storage.delete(path)
    return True


def list_files(*, alias: str) -> Iterator[FoundFile]:
    """Every file of a storage, temporary ones and links included."""
    storage = storages[alias]
    root = _local_root(storage)
    if root is not None:
        yield from local_files.walk(root)
    else:
        yield from _list_storage(storage, "")


def name_below_root(*, alias: str, text: str) -> str | None:
    """The name below the storage's root that a path as a person writes it means, "" for the root, None outside of it.

    A relative path is first taken from the current folder, as a shell would, then from the product's own, as settings
    are, then as a name in the store.
    """
    root = _local_root(storages[alias])
    if root is None:
        return text.strip("/")
    real_root = root.resolve()
    path = Path(text)
    for base in (Path.cwd(), BASE_DIR, real_root):
        resolved = (base / path).resolve()
        if resolved.is_relative_to(real_root):
            name = resolved.relative_to(real_root).as_posix()
            return "" if name == "." else name
    return None


def location(*, alias: str, path: str) -> str:
    """Where a person finds a file: its full path for local files, else its name in the storage."""
    root = _local_root(storages[alias])
    return str(root / path) if root is not None else path


def _verify(path: str, data: bytes | memoryview, sha256: str) -> None:
    actual = checksum(data)
    if actual != sha256:
        raise StoreError(f"the file {path} is damaged: its sha256 is {actual}, expected {sha256}", code="checksum_mismatch")


def _local_root(storage: Storage) -> Path | None:
    return _path(str(storage.location)) if isinstance(storage, FileSystemStorage) else None


@lru_cache(maxsize=16)
def _path(location: str) -> Path:
    """A path costs more to make than a small file to open."""
    return Path(location)


def _create(storage: Storage, files: Sequence[tuple[str, bytes]]) -> list[bool]:
    """Create what has a free name, and say for each whether it had."""
    root = _local_root(storage)
    if root is not None:
        return local_files.write_new(root, files)
    return [_save_new(storage, path, data) for path, data in files]


def _save_new(storage: Storage, path: str, data: bytes) -> bool:
    if storage.exists(path):
        return False
    saved = storage.save(path, ContentFile(data))
    if saved != path:
        storage.delete(saved)
        return False
    return True


def _keep_identical(alias: str, path: str, data: bytes) -> None:
    """A name that is taken is fine when it holds the same bytes; it then counts as written now."""
    existing = read_unverified(alias=alias, path=path, max_bytes=max(len(data), DEFAULT_MAX_BYTES))
    if existing != data:
        raise StoreError(
            f"the name {path} is taken by another file: its sha256 is {checksum(existing)}, not {checksum(data)}",
            code="already_exists",
        )
    root = _local_root(storages[alias])
    if root is not None:
        local_files.touch(root, path)


def _list_storage(storage: Storage, folder: str) -> Iterator[FoundFile]:
    folders, names = storage.listdir(folder)
    for name in sorted(names):
        path = f"{folder}/{name}" if folder else name
        yield FoundFile(path, storage.size(path), storage.get_modified_time(path).timestamp())
    for name in sorted(folders):
        yield from _list_storage(storage, f"{folder}/{name}" if folder else name)
