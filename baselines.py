"""Comparison methods in 3D, on the Config, network, data and loop of reciprocal.py: one step function each. All but
the last are the paper's.

    supervised   labeled patches alone: the lower bound, the upper bound with all labels, and every pre-training
    mt           mean teacher: Tarvainen and Valpola, NeurIPS 2017
    uamt         uncertainty-aware mean teacher: Yu et al., MICCAI 2019
    sassnet      shape-aware adversarial network: Li, Zhang and He, MICCAI 2020
    tcsm         transformation-consistent self-ensembling: Li et al., IEEE TNNLS 2021
    bcp          bidirectional copy-paste: Bai et al., CVPR 2023

A step takes its networks and their optimizers in the order of `COMPARISONS`, updates them in place and returns scalars
that stay on the device. Its batch has x_l (B_l, C, D, H, W), y_l (B_l, D, H, W), x_u (B_u, C, D, H, W), and where the
run stands: `iteration` of `iterations`. Settings are those of the left-atrium literature; what it counts in 6000
iterations is a share of the run here, so that a short run has the whole ramp. The loss, gradients, updates and boxes
that come first serve `reciprocal_step` as well.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

import devices
from kernels.dice import LOSSES, dice_ce


def named_loss(name: str, logits: Tensor, label: Tensor) -> Tensor:
    """`dice_ce` with the weights of a flag's `name`, over the patches of all ranks."""
    return dice_ce(logits, label, **LOSSES[name], group=devices.group())


def gradients_of(loss: Tensor, weights: list[Tensor]) -> Sequence[Tensor]:
    """The gradients of these weights alone, averaged over the ranks."""
    return devices.average(torch.autograd.grad(loss, weights))


def dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """The sum of all products of two lists of gradients, as they lie in memory: one sum, not a hundred."""
    products = [p.as_strided((p.numel(),), (1,)) for p in torch._foreach_mul(one, other)]
    sizes = [len(p) for p in products]
    together = products[0].new_empty(sum(sizes))
    torch._foreach_copy_(together.split(sizes), products)  # torch.cat of so many takes a GPU 0.25 ms
    return together.sum()


def descend(optimizer: Optimizer, loss: Tensor) -> None:
    """One step down `loss` for the weights of this optimizer, and for no others that the loss has met."""
    update(optimizer, gradients_of(loss, optimizer.param_groups[0]["params"]))


def update(optimizer: Optimizer, gradients) -> None:
    """One step of the optimizer along gradients that are known, which fused ones want in the layout of the weights."""
    for weight, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
        same = gradient.stride() == weight.stride()
        weight.grad = gradient if same else torch.empty_like(weight).copy_(gradient)
    optimizer.step()
    optimizer.zero_grad()


def restore(optimizer: Optimizer, state: dict) -> None:
    """The state of a checkpoint; how to compute remains this device's choice."""
    own = optimizer.param_groups[0]
    state["param_groups"][0] |= {name: own[name] for name in ("fused", "capturable") if name in own}
    optimizer.load_state_dict(state)


def random_box(x: Tensor) -> Tensor:
    """(B, D, H, W) bool, True in a box at a random place of each patch of x (B, C, D, H, W), whose sides are two thirds
    of the patch's, rounded down."""
    inside = []
    for n in x.shape[2:]:
        side, place = 2 * n // 3, torch.arange(n, device=x.device)
        start = torch.randint(n - side + 1, (len(x), 1), device=x.device)
        inside.append((start <= place) & (place < start + side))  # (B, n)
    d, h, w = inside
    return d[:, :, None, None] & h[:, None, :, None] & w[:, None, None]


def exchange_boxes(x: Tensor, y: Tensor, x2: Tensor, y2: Tensor) -> list[Tensor]:
    """Patches x (B, C, D, H, W) with labels y (B, D, H, W), and x2 with y2, after each pair has exchanged a random
    box, as the lesson of `--lesson mixed`. The idea is that of `bcp_step`."""
    box = random_box(x)
    images = [torch.where(box[:, None], *pair).to(memory_format=torch.channels_last_3d) for pair in ((x2, x), (x, x2))]
    return [images[0], torch.where(box, y2, y), images[1], torch.where(box, y, y2)]


def cutmix(batch: dict, cfg) -> Sequence[Tensor]:
    """x_l and y_l; with `--cutmix` each patch has a box of its neighbor in the batch (Yun et al., ICCV 2019)."""
    x, y = batch["x_l"], batch["y_l"]
    return exchange_boxes(x, y, x.roll(1, 0), y.roll(1, 0))[:2] if cfg.cutmix else (x, y)


