"""Device functions: the numerics that every kernel shares, in base 2 and float32.

A running log-sum-exp is a pair (m, s): m the maximum of x * log2(e), s the sum of 2^(x * log2(e) - m).
It is kept lane by lane in tiles [ROWS, U, T, V] -> [ROWS, T] (U loads of V elements a thread, T lanes a
row), so that a step needs no exchange between threads; lanes meet once, at the end (rowwise.py).
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Where running maxima start: finite, so that inf - inf never appears, and below any scaled logit in use.
LOWEST: tl.constexpr = tl.constexpr(-1e38)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 to a few ulp: the rounding of 1 + x is divided out again."""
    u = 1.0 + x
    return tl.where((u == 1.0) | (u == float("inf")), x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def log1p_unit(e):
    """log(1 + e) for e in [0, 1]: e + e^2 g(e), g of degree 7 (Chebyshev), 2 ulp, no special function."""
    g = tl.fma(e, 0.007184105317048076, -0.03710757381816528)
    g = tl.fma(g, e, 0.09019058437853808)
    g = tl.fma(g, e, -0.14636260788549096)
    g = tl.fma(g, e, 0.1953962885284444)
    g = tl.fma(g, e, -0.2494623109007572)
    g = tl.fma(g, e, 0.3333086049735581)
    g = tl.fma(g, e, -0.4999998081414813)
    return tl.fma(e * e, g, e)


@triton.jit
def softplus(z):
    return tl.maximum(z, 0.0) + log1p(tl.exp2(-tl.abs(z) * LOG2E))


@triton.jit
def sigmoid(z):
    e = tl.exp2(-tl.abs(z) * LOG2E)
    return tl.where(z >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def scale2(x, offset):
    """x * log2(e) - offset, rounded once."""
    return tl.fma(x, LOG2E, -offset)


@triton.jit
def tanh(x):
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def lanes_max(x):
    return tl.max(tl.max(x, 3), 1)


@triton.jit
def lanes_sum(x):
    return tl.sum(tl.sum(x, 3), 1)


@triton.jit
def spread(v):
    """A value a lane, [ROWS, T], over its elements [ROWS, U, T, V]."""
    return v[:, None, :, None]
