"""Reading and writing safetensors files with NumPy alone, strict about files that come from outside.

Format (safetensors, github.com/huggingface/safetensors, "Format"): eight bytes with the header's length n as an
unsigned little-endian integer; n bytes of JSON, ``{name: {dtype, shape, data_offsets}, "__metadata__": {str: str}}``,
padded with spaces; then the tensors' values, little-endian, row-major, each at its offsets behind the header, without
overlap or gap. Nothing in such a file is ever executed.

Limits are checked before what they limit is parsed or allocated; nothing is broadcast, cast from integers or guessed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from aivo_core.network import FloatArray, TensorSpec

Array = npt.NDArray[Any]
Buffer = bytes | bytearray | memoryview

LENGTH_BYTES = 8
ALIGNMENT = 8
METADATA = "__metadata__"
MAX_DIMENSIONS = 16
MAX_NUMBER_DIGITS = 18
"""Whole numbers in a header stay below 10^18, so that no arithmetic on them can surprise."""

DEFAULT_MAX_HEADER = 64 * 1024
"""Bytes of header in a foreign file: room for some hundred tensors."""

FOREIGN_DTYPES = ("F32", "F16")
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ENTRY_FIELDS = {"dtype", "shape", "data_offsets"}


class TensorFileError(ValueError):
    """A tensor file that is refused.

    ``code`` is stable: ``too_large`` (file, header or number of tensors), ``truncated``, ``bad_header``,
    ``wrong_name``, ``wrong_shape``, ``wrong_dtype``, ``bad_offsets``, ``not_finite``.
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Limits:
    """What ``read_any`` accepts: bytes of the whole file, bytes of its header, number of tensors."""

    max_bytes: int = 256 * 1024 * 1024
    max_header: int = 1024 * 1024
    max_tensors: int = 10_000


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of a header: ``begin`` and ``end`` are bytes behind the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def expected_bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class _Header:
    """A parsed header; ``data_start`` is the file position of offset 0."""

    entries: dict[str, _Entry]
    metadata: dict[str, str]
    data_start: int


def write_tensors(tensors: Mapping[str, Array], *, metadata: Mapping[str, str] | None = None) -> bytes:
    """One safetensors file with the tensors in the mapping's order; the same input gives the same bytes.

    Args:
        tensors: arrays of any shape; float64, float32, float16, int64, int32, uint8 or bool. Values are stored as
            they are: whether they are finite is the reader's check.
        metadata: free text beside the tensors, stored sorted by key.

    Raises:
        TensorFileError: another dtype (``wrong_dtype``), an empty, reserved or unencodable name (``wrong_name``).
    """
    header: dict[str, Any] = {}
    if metadata:
        header[METADATA] = {key: metadata[key] for key in sorted(metadata)}
    chunks: list[bytes] = []
    position = 0
    for name, array in tensors.items():
        if not name or name == METADATA:
            _refuse("wrong_name", f"a tensor cannot be named {_shown(name)}")
        little_endian = array.dtype.newbyteorder("<")
        if little_endian not in _NAMES:
            _refuse("wrong_dtype", f"tensor {_shown(name)} must be one of {', '.join(DTYPES)}, not {array.dtype}")
        chunk = array.astype(little_endian, copy=False).tobytes(order="C")
        header[name] = {
            "dtype": _NAMES[little_endian],
            "shape": list(array.shape),
            "data_offsets": [position, position + len(chunk)],
        }
        position += len(chunk)
        chunks.append(chunk)
    return b"".join([_encode_header(header), *chunks])


@dataclass(frozen=True, slots=True)
class FlatLayout:
    """The checked header of a file that stores the expected tensors as float32 in their order, one after the other.

    Files of one kind have one header to the byte: what was checked of one holds for every file that ``fits``.

    Attributes:
        head: everything before the first value.
        count: float32 values behind it.
    """

    head: bytes
    count: int

    def fits(self, data: Buffer) -> bool:
        """Whether the file has this very header and the size that belongs to it."""
        start = len(self.head)
        return len(data) == start + 4 * self.count and bytes(data[:start]) == self.head

    def view(self, data: Buffer, *, known_finite: bool = False) -> FloatArray:
        """The values of a file that fits: (count,) float32, a read-only view, or a copy where they are not aligned.

        Args:
            known_finite: these bytes were looked at before.

        Raises:
            TensorFileError: ``not_finite``.
        """
        flat = _float32(_frombuffer(data, "F32", self.count, len(self.head)))
        if not known_finite:
            _check_finite("", flat)
        return flat


def flat_layout(
    data: Buffer,
    *,
    expected: Sequence[TensorSpec],
    dtypes: Sequence[str] = FOREIGN_DTYPES,
    max_header: int = DEFAULT_MAX_HEADER,
) -> FlatLayout | None:
    """The layout of a file, all checked but its values; None where it stores float16, or another order.

    Raises:
        TensorFileError: as ``read_tensors``, ``not_finite`` excepted.
    """
    header = _read_expected_header(data, expected, dtypes, max_header)
    entries = [header.entries[spec.name] for spec in expected]
    in_order = all(first.end == second.begin for first, second in pairwise(entries))
    if not in_order or {entry.dtype for entry in entries} != {"F32"}:
        return None
    return FlatLayout(bytes(data[: header.data_start]), sum(spec.size for spec in expected))


