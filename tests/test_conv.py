"""kernels/conv.py against its reference: on a GPU or interpreted."""

import math
import os
import subprocess
import sys

import pytest
import torch
from aot import ROOT, Job, assert_no_spills, compile_all

from kernels import conv
from kernels.conv import CHANNELS, convolve, reference

triton = pytest.importorskip("triton")
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of what is written with 11 or 8 bits
KINDS = [(3, False), (2, False), (2, True)]  # size of the kernel, transposed
ALL = [(*kind, channels) for kind in KINDS for channels in CHANNELS[kind[0]]]


@pytest.fixture(autouse=True)
def between_nan(monkeypatch):
    """What the kernels write lies between NaN, which whoever writes too far would overwrite."""
    whole, new_empty = [], torch.Tensor.new_empty

    def surrounded(like, *shape, **options):
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        whole.append(new_empty(like, math.prod(shape) + 8192, **options).fill_(math.nan))
        return whole[-1][4096:-4096].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", surrounded)
    yield
    assert all(y[:4096].isnan().all() and y[-4096:].isnan().all() for y in whole)


def draw(size, transposed, channels, shape, device, dtype=torch.float16):
    """x, weight, dy for a volume (B, D, H, W), which is y's if transposed, else x's; x and dy lie between NaN, which
    whoever reads too far would find."""
    generator, (I, O), (B, *whole) = torch.Generator().manual_seed(0), channels, shape
    half = whole if size == 3 else [length // 2 for length in whole]
    fine, coarse = (torch.full((B + 2, *side, C), math.nan) for side, C in ((whole, I), (half, O)))
    for y in (fine, coarse):
        y[1:-1] = torch.randn(y[1:-1].shape, generator=generator)
    fine, coarse = (y.to(device, dtype)[1:-1].movedim(-1, 1) for y in (fine, coarse))
    weight = torch.randn((O, I, size, size, size), generator=generator)
    weight = weight.to(device, memory_format=torch.channels_last_3d).requires_grad_()
    x, dy = (coarse, fine) if transposed else (fine, coarse)
    return x.requires_grad_(I > 1), weight, dy


def run(function, x, weight, dy, transposed):
    y = function(x, weight, transposed)
    return [y, *torch.autograd.grad(y, [value for value in (weight, x) if value.requires_grad], dy)]


def check(size, transposed, channels, shape, device, dtype=torch.float16):
    x, weight, dy = draw(size, transposed, channels, shape, device, dtype)
    exact = [value.detach().to(dtype).double().requires_grad_(value.requires_grad) for value in (x, weight)]
    found, expected = run(convolve, x, weight, dy, transposed), run(reference, *exact, dy.double(), transposed)
    assert found[0].grad_fn.name() == ("_Conv3x3x3Backward" if size == 3 else "_Stride2Backward")
    assert found[0].is_contiguous(memory_format=torch.channels_last_3d)
    # of 32 to 32 channels only the weight's gradient is ours: the rest is PyTorch's, and some CPUs sum it in float16
    rounding = TOLERANCE[dtype] if channels != (32, 32) or device == "cuda" else 1e-2
    for one, other, tolerance in zip(found, expected, (rounding, 1e-5, rounding), strict=False):
        assert one.dtype == (torch.float32 if tolerance == 1e-5 else dtype)
        assert (one.double() - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (1, 2, 9, 16), (2, 1, 1, 24)])
@pytest.mark.parametrize("channels", CHANNELS[3])
def test_3x3x3(channels, shape, device):
    check(3, False, channels, shape, device)


@pytest.mark.parametrize("shape", [(2, 4, 6, 8), (1, 10, 14, 10), (1, 2, 2, 2)])
@pytest.mark.parametrize("size, transposed, channels", ALL[3:])
def test_stride_2(size, transposed, channels, shape, device):
    check(size, transposed, channels, shape, device)


