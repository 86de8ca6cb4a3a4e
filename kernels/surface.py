"""Overlaps and exact surface distances of two masks, on the GPU that holds them.

1. The mathematics

Surface of a mask: its voxels with at least one of the 6 neighbors in the background; what lies outside the
volume is background. With S the other mask's surface and s the spacing, a surface voxel (z, y, x) has the
distance d to S,

    d² = min over (z', y', x') in S of  (s_z (z' - z))² + (s_y (y' - y))² + (s_x (x' - x))²
       = min over offsets (i, j) of     (s_z i)² + (s_y j)² + (s_x r(z + i, y + j, x))²

where r(z, y, x) counts the voxels from x to the nearest voxel of S *in the same row*. The offsets (i, j) are
visited in the order of their own length (s_z i)² + (s_y j)²; once that reaches the best d² so far, no later
one can do better. A point d voxels away is settled after some π d² reads, near or far, at any spacing: 12 reads
at 2 voxels, 31,000 at 100. Squares, sums and root are in float64 and in the order of SciPy's distance transform.

    asd    mean of d over the prediction's surface
    assd   mean of d over both surfaces pooled
    hd95   95th percentile of the same, linearly interpolated as NumPy does

Five kernels and one running sum, without a synchronization: every buffer has the size of its bound, and what
one kernel counts the next reads on the device. The percentile is exact: doubles from 0 on are in the order of their
bits, and a radix selection finds these digit by digit. Bytes, for N voxels and n surface voxels of both masks:

    rows      reads both masks, the label twice, 3N; writes r to both surfaces as int16, 4N; counts voxels, tile by tile
    cumsum    of the counts: all totals, and each tile's first slot in the list of surface voxels
    compact   where a tile holds surface, reads r again (the surface is where r = 0); writes voxel numbers, 8n
    nearest   reads 2 bytes for each of some π d² offsets a point; overwrites the voxel number by the distance
    narrow    7 passes of 8n: counts the distances by their next 9 bits; the last pass also adds up the means
    finish    what the last pass left, 10 kB; one program a class

The left atrium of bench.py, N = 190x140x88, n = 57,000, mean d of 1.1 voxels: 21 MB, and 2.5 million reads of nearest
by whole blocks of points and offsets. Of 512x512x200 voxels, n = 904,000: 0.4 GB.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import pad

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: the kernels below stay plain functions that nobody calls
    triton, tl = None, SimpleNamespace(constexpr=lambda value: value)
jit = triton.jit if triton else lambda function: function
INTERPRETED = triton is not None and triton.knobs.runtime.interpret

LONGEST = 1024  # voxels along an axis: r fits int16, a voxel's number int32
FAR = tl.constexpr(1 << 14)  # r in a row without surface
TOGETHER = 1 << 27  # voxels of one call of the kernels, at 20 bytes of memory each
TILE, STEP = 2048, 256  # voxels that a program of `rows` and `compact` takes; `rows` in steps, a row at least
POINTS, OFFSETS = 32, 32  # `nearest` looks at so many offsets around so many points at once
BITS = 9  # a digit of the radix selection: 7 of them are the 63 bits of a double from 0 on
PROGRAMS, PASS = 256, 1024  # of `narrow`, and so many distances each takes at once: the same sums on any GPU


# 2. The reference


def reference(prediction: Tensor, label: Tensor, spacing: Sequence[float] | None = None) -> Tensor:
    """`surface_scores` in plain PyTorch: every surface voxel against every other, on any device."""
    prediction, label, spacing = _checked(prediction, label, spacing)
    scale = torch.tensor(spacing, dtype=torch.float64, device=label.device)
    scores = torch.full((len(label), 6), math.nan, dtype=torch.float64, device=label.device)
    for row, p, q in zip(scores, prediction.bool(), label.bool(), strict=True):
        row[:3] = torch.stack([(p & q).sum(), p.sum(), q.sum()])
        surfaces = [_surface(mask).nonzero() * scale for mask in (p, q)]  # (n, 3)
        if all(map(len, surfaces)):
            length = torch.cdist(*surfaces, compute_mode="donot_use_mm_for_euclid_dist")
            forward, backward = length.amin(1), length.amin(0)
            pooled = torch.cat((forward, backward))
            row[3:] = torch.stack([forward.mean(), pooled.mean(), pooled.quantile(0.95)])
    return scores


def _surface(mask: Tensor) -> Tensor:
    padded = pad(mask, (1,) * 6)
    neighbors = [padded.roll(step, axis)[1:-1, 1:-1, 1:-1] for axis in range(3) for step in (-1, 1)]
    return mask & ~torch.stack(neighbors).all(0)


# 3. The kernels


@jit
def _larger(a, b):
    return tl.maximum(a, b)


@jit
def _smaller(a, b):
    return tl.minimum(a, b)


@jit
def _rows(prediction, label, reach, counts, D, H, W, T,
          STEPS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """reach (2, K, N): r; counts (K, 5, T): the two surfaces, the intersection, prediction and label."""
    W = W // ALIGNED * ALIGNED  # as it was; now the compiler knows how many voxels it may load at once
    tile, side, k = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    volume, x = D * H * W, tl.arange(0, WIDTH)[None, :]
    reach += (side * tl.num_programs(2) + k) * volume
    mask = (prediction if side == 0 else label) + k * volume
    surfaces, both, size = 0, 0, 0
    for step in range(tile * STEPS, tile * STEPS + STEPS):
        row = step * ROWS + tl.arange(0, ROWS)[:, None]
        z, y, voxel, inside = row // H, row % H, row * W + x, (row < D * H) & (x < W)
        m, r = tl.load(mask + voxel, inside, other=0) != 0, tl.full([ROWS, WIDTH], FAR, tl.int32)
        count = tl.sum(m.to(tl.int32))
        if count > 0:
            core = tl.load(mask + voxel - H * W, inside & (z > 0), other=0) != 0
            core &= tl.load(mask + voxel + H * W, inside & (z < D - 1), other=0) != 0
            core &= tl.load(mask + voxel - W, inside & (y > 0), other=0) != 0
            core &= tl.load(mask + voxel + W, inside & (y < H - 1), other=0) != 0
            core &= tl.load(mask + voxel - 1, inside & (x > 0), other=0) != 0
            core &= tl.load(mask + voxel + 1, inside & (x < W - 1), other=0) != 0
            surface = m & ~core
            before = tl.associative_scan(tl.where(surface, x, -FAR), 1, _larger)
            after = tl.associative_scan(tl.where(surface, x, 2 * FAR), 1, _smaller, reverse=True)
            r = tl.minimum(tl.minimum(x - before, after - x), FAR)
            surfaces += tl.sum(surface.to(tl.int32))
            size += count
            other = tl.load(label + k * volume + voxel, tl.where(side == 0, inside, False), other=0) != 0
            both += tl.sum((m & other).to(tl.int32))
        tl.store(reach + voxel, r.to(tl.int16), inside)
    counts += k * 5 * T + tile
    tl.store(counts + side * T, surfaces)
    tl.store(counts + (3 + side) * T, size)
    tl.store(counts + 2 * T, both, side == 0)


@jit
def _compact(reach, counts, ends, points, tallies, volume, span, T, TILE: tl.constexpr, SIZE: tl.constexpr):
    """points (K, 2N): the numbers of the prediction's surface voxels in order, behind them the label's."""
    tile, side, k = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, TILE)
    if (tile == 0) & (side == 0):
        for start in range(0, SIZE, TILE):
            tl.store(tallies + k * SIZE + start + lane, tl.zeros([TILE], tl.int64), start + lane < SIZE)
    entry = (k * 5 + side) * T + tile
    count = tl.load(counts + entry)
    if count > 0:
        voxel = tile * span + lane
        inside = (lane < span) & (voxel < volume)
        surface = tl.load(reach + (side * tl.num_programs(2) + k) * volume + voxel, inside, other=FAR) == 0
        first = k * 2 * volume + tl.load(ends + entry) - count
        tl.store(points + first + tl.cumsum(surface.to(tl.int32)) - 1, voxel.to(tl.int64), surface)


@jit
def _nearest(points, reach, ends, s_x, dz, dy, length, D, H, W, T,
             POINTS: tl.constexpr, OFFSETS: tl.constexpr):  # fmt: skip
    """Overwrites each point by the bits of its distance to the other surface."""
    k, volume = tl.program_id(1).to(tl.int64), D * H * W
    ends += k * 5 * T - 1
    n_p, n = tl.load(ends + T), tl.load(ends + 2 * T)
    if (n_p > 0) & (n_p < n):
        for start in range(tl.program_id(0) * POINTS, n, tl.num_programs(0) * POINTS):
            i = start + tl.arange(0, POINTS)
            slot = k * 2 * volume + i
            voxel = tl.load(points + slot, i < n, other=0).to(tl.int32)
            z, y = (voxel // (W * H))[None, :], (voxel // W % H)[None, :]
            column = reach + ((i < n_p) * tl.num_programs(1) + k) * volume + voxel % W  # of the other surface
            best = tl.where(i < n, float("inf"), 0.0).to(tl.float64)
            j = 0
            while tl.load(length + j) < tl.max(best):  # the last length is infinite
                offset = j + tl.arange(0, OFFSETS)[:, None]
                at_z, at_y = z + tl.load(dz + offset), y + tl.load(dy + offset)  # (OFFSETS, POINTS)
                inside = (at_z >= 0) & (at_z < D) & (at_y >= 0) & (at_y < H)
                r = tl.load(column[None, :] + (at_z * H + at_y) * W, inside, other=FAR)
                d_x = r.to(tl.float64) * tl.load(s_x)
                square = tl.load(length + offset) + d_x * d_x
                best = tl.minimum(best, tl.min(tl.where(r < FAR, square, float("inf")), 0))
                j += OFFSETS
            tl.store(points + slot, tl.sqrt(best).to(tl.int64, bitcast=True), i < n)


@jit
def _place(n):
    """Rank of the 95th percentile of n numbers, from 0, and how far it lies towards the next one."""
    place = (n - 1).to(tl.float64) * tl.full((), 0.95, tl.float64)
    return tl.floor(place).to(tl.int64), place - tl.floor(place)


@jit
def _pick(tally, BINS: tl.constexpr):
    """The prefix with one digit more, the rank among the numbers that have it, and the tally's counts."""
    prefix, rank = tl.load(tally + BINS), tl.load(tally + BINS + 1)
    count = tl.load(tally + tl.arange(0, BINS))
    up_to = tl.cumsum(count)
    digit = tl.sum((up_to <= rank).to(tl.int64))
    return prefix * BINS + digit, rank - tl.max(tl.where(up_to <= rank, up_to, 0)), count


