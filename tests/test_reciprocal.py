"""The method's claims: the feedback is the meta-gradient, the step is its formulas, windows equal a plain loop."""

import copy
import itertools
import json
import re
import shlex
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import devices
import kernels.dice
import metrics
import reciprocal
import record
from baselines import COMPARISONS, descend, random_box, restore
from cli import BadInput
from cli import cli as exit_status
from reciprocal import NETWORKS, Config, VNet, exam, reciprocal_step, segment, stages, supervised_step

TINY = shlex.split("--patch 16 16 16 --stride 8 8 8 --filters 2 --depth 2 --batch-l 1 --batch-u 1 --iterations 4 "
                   "--pretrain 2 --log-every 1 --eval-every 2 --eval-cases 1 --save-every 2 --device cpu")
PAPER = replace(Config(), **reciprocal.PRESETS["paper"])


@pytest.fixture(autouse=True)
def loss_without_interpreter(monkeypatch):
    """These tests are about the step; Triton's interpreter would only make its loss slow."""
    monkeypatch.setattr(kernels.dice, "INTERPRETED", False)


def cli(*arguments) -> int:
    return exit_status(lambda: reciprocal.main([str(argument) for argument in arguments]))


# ---- the network


def test_vnet_has_the_parameters_of_the_literature():
    assert sum(p.numel() for p in VNet(1, 2).parameters()) == 9_448_866


def test_vnet_adds_its_skips_and_drops_out_in_two_places():
    net, x, dropped = VNet(1, 2, filters=2, depth=1, dropout=True), torch.randn(1, 1, 4, 4, 4), []
    net.dropout.register_forward_hook(lambda module, i, o: dropped.append((module.p, i[0].shape[1])))
    fine = net.eval().encoder[0](x)
    below = net.up[0](net.encoder[1](net.down[0](fine)))
    torch.testing.assert_close(net(x), net.head(net.decoder[0](below + fine)))
    assert dropped == [(0.5, 4), (0.5, 2)] and (fine >= 0).all() and fine.max() > 0
    assert {m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm3d)} == {0.1}


@pytest.mark.parametrize("channels, classes, depth, patch", [
    (1, 2, 4, (16, 16, 32)), (1, 2, 5, (32, 32, 32)), (3, 5, 3, (8, 16, 24)), (2, 3, 0, (5, 6, 7))])
def test_vnet_takes_any_channels_classes_and_depth(channels, classes, depth, patch):
    net = VNet(channels, classes, filters=2, depth=depth, dropout=True)
    assert depth < 3 or {len(block) for block in net.encoder[3:]} == {3}
    assert net(torch.randn(2, channels, *patch)).shape == (2, classes, *patch)


# ---- the step


def toy(seed=0, voxels=3):
    """Three voxels, two classes, float64: every pseudo label can be enumerated."""
    generator = torch.Generator().manual_seed(seed)

    def net():
        module = nn.Sequential(nn.Conv3d(1, 3, 1), nn.Tanh(), nn.Conv3d(3, 2, 1)).double()
        for p in module.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        return module

    x_l, x_u = (torch.randn(1, 1, 1, 1, voxels, generator=generator, dtype=torch.float64) for _ in range(2))
    y_l = torch.randint(2, (1, 1, 1, voxels), generator=generator)
    return net(), net(), dict(x_l=x_l, y_l=y_l, x_u=x_u)


class Says(nn.Module):
    """A teacher whose pseudo label is given."""

    def __init__(self, pseudo_label):
        super().__init__()
        self.logits = nn.Parameter(F.one_hot(pseudo_label, 2).movedim(-1, 1).double())

    def forward(self, x):
        return self.logits


def feedback_of(student, batch, pseudo_label, lr, feedback):
    student, teacher = copy.deepcopy(student), Says(pseudo_label)
    optimizers = [torch.optim.SGD(teacher.parameters(), lr=0.0), torch.optim.SGD(student.parameters(), lr=lr)]
    cfg = replace(PAPER, feedback=feedback)
    return reciprocal_step([teacher, student], optimizers, batch, cfg)["feedback"]


def expected_update(teacher, student, batch, lr, feedback):
    """(true meta-gradient, E[h * grad CE] over all pseudo labels), as flat vectors."""
    weights = list(teacher.parameters())
    log_probs = teacher(batch["x_u"]).log_softmax(1)  # (1, 2, 1, 1, V)
    objective, update = 0, 0
    for voxels in itertools.product((0, 1), repeat=batch["x_u"].numel()):
        pseudo_label = torch.tensor(voxels).view(1, 1, 1, -1)
        log_p = log_probs.gather(1, pseudo_label[:, None]).sum()  # log P(pseudo_label) = -V * CE
        lesson = F.cross_entropy(student(batch["x_u"]), pseudo_label)
        gradients = torch.autograd.grad(lesson, list(student.parameters()))
        after = copy.deepcopy(student)
        for p, g in zip(after.parameters(), gradients, strict=True):
            p.data -= lr * g
        objective = objective + log_p.exp() * F.cross_entropy(after(batch["x_l"]), batch["y_l"]).detach()
        h = feedback_of(student, batch, pseudo_label, lr, feedback)
        update = update + log_p.exp().detach() * h * -log_p
    flat = lambda loss: torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=True)])  # noqa: E731
    return flat(objective), flat(update)


@pytest.mark.parametrize("seed", range(3))
def test_expected_feedback_is_the_meta_gradient(seed):
    """E over sampled pseudo labels of h * grad CE, CE summed over voxels, is the gradient of the expected exam loss to
    first order in lr: an error that shrinks tenfold a decade, and a cosine of 1 in the end, which pins the sign."""
    teacher, student, batch = toy(seed)
    errors = []
    for lr in (1e-2, 1e-3, 1e-4):
        true, update = expected_update(teacher, student, batch, lr, "scalar")
        errors.append(((update - true).norm() / true.norm()).item())
    assert F.cosine_similarity(true, update, 0) > 0.9999
    assert 8 < errors[1] / errors[2] < 12


def test_measured_fall_of_the_exam_loss_is_the_exact_meta_gradient():
    true, update = expected_update(*toy(1), lr=0.1, feedback="difference")
    torch.testing.assert_close(update, true, rtol=1e-9, atol=1e-12)


