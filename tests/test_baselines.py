"""What makes each comparison method itself, and that all of them are trained alike."""

import copy
import itertools
import json
import math
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import baselines
import data
import kernels.dice
import reciprocal
from baselines import COMPARISONS
from cli import cli
from files import write_label
from reciprocal import Config

AVERAGED = ("mt", "uamt", "tcsm")


@pytest.fixture(autouse=True)
def loss_without_interpreter(monkeypatch):
    """These tests are about the steps; Triton's interpreter would only make their loss slow."""
    monkeypatch.setattr(kernels.dice, "INTERPRETED", False)


def players(method: str, iteration=5, iterations=100, **config):
    """Networks, optimizers, batch and Config of a step on random patches, always the same."""
    torch.manual_seed(0)
    cfg = replace(Config(), method=method, filters=2, depth=1, dropout=False, patch=(16, 16, 16), **config)
    nets = [reciprocal.build(cfg, name, 1, 3).train() for name in COMPARISONS[method].nets]
    optimizers = [reciprocal.make_optimizer(cfg, net) for net in nets]
    batch = dict(iteration=iteration, iterations=iterations)
    batch |= {name: torch.randn(2, 1, *cfg.patch) for name in ("x_l", "x_u")}
    return nets, optimizers, batch | dict(y_l=torch.randint(3, (2, *cfg.patch), dtype=torch.uint8)), cfg


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


class Answers(nn.Module):
    """A network that answers the given logits in turn, the last one for ever, and counts the questions."""

    def __init__(self, *logits: torch.Tensor):
        super().__init__()
        self.logits, self.asked = logits, []
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        self.asked.append(x)
        return self.logits[min(len(self.asked), len(self.logits)) - 1] + 0 * self.weight


def consistency_of(step, monkeypatch, batch, probs, x, teacher):
    """The scalar that a method hands to the frame of the averaged ones."""
    monkeypatch.setattr(baselines, "averaged_step", lambda nets, o, b, c, consistency: consistency(probs, x, teacher))
    return step([None, teacher], [], batch, None)


# ---- the averaged teacher


@pytest.mark.parametrize("method", AVERAGED)
@pytest.mark.parametrize("iteration,decay", [(0, 0.0), (1, 0.5), (3, 0.75), (500, 0.99)])
def test_teacher_is_the_average_of_the_student(method, iteration, decay):
    nets, optimizers, batch, cfg = players(method, iteration, 1000)
    before = weights(nets[1])
    COMPARISONS[method].step(nets, optimizers, batch, cfg)
    for old, new, student in zip(before, weights(nets[1]), weights(nets[0]), strict=True):
        torch.testing.assert_close(new, decay * old + (1 - decay) * student)
    assert not any(p.grad is not None for p in nets[1].parameters())