def largest_component(label: Tensor) -> Tensor:
    """Of a label (D, H, W) each foreground class's largest component alone, in place; voxels with a common face are
    connected. Found on the host."""
    for value in range(1, int(label.max()) + 1):
        parts, n = ndimage.label((label == value).cpu().numpy())
        if n > 1:
            other = (parts > 0) & (parts != 1 + np.bincount(parts.ravel())[1:].argmax())
            label[torch.from_numpy(other).to(label.device)] = 0
    return label


def supervised_step(nets: list[nn.Module], optimizers: list[Optimizer], batch: dict, cfg) -> dict[str, Tensor]:
    x_l, y_l = cutmix(batch, cfg)
    loss_l = named_loss(cfg.supervised_loss, nets[0](x_l), y_l)
    descend(optimizers[0], loss_l)
    return {"loss_l": loss_l.detach()}


# ---- methods with an averaged teacher -------------------------------------------------------------------------------

def averaged_step(nets, optimizers, batch: dict, cfg, consistency: Callable) -> dict[str, Tensor]:
    """The frame of mt, uamt and tcsm: a student with the loss of the labels and, behind a ramp, a `consistency` with
    the teacher, whose weights are the student's, averaged over the iterations. (No gradient reaches the teacher, and
    its optimizer never steps; its batch-norm statistics are of what it sees itself.)

    consistency(probs of the student (B_l + B_u, classes, D, H, W), x (B_l + B_u, C, D, H, W), teacher) is a scalar."""
    (student, teacher), (x_l, y_l) = nets, cutmix(batch, cfg)
    x = torch.cat([x_l, batch["x_u"]])
    logits = student(x)  # (B_l + B_u, classes, D, H, W)
    loss_l = named_loss(cfg.supervised_loss, logits[: len(x_l)], y_l)
    loss_u = consistency(logits.softmax(1), x, teacher)
    descend(optimizers[0], loss_l + 0.1 * ramp(batch, stairs=40) * loss_u)
    follow(teacher, student, batch["iteration"])
    return dict(loss_l=loss_l.detach(), loss_u=loss_u.detach())


def follow(teacher: nn.Module, student: nn.Module, iteration: int) -> None:
    """The teacher's weights become the mean of the student's so far; after 100 iterations the latest weigh most."""
    decay = min(1 - 1 / (iteration + 1), 0.99)  # 0 at first: the teacher becomes the student
    get_ema_multi_avg_fn(decay)(list(teacher.parameters()), list(student.parameters()), None)  # without gradients


def mt_step(nets, optimizers, batch: dict, cfg) -> dict[str, Tensor]:
    """Mean squared difference to the teacher's probabilities on noisy unlabeled patches."""

    def consistency(probs, x, teacher):
        with torch.no_grad():
            target = teacher(noisy(batch["x_u"])).softmax(1)
        return F.mse_loss(probs[-len(target) :], target)

    return averaged_step(nets, optimizers, batch, cfg, consistency)


def uamt_step(nets, optimizers, batch: dict, cfg) -> dict[str, Tensor]:
    """The same where the teacher is certain: where the entropy of its mean over 8 passes with dropout is below a
    threshold, which rises from three quarters of ln(classes), that of a uniform guess, to the whole."""

    def consistency(probs, x, teacher):
        with torch.no_grad():
            target = teacher(noisy(batch["x_u"])).softmax(1)
            mean = sum(teacher(noisy(batch["x_u"])).softmax(1) for _ in range(8)) / 8
            certain = entropy(mean) < (0.75 + 0.25 * ramp(batch)) * math.log(mean.shape[1])  # (B_u, 1, D, H, W)
        square = (probs[-len(target) :] - target) ** 2
        (voxels,) = devices.average([certain.sum().float()])  # the mean over ranks, as gradients are averaged
        return (certain * square).sum() / (mean.shape[1] * voxels + 1e-16)

    return averaged_step(nets, optimizers, batch, cfg, consistency)


def tcsm_step(nets, optimizers, batch: dict, cfg) -> dict[str, Tensor]:
    """The student's prediction, turned, has to match the teacher's for the turned patch: labeled patches too. The
    gradient flows through the student's turned probabilities; the released code computes both sides without any."""

    def consistency(probs, x, teacher):
        turn = random_transform(x.shape)
        with torch.no_grad():
            target = teacher(turn(noisy(x))).softmax(1)
        return F.mse_loss(turn(probs), target)

    return averaged_step(nets, optimizers, batch, cfg, consistency)


