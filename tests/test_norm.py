"""kernels/norm.py against its reference and PyTorch's modules: on a GPU or interpreted."""

import copy
import functools
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from aot import ROOT, Job, assert_no_spills
from torch import nn

import devices
from kernels import norm
from kernels.norm import norm_relu, reference

triton = pytest.importorskip("triton")
SHAPES = [(2, 16, 4, 5, 6), (1, 3, 7, 3, 5), (3, 1, 2, 2, 3), (2, 40, 3, 1, 1), (1, 256, 1, 2, 2), (2, 2, 16, 16, 11)]
SETTINGS = 0.3, 0.05  # momentum and e
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    """Several tiles a program, and several programs, even in a small volume."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(norm, "TILE", 128)
        monkeypatch.setattr(norm, "PARTS", 20)


def draw(shape, device, dtype=torch.float32, seed=0):
    """x, dy; offset, weight, bias, running mean and variance; the mean of x is larger than its deviation."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    channel = [torch.randn(shape[1], generator=generator) for _ in range(5)]
    channel[4].exp_()
    x = (2 * x + 5).to(device, dtype).contiguous(memory_format=torch.channels_last_3d)
    return x, dy.to(device, dtype), [value.to(device) for value in channel]


def run(function, x, dy, channel, training=True, track=True):
    """y; the gradients of x, offset, weight and bias; the running statistics after it."""
    x, *weights = (value.clone().requires_grad_(training) for value in (x, *channel[:3]))
    running = [value.clone() for value in channel[3:]] if track else [None, None]
    with torch.set_grad_enabled(training):
        y = function(x, *weights, *running, training, *SETTINGS)
    grads = torch.autograd.grad(y, (x, *weights), dy) if training else ()
    return [y, *grads, *(value for value in running if track)]


def check(shape, device, dtype=torch.float32, training=True, track=True):
    x, dy, channel = draw(shape, device, dtype)
    offset, *wide = (value.double() for value in channel)
    shifted, running = x.double() + offset.view(-1, 1, 1, 1), [value.clone() for value in wide[2:]]
    z = F.batch_norm(shifted, *running, *wide[:2], training, *SETTINGS)
    dy[z.abs() < 1e-3] = 0  # at the ReLU's bend rounding decides
    found = run(norm_relu, x, dy, channel, training, track)
    expected = run(reference, x.double(), dy.double(), [offset, *wide], training, track)
    assert found[0].dtype == dtype and found[0].is_contiguous(memory_format=torch.channels_last_3d)
    for one, other in zip(found, expected, strict=True):
        error = (one.double() - other).abs().max() / other.abs().max().clamp(min=1)
        assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels(shape, dtype, device):
    check(shape, device, dtype)


@pytest.mark.parametrize("options", [dict(track=False), dict(training=False)], ids=str)
def test_exam_and_evaluation(options, device):
    check(SHAPES[0], device, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(4, 16, 112, 112, 80), (2, 32, 56, 56, 40), (2, 256, 7, 7, 5)])
def test_kernels_at_size(shape, dtype):
    check(shape, "cuda", dtype)


def test_same_bits_twice(device):
    draws = draw(SHAPES[0], device, torch.bfloat16)
    one, other = (run(norm_relu, *draws) for _ in range(2))
    assert all(map(torch.equal, one, other))


def test_a_mean_far_larger_than_the_deviation(device):
    x, dy, channel = draw((2, 4, 6, 6, 6), device)
    found, expected = (run(norm_relu, x + shift, dy, channel, track=False) for shift in (1024.0, 0.0))
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=2e-3)  # x itself is rounded to 6e-5


def test_a_variance_that_rounding_made_negative_is_none(device):
    def numbers(*values):
        return torch.tensor(values, device=device)

    mean, inverse, x, sums = numbers(0.0), numbers(0.0), numbers(0.0), numbers(4.0, 3.9999)
    norm._statistics[1,](x, sums, mean, inverse, x, None, None, 0.1, 1e-5, 1, 4, 1, TRACK=False, ROWS=1, WIDTH=1)
    assert inverse.item() == pytest.approx(1e-5**-0.5)


def test_the_bias_of_a_convolution_has_no_gradient(device):
    assert not run(norm_relu, *draw(SHAPES[0], device))[2].any()


@pytest.mark.filterwarnings("ignore:invalid value")  # of NumPy, in the interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(value, device):
    x, _, channel = draw(SHAPES[0], device)
    x[0, 3, 1, 0, 0] = value
    y = norm_relu(x, *channel, True)
    assert y[:, 3].isnan().all() and y[:, :3].isfinite().all()
    assert channel[4][3].isnan() and channel[4][:3].isfinite().all()


def test_evaluation_has_a_gradient(device):
    x, dy, channel = draw(SHAPES[0], device)
    for one, other in zip(*(torch.autograd.grad(f(x.requires_grad_(), *channel, False), x, dy)
                            for f in (norm_relu, reference)), strict=True):
        assert torch.equal(one, other)


