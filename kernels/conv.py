"""Convolutions of few channels, channels last, as matrix products: 3x3x3, and 2x2x2 with stride 2 and its transpose.

The mathematics
---------------
With padding 1, stride 1 and no bias, voxel (z, y, x) of output channel o is

    y[z, y, x, o] = sum over (a, b, c) in 0..2 and i of  w[o, i, a, b, c] x[z + a - 1, y + b - 1, x + c - 1, i]

and the two gradients are of the same kind: dL/dx is the convolution of dL/dy with the weight turned around in space
and channels, and dL/dw[o, i, a, b, c] the sum over voxels of dL/dy[z, y, x, o] x[z + a - 1, y + b - 1, x + c - 1, i].

Tensor cores want matrices of 16 and more a side; with I = 16 channels a tap is one of 16x16, and reading the input 27
times costs more than the products. But P voxels of a row are, channels last, P O numbers side by side, and the P + 2
voxels that they see of another row are (P + 2) I numbers side by side:

    (groups, (P + 2) I) @ T[a, b] ((P + 2) I, P O),   T[a, b][(j, i), (p, o)] = w[o, i, a, b, j - p] if 0 <= j - p <= 2,

else 0: block Toeplitz matrices, and 9 products whose inputs are one read of 128 bytes each for P = 2 and I = 16, where
27 would be of 32. A quarter of what is multiplied is zeros; of one channel, P = 8, it is four fifths, which costs less
than cuDNN's ways around it. The gradient of w is that of T, 9 products of (groups, (P + 2) I) transposed and
(groups, P O), whose diagonals are added up.

With stride 2 every coarse voxel has 8 fine ones of its own: 4 rows (a, b) of 2 voxels, 2 I numbers side by side, and
w[o] holds the 8 I numbers that they meet side by side as well. So down is 4 products (coarse, 2 I) @ (2 I, O), up, the
transpose, is 4 of (coarse, O) @ (O, 2 I), each the other's gradient, and that of w is 4 of (O, coarse) @ (coarse, 2 I).

The bytes
---------
x is read and y written: 2 (I + O) bytes a voxel in bf16, of two left-atrium patches with 16 channels 128 MB; for the
gradient of w as many are read, and its parts, 10 MB, are written and read. The L2 cache gives more: a window has
(P + 2) / P times the voxels of its group, and there are 9 of them. A program computes several planes, for each plane it
reads serves the 3 around it: with P = 2 and 4 planes, 18 windows of 4 voxels for 8 voxels, so that x is read 9 times
and not 18. With stride 2 all is read once.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the reference serves
    triton = None

CHANNELS = {3: ((1, 16), (16, 16), (32, 32)), 2: ((16, 32), (32, 64))}  # of a kernel's size: (I, O)
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
DTYPES = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)  # the interpreter cannot multiply bf16


def reference(x: Tensor, weight: Tensor, transposed: bool = False) -> Tensor:
    """The same in plain PyTorch, differentiable, on any device. See `convolve`."""
    if transposed:
        return F.conv_transpose3d(x, weight.to(x.dtype), stride=2)
    return F.conv3d(x, weight.to(x.dtype), **(dict(padding=1) if weight.shape[2] == 3 else dict(stride=2)))


if triton:

    @triton.jit
    def _zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
        zeros = ()
        for _ in tl.static_range(COUNT):
            zeros += (tl.zeros([ROWS, N], tl.float32),)
        return zeros

    @triton.jit
    def _windows(x, block, group, b, D, H, W, I: tl.constexpr, P: tl.constexpr, K: tl.constexpr, PLANES: tl.constexpr):
        """What groups of P voxels of a plane see in row `b` of the 3 around theirs, in each plane of a block and in the
        two beside it: PLANES + 2 times (ROWS, K), with 0 outside the volume."""
        k, blocks = tl.arange(0, K)[None, :], tl.cdiv(D, PLANES)
        row, first = group // (W // P) + b - 1, group % (W // P) * P - 1
        inside = ((row >= 0) & (row < H))[:, None] & (k < (P + 2) * I)
        inside &= (first[:, None] + k // I >= 0) & (first[:, None] + k // I < W)
        z = block % blocks * PLANES - 1
        x += (block // blocks * D + z).to(tl.int64) * H * W * I + (group * P - 1 + (b - 1) * W)[:, None] * I + k
        windows = ()
        for _ in tl.static_range(PLANES + 2):
            # where, not &: the comparisons stay scalars, which takes fewer registers (190 for 253 with 16 channels)
            windows += (tl.load(x, tl.where((z >= 0) & (z < D), inside, False), other=0.0),)
            x += H * W * I
            z += 1
        return windows

    @triton.jit
    def _convolve(x, toeplitz, y, D, H, W, I: tl.constexpr, P: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
                  ROWS: tl.constexpr, PLANES: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
        """y of ROWS groups in each of PLANES planes, from the 3 rows that they see."""
        group, block, n = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.arange(0, N)[None, :]
        total = _zeros(PLANES, ROWS, N)
        toeplitz += tl.arange(0, K)[:, None] * N + n
        for b in tl.range(3, num_stages=STAGES):
            seen = _windows(x, block, group, b, D, H, W, I, P, K, PLANES)
            before, total, t = total, (), ()
            for a in tl.static_range(3):
                t += (tl.load(toeplitz + (3 * a + b) * K * N),)
            for z in tl.static_range(PLANES):
                products = before[z]
                for a in tl.static_range(3):
                    products = tl.dot(seen[z + a], t[a], products)
                total += (products,)
        blocks, groups = tl.cdiv(D, PLANES), H * W // P
        z = block % blocks * PLANES
        y += (block // blocks * D + z).to(tl.int64) * groups * N + group[:, None] * N + n
        for i in tl.static_range(PLANES):
            tl.store(y, total[i], tl.where(z + i < D, (group < groups)[:, None], False))
            y += groups * N

    @triton.jit
    def _correlate(x, dy, sums, tiles, D, H, W, I: tl.constexpr, P: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
                   ROWS: tl.constexpr, PLANES: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
        """sums (parts, 9, K, N): one program's part of the gradients of T[a, b] for a = 0, 1 and 2."""
        n, b, groups, blocks = tl.arange(0, N)[None, :], tl.program_id(1), H * W // P, tl.cdiv(D, PLANES)
        total = _zeros(3, K, N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
            group, block = tile % tl.cdiv(groups, ROWS) * ROWS + tl.arange(0, ROWS), tile // tl.cdiv(groups, ROWS)
            z = block % blocks * PLANES
            at = dy + (block // blocks * D + z).to(tl.int64) * groups * N + group[:, None] * N + n
            g = ()
            for i in tl.static_range(PLANES):
                g += (tl.load(at, tl.where(z + i < D, (group < groups)[:, None], False), other=0.0),)
                at += groups * N
            seen = _windows(x, block, group, b, D, H, W, I, P, K, PLANES)
            before, total = total, ()
            for a in tl.static_range(3):
                products = before[a]
                for i in tl.static_range(PLANES):
                    products = tl.dot(tl.trans(seen[i + a]), g[i], products)
                total += (products,)
        sums += (tl.program_id(0) * 9 + b) * K * N + tl.arange(0, K)[:, None] * N + n
        for a in tl.static_range(3):
            tl.store(sums + 3 * a * K * N, total[a])

    @triton.jit
    def _expand(weight, toeplitz, I: tl.constexpr, O: tl.constexpr, P: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
                TURNED: tl.constexpr):  # fmt: skip
        """T of `weight` (O, I, 3, 3, 3), channels last, or of such a weight (I, O, 3, 3, 3) turned around."""
        line, k, n = tl.program_id(0), tl.arange(0, K)[:, None], tl.arange(0, N)[None, :]
        i, o, c = k % I, n % O, k // I - n // O
        tap = line * 3 + c
        at = ((i * 27 + 26 - tap) * O + o) if TURNED else ((o * 27 + tap) * I + i)
        t = tl.load(weight + at, (c >= 0) & (c < 3) & (k < (P + 2) * I), other=0.0)
        tl.store(toeplitz + (line * K + k) * N + n, t)

    @triton.jit
    def _fold(sums, grad, parts, I: tl.constexpr, O: tl.constexpr, P: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
              ROWS: tl.constexpr, SHARE: tl.constexpr):  # fmt: skip
        """grad (O, I, 3, 3, 3), channels last, of a tap and a SHARE of I: sums of the parts and of T's diagonals."""
        tap, row, column = tl.program_id(0), tl.arange(0, ROWS)[:, None], tl.arange(0, SHARE * O)[None, :]
        i, o = tl.program_id(1) * SHARE + column // O, column % O
        total = tl.zeros([ROWS, SHARE * O], tl.float32)
        for start in range(0, parts, ROWS):
            part = sums + (start + row) * (9 * K * N) + (tap // 3 * K + tap % 3 * I + i) * N + o
            for p in tl.static_range(P):
                total += tl.load(part + p * (I * N + O), start + row < parts, other=0.0)
        tl.store(grad + (o * 27 + tap) * I + i, tl.sum(total, 0)[None, :])

    @triton.jit
    def _first_fine(coarse, D, H, W):
        """The number of the first of the fine voxels of coarse ones, in volumes of D x H x W coarse voxels."""
        x, y = coarse % W, coarse // W % H
        return (coarse // (W * H)).to(tl.int64) * (8 * H * W) + 4 * W * y + 2 * x

    @triton.jit
    def _down(x, weight, y, voxels, D, H, W, I: tl.constexpr, O: tl.constexpr, ROWS: tl.constexpr):
        """y (voxels, O), coarse, from x, fine with I channels; weight (O, 8 I)."""
        coarse, k, o = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, 2 * I), tl.arange(0, O)
        x += _first_fine(coarse, D, H, W)[:, None] * I + k[None, :]
        total, inside = tl.zeros([ROWS, O], tl.float32), (coarse < voxels)[:, None]
        for a in tl.static_range(2):
            for b in tl.static_range(2):
                t = tl.load(weight + o[None, :] * (8 * I) + (2 * a + b) * (2 * I) + k[:, None])
                seen = tl.load(x + (4 * a * H + 2 * b) * W * I, inside, other=0.0)
                total = tl.dot(seen, t.to(seen.dtype), total)
        tl.store(y + coarse[:, None].to(tl.int64) * O + o[None, :], total, inside)

    @triton.jit
    def _up(x, weight, y, voxels, D, H, W, I: tl.constexpr, O: tl.constexpr, ROWS: tl.constexpr):
        """y, fine with I channels, from x (voxels, O), coarse; weight (O, 8 I)."""
        coarse, k, o = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, 2 * I), tl.arange(0, O)
        inside = (coarse < voxels)[:, None]
        seen = tl.load(x + coarse[:, None].to(tl.int64) * O + o[None, :], inside, other=0.0)
        y += _first_fine(coarse, D, H, W)[:, None] * I + k[None, :]
        for a in tl.static_range(2):
            for b in tl.static_range(2):
                t = tl.load(weight + o[:, None] * (8 * I) + (2 * a + b) * (2 * I) + k[None, :])
                tl.store(y + (4 * a * H + 2 * b) * W * I, tl.dot(seen, t.to(seen.dtype)), inside)

    @triton.jit
    def _correlate2(fine, coarse, sums, voxels, D, H, W, I: tl.constexpr, O: tl.constexpr, ROWS: tl.constexpr):
        """sums (parts, O, 8 I): one program's part of the gradient of the weight between fine and coarse voxels."""
        k, o, total = tl.arange(0, 2 * I)[None, :], tl.arange(0, O), _zeros(4, O, 2 * I)
        for start in tl.range(tl.program_id(0) * ROWS, voxels, tl.num_programs(0) * ROWS, num_stages=2):
            row = start + tl.arange(0, ROWS)
            inside = (row < voxels)[:, None]
            g = tl.load(coarse + row[:, None].to(tl.int64) * O + o[None, :], inside, other=0.0)
            at = fine + _first_fine(row, D, H, W)[:, None] * I + k
            before, total = total, ()
            for a in tl.static_range(2):
                for b in tl.static_range(2):
                    seen = tl.load(at + (4 * a * H + 2 * b) * W * I, inside, other=0.0)
                    total += (tl.dot(tl.trans(g), seen, before[2 * a + b]),)
        sums += (tl.program_id(0) * O + o[:, None]) * (8 * I) + k
        for line in tl.static_range(4):
            tl.store(sums + line * 2 * I, total[line])


# By input channels: P; how `_convolve` and `_correlate` run, in at most 99 kB of shared memory where a GPU has no more;
# and into how many parts the latter sums, as many on any GPU.
GROUP = {1: 8, 16: 2, 32: 2}
CONVOLVE = {1: dict(ROWS=32, PLANES=2, STAGES=1, num_warps=4), 16: dict(ROWS=32, PLANES=4, STAGES=2, num_warps=2)}
CORRELATE = {1: dict(ROWS=64, PLANES=1, STAGES=1, num_warps=4), 16: dict(ROWS=32, PLANES=4, STAGES=2, num_warps=4),
             32: dict(ROWS=32, PLANES=2, STAGES=2, num_warps=4)}
PARTS = {1: 132, 16: 132, 32: 88}
FOLDED = 64  # parts that `_fold` adds up at once
STRIDE2 = dict(ROWS=64, PARTS=264)  # coarse voxels a program takes at once; parts of a weight's gradient


def launch(x: Tensor, O: int, config: dict) -> tuple[int, int, tuple, dict]:
    """Tiles of a block of planes; blocks of planes; the sizes of x in space; what else shapes the kernels."""
    B, I, D, H, W = x.shape
    P = GROUP[I]
    shape = dict(I=I, P=P, K=triton.next_power_of_2((P + 2) * I), N=P * O)
    return triton.cdiv(H * W // P, config["ROWS"]), B * triton.cdiv(D, config["PLANES"]), (D, H, W), shape


def _convolved3(x: Tensor, weight: Tensor, O: int, turned: bool) -> Tensor:
    if x.shape[1] not in CONVOLVE:
        y = (F.conv_transpose3d if turned else F.conv3d)(x, weight.to(x.dtype), padding=1)
        return y.contiguous(memory_format=torch.channels_last_3d)  # as cuDNN's is; not every CPU's
    config = CONVOLVE[x.shape[1]]
    tiles, blocks, sizes, shape = launch(x, O, config)
    toeplitz = x.new_empty(9, shape["K"], shape["N"])
    y = x.new_empty(x.shape[0], *sizes, O).movedim(-1, 1)
    with torch.cuda.device_of(x):
        _expand[9,](weight, toeplitz, O=O, TURNED=turned, **shape)
        _convolve[tiles, blocks](x, toeplitz, y, *sizes, **shape, **config)
    return y


def _weight_gradient3(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    O, config = dy.shape[1], CORRELATE[x.shape[1]]
    tiles, blocks, sizes, shape = launch(x, O, config)
    parts = min(PARTS[shape["I"]], tiles * blocks)
    sums = weight.new_empty(parts, 9, shape["K"], shape["N"])
    grad = torch.empty_like(weight)
    with torch.cuda.device_of(x):
        _correlate[parts, 3](x, dy, sums, tiles * blocks, *sizes, **shape, **config)
        share = min(shape["I"], 4)
        _fold[27, shape["I"] // share](sums, grad, parts, O=O, ROWS=FOLDED, SHARE=share, **shape)
    return grad


class _Conv3x3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return _convolved3(x, weight, weight.shape[0], turned=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last_3d)
        dx = _convolved3(dy, weight, weight.shape[1], turned=True) if ctx.needs_input_grad[0] else None
        return dx, _weight_gradient3(x, dy, weight) if ctx.needs_input_grad[1] else None


def _convolved2(x: Tensor, weight: Tensor, up: bool) -> Tensor:
    """x (B, O, D, H, W) to (B, I, 2 D, 2 H, 2 W), or back; weight (O, I, 2, 2, 2)."""
    (B, _, *sizes), (O, I) = x.shape, weight.shape[:2]
    coarse = sizes if up else [size // 2 for size in sizes]
    y = x.new_empty(B, *(2 * size if up else size for size in coarse), I if up else O).movedim(-1, 1)
    voxels = B * math.prod(coarse)
    with torch.cuda.device_of(x):
        programs = triton.cdiv(voxels, STRIDE2["ROWS"])
        (_up if up else _down)[programs,](x, weight, y, voxels, *coarse, I, O, STRIDE2["ROWS"])
    return y


def _weight_gradient2(fine: Tensor, coarse: Tensor, weight: Tensor) -> Tensor:
    O, I = weight.shape[:2]
    voxels, rows = coarse.numel() // O, STRIDE2["ROWS"]
    sums = weight.new_empty(min(STRIDE2["PARTS"], triton.cdiv(voxels, rows)), O, 2, 2, 2, I)
    with torch.cuda.device_of(fine):
        _correlate2[len(sums),](fine, coarse, sums, voxels, *coarse.shape[2:], I, O, rows)
    return sums.sum(0).movedim(-1, 1)


class _Stride2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, up):
        ctx.save_for_backward(x, weight)
        ctx.up = up
        return _convolved2(x, weight, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last_3d)
        fine, coarse = (dy, x) if ctx.up else (x, dy)
        dx = _convolved2(dy, weight, not ctx.up) if ctx.needs_input_grad[0] else None
        return dx, _weight_gradient2(fine, coarse, weight) if ctx.needs_input_grad[1] else None, None


def convolve(x: Tensor, weight: Tensor, transposed: bool = False) -> Tensor:
    """The convolution of x (B, I, D, H, W), in its dtype or autocast's, with a weight (O, I, 3, 3, 3), padding 1, or
    (O, I, 2, 2, 2), stride 2; the latter also transposed, which takes O channels to I.

    On a GPU, in float16 and bfloat16 with a float32 weight, channels_last_3d: Triton kernels for the channels that
    CHANNELS lists, for 3x3x3 where W is a multiple of P (a single channel only where x needs no gradient), for stride 2
    where the sides are even. (Of 3x3x3 with 32 channels the weight's gradient alone: cuDNN is as fast in the others.)
    They are differentiable once, with sums in float32, without synchronization, fit for a CUDA graph, and what is ours
    gives the same bits each time. All else takes the reference. A value that is not finite reaches, beside its
    neighbors, the others of their groups. ValueError for another size of the weight."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    O, I, size = weight.shape[:3]
    if size not in (2, 3) or len({*weight.shape[2:]}) > 1 or transposed > (size == 2):
        raise ValueError(f"weight {tuple(weight.shape)}: give 3x3x3, or 2x2x2, which may be transposed")
    kernels = triton and (x.is_cuda or INTERPRETED) and x.dtype in DTYPES and weight.dtype == torch.float32
    kernels = kernels and (I, O) in CHANNELS[size] and x.shape[1] == (O if transposed else I)
    kernels = kernels and x.is_contiguous(memory_format=torch.channels_last_3d)
    if size == 3:
        kernels = kernels and not x.shape[-1] % GROUP[I] and (I > 1 or not x.requires_grad)
    else:
        kernels = kernels and (transposed or not any(side % 2 for side in x.shape[2:]))
    if not kernels:
        return reference(x, weight, transposed)
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    return _Conv3x3x3.apply(x, weight) if size == 3 else _Stride2.apply(x, weight, transposed)
