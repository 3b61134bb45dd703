"""Tensor files: what is written can be read by anyone, what is foreign is read strictly."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings

from aivo_core.network import NetworkSpec, TensorSpec
from aivo_core.tensors import (
    DEFAULT_MAX_HEADER,
    DTYPES,
    Limits,
    TensorFileError,
    peek_metadata,
    read_any,
    read_flat,
    read_tensors,
    write_tensors,
)

EXPECTED = (TensorSpec("dense/kernel", (2, 3)), TensorSpec("dense/bias", (4,)))
KERNEL = np.arange(6, dtype=np.float32).reshape(2, 3)
BIAS = np.array([-1.0, 0.5, 0.0, 9.0], dtype=np.float32)
TENSORS = {"dense/kernel": KERNEL, "dense/bias": BIAS}


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def good_header() -> dict[str, Any]:
    return {"dense/kernel": entry("F32", [2, 3], 0, 24), "dense/bias": entry("F32", [4], 24, 40)}


def assemble(header: dict[str, Any] | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file from its parts, none of them checked."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


DATA = KERNEL.tobytes() + BIAS.tobytes()
GOOD = assemble(good_header(), DATA)
HEADER_END = len(GOOD) - len(DATA)


def changed(**fields: Any) -> bytes:
    """The good file with fields of the kernel's header entry replaced."""
    header = good_header()
    header["dense/kernel"] |= fields
    return assemble(header, DATA)


def with_bias(bias: np.ndarray) -> bytes:
    return write_tensors({"dense/kernel": KERNEL, "dense/bias": bias})


def renamed(name: str) -> bytes:
    header = good_header()
    header[name] = header.pop("dense/bias")
    return assemble(header, DATA)