def bcp_step(nets, optimizers, batch: dict, cfg) -> dict[str, Tensor]:
    """The student sees labeled patches with a box of an unlabeled one, and unlabeled patches with that box of the
    labeled one; B_l is B_u. Either part of a mixed patch has a loss of its own, and that of pseudo labels, their
    largest components, half the weight. In the first 2000 of 17,000 iterations all are labeled, mixed with their
    neighbors in the batch, and the teacher is the student. (The released code has one box a step for all patches and
    other patches for the second kind; its pre-training has one loss of the whole mixed patch and ends with the
    checkpoint that is best in validation, from where momentum and learning rate begin anew.)"""
    (student, teacher), x_l, y_l, x_u, weight = nets, batch["x_l"], batch["y_l"].short(), batch["x_u"], 0.5
    iteration = batch["iteration"] - 2 * batch["iterations"] // 17
    if iteration < 0:
        x_u, y_u, weight = x_l.roll(1, 0), y_l.roll(1, 0), 1.0
    else:
        with torch.no_grad():
            y_u = torch.stack([largest_component(label) for label in teacher(x_u).argmax(1).short()])
    box, loss_l, loss_u = random_box(x_l), 0, 0
    for theirs in (box, ~box):  # what of the mixed patch is the unlabeled one's
        mixed = torch.where(theirs[:, None], x_u, x_l).to(memory_format=torch.channels_last_3d)
        logits = student(mixed)
        mine, other = (dice_ce(logits, y, form="sample", background=True)  # -1 is no class and does not count
                       for y in (y_l.masked_fill(theirs, -1), y_u.masked_fill(~theirs, -1)))
        loss_l, loss_u = loss_l + mine, loss_u + other
    descend(optimizers[0], loss_l + weight * loss_u)
    if iteration < 0:
        teacher.load_state_dict(student.state_dict())  # batch norm's statistics, too: it has seen nothing yet
    else:
        follow(teacher, student, iteration)
    return dict(loss_l=loss_l.detach(), loss_u=loss_u.detach())


def ramp(batch: dict, stairs: int | None = None) -> float:
    """exp(-5 (1 - t/T)^2), from 0.0067 to 1 over the run; in `stairs` steps, 40 as the literature has it."""
    t, T = batch["iteration"], batch["iterations"]
    share = t * stairs // T / stairs if stairs else t / T
    return math.exp(-5 * (1 - share) ** 2)


def noisy(x: Tensor) -> Tensor:
    return x + (0.1 * torch.randn_like(x)).clamp_(-0.2, 0.2)


def entropy(probs: Tensor) -> Tensor:
    """Of probabilities (B, classes, D, H, W), in nats: (B, 1, D, H, W)."""
    return -(probs * (probs + 1e-6).log()).sum(1, keepdim=True)


def random_transform(shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """A function that turns and flips each sample of (B, C, D, H, W) in its own way, the same at each call: quarter
    turns in the first plane of equal sides, half turns where there is none, and a flip of each axis or not."""
    square = [(a, b) for a, b in itertools.combinations((1, 2, 3), 2) if shape[a + 1] == shape[b + 1]]
    plane, step = (square[0], 1) if square else ((1, 2), 2)
    turns = (step * torch.randint(4, (shape[0],))).tolist()  # numbers of the host: nothing waits for a GPU
    flips = [[axis for axis, flip in enumerate(row, 1) if flip] for row in torch.randint(2, (shape[0], 3)).tolist()]

    def transform(x: Tensor) -> Tensor:
        samples = [sample.rot90(k, plane).flip(axes) for sample, k, axes in zip(x, turns, flips, strict=True)]
        return torch.stack(samples).to(memory_format=torch.channels_last_3d)

    return transform


# ---- SASSNet --------------------------------------------------------------------------------------------------------

class Discriminator(nn.Module):
    """Labeled or unlabeled? From the signed distance maps and the image to logits (B, 2). Its first level has 4 times
    the V-Net's channels: with 16 filters 64, as in the paper."""

    def __init__(self, channels: int, maps: int, filters: int):
        super().__init__()
        width = [4 * filters * 2**level for level in range(4)]
        self.stem_maps, self.stem_image = (nn.Conv3d(n, width[0], 4, 2, 1) for n in (maps, channels))
        convs = [nn.Conv3d(before, after, 4, 2, 1) for before, after in itertools.pairwise(width)]
        layers = [(nn.LeakyReLU(0.2), nn.Dropout3d(0.5), conv) for conv in convs]
        self.body = nn.Sequential(*itertools.chain(*layers), nn.LeakyReLU(0.2))
        self.head = nn.Linear(width[-1], 2)

    def forward(self, maps: Tensor, image: Tensor) -> Tensor:
        features = self.body(self.stem_maps(maps) + self.stem_image(image))
        return self.head(features.mean((2, 3, 4)))  # an average pool, whose gradient on a GPU is deterministic, too

    def optimizer(self) -> Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-4, betas=(0.9, 0.99))


