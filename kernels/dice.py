"""Softmax, cross-entropy and Dice of 3D logits as one loss: one pass forward, one backward.

The mathematics
---------------
A voxel v has logits z_c, probabilities p_c = exp(z_c) / sum_k exp(z_k) and a label y; t_c = [y = c]. N voxels
count: those whose label is a class and not the ignored value. All sums run over counted voxels only.

    CE   = 1/N sum_v (log sum_k exp(z_k) - z_y)
    I_c  = sum_v p_c t_c       S_c = sum_v p_c^2 ("batch") or sum_v p_c ("sample")       T_c = sum_v t_c
    D_c  = (2 I_c + e) / (S_c + T_c + e),  e = 1e-5
    loss = ce CE + dice mean(1 - D_c)

The mean runs over K = the classes ("batch": each summed over the whole batch) or over K = samples x classes
("sample"). With U_c = S_c + T_c + e the quotient rule gives

    dloss/dp_c = g_c = a_c t_c + b_c p_c ("batch") or a_c t_c + b_c ("sample"),
    a_c = -2 dice / (K U_c),    b_c = dice D_c / (K U_c), twice that for "batch",

and the chain through the softmax, dp_k/dz_c = p_k ([k = c] - p_c), with w = ce / N,

    dloss/dz_c = p_c (g_c - sum_k p_k g_k) + w (p_c - t_c).

So a voxel's gradient needs its own logits and label and, of all others, no more than 2 K + 1 numbers. For a "batch"
that is spread over the ranks of a process group these come from the ranks' sums, added up; each rank multiplies its
gradient by their number, so that the mean, which data-parallel training takes, is that of the whole batch.

The bytes
---------
A voxel's C logits of s bytes and its label of l bytes are read by the forward pass, C s + l, and again by the
backward pass, which writes the gradient, 2 C s + l: 3 C s + 2 l in all. With C = 2, float32 and uint8 these are
26 bytes, 104 MB for 4 x 112 x 112 x 80 voxels. Keeping the softmax would move C s more; computing it again, none.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the reference serves
    triton = None

INTERPRETED = triton is not None and triton.knobs.runtime.interpret
EPSILON = 1e-5
LOSSES = {"ce": dict(dice=0.0, ce=1.0), "dice": dict(dice=1.0, ce=0.0), "dice+ce": dict(dice=0.5, ce=0.5)}
MAX_CLASSES = 16  # the kernels hold a voxel's classes in registers
LOGITS_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def reference(
    logits: Tensor,
    label: Tensor,
    dice: float = 0.5,
    ce: float = 0.5,
    *,
    form: str = "batch",
    background: bool = False,
    ignore: int | None = None,
    group=None,
) -> Tensor:
    """The same loss in plain PyTorch, differentiable, on any device; float64 stays float64. See `dice_ce`."""
    z, y = logits.flatten(2), label.flatten(1)  # (B, C, V), (B, V)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    counted = (y >= 0) & (y < z.shape[1])
    if ignore is not None:
        counted &= y != ignore
    axes = (0, 1) if form == "batch" else 1

    def whole(x: Tensor) -> Tensor:
        """The sum over the ranks; its gradient is this rank's part of it, times their number."""
        if group is None:
            return x
        total, part = x.detach().clone(), x * dist.get_world_size(group)
        dist.all_reduce(total, group=group)
        return total + (part - part.detach())

    nll, losses = 0, []
    for c, log_p in enumerate(z.log_softmax(1).unbind(1)):  # (B, V) each
        t = ((y == c) & counted).to(z.dtype)
        nll = nll - torch.where(t > 0, log_p, 0).sum()  # 0 * -inf would be no number
        if dice and (c or background):
            p = log_p.exp() * counted
            size = whole((p * p if form == "batch" else p).sum(axes) + t.sum(axes))
            losses.append(1 - (2 * whole((p * t).sum(axes)) + EPSILON) / (size + EPSILON))
    loss = ce * whole(nll) / whole(counted.sum()).clamp(min=1)
    return loss + dice * torch.stack(losses).mean() if dice else loss


