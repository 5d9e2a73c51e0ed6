"""Triton kernels between channels-last maps and planes.

A program takes BP pixels, of which an image has TILES times as many, and BC channels. C counts vectors of V channels,
HWV vectors of VP pixels, and FAR, from one of several maps to the next, vectors of both.
"""

import triton
import triton.language as tl

_SIZES = ('C', 'HWV', 'TILES', 'FAR', 'N')


@triton.jit
def _tile(pid, C, HW, TILES, BP: tl.constexpr, BC: tl.constexpr):
    """Channels and which are there; pixels' offsets in both orders, which are there, and what comes after ``pid``."""
    blocks = tl.cdiv(C, BC)
    c = pid % blocks * BC + tl.arange(0, BC)
    pid = pid // blocks
    pixel = pid % TILES * BP + tl.arange(0, BP)
    start = (pid // TILES).to(tl.int64) * HW * C
    known = c < C
    mask = (pixel < HW)[:, None] & known[None, :]
    turned = start + (c * HW)[None, :] + pixel[:, None]
    at = start + (pixel * C)[:, None] + c[None, :]
    return c, known, mask, turned, at


@triton.jit(do_not_specialize=_SIZES)
def planes_kernel(
    one, two, out, C, HWV, TILES, FAR, N,
    V: tl.constexpr, VP: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out[N, B, C, H, W] of the channels-last maps ``one`` and, if N is 2, ``two``."""
    pid = tl.program_id(0)
    n = pid % N
    source = one
    if n > 0:
        source = two
    _, _, mask, turned, at = _tile(pid // N, C * V, HWV * VP, TILES, BP, BC)
    value = tl.load(source + at, mask=mask, other=0.0)
    tl.store(out + n * FAR.to(tl.int64) * (V * VP) + turned, value, mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def sum_kernel(
    planes, lines, factor, shift, out, C, HWV, TILES, FAR,
    V: tl.constexpr, VP: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, M: tl.constexpr, T: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """out[B, H, W, C], the sum of planes[M, B, C, H, W] and lines[T, B, H, W, C], both FAR apart.

    SCALED: shift + the sum of factor times them, of factor[M + T, C].
    """
    C, far = C * V, FAR.to(tl.int64) * (V * VP)
    c, known, mask, turned, at = _tile(tl.program_id(0), C, HWV * VP, TILES, BP, BC)
    made = tl.zeros((BP, BC), tl.float32)
    for m in tl.static_range(M):
        value = tl.load(planes + m * far + turned, mask=mask, other=0.0).to(tl.float32)
        if SCALED:
            value *= tl.load(factor + m * C + c, mask=known, other=0.0)[None, :]
        made += value
    total = tl.zeros((BP, BC), tl.float32)
    if SCALED:
        total += tl.load(shift + c, mask=known, other=0.0)[None, :]
    for n in tl.static_range(T):
        value = tl.load(lines + n * far + at, mask=mask, other=0.0).to(tl.float32)
        if SCALED:
            value *= tl.load(factor + (M + n) * C + c, mask=known, other=0.0)[None, :]
        total += value
    tl.store(out + at, (total + made).to(out.dtype.element_ty), mask=mask)