def test_argmax_is_biased():
    """Why the identity is for sampled pseudo labels: the argmax alone can point the opposite way."""
    teacher, student, batch = toy(0)
    true, _ = expected_update(teacher, student, batch, 1e-2, "scalar")
    logits = teacher(batch["x_u"])
    h = feedback_of(student, batch, logits.argmax(1), 1e-2, "scalar")
    gradients = torch.autograd.grad(h * F.cross_entropy(logits, logits.argmax(1)), list(teacher.parameters()))
    assert F.cosine_similarity(true, torch.cat([g.flatten() for g in gradients]), 0) < -0.9


@pytest.mark.parametrize("seed", range(3))
def test_a_credit_for_each_voxel_is_the_meta_gradient_without_sampling(seed):
    """To first order a lesson's effect is a sum over its voxels. So the gradient of the expected exam loss is that of
    the teacher's probabilities times credits: by how much a step of the student down the exam's own loss would raise
    its log-probability of each class at each voxel. One exam, no bias, no division by the voxels."""
    teacher, student, batch = toy(seed)
    errors = []
    for lr in (1e-2, 1e-3, 1e-4):
        true, _ = expected_update(teacher, student, batch, lr, "scalar")
        examined = copy.deepcopy(student)
        descend(torch.optim.SGD(examined.parameters(), lr), F.cross_entropy(examined(batch["x_l"]), batch["y_l"]))
        after, before = (net(batch["x_u"]).log_softmax(1).detach() for net in (examined, student))
        loss = -(teacher(batch["x_u"]).softmax(1) * (after - before)).sum(1).mean()
        update = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(teacher.parameters()))])
        errors.append(((update - true).norm() / true.norm()).item())
    assert F.cosine_similarity(true, update, 0) > 0.9999
    assert 8 < errors[1] / errors[2] < 12


def test_sign_of_the_feedback():
    """One voxel is lesson and exam: the gradients of its two labels are opposite, the true one helps."""
    _, student, batch = toy(voxels=1)
    batch = dict(batch, x_u=batch["x_l"])
    for feedback in ("scalar", "difference"):
        assert feedback_of(student, batch, batch["y_l"], 1e-2, feedback) > 0
        assert feedback_of(student, batch, 1 - batch["y_l"], 1e-2, feedback) < 0


def networks_and_batch(dropout=False):
    torch.manual_seed(0)
    nets = [VNet(1, 3, filters=2, depth=1, dropout=dropout).train() for _ in range(2)]
    batch = {name: torch.randn(2, 1, 6, 4, 8) for name in ("x_l", "x_u", "x_s")}
    return nets, batch | {name: torch.randint(3, (2, 6, 4, 8)) for name in ("y_l", "y_s")}


@pytest.mark.parametrize("preset,lesson,cutmix", [("paper", "pseudo", False), ("strong", "both", False),
                                                  ("strong", "both", True), ("strong", "mixed", True)])
def test_step_equals_the_formulas_written_out(preset, lesson, cutmix):
    """The teacher's two gradients, taken apart and added, and autograd.grad, equal backward passes with copies, as in
    the authors' form: both networks after one step of momentum SGD with weight decay. CutMix is the teacher's; the exam
    has none."""
    cfg = replace(Config(), **reciprocal.PRESETS[preset] | dict(lesson=lesson), cutmix=cutmix, lr=1.0)
    (teacher, student), batch = networks_and_batch()
    slow_t, slow_s = copy.deepcopy(teacher), copy.deepcopy(student)
    optimizers = [reciprocal.make_optimizer(cfg, net) for net in (teacher, student)]
    torch.manual_seed(1)  # of the boxes
    scalars = reciprocal_step([teacher, student], optimizers, batch, cfg)

    def loss(logits, label):
        return kernels.dice.reference(logits, label, **kernels.dice.LOSSES[cfg.loss])

    def gradients(net, *losses):
        total = [torch.zeros_like(p) for p in net.parameters()]
        for value in losses:
            net.zero_grad()
            value.backward(retain_graph=True)
            total = [t + p.grad.clone() for t, p in zip(total, net.parameters(), strict=True)]
        return total

    def step(net, grads):
        optimizer = reciprocal.make_optimizer(cfg, net)
        for p, g in zip(net.parameters(), grads, strict=True):
            p.grad = g
        optimizer.step()

    t_logits_u = slow_t(batch["x_u"])
    pseudo_label = t_logits_u.argmax(1)
    x_u, y_u, x_s, y_s = (x.clone() for x in (batch["x_u"], pseudo_label, batch["x_s"], batch["y_s"]))
    torch.manual_seed(1)
    if lesson == "mixed":
        box = random_box(x_u)
        x_u[box[:, None]], y_u[box] = batch["x_s"][box[:, None]], batch["y_s"][box]
        x_s[box[:, None]], y_s[box] = batch["x_u"][box[:, None]], pseudo_label[box]
    g_u = g_lesson = gradients(slow_s, loss(slow_s(x_u), y_u))
    if lesson != "pseudo":
        g_lesson = [u + s for u, s in zip(g_u, gradients(slow_s, loss(slow_s(x_s), y_s)), strict=True)]
    step(slow_s, g_lesson)
    with exam(slow_s):
        g_l = gradients(slow_s, loss(slow_s(batch["x_l"]), batch["y_l"]))
    h = cfg.lr * sum((u * v).sum() for u, v in zip(g_u, g_l, strict=True))
    x_l, y_l = batch["x_l"].clone(), batch["y_l"].clone()
    if cutmix:
        box = random_box(x_l)
        x_l[box[:, None]], y_l[box] = batch["x_l"][[1, 0]][box[:, None]], batch["y_l"][[1, 0]][box]
    step(slow_t, gradients(slow_t, loss(slow_t(x_l), y_l), h.detach() * F.cross_entropy(t_logits_u, pseudo_label)))
    torch.testing.assert_close(scalars["feedback"], h, rtol=1e-4, atol=1e-9)
    for fast, slow in ((teacher, slow_t), (student, slow_s)):
        torch.testing.assert_close(fast.state_dict(), slow.state_dict(), rtol=1e-3, atol=1e-5)