def sassnet_step(nets, optimizers, batch: dict, cfg) -> dict[str, Tensor]:
    """The student predicts classes and signed distance maps, and the discriminator learns to tell from the maps
    which patches have labels, while the student learns to make those of unlabeled patches look labeled."""
    (student, discriminator), (x_l, y_l) = nets, cutmix(batch, cfg)
    n, x = len(x_l), torch.cat([x_l, batch["x_u"]])
    logits, maps = student(x).tensor_split([student.classes], 1)
    maps = maps.tanh()  # (B_l + B_u, classes - 1, D, H, W)
    loss_l = named_loss("dice", logits[:n], y_l)
    loss_map = F.mse_loss(maps[:n], signed_distance(y_l, maps.shape[1]))
    labeled = (torch.arange(len(x), device=x.device) < n).long()
    judged = discriminator.eval()(maps[n:], batch["x_u"])  # without its dropout
    loss_u = F.cross_entropy(judged, torch.ones_like(labeled[n:]))
    descend(optimizers[0], loss_l + 0.3 * loss_map + 0.01 * ramp(batch, stairs=40) * loss_u)
    loss_d = F.cross_entropy(discriminator.train()(maps.detach(), x), labeled)
    descend(optimizers[1], loss_d)
    scalars = dict(loss_l=loss_l, loss_u=loss_u, loss_map=loss_map, loss_discriminator=loss_d)
    return {name: value.detach() for name, value in scalars.items()}


def signed_distance(label: Tensor, maps: int) -> Tensor:
    """Of labels (B, D, H, W) with classes 1 to `maps`: (B, maps, D, H, W) float32 in [-1, 1], negative inside, 0 on
    the object's outermost voxels, each side divided by its largest distance; 0 where a patch has no such border."""
    mask = torch.stack([label == value for value in range(1, maps + 1)], 1)
    there, back = (squared_distance(side).sqrt() for side in (mask, ~mask))  # to the object, and out of it
    outside, inside = (d / d.amax((2, 3, 4), keepdim=True).clamp(min=1) for d in (there, back))
    bordered = (mask.flatten(2).any(2) & ~mask.flatten(2).all(2))[..., None, None, None]
    return torch.where(bordered & (back != 1), outside - inside, 0.0)


def squared_distance(target: Tensor) -> Tensor:
    """Of masks (..., D, H, W), the squared distance in voxels from each voxel to the nearest of the mask: float32,
    exact, infinite where the mask is empty. Axis by axis, the least of square + (i - j)^2 over all j of a line
    (Saito and Toriwaki, Pattern Recognition 27(11):1551-1565, 1994), on any device."""
    square = torch.where(target, 0.0, math.inf)
    for axis in (-1, -2, -3):
        lines = square.movedim(axis, -1)  # (..., n)
        place = torch.arange(lines.shape[-1], dtype=torch.float32, device=target.device)
        best = torch.full_like(lines, math.inf)
        for j, steps in enumerate((place[:, None] - place) ** 2):
            best = torch.minimum(best, lines[..., j, None] + steps)
        square = best.movedim(-1, axis)
    return square


# ---- what the loop knows of them ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Method:
    step: Callable
    nets: tuple[str, ...] = ("student", "teacher")  # in the step's order; the student's predictions are the result
    own: dict[str, Callable] = field(default_factory=dict)  # makers of the networks that are not V-Nets
    unlabeled: bool = True  # takes batch_u unlabeled patches; else labeled ones in their place
    dropout: bool = False  # needs dropout in its V-Nets, whatever the Config says
    maps: bool = False  # its V-Nets have a signed distance map for each foreground class
    patch: int = 1  # the fewest voxels a side of a patch may have
    alone: bool = False  # a network sees the unlabeled patches by themselves
    pairs: bool = False  # takes batch_u labeled patches as well, to mix them in pairs


COMPARISONS = {
    "supervised": Method(supervised_step, ("student",), unlabeled=False),
    "mt": Method(mt_step, alone=True),
    "uamt": Method(uamt_step, alone=True, dropout=True),
    "sassnet": Method(sassnet_step, ("student", "discriminator"), {"discriminator": Discriminator}, maps=True,
                      patch=16),  # the discriminator halves it four times
    "tcsm": Method(tcsm_step),
    "bcp": Method(bcp_step, alone=True, pairs=True),
}