def launch(classes: int, itemsize: int, form: str, background: bool) -> tuple[dict, dict]:
    """How the kernels run: `_sums` and `_gradient`, then `_finish`. Each of 128 threads takes some voxels at once,
    16 bytes a class of 2, fewer of more, for its registers, and a program takes 4 such blocks, the next two on their
    way while it computes; from 4 classes on 7, for the more sums there are, the more it costs to finish them. None of
    it depends on the GPU, so neither does the order of the sums."""
    common = {"C": classes, "FIRST": 0 if background else 1, "SQUARE": form == "batch"}
    voxels = 16 // itemsize if classes == 2 else 4 if classes < 5 else 2
    blocks = 4 if classes < 4 else 7
    width = triton.next_power_of_2(classes)
    # Left to itself the assembler spills a register of many classes to have few.
    registers = {"maxnreg": 255} if classes > 9 else {}
    return (
        {**common, "BLOCK": 128 * voxels, "SPAN": 128 * voxels * blocks, "num_warps": 4, **registers},
        {**common, "WIDTH": width, "BLOCK": 4096 // width, "num_warps": 8},
    )


if triton:

    @triton.jit
    def _softmax(logits, label, inside, z_c, ignore, C: tl.constexpr):
        """Of a block of voxels: whether they count, y (-1: does not count), e_c = exp(z_c - max z), their sum and its
        inverse (0: does not count), z_y - max z."""
        y = tl.load(label, mask=inside, other=C)
        counted = (y >= 0) & (y < C) & (y != ignore)
        y = tl.where(counted, y.to(tl.int32), -1)
        z = ()
        for _ in tl.static_range(C):
            z += (tl.load(logits, mask=inside, other=0.0).to(tl.float32),)
            logits += z_c
        top = z[0]
        for c in tl.static_range(1, C):
            top = tl.maximum(top, z[c])
        e = ()
        picked = tl.zeros_like(top)
        for c in tl.static_range(C):
            e += (tl.exp2((z[c] - top) * 1.4426950408889634),)  # 2 instructions to the 5 of exp
            picked = tl.where(y == c, z[c] - top, picked)
        total = e[0]
        for c in tl.static_range(1, C):
            total += e[c]
        root = tl.rsqrt(total)  # squared, the inverse in 2 instructions to the 8 of a division
        return counted, y, e, total, tl.where(counted, root * root, 0.0), picked

    @triton.jit
    def _times(a, b):
        return a * b

    @triton.jit
    def _together(x, product: tl.constexpr = False):
        """The sum, or product, of what each of 128 threads holds of x (BLOCK,): (128,)."""
        x = tl.reshape(x, [128, x.shape[0] // 128], can_reorder=True)  # any order, so that each keeps its own
        return tl.reduce(x, 1, _times) if product else tl.sum(x, 1)

    @triton.jit(do_not_specialize=["ignore"])
    def _sums(
        logits, label, sums, V, ignore, z_b, z_c, z_v, y_b, y_v,
        C: tl.constexpr, FIRST: tl.constexpr, SQUARE: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
    ):  # fmt: skip
        """One program's part of I_c, S_c, T_c and N CE, to its column of sums (3 C + 1, B parts)."""
        part, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        # a thread adds up its voxels of a block at once: a register for each sum, so that many programs find room
        BITS: tl.constexpr = 8 if C < 5 else 4  # of a class's count in a thread: of up to 32 voxels, or 7 blocks of 2
        count = tl.zeros([128], tl.int64 if C > 8 else tl.int32)
        product = tl.full([128], 1.0, tl.float32)  # of as many totals of 1 to C, below 2 ** 64: one logarithm for all
        nll = tl.zeros([128], tl.float32)
        inter, size = (), ()
        for _ in tl.static_range(FIRST, C):
            inter += (tl.zeros([128], tl.float32),)
            size += (tl.zeros([128], tl.float32),)
        for start in tl.range(part * SPAN, tl.minimum(part * SPAN + SPAN, V), BLOCK, num_stages=3):
            v = start + tl.arange(0, BLOCK)
            z, y = logits + sample * z_b + v * z_v, label + sample * y_b + v * y_v
            counted, y, e, total, inverse, picked = _softmax(z, y, v < V, z_c, ignore, C)
            product *= _together(tl.where(counted, total, 1.0), product=True)
            nll -= _together(picked)
            count += _together(counted.to(count.dtype) << (BITS * tl.maximum(y, 0)))
            inter_before, size_before, inter, size = inter, size, (), ()
            for c in tl.static_range(FIRST, C):
                p = e[c] * inverse
                inter += (inter_before[c - FIRST] + _together(tl.where(y == c, p, 0.0)),)
                size += (size_before[c - FIRST] + _together(p * p if SQUARE else p),)
        row = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
        sums += sample * tl.num_programs(0) + part
        for c in tl.static_range(C):
            if c >= FIRST:
                tl.store(sums + c * row, tl.sum(inter[c - FIRST]))
                tl.store(sums + (C + c) * row, tl.sum(size[c - FIRST]))
            tl.store(sums + (2 * C + c) * row, tl.sum(((count >> (BITS * c)) & (2**BITS - 1)).to(tl.float32)))
        tl.store(sums + 3 * C * row, tl.sum(nll + tl.log(product)))

    @triton.jit
    def _finish(
        sums, loss, coef, dice, ce, epsilon, groups, columns,
        C: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, SQUARE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """The partial sums in fixed order, to the loss and to coef: a_c and b_c of each group, then w.
        A group, `columns` of sums, is the whole batch or a sample."""
        c = tl.arange(0, WIDTH)
        used = (c >= FIRST) & (c < C)
        mean = 1.0 / (groups * (C - FIRST))
        row = groups * columns
        lost = tl.zeros([WIDTH], tl.float32)
        counted = tl.zeros([WIDTH], tl.float32)
        nll = tl.zeros([BLOCK], tl.float32)
        for group in range(groups):
            inter = tl.zeros([WIDTH, BLOCK], tl.float32)
            size = tl.zeros([WIDTH, BLOCK], tl.float32)
            count = tl.zeros([WIDTH, BLOCK], tl.float32)
            for start in range(0, columns, BLOCK):
                column = start + tl.arange(0, BLOCK)
                inside = column < columns
                at = sums + group * columns + column
                tile = at[None, :] + c[:, None] * row
                inter += tl.load(tile, mask=used[:, None] & inside[None, :], other=0.0)
                size += tl.load(tile + C * row, mask=used[:, None] & inside[None, :], other=0.0)
                count += tl.load(tile + 2 * C * row, mask=(c < C)[:, None] & inside[None, :], other=0.0)
                nll += tl.load(at + 3 * C * row, mask=inside, other=0.0)
            count_c = tl.sum(count, 1)
            union = tl.sum(size, 1) + count_c + epsilon
            score = (2 * tl.sum(inter, 1) + epsilon) / union
            slope = dice * mean / union
            tl.store(coef + c, -2 * slope, mask=used)
            tl.store(coef + C + c, (2 if SQUARE else 1) * slope * score, mask=used)
            coef += 2 * C
            lost += tl.where(used, 1 - score, 0.0)
            counted += count_c
        n = tl.maximum(tl.sum(counted), 1.0)
        tl.store(coef, ce / n)
        tl.store(loss, ce * tl.sum(nll) / n + dice * mean * tl.sum(lost))

    @triton.jit(do_not_specialize=["ignore"])
    def _gradient(
        logits, label, grad, coef, upstream, groups, V, ignore, z_b, z_c, z_v, y_b, y_v, g_b, g_c, g_v,
        C: tl.constexpr, FIRST: tl.constexpr, SQUARE: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
    ):  # fmt: skip
        """dloss/dz from coef and the loss's own gradient, zeros where a voxel does not count."""
        # from the end: what the forward pass read last is the likeliest to be in the cache still
        part = tl.num_programs(0) - 1 - tl.program_id(0).to(tl.int64)
        sample = tl.num_programs(1) - 1 - tl.program_id(1).to(tl.int64)
        factor = tl.load(upstream)
        w = tl.load(coef + groups * 2 * C) * factor
        coef += tl.where(groups > 1, sample, 0) * 2 * C
        a, b = (), ()
        for c in tl.static_range(FIRST, C):
            a += (tl.load(coef + c) * factor,)
            b += (tl.load(coef + C + c) * factor,)
        for start in tl.range(part * SPAN, tl.minimum(part * SPAN + SPAN, V), BLOCK, num_stages=3):
            v = start + tl.arange(0, BLOCK)
            z, y = logits + sample * z_b + v * z_v, label + sample * y_b + v * y_v
            _, y, e, _, inverse, _ = _softmax(z, y, v < V, z_c, ignore, C)
            g = ()
            mean = tl.zeros([BLOCK], tl.float32)  # sum_k p_k g_k
            for c in tl.static_range(FIRST, C):
                p = e[c] * inverse
                g += (tl.where(y == c, a[c - FIRST], 0.0) + b[c - FIRST] * (p if SQUARE else 1.0),)
                mean += p * g[c - FIRST]
            to = grad + sample * g_b + v * g_v
            for c in tl.static_range(C):
                slope = w - mean + (g[c - FIRST] if c >= FIRST else 0.0)
                tl.store(to, e[c] * inverse * slope - tl.where(y == c, w, 0.0), mask=v < V)
                to += g_c


class _DiceCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, label, dice, ce, form, background, ignore, group):
        z, y = logits.flatten(2), label.flatten(1)  # (B, C, V), (B, V): views of either memory format
        B, C, V = z.shape
        ctx.config, finish = launch(C, z.itemsize, form, background)
        parts = triton.cdiv(V, ctx.config["SPAN"])
        groups = 1 if form == "batch" else B
        ctx.shape, ctx.grid, ctx.groups = logits.shape, (parts, B), groups
        ctx.ranks = 1 if group is None else dist.get_world_size(group)
        ctx.sizes = V, -1 if ignore is None else ignore, *z.stride(), *y.stride()
        sums = z.new_empty((3 * C + 1, B * parts), dtype=torch.float32)
        coef = z.new_empty(groups * 2 * C + 1, dtype=torch.float32)
        loss = z.new_empty((), dtype=torch.float32)
        with torch.cuda.device_of(z):
            _sums[ctx.grid](z, y, sums, *ctx.sizes, **ctx.config)
            if group is not None:
                dist.all_reduce(sums, group=group)
            columns = B * parts // groups
            _finish[(1,)](sums, loss, coef, float(dice), float(ce), EPSILON, groups, columns, **finish)
        ctx.save_for_backward(z, y, coef)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        z, y, coef = ctx.saved_tensors
        upstream = upstream * ctx.ranks if ctx.ranks > 1 else upstream
        grad = torch.empty_like(z)  # in the memory format of z
        _gradient[ctx.grid](z, y, grad, coef, upstream, ctx.groups, *ctx.sizes, *grad.stride(), **ctx.config)
        return grad.view(ctx.shape), *[None] * 7


def dice_ce(
    logits: Tensor,
    label: Tensor,
    dice: float = 0.5,
    ce: float = 0.5,
    *,
    form: str = "batch",
    background: bool = False,
    ignore: int | None = None,
    group=None,
) -> Tensor:
    """ce * cross-entropy + dice * Dice loss, one number in float32, differentiable once in the logits.

    logits (B, C, D, H, W), C >= 2: float32, float16 or bfloat16, contiguous or channels_last_3d (another layout
    is copied). label (B, D, H, W): integer, uint8 moves the fewest bytes. A voxel whose label is `ignore` or no
    class (255, -1, C) is in no sum and gets no gradient, if its logits are finite; where no voxel counts, loss and
    gradient are 0. The mean of the Dice losses includes class 0 only with `background`. (A factor on the device, such
    as the feedback, multiplies the result: the backward pass reads what it is multiplied by where it lies.)

    form "batch": squared sums of a class over the whole batch, as the left-atrium literature has it (the Dice of
    Milletari et al., V-Net, 3DV 2016). form "sample": plain sums per sample and class (MONAI, nnU-Net).
    group: a process group of torch.distributed whose ranks hold equal shares of a "batch"; the loss is of all of it.

    On a GPU three kernels, no synchronization, the same bits each time; fit for a CUDA graph. More than 16 classes
    and float64 take the reference, as does a machine without a GPU. ValueError where the input does not fit.
    """
    if logits.ndim < 3 or logits.shape[1] < 2 or not logits.numel() or logits.dtype not in LOGITS_DTYPES:
        raise ValueError(f"logits are (B, C > 1, D, H, W) of floats: {tuple(logits.shape)}, {logits.dtype}")
    if label.shape != logits.shape[:1] + logits.shape[2:] or label.dtype not in LABEL_DTYPES:
        raise ValueError(
            f"label is (B, D, H, W) of uint8 to int64: {tuple(label.shape)}, {label.dtype}"
            f" with logits {tuple(logits.shape)}"
        )
    if form not in ("batch", "sample"):
        raise ValueError(f'form is "batch" or "sample": {form!r}')
    if group is not None and form != "batch":
        raise ValueError('a group adds up the sums of form "batch"')
    if label.device != logits.device:
        raise ValueError(f"logits are on {logits.device}, label on {label.device}")
    kernels = triton and (logits.is_cuda or INTERPRETED)
    if not kernels or logits.shape[1] > MAX_CLASSES or logits.dtype == torch.float64:
        more = dict(form=form, background=background, ignore=ignore, group=group)
        return reference(logits, label, dice, ce, **more)
    return _DiceCE.apply(logits, label, dice, ce, form, background, ignore, group)
