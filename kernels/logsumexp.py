"""Device functions: a row's log-sum-exp lane by lane, and with it the sum of q x for weights q.

A lane keeps m, the maximum of x log2(e), and s = sum 2^(x log2(e) - m); where DENSE also a = sum
q (x log2(e) - m) and b = sum q. Every maximum starts at LOWEST, which is finite.
"""

import triton
import triton.language as tl

from .numerics import LOG2E, LOWEST, lanes_dot, lanes_max, lanes_sum, scale2, spread


@triton.jit
def lse_start(ROWS: tl.constexpr, T: tl.constexpr):
    zero = tl.zeros([ROWS, T], tl.float32)
    return tl.full([ROWS, T], LOWEST, tl.float32), zero, zero, zero


@triton.jit
def lse_update(x, q, q_sum, m, s, a, b, DENSE: tl.constexpr, U: tl.constexpr, T: tl.constexpr,
               V: tl.constexpr):  # fmt: skip
    """One block [ROWS, BLOCK] into the lanes [ROWS, T]. An element with x = LOWEST, q = 0 adds nothing. q_sum: the
    lanes' sums of q where they are known."""
    x = tl.reshape(x, [x.shape[0], U, T, V])
    top = tl.maximum(m, lanes_max(x) * LOG2E)
    u = scale2(x, spread(top))
    s = tl.fma(s, tl.exp2(m - top), lanes_sum(tl.exp2(u)))
    if DENSE:
        if len(q.shape) == 0:  # one weight for all of the block
            a = a + tl.fma(b, m - top, lanes_sum(u) * q)
            b = b + q * (U * V)
        else:
            q = tl.reshape(q, [q.shape[0], U, T, V])
            a = a + tl.fma(b, m - top, lanes_dot(q, u))
            b = b + (lanes_sum(q) if q_sum is None else q_sum)
    return top, s, a, b


@triton.jit
def lse_join(m, s, a, b):
    """Lanes [ROWS, T] to rows [ROWS], or to scalars where there is one row."""
    top = tl.max(m, 1)
    down = m - top[:, None]
    s, a, b = tl.sum(s * tl.exp2(down), 1), tl.sum(tl.fma(b, down, a), 1), tl.sum(b, 1)
    if m.shape[0] == 1:
        return tl.max(top, 0), tl.sum(s, 0), tl.sum(a, 0), tl.sum(b, 0)
    else:
        return top, s, a, b


@triton.jit
def lse_meet(m, s, a, b, m2, s2, a2, b2):
    """Two parts of the same rows to one."""
    top = tl.maximum(m, m2)
    s = s * tl.exp2(m - top) + s2 * tl.exp2(m2 - top)
    return top, s, tl.fma(b, m - top, a) + tl.fma(b2, m2 - top, a2), b + b2
