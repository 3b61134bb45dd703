"""Files of partial sums: what one shard of an aggregation leaves for the one that merges, until the aggregate is written.

They carry no noise, whatever the round's policy is: as secret as the deltas in them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from aivo_core.tensors import TensorFileError, read_any, write_tensors
from models_store.errors import StoreError
from models_store.files import MAIN_MODELS, StoredFile, checksum, delete_file, read_file, write_file

Array = npt.NDArray[Any]

PARTIAL_SUMS = re.compile(r"rounds/\d+/attempt-\d+/blocks-\d+-[0-9a-f]{8}\.safetensors")


def write_partial_sums(*, round_sequence: int, attempt: int, first_block: int, tensors: Mapping[str, Array]) -> StoredFile:
    """Write the sums of a run of blocks; the same sums again change nothing.

    Raises:
        StoreError: ``already_exists``, ``bad_path``.
    """
    data = write_tensors(tensors, metadata={"kind": "partial sums"})
    name = f"blocks-{first_block:05d}-{checksum(data)[:8]}.safetensors"
    return write_file(alias=MAIN_MODELS, path=f"rounds/{round_sequence}/attempt-{attempt}/{name}", data=data)


def read_partial_sums(*, path: str, sha256: str) -> dict[str, Array]:
    """The tensors of such a file, verified.

    Raises:
        StoreError: ``missing_file``, ``checksum_mismatch``, ``bad_path``, ``bad_file``.
    """
    try:
        return read_any(read_file(alias=MAIN_MODELS, path=path, sha256=sha256))
    except TensorFileError as error:
        raise StoreError(f"the file {path} cannot be used: {error}", code="bad_file") from error


def delete_partial_sums(path: str) -> bool:
    """Remove such a file; whether it was there.

    Raises:
        StoreError: ``bad_path`` for a name of something else.
    """
    if not PARTIAL_SUMS.fullmatch(path):
        raise StoreError(f"{path[:80]!a} is no file of partial sums", code="bad_path")
    return delete_file(alias=MAIN_MODELS, path=path)