def test_several_tiles_a_program(device, monkeypatch):
    monkeypatch.setitem(conv.PARTS, 16, 3)
    monkeypatch.setattr(conv, "FOLDED", 2)
    check(3, False, (16, 16), (2, 9, 9, 16), device)
    monkeypatch.setattr(conv, "STRIDE2", dict(ROWS=16, PARTS=2))
    check(2, False, (16, 32), (1, 8, 6, 10), device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size, transposed, channels", ALL)
def test_at_size(size, transposed, channels, dtype):
    check(size, transposed, channels, (2, 112, 112, 80) if min(channels) < 32 else (3, 58, 54, 40), "cuda", dtype)


@pytest.mark.parametrize("size, transposed", KINDS)
def test_same_bits_twice(size, transposed, device):
    draws = draw(size, transposed, (16, 16 if size == 3 else 32), (1, 4, 6, 8), device)
    assert all(map(torch.equal, *(run(convolve, *draws, transposed) for _ in range(2))))


def test_a_weight_and_a_gradient_in_another_layout(device):
    for size, transposed in KINDS:
        x, weight, dy = draw(size, transposed, (16, 16 if size == 3 else 32), (1, 2, 4, 8), device)
        other = run(convolve, x, weight.contiguous(), dy.contiguous(), transposed)
        assert all(map(torch.equal, run(convolve, x, weight, dy, transposed), other))


def test_of_the_weight_or_of_x_alone(device):
    for size, transposed in KINDS:
        x, weight, dy = draw(size, transposed, (16, 16 if size == 3 else 32), (1, 2, 4, 8), device)
        _, dw, dx = run(convolve, x, weight, dy, transposed)
        assert torch.equal(run(convolve, x.detach(), weight, dy, transposed)[1], dw)
        assert torch.equal(run(convolve, x, weight.detach(), dy, transposed)[1], dx)


@pytest.mark.parametrize("size, transposed, channels, shape", [
    (3, False, (16, 32), (1, 3, 3, 8)), (3, False, (16, 16), (1, 3, 3, 7)), (3, False, (1, 16), (1, 3, 3, 4)),
    (2, False, (16, 16), (1, 4, 4, 4)), (2, False, (16, 32), (1, 5, 4, 4)), (2, False, (16, 32), (1, 4, 5, 4)),
    (2, False, (16, 32), (1, 4, 4, 5)), (2, True, (8, 16), (1, 4, 4, 4)),
])  # fmt: skip
def test_what_no_kernel_is_for_takes_the_reference(size, transposed, channels, shape, device):
    x, weight, _ = draw(size, transposed, channels, shape, device)
    y = convolve(x, weight, transposed)
    assert not y.grad_fn.name().startswith("_") and torch.equal(y, reference(x, weight, transposed))


def test_other_types_and_layouts_take_the_reference(device):
    x, weight, _ = draw(3, False, (16, 16), (1, 3, 3, 8), device)
    for one, other in ((x.float(), weight), (x.contiguous(), weight), (x, weight.half())):
        y = convolve(one, other)
        assert not y.grad_fn.name().startswith("_") and torch.equal(y, reference(one, other))
    x, weight, dy = draw(3, False, (1, 16), (1, 3, 3, 8), device)  # no kernel has the gradient of one channel
    assert run(convolve, x.requires_grad_(), weight, dy, False)[2].shape == x.shape


@pytest.mark.parametrize("shape, transposed", [((16, 16, 1, 1, 1), False), ((16, 16, 3, 1, 1), False),
                                               ((16, 16, 3, 3, 3), True)])
def test_other_weights_are_refused(shape, transposed):
    with pytest.raises(ValueError, match="give 3x3x3, or 2x2x2"):
        convolve(torch.zeros(1, 16, 4, 4, 8), torch.zeros(shape), transposed)


def test_channels_that_do_not_fit_are_an_error(device):
    x, weight, _ = draw(3, False, (16, 16), (1, 3, 3, 8), device)
    with pytest.raises(RuntimeError, match="channels"):
        convolve(torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last_3d), weight)