def with_metadata(value: Any) -> bytes:
    return assemble({"__metadata__": value, **good_header()}, DATA)


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "cut within the length": (GOOD[:7], "truncated"),
    "cut right after the length": (GOOD[:8], "truncated"),
    "cut within the header": (GOOD[: HEADER_END - 5], "truncated"),
    "cut right after the header": (GOOD[:HEADER_END], "truncated"),
    "cut within the first tensor": (GOOD[: HEADER_END + 3], "truncated"),
    "cut between the tensors": (GOOD[: HEADER_END + 24], "truncated"),
    "cut by one byte": (GOOD[:-1], "truncated"),
    "one byte too many": (GOOD + b"\0", "bad_offsets"),
    "far more bytes than the tensors can take": (GOOD + b"\0" * (DEFAULT_MAX_HEADER + 1), "too_large"),
    "header claims 100 MB": (assemble(good_header(), DATA, length=100_000_000), "too_large"),
    "header claims 2^64 - 1 bytes": (assemble(good_header(), DATA, length=2**64 - 1), "too_large"),
    "header claims one byte less": (assemble(good_header(), DATA, length=HEADER_END - 9), "bad_header"),
    "header claims one byte more": (assemble(good_header(), DATA, length=HEADER_END - 7), "bad_header"),
    "header claims nothing": (assemble(b"", DATA), "bad_header"),
    "header is a list": (assemble(b"[]", DATA), "bad_header"),
    "header begins with a space": (assemble(b" " + json.dumps(good_header()).encode(), DATA), "bad_header"),
    "header is not UTF-8": (assemble(b'{"\xff": 1}', DATA), "bad_header"),
    "header nests too deeply": (assemble(b'{"a":' + b"[" * 60_000, DATA), "bad_header"),
    "header is a pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00" + b"cposix\nsystem\n", "too_large"),
    "entry is a number": (assemble({**good_header(), "dense/bias": 7}, DATA), "bad_header"),
    "entry lacks a field": (assemble({"dense/kernel": {"dtype": "F32", "shape": [2, 3]}}, DATA), "bad_header"),
    "entry has a field too many": (changed(strides=[1]), "bad_header"),
    "dtype is a number": (changed(dtype=32), "bad_header"),
    "shape is text": (changed(shape="23"), "bad_header"),
    "shape holds true": (changed(shape=[True, 6]), "bad_header"),
    "shape holds a fraction": (changed(shape=[2.0, 3]), "bad_header"),
    "shape holds NaN": (changed(shape=[float("nan"), 3]), "bad_header"),
    "shape holds Infinity": (changed(shape=[float("inf"), 3]), "bad_header"),
    "shape is negative": (changed(shape=[-2, -3]), "bad_header"),
    "shape number has 5,000 digits": (
        assemble(b'{"dense/kernel":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,24]}}'),
        "bad_header",
    ),
    "shape has 10,000 dimensions": (changed(shape=[1] * 10_000), "bad_header"),
    "three offsets": (changed(data_offsets=[0, 24, 24]), "bad_header"),
    "metadata is a number": (with_metadata(3), "bad_header"),
    "metadata holds a number": (with_metadata({"rounds": 3}), "bad_header"),
    "the same name twice": (
        assemble(
            b'{"dense/bias":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},' + json.dumps(good_header()).encode()[1:], DATA
        ),
        "bad_header",
    ),
    "the same field twice": (
        assemble(b'{"dense/bias":{"dtype":"F32","dtype":"F16","shape":[4],"data_offsets":[0,16]}}', DATA),
        "bad_header",
    ),
    "a wrong name": (renamed("dense/Bias"), "wrong_name"),
    "a name that differs by an invisible character": (renamed("dense/bias\u200b"), "wrong_name"),
    "a name that UTF-8 cannot encode": (renamed("\ud800"), "wrong_name"),
    "a tensor missing": (write_tensors({"dense/kernel": KERNEL}), "wrong_name"),
    "a tensor too many": (write_tensors({**TENSORS, "extra": BIAS}), "wrong_name"),
    "no tensors": (write_tensors({}), "wrong_name"),
    "shape (1,) for (4,)": (with_bias(np.zeros(1, np.float32)), "wrong_shape"),
    "shape () for (4,)": (with_bias(np.float32(0).reshape(())), "wrong_shape"),
    "shape (4, 1) for (4,)": (with_bias(BIAS.reshape(4, 1)), "wrong_shape"),
    "transposed shape": (changed(shape=[3, 2]), "wrong_shape"),
    "shape far beyond the file": (changed(shape=[10**9, 10**9]), "wrong_shape"),
    "integers": (with_bias(np.zeros(4, np.int32)), "wrong_dtype"),
    "float64": (with_bias(BIAS.astype(np.float64)), "wrong_dtype"),
    "booleans": (with_bias(np.zeros(4, np.bool_)), "wrong_dtype"),
    "a big-endian dtype": (changed(dtype=">f4"), "wrong_dtype"),
    "objects": (changed(dtype="O"), "wrong_dtype"),
    "bfloat16": (changed(dtype="BF16"), "wrong_dtype"),
    "overlapping offsets": (
        assemble({"dense/kernel": entry("F32", [2, 3], 0, 24), "dense/bias": entry("F32", [4], 20, 36)}, DATA),
        "bad_offsets",
    ),
    "both at the same offset": (
        assemble({"dense/kernel": entry("F32", [2, 3], 0, 24), "dense/bias": entry("F32", [4], 0, 16)}, DATA),
        "bad_offsets",
    ),
    "a gap between the tensors": (
        assemble({"dense/kernel": entry("F32", [2, 3], 0, 24), "dense/bias": entry("F32", [4], 28, 44)}, DATA + b"\0" * 4),
        "bad_offsets",
    ),
    "a gap before the first tensor": (
        assemble({"dense/kernel": entry("F32", [2, 3], 4, 28), "dense/bias": entry("F32", [4], 28, 44)}, DATA + b"\0" * 4),
        "bad_offsets",
    ),
    "offsets do not match the shape": (changed(data_offsets=[0, 20]), "bad_offsets"),
    "offsets backwards": (changed(data_offsets=[24, 0]), "bad_offsets"),
    "offsets beyond the file": (
        assemble({"dense/bias": entry("F32", [4], 0, 16), "dense/kernel": entry("F32", [2, 3], 10**12, 10**12 + 24)}, DATA),
        "bad_offsets",
    ),
    "NaN": (with_bias(np.array([0, np.nan, 0, 0], np.float32)), "not_finite"),
    "infinity": (with_bias(np.array([0, 0, 0, np.inf], np.float32)), "not_finite"),
    "float16 infinity": (with_bias(np.array([0, 0, 0, -np.inf], np.float16)), "not_finite"),
}


@pytest.mark.parametrize("read", [read_tensors, read_flat])
@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_with_its_code(case: str, read: Callable[..., Any]) -> None:
    data, code = BAD_FILES[case]
    with pytest.raises(TensorFileError) as refused:
        read(data, expected=EXPECTED)
    assert refused.value.code == code
    assert str(refused.value).isascii()
    assert len(str(refused.value)) < 500


def test_a_good_file_is_read_whatever_the_bad_ones_did() -> None:
    read = read_tensors(GOOD, expected=EXPECTED)
    assert list(read) == ["dense/kernel", "dense/bias"]
    np.testing.assert_array_equal(read["dense/kernel"], KERNEL)
    np.testing.assert_array_equal(read["dense/bias"], BIAS)


