"""Device functions: the numerics that every kernel shares, in base 2 and float32.

A running log-sum-exp is a pair (m, s): m the maximum of x * log2(e), s the sum of 2^(x * log2(e) - m).
It is kept lane by lane in tiles [ROWS, U, T, V] -> [ROWS, T] (U loads of V elements a thread, T lanes a
row), so that a step needs no exchange between threads; lanes meet once, at the end (logsumexp.py).
"""

import inspect

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Where running maxima start: finite, so that inf - inf never appears, and below any scaled logit in use.
LOWEST: tl.constexpr = tl.constexpr(-1e38)
# Triton 3.9 has a division that leaves out what only results and divisors beside the normal numbers need
APPROXIMATE: tl.constexpr = tl.constexpr("approx" in inspect.signature(tl.fdiv).parameters)
COMPILED: tl.constexpr = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def quotient(a, b):
    """a / b for b from 2^-126 to 2^126, 2 ulp."""
    if APPROXIMATE:
        return tl.fdiv(a, b, approx=True)
    else:
        return a / b


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


@tl.core.builtin
def for_cuda(_semantic=None):
    """Whether this is compiled for a GPU of NVIDIA's: the compiler's target, where target_info asks the driver."""
    return tl.constexpr(_semantic.builder.options.backend_name == "cuda")


@triton.jit
def log2_approx(x, SUBNORMAL: tl.constexpr):
    """log2(x), -inf at 0 and nan below, off by 2^-22, between 1/2 and 2 absolutely: for half precision. One
    special-function operation; subnormal numbers are 0, or (SUBNORMAL) cost some more."""
    if COMPILED and for_cuda():  # tl.log2 has no approximation there, and others have no such instruction
        ASM: tl.constexpr = "lg2.approx.f32 $0, $1;" if SUBNORMAL else "lg2.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(ASM, "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.log2(x)


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
def log1m_ratio(p, HALF: tl.constexpr = False):
    """-log(1 - p) / p for p in [0, 1/2]: 1 + p g(p), g of degree 7 (minimax), 1 ulp; HALF: of degree 4, to 8e-6."""
    if HALF:
        g = tl.fma(p, 0.8238956928253174, -0.28044238686561584)
        g = tl.fma(g, p, 0.38822290301322937)
        g = tl.fma(g, p, 0.3169211447238922)
        g = tl.fma(g, p, 0.5006147623062134)
    else:
        g = tl.fma(p, 1.4145477231456778, -1.63958976196845)
        g = tl.fma(g, p, 1.2087141379996342)
        g = tl.fma(g, p, -0.18095238774952135)
        g = tl.fma(g, p, 0.2636909633754989)
        g = tl.fma(g, p, 0.24368260504292866)
        g = tl.fma(g, p, 0.33363212082127935)
        g = tl.fma(g, p, 0.49999521720551154)
    return tl.fma(g, p, 1.0)


@triton.jit
def log_sum(s):
    """log of a sum of powers of which one is 1: -inf for no terms at all, nan is kept."""
    return tl.where(s > 0, log(s), tl.where(s == 0, float("-inf"), float("nan")))