def read_tensors(
    data: Buffer,
    *,
    expected: Sequence[TensorSpec],
    dtypes: Sequence[str] = FOREIGN_DTYPES,
    max_header: int = DEFAULT_MAX_HEADER,
) -> dict[str, FloatArray]:
    """The tensors of a foreign file, which must be exactly the ``expected`` ones.

    The file may store them in any order. The file's size is limited to what the expected tensors can take.

    Returns:
        float32 arrays by name, in the order of ``expected``; float16 is widened. Read-only where they are views into
        ``data``.

    Raises:
        TensorFileError: see its codes; nothing of the file is used.
    """
    header = _read_expected_header(data, expected, dtypes, max_header)
    tensors = {spec.name: _float32(_view(data, header, header.entries[spec.name])) for spec in expected}
    for name, array in tensors.items():
        _check_finite(name, array)
    return tensors


def read_flat(
    data: Buffer,
    *,
    expected: Sequence[TensorSpec],
    dtypes: Sequence[str] = FOREIGN_DTYPES,
    max_header: int = DEFAULT_MAX_HEADER,
) -> FloatArray:
    """The expected tensors as one flat vector in the order of ``expected``, with the checks of ``read_tensors``.

    Returns:
        float32 of shape (sum of sizes,); a read-only view into ``data``, nothing copied, when the file stores
        float32 in the order of ``expected``.

    Raises:
        TensorFileError: as ``read_tensors``.
    """
    layout = flat_layout(data, expected=expected, dtypes=dtypes, max_header=max_header)
    if layout is not None:
        return layout.view(data)
    tensors = read_tensors(data, expected=expected, dtypes=dtypes, max_header=max_header)
    if not tensors:
        return np.zeros(0, dtype=np.float32)
    return np.concatenate([tensors[spec.name].ravel() for spec in expected])


def read_any(data: Buffer, limits: Limits = DEFAULT_LIMITS) -> dict[str, Array]:
    """Every tensor of a file of our own whose names and shapes are free, by name in file order.

    Returns:
        arrays in their stored dtype (see ``DTYPES``), read-only where they are views into ``data``. Values may be
        infinite or NaN.

    Raises:
        TensorFileError: every code but ``not_finite`` and ``wrong_shape``.
    """
    if len(data) > limits.max_bytes:
        _refuse("too_large", f"the file has {len(data)} bytes, at most {limits.max_bytes} are allowed")
    header = _read_header(data, limits.max_header)
    if len(header.entries) > limits.max_tensors:
        _refuse("too_large", f"the file has {len(header.entries)} tensors, at most {limits.max_tensors} are allowed")
    for entry in header.entries.values():
        _check_dtype(entry, tuple(DTYPES))
    stored = _check_layout(header, len(data))
    return {entry.name: _view(data, header, entry) for entry in stored}


def peek_metadata(data: Buffer, *, max_header: int = DEFAULT_MAX_HEADER) -> dict[str, str]:
    """The file's metadata; ``data`` need not reach beyond the header, and no tensor is checked.

    Raises:
        TensorFileError: ``truncated``, ``too_large`` or ``bad_header``.
    """
    return _read_header(data, max_header).metadata


def _encode_header(header: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise TensorFileError("names and metadata must be text that UTF-8 can encode", code="wrong_name") from error
    padded = text + b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT)
    return len(padded).to_bytes(LENGTH_BYTES, "little") + padded


def _read_expected_header(data: Buffer, expected: Sequence[TensorSpec], dtypes: Sequence[str], max_header: int) -> _Header:
    widest = max(DTYPES[name].itemsize for name in dtypes)
    largest = LENGTH_BYTES + max_header + widest * sum(spec.size for spec in expected)
    if len(data) > largest:
        _refuse("too_large", f"the file has {len(data)} bytes, at most {largest} are allowed")
    header = _read_header(data, max_header)
    _check_names(header, expected)
    for spec in expected:
        entry = header.entries[spec.name]
        _check_dtype(entry, dtypes)
        if entry.shape != spec.shape:
            _refuse("wrong_shape", f"tensor {_shown(spec.name)} must have shape {spec.shape}, not {entry.shape}")
    _check_layout(header, len(data))
    return header


def _read_header(data: Buffer, max_header: int) -> _Header:
    if len(data) < LENGTH_BYTES:
        _refuse("truncated", f"the file ends within its first {LENGTH_BYTES} bytes")
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    if length > max_header:
        _refuse("too_large", f"the header claims {length} bytes, at most {max_header} are allowed")
    data_start = LENGTH_BYTES + length
    if data_start > len(data):
        _refuse("truncated", f"the header claims {length} bytes, the file ends after {len(data) - LENGTH_BYTES} of them")
    parsed = _parse_json(bytes(data[LENGTH_BYTES:data_start]))
    metadata = parsed.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse("bad_header", f"{METADATA} must map text to text")
    return _Header({name: _parse_entry(name, value) for name, value in parsed.items()}, metadata, data_start)