@jit
def _narrow(points, ends, tallies, parts, volume, T, shift,
            TILE: tl.constexpr, BITS: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """tallies (K, 63 / BITS, 2^BITS + 2), the last pass first: numbers by their digit, BITS bits from `shift` on, of
    those with the percentile's prefix; that prefix, and the rank among them. Every program finds the latter two from
    the tally before. parts (K, 3, programs), left by the last pass: two sums, the least distance beyond the prefix.
    """
    program, programs, k = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    BINS: tl.constexpr = 1 << BITS
    points, ends = points + k * 2 * volume, ends + k * 5 * T - 1
    tally, part = tallies + (k * (63 // BITS) + shift // BITS) * (BINS + 2), parts + k * 3 * programs + program
    n_p, n = tl.load(ends + T), tl.load(ends + 2 * T)
    if (n_p > 0) & (n_p < n):
        prefix, rank = n * 0, _place(n)[0]
        if shift + BITS < 63:
            prefix, rank, _ = _pick(tally + BINS + 2, BINS)
        tl.store(tally + BINS, prefix, program == 0)
        tl.store(tally + BINS + 1, rank, program == 0)
        count, beyond = tl.zeros([BINS], tl.int32), tl.full([TILE], float("inf"), tl.float64)
        forward, backward = tl.zeros([TILE], tl.float64), tl.zeros([TILE], tl.float64)
        for start in range(program * TILE, n, programs * TILE):
            lane = start + tl.arange(0, TILE)
            bits = tl.load(points + lane, lane < n, other=0)
            higher, digit = bits >> (shift + BITS), (bits >> shift) & (BINS - 1)
            count += tl.histogram(digit.to(tl.int32), BINS, (lane < n) & (higher == prefix))
            if LAST:
                d = bits.to(tl.float64, bitcast=True)
                forward += tl.where(lane < n_p, d, 0.0)
                backward += tl.where(lane < n_p, 0.0, d)
                beyond = tl.minimum(beyond, tl.where((lane < n) & (higher > prefix), d, float("inf")))
        tl.atomic_add(tally + tl.arange(0, BINS), count.to(tl.int64), count > 0, sem="relaxed")
        if LAST:
            tl.store(part, tl.sum(forward))
            tl.store(part + programs, tl.sum(backward))
            tl.store(part + 2 * programs, tl.min(beyond))


@jit
def _finish(tallies, parts, ends, scores, T, PROGRAMS: tl.constexpr, BITS: tl.constexpr):
    """scores (K, 6), a program a row."""
    k = tl.program_id(0).to(tl.int64)
    BINS: tl.constexpr = 1 << BITS
    ends, scores = ends + k * 5 * T - 1, scores + k * 6
    for field in tl.static_range(3):
        tl.store(scores + field, tl.load(ends + (field + 3) * T) - tl.load(ends + (field + 2) * T))
        tl.store(scores + field + 3, float("nan"))
    n_p, n = tl.load(ends + T), tl.load(ends + 2 * T)
    if (n_p > 0) & (n_p < n):
        part = parts + k * 3 * PROGRAMS + tl.arange(0, PROGRAMS)
        forward, backward, beyond = tl.load(part), tl.load(part + PROGRAMS), tl.load(part + 2 * PROGRAMS)
        tl.store(scores + 3, tl.sum(forward) / n_p.to(tl.float64))
        tl.store(scores + 4, (tl.sum(forward) + tl.sum(backward)) / n.to(tl.float64))

        picked, rank, count = _pick(tallies + k * (63 // BITS) * (BINS + 2), BINS)
        bits = (picked & -BINS) + tl.arange(0, BINS)  # of the distances in each bin
        equal = tl.sum(tl.where(bits == picked, count, 0))
        greater = tl.where((bits > picked) & (count > 0), bits.to(tl.float64, bitcast=True), float("inf"))
        low = picked.to(tl.float64, bitcast=True)
        high = tl.where(rank + 1 < equal, low, tl.minimum(tl.min(greater), tl.min(beyond)))
        gap, share = high - low, _place(n)[1]
        tl.store(scores + 5, tl.where(share < 0.5, low + gap * share, high - gap * (1 - share)))  # NumPy's formulas


# 4. The public function


def surface_scores(prediction: Tensor, label: Tensor, spacing: Sequence[float] | None = None) -> Tensor:
    """Overlap counts and surface distances of K pairs of masks of one volume, without a synchronization (but one when
    a spacing is new: not the first time, then, in the capture of a CUDA graph, which serves until 8 others have come).

    Args:
        prediction, label: (K, D, H, W), or (D, H, W) for K = 1, bool or uint8, foreground wherever not 0;
            each axis of 1 to 1024 voxels.
        spacing: (D, H, W) distances between neighbors, default 1; the unit of the results.
    Returns:
        (K, 6) float64 on the masks' device: |prediction ∩ label|, |prediction|, |label|, asd, assd and hd95;
        the distances are NaN where a mask is empty.
    Raises ValueError on other shapes, types or spacings, or masks on two devices.

    The definitions are those of MedPy 0.5, `medpy.metric.binary`, connectivity 1. The transform along the
    rows is the first pass of Saito and Toriwaki, Pattern Recognition 1994;27(11):1551-1565. Memory: 20 bytes
    a voxel of a pair; pairs are taken in groups of up to 2.7 GB, or one by one.
    """
    prediction, label, spacing = _checked(prediction, label, spacing)
    if not (triton and (label.is_cuda or INTERPRETED)):
        return reference(prediction, label, spacing)
    scores = torch.empty(len(label), 6, dtype=torch.float64, device=label.device)
    together = min(65535, max(1, TOGETHER // label[0].numel()))  # a grid's second side has no more
    pairs = (masks.contiguous().view(torch.uint8).split(together) for masks in (prediction, label))
    with torch.cuda.device_of(label):
        for p, q, rows in zip(*pairs, scores.split(together), strict=True):
            _launch(p, q, spacing, rows)
    return scores


def _launch(prediction: Tensor, label: Tensor, spacing: tuple[float, ...], scores: Tensor) -> None:
    K, D, H, W = label.shape
    volume, device = D * H * W, label.device
    width = max(16, triton.next_power_of_2(W))
    rows, size = max(1, STEP // width), 63 // BITS * ((1 << BITS) + 2)
    steps = TILE // (rows * width)
    tiles = triton.cdiv(D * H, steps * rows)
    reach = torch.empty(2, K, volume, dtype=torch.int16, device=device)
    counts = torch.empty(K, 5 * tiles, dtype=torch.int64, device=device)
    points = torch.empty(K, 2 * volume, dtype=torch.int64, device=device)
    tallies = torch.empty(K, size, dtype=torch.int64, device=device)
    parts = torch.empty(K, 3 * PROGRAMS, dtype=torch.float64, device=device)
    table = _offsets(spacing, *(max(16, triton.next_power_of_2(axis)) for axis in (D, H)), device)
    programs = min(4096, triton.cdiv(2 * volume, POINTS))
    unfused = {"enable_fp_fusion": False}  # a fused multiply-add rounds once where SciPy rounds twice

    # One warp where a row is at most 256 voxels: several would scan it through shared memory.
    warps = max(1, width // STEP)
    _rows[tiles, 2, K](prediction, label, reach, counts, D, H, W, tiles, steps, rows, width, math.gcd(W, 16),
                        num_warps=warps)
    ends = counts.cumsum(1)  # (K, 5 * tiles)
    _compact[tiles, 2, K](reach, counts, ends, points, tallies, volume, steps * rows * W, tiles, TILE, size)
    _nearest[programs, K](points, reach, ends, *table, D, H, W, tiles, POINTS, OFFSETS, **unfused)
    for shift in range(63 - BITS, -1, -BITS):
        _narrow[PROGRAMS, K](points, ends, tallies, parts, volume, tiles, shift, PASS, BITS, shift == 0, num_warps=8)
    _finish[K,](tallies, parts, ends, scores, tiles, PROGRAMS, BITS, **unfused)


@lru_cache(maxsize=8)
def _offsets(spacing: tuple[float, ...], depth: int, height: int, device: torch.device) -> tuple[Tensor, ...]:
    """Spacing along a row; dz, dy and squared length of the offsets between rows, in the order of length."""
    dz, dy = torch.arange(-depth, depth, device=device), torch.arange(-height, height, device=device)
    square_z, square_y = (dz.double() * spacing[0]) ** 2, (dy.double() * spacing[1]) ** 2
    length, order = (square_z[:, None] + square_y).flatten().sort()
    s_x = torch.full((1,), spacing[2], dtype=torch.float64, device=device)
    rows, columns = dz[order // len(dy)].int(), dy[order % len(dy)].int()
    table = s_x, rows, columns, pad(length, (0, 1), value=math.inf)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # later calls may come from other streams
    return table


def _checked(prediction: Tensor, label: Tensor, spacing) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    shapes = tuple(prediction.shape), tuple(label.shape)
    if shapes[0] != shapes[1] or len(shapes[0]) not in (3, 4) or prediction.device != label.device:
        raise ValueError(f"masks {shapes}: give two of one shape, (K, D, H, W) or (D, H, W), on one device")
    if 0 in shapes[0] or max(shapes[0][-3:]) > LONGEST:
        raise ValueError(f"masks {shapes}: an axis may have 1 to {LONGEST} voxels")
    if not {prediction.dtype, label.dtype} <= {torch.bool, torch.uint8}:
        raise ValueError(f"masks of {prediction.dtype} and {label.dtype}: give bool or uint8")
    spacing = (1.0, 1.0, 1.0) if spacing is None else tuple(map(float, spacing))
    if len(spacing) != 3 or not all(0 < s < math.inf for s in spacing):
        raise ValueError(f"spacing {spacing}: give three positive numbers")
    return *(masks if masks.ndim == 4 else masks[None] for masks in (prediction, label)), spacing