def test_layouts_and_types_without_a_kernel_take_the_reference(device):
    x, dy, channel = draw(SHAPES[0], device)
    for other in (x.contiguous(), x.double()):
        weights = [value.to(other.dtype) for value in channel]
        for one, expected in zip(*(run(f, other, dy.to(other.dtype), weights) for f in (norm_relu, reference)),
                                 strict=True):
            assert torch.equal(one, expected)


def test_weights_may_have_a_stride_and_averages_may_not(device):
    x, _, channel = draw(SHAPES[0], device)
    for i, value in enumerate(channel):
        given, expected = ([other.clone() for other in channel] for _ in range(2))
        given[i] = torch.stack([value, value + 1], 1)[:, 0]
        if i >= 3:
            with pytest.raises(ValueError, match="contiguous"):
                norm_relu(x, *given, True)
            continue
        close = functools.partial(torch.testing.assert_close, rtol=0, atol=TOLERANCE[x.dtype])
        close(norm_relu(x, *given, True), reference(x, *expected, True))
        close(given, expected)


def test_reference_is_the_three_modules():
    torch.manual_seed(0)
    conv = nn.Conv3d(2, 3, 3, padding=1)
    modules, x = devices.Unit(conv), torch.randn(2, 2, 4, 5, 6)
    bare = nn.functional.conv3d(x, conv.weight, None, padding=1)
    running = [value.clone() for value in (modules[1].running_mean, modules[1].running_var)]
    y = reference(bare, conv.bias, modules[1].weight, modules[1].bias, *running, True)
    torch.testing.assert_close(y, modules(x))
    torch.testing.assert_close(running, [modules[1].running_mean, modules[1].running_var])


@pytest.mark.gpu
@pytest.mark.parametrize("conv", [nn.Conv3d(2, 3, 3, padding=1), nn.Conv3d(2, 4, 2, stride=2),
                                  nn.ConvTranspose3d(4, 2, 2, stride=2)], ids=str)
@pytest.mark.parametrize("mode", ["training", "exam", "evaluation"])
def test_the_unit_on_a_gpu_is_its_modules(conv, mode, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    training = mode != "evaluation"
    plain = devices.Unit(copy.deepcopy(conv)).double().train(training)
    unit = copy.deepcopy(plain).float().to("cuda", memory_format=torch.channels_last_3d)
    x = torch.randn(2, conv.in_channels, 8, 8, 8)
    plain[1].track_running_stats = unit[1].track_running_stats = mode != "exam"
    with torch.set_grad_enabled(training):
        y = unit(x.cuda().contiguous(memory_format=torch.channels_last_3d))
        expected = plain(x.double())
    torch.testing.assert_close(y.double().cpu(), expected, rtol=1e-4, atol=1e-4)
    for one, other in ((getattr(net[1], name) for net in (unit, plain)) for name in ("running_mean", "running_var")):
        torch.testing.assert_close(one.double().cpu(), other.double(), rtol=1e-4, atol=1e-5)
    if training:
        pairs = (y, unit), (expected, plain)
        grads = (torch.autograd.grad((out**2).sum(), list(net.parameters())) for out, net in pairs)
        for one, other in zip(*grads, strict=True):  # the square has no bend
            torch.testing.assert_close(one.double().cpu(), other, rtol=1e-3, atol=1e-2)


def test_without_triton_the_reference_serves():
    program = ("import sys; sys.modules['triton'] = None\n"
               "import torch; from kernels.norm import norm_relu\n"
               "assert norm_relu(torch.ones(1, 1, 1, 1, 2), *torch.zeros(4, 1), torch.ones(1), False).sum() == 0\n")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)


def test_nothing_spills(monkeypatch):
    """The left atrium's channels, which are loaded 16 bytes at once."""
    monkeypatch.undo()  # the tiles of a GPU
    jobs = []
    for width, dtype in itertools.product((16, 256), ("bf16", "fp32")):
        (_, summing), (_, adding), (_, writing) = norm.launch(1 << 20, width)
        for name, config in dict(_moments=summing, _statistics=adding, _forward=writing, _backward_sums=summing,
                                 _backward_finish=adding, _backward=writing).items():
            names = getattr(norm, name).fn.__code__.co_varnames[: getattr(norm, name).fn.__code__.co_argcount]
            kinds = {key: f"*{dtype}" if key in ("x", "y", "dy", "dx") else "i32:16" if key in ("M", "C", "parts")
                     else "fp32" if key in ("eps", "momentum") else "*fp32" for key in names}
            these = {key: value for key, value in (config | dict(TRACK=True)).items() if key in names}
            jobs.append(Job(name, kinds | dict.fromkeys(these, "constexpr"), these, config["num_warps"]))
    results = assert_no_spills("kernels.norm", jobs)
    for job, result in zip(jobs, results, strict=True):
        if job.kernel in ("_moments", "_forward", "_backward_sums", "_backward"):
            assert any(kind.endswith(".128") for kind in result["loads"]), (job, result)