def _parse_json(raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        _refuse("bad_header", "the header must begin with '{'")
    try:
        parsed = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique_object,
            parse_int=_whole_number,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except TensorFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise TensorFileError("the header is not JSON of the safetensors format", code="bad_header") from error
    return dict(parsed)


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        _refuse("bad_header", "the header gives a name twice")
    return unique


def _whole_number(text: str) -> int:
    if len(text) > MAX_NUMBER_DIGITS or text.startswith("-"):
        _refuse("bad_header", f"numbers in the header must be whole, not negative, and at most {MAX_NUMBER_DIGITS} digits long")
    return int(text)


def _no_number(text: str) -> NoReturn:
    _refuse("bad_header", f"numbers in the header must be whole, not {text[:20]}")


def _parse_entry(name: str, value: Any) -> _Entry:
    if not isinstance(value, dict) or set(value) != _ENTRY_FIELDS:
        _refuse("bad_header", f"tensor {_shown(name)} needs exactly the fields {', '.join(sorted(_ENTRY_FIELDS))}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str):
        _refuse("bad_header", f"dtype of tensor {_shown(name)} must be text")
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        _refuse("bad_header", f"shape of tensor {_shown(name)} must be at most {MAX_DIMENSIONS} whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        _refuse("bad_header", f"data_offsets of tensor {_shown(name)} must be two whole numbers")
    return _Entry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)


def _check_names(header: _Header, expected: Sequence[TensorSpec]) -> None:
    names = {spec.name for spec in expected}
    missing = _shown_list(names - header.entries.keys())
    unknown = _shown_list(header.entries.keys() - names)
    if missing:
        beside = f" and has the unknown ones {unknown}" if unknown else ""
        _refuse("wrong_name", f"the file lacks the tensors {missing}{beside}")
    if unknown:
        _refuse("wrong_name", f"the file has tensors that do not belong to it: {unknown}")


def _check_dtype(entry: _Entry, allowed: Sequence[str]) -> None:
    if entry.dtype not in allowed:
        _refuse("wrong_dtype", f"tensor {_shown(entry.name)} must be one of {', '.join(allowed)}, not {_shown(entry.dtype)}")


def _check_layout(header: _Header, file_size: int) -> list[_Entry]:
    """The entries in file order, once their bytes are known to fill the rest of the file without overlap or gap."""
    stored = sorted(header.entries.values(), key=lambda entry: (entry.begin, entry.end))
    position = 0
    for entry in stored:
        if entry.begin != position:
            _refuse("bad_offsets", f"tensor {_shown(entry.name)} must begin at byte {position}, not {entry.begin}")
        if entry.end - entry.begin != entry.expected_bytes:
            _refuse(
                "bad_offsets",
                f"tensor {_shown(entry.name)} must take {entry.expected_bytes} bytes, not {entry.end - entry.begin}",
            )
        position = entry.end
    present = file_size - header.data_start
    if present < position:
        _refuse("truncated", f"the tensors take {position} bytes, the file ends after {present} of them")
    if present > position:
        _refuse("bad_offsets", f"{present - position} bytes at the end of the file belong to no tensor")
    return stored


def _view(data: Buffer, header: _Header, entry: _Entry) -> Array:
    array = _frombuffer(data, entry.dtype, prod(entry.shape), header.data_start + entry.begin).reshape(entry.shape)
    if entry.dtype == "BOOL" and array.view(np.uint8).max(initial=0) > 1:
        _refuse("wrong_dtype", f"tensor {_shown(entry.name)} is BOOL but holds bytes other than 0 and 1")
    return array


def _frombuffer(data: Buffer, dtype: str, count: int, offset: int) -> Array:
    """``count`` values at file position ``offset``: a read-only view, or a copy where the position is not aligned."""
    if count == 0:
        return np.zeros(0, dtype=DTYPES[dtype])
    array = np.frombuffer(data, dtype=DTYPES[dtype], count=count, offset=offset)
    array.flags.writeable = False
    return array if array.flags.aligned else array.copy()


def _float32(array: Array) -> FloatArray:
    return array.astype(np.float32, copy=False)


def _check_finite(name: str, array: FloatArray) -> None:
    if not np.isfinite(array).all():
        what = f"tensor {_shown(name)}" if name else "the file"
        _refuse("not_finite", f"{what} holds values that are infinite or not a number")


def _shown(text: str) -> str:
    """Foreign text made safe for messages and logs: ASCII only, short."""
    return ascii(text[:80])


def _shown_list(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(_shown(name) for name in ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


def _refuse(code: str, message: str) -> NoReturn:
    raise TensorFileError(message, code=code)