@triton.jit
def log1p(x):
    """log(1 + x) of a finite x >= 0 to a few ulp: the rounding of 1 + x is divided out again; nan is kept."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def log1p_ratio(e, HALF: tl.constexpr = False):
    """log(1 + e) / e for e in [0, 1], no special function: 1 + e g(e), g of degree 7 (Chebyshev), 3 ulp; HALF: of
    degree 4 (minimax), to 1e-5."""
    if HALF:
        g = tl.fma(e, -0.024734538048505783, 0.10359262675046921)
        g = tl.fma(g, e, -0.21240419149398804)
        g = tl.fma(g, e, 0.3262260854244232)
        g = tl.fma(g, e, -0.49953946471214294)
    else:
        g = tl.fma(e, 0.007184105317048076, -0.03710757381816528)
        g = tl.fma(g, e, 0.09019058437853808)
        g = tl.fma(g, e, -0.14636260788549096)
        g = tl.fma(g, e, 0.1953962885284444)
        g = tl.fma(g, e, -0.2494623109007572)
        g = tl.fma(g, e, 0.3333086049735581)
        g = tl.fma(g, e, -0.4999998081414813)
    return tl.fma(g, e, 1.0)


@triton.jit
def add_softplus(z, rest):
    """log(1 + exp(-|z|)) + rest, rounded once."""
    e = tl.exp2(-tl.abs(z) * LOG2E)
    return tl.fma(e, log1p_ratio(e), rest)


@triton.jit
def softplus(z):
    return add_softplus(z, tl.maximum(z, 0.0))


@triton.jit
def scale2(x, offset):
    """x * log2(e) - offset, rounded once."""
    return tl.fma(x, LOG2E, -offset)


@triton.jit
def inverse(v):
    """1 / v of normal v, 2 ulp: a division looks after others as well."""
    r = tl.rsqrt(v)
    return r * r


@triton.jit
def inverses_of_eight(v):
    """1 / v of v in [1, 2], eight neighbours [..., BLOCK] from one reciprocal."""
    ac, bd = tl.split(tl.reshape(v, [v.shape[0], v.shape[1] // 4, 2, 2]))
    a, c = tl.split(ac)
    b, d = tl.split(bd)
    ab, cd = a * b, c * d
    first, second = tl.split(tl.reshape(ab * cd, [v.shape[0], v.shape[1] // 8, 2]))
    r = inverse(first * second)
    r = tl.reshape(tl.join(r * second, r * first), [v.shape[0], v.shape[1] // 4])
    r_ab, r_cd = r * cd, r * ab
    return tl.reshape(tl.join(tl.join(r_ab * b, r_cd * d), tl.join(r_ab * a, r_cd * c)), v.shape)


@triton.jit
def soft_cap(x, cap, HALF: tl.constexpr, IN_EIGHTS: tl.constexpr):
    """cap tanh(x / cap) = cap (1 - e) / (1 + e), e = exp(-2 x / cap). HALF: x was half precision, and half a dozen
    roundings are not seen; IN_EIGHTS: neighbours of it stand in one thread."""
    if HALF and IN_EIGHTS:  # of |x|, as no product of eight 1 + e overflows then
        e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E / cap))
        y = tl.fma(e, -cap, cap) * inverses_of_eight(1.0 + e)
        signed = y.to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & -0x80000000)
        return signed.to(tl.float32, bitcast=True)
    else:
        e = tl.exp2(tl.minimum(x * (-2.0 * LOG2E / cap), 30.0, propagate_nan=tl.PropagateNan.ALL))
        v, y = 1.0 + e, tl.fma(e, -cap, cap)
        return y * inverse(v) if HALF else quotient(y, v)


@triton.jit
def lanes_max(x):
    return tl.max(tl.max(x, 3), 1)


@triton.jit
def lanes_min(x):
    return tl.min(tl.min(x, 3), 1)


@triton.jit
def lanes_sum(x):
    return tl.sum(tl.sum(x, 3), 1)


@triton.jit
def twos(x):
    """[N, V] -> [N, ..., 2], to be split again and again: the compiler is slow where each split has its reshape."""
    if x.shape[1] == 8:
        return tl.reshape(x, [x.shape[0], 2, 2, 2])
    elif x.shape[1] == 4:
        return tl.reshape(x, [x.shape[0], 2, 2])
    else:
        return tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2])


@triton.jit
def add_dot(total, a, b):
    """total [lanes] + the sums of a b [lanes, V] over a lane, one multiplication and addition each; a total [lanes, 2]
    takes them in two parts."""
    if len(a.shape) == len(total.shape) and a.shape[len(a.shape) - 1] == total.shape[len(a.shape) - 1]:
        return tl.fma(a, b, total)
    elif a.shape[1] == 1:
        return tl.fma(tl.reshape(a, [a.shape[0]]), tl.reshape(b, [a.shape[0]]), total)
    elif len(a.shape) == 2 and a.shape[1] > 2:
        return add_dot(total, twos(a), twos(b))
    else:
        a0, a1 = tl.split(a)
        b0, b1 = tl.split(b)
        return add_dot(add_dot(total, a0, b0), a1, b1)


@triton.jit
def lanes_dot(a, b):
    """The sums of a b [ROWS, U, T, V] over a lane. Two products are added by one fma: all by fma, as add_dot does, is
    0.4 less an element, but a quarter of a second more to compile."""
    if a.shape[3] == 1:
        return lanes_sum(a * b)
    else:
        PAIRS: tl.constexpr = [a.shape[0], a.shape[1], a.shape[2], a.shape[3] // 2, 2]
        a0, a1 = tl.split(tl.reshape(a, PAIRS))
        b0, b1 = tl.split(tl.reshape(b, PAIRS))
        return lanes_sum(tl.fma(a0, b0, a1 * b1))


@triton.jit
def lanes_dots(a, b):
    """lanes_dot in two parts, [ROWS, T, 2] (V of 1: in one)."""
    if a.shape[3] < 4:
        return tl.sum(a * b, 1)
    else:
        FOURS: tl.constexpr = [a.shape[0], a.shape[1], a.shape[2], a.shape[3] // 4, 2, 2]
        a0, a1 = tl.split(tl.reshape(a, FOURS))
        b0, b1 = tl.split(tl.reshape(b, FOURS))
        return tl.sum(tl.sum(tl.fma(a0, b0, a1 * b1), 3), 1)


@triton.jit
def spread(v):
    """A value a lane, [ROWS, T], over its elements [ROWS, U, T, V]."""
    return v[:, None, :, None]
