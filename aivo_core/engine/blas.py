"""Holds the linear algebra libraries of NumPy and SciPy to one thread.

Learners are trained in parallel, each on one thread: a library that starts threads of its own for each small product only
costs time, and the order of a sum, and so its last bits, would depend on their number. The setting is the process's.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_SYMBOLS = (
    *(f"{prefix}openblas_set_num_threads{suffix}" for prefix in ("scipy_", "") for suffix in ("64_", "_64", "")),
    "MKL_Set_Num_Threads",
)

_AVX512_CORES = (b"SkylakeX", b"Cooperlake", b"SapphireRapids")

_BRINGERS = ("numpy", "scipy", "scipy.linalg", "numba", "tensorflow")
"""Packages that load one."""


def use_one_thread() -> tuple[str, ...]:
    """Set every OpenBLAS or MKL that came with NumPy or SciPy, or that this process has loaded, to one thread.

    Returns:
        Names of the files that were set. Empty where a build brings neither (Accelerate, reference BLAS): there the
        number of threads is the environment's.
    """
    names = []
    for path, setter in _setters(tuple(name in sys.modules for name in _BRINGERS)):
        setter(1)
        names.append(Path(path).name)
    return tuple(names)


@lru_cache(maxsize=16)
def _setters(_imported: tuple[bool, ...]) -> tuple[tuple[str, Any], ...]:
    """What to call, looked up anew only when a package that brings such a library was imported: looking takes 10 ms."""
    return tuple((path, setter) for path in sorted(set(_loaded())) if (setter := _setter(path)) is not None)


@lru_cache(maxsize=1)
def small_product() -> int:
    """Up to how many multiplications a product counts as small for SciPy's OpenBLAS; 0 where it makes no difference.

    Its AVX-512 kernels multiply small matrices without copying them first (kernel/x86_64/sgemm_small_kernel_permit_skylakex.c:
    up to 100^3), a fifth faster than a larger product of these shapes. Constant on one machine.
    """
    for path in _bundled("scipy"):
        library = ctypes.CDLL(path)
        for symbol in ("scipy_openblas_get_corename", "openblas_get_corename"):
            if hasattr(library, symbol):
                name = getattr(library, symbol)
                name.restype = ctypes.c_char_p
                return 100**3 if name() in _AVX512_CORES else 0
    return 0


def _setter(path: str) -> Any | None:
    library = ctypes.CDLL(path)
    for symbol in _SYMBOLS:
        if hasattr(library, symbol):
            setter = getattr(library, symbol)
            setter.argtypes, setter.restype = [ctypes.c_int], None
            return setter
    return None


def _loaded() -> Iterator[str]:
    """Paths of the BLAS libraries: bundled ones of packages that are imported, and on Linux all that are mapped."""
    for package in ("numpy", "scipy"):
        if package in sys.modules:
            yield from _bundled(package)
    maps = Path("/proc/self/maps")
    if maps.is_file():
        for line in maps.read_text().splitlines():
            path = line.split(maxsplit=5)[5] if line.count("/") else ""
            if _is_blas(Path(path).name):
                yield path


@lru_cache(maxsize=2)
def _bundled(package: str) -> tuple[str, ...]:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return ()
    home = Path(spec.origin).parent
    folders = (home.parent / f"{package}.libs", home / ".dylibs", home / ".libs")
    return tuple(str(path.resolve()) for folder in folders if folder.is_dir() for path in folder.iterdir() if _is_blas(path.name))


def _is_blas(name: str) -> bool:
    return "openblas" in name or name.startswith("libmkl_rt")