def test_feedback_reaches_the_teacher_and_off_does_not():
    after = []
    for feedback in ("scalar", "off"):
        nets, batch = networks_and_batch()
        cfg = replace(Config(), lr=1.0, feedback=feedback)
        optimizers = [reciprocal.make_optimizer(cfg, net) for net in nets]
        scalars = reciprocal_step(nets, optimizers, batch, cfg)
        after.append(nets[0].head.weight.detach().clone())
        assert ("feedback" in scalars) == (feedback == "scalar")
    assert not torch.equal(*after)


def test_exam_leaves_no_trace_in_the_running_statistics():
    net = VNet(1, 2, filters=2, depth=1).train()
    before = {name: buffer.clone() for name, buffer in net.named_buffers() if "running" in name}
    with exam(net):
        net(torch.randn(2, 1, 4, 4, 4))
    after = dict(net.named_buffers())
    assert all(torch.equal(buffer, after[name]) for name, buffer in before.items())
    net(torch.randn(2, 1, 4, 4, 4))
    assert not any(torch.equal(buffer, after[name]) for name, buffer in before.items())


def test_exam_under_autocast_sees_the_student_after_the_lesson():
    """Autocast may keep the cast weights of the student from before the lesson; ours must not."""
    feedback = []
    for amp in ("off", "bf16"):
        nets, batch = networks_and_batch()
        cfg = replace(Config(), lr=1.0, amp=amp)
        optimizers = [reciprocal.make_optimizer(cfg, net) for net in nets]
        with devices.autocast(amp, torch.device("cpu")):
            feedback.append(reciprocal_step(nets, optimizers, batch, cfg)["feedback"].item())
    assert feedback[1] == pytest.approx(feedback[0], rel=0.2)


def test_measured_feedback_is_free_of_dropout():
    """A lesson that changes nothing has no feedback, whatever the dropout."""
    nets, batch = networks_and_batch(dropout=True)
    cfg = replace(Config(), lr=1e-30, feedback="difference")
    optimizers = [reciprocal.make_optimizer(cfg, net) for net in nets]
    assert reciprocal_step(nets, optimizers, batch, cfg)["feedback"] == 0
    assert all(module.training for net in nets for module in net.modules())


def test_scalar_exam_has_dropout():
    nets, batch = networks_and_batch(dropout=True)
    modes = []
    nets[1].dropout.register_forward_hook(lambda module, *_: modes.append(module.training))
    reciprocal_step(nets, [reciprocal.make_optimizer(Config(), net) for net in nets], batch, Config())
    assert modes == [True] * 6  # in two places each: lesson, labeled lesson, exam


def test_step_never_waits_for_the_device(monkeypatch):
    """Host synchronizations are Tensor.item, tolist, cpu and truth values: the step has none."""

    def forbidden(*_, **__):
        raise AssertionError("the step read a value from the device")

    nets, batch = networks_and_batch()
    optimizers = [reciprocal.make_optimizer(Config(), net) for net in nets]
    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    for lesson, cutmix in (("both", False), ("mixed", True)):
        reciprocal_step(nets, optimizers, batch, replace(Config(), lesson=lesson, cutmix=cutmix))
    supervised_step(nets[:1], optimizers[:1], batch, Config())


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("step,changes", [
    (supervised_step, {}), (reciprocal_step, dict(lesson="mixed", cutmix=True)),
    *((reciprocal_step, dict(feedback=feedback)) for feedback in ("scalar", "difference", "off"))])
def test_a_graph_computes_what_the_step_does(step, changes, optimizer, amp, request, monkeypatch):
    """Captured at the fourth call and replayed at five others, on new patches, learning rates, boxes and dropout; and
    two queues compute what one does."""
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    device = devices.settle("cuda", deterministic=True)
    cfg, runs = replace(Config(), **changes, optimizer=optimizer), []
    second = devices.second_stream
    for function, queue in ((step, lambda device: None), (step, second), (devices.graphed(step, device), second)):
        monkeypatch.setattr(devices, "second_stream", queue)
        nets, batch = networks_and_batch(dropout=True)
        nets = [net.to(device, memory_format=torch.channels_last_3d) for net in nets]
        optimizers, scalars = [reciprocal.make_optimizer(cfg, net) for net in nets], []
        for iteration in range(9):
            for each in optimizers:
                each.param_groups[0]["lr"] = float(np.float32(0.01 * 0.9**iteration))  # a graph has it in float32
            torch.manual_seed(iteration)
            batch = {name: x.roll(iteration, -1).to(device) for name, x in batch.items()}
            with devices.autocast(amp, device):
                scalars.append(function(nets, optimizers, batch | dict(iteration=iteration), cfg))
                with torch.inference_mode():  # as between the points of the Dice curve
                    nets[0].eval()(batch["x_l"])
            nets[0].train()
        runs.append([x for values in [*(net.state_dict() for net in nets), *scalars] for x in values.values()])
    assert function.calls == 9
    assert all(torch.equal(one, other) for one, *others in zip(*runs, strict=True) for other in others)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_optimizer_from_a_checkpoint_computes_as_its_device_does(optimizer):
    cfg, net = replace(Config(), optimizer=optimizer), VNet(1, 2, filters=2, depth=1)
    saved = reciprocal.make_optimizer(cfg, net).state_dict()
    saved["param_groups"][0] |= dict(fused=True, lr=0.5)  # a run on a GPU
    restored = reciprocal.make_optimizer(cfg, net)
    restore(restored, saved)
    assert restored.param_groups[0]["lr"] == 0.5 and not restored.param_groups[0]["fused"]
    own = reciprocal.make_optimizer(cfg, net).defaults
    assert (own.get("momentum"), own["weight_decay"]) == ((0.9, 1e-4) if optimizer == "sgd" else (None, 0))


def test_lower_bound_takes_as_many_iterations_as_the_whole_reciprocal_run():
    for preset, total in (("paper", 70), ("strong", 110)):
        cfg = replace(Config(), **reciprocal.PRESETS[preset], iterations=30, pretrain=40)
        assert sum(stage.iterations for stage in stages(cfg)) == total
        *pretrain, main = stages(replace(cfg, batch_l=1, batch_u=3))
        assert all(stage.patches == dict(l=4) for stage in pretrain)
        assert main.patches == dict(l=1, u=3) | (dict(s=1) if preset == "strong" else {})
        (stage,) = stages(replace(cfg, method="supervised"))
        assert stage.iterations == total


# ---- inference


