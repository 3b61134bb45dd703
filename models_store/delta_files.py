"""Reading deltas by the thousand: one buffer for all of them, one header checked once, and parts of verified files.

Each file is read whole, its checksum and its numbers are verified, before anything of it is used. A checksum costs more than
reading and summing together, so a process that has verified a file does not sum it again while the file system says that it
is the same file and unchanged: a round reads each delta at intake and again when it aggregates. Files of one network have one
header to the byte, which is parsed for the first and compared for the others.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from aivo_core.network import FloatArray, NetworkSpec
from aivo_core.tensors import DEFAULT_MAX_HEADER, LENGTH_BYTES, FlatLayout, TensorFileError, flat_layout, read_flat
from models_store.errors import StoreError
from models_store.files import LEARNER_MODELS, read_file_into, read_unchanged
from models_store.local_files import FileIdentity


@dataclass(frozen=True, slots=True)
class DeltaFile:
    """A delta's name in the store and its sha256."""

    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class VerifiedDelta:
    """A delta whose file was read whole and found sound, for ``read_part``.

    Attributes:
        identity: which file it was; None in a storage without local files.
        data_start: where its numbers begin; None where they are not one float32 vector.
    """

    file: DeltaFile
    identity: FileIdentity | None
    data_start: int | None


REMEMBERED = 20_000
"""Files that a process knows to be sound, some 400 bytes each."""

SETTLED_NANOSECONDS = 100_000_000
"""A file that changed less than this before it was read could change again within the file system's own clock tick, unseen."""


class SoundFiles:
    """Which files this process has read whole and found to have their checksum; safe in several threads."""

    def __init__(self, most: int = REMEMBERED) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._found: OrderedDict[DeltaFile, FileIdentity] = OrderedDict()

    def identity(self, file: DeltaFile) -> FileIdentity | None:
        """Which file it was; None if it has to be verified."""
        with self._lock:
            return self._found.get(file)

    def remember(self, file: DeltaFile, identity: FileIdentity | None, *, read_at: int) -> None:
        """Note a file that was verified.

        Args:
            read_at: nanoseconds since the epoch, taken before the file was opened.
        """
        if identity is None or read_at - max(identity[3:]) < SETTLED_NANOSECONDS:
            return
        with self._lock:
            self._found[file] = identity
            self._found.move_to_end(file)
            while len(self._found) > self._most:
                self._found.popitem(last=False)

    def forget(self) -> None:
        """Verify everything anew from now on."""
        with self._lock:
            self._found.clear()


sound_files = SoundFiles()
"""Of this process."""


class DeltaReader:
    """Reads deltas one after the other into one buffer; for one thread.

    Args:
        spec: the network whose tail the deltas belong to.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        self._expected = spec.tail_tensors
        self._buffer = memoryview(bytearray(4 * spec.tail_size + DEFAULT_MAX_HEADER + LENGTH_BYTES))
        self._layout: FlatLayout | None = None

    def read(self, file: DeltaFile) -> FloatArray:
        """The delta, (tail_size,) float32, read-only; its numbers stay until the next read.

        Raises:
            StoreError: ``missing_file``, ``checksum_mismatch``, ``bad_path``, ``bad_file``.
        """
        return self._read(file)[0]

    def verify(self, file: DeltaFile) -> VerifiedDelta:
        """Read and verify the whole file, for ``read_part``.

        Raises:
            StoreError: as ``read``.
        """
        _delta, identity, layout = self._read(file)
        return VerifiedDelta(file, identity, None if layout is None else len(layout.head))

    def _read(self, file: DeltaFile) -> tuple[FloatArray, FileIdentity | None, FlatLayout | None]:
        verified = sound_files.identity(file)
        read_at = time.time_ns()
        data, identity = read_file_into(
            alias=LEARNER_MODELS, path=file.path, sha256=file.sha256, buffer=self._buffer, verified=verified
        )
        try:
            delta, layout = self._flat(data, known_finite=identity is not None and identity == verified)
        except TensorFileError as error:
            raise StoreError(f"the file {file.path} cannot be used: {error}", code="bad_file") from error
        if identity != verified:
            sound_files.remember(file, identity, read_at=read_at)
        return delta, identity, layout

    def _flat(self, data: memoryview, *, known_finite: bool) -> tuple[FloatArray, FlatLayout | None]:
        layout = self._layout
        if layout is None or not layout.fits(data):
            layout = flat_layout(data, expected=self._expected)
        if layout is None:
            return read_flat(data, expected=self._expected), None
        self._layout = layout
        return layout.view(data, known_finite=known_finite), layout


def read_part(delta: VerifiedDelta, start: int, stop: int, *, spec: NetworkSpec) -> FloatArray:
    """Numbers ``start`` to ``stop`` of a delta, (stop - start,) float32, read-only; safe in several threads.

    A file that changed since it was verified, and every file of a storage without local files, is read and verified whole.

    Raises:
        StoreError: the file was damaged or removed since.
    """
    if delta.data_start is not None:
        part = read_unchanged(
            alias=LEARNER_MODELS,
            path=delta.file.path,
            identity=delta.identity,
            start=delta.data_start + 4 * start,
            length=4 * (stop - start),
        )
        if part is not None:
            return np.frombuffer(part, dtype="<f4").astype(np.float32, copy=False)
    return DeltaReader(spec).read(delta.file)[start:stop]