def test_ramp_is_that_of_the_literature():
    """Its weight, of 6000 iterations: 0.1 exp(-5 (1 - min(e, 40) / 40)^2) with e = iteration // 150."""
    for iteration in (0, 149, 150, 3000, 5999):
        expected = math.exp(-5 * (1 - min(iteration // 150, 40) / 40) ** 2)
        assert baselines.ramp(dict(iteration=iteration, iterations=6000), stairs=40) == pytest.approx(expected)
    assert baselines.ramp(dict(iteration=300, iterations=400)) == pytest.approx(math.exp(-5 / 16))


def test_a_random_box_lies_anywhere_in_the_patch_and_has_two_thirds_of_each_side():
    boxes, sides = baselines.random_box(torch.empty(2000, 2, 12, 8, 7)), {12: 8, 8: 5, 7: 4}
    spans = [boxes.any(tuple({1, 2, 3} - {axis})) for axis in (1, 2, 3)]  # (2000, n) each
    product = spans[0][:, :, None, None] & spans[1][:, None, :, None] & spans[2][:, None, None]
    assert torch.equal(boxes, product)
    starts = [span.int().argmax(1) for span in spans]
    for (n, side), span, start in zip(sides.items(), spans, starts, strict=True):
        place = torch.arange(n)
        assert torch.equal(span, (place >= start[:, None]) & (place < start[:, None] + side))
        assert set(start.tolist()) == set(range(n - side + 1))
    assert len(set(zip(*(start.tolist() for start in starts), strict=True))) == 5 * 4 * 4  # in any combination


@pytest.mark.parametrize("method", ["supervised", *AVERAGED, "sassnet"])
def test_cutmix_is_a_step_on_labeled_patches_with_boxes_of_each_other(method, monkeypatch):
    found = []
    for cutmix in (True, False):
        nets, optimizers, batch, cfg = players(method, cutmix=cutmix)
        box = torch.zeros(2, 16, 16, 16, dtype=torch.bool)
        box[0, 3:13, :10, 6:], box[1, 6:, 2:12, 1:11] = True, True
        monkeypatch.setattr(baselines, "random_box", lambda x, box=box: box)
        if not cutmix:  # the same by hand
            x, y = batch["x_l"].clone(), batch["y_l"].clone()
            batch["x_l"][box[:, None]], batch["y_l"][box] = x[[1, 0]][box[:, None]], y[[1, 0]][box]
        torch.manual_seed(1)
        found.append((COMPARISONS[method].step(nets, optimizers, batch, cfg), nets[0].state_dict()))
    torch.testing.assert_close(*found)


def test_noise_is_clamped_and_has_its_deviation():
    noise = baselines.noisy(torch.zeros(100_000))
    assert noise.abs().max() == pytest.approx(0.2) and 0.094 < noise.std() < 0.098  # of a normal cut at 2 deviations
    assert abs(noise.mean()) < 2e-3


def test_step_of_the_mean_teacher_written_out(monkeypatch):
    """Supervised loss on the labeled half and 0.1 ramp times the mean square on the other, one SGD step."""
    monkeypatch.setattr(baselines, "noisy", lambda x: x + 0.05)
    nets, optimizers, batch, cfg = players("mt", iteration=60, loss="ce")
    student, teacher = copy.deepcopy(nets)
    scalars = COMPARISONS["mt"].step(nets, optimizers, batch, cfg)
    logits = student(torch.cat([batch["x_l"], batch["x_u"]]))
    target = teacher(batch["x_u"] + 0.05).softmax(1).detach()
    loss_u = ((logits[2:].softmax(1) - target) ** 2).mean()
    loss = kernels.dice.reference(logits[:2], batch["y_l"]) + 0.1 * math.exp(-5 * (1 - 24 / 40) ** 2) * loss_u
    optimizer = reciprocal.make_optimizer(cfg, student)
    loss.backward()
    optimizer.step()
    assert scalars["loss_u"].item() == pytest.approx(loss_u.item(), rel=1e-4)
    for p, q in zip(nets[0].parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_supervised_step_has_the_supervised_loss():
    nets, optimizers, batch, cfg = players("supervised", loss="ce")
    expected = kernels.dice.reference(copy.deepcopy(nets[0])(batch["x_l"]), batch["y_l"])
    found = COMPARISONS["supervised"].step(nets, optimizers, batch, cfg)
    torch.testing.assert_close(found["loss_l"], expected.detach())


@pytest.mark.parametrize("method", ["uamt", "tcsm"])
def test_each_pass_of_the_teacher_has_noise_of_its_own(method):
    nets, optimizers, batch, cfg = players(method)
    seen = []
    nets[1].register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten().sort()[0]))
    COMPARISONS[method].step(nets, optimizers, batch, cfg)
    clean = (batch["x_u"] if method == "uamt" else torch.cat([batch["x_l"], batch["x_u"]])).flatten().sort()[0]
    assert len({tuple(x.tolist()) for x in [clean, *seen]}) == 1 + len(seen) == dict(uamt=1 + 9, tcsm=1 + 1)[method]


def test_mean_teacher_sees_noise_and_the_student_does_not():
    nets, optimizers, batch, cfg = players("mt")
    seen = []
    for net in nets:
        net.register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
    COMPARISONS["mt"].step(nets, optimizers, batch, cfg)
    assert torch.equal(seen[0], torch.cat([batch["x_l"], batch["x_u"]]))
    assert len(seen) == 2 and 0 < (seen[1] - batch["x_u"]).abs().max() <= 0.2 + 1e-6


# ---- UA-MT


@pytest.mark.parametrize("iteration", [0, 50, 99])
def test_uncertain_voxels_have_no_say(monkeypatch, iteration):
    """Two voxels, two classes: the mean of 8 passes decides who is certain, the first pass is the target."""
    batch = dict(iteration=iteration, iterations=100, x_u=torch.zeros(1, 1, 1, 1, 2))
    threshold = (0.75 + 0.25 * math.exp(-5 * (1 - iteration / 100) ** 2)) * math.log(2)

    def entropy(p):
        return -(p * math.log(p) + (1 - p) * math.log(1 - p))

    grid = np.linspace(0.5, 0.999, 2000)
    limit = grid[np.array([entropy(p) for p in grid]) < threshold].min()  # the least certain that is certain enough
    for shift, certain in ((+0.003, True), (-0.003, False)):
        p = torch.tensor([[0.99, limit + shift]])  # (1, 2): of class 0, in both voxels
        logits = torch.stack([p, 1 - p], 1)[:, :, None, None].log()
        target = torch.tensor([[0.2, 0.3]])
        teacher = Answers(torch.stack([target, 1 - target], 1)[:, :, None, None].log(), logits)
        probs = torch.full((2, 2, 1, 1, 2), 0.5)  # a labeled patch first
        loss = consistency_of(baselines.uamt_step, monkeypatch, batch, probs, None, teacher)
        squares = [2 * (0.5 - t) ** 2 for t in (0.2, 0.3)]  # both classes
        assert loss.item() == pytest.approx(sum(squares) / 4 if certain else squares[0] / 2, rel=1e-4)
        assert len(teacher.asked) == 9


def test_nobody_certain_is_no_loss(monkeypatch):
    batch = dict(iteration=0, iterations=100, x_u=torch.zeros(1, 1, 1, 1, 2))
    loss = consistency_of(baselines.uamt_step, monkeypatch, batch, torch.rand(2, 3, 1, 1, 2), None,
                          Answers(torch.zeros(1, 3, 1, 1, 2)))
    assert loss == 0
    p = torch.tensor([0.75, 0.2, 0.05])  # its entropy is 0.69: of three classes that is certain
    loss = consistency_of(baselines.uamt_step, monkeypatch, batch, torch.full((2, 3, 1, 1, 2), 1 / 3), None,
                          Answers(p.log().view(1, 3, 1, 1, 1).expand(1, 3, 1, 1, 2)))
    assert loss.item() == pytest.approx(((p - 1 / 3) ** 2).mean().item(), rel=1e-4)


def test_uamt_has_dropout_whatever_the_config_says():
    (student, teacher), *_ = players("uamt")
    (plain, _), *_ = players("mt")
    count = [sum(isinstance(m, nn.Dropout3d) for m in net.modules()) for net in (student, teacher, plain)]
    assert count[0] and count[1] and not count[2]


# ---- TCSM


class Pointwise(nn.Module):
    """Equivariant: a voxel's answer depends on that voxel alone."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 3, 1)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("patch", [(4, 4, 6), (6, 4, 6), (4, 5, 6)])
def test_turning_the_answer_is_answering_what_is_turned(patch):
    torch.manual_seed(0)
    net, x, turned = Pointwise(), torch.randn(40, 1, *patch), 0
    turn = baselines.random_transform(x.shape)
    torch.testing.assert_close(turn(net(x)), net(turn(x)))
    for sample, other in zip(x, turn(x), strict=True):
        assert torch.equal(sample.flatten().sort()[0], other.flatten().sort()[0])
        turned += not torch.equal(sample, other)
    assert turned > 25  # most of them move, each in its own way
    marker = torch.arange(math.prod(patch)).float().view(1, 1, *patch).expand(200, -1, -1, -1, -1)
    kinds = {tuple(sample.flatten().tolist()) for sample in baselines.random_transform(marker.shape)(marker)}
    assert len(kinds) == (16 if len(set(patch)) < 3 else 8)  # all symmetries of the patch: 8 of a brick


def test_transformation_consistency_vanishes_where_the_network_commutes_and_has_a_gradient(monkeypatch):
    monkeypatch.setattr(baselines, "noisy", lambda x: x)
    net, x = Pointwise(), torch.randn(4, 1, 4, 4, 6)
    assert consistency_of(baselines.tcsm_step, monkeypatch, {}, net(x).softmax(1), x, net).item() < 1e-12
    conv = nn.Conv3d(1, 3, 3, padding=1)  # does not commute
    loss = consistency_of(baselines.tcsm_step, monkeypatch, {}, conv(x).softmax(1), x, conv)
    monkeypatch.setattr(baselines, "random_transform", lambda shape: lambda x: x.flip(3))
    target = conv(x.flip(3)).softmax(1)
    expected = ((conv(x).softmax(1).flip(3) - target) ** 2).mean().item()
    found = consistency_of(baselines.tcsm_step, monkeypatch, {}, conv(x).softmax(1), x, conv)
    assert found.item() == pytest.approx(expected)
    loss.backward()
    assert loss > 1e-4 and conv.weight.grad.abs().max() > 0


# ---- BCP


def mix_loss(logits, label, mask):
    """Dice and cross-entropy of the voxels in `mask`, as Bai et al. have them: each half, samples and classes alike."""
    p, t = (x * mask[:, None] for x in (logits.softmax(1), F.one_hot(label.long(), 3).movedim(-1, 1)))
    dice = ((2 * p * t).sum((2, 3, 4)) + 1e-5) / ((p + t).sum((2, 3, 4)) + 1e-5)
    ce = (F.cross_entropy(logits, label.long(), reduction="none") * mask).sum() / mask.sum()
    return (1 - dice.mean() + ce) / 2


@pytest.mark.parametrize("iteration", [0, 23, 24, 99])  # of 204, 24 are pre-training
def test_step_of_bidirectional_copy_paste_written_out(iteration, monkeypatch):
    nets, optimizers, batch, cfg = players("bcp", iteration, 204)
    student, teacher = copy.deepcopy(nets)
    box = torch.zeros(2, 16, 16, 16, dtype=torch.bool)
    box[0, 3:13, :10, 6:], box[1, 6:, 2:12, 1:11] = True, True
    monkeypatch.setattr(baselines, "random_box", lambda x: box)
    scalars = COMPARISONS["bcp"].step(nets, optimizers, batch, cfg)
    x_l, y_l, x_u = batch["x_l"], batch["y_l"], batch["x_u"]
    if iteration < 24:
        x_u, y_u, weight = x_l[[1, 0]], y_l[[1, 0]], 1
    else:
        y_u, weight = teacher(x_u).argmax(1), 0.5
        y_u = torch.stack([baselines.largest_component(label) for label in y_u])
    m = box[:, None].float()
    first, second = student(x_l * (1 - m) + x_u * m), student(x_u * (1 - m) + x_l * m)
    loss_l = mix_loss(first, y_l, ~box) + mix_loss(second, y_l, box)
    loss_u = mix_loss(first, y_u, box) + mix_loss(second, y_u, ~box)
    (loss_l + weight * loss_u).backward()
    reciprocal.make_optimizer(cfg, student).step()
    torch.testing.assert_close(nets[0].state_dict(), student.state_dict(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scalars, dict(loss_l=loss_l.detach(), loss_u=loss_u.detach()))
    if iteration < 24:
        torch.testing.assert_close(nets[1].state_dict(), nets[0].state_dict(), rtol=0, atol=0)
    decay = {0: 0, 23: 0, 24: 0, 99: 1 - 1 / 76}[iteration]
    for old, new, p in zip(weights(teacher), weights(nets[1]), weights(nets[0]), strict=True):
        torch.testing.assert_close(new, decay * old + (1 - decay) * p)


def test_largest_component_of_each_class():
    label = torch.zeros(6, 5, 4, dtype=torch.uint8)
    label[0, 0, :3], label[2, 2, :2], label[5, 4, 3] = 1, 1, 3  # no class 2
    label[1, 1, 3] = 1  # touches the first by an edge alone
    kept = baselines.largest_component(label.clone())
    assert torch.equal(kept.nonzero(), torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 2], [5, 4, 3]]))
    assert torch.equal(kept[kept > 0], label[kept > 0]) and not baselines.largest_component(0 * label).any()


# ---- SASSNet


def brute_force_distance(mask: np.ndarray) -> np.ndarray:
    """The definition, voxel by voxel: distance to the nearest voxel outside (inside: negative), each side by its
    maximum, 0 on voxels inside that touch the outside."""
    inside, outside = np.argwhere(mask), np.argwhere(~mask)
    result = np.zeros(mask.shape)
    if len(inside) and len(outside):
        there = {tuple(v): np.sqrt(((inside - v) ** 2).sum(1).min()) for v in outside}
        back = {tuple(v): np.sqrt(((outside - v) ** 2).sum(1).min()) for v in inside}
        for v, d in there.items():
            result[v] = d / max(there.values())
        for v, d in back.items():
            result[v] = 0 if d == 1 else -d / max(back.values())
    return result


def test_signed_distance_equals_brute_force():
    rng = np.random.default_rng(0)
    label = np.zeros((5, 8, 7, 9), np.uint8)
    label[0, 2:7, 1:6, 2:8] = 1  # a box, with class 2 inside
    label[0, 3:6, 3:5, 4:6] = 2
    label[1] = rng.integers(0, 3, label.shape[1:])
    label[2] = 1  # no border at all; sample 3 is empty
    label[4, 0, 0, 0], label[4, 4:, :, :] = 2, 1  # a voxel in the corner, a half space
    maps = baselines.signed_distance(torch.from_numpy(label), 2).numpy()
    for b, c in itertools.product(range(5), (1, 2)):
        np.testing.assert_allclose(maps[b, c - 1], brute_force_distance(label[b] == c), atol=1e-6)
    assert maps.min() == -1 and maps.max() == 1


def test_squared_distance_is_exact_and_infinite_without_a_target():
    from scipy.ndimage import distance_transform_edt

    mask = torch.from_numpy(np.random.default_rng(1).random((2, 13, 17, 11)) < 0.01)
    mask[1] = False
    square = baselines.squared_distance(mask)
    assert np.array_equal(square[0].numpy(), np.rint(distance_transform_edt(~mask[0].numpy()) ** 2))
    assert square[1].isinf().all()


def test_each_player_leaves_the_other_alone(monkeypatch):
    for loser in (0, 1):
        nets, optimizers, batch, cfg = players("sassnet")
        before = [weights(net) for net in nets]
        optimizers[loser].step = lambda: None  # what is left can only come from the other player's step
        COMPARISONS["sassnet"].step(nets, optimizers, batch, cfg)
        same = [all(torch.equal(p, q) for p, q in zip(old, net.parameters(), strict=True))
                for old, net in zip(before, nets, strict=True)]
        assert same[loser] and not same[1 - loser]


def test_discriminator_learns_which_patches_have_labels(monkeypatch):
    """Its targets are 1 for labeled patches, 0 for the others; the student plays for 1, against no dropout."""
    nets, optimizers, batch, cfg = players("sassnet")
    targets, modes, cross_entropy = [], [], F.cross_entropy
    nets[1].register_forward_hook(lambda net, *_: modes.append(net.training))
    monkeypatch.setattr(F, "cross_entropy", lambda x, y: targets.append(y.tolist()) or cross_entropy(x, y))
    COMPARISONS["sassnet"].step(nets, optimizers, batch, cfg)
    assert targets == [[1, 1], [1, 1, 0, 0]] and modes == [False, True]


def test_step_of_sassnet_written_out():
    nets, optimizers, batch, cfg = players("sassnet", iteration=60, lr=1.0)
    student, discriminator = copy.deepcopy(nets)
    scalars = COMPARISONS["sassnet"].step(nets, optimizers, batch, cfg)
    outputs = student(torch.cat([batch["x_l"], batch["x_u"]]))
    logits, maps = outputs[:, :3], outputs[:, 3:].tanh()
    loss_map = ((maps[:2] - baselines.signed_distance(batch["y_l"], 2)) ** 2).mean()
    loss_u = -discriminator.eval()(maps[2:], batch["x_u"]).log_softmax(1)[:, 1].mean()
    loss = kernels.dice.reference(logits[:2], batch["y_l"], dice=1.0, ce=0.0) + 0.3 * loss_map
    (loss + 0.01 * math.exp(-5 * (1 - 24 / 40) ** 2) * loss_u).backward()
    reciprocal.make_optimizer(cfg, student).step()
    torch.testing.assert_close(nets[0].state_dict(), student.state_dict(), rtol=1e-4, atol=1e-6)
    assert scalars["loss_u"].item() == pytest.approx(loss_u.item(), rel=1e-4)
    image = batch["x_u"].clone()
    with torch.no_grad():
        assert not torch.equal(discriminator(maps[2:], image), discriminator(maps[2:], image + 1))


def test_adversary_reaches_the_student_through_the_maps():
    changed = []
    for iteration in (0, 99):  # the ramp at its ends
        nets, optimizers, batch, cfg = players("sassnet", iteration, lr=1.0)
        COMPARISONS["sassnet"].step(nets, optimizers, batch, cfg)
        changed.append(nets[0].head.weight.detach())
    assert not torch.equal(changed[0][3:], changed[1][3:])  # the maps' rows
    assert torch.equal(changed[0][:3], changed[1][:3])  # the classes' rows never meet the discriminator


def test_discriminator_is_that_of_the_paper():
    net = baselines.Discriminator(1, 1, filters=16)
    widths = [m.out_channels for m in net.modules() if isinstance(m, nn.Conv3d)]
    assert widths == [64, 64, 128, 256, 512] and net(torch.randn(2, 1, 32, 32, 16), torch.randn(2, 1, 32, 32, 16)).shape
    assert [m.negative_slope for m in net.modules() if isinstance(m, nn.LeakyReLU)] == [0.2] * 4
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout3d)] == [0.5] * 3
    (group,) = net.optimizer().param_groups
    assert group["lr"] == 1e-4 and group["betas"] == (0.9, 0.99)


def test_maps_are_for_training_alone():
    (student, _), _, batch, _ = players("sassnet")
    assert student(batch["x_l"]).shape[1] == 5 and student.eval()(batch["x_l"]).shape[1] == 3


# ---- the feedback's controls


def test_shuffled_feedback_has_the_scalar_s_magnitude_and_either_sign():
    def feedback(kind, iteration, rank=0):
        torch.manual_seed(0)
        cfg = replace(Config(), feedback=kind, filters=2, depth=1, dropout=False)
        nets = [reciprocal.VNet(1, 2, 2, 1).train() for _ in range(2)]
        batch = {f"x_{part}": torch.randn(1, 1, 4, 4, 4) for part in "lus"}
        batch |= {f"y_{part}": torch.randint(2, (1, 4, 4, 4)) for part in "ls"} | {"iteration": iteration}
        torch.manual_seed(rank)
        optimizers = [reciprocal.make_optimizer(cfg, net) for net in nets]
        return reciprocal.reciprocal_step(nets, optimizers, batch, cfg)["feedback"].item()

    scalar = feedback("scalar", 0)
    shuffled = [feedback("shuffled", iteration) for iteration in range(20)]
    assert shuffled[:5] == [feedback("shuffled", iteration, rank=1) for iteration in range(5)]
    assert {round(h / scalar) for h in shuffled} == {1, -1} and np.allclose(np.abs(shuffled), abs(scalar))


# ---- in the loop


@pytest.mark.parametrize("method", COMPARISONS)
def test_all_methods_have_the_iterations_of_the_whole_reciprocal_run(method):
    cfg = replace(Config(), method=method, iterations=30, pretrain=40)
    (stage,) = reciprocal.stages(cfg)
    assert stage.iterations == 110 and sum(stage.patches.values()) == cfg.batch_l + cfg.batch_u
    (stage,) = reciprocal.stages(replace(cfg, batch_l=1, batch_u=3))
    assert stage.patches == dict(supervised=dict(l=4), bcp=dict(l=3, u=3)).get(method, dict(l=1, u=3))


def test_as_many_patches_as_the_reciprocal_run(monkeypatch):
    """The second lower bound: patches that go forward and backward, counted in the step itself."""
    for preset, lesson in (("strong", "both"), ("strong", "mixed"), ("paper", "pseudo")):
        cfg = replace(Config(), **data.PRESETS[preset] | dict(lesson=lesson), iterations=30, pretrain=40, batch_l=1,
                      batch_u=2, filters=1, depth=1, dropout=False)
        *pretrain, stage = reciprocal.stages(cfg)
        nets, patches = [reciprocal.VNet(1, 2, 1, 1).train() for _ in range(2)], []
        for net in nets:
            net.register_forward_hook(lambda _, x, y, patches=patches: patches.append(len(x[0])))
        batch = {f"x_{part}": torch.randn(n, 1, 4, 4, 4) for part, n in stage.patches.items()}
        batch |= {f"y_{part}": torch.randint(2, (n, 4, 4, 4)) for part, n in stage.patches.items()}
        stage.step(nets, [reciprocal.make_optimizer(cfg, net) for net in nets], batch, cfg)
        spent = sum(patches) * stage.iterations + 3 * sum(stage.iterations for stage in pretrain)
        for method, own in dict(supervised=3, bcp=4).items():
            (other,) = reciprocal.stages(replace(cfg, method=method, budget="patches"))
            assert other.iterations == round(spent / own)


@pytest.mark.parametrize("method", ["mt", "uamt", "sassnet", "tcsm", "bcp"])
def test_a_run_ends_in_its_table_and_its_checkpoint_predicts(method, tmp_path, capsys, monkeypatch):
    """And what a gradient comes back from is channels_last: `contiguous` leaves the strides of one channel alone."""
    run, forward, strides = tmp_path / "run", reciprocal.VNet.forward, set()

    def watched(net, x):
        strides.update([x.stride(1)] * torch.is_grad_enabled())
        return forward(net, x)

    monkeypatch.setattr(reciprocal.VNet, "forward", watched)
    tiny = shlex.split("--patch 16 16 16 --stride 16 16 16 --filters 2 --depth 2 --batch-l 1 --batch-u 1 "
                       "--iterations 2 --pretrain 1 --log-every 1 --eval-every 2 --eval-cases 1 --device cpu")
    assert cli(lambda: reciprocal.main(["--data", "phantom", "--method", method, "--out", str(run), *tiny])) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["iterations"] == 4 and f"phantom {method}" in capsys.readouterr().out
    networks = {row["network"] for row in summary["scores"]}
    assert networks == ({"student"} if method == "sassnet" else {"student", "teacher"})
    case = data.phantom(1)[0]
    scan = tmp_path / "scan.nii.gz"
    write_label(scan, case.image[0], case.affine)
    assert cli(lambda: reciprocal.main(["predict", "-i", str(scan), "-o", str(tmp_path / "masks"),
                                             "--checkpoint", str(run / "student.pt")])) == 0
    assert (tmp_path / "masks/scan.nii.gz").exists() and strides == {1}
