"""An encoder survives its files bit for bit, and damaged files are refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from aivo_core.encoding import Encoder, EncodingError, fit_encoder
from tests.core.encoding_histories import make_histories

ENCODER = fit_encoder(make_histories(31, learners=10, events=40)).encoder


def test_an_encoder_survives_its_files_bit_for_bit() -> None:
    data, tensors = ENCODER.to_files()
    copy = Encoder.from_files(data, tensors)
    assert copy.sha256 == ENCODER.sha256
    again, same = copy.to_files()
    assert again == data
    assert {name: value.tobytes() for name, value in same.items()} == {n: v.tobytes() for n, v in tensors.items()}
    events = make_histories(32, learners=1)[0][1]
    one, two = ENCODER.encode(events)[0], copy.encode(events)[0]
    for name in ("first", "second", "level", "path", "content_prior"):
        assert getattr(one, name).tobytes() == getattr(two, name).tobytes()


def test_the_hash_is_the_same_for_the_same_fit_and_changes_with_any_number() -> None:
    assert fit_encoder(make_histories(31, learners=10, events=40)).encoder.sha256 == ENCODER.sha256
    data, tensors = ENCODER.to_files()
    for name in tensors:
        value = tensors[name].copy()
        if value.dtype == np.int64 and name != "item_count":
            continue
        value.reshape(-1)[0] += 1e-4 if value.dtype != np.int64 else 1
        if name == "scale_points":
            value.reshape(-1)[0] -= 2e-4
        assert Encoder.from_files(data, {**tensors, name: value}).sha256 != ENCODER.sha256, name


def test_the_json_is_canonical_and_names_what_it_is() -> None:
    data, _ = ENCODER.to_files()
    parsed = json.loads(data)
    assert parsed["kind"] == "aivo-encoder"
    assert json.dumps(parsed, sort_keys=True, separators=(",", ":")).encode() == data


def test_files_do_not_hold_small_cells() -> None:
    _, tensors = ENCODER.to_files()
    assert tensors["item_next_count"].min() >= 3


JSON_DAMAGES: dict[str, Any] = {
    "missing": lambda d: d.pop("items"),
    "unknown": lambda d: d.update(more=1),
    "kind": lambda d: d.update(kind="other"),
    "format": lambda d: d.update(format=2),
    "mean": lambda d: d.update(mean=1.5),
    "names": lambda d: d.update(categories=[1, 2]),
    "twice": lambda d: d["categories"].append(d["categories"][0]),
    "too many": lambda d: d.update(categories=[str(n) for n in range(128)]),
    "subjects": lambda d: d.update(subjects=[str(n) for n in range(8)]),
    "items": lambda d: d["items"].append("one more"),
}


@pytest.mark.parametrize("damage", JSON_DAMAGES)
def test_a_damaged_encoder_json_is_refused(damage: str) -> None:
    data, tensors = ENCODER.to_files()
    parsed = json.loads(data)
    JSON_DAMAGES[damage](parsed)
    with pytest.raises(EncodingError) as error:
        Encoder.from_files(json.dumps(parsed).encode(), tensors)
    assert error.value.code == "bad_encoder"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"mean": NaN}', b"\xff"])
def test_what_is_no_encoder_json_is_refused(data: bytes) -> None:
    with pytest.raises(EncodingError) as error:
        Encoder.from_files(data, ENCODER.to_files()[1])
    assert error.value.code == "bad_encoder"


def _changed(name: str, change: Any) -> Any:
    def damage(tensors: dict[str, Any]) -> None:
        tensors[name] = change(tensors[name].copy())

    return damage


def _first(value: Any) -> Any:
    def change(array: Any) -> Any:
        array.reshape(-1)[0] = value
        return array

    return change


TENSOR_DAMAGES: dict[str, Any] = {
    "missing": lambda t: t.pop("base_rates"),
    "unknown": lambda t: t.update(more=np.zeros(1)),
    "shape": _changed("category_next", lambda a: a[:1]),
    "scalar for a vector": _changed("success_by_level", lambda a: a[:1]),
    "dtype": _changed("base_rates", lambda a: a.astype(np.float32)),
    "nan": _changed("category_next", _first(np.nan)),
    "range": _changed("base_rates", _first(1.5)),
    "deviation 0": _changed("column_deviation", _first(0.0)),
    "slot": _changed("item_next_slot", _first(128)),
    "negative count": _changed("item_next_count", _first(-1)),
    "count above total": _changed("item_next_count", _first(10_000)),
    "start": _changed("item_next_start", _first(1)),
    "points": _changed("scale_points", lambda a: a[::-1].copy()),
    "cumulative": _changed("scale_cumulative", _first(5)),
    "context twice": _changed("context_slots", lambda a: np.zeros_like(a)),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGES)
def test_damaged_encoder_tensors_are_refused(damage: str) -> None:
    data, tensors = ENCODER.to_files()
    TENSOR_DAMAGES[damage](tensors)
    with pytest.raises(EncodingError) as error:
        Encoder.from_files(data, tensors)
    assert error.value.code == "bad_encoder"