@pytest.mark.parametrize("cut", range(len(GOOD)))
def test_a_file_cut_anywhere_is_never_read(cut: int) -> None:
    with pytest.raises(TensorFileError) as refused:
        read_tensors(GOOD[:cut], expected=EXPECTED)
    assert refused.value.code == "truncated"


def test_a_million_tensors_are_refused_before_the_header_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    header = b"{" + b",".join(b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % index for index in range(10**6)) + b"}"
    data = assemble(header)
    monkeypatch.setattr("aivo_core.tensors.json.loads", lambda *_a, **_k: pytest.fail("the header was parsed"))
    for read in (lambda: read_tensors(data, expected=EXPECTED), lambda: read_any(data), lambda: peek_metadata(data)):
        with pytest.raises(TensorFileError) as refused:
            read()
        assert refused.value.code == "too_large"


def test_any_storage_order_gives_the_same_result() -> None:
    other = write_tensors({"dense/bias": BIAS, "dense/kernel": KERNEL})
    assert other != write_tensors(TENSORS)
    read = read_tensors(other, expected=EXPECTED)
    assert list(read) == ["dense/kernel", "dense/bias"]
    np.testing.assert_array_equal(read["dense/kernel"], KERNEL)
    expected_flat = np.concatenate([KERNEL.ravel(), BIAS])
    np.testing.assert_array_equal(read_flat(other, expected=EXPECTED), expected_flat)
    np.testing.assert_array_equal(read_flat(write_tensors(TENSORS), expected=EXPECTED), expected_flat)


def test_flat_reading_copies_nothing_when_the_file_is_in_declared_order() -> None:
    data = write_tensors(TENSORS)
    flat = read_flat(data, expected=EXPECTED)
    assert np.shares_memory(flat, np.frombuffer(data, dtype=np.uint8))
    assert not flat.flags.writeable


def test_float16_is_widened_to_float32() -> None:
    data = write_tensors({"dense/kernel": KERNEL.astype(np.float16), "dense/bias": BIAS.astype(np.float16)})
    assert len(data) < len(write_tensors(TENSORS))
    read = read_tensors(data, expected=EXPECTED)
    assert {array.dtype for array in read.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(read["dense/bias"], BIAS)
    assert read_flat(data, expected=EXPECTED).dtype == np.float32


def test_float16_is_refused_where_only_float32_is_allowed() -> None:
    data = write_tensors({"dense/kernel": KERNEL, "dense/bias": BIAS.astype(np.float16)})
    with pytest.raises(TensorFileError, match="must be one of F32"):
        read_tensors(data, expected=EXPECTED, dtypes=("F32",))


def test_values_on_the_edge_of_float32_survive_to_the_bit() -> None:
    edge = np.array([-0.0, np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max, 1e-38], np.float32)
    read = read_tensors(with_bias(edge), expected=EXPECTED)["dense/bias"]
    assert read.tobytes() == edge.tobytes()


def test_writing_the_same_tensors_gives_the_same_bytes_and_aligned_data() -> None:
    first = write_tensors(TENSORS, metadata={"b": "2", "a": "1"})
    assert first == write_tensors(TENSORS, metadata={"a": "1", "b": "2"})
    assert int.from_bytes(first[:8], "little") % 8 == 0
    assert peek_metadata(first) == {"a": "1", "b": "2"}


def test_metadata_can_be_read_from_the_beginning_of_a_file() -> None:
    data = write_tensors(TENSORS, metadata={"schema": "1"})
    header_end = 8 + int.from_bytes(data[:8], "little")
    assert peek_metadata(data[:header_end]) == {"schema": "1"}
    assert peek_metadata(write_tensors(TENSORS)) == {}


def test_writing_takes_any_memory_layout_and_byte_order() -> None:
    data = write_tensors({"dense/kernel": np.asfortranarray(KERNEL), "dense/bias": BIAS.astype(">f4")[::1]})
    assert data == write_tensors(TENSORS)


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        ({"x": np.array(["text"])}, "wrong_dtype"),
        ({"x": np.array([object()])}, "wrong_dtype"),
        ({"x": np.zeros(2, np.complex64)}, "wrong_dtype"),
        ({"": BIAS}, "wrong_name"),
        ({"__metadata__": BIAS}, "wrong_name"),
        ({"\ud800": BIAS}, "wrong_name"),
    ],
)
def test_what_the_format_cannot_hold_is_not_written(tensors: dict[str, Any], code: str) -> None:
    with pytest.raises(TensorFileError) as refused:
        write_tensors(tensors)
    assert refused.value.code == code


