"""Device functions: the natural logarithm in float32, about half as many instructions as tl.log."""

import triton
import triton.language as tl

from .numerics import LN2


@triton.jit
def log(x, SCALE: tl.constexpr = 0):
    """log(x / 2^SCALE) of a finite positive normal x, 1.05 ulp.

    x = 2^k (1 + f) with 1 + f in [2/3, 4/3), and log(1 + f) = f + f^2 g(f), g of degree 7 (minimax).
    One constant for ln 2 is enough: it is 3e-9 off, and its sum with log(1 + f) cancels at most half.
    Other arguments give finite numbers: log(0) is -88.0 (-127 ln 2), or with SCALE less by SCALE ln 2.
    """
    bits = x.to(tl.int32, bitcast=True)
    k = (bits - (0x3F2AAAAB + SCALE * 0x800000)) & -0x800000  # the power of two, times 2^23
    f = tl.fma((bits - k).to(tl.float32, bitcast=True), 2.0**-SCALE, -1.0)
    g = tl.fma(f, 0.14026353640897554, -0.1538853981989915)
    g = tl.fma(g, f, 0.13995808057499892)
    g = tl.fma(g, f, -0.16415960736224833)
    g = tl.fma(g, f, 0.20011168603858187)
    g = tl.fma(g, f, -0.2500781889670265)
    g = tl.fma(g, f, 0.3333319813817739)
    g = tl.fma(g, f, -0.4999993607874249)
    return tl.fma(k.to(tl.float32), LN2 / 0x800000, tl.fma(f * f, g, f))


@triton.jit
def log_positive(x):
    """log of a finite positive x, subnormal numbers among them."""
    tiny = x < 1.1754943508222875e-38
    return log(tl.where(tiny, x * 16777216.0, x)) - tl.where(tiny, 24 * LN2, 0.0)


@triton.jit
def log_any(x):
    """log of any x: -inf at 0, nan below, inf and nan are kept."""
    y = tl.where(x < float("inf"), log_positive(x), x)
    return tl.where(x <= 0, tl.where(x == 0, float("-inf"), float("nan")), y)


@triton.jit
def log1m_half(p):
    """log(1 - p) for p in [0, 1/2], 1.2 ulp: -p + p^2 g(p), g of degree 7 (minimax)."""
    g = tl.fma(p, -1.4145477231456778, 1.63958976196845)
    g = tl.fma(g, p, -1.2087141379996342)
    g = tl.fma(g, p, 0.18095238774952135)
    g = tl.fma(g, p, -0.2636909633754989)
    g = tl.fma(g, p, -0.24368260504292866)
    g = tl.fma(g, p, -0.33363212082127935)
    g = tl.fma(g, p, -0.49999521720551154)
    return tl.fma(p * p, g, -p)
