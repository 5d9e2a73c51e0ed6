"""The Triton kernel of ``sums``."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=('PARTS', 'E', 'TURNED', 'WIDTH'))
def sum_shares_kernel(
    shares, sums, PARTS, E, TURNED, WIDTH, V: tl.constexpr, BP: tl.constexpr, BE: tl.constexpr, TURN: tl.constexpr
):
    """sums[B, E] of shares[B, PARTS, E]; a program has BE columns of an image and takes BP rows at a time.

    With TURN over 1 an image's first TURNED sums are rows of WIDTH, every TURN of which are written column by column.
    """
    E = E * V
    blocks = tl.cdiv(E, BE)
    pid = tl.program_id(0)
    image = pid // blocks
    e = pid % blocks * BE + tl.arange(0, BE)
    p = tl.arange(0, BP)
    known = (e < E)[None, :]
    at = shares + image.to(tl.int64) * PARTS * E + p[:, None] * E + e[None, :]
    total = tl.zeros((BP, BE), dtype=tl.float32)
    for part in range(0, PARTS, BP):
        total += tl.load(at + part * E, mask=(part + p < PARTS)[:, None] & known, other=0.0)
    target = e
    if TURN > 1:
        row, column = e // WIDTH, e % WIDTH
        turned = row // TURN * (TURN * WIDTH) + column * TURN + row % TURN
        target = tl.where(e < TURNED, turned, e)
    tl.store(sums + image * E + target, tl.sum(total, 0), mask=e < E)