def test_autocast_chooses_the_type(device):
    x, weight, _ = draw(3, False, (16, 16), (1, 3, 3, 8), device)
    with torch.autocast(device, torch.float16):
        y = convolve(x.float(), weight)
    assert y.grad_fn.name() == "_Conv3x3x3Backward" and torch.equal(y, convolve(x, weight))


def test_without_triton_the_reference_serves():
    program = ("import sys; sys.modules['triton'] = None\n"
               "import torch; from kernels.conv import convolve\n"
               "assert convolve(torch.ones(1, 16, 1, 1, 8), torch.zeros(16, 16, 3, 3, 3)).sum() == 0\n")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)


@pytest.mark.parametrize("dtype, sizes", [("bf16", "i32:16"), *(pytest.param(*case, marks=pytest.mark.slow) for case in
                                           (("bf16", "i32"), ("fp16", "i32:16"), ("fp16", "i32")))])
def test_nothing_spills(dtype, sizes):
    jobs, sides = [], dict.fromkeys("DHW", sizes)

    def job(name, arguments, num_warps=4, **constants):
        kinds = {key: f"*{dtype}" if kind == "*" else kind for key, kind in arguments.items()}
        jobs.append(Job(name, kinds | dict.fromkeys(constants, "constexpr"), constants, num_warps))

    for I, O in CHANNELS[3]:
        P = conv.GROUP[I]
        shape = dict(I=I, P=P, K=triton.next_power_of_2((P + 2) * I), N=P * O)
        if I in conv.CONVOLVE:
            job("_convolve", dict(x="*", toeplitz="*", y="*", **sides), **shape, **conv.CONVOLVE[I])
        job("_correlate", dict(x="*", dy="*", sums="*fp32", tiles="i32", **sides), **shape, **conv.CORRELATE[I])
        for turned in (False, True):
            job("_expand", dict(weight="*fp32", toeplitz="*"), **shape, O=O, TURNED=turned)
        job("_fold", dict(sums="*fp32", grad="*fp32", parts="i32"), **shape, O=O, ROWS=conv.FOLDED, SHARE=min(I, 4))
    sides = dict(voxels=sizes, **sides)
    for I, O in CHANNELS[2]:
        shape = dict(I=I, O=O, ROWS=conv.STRIDE2["ROWS"])
        job("_down", dict(x="*", weight="*fp32", y="*", **sides), **shape)
        job("_up", dict(x="*", weight="*fp32", y="*", **sides), **shape)
        job("_correlate2", dict(fine="*", coarse="*", sums="*fp32", **sides), **shape)
    for job, result in zip(jobs, assert_no_spills("kernels.conv", jobs), strict=True):
        if job.constexprs["I"] > 1 and job.kernel not in ("_expand", "_fold"):
            assert {kind[-4:] for kind in result["loads"]} == {".128"}, (job, result)


def test_smaller_gpus_have_the_shared_memory():
    """99 kB a program: an RTX 3090 or 4090, an A10."""
    jobs, sides = [], dict.fromkeys("DHW", "i32:16")
    for name, configs, pointers in (("_convolve", conv.CONVOLVE, dict(toeplitz="*bf16", y="*bf16")),
                                    ("_correlate", conv.CORRELATE, dict(dy="*bf16", sums="*fp32", tiles="i32"))):
        for I, config in configs.items():
            P, O = conv.GROUP[I], max(I, 16)
            constants = dict(I=I, P=P, K=triton.next_power_of_2((P + 2) * I), N=P * O) | config
            num_warps = constants.pop("num_warps")
            kinds = dict(x="*bf16") | pointers | sides | dict.fromkeys(constants, "constexpr")
            jobs.append(Job(name, kinds, constants, num_warps, target=86))
    assert all(result["shared"] <= 101376 for result in compile_all("kernels.conv", jobs))
