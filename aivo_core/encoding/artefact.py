"""An encoder as files: names and scalars in canonical JSON, tables as tensors, one hash over both."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aivo_core.encoding.columns import CONTEXT_SLOTS, OVERFLOW_SLOT, SCALED, SLOTS, SUBJECT_SLOTS
from aivo_core.encoding.errors import EncodingError
from aivo_core.encoding.rows import Scaler
from aivo_core.encoding.tables import Scale, Transitions, Vocabulary
from aivo_core.ordinal import LEVELS

Tensors = Mapping[str, npt.NDArray[np.generic]]

FORMAT = 1
_FIELDS = {"kind", "format", "mean", "categories", "subjects", "items"}
_KIND = "aivo-encoder"
_FREE = -1
"""A dimension that only the other tensors determine."""


@dataclass(frozen=True, eq=False)
class Parts:
    """What an encoder consists of; see ``Encoder``."""

    vocabulary: Vocabulary
    scale: Scale
    transitions: Transitions
    scaler: Scaler
    context_slots: npt.NDArray[np.int64]
    success_by_level: npt.NDArray[np.float64]


def write(parts: Parts) -> tuple[bytes, dict[str, npt.NDArray[np.generic]]]:
    """Canonical JSON bytes, and tensors by name. Item tables lose the row of the unknown item; counts are sparse by row."""
    scale, transitions = parts.scale, parts.transitions
    data = {
        "kind": _KIND,
        "format": FORMAT,
        "mean": scale.mean,
        "categories": list(parts.vocabulary.categories),
        "subjects": list(parts.vocabulary.subjects),
        "items": list(parts.vocabulary.items),
    }
    item, slot = np.nonzero(transitions.item_kept[:-1])
    per_item = np.bincount(item, minlength=len(parts.vocabulary.items))
    tensors: dict[str, npt.NDArray[np.generic]] = {
        "base_rates": transitions.base_rates,
        "category_next": transitions.category_next,
        "category_expected_mean": transitions.category_expected_mean,
        "item_next_start": np.concatenate([[0], np.cumsum(per_item)]).astype(np.int64),
        "item_next_slot": slot.astype(np.int64),
        "item_next_count": transitions.item_kept[item, slot].astype(np.int64),
        "item_next_total": transitions.item_total[:-1].astype(np.int64),
        "item_expected_sum": transitions.item_expected_sum[:-1],
        "item_expected_count": transitions.item_expected_count[:-1].astype(np.int64),
        "category_mean": scale.category_mean,
        "item_sum": scale.item_sum[:-1],
        "item_count": scale.item_count[:-1].astype(np.int64),
        "scale_points": scale.points,
        "scale_cumulative": scale.cumulative,
        "column_mean": parts.scaler.mean,
        "column_deviation": parts.scaler.deviation,
        "context_slots": parts.context_slots,
        "success_by_level": parts.success_by_level,
    }
    return _canonical(data), {name: np.ascontiguousarray(value) for name, value in tensors.items()}


def content_hash(json_bytes: bytes, tensors: Tensors) -> str:
    """sha256 over the JSON bytes and each tensor's name, dtype, shape and little-endian bytes, in order of name."""
    digest = hashlib.sha256(json_bytes)
    for name in sorted(tensors):
        value = tensors[name]
        little = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
        digest.update(f"\n{name} {little.dtype.str} {list(little.shape)}\n".encode())
        digest.update(little.tobytes())
    return digest.hexdigest()


def read(json_bytes: bytes, tensors: Tensors) -> Parts:
    """Inverse of ``write``.

    Raises:
        EncodingError: ``bad_encoder``, naming the field or tensor.
    """
    data = _read_json(json_bytes)
    vocabulary = Vocabulary(
        categories=_names(data, "categories", OVERFLOW_SLOT),
        subjects=_names(data, "subjects", SUBJECT_SLOTS - 1),
        items=_names(data, "items", None),
    )
    _check_tensors(tensors, len(vocabulary.items))
    floats = {name: np.array(value, dtype=np.float64) for name, value in tensors.items() if value.dtype == np.float64}
    ints = {name: np.array(value, dtype=np.int64) for name, value in tensors.items() if value.dtype == np.int64}
    scale = Scale(
        mean=data["mean"],
        category_mean=floats["category_mean"],
        item_sum=_with_unknown(floats["item_sum"]),
        item_count=_with_unknown(ints["item_count"]),
        points=floats["scale_points"],
        cumulative=ints["scale_cumulative"],
    )
    transitions = Transitions(
        base_rates=floats["base_rates"],
        category_next=np.array(tensors["category_next"], dtype=np.float32),
        item_kept=_dense(ints, len(vocabulary.items)),
        item_total=_with_unknown(ints["item_next_total"]).astype(np.float32),
        category_expected_mean=floats["category_expected_mean"],
        item_expected_sum=_with_unknown(floats["item_expected_sum"]),
        item_expected_count=_with_unknown(ints["item_expected_count"]),
    )
    if np.any(transitions.item_rest <= 0):
        raise _bad("item_next_count must not exceed item_next_total")
    scaler = Scaler(mean=floats["column_mean"], deviation=floats["column_deviation"])
    return Parts(vocabulary, scale, transitions, scaler, ints["context_slots"], floats["success_by_level"])