def test_reading_never_lets_a_caller_change_the_bytes() -> None:
    buffer = bytearray(write_tensors(TENSORS))
    before = bytes(buffer)
    for array in (*read_tensors(buffer, expected=EXPECTED).values(), *read_any(buffer).values()):
        assert not array.flags.writeable
    assert bytes(buffer) == before


def test_own_files_keep_free_names_and_stored_dtypes() -> None:
    tensors = {
        "epoch": np.array(7, np.int64),
        "history": np.array([np.inf, 0.5], np.float64),
        "mask": np.array([True, False, True]),
        "odd bytes before": np.array([1], np.uint8),
        "weights": KERNEL,
        "nothing": np.zeros((0, 3), np.float32),
    }
    read = read_any(write_tensors(tensors))
    assert read.keys() == tensors.keys()
    for name, array in tensors.items():
        assert read[name].dtype == array.dtype
        assert read[name].shape == array.shape
        assert read[name].flags.aligned
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize(
    ("data", "limits", "code"),
    [
        (GOOD, Limits(max_bytes=len(GOOD) - 1), "too_large"),
        (GOOD, Limits(max_header=10), "too_large"),
        (GOOD, Limits(max_tensors=1), "too_large"),
        (GOOD[:-1], Limits(), "truncated"),
        (GOOD + b"\0", Limits(), "bad_offsets"),
        (changed(dtype="F8_E4M3"), Limits(), "wrong_dtype"),
        (changed(dtype="F64"), Limits(), "bad_offsets"),
        (assemble({"mask": entry("BOOL", [2], 0, 2)}, b"\x01\x02"), Limits(), "wrong_dtype"),
    ],
)
def test_own_files_are_limited_and_checked_too(data: bytes, limits: Limits, code: str) -> None:
    with pytest.raises(TensorFileError) as refused:
        read_any(data, limits)
    assert refused.value.code == code


def test_the_default_network_fits_the_default_limits() -> None:
    tensors = {spec.name: np.zeros(spec.shape, np.float32) for spec in NetworkSpec().tensors}
    data = write_tensors(tensors)
    assert int.from_bytes(data[:8], "little") < DEFAULT_MAX_HEADER / 10
    assert read_tensors(data, expected=NetworkSpec().tensors).keys() == tensors.keys()


arrays = st.one_of(
    *[
        hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
        for dtype in sorted(DTYPES.values(), key=str)
    ]
)
files = st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), arrays, max_size=5)


@settings(max_examples=150, deadline=None)
@given(
    tensors=files,
    metadata=st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")), max_size=3),
)
def test_what_is_written_is_read_again_to_the_bit_here_and_by_the_safetensors_package(
    tensors: dict[str, Any], metadata: dict[str, str]
) -> None:
    tensors.pop("__metadata__", None)
    data = write_tensors(tensors, metadata=metadata)
    theirs = safetensors.numpy.load(data)
    ours = read_any(data)
    assert ours.keys() == theirs.keys() == tensors.keys()
    assert peek_metadata(data) == metadata
    for name, array in tensors.items():
        for read in (ours[name], theirs[name]):
            assert read.shape == array.shape
            assert read.dtype == array.dtype
            assert read.tobytes() == array.tobytes()


@settings(max_examples=150, deadline=None)
@given(tensors=files)
def test_what_the_safetensors_package_writes_is_read(tensors: dict[str, Any]) -> None:
    tensors.pop("__metadata__", None)
    read = read_any(safetensors.numpy.save(tensors, metadata={"format": "np"}))
    assert read.keys() == tensors.keys()
    for name, array in tensors.items():
        assert read[name].shape == array.shape
        assert read[name].tobytes() == array.tobytes()


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, len(GOOD) - 1), value=st.integers(0, 255))
def test_a_changed_byte_gives_an_error_or_the_declared_tensors_never_anything_else(position: int, value: int) -> None:
    data = bytearray(GOOD)
    data[position] = value
    try:
        read = read_tensors(bytes(data), expected=EXPECTED)
    except TensorFileError:
        return
    assert {name: array.shape for name, array in read.items()} == {spec.name: spec.shape for spec in EXPECTED}
    assert all(np.isfinite(array).all() for array in read.values())


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(TensorFileError):
        read_tensors(data, expected=EXPECTED)


def test_the_safetensors_package_refuses_the_same_layouts() -> None:
    for case in ("overlapping offsets", "a gap between the tensors", "one byte too many", "cut by one byte"):
        with pytest.raises(safetensors.SafetensorError):
            safetensors.numpy.load(BAD_FILES[case][0])
