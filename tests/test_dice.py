"""The loss three ways: the literature's formulas, `reference`, and the kernels (interpreted where there is no GPU)."""

import inspect
import itertools
import runpy
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from aot import Job, assert_no_spills

from kernels import dice
from kernels.dice import dice_ce, reference

triton = pytest.importorskip("triton")

GPU = torch.cuda.is_available()
SHAPES = [(2, 2, 7, 9, 11), (3, 4, 17, 7, 5), (1, 2, 1, 1, 7), (2, 3, 13, 19, 17), (1, 16, 3, 5, 7)]
GPU_SHAPES = [(1, 2, 112, 112, 80), (2, 2, 37, 29, 23), (3, 4, 17, 31, 5), (1, 2, 1, 1, 7), (2, 14, 33, 20, 21)]
FORMS = list(itertools.product(("batch", "sample"), (False, True)))
# of the gradient: relative to its largest entry, absolute, relative (half a unit in the last place)
TOLERANCE = {
    torch.float32: (2e-6, 0, 0),
    torch.float16: (2e-6, 3e-8, 5e-4),
    torch.bfloat16: (2e-6, 0, 4e-3 if GPU else 8e-3),  # the interpreter cuts off, the GPU rounds
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Float buffers come filled with NaN: what a kernel leaves out cannot pass for a zero."""

    def poison(make):
        def poisoned(*args, **options):
            buffer = make(*args, **options)
            return buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer

        return poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


def draw(shape, device, dtype=torch.float32, label_dtype=torch.uint8, seed=0):
    torch.manual_seed(seed)
    B, C, *voxels = shape
    logits = (4 * torch.randn(shape)).to(device, dtype).requires_grad_()
    return logits, torch.randint(0, C, (B, *voxels)).to(device, label_dtype)


def check(logits, label, *weights, upstream=1.0, **options):
    """Kernels against the reference in float64, from the same logits; returns the kernels' loss and gradient."""
    loss = dice_ce(logits, label, *weights, **options)
    (grad,) = torch.autograd.grad(loss * upstream, logits)
    exact = logits.detach().double().requires_grad_()
    true = reference(exact, label, *weights, **options)
    (true_grad,) = torch.autograd.grad(true * upstream, exact)
    assert type(loss.grad_fn).__name__ == "_DiceCEBackward" and loss.shape == () and loss.dtype == torch.float32
    assert grad.dtype == logits.dtype
    torch.testing.assert_close(loss.double(), true, atol=1e-6, rtol=1e-6)
    relative, atol, rtol = TOLERANCE[logits.dtype]
    atol += relative * float(true_grad.abs().max())
    torch.testing.assert_close(grad.double(), true_grad, atol=atol, rtol=rtol)
    return loss, grad


# the reference against others' words


def literature(logits, label, ignore):
    """Dice of the left-atrium code bases, class by class over the whole batch; the background is left out."""
    keep = label != ignore
    probs, losses = logits.softmax(1), []
    for c in range(1, logits.shape[1]):
        score, target = probs[:, c][keep], (label == c)[keep].double()
        intersect, y_sum, z_sum = (score * target).sum(), (target * target).sum(), (score * score).sum()
        losses.append(1 - (2 * intersect + 1e-5) / (z_sum + y_sum + 1e-5))
    return sum(losses) / len(losses)


def monai(logits, label, ignore):
    """MONAI's DiceLoss(softmax=True, to_onehot_y=True): per sample and class, background in, no squares."""
    keep = (label != ignore)[:, None]
    onehot = F.one_hot(label.where(label != ignore, 0).long(), logits.shape[1]).movedim(-1, 1) * keep
    probs, axes = logits.softmax(1) * keep, (2, 3, 4)
    score = (2 * (probs * onehot).sum(axes) + 1e-5) / (probs.sum(axes) + onehot.sum(axes) + 1e-5)
    return (1 - score).mean()


@pytest.mark.parametrize("ignore", [-7, 1])
@pytest.mark.parametrize("form, background, other", [("batch", False, literature), ("sample", True, monai)])
def test_reference_is_the_published_loss(form, background, other, ignore):
    logits, label = draw((2, 3, 4, 5, 6), "cpu", torch.float64, torch.int64)
    found = reference(logits, label, 0.3, 0.7, form=form, background=background, ignore=ignore)
    expected = 0.3 * other(logits, label, ignore) + 0.7 * F.cross_entropy(logits, label, ignore_index=ignore)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("form, background", FORMS)
def test_reference_gradient(form, background):
    logits, label = draw((2, 3, 2, 2, 3), "cpu", torch.float64)

    def loss(z):
        return reference(z, label, 0.3, 0.7, form=form, background=background, ignore=2)

    assert torch.autograd.gradcheck(loss, logits)


# the kernels against the reference


@pytest.mark.parametrize("form, background", FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels(shape, dtype, form, background, device):
    logits, label = draw(shape, device, dtype)
    check(logits, label, 0.3, 0.7, form=form, background=background, upstream=2.5)


@pytest.mark.gpu
@pytest.mark.parametrize("form, background", FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_kernels_at_size(shape, dtype, form, background):
    logits, label = draw(shape, "cuda", dtype)
    check(logits, label, form=form, background=background, ignore=1, upstream=4096.0)
    check(logits.contiguous(memory_format=torch.channels_last_3d), label.long(), form=form, background=background)


@pytest.mark.parametrize("classes", range(3, 17))
def test_classes(classes, device):
    logits, label = draw((1, classes, 2, 3, 11), device)
    check(logits, label)


@pytest.mark.parametrize("classes, dtype", [(2, torch.float16), *((n, torch.float32) for n in (2, 4, 8, 16))])
def test_one_class_in_every_voxel(classes, dtype, device):
    """The last class fills its counter in the threads of a whole program and loses none."""
    logits, label = draw((1, classes, 1, 65, 65), device, dtype)
    check(logits, label.fill_(classes - 1), background=True)


@pytest.mark.parametrize("dtype", dice.LABEL_DTYPES)
def test_label_types(dtype, device):
    logits, label = draw((2, 3, 4, 5, 6), device, label_dtype=dtype)
    strange = label.clone()
    strange[0, :2] = torch.iinfo(dtype).max  # no class: as if ignored
    strange[1, :2] = torch.iinfo(dtype).min if dtype.is_signed else 3
    check(logits, label)
    check(logits, strange)
    if dtype.is_signed:
        loss, grad = check(logits, strange.where(strange <= 2, -1), ignore=-1)
        assert torch.equal(loss, dice_ce(logits, strange)) and not grad[:, :, :2].any()


@pytest.mark.parametrize("form, background", FORMS[::3])
def test_layouts(form, background, device):
    logits, label = draw((3, 3, 3, 5, 7), device)
    options = {"form": form, "background": background}
    loss, grad = check(logits, label, **options)
    last = logits.detach().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    last_loss, last_grad = check(last, label.transpose(1, 3).contiguous().transpose(1, 3), **options)
    assert torch.equal(loss, last_loss) and torch.equal(grad, last_grad)
    assert last_grad.is_contiguous(memory_format=torch.channels_last_3d)
    for cut in (logits[::2], logits[:, :2], logits[..., 1:], logits.transpose(2, 4)):
        logits_cut = cut.detach().requires_grad_()
        label_cut = torch.randint(0, 2, cut.shape[:1] + cut.shape[2:], device=device)
        loss, _ = check(logits_cut, label_cut, **options)
        assert torch.equal(loss, dice_ce(cut.contiguous(), label_cut, **options))


@pytest.mark.parametrize("form, background", FORMS)
def test_labels_of_one_kind(form, background, device):
    logits, label = draw((2, 3, 4, 5, 6), device)
    options = {"form": form, "background": background}
    check(logits, torch.zeros_like(label), **options)
    label[0] = 1
    check(logits, label, **options, ignore=0)
    _, grad = check(logits, label, **options, ignore=1)
    assert not grad[0].any() and grad[1].any()
    for function in (dice_ce, reference):
        loss = function(logits, torch.ones_like(label), **options, ignore=1)
        assert loss == 0 and not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize("form, background", FORMS)
def test_more_columns_than_a_block(form, background, device, monkeypatch):
    launch = dice.launch
    monkeypatch.setattr(dice, "launch", lambda *how: (launch(*how)[0], launch(*how)[1] | {"BLOCK": 2}))
    check(*draw((2, 3, 17, 241, 1), device), form=form, background=background)  # the last voxel is a block's only one


@pytest.mark.skipif(not dice.INTERPRETED, reason="2 GB, of which the interpreter touches a few pages")
def test_strides_beyond_32_bits():
    logits, label = draw((3, 2, 1, 1, 7), "cpu")
    try:
        room = np.zeros(2**31 + 7, np.uint8)
    except MemoryError:
        pytest.skip("this system reserves no 2 GB")
    check(logits, torch.from_numpy(room).as_strided((3, 1, 1, 7), (2**30, 7, 7, 1)).copy_(label))


def test_the_reference_sums_half_precision_in_float32(device):
    z, y = draw((2, 3, 4, 5, 6), device, torch.bfloat16)
    assert torch.equal(reference(z, y), reference(z.float(), y))


def test_far_logits(device):
    """Nothing overflows: at 10000 the wrong class costs 20000, in half precision too."""
    label = torch.tensor([[0, 1, 1, 0]], dtype=torch.uint8, device=device).reshape(1, 1, 2, 2)
    logits = torch.tensor([1e4, -1e4, 1e4, 1e-4], device=device).repeat(2, 1).reshape(1, 2, 1, 2, 2)
    logits[:, 1] *= -1
    for dtype in TOLERANCE:
        loss, _ = check(logits.to(dtype).requires_grad_(), label, 0.0, 1.0)
        assert 4990 < loss < 5001


@pytest.mark.parametrize("form, background", FORMS)
def test_a_class_may_be_excluded_by_an_infinite_logit(form, background, device):
    logits, label = draw((2, 3, 3, 4, 5), device)
    with torch.no_grad():
        logits[:, 2] = -torch.inf
    loss, grad = check(logits, label.clamp(max=1), form=form, background=background)
    assert loss.isfinite() and not grad[:, 2].any()


def test_same_bits(device):
    logits, label = draw((1, 3, 13, 17, 19), device)
    loss, grad = check(logits, label)
    for _ in range(2):
        again = dice_ce(logits, label)
        assert torch.equal(loss, again) and torch.equal(grad, torch.autograd.grad(again, logits)[0])


def test_double_use_and_autocast(device):
    """Twice in one graph, from the half-precision output of a layer, as in a step of the teacher."""
    torch.manual_seed(0)
    layer = torch.nn.Conv3d(1, 2, 1).to(device)
    image = torch.randn(2, 1, 5, 6, 7, device=device)
    label = (image[:, 0] > 0).byte()

    def gradient(loss):
        with torch.autocast(device, torch.bfloat16):
            logits = layer(image)
            assert logits.dtype == torch.bfloat16
            total = loss(logits, label) + torch.tensor(-0.3, device=device) * loss(logits, 1 - label, 0.0, 1.0)
        assert total.dtype == torch.float32
        return torch.autograd.grad(total, list(layer.parameters()))

    for found, expected in zip(gradient(dice_ce), gradient(reference), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-2)


def test_reference_serves_the_rest(device):
    for shape, dtype in (((1, 17, 2, 3, 4), torch.float32), ((1, 2, 2, 3, 4), torch.float64)):
        logits, label = draw(shape, device, dtype)
        loss = dice_ce(logits, label, form="sample")
        assert loss.dtype == dtype and torch.equal(loss, reference(logits, label, form="sample"))


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    alone = runpy.run_path(dice.__file__)
    logits, label = draw((1, 2, 2, 3, 4), "cpu")
    assert torch.equal(alone["dice_ce"](logits, label), reference(logits, label))


@pytest.mark.parametrize(
    "word, change",
    [
        ("logits", lambda z, y: (z[:, :1], y)),
        ("logits", lambda z, y: (z.long(), y)),
        ("logits", lambda z, y: (z[:0], y[:0])),
        ("label", lambda z, y: (z, y[:, None])),
        ("label", lambda z, y: (z, y[:, 1:])),
        ("label", lambda z, y: (z, y.float())),
        ("form", lambda z, y: (z, y, 0.5, 0.5, {"form": "sum"})),
        ("are on", lambda z, y: (z, y.to("meta"))),
    ],
)
def test_bad_input(word, change):
    *arguments, last = change(*draw((2, 3, 4, 5, 6), "cpu"))
    arguments, options = (arguments, last) if isinstance(last, dict) else ([*arguments, last], {})
    with pytest.raises(ValueError, match=word):
        dice_ce(*arguments, **options)


# what the GPU would run


@pytest.mark.gpu
def test_memory_synchronization_graph():
    logits, label = draw((4, 2, 112, 112, 80), "cuda")
    factor, stream = torch.tensor(2.0, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # the one that captures: autograd remembers
        loss, grad = check(logits, label)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(factor * dice_ce(logits, label), logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before - logits.nbytes < 2**20

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = factor * dice_ce(logits, label)
        (captured_grad,) = torch.autograd.grad(captured, logits)
    factor.fill_(-4.0)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, -4 * loss) and torch.equal(captured_grad, -4 * grad)


def jobs(classes, dtype, label="u8", form="batch", background=True, channels_last=False):
    """The three kernels as `dice_ce` launches them on 112 x 112 x 80 voxels, and as the launcher sees them: what
    is 1 is a constant, other strides are multiples of 16."""
    voxels, finish = dice.launch(classes, 4 if dtype == "fp32" else 2, form, background)
    unit = {"y_v": 1, **({"z_c": 1, "g_c": 1} if channels_last else {"z_v": 1, "g_v": 1})}
    unit |= {"groups": 1} if form == "batch" else {}
    kinds = {"logits": f"*{dtype}", "grad": f"*{dtype}", "label": f"*{label}", "ignore": "i32", "groups": "i32"}
    kinds |= dict.fromkeys(("sums", "coef", "upstream", "loss"), "*fp32") | {"columns": "i32"}
    kinds |= dict.fromkeys(("dice", "ce", "epsilon"), "fp32") | dict.fromkeys(("V", "z_b", "y_b", "g_b"), "i32:16")
    kinds |= dict.fromkeys(("z_c", "g_c", "z_v", "g_v"), "i32" if channels_last else "i32:16")
    for name, config in (("_sums", voxels), ("_gradient", voxels), ("_finish", finish)):
        names = inspect.signature(getattr(dice, name).fn).parameters
        constants = {key: value for key, value in (config | unit).items() if key in names}
        yield Job(
            name,
            {key: "constexpr" if key in constants else kinds[key] for key in names},
            constants,
            num_warps=config["num_warps"],
            maxnreg=config.get("maxnreg"),
        )


def test_nothing_spills():
    """The most classes of each block size, and what the left atrium takes: its logits come 16 bytes at once, and in
    bf16 the forward pass has at most 64 registers (two are not in the code): all its programs find room on a GPU."""
    default = [*jobs(2, "fp32", background=False), *jobs(2, "bf16", background=False)]
    results = assert_no_spills("kernels.dice", [*default, *jobs(4, "fp32"), *jobs(16, "fp32")])
    carried = [results[kernel]["carried"] for kernel in (0, 3, 6, 9)]  # count, product, nll, two sums a class
    assert carried == [[5], [5], [11], [35]]
    for kernel in (0, 1, 3, 4):
        assert any(kind.endswith(".128") for kind in results[kernel]["loads"]), default[kernel]
    assert results[3]["registers"] <= 62


@pytest.mark.parametrize("dtype, label, last", [("bf16", "u8", False), ("bf16", "u8", True), ("fp32", "i64", True)])
def test_a_thread_adds_up_its_own_voxels(dtype, label, last):
    """Threads exchange nothing but the 5 sums in the end, 7 times each, even of volumes that are no multiple of 16."""
    sums, *_ = jobs(2, dtype, label, background=False, channels_last=last)
    odd = replace(sums, signature={name: kind.removesuffix(":16") for name, kind in sums.signature.items()})
    assert [result["shuffles"] for result in assert_no_spills("kernels.dice", [sums, odd])] == [35, 35]


@pytest.mark.slow
@pytest.mark.parametrize("classes", range(2, 17))
def test_nothing_spills_anywhere(classes):
    cases = itertools.product(("fp32", "bf16"), ("u8", "i64"), FORMS, (False, True))
    every = [job for dtype, label, form, last in cases for job in jobs(classes, dtype, label, *form, last)]
    assert_no_spills("kernels.dice", every)
