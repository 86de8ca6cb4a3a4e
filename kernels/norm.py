"""Batch normalization and ReLU of channels-last volumes as one function, with half the memory traffic.

The mathematics
---------------
A channel c has M values x_v, one for each voxel of each patch. In training

    mu = 1/M sum_v x_v,   s2 = 1/M sum_v (x_v - mu)^2,   n_v = (x_v - mu) / sqrt(s2 + e),   y_v = max(w n_v + b, 0)

and in evaluation mu and s2 are running averages of what they were. With g_v = dL/dy_v where y_v > 0, else 0,

    dL/db = sum_v g_v,   dL/dw = sum_v g_v n_v,   dL/dx_v = w / sqrt(s2 + e) (g_v - (dL/db + n_v dL/dw) / M).

A convolution's bias, an `offset` that is the same for all x of a channel, changes mu alone: y does not depend on it in
training and its gradient is 0, not the rounding that a sum of dL/dx_v would give. So it is never added to x; it is in
the running mean, and subtracted from that in evaluation.

The bytes
---------
Forward, the sums read x, and the result reads it again and writes y; backward, the sums read x and dL/dy, and dL/dx
reads them again and is written: 8 x M C values in all, where PyTorch's bias, normalization and ReLU move 16. Whether
y_v > 0 is computed again, from x. Two left-atrium patches have 64 MB of bf16 in a layer at full resolution.

The sums are of x less the channel's first value, in float32 and an order that depends on M and C alone: the same bits
each time, and little cancellation where a channel's mean is large beside its deviation (a first value 10 deviations
from the mean costs the variance 3e-5 of itself).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the reference serves
    triton = None

INTERPRETED = triton is not None and triton.knobs.runtime.interpret
TILE = 4096  # values that a program looks at together; sums load the next ones meanwhile
PARTS = 264  # at most so many programs have sums of their own
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def reference(x, offset, weight, bias, running_mean, running_var, training, momentum=0.1, eps=1e-5) -> Tensor:
    """The same in plain PyTorch, on any device and in any layout. See `norm_relu`."""
    x = x + offset.to(x.dtype).view(-1, 1, 1, 1)
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps).relu()


if triton:

    @triton.jit
    def _load(x, row, c, M, C):
        """x (M, C) at these rows and channels, as float32; 0 beyond its end."""
        return tl.load(x + row.to(tl.int64) * C + c, (row < M) & (c < C), other=0.0).to(tl.float32)

    @triton.jit
    def _two_sums(first, second, sums, c, C):
        """Of two tiles (ROWS, WIDTH), to this program's part of sums (parts, 2, C)."""
        sums += tl.program_id(0) * 2 * C + c
        tl.store(sums, tl.sum(first, 0)[None, :], c < C)
        tl.store(sums + C, tl.sum(second, 0)[None, :], c < C)

    @triton.jit
    def _sum_parts(sums, parts, C, c, ROWS: tl.constexpr, WIDTH: tl.constexpr):
        """sums (parts, 2, C) to two sums (1, WIDTH)."""
        first, second = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
        for start in range(0, parts, ROWS):
            part = start + tl.arange(0, ROWS)[:, None]
            first += _load(sums, 2 * part, c, 2 * parts, C)
            second += _load(sums, 2 * part + 1, c, 2 * parts, C)
        return tl.sum(first, 0)[None, :], tl.sum(second, 0)[None, :]

    @triton.jit
    def _moments(x, sums, M, C, ROWS: tl.constexpr, WIDTH: tl.constexpr):
        """sums (parts, 2, C): of x less the first value, and of its square."""
        c = tl.arange(0, WIDTH)[None, :]
        origin = tl.load(x + c, c < C, other=0.0).to(tl.float32)
        first, second = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
        for start in tl.range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS, num_stages=3):
            row = start + tl.arange(0, ROWS)[:, None]
            d = tl.where(row < M, _load(x, row, c, M, C) - origin, 0.0)
            first += d
            second += d * d
        _two_sums(first, second, sums, c, C)

    @triton.jit
    def _statistics(x, sums, mean, inverse, offset, running_mean, running_var, momentum, eps, parts, M, C,
                    TRACK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
        """mean and 1 / sqrt(s2 + e) (C), and the running ones a step on; WIDTH channels a program."""
        c = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)[None, :]
        first, second = _sum_parts(sums, parts, C, c, ROWS, WIDTH)
        shift = first / M
        mu = tl.load(x + c, c < C, other=0.0).to(tl.float32) + shift
        s2 = tl.maximum(second / M - shift * shift, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(mean + c, mu, c < C)
        tl.store(inverse + c, 1 / tl.sqrt(s2 + eps), c < C)
        if TRACK:
            before = tl.load(running_mean + c, c < C)
            mu += tl.load(offset + c, c < C)
            tl.store(running_mean + c, before + momentum * (mu - before), c < C)
            before = tl.load(running_var + c, c < C)
            tl.store(running_var + c, before + momentum * (s2 * (M / (M - 1.0)) - before), c < C)

    @triton.jit
    def _normalize(x, mean, inverse, row, c, M, C):
        """n (ROWS, WIDTH) and 1 / sqrt(s2 + e) (1, WIDTH)."""
        inverse = tl.load(inverse + c, c < C, other=0.0)
        return (_load(x, row, c, M, C) - tl.load(mean + c, c < C, other=0.0)) * inverse, inverse

    @triton.jit
    def _forward(x, y, mean, inverse, weight, bias, M, C, ROWS: tl.constexpr, WIDTH: tl.constexpr):
        row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
        n, _ = _normalize(x, mean, inverse, row, c, M, C)
        z = n * tl.load(weight + c, c < C, other=0.0) + tl.load(bias + c, c < C, other=0.0)
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(y + row.to(tl.int64) * C + c, z, (row < M) & (c < C))

    @triton.jit
    def _backward_sums(x, dy, mean, inverse, weight, bias, sums, M, C, ROWS: tl.constexpr, WIDTH: tl.constexpr):
        """sums (parts, 2, C): of g, and of g n."""
        c = tl.arange(0, WIDTH)[None, :]
        w, b = tl.load(weight + c, c < C, other=0.0), tl.load(bias + c, c < C, other=0.0)
        first, second = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
        for start in tl.range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS, num_stages=3):
            row = start + tl.arange(0, ROWS)[:, None]
            n, _ = _normalize(x, mean, inverse, row, c, M, C)
            g = tl.where(n * w + b > 0, _load(dy, row, c, M, C), 0.0)
            first += g
            second += g * n
        _two_sums(first, second, sums, c, C)

    @triton.jit
    def _backward_finish(sums, grads, parts, C, ROWS: tl.constexpr, WIDTH: tl.constexpr):
        """grads (3, C): of offset, weight and bias; WIDTH channels a program."""
        c = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)[None, :]
        first, second = _sum_parts(sums, parts, C, c, ROWS, WIDTH)
        tl.store(grads + c, tl.zeros([1, WIDTH], tl.float32), c < C)
        tl.store(grads + C + c, second, c < C)
        tl.store(grads + 2 * C + c, first, c < C)

    @triton.jit
    def _backward(x, dy, dx, mean, inverse, weight, bias, grads, M, C, ROWS: tl.constexpr, WIDTH: tl.constexpr):
        row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
        n, inverse = _normalize(x, mean, inverse, row, c, M, C)
        w, b = tl.load(weight + c, c < C, other=0.0), tl.load(bias + c, c < C, other=0.0)
        dw, db = tl.load(grads + C + c, c < C, other=0.0), tl.load(grads + 2 * C + c, c < C, other=0.0)
        g = tl.where(n * w + b > 0, _load(dy, row, c, M, C), 0.0)
        tl.store(dx + row.to(tl.int64) * C + c, w * inverse * (g - (db + n * dw) / M), (row < M) & (c < C))


