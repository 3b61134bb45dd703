"""Numbers by chance in compiled loops: the key stream of ChaCha20, and Gaussian noise out of it.

Everything that is compiled is in this file, for the reason that ``aivo_core.engine.compiled`` gives.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types

WHOLE: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
HELPER: dict[str, Any] = {**WHOLE, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}

LANES = 64
"""ChaCha20 blocks computed at once, word by word: each line of its rounds is then a loop over as many numbers."""

NORMALS = 8 * LANES
"""Normal draws out of so many blocks: 64 bits for a radius, 62 for an angle and 2 for its quadrant give two."""

MASK_52 = np.int64(0x000FFFFFFFFFFFFF)
ONE_BITS = np.int64(0x3FF0000000000000)
LN2_UPPER, LN2_LOWER = 6.93147180369123816490e-01, 1.90821492927058770002e-10
QUARTER = math.pi / 2.0


@njit(**HELPER)
def quarter_round(a, b, c, d):
    """RFC 8439, section 2.1, on LANES blocks."""
    for i in range(LANES):
        w, x, y, z = a[i], b[i], c[i], d[i]
        w = np.uint32(w + x)
        z = np.uint32(z ^ w)
        z = np.uint32((z << np.uint32(16)) | (z >> np.uint32(16)))
        y = np.uint32(y + z)
        x = np.uint32(x ^ y)
        x = np.uint32((x << np.uint32(12)) | (x >> np.uint32(20)))
        w = np.uint32(w + x)
        z = np.uint32(z ^ w)
        z = np.uint32((z << np.uint32(8)) | (z >> np.uint32(24)))
        y = np.uint32(y + z)
        x = np.uint32(x ^ y)
        x = np.uint32((x << np.uint32(7)) | (x >> np.uint32(25)))
        a[i], b[i], c[i], d[i] = w, x, y, z


@njit(**HELPER)
def chacha_start(state, block, lane_words):
    """LANES copies of ``state`` (16 words; 12 and 13 are replaced by a 64-bit counter), counted up from ``block``."""
    for word in range(16):
        lane_words[word][:] = state[word]
    for i in range(LANES):
        count = block + np.uint64(i)
        lane_words[12, i] = np.uint32(count & np.uint64(0xFFFFFFFF))
        lane_words[13, i] = np.uint32(count >> np.uint64(32))


@njit(**HELPER)
def chacha(state, block, words, before):
    """LANES blocks of ChaCha20 (RFC 8439, section 2.3; Bernstein 2008) into ``words`` (16, LANES)."""
    chacha_start(state, block, before)
    words[:, :] = before
    for _ in range(10):
        for column in range(4):
            quarter_round(words[column], words[4 + column], words[8 + column], words[12 + column])
        for column in range(4):
            quarter_round(words[column], words[4 + (column + 1) % 4], words[8 + (column + 2) % 4], words[12 + (column + 3) % 4])
    for word in range(16):
        one, other = words[word], before[word]
        for i in range(LANES):
            one[i] = np.uint32(one[i] + other[i])


@njit(**HELPER)
def logarithm(x):
    """Of a normal double in (0, 1], to 1 unit in the last place (fdlibm, e_log.c)."""
    bits = np.float64(x).view(np.int64)
    k = np.float64((bits >> np.int64(52)) - np.int64(1023))
    m = np.int64((bits & MASK_52) | ONE_BITS).view(np.float64)
    large = m > 1.4142135623730951
    m = 0.5 * m if large else m
    k = k + 1.0 if large else k
    f = m - 1.0
    s = f / (2.0 + f)
    z = s * s
    r = z * 1.479819860511658591e-01 + 1.531383769920937332e-01
    r = z * r + 1.818357216161805012e-01
    r = z * r + 2.222219843214978396e-01
    r = z * r + 2.857142874366239149e-01
    r = z * r + 3.999999999940941908e-01
    r = z * (z * r + 6.666666666666735130e-01)
    half = 0.5 * f * f
    return k * LN2_UPPER - ((half - (s * (half + r) + k * LN2_LOWER)) - f)


@njit(**HELPER)
def radii(high, low, std, out):
    """sqrt(-2 log u) std for u = (64 bits + 1/2) / 2^64."""
    for i in range(LANES):
        u = np.float64(high[i]) * 2.0**-32 + (np.float64(low[i]) + 0.5) * 2.0**-64
        out[i] = std * math.sqrt(-2.0 * logarithm(u))


@njit(**HELPER)
def turn(high, low, radius, out):
    """(2, LANES): radius times cosine and sine (fdlibm, k_cos.c and k_sin.c) of an angle within an eighth of a turn from
    one of four directions."""
    first, second = out[0], out[1]
    for i in range(LANES):
        quarter = high[i] >> np.uint32(30)
        part = np.float64(high[i] & np.uint32(0x3FFFFFFF)) * 2.0**-30 + (np.float64(low[i]) + 0.5) * 2.0**-62
        x = (part - 0.5) * QUARTER
        z = x * x
        s = z * 1.58969099521155010221e-10 - 2.50507602534068634195e-08
        s = z * s + 2.75573137070700676789e-06
        s = z * s - 1.98412698298579493134e-04
        s = z * s + 8.33333333332248946124e-03
        s = z * s - 1.66666666666666324348e-01
        sine = radius[i] * (x + x * z * s)
        c = z * -1.13596475577881948265e-11 + 2.08757232129817482790e-09
        c = z * c - 2.75573143513906633035e-07
        c = z * c + 2.48015872894767294178e-05
        c = z * c - 1.38888888888741095749e-03
        c = z * c + 4.16666666666666019037e-02
        cosine = radius[i] * (1.0 - 0.5 * z + z * z * c)
        swapped = (quarter & np.uint32(1)) != 0
        a, b = (sine, cosine) if swapped else (cosine, sine)
        turned = (quarter & np.uint32(2)) != 0
        first[i] = -a if turned else a
        second[i] = -b if turned else b


def chacha_words(state, block, out):
    """``out`` (uint32) becomes the key stream from ``block`` on, in its order."""
    words, before = np.empty((16, LANES), dtype=np.uint32), np.empty((16, LANES), dtype=np.uint32)
    for begin in range(0, out.size, 16 * LANES):
        chacha(state, block + np.uint64(begin // 16), words, before)
        for i in range(begin, min(begin + 16 * LANES, out.size)):
            out[i] = words[i % 16, (i - begin) // 16]


def chacha_normals(state, block, std, out):
    """``out`` (float64) becomes draws from N(0, std^2), by Box and Muller 1958; uses ceil(size / NORMALS) LANES blocks."""
    words, before = np.empty((16, LANES), dtype=np.uint32), np.empty((16, LANES), dtype=np.uint32)
    radius, pairs = np.empty(LANES, dtype=np.float64), np.empty((2, LANES), dtype=np.float64)
    at = 0
    while at < out.size:
        chacha(state, block, words, before)
        block += np.uint64(LANES)
        for four in range(0, 16, 4):
            radii(words[four], words[four + 1], std, radius)
            turn(words[four + 2], words[four + 3], radius, pairs)
            for half in range(2):
                count = min(LANES, out.size - at)
                for i in range(count):
                    out[at + i] = pairs[half, i]
                at += count


class Dispatchers(NamedTuple):
    """Functions of this file, with the one signature that each is compiled for."""

    words: Any
    normals: Any

    def compile(self) -> None:
        """Load all from the cache, or compile and cache them (seconds)."""
        for function, signature in zip(self, SIGNATURES, strict=True):
            function.compile(signature)
            function.disable_compile()


_STATE = types.Array(types.uint32, 1, "C", readonly=True)
SIGNATURES = (
    types.void(_STATE, types.uint64, types.Array(types.uint32, 1, "C")),
    types.void(_STATE, types.uint64, types.float64, types.Array(types.float64, 1, "C")),
)


def dispatchers(*, cache: bool) -> Dispatchers:
    """Numba functions that are not compiled yet.

    Raises:
        RuntimeError: ``cache`` and there is no folder that the cache could be written to.
    """
    return Dispatchers(*(njit(cache=cache, **WHOLE)(function) for function in (chacha_words, chacha_normals)))