def _canonical(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _read_json(json_bytes: bytes) -> dict[str, Any]:
    try:
        data = json.loads(json_bytes)
    except (ValueError, RecursionError) as error:
        raise _bad(f"encoder.json is no JSON: {error}") from error
    if not isinstance(data, dict) or set(data) != _FIELDS:
        raise _bad(f"encoder.json needs exactly the fields {sorted(_FIELDS)}")
    if data["kind"] != _KIND or data["format"] != FORMAT:
        raise _bad(f"kind and format must be {_KIND} {FORMAT}, not {data['kind']!r} {data['format']!r}")
    mean = data["mean"]
    if not isinstance(mean, float) or not 0.0 <= mean <= 1.0:
        raise _bad(f"mean must be a number in 0..1, not {mean!r}")
    return data


def _names(data: Mapping[str, Any], name: str, limit: int | None) -> tuple[str, ...]:
    values = data[name]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise _bad(f"{name} must be a list of names")
    if len(set(values)) != len(values):
        raise _bad(f"{name} holds a name twice")
    if limit is not None and len(values) > limit:
        raise _bad(f"{name} may hold at most {limit} names, not {len(values)}")
    return tuple(values)


def _expected(items: int) -> dict[str, tuple[type[np.generic], tuple[int, ...], float, float]]:
    """Dtype, shape, smallest and largest value of each tensor."""
    inf = math.inf
    f64, i64 = np.float64, np.int64
    return {
        "base_rates": (f64, (SLOTS,), 0, 1),
        "category_next": (np.float32, (SLOTS, SLOTS), 0, 1),
        "category_expected_mean": (f64, (SLOTS,), 0, 1),
        "item_next_start": (i64, (items + 1,), 0, inf),
        "item_next_slot": (i64, (_FREE,), 0, OVERFLOW_SLOT),
        "item_next_count": (i64, (_FREE,), 1, 2**24),
        "item_next_total": (i64, (items,), 0, 2**24),
        "item_expected_sum": (f64, (items,), 0, inf),
        "item_expected_count": (i64, (items,), 0, inf),
        "category_mean": (f64, (SLOTS,), 0, 1),
        "item_sum": (f64, (items,), 0, inf),
        "item_count": (i64, (items,), 0, inf),
        "scale_points": (f64, (_FREE,), 0, 1),
        "scale_cumulative": (i64, (_FREE,), 0, inf),
        "column_mean": (f64, (SCALED,), -inf, inf),
        "column_deviation": (f64, (SCALED,), 1e-9, inf),
        "context_slots": (i64, (CONTEXT_SLOTS,), 0, OVERFLOW_SLOT),
        "success_by_level": (f64, (LEVELS,), 0, 1),
    }


def _check_tensors(tensors: Tensors, items: int) -> None:
    expected = _expected(items)
    if set(tensors) != set(expected):
        raise _bad(f"encoder.safetensors needs exactly the tensors {sorted(expected)}, not {sorted(tensors)}")
    for name, (dtype, shape, low, high) in expected.items():
        value = tensors[name]
        if value.dtype != dtype:
            raise _bad(f"{name} must be {np.dtype(dtype)}, not {value.dtype}")
        if value.ndim != len(shape) or any(want not in (_FREE, have) for want, have in zip(shape, value.shape, strict=True)):
            raise _bad(f"{name} must have shape {shape}, not {value.shape}")
        if not np.all(np.isfinite(value)) or (value.size and not (value.min() >= low and value.max() <= high)):
            raise _bad(f"{name} must hold finite numbers from {low} to {high}")
    _check_orders(tensors)


def _check_orders(tensors: Tensors) -> None:
    start = np.asarray(tensors["item_next_start"], dtype=np.int64)
    slot = tensors["item_next_slot"]
    if start[0] != 0 or np.any(np.diff(start) < 0) or start[-1] != len(slot) or len(slot) != len(tensors["item_next_count"]):
        raise _bad("item_next_start must rise from 0 to the number of counts")
    points = np.asarray(tensors["scale_points"], dtype=np.float64)
    cumulative = np.asarray(tensors["scale_cumulative"], dtype=np.int64)
    if np.any(np.diff(points) <= 0):
        raise _bad("scale_points must rise")
    if len(cumulative) != len(points) + 1 or cumulative[0] != 0 or np.any(np.diff(cumulative) <= 0):
        raise _bad("scale_cumulative must begin with 0 and rise once per point")
    if len(np.unique(tensors["context_slots"])) != CONTEXT_SLOTS:
        raise _bad("context_slots holds a slot twice")


def _with_unknown(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Item values with the unknown item's 0 at the end."""
    return np.append(values, 0).astype(np.float64)


def _dense(ints: Mapping[str, npt.NDArray[np.int64]], items: int) -> npt.NDArray[np.float32]:
    kept = np.zeros((items + 1, SLOTS), dtype=np.float32)
    item = np.repeat(np.arange(items), np.diff(ints["item_next_start"]))
    kept[item, ints["item_next_slot"]] = ints["item_next_count"]
    return kept


def _bad(message: str) -> EncodingError:
    return EncodingError(message, code="bad_encoder")