def launch(M: int, C: int) -> tuple[tuple[int, dict], ...]:
    """Of the kernels that sum, that add up the parts of such sums, and that write: the programs, and their tiles."""

    def tile(width: int) -> dict:
        return dict(ROWS=max(1, TILE // width), WIDTH=width, num_warps=8)

    width = triton.next_power_of_2(C)
    wide, few = tile(width), tile(min(width, 16))
    programs = triton.cdiv(M, wide["ROWS"])
    return (min(programs, PARTS), wide), (triton.cdiv(C, few["WIDTH"]), few), (programs, wide)


class _NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, offset, weight, bias, running_mean, running_var, training, momentum, eps):
        C, M = x.shape[1], x.numel() // x.shape[1]
        (parts, summing), (groups, adding), (tiles, writing) = launch(M, C)
        y = torch.empty_like(x)
        with torch.cuda.device_of(x):
            if training:
                mean, inverse = x.new_empty((2, C), dtype=torch.float32)
                sums = x.new_empty((parts, 2, C), dtype=torch.float32)
                _moments[parts,](x, sums, M, C, **summing)
                _statistics[groups,](x, sums, mean, inverse, offset, running_mean, running_var, momentum, eps, parts,
                                     M, C, TRACK=running_mean is not None, **adding)  # fmt: skip
            else:
                mean, inverse = running_mean - offset, (running_var + eps).rsqrt()
            _forward[tiles,](x, y, mean, inverse, weight, bias, M, C, **writing)
        ctx.save_for_backward(x, mean, inverse, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, mean, inverse, weight, bias = ctx.saved_tensors
        C, M = x.shape[1], x.numel() // x.shape[1]
        (parts, summing), (groups, adding), (tiles, writing) = launch(M, C)
        dy = dy.contiguous(memory_format=torch.channels_last_3d)
        dx, grads = torch.empty_like(x), x.new_empty((3, C), dtype=torch.float32)
        sums = x.new_empty((parts, 2, C), dtype=torch.float32)
        with torch.cuda.device_of(x):
            _backward_sums[parts,](x, dy, mean, inverse, weight, bias, sums, M, C, **summing)
            _backward_finish[groups,](sums, grads, parts, C, **adding)
            _backward[tiles,](x, dy, dx, mean, inverse, weight, bias, grads, M, C, **writing)
        return dx, *grads, *[None] * 5


def norm_relu(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """relu(batch_norm(x + offset)), (B, C, D, H, W) in the dtype and layout of x (Ioffe and Szegedy, ICML 2015).

    x: float32, float16 or bfloat16. offset, weight, bias: (C,) float32. In training the statistics are x's own, and
    running_mean and running_var, (C,) float32 or None, take a step of `momentum` toward them, in place; else they are
    the statistics.

    On a GPU, for channels_last_3d: three kernels forward and three backward, differentiable once, no synchronization,
    the same bits each time, fit for a CUDA graph. Everything else takes the reference, gradients in evaluation and
    weights with a stride too. ValueError for running averages with one: PyTorch's own batch norm does not update these
    on a GPU.
    """
    if any(v is not None and not v.is_contiguous() for v in (running_mean, running_var)):
        raise ValueError("running_mean and running_var must be contiguous")
    several = x.numel() > x.shape[1]  # values in a channel; of one PyTorch says that it has no variance
    dense = all(v.is_contiguous() for v in (offset, weight, bias))
    kernels = triton and (x.is_cuda or INTERPRETED) and x.dtype in DTYPES and several and dense
    kernels = kernels and (training or not torch.is_grad_enabled())
    if kernels and x.is_contiguous(memory_format=torch.channels_last_3d):
        return _NormReLU.apply(x, offset, weight, bias, running_mean, running_var, training, momentum, eps)
    return reference(x, offset, weight, bias, running_mean, running_var, training, momentum, eps)