class Position(nn.Module):
    """Logits that depend on the voxel's place in the window, so that every overlap matters."""

    def forward(self, x):
        ramp = torch.linspace(-2, 2, x[0, 0].numel()).view(x.shape[2:])
        return torch.stack([x[:, 0] * ramp, x[:, 0] - ramp], 1)


def test_stride_larger_than_the_patch_leaves_no_gap():
    image = torch.randn(1, 20, 8, 8)
    far, near = (segment(Position(), image, (8, 8, 8), (step,) * 3) for step in (16, 8))
    assert torch.equal(far, near) and far.isfinite().all()


@pytest.mark.parametrize("shape", [(8, 8, 8), (13, 9, 17), (5, 20, 8), (3, 4, 5)])
@pytest.mark.parametrize("windows", [1, 3])
def test_sliding_window_equals_a_plain_loop(shape, windows):
    patch, stride = (8, 8, 8), (3, 4, 5)
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    low = [max(p - s, 0) // 2 for s, p in zip(shape, patch, strict=True)]
    high = [max(p - s, 0) - a for s, p, a in zip(shape, patch, low, strict=True)]
    padded = np.pad(image[0].numpy(), list(zip(low, high, strict=True)))
    score, count = np.zeros((2, *padded.shape)), np.zeros(padded.shape)
    steps = [int(np.ceil((size - p) / s)) + 1 for size, p, s in zip(padded.shape, patch, stride, strict=True)]
    for index in itertools.product(*map(range, steps)):
        at = [min(s * i, size - p) for i, s, size, p in zip(index, stride, padded.shape, patch, strict=True)]
        box = tuple(slice(a, a + p) for a, p in zip(at, patch, strict=True))
        score[(slice(None), *box)] += Position()(torch.tensor(padded[box])[None, None]).softmax(1)[0].numpy()
        count[box] += 1
    inner = tuple(slice(a, a + s) for a, s in zip(low, shape, strict=True))
    expected = (score / count)[(slice(None), *inner)]
    torch.testing.assert_close(segment(Position(), image, patch, stride, windows).double(), torch.tensor(expected),
                               rtol=1e-5, atol=1e-6)


def test_out_of_memory_sums_on_the_host(monkeypatch):
    image, wanted = torch.randn(1, 9, 9, 9), []
    expected = segment(Position(), image, (8, 8, 8), (4, 4, 4))

    class Full(Position):
        def forward(self, x):
            wanted.append(1)
            if len(wanted) == 1:
                raise torch.OutOfMemoryError("full")
            return super().forward(x)

    torch.testing.assert_close(segment(Full(), image, (8, 8, 8), (4, 4, 4), keep_on="meta"), expected)
    wanted.clear()
    finer = segment(Full(), image, (8, 8, 8), (4, 4, 4), shape=(18, 9, 9), keep_on="meta")
    torch.testing.assert_close(finer, data.resize(expected, (18, 9, 9)))
    wanted.clear()
    with pytest.raises(torch.OutOfMemoryError):  # on the host itself there is nowhere to fall back to
        segment(Full(), image, (8, 8, 8), (4, 4, 4))


def test_what_did_not_fit_is_gone_before_the_host_sums(monkeypatch):
    """The upsampling of the probabilities runs out of memory: nothing of the first attempt is left in the second."""
    image, resize, alive = torch.randn(1, 9, 9, 9), data.resize, []
    expected = resize(segment(Position(), image, (8, 8, 8), (4, 4, 4)), (18, 9, 9))

    def full(volume, shape):
        if volume.device.type == "meta":
            alive.append(weakref.ref(volume.untyped_storage()))
            raise torch.OutOfMemoryError("full")
        alive.append(alive[0]())
        return resize(volume, shape)

    monkeypatch.setattr(data, "resize", full)
    found = segment(Position(), image, (8, 8, 8), (4, 4, 4), shape=(18, 9, 9), keep_on="meta")
    torch.testing.assert_close(found, expected)
    assert len(alive) == 2 and alive[1] is None


def test_largest_component_keeps_one_part_a_class(monkeypatch):
    label = torch.zeros(1, 12, 6, 6)
    label[0, 0:2, 0:2], label[0, 4:8, 2:5], label[0, 10:12] = 1, 1, 2
    label[0, 8, 5] = 1  # touches the kept part by an edge: another part
    probs, asked = F.one_hot(label[0].long(), 3).movedim(-1, 0).float(), []
    monkeypatch.setattr(reciprocal, "segment", lambda *given: asked.append(given) or probs)
    case = data.Case("a", label, None, None, (1.0, 1.0, 1.0), np.eye(4))
    cfg = replace(Config(), largest_component=True, stride=(3, 4, 5), windows=7)
    kept = reciprocal.predict_label(nn.Identity(), case, cfg)
    assert asked[0][2:5] == (cfg.patch, (3, 4, 5), 7) and (kept[8] == 0).all()
    assert set(kept[0:2].unique().tolist()) == {0} and (kept[4:8, 2:5] == 1).all() and (kept[10:12] == 2).all()


def test_a_prediction_at_another_voxel_size_lies_on_the_scans_own_grid():
    class Slope(nn.Module):
        def forward(self, x):  # probabilities that are linear in x, which keeps the border where it is
            seen.append(x.shape)
            return torch.cat([0.5 - x / 64, 0.5 + x / 64], 1).log()

    seen = []
    image = (torch.arange(24.0) - 8.5).view(1, 24, 1, 1).expand(1, 24, 10, 9)  # no voxel lies on the border
    case = data.Case("a", image, None, None, (1.0, 2.0, 0.5), np.eye(4))
    for voxel, shape in (((0, 0, 0), (24, 10, 9)), ((3, 0, 0), (8, 10, 9)), ((4, 4, 1), (6, 5, 4)),
                         ((0.4, 3.3, 0.7), (60, 6, 6))):
        cfg = replace(Config(), voxel=voxel, patch=shape, amp="bf16")  # as large as the scan in such voxels
        assert torch.equal(reciprocal.predict_label(Slope(), case, cfg), (image[0] > 0).to(torch.uint8))
        assert seen == [(1, 1, *shape)] and not seen.clear()


# ---- the program


AFFINE = np.array([[0, -0.8, 0, 5], [0.7, 0, 0, -7], [0, 0, 1.5, 1], [0, 0, 0, 1]])  # axes exchanged, an origin


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An nnU-Net folder: six labeled cases, two without a label, two test images, one of them labeled."""
    root = tmp_path_factory.mktemp("own")
    rng, affine = np.random.default_rng(0), AFFINE
    labels = {"background": 0, "liver": 1, "tumor": 2}
    (root / "dataset.json").write_text(json.dumps(dict(channel_names={"0": "MR"}, labels=labels, numTraining=6)))
    for sub in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (root / sub).mkdir()
    for i in range(10):
        label = np.zeros((18, 17, 15), np.uint8)
        label[4:12, 4:12, 3:10], label[6:9, 6:9, 5:8] = 1, 2
        image = (100 * label + 20 * rng.standard_normal(label.shape)).astype(np.float32)
        where = "Tr" if i < 8 else "Ts"
        nib.save(nib.Nifti1Image(image, affine), root / f"images{where}" / f"case{i}_0000.nii.gz")
        if i < 6 or i == 8:
            nib.save(nib.Nifti1Image(label, affine), root / f"labels{where}" / f"case{i}.nii.gz")
    return root


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "mine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.dice, "INTERPRETED", False)
        assert cli("--data", folder, "--labeled", 2, "--out", run, *TINY) == 0
    return run


def test_a_run_leaves_what_it_promises(finished, capsys):
    for name in ("config.json", "cases.json", "environment.json", "log.jsonl", "curves.png", "checkpoint.pt",
                 "student.pt", "metrics.csv", "summary.json", "overlay.png"):
        assert (finished / name).stat().st_size > 0, name
    cases = json.loads((finished / "cases.json").read_text())
    assert [len(cases[name]) for name in ("labeled", "unlabeled", "test")] == [2, 5, 3]  # one labeled case held out
    prediction = nib.load(finished / "predictions" / "case9.nii.gz")
    assert prediction.get_data_dtype() == np.uint8 and prediction.shape == (18, 17, 15)
    assert np.allclose(prediction.affine, AFFINE)
    scores = json.loads((finished / "summary.json").read_text())["scores"]
    sets = {(row["set"], row["network"]): row["cases"] for row in scores}
    assert sets == {(s, n): c for s, c in (("test", 2), ("transductive", 3)) for n in ("student", "teacher")}
    small, whole = (record.load_checkpoint(finished / name)["nets"] for name in ("student.pt", "checkpoint.pt"))
    torch.testing.assert_close(small, {"student": whole["student"]}, rtol=0, atol=0)
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert sum("feedback" in line for line in log) == 4  # every iteration


def test_lower_bound_beside_the_run_joins_its_table(folder, finished, capsys):
    lower = finished.parent / "lower"
    assert cli("--data", folder, "--labeled", 2, "--method", "supervised", "--out", lower, *TINY) == 0
    summary = json.loads((lower / "summary.json").read_text())
    for name, change in (("coarse", {"voxel": [2, 2, 2]}), ("before", {"voxel": None})):  # which once there was not
        config = {key: value for key, value in (summary["config"] | change).items() if value is not None}
        (finished.parent / name).mkdir()
        (finished.parent / name / "summary.json").write_text(json.dumps(summary | dict(config=config)))
    other = dict(data="x", seed=9, spacing="mm", stride=[4] * 3, patch=[8] * 3, largest_component=True, method="mt")
    found = {key: summary | dict(config=summary["config"] | {key: value}) for key, value in other.items()}
    found |= dict(cases=summary | dict(cases={}), iterations=summary | dict(iterations=9), none=[])
    for name, content in found.items():
        (finished.parent / name).mkdir()
        (finished.parent / name / "summary.json").write_text(json.dumps(content))
    assert cli("--resume", finished) == 0
    told = capsys.readouterr().out
    assert {*re.findall(r"lower bound \((.*?)\)", told)} == {"lower", "before"}


def test_the_overlay_is_of_the_worst_the_median_and_the_best(tmp_path):
    cases = [data.Case(name, None, None, torch.zeros(2, 2, 2), (1.0,) * 3, np.eye(4)) for name in "abcd"]
    rows = [dict(case=name, network=network, dice=dice / 10) for network, values in
            (("student", (5, 9, 1, 7)), ("teacher", (1, 2, 3, 4))) for name, dice in zip("abcd", values, strict=True)]
    (tmp_path / "predictions").mkdir()
    for i, case in enumerate(cases):
        reciprocal.write_label(tmp_path / "predictions" / f"{case.name}.nii.gz", np.full((2, 2, 2), i), np.eye(4))
    shown = record.panels(data.Dataset([], [], cases, ["0", "1"], 1), rows, tmp_path)
    found = [(dice, case.name, label.max()) for _, dice, case, label in shown]
    assert found == [(0.1, "c", 2), (0.7, "d", 3), (0.9, "b", 1)]


def test_a_longer_stage_has_a_longer_step_schedule():
    cfg = replace(Config(), schedule="step", lr=0.1, lr_step=10, iterations=20)
    assert [reciprocal.learning_rate(cfg, i, 20) for i in (0, 9, 10, 19)] == pytest.approx([0.1, 0.1, 0.01, 0.01])
    assert [reciprocal.learning_rate(cfg, i, 15) for i in (9, 14)] == pytest.approx([0.1, 0.01])  # pre-training
    mt = replace(cfg, method="mt")
    assert [reciprocal.learning_rate(mt, i, 60) for i in (0, 29, 30, 59)] == pytest.approx([0.1, 0.1, 0.01, 0.01])
    assert reciprocal.learning_rate(replace(cfg, iterations=0), 25, 30) == pytest.approx(0.001)  # pre-training
    assert reciprocal.learning_rate(replace(mt, iterations=0), 25, 30) == pytest.approx(0.001)  # as many
    poly = [reciprocal.learning_rate(replace(cfg, schedule="poly"), i, 60) for i in (0, 30)]
    assert poly == pytest.approx([0.1, 0.1 * 0.5**0.9])


@pytest.mark.parametrize("method", ["reciprocal", "sassnet"])
def test_the_loop_gives_a_step_its_learning_rates_and_patches(method, folder, tmp_path, monkeypatch):
    """The schedule's rate for each V-Net, a method's own network keeping its own; exam and lesson on other cases; each
    stage on patches of its own."""
    seen, seeds = [], []

    def spy(step):
        def spied(nets, optimizers, batch, cfg):
            seen.append(([optimizer.param_groups[0]["lr"] for optimizer in optimizers], batch))
            seeds.append(torch.initial_seed())
            return step(nets, optimizers, batch, cfg)
        return spied

    monkeypatch.setattr(reciprocal, "test", lambda *_: [])
    monkeypatch.setattr(record, "conclude", lambda *_: None)
    for name in ("reciprocal_step", "supervised_step"):
        monkeypatch.setattr(reciprocal, name, spy(getattr(reciprocal, name)))
    sassnet = COMPARISONS["sassnet"]
    monkeypatch.setitem(COMPARISONS, "sassnet", replace(sassnet, step=spy(sassnet.step)))
    flags = ["--method", method, "--lr", 0.3, "--schedule", "poly", "--eval-cases", 0]
    assert cli("--data", folder, "--labeled", 5, "--holdout", 0, "--out", tmp_path / "run", *TINY, *flags) == 0
    assert len({*seeds}) == len(seen) == 8
    if method == "sassnet":
        assert [rates for rates, _ in seen] == [[pytest.approx(0.3 * (1 - i / 8) ** 0.9), 1e-4] for i in range(8)]
        return
    (_, teacher), _, (_, student), _, *steps = seen
    assert len(steps) == 4
    assert not torch.equal(teacher["x_l"], student["x_l"])
    for i, (rates, batch) in enumerate(steps):
        assert rates == [pytest.approx(0.3 * (1 - i / 4) ** 0.9)] * 2
        assert not torch.equal(batch["x_l"], batch["x_s"])
        u, exam_case, lesson_case = batch["cases"]
        assert exam_case != lesson_case


def test_a_mixed_lesson_pairs_the_patches_and_keeps_their_layout(folder, tmp_path, monkeypatch):
    """As many labeled patches as unlabeled ones, whatever --batch-l; images in channels_last, the strides of a single
    channel too; labels of one byte."""
    seen, exchange = [], reciprocal.exchange_boxes

    def watched(*patches):
        mixed = exchange(*patches)
        seen.extend((x.shape, x.stride(), x.dtype) for x in (*patches, *mixed))
        return mixed

    monkeypatch.setattr(reciprocal, "exchange_boxes", watched)
    assert cli("--data", folder, "--labeled", 5, "--holdout", 0, "--out", tmp_path / "run", *TINY, "--batch-u", 2,
               "--lesson", "mixed", "--eval-cases", 0) == 0
    images, labels = seen[::2], seen[1::2]
    assert len(images) == 4 * 4 and set(images) == {((2, 1, 16, 16, 16), (4096, 1, 256, 16, 1), torch.float32)}
    assert set(labels) == {((2, 16, 16, 16), (4096, 256, 16, 1), torch.uint8)}


def test_resumed_run_equals_a_straight_one(folder, tmp_path, monkeypatch):
    assert cli("--data", folder, "--labeled", 2, "--out", tmp_path / "straight", *TINY) == 0
    step, calls = reciprocal.reciprocal_step, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(reciprocal, "reciprocal_step", killed)
    assert cli("--data", folder, "--labeled", 2, "--out", tmp_path / "broken", *TINY) == 130
    monkeypatch.undo()
    monkeypatch.setattr(kernels.dice, "INTERPRETED", False)
    assert cli("--resume", tmp_path / "broken") == 0
    one, other = (record.load_checkpoint(tmp_path / name) for name in ("straight", "broken"))
    for name, net in one["nets"].items():
        assert all(torch.equal(value, other["nets"][name][key]) for key, value in net.items())
    assert (tmp_path / "straight/log.jsonl").read_text() == (tmp_path / "broken/log.jsonl").read_text()


def test_predict_goes_on_after_a_bad_file(folder, finished, tmp_path, capsys):
    images = tmp_path / "scans"
    images.mkdir()
    for i in (0, 9):
        (images / f"case{i}_0000.nii.gz").write_bytes(next((folder).glob(f"images*/case{i}_*")).read_bytes())
    (images / "case1_0000.nii.gz").write_bytes(b"<html>")
    assert cli("predict", "-i", images, "-o", tmp_path / "masks", "--checkpoint", finished) == 2
    error = capsys.readouterr().err
    assert "case1_0000.nii.gz" in error and error.count("\n") == 1
    assert sorted(p.name for p in (tmp_path / "masks").iterdir()) == ["case0.nii.gz", "case9.nii.gz"]
    mask = nib.load(tmp_path / "masks/case9.nii.gz")
    assert np.array_equal(mask.get_fdata(), nib.load(finished / "predictions/case9.nii.gz").get_fdata())
    assert cli("predict", "-i", images / "case0_0000.nii.gz", "-o", tmp_path / "one", "--network", "teacher",
               "--checkpoint", finished / "checkpoint.pt") == 0
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["case0.nii.gz"]


def test_a_step_takes_patches_of_the_voxel_size(folder):
    dataset, voxel = data.load(str(folder), "", 2, 0.2, "zscore", (0, 1)), (1.4, 1.6, 3.0)
    cfg = replace(Config(), method="mt", voxel=voxel, patch=(8, 8, 4), batch_l=2, batch_u=2, noise=0.1)
    batch = reciprocal.make_batch(cfg, dataset, 0, reciprocal.stages(cfg)[0], 5, "cpu")
    for name, cases, stream in (("x_l", dataset.labeled, 0), ("x_u", dataset.unlabeled, 1)):
        image, _ = data.draw(cases, 2, cfg.patch, seed=cfg.seed, stream=stream, iteration=5, augment=cfg.augment,
                             voxel=voxel, noise=0.1)
        assert torch.equal(batch[name], image)


def test_a_point_of_the_curve_leaves_the_networks_as_they_were(folder, monkeypatch):
    """Test cases leave no trace in the running statistics."""
    dataset, net = data.load(str(folder), "", 2, 0.2, "zscore", (0, 1)), VNet(1, 3, filters=2, depth=1).train()
    before, predict_label, asked = copy.deepcopy(net.state_dict()), reciprocal.predict_label, []
    monkeypatch.setattr(reciprocal, "predict_label",
                        lambda net, case, cfg: asked.append(case.name) or predict_label(net, case, cfg))
    reciprocal.curve_point(replace(Config(), patch=(8, 8, 8)), dataset, {"student": net})
    assert asked == [case.name for case in dataset.scored("test")] and net.training
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("unit, spacing", [("voxels", None), ("mm", (0.7, 0.8, 1.5))])
def test_scores_are_of_the_students_prediction_against_the_label(unit, spacing, folder, tmp_path, monkeypatch):
    """ASD is of one direction; test cases have the stride asked for, transductive ones windows side by side."""
    dataset, strides = data.load(str(folder), "", 2, 0.2, "zscore", (0, 1)), []
    nets, cfg = {name: VNet(1, 3, 2, 1) for name in NETWORKS}, replace(Config(), spacing=unit, stride=(3, 4, 5))
    prediction = torch.zeros(18, 17, 15, dtype=torch.uint8)
    prediction[2:9, 3, 4], prediction[6, 6, 6] = 1, 2

    def predict_label(net, case, cfg):
        strides.append(cfg.stride)
        return prediction if net is nets["student"] else 1 - prediction.clamp(max=1)

    monkeypatch.setattr(reciprocal, "predict_label", predict_label)
    rows = reciprocal.test(cfg, dataset, nets, tmp_path)
    truth = {case.name: case.label for case in dataset.test + dataset.unlabeled}
    written = nib.load(tmp_path / f"predictions/{dataset.scored('test')[0].name}.nii.gz")
    assert np.array_equal(written.get_fdata(), prediction)
    for row in (row for row in rows if row["network"] == "student"):
        value = dict(liver=1, tumor=2)[row["class"]]
        assert row["asd"] == pytest.approx(metrics.asd(prediction == value, truth[row["case"]] == value, spacing))
    assert {*strides[:2]} == {(3, 4, 5)} and {*strides[-2:]} == {cfg.patch}


def test_networks_start_apart_and_from_what_is_given(folder, finished):
    dataset = data.load(str(folder), "", 2, 0.2, "zscore", (0, 1))

    def heads(**changes):
        cfg = replace(Config(), filters=2, depth=2, **changes)
        nets = reciprocal.networks(cfg, dataset, torch.device("cpu"), None)
        return [nets[name].head.weight for name in NETWORKS]

    given, (student, teacher) = record.load_checkpoint(finished)["nets"]["student"]["head.weight"], heads()
    assert not torch.equal(student, teacher) and torch.equal(student, heads(method="mt")[0])
    assert [torch.equal(head, given) for head in heads(student_from=str(finished))] == [True, False]
    assert [torch.equal(head, given) for head in heads(teacher_from=str(finished))] == [False, True]


@pytest.mark.parametrize("network", NETWORKS)
def test_predict_takes_the_network_and_the_normalization_of_the_run(network, folder, tmp_path, monkeypatch):
    run, seen = tmp_path / "run", []
    assert cli("--data", folder, "--labeled", 2, "--normalize", "window", "--out", run, *TINY) == 0
    expected = data.load(str(folder), "", 2, 0.2, "window", Config().window)
    monkeypatch.setattr(reciprocal, "predict_label", lambda net, case, cfg: seen.append((net, case)) or
                        torch.zeros(18, 17, 15, dtype=torch.uint8))
    assert cli("predict", "-i", folder / "imagesTs/case9_0000.nii.gz", "-o", tmp_path / "m", "--checkpoint", run,
               "--network", network) == 0
    ((net, case),) = seen
    assert torch.equal(case.volume(), next(c for c in expected.test if c.name == "case9").volume())
    torch.testing.assert_close(dict(net.state_dict()), dict(record.load_checkpoint(run)["nets"][network]))


@pytest.mark.parametrize("flags, graphed", [((), 3), (("--feedback", "shuffled"), 2), (("--method", "mt"), 0),
                                            (("--method", "supervised"), 1)])
def test_graphs_are_for_steps_that_are_always_the_same(flags, graphed, folder, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(devices, "graphed", lambda step, device: steps.append(step) or step)
    monkeypatch.setattr(reciprocal, "test", lambda *_: [])
    monkeypatch.setattr(record, "conclude", lambda *_: None)
    assert cli("--data", folder, "--labeled", 2, "--out", tmp_path / "run", *TINY, *flags) == 0
    assert len(steps) == graphed


def test_a_run_at_another_voxel_size(folder, tmp_path, monkeypatch):
    run, voxel, read, asked = tmp_path / "run", ("--voxel", 1.4, 1.6, 1.5), data.read_case, []
    monkeypatch.setattr(data, "read_case", lambda *arguments: (asked.append(arguments[4:]), read(*arguments))[1])
    assert cli("--data", folder, "--labeled", 2, "--out", run, *TINY, *voxel, "--patch", 8, 8, 16, "--normalize",
               "window", "--window", -50, 250) == 0
    prediction = nib.load(run / "predictions/case9.nii.gz")
    assert prediction.shape == (18, 17, 15) and np.allclose(prediction.affine, AFFINE)
    scan = folder / "imagesTs/case9_0000.nii.gz"
    assert cli("predict", "-i", scan, "-o", tmp_path / "masks", "--checkpoint", run / "student.pt") == 0
    assert np.array_equal(nib.load(tmp_path / "masks/case9.nii.gz").get_fdata(), prediction.get_fdata())
    assert np.array_equal(nib.load(tmp_path / "masks/case9.nii.gz").affine, prediction.affine)
    assert len(asked) == 10 + 1 and {*asked} == {("window", (-50, 250))}  # in training and in prediction
    assert cli("--resume", run, *voxel) == 2  # it is not among what may change


def test_predict_does_not_overwrite_its_input(folder, finished, tmp_path, capsys):
    scan = tmp_path / "case0.nii.gz"
    scan.write_bytes((folder / "imagesTr" / "case0_0000.nii.gz").read_bytes())
    before = scan.read_bytes()
    assert cli("predict", "-i", scan, "-o", tmp_path, "--checkpoint", finished) == 2
    assert "overwrite" in capsys.readouterr().err and scan.read_bytes() == before


def test_resume_refuses_another_split(folder, finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    cases = json.loads((run / "cases.json").read_text())
    (run / "cases.json").write_text(json.dumps(cases | dict(labeled=cases["labeled"][::-1])))
    assert cli("--resume", run) == 2 and "cases.json" in capsys.readouterr().err


def test_nothing_to_score_still_ends_in_a_report(folder, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(folder, root, ignore=shutil.ignore_patterns("imagesTs", "labelsTs"))
    assert cli("--data", root, "--labeled", 1.0, "--holdout", 0, "--out", tmp_path / "run", *TINY) == 0
    assert "predictions only" in capsys.readouterr().out


def test_given_checkpoints_replace_pretraining(folder, finished, tmp_path):
    run = tmp_path / "run"
    assert cli("--data", folder, "--labeled", 2, "--out", run, "--teacher-from", finished,
               "--student-from", finished / "student.pt", *TINY) == 0
    assert {json.loads(line)["stage"] for line in (run / "log.jsonl").read_text().splitlines()} == {"reciprocal"}


def test_flipped_byte_is_seen(finished, tmp_path):
    content = bytearray((finished / "student.pt").read_bytes())
    assert torch.load(finished / "student.pt", weights_only=True)["classes"] == ["background", "liver", "tumor"]
    for position in (10, len(content) // 2, len(content) - 70, len(content) - 1):
        bad = content.copy()
        bad[position] ^= 1
        (tmp_path / "bad.pt").write_bytes(bad)
        with pytest.raises(BadInput, match="bad.pt"):
            record.load_checkpoint(tmp_path / "bad.pt")


def test_losses_that_are_not_finite_stop_the_run(folder, tmp_path, capsys):
    assert cli("--data", folder, "--labeled", 2, "--out", tmp_path / "run", *TINY, "--lr", 1e30) == 2
    assert re.search(r"iteration \d+: loss_l is not finite", capsys.readouterr().err)


@pytest.mark.parametrize("arguments,message", [
    ("--data la", "phantom"),
    ("--data pancreas", "Pancreas-CT"),
    ("--data breast", "private"),
    ("--data hippocampus", "medicaldecathlon.com"),
    ("--data no/such/folder", "no/such/folder"),
    ("--patch 20 32 32", "--patch 20 32 32"),
    ("--method sassnet --depth 1 --patch 16 8 16", "at least 16"),
    ("--depth 4 --patch 16 16 16 --batch-l 1", "a single voxel at depth 4, a batch of 1"),
    ("--depth 4 --patch 16 16 16 --batch-u 1 --method mt", "a single voxel at depth 4, a batch of 1"),
    ("--cutmix --batch-l 1", "has no other to exchange with"),
    ("--depth 4 --patch 16 16 16 --batch-l 1 --batch-u 1 --method bcp", "a single voxel at depth 4, a batch of 1"),
    ("--voxel 1 1 -1", "--voxel"),
    ("--voxel 1 nan 1", "--voxel"),
    ("--voxel 0 0 1e-30", "--voxel"),
    ("--labeled 0.001", "--labeled"),
    ("--labeled 1.0 --iterations 1", "supervised"),
    ("--unknown 1", "--unknown"),
    ("--device tpu", "tpu"),
    ("--resume nowhere", "nowhere"),
    ("--method magic", "magic"),
    ("--teacher-from nowhere.pt", "nowhere.pt"),
    ("predict -i x -o y --checkpoint nowhere", "nowhere"),
])
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli(*arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_a_single_voxel_in_a_batch_of_two_is_no_bad_input():
    for method in ("tcsm", "supervised"):  # they see labeled and unlabeled patches, or labeled ones, in one batch
        cfg = replace(Config(), method=method, patch=(16, 16, 16), batch_l=1, batch_u=1).check()
        net, x = VNet(1, 2, filters=2, depth=cfg.depth), torch.randn(cfg.batch_l + cfg.batch_u, 1, *cfg.patch)
        assert net(x).isfinite().all()


def test_output_folder_in_use_is_left_alone(finished, folder, capsys):
    before = (finished / "checkpoint.pt").read_bytes()
    assert cli("--data", folder, "--out", finished, *TINY) == 2
    assert "--resume" in capsys.readouterr().err and (finished / "checkpoint.pt").read_bytes() == before


def test_checkpoint_of_another_network_is_refused(folder, finished, tmp_path, capsys):
    assert cli("--data", folder, "--out", tmp_path / "run", "--teacher-from", finished, *TINY, "--filters", 4) == 2
    assert "another network" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*data.SOURCES, "phantom"])
def test_every_recipe_starts(name, folder, tmp_path):
    """The recipe's own settings on a folder of the right kind; only the sizes are cut for time."""
    root = folder
    if name == "la":
        import h5py

        root = tmp_path / "la"
        cases = [f"CASE{i}" for i in range(7)]
        for case in cases:
            path = root / "2018LA_Seg_Training Set" / case / "mri_norm2.h5"
            path.parent.mkdir(parents=True)
            image = np.random.default_rng(cases.index(case)).standard_normal((18, 17, 20)).astype(np.float32)
            with h5py.File(path, "w") as file:
                file["image"] = image
                if case != cases[-1]:
                    file["label"] = (image > 1).astype(np.uint8)
        (root / "train.list").write_text("\n".join(cases[:5]))
        (root / "test.list").write_text("\n".join(cases[5:]))
    run = tmp_path / "run"
    assert cli("--data", name, "--root", root, "--labeled", 0.4, "--out", run, *TINY) == 0
    saved = json.loads((run / "config.json").read_text())
    assert saved["optimizer"] == data.RECIPES[name]["optimizer"] and saved["noise"] == data.RECIPES[name]["noise"]


@pytest.mark.parametrize("folder", [".", "results"])
def test_readme_commands_are_understood(folder):
    """Every command line a README shows parses, so it is at least a command that exists."""
    readme = (Path(__file__).parent.parent / folder / "README.md").read_text().replace("\\\n", "")
    lines = re.findall(r"^(?:    )?(?:python reciprocal\.py|\./train\.sh(?! test| compare)) ?([^#\n]*)", readme, re.M)
    assert len(lines) >= 3
    for line in lines:
        arguments = shlex.split(line)
        if arguments[:1] != ["predict"]:
            reciprocal.train_parser().parse_args(arguments)


def test_readme_line_counts_are_true():
    root = Path(__file__).parent.parent
    rows = re.findall(r"^\| ([\w/., ]+\.py) \| ([\d+ ]+) \|", (root / "README.md").read_text(), re.M)
    counts = {name: n for names, ns in rows for name, n in zip(names.split(", "), ns.split(" + "), strict=True)}
    assert set(counts) >= {path.name for path in root.glob("*.py")}
    for name, count in counts.items():
        assert len((root / name).read_text().splitlines()) == int(count), name
