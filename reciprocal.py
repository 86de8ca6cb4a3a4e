"""Reciprocal learning for semi-supervised 3D medical image segmentation, in one module.

A student learns from a teacher's pseudo labels; the teacher learns from the labels, and from how much its lesson
helped the student on labeled data. Zeng, Wang et al., "Reciprocal learning for semi-supervised segmentation",
MICCAI 2021, and its successor, Medical Physics 50(1):163-177, 2023.

    python reciprocal.py --data la --labeled 0.2             train, test, report
    python reciprocal.py --data FOLDER --out runs/mine       own data
    python reciprocal.py --resume runs/mine                  go on where it stopped
    python reciprocal.py predict -i scans/ -o masks/ --checkpoint runs/mine

To learn, read `reciprocal_step` first; the rest is in reading order.
"""

import argparse
import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

import baselines
import data
import devices
import metrics
import record
from baselines import COMPARISONS, cutmix, dot, exchange_boxes, gradients_of, named_loss, supervised_step, update
from cli import BadInput, Parser, add_flags, cli, flag, make_folder
from data import PRESETS
from devices import Pointwise, Unit, settle
from files import write_label

NETWORKS = ("student", "teacher")  # those that segment
QUIET = devices.RANK > 0 or not sys.stderr.isatty()  # plain lines instead of progress bars where nobody watches them

# ---- Config -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line and is saved in the run. Values come from here, then from the data
    set's recipe (`data.RECIPES`), then from the preset (`data.PRESETS`), then from the flags."""

    data: str = flag("phantom", f"a data set by name (phantom, {', '.join(data.SOURCES)}) or a folder of your own")
    root: str = flag("", "where the named data set lies (default: data/NAME)")
    labeled: float = flag(0.2, "labeled training cases to use: a share, or a count if over 1")
    holdout: float = flag(0.2, "share of the labeled cases kept out of training and scored as test cases")
    out: str = flag("", "the run's folder (default: a new one in runs/)")
    seed: int = flag(1, "seed of the weights, the patches, the boxes and the dropout")

    method: str = flag("reciprocal", "how to train", ("reciprocal", *COMPARISONS))
    preset: str = flag("strong", "the paper's loss, lesson and start, or the stronger default", ("paper", "strong"))
    loss: str = flag("dice+ce", "loss of the reciprocal steps", ("ce", "dice", "dice+ce"))
    supervised_loss: str = flag("dice+ce", "loss of `supervised` and of pre-training", ("ce", "dice", "dice+ce"))
    lesson: str = flag("both", "the student's patches: unlabeled, labeled too, a mix", ("pseudo", "both", "mixed"))
    student_start: str = flag("pretrained", "the student's weights at the start", ("random", "pretrained"))
    cutmix: bool = flag(False, "labeled patches exchange boxes, except those of the lesson, the exam and bcp")
    feedback: str = flag("scalar", "h: the authors' lr * <g_u, g_l>; the measured fall of the exam loss; two controls, "
                         "the scalar with a random sign, and none", ("scalar", "difference", "shuffled", "off"))
    iterations: int = flag(6000, "reciprocal steps")
    pretrain: int = flag(6000, "supervised steps of pre-training, for the teacher and for a pretrained student")
    budget: str = flag("iterations", "what a comparison method gets as many of as the whole reciprocal run: "
                       "iterations, or patches that go forward and backward", ("iterations", "patches"))
    teacher_from: str = flag("", "a run or a file whose student's weights replace the teacher's pre-training")
    student_from: str = flag("", "the same for the student")

    filters: int = flag(16, "channels of the network's first level")
    depth: int = flag(4, "times the network halves each side of the volume")
    dropout: bool = flag(True, "Dropout3d(0.5) after the bottleneck and before the head")
    patch: tuple = flag((112, 112, 80), "voxels a side, each a multiple of 2 ** depth")
    voxel: tuple = flag((0.0, 0.0, 0.0), "size of these voxels in mm, an axis each: scans are resampled to it, and "
                        "predictions back; 0 keeps the scan's")
    batch_l: int = flag(2, "labeled patches a step")
    batch_u: int = flag(2, "unlabeled patches a step; a supervised step takes batch_l + batch_u labeled ones")
    optimizer: str = flag("sgd", "SGD with momentum 0.9 and weight decay 1e-4, or Adam", ("sgd", "adam"))
    lr: float = flag(0.01, "learning rate")
    schedule: str = flag("step", "lr * 0.1 every lr_step, or lr * (1 - t/T) ** 0.9", ("step", "poly"))
    lr_step: int = flag(2500, "iterations between two drops of `step`; in proportion more for comparison methods")
    augment: str = flag("rotflip", "rot90 and one flip in the plane; a flip of each axis; none",
                        ("rotflip", "flip", "none"))
    noise: float = flag(0.0, "standard deviation of Gaussian noise on the patches")
    normalize: str = flag("zscore", "intensities: z-score a scan, `window` to [0, 1], none; h5 files keep the z-score "
                          "that they have, except under `zscore-crop`", ("zscore", "zscore-crop", "window", "none"))
    window: tuple = flag((-125.0, 275.0), "the lowest and highest intensity for --normalize window")

    stride: tuple = flag((18, 18, 4), "steps of the sliding window, in voxels of the patch")
    windows: int = flag(4, "windows in one forward pass")
    largest_component: bool = flag(False, "keep the largest component of each predicted class")
    spacing: str = flag("voxels", "unit of the distances", ("voxels", "mm"))
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    amp: str = flag("auto", "autocast; auto: bf16 on CUDA; a CPU gains by AMX or AVX512_BF16", ("auto", "bf16", "off"))
    deterministic: bool = flag(False, "deterministic algorithms only")
    compile: bool = flag(False, "torch.compile of the networks: a minute or two at first, then faster steps")
    graph: bool = flag(True, "on one GPU, supervised and reciprocal steps (without a random sign) as CUDA graphs")
    sync_norm: bool = flag(False, "batch statistics over all GPUs of torchrun, else each its own")
    log_every: int = flag(10, "iterations between two reads of the losses from the device")
    eval_every: int = flag(500, "iterations between two points of the Dice curve")
    eval_cases: int = flag(4, "scored cases behind the Dice curve")
    save_every: int = flag(500, "iterations between two checkpoints")

    def check(self) -> "Config":
        """Itself, or BadInput on values that no run can have."""
        positive = ("batch_l", "batch_u", "filters", "windows", "lr_step", "log_every", "eval_every", "save_every")
        low = [name for name in ("iterations", "pretrain", "eval_cases", "seed", "noise", "depth", *positive)
               if not getattr(self, name) >= int(name in positive)]  # so written, NaN is too low
        if low:
            raise BadInput(f"--{low[0].replace('_', '-')} {getattr(self, low[0])}: too low")
        side, method = 2**self.depth, COMPARISONS.get(self.method)
        least = max(side, method.patch) if method else side
        if any(p % side or p < least for p in self.patch):
            raise BadInput(f"--patch {' '.join(map(str, self.patch))}: each side must be a multiple of {side}, that is "
                           f"2 ** depth, and at least {least}; choose such sides or a smaller --depth")
        if self.batch_l % devices.WORLD or self.batch_u % devices.WORLD:
            raise BadInput(f"--batch-l {self.batch_l}, --batch-u {self.batch_u}: no multiple of {devices.WORLD} ranks")
        if self.cutmix and self.batch_l < 2 * devices.WORLD:
            raise BadInput(f"--cutmix: a patch alone has no other to exchange with; raise --batch-l {self.batch_l}")
        alone = min(self.batch_l, self.batch_u) if not method else self.batch_u if method.alone else 0
        if alone == devices.WORLD and max(self.patch) == side and not self.sync_norm:
            raise BadInput(f"--patch: a single voxel at depth {self.depth}, a batch of 1: no variance; enlarge either")
        wrong = any(size and not 0.01 <= size <= 1000 for size in self.voxel)
        if wrong or min(self.stride) < 1 or not 0 < self.lr < 1e38 or not self.window[0] < self.window[1]:
            raise BadInput("--stride, --lr: positive; --window: a lower and a higher value; --voxel: 0 or 0.01 to 1000")
        return self


# ---- the network --------------------------------------------------------------------------------------------------

class VNet(nn.Module):
    """The V-Net of this literature (Milletari et al. 2016 in the form of UA-MT, Yu et al. 2019): 3x3x3 convolutions
    with BatchNorm, strided convolutions between the levels, skips that are added.

    (B, channels, D, H, W) to logits (B, classes, D, H, W), every side a multiple of 2 ** depth. One channel, two
    classes, 16 filters and depth 4 are 9,448,866 parameters. In training SASSNet's `maps` follow the logits."""

    CONVS = (1, 2, 3, 3, 3)  # convolutions a level, from the full resolution down; deeper levels have 3

    def __init__(self, channels: int, classes: int, filters: int = 16, depth: int = 4, dropout: bool = False,
                 maps: int = 0):
        super().__init__()
        self.classes = classes
        convs = (self.CONVS + (3,) * depth)[: depth + 1]
        width = [filters * 2**level for level in range(depth + 1)]

        def block(n: int, before: int, after: int) -> nn.Sequential:
            ins = [before] + [after] * (n - 1)
            return nn.Sequential(*(Unit(nn.Conv3d(i, after, 3, padding=1)) for i in ins))

        pairs = list(itertools.pairwise(width))
        self.encoder = nn.ModuleList(map(block, convs, [channels] + width[1:], width))
        self.down = nn.ModuleList(Unit(nn.Conv3d(fine, coarse, 2, stride=2)) for fine, coarse in pairs)
        self.up = nn.ModuleList(Unit(nn.ConvTranspose3d(coarse, fine, 2, stride=2)) for fine, coarse in pairs)
        self.decoder = nn.ModuleList(map(block, convs[:-1], width[:-1], width[:-1]))
        self.dropout = nn.Dropout3d(0.5) if dropout else nn.Identity()
        self.head = Pointwise(filters, classes + maps, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block, down in zip(self.encoder[:-1], self.down, strict=True):
            skips.append(block(x))
            x = down(skips[-1])
        x = self.dropout(self.encoder[-1](x))
        for block, up, skip in zip(reversed(self.decoder), reversed(self.up), reversed(skips), strict=True):
            x = block(up(x) + skip)
        outputs = self.head(self.dropout(x))
        return outputs if self.training else outputs[:, : self.classes]


# ---- the step -----------------------------------------------------------------------------------------------------

def reciprocal_step(nets: list[VNet], optimizers: list[Optimizer], batch: dict, cfg: Config) -> dict[str, Tensor]:
    """One iteration of reciprocal learning: networks and optimizers of (teacher, student), updated in place.

    batch: x_l (B_l, C, D, H, W), y_l (B_l, D, H, W); x_u (B_u, C, D, H, W); unless `--lesson pseudo` x_s and y_s,
    labeled patches for the student that are not those of its exam, x_l; `iteration`, the number of the step.
    Returns scalars that stay on the device. The feedback is Meta Pseudo Labels' eq. 12 (arXiv 2003.10580):

        h = lr * <g_u, g_l>,    theta_T <- step(grad of [ L(T(x_l), y_l) + h * CE(T(x_u), pseudo_label) ])

    For a plain gradient step h is, to first order, the fall of the exam loss that the pseudo labels caused (momentum
    and Adam step otherwise). Where they helped (h > 0) the teacher is sharpened toward them; where they did harm
    (h < 0) it is pushed away. Over pseudo labels *sampled* from the teacher, the mean of the gradient of h * CE is the
    gradient of the exam loss in the teacher's weights, divided by the number of voxels because CE is a mean over them,
    which makes the feedback weak. The paper's argmax is biased (tests/test_reciprocal.py shows identity and bias)."""
    (teacher, student), (t_optimizer, s_optimizer) = nets, optimizers
    t_weights, s_weights = (list(net.parameters()) for net in nets)
    loss, aside = functools.partial(named_loss, cfg.loss), devices.Aside(batch["x_u"].device)

    # Of the student's work the teacher needs h alone, in part 4. So the teacher works aside: a GPU does both at once.
    with aside, torch.set_grad_enabled(cfg.feedback != "off"):
        t_logits_u = teacher(batch["x_u"])  # (B_u, classes, D, H, W)
        pseudo_label = t_logits_u.detach().argmax(1).to(torch.uint8)  # (B_u, D, H, W)
    aside.join()  # the lesson needs the pseudo labels
    if cfg.feedback != "off":
        with aside:  # taken now, so that nothing of the pass has to be kept; part 4 multiplies it by h
            g_p = torch.autograd.grad(named_loss("ce", t_logits_u, pseudo_label), t_weights)
    if cfg.feedback == "difference":
        with torch.no_grad(), exam(student, dropout=False):
            loss_before = loss(student(batch["x_l"]), batch["y_l"])

    # 1. The lesson: pseudo labels; `--lesson both` adds labeled patches, `mixed` exchanges boxes between the two.
    x_u, y_u, x_s, y_s = batch["x_u"], pseudo_label, batch.get("x_s"), batch.get("y_s")
    if cfg.lesson == "mixed":
        x_u, y_u, x_s, y_s = exchange_boxes(x_u, y_u, x_s, y_s)
    scalars = dict(loss_u=loss(student(x_u), y_u))
    lesson = g_u = gradients_of(scalars["loss_u"], s_weights)
    if cfg.lesson != "pseudo":
        scalars["loss_s"] = loss(student(x_s), y_s)
        lesson = torch._foreach_add(g_u, gradients_of(scalars["loss_s"], s_weights))  # one call, not a hundred
    update(s_optimizer, lesson)

    # 2. The exam: the updated student on true labels. A gradient only: nothing is learned from it.
    if cfg.feedback != "off":
        scalar = cfg.feedback != "difference"
        with torch.set_grad_enabled(scalar), exam(student, dropout=scalar):
            loss_exam = loss(student(batch["x_l"]), batch["y_l"])

    # 3. The feedback h, of g_u alone: labeled patches owe nothing to pseudo labels (`mixed` ones: their box).
    if cfg.feedback in ("scalar", "shuffled"):
        feedback = s_optimizer.param_groups[0]["lr"] * dot(g_u, gradients_of(loss_exam, s_weights))
        if cfg.feedback == "shuffled":
            feedback = feedback * np.random.default_rng([cfg.seed, batch["iteration"]]).choice((-1.0, 1.0))
    elif cfg.feedback == "difference":
        feedback = loss_before - loss_exam

    # 4. The teacher: the gradient of the labels and, times h, that of the pseudo labels.
    with aside:
        x_l, y_l = cutmix(batch, cfg)
        scalars["loss_l"] = loss(teacher(x_l), y_l)
        g_t = torch.autograd.grad(scalars["loss_l"], t_weights)
    aside.join()
    if cfg.feedback != "off":
        g_t = torch._foreach_add(g_t, torch._foreach_mul(g_p, feedback))
        scalars |= dict(loss_exam=loss_exam, feedback=feedback)
    update(t_optimizer, devices.average(g_t))
    return {name: value.detach() for name, value in scalars.items()}


@contextlib.contextmanager
def exam(net: nn.Module, dropout: bool = True):
    """An exam teaches nothing: batch statistics normalize as in training, but leave no trace in the running ones.
    Two exams that are compared run without dropout: its chance would be all their difference."""
    try:
        for module in net.modules():
            module.track_running_stats = False  # of a VNet's modules batch norm alone reads it
            module.training = dropout or not isinstance(module, nn.Dropout3d)
        yield
    finally:
        for module in net.train().modules():
            module.track_running_stats = True


# ---- inference ----------------------------------------------------------------------------------------------------

@torch.inference_mode()
def segment(net: nn.Module, image: Tensor, patch, stride, windows: int = 4, shape=None, keep_on=None) -> Tensor:
    """Sliding windows, softmax averaged: image (C, D, H, W) to probabilities (classes, D, H, W or `shape`) float32.

    A volume smaller than the patch is padded. The sums stay on the image's device and fall back to the host when
    that runs out of memory (`keep_on`). `net` is used as it is: call net.eval() first."""
    padded = data.pad(image, patch)
    sizes = list(zip(padded.shape[1:], patch, map(min, stride, patch), strict=True))  # a larger stride leaves gaps
    starts = [sorted({min(start, size - p) for start in range(0, size - p + s, s)}) for size, p, s in sizes]
    boxes = [(..., *(slice(a, a + p) for a, p in zip(corner, patch, strict=True)))
             for corner in itertools.product(*starts)]
    keep_on, x, probs, prob, total, visits = torch.device(keep_on or image.device), *[None] * 5
    try:
        for some in (boxes[i : i + windows] for i in range(0, len(boxes), windows)):
            x = torch.stack([padded[box] for box in some])  # (windows, C, *patch)
            probs = net(x.to(memory_format=torch.channels_last_3d)).float().softmax(1).to(keep_on)
            if total is None:
                total = torch.zeros(probs.shape[1], *padded.shape[1:], device=keep_on)
                visits = torch.zeros(padded.shape[1:], device=keep_on)
            for box, prob in zip(some, probs, strict=True):
                total[box] += prob
                visits[box] += 1
        total /= visits
        low = [(have - want) // 2 for have, want in zip(total.shape[1:], image.shape[1:], strict=True)]
        inner = (..., *(slice(a, a + n) for a, n in zip(low, image.shape[1:], strict=True)))
        return data.resize(total[inner], image.shape[1:] if shape is None else shape)
    except torch.OutOfMemoryError:
        if keep_on.type == "cpu":
            raise
    del x, probs, prob, total, visits, padded  # out here the exception no longer holds on to what did not fit
    return segment(net, image, patch, stride, 1, shape, keep_on="cpu")


def predict_label(net: nn.Module, case: data.Case, cfg: Config) -> Tensor:
    """The predicted classes (D, H, W) uint8 of a case, on its own grid and device."""
    image = data.resize(case.volume(), case.grid(cfg.voxel))
    with devices.autocast(cfg.amp, image.device), torch.compiler.set_stance("force_eager"):  # the last batch is smaller
        probs = segment(net, image, cfg.patch, cfg.stride, cfg.windows, case.image.shape[1:])
    label = probs.max(0).indices.to(image.device, torch.uint8)  # on a CPU argmax takes several times as long
    return baselines.largest_component(label) if cfg.largest_component else label


# ---- training -----------------------------------------------------------------------------------------------------

@dataclass
class Stage:
    """Some iterations of one step function, on the networks it takes, in its order."""

    name: str
    step: Callable
    nets: tuple[str, ...]
    iterations: int
    patches: dict[str, int]  # how many x_l, x_s (other labeled ones) and x_u a step takes


def stages(cfg: Config) -> list[Stage]:
    """What a run does. A comparison method takes as many iterations as the reciprocal run of the same Config in all
    (or as `budget` says), so that none is short of training."""
    sizes, supervised = dict(l=cfg.batch_l, u=cfg.batch_u), dict(l=cfg.batch_l + cfg.batch_u)
    if method := COMPARISONS.get(cfg.method):
        *pretrain, main = stages(replace(cfg, method="reciprocal"))
        own = sizes | dict(l=cfg.batch_u) if method.pairs else sizes if method.unlabeled else supervised
        total, sent = sum(stage.iterations for stage in [*pretrain, main]), sum(sizes.values())
        if cfg.budget == "patches":  # teacher and student take x_l (for the student its exam) and x_u, the student x_s
            total = round((total * sent + main.iterations * (sent + main.patches.get("s", 0))) / sum(own.values()))
        return [Stage(cfg.method, method.step, method.nets, total, own)]
    needed = dict(teacher=not cfg.teacher_from, student=cfg.student_start == "pretrained" and not cfg.student_from)
    pretrain = [Stage(f"pre-training of the {name}", supervised_step, (name,), cfg.pretrain, supervised)
                for name in needed if needed[name]]
    labeled = dict(pseudo={}, both=dict(s=cfg.batch_l), mixed=dict(s=cfg.batch_u))[cfg.lesson]
    return [*pretrain, Stage("reciprocal", reciprocal_step, ("teacher", "student"), cfg.iterations, sizes | labeled)]


def reseed(*numbers: int) -> None:
    """Weights, boxes and dropout follow from these numbers alone: nothing random has to be saved."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def build(cfg: Config, name: str, channels: int, classes: int) -> nn.Module:
    method = COMPARISONS.get(cfg.method, COMPARISONS["supervised"])  # reciprocal learning asks nothing of its networks
    if name in method.own:
        return method.own[name](channels, classes - 1, cfg.filters)
    return VNet(channels, classes, cfg.filters, cfg.depth, cfg.dropout or method.dropout, method.maps * (classes - 1))


def networks(cfg: Config, dataset: data.Dataset, device: torch.device, saved: dict | None) -> dict[str, nn.Module]:
    nets = {}  # the student first: the same seed gives it the same weights, whatever the method
    for number, name in enumerate(dict.fromkeys(["student", *(name for stage in stages(cfg) for name in stage.nets)])):
        reseed(cfg.seed, number)
        net = build(cfg, name, dataset.channels, len(dataset.classes))
        if saved:
            record.load_weights(net, saved, name, "checkpoint.pt")
        elif source := {"student": cfg.student_from, "teacher": cfg.teacher_from}.get(name):
            record.load_weights(net, record.load_checkpoint(source), "student", source)
        if cfg.sync_norm and devices.WORLD > 1:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        nets[name] = net.to(device, memory_format=torch.channels_last_3d)
    return nets


def make_batch(cfg: Config, dataset: data.Dataset, number: int, stage: Stage, iteration: int, device) -> dict:
    """The patches of one step; they depend on the seed, the stage and the iteration alone."""
    batch, sizes = dict(iteration=iteration, iterations=stage.iterations, cases=[]), stage.patches.copy()

    def draw(cases: list[data.Case], n: int, role: int, classes: int = 0):
        counters = dict(seed=cfg.seed, stream=2 * number + role, iteration=iteration)
        batch["cases"] += [case.name for case in data.chosen(cases, n, **counters)]
        image, label = data.draw(cases, n, cfg.patch, **counters, augment=cfg.augment, noise=cfg.noise,
                                 voxel=cfg.voxel, classes=classes, device=device)
        return image.to(memory_format=torch.channels_last_3d), label  # `contiguous` ignores strides of one channel

    if n := sizes.pop("u", 0):
        batch["x_u"], _ = draw(dataset.unlabeled, n, 1)
    # One draw without replacement: the exam's cases are not those of the lesson while there are enough of them.
    shares = [n // devices.WORLD for n in sizes.values()]
    images, labels = (x.split(shares) for x in draw(dataset.labeled, sum(sizes.values()), 0, len(dataset.classes)))
    for part, image, label in zip(sizes, images, labels, strict=True):
        batch |= {f"x_{part}": image, f"y_{part}": label}
    return batch


def learning_rate(cfg: Config, iteration: int, iterations: int) -> float:
    if cfg.schedule == "poly":
        return cfg.lr * (1 - iteration / iterations) ** 0.9
    # a comparison method's only stage spans the whole run: its steps are longer in proportion
    own = cfg.iterations if cfg.method in COMPARISONS and cfg.iterations else iterations
    return cfg.lr * 0.1 ** (iteration * own // (iterations * cfg.lr_step))


def make_optimizer(cfg: Config, net: nn.Module) -> Optimizer:
    if not isinstance(net, VNet):
        return net.optimizer()  # a method's own network brings its own
    on_gpu = net.head.weight.is_cuda  # then one kernel for all weights, which reads the learning rate there
    if cfg.optimizer == "adam":
        return torch.optim.Adam(net.parameters(), lr=cfg.lr, fused=on_gpu, capturable=on_gpu)
    return torch.optim.SGD(net.parameters(), lr=cfg.lr, momentum=0.9, weight_decay=1e-4, fused=on_gpu)


def train(cfg: Config, dataset: data.Dataset, nets: dict[str, nn.Module], run: Path, saved: dict | None,
          stopped: Sequence = ()) -> None:
    """All stages from the checkpoint `saved` on, until `stopped` holds something; log.jsonl and checkpoint.pt grow."""
    device = next(nets["student"].parameters()).device
    for number, stage in enumerate(stages(cfg)):
        if saved and number < saved["stage"]:
            continue
        start, trained, pending = 0, [nets[name].train() for name in stage.nets], []
        optimizers = [make_optimizer(cfg, net) for net in trained]
        if saved and number == saved["stage"]:
            start = saved["iteration"]
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                baselines.restore(optimizer, state)
        fixed = stage.step is supervised_step or stage.step is reciprocal_step and cfg.feedback != "shuffled"
        step = devices.graphed(stage.step, device) if cfg.graph and fixed else stage.step
        bar = tqdm(range(start, stage.iterations), stage.name, stage.iterations, initial=start, disable=QUIET)
        for iteration in bar:
            lr = learning_rate(cfg, iteration, stage.iterations)
            for net, optimizer in zip(trained, optimizers, strict=True):
                if isinstance(net, VNet):
                    optimizer.param_groups[0]["lr"] = lr
            reseed(cfg.seed, number, iteration + 1, devices.RANK)  # + 1: with 0 it would be the weights' seed
            batch = make_batch(cfg, dataset, number, stage, iteration, device)
            with devices.autocast(cfg.amp, device):
                scalars = step(trained, optimizers, batch, cfg)
            done = iteration + 1
            pending.append(dict(stage=stage.name, iteration=done, lr=lr, cases=batch["cases"]) | scalars)
            due = [every for every in ("log", "eval", "save")
                   if done % getattr(cfg, every + "_every") == 0 or done == stage.iterations]
            halt = devices.anywhere(bool(stopped), ask=done % cfg.log_every == 0 or done == stage.iterations)
            due += ["save"] * halt
            if not due:
                continue
            devices.average_buffers(trained)
            lines, pending = record.read_scalars(pending), []  # now and then only: reading waits for the device
            if "eval" in due:
                dice = curve_point(cfg, dataset, {name: nets[name] for name in stage.nets if name in NETWORKS})
                lines.append(dict(stage=stage.name, iteration=done, dice=dice))
            if devices.RANK == 0:
                record.append_log(run / "log.jsonl", lines, lasting="save" in due)
                text = record.progress(lines)
                bar.set_postfix_str(text)
                if QUIET and ("eval" in due or done % (cfg.log_every * 20) == 0):
                    print(f"{stage.name} {done}/{stage.iterations}  {text}", flush=True)
                if "save" in due:
                    record.save(run / "checkpoint.pt", asdict(cfg), dataset, nets, stage=number, iteration=done,
                                optimizers=[optimizer.state_dict() for optimizer in optimizers])
            if halt and stopped:
                return
            if halt:  # another rank was told to stop
                raise KeyboardInterrupt


# ---- the report ---------------------------------------------------------------------------------------------------

def curve_point(cfg: Config, dataset: data.Dataset, nets: dict[str, VNet]) -> dict[str, float]:
    """Mean foreground Dice of each network on a few scored cases, with windows side by side. It is looked at and never
    chosen by: the last checkpoint is the result."""
    cases = (dataset.scored("test") or dataset.scored("transductive"))[: cfg.eval_cases]
    means, cfg = {}, replace(cfg, stride=cfg.patch)
    for name, net in nets.items():
        device, dice = next(net.eval().parameters()).device, []
        for case in (case.to(device) for case in devices.mine(cases)):
            label = predict_label(net, case, cfg)
            dice.append([metrics.dice(label == value, case.label == value) for value in range(1, len(dataset.classes))])
        net.train()
        known = [value for case in devices.gather(dice) for value in case if value == value]  # NaN: in neither
        if known:
            means[name] = float(np.mean(known))
    return means


def test(cfg: Config, dataset: data.Dataset, nets: dict[str, VNet], run: Path) -> list[dict]:
    """Predict and score every case that training has not seen with its label, by student and teacher: rows of metrics.
    The student's predictions go to predictions/ (test) and transductive/. Test cases take the stride of the Config, the
    many transductive ones windows side by side."""
    device, rows = next(nets["student"].parameters()).device, []
    for name, cases, stride in (("test", dataset.test, cfg.stride),
                                ("transductive", dataset.scored("transductive"), cfg.patch)):
        make_folder(run / record.PREDICTED[name])
        scores: list[list[dict]] = []  # a list a case
        for case in tqdm(devices.mine(cases), f"{name} cases", disable=QUIET):
            case, spacing = case.to(device), case.spacing if cfg.spacing == "mm" else None
            scores.append([])
            for network, net in nets.items() if case.label is not None else [("student", nets["student"])]:
                label = predict_label(net.eval(), case, replace(cfg, stride=stride))
                if case.label is not None:
                    found = metrics.score_classes(label, case.label, dataset.classes, spacing)
                    scores[-1] += [dict(set=name, network=network, case=case.name) | row for row in found]
                if network == "student":
                    write_label(run / record.PREDICTED[name] / f"{case.name}.nii.gz", label.cpu(), case.affine)
        rows += itertools.chain(*devices.gather(scores))
    return rows


# ---- the command line ---------------------------------------------------------------------------------------------

# What may change when a run goes on: its length, where it runs, how it predicts and scores; not how it trains.
RESUMABLE = ("root", "iterations", "device", "compile", "graph", "windows", "stride", "largest_component", "spacing",
             "log_every", "save_every")


def train_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", metavar="RUN", type=Path, help="go on with this run")
    add_flags(parser, Config)
    return parser


def config_of(values: dict, source: Path | str = "flags") -> Config:
    """A checked Config from flags or JSON, where tuples are lists."""
    try:
        return Config(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}).check()
    except TypeError as error:
        raise BadInput(f"{source}: not the config of a run of this version ({error})") from None


def configure(flags: dict) -> Config:
    """The recipe's values, over them the preset's, over them the flags."""
    recipe = data.RECIPES.get(flags.get("data", Config.data), data.RECIPES["folder"])
    return config_of(recipe | PRESETS[flags.get("preset", Config.preset)] | flags)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["predict"]:
        return predict(arguments[1:])
    flags = vars(train_parser().parse_args(arguments))
    run, saved = flags.pop("resume"), None
    with contextlib.ExitStack() as folder:
        cfg = config_of(record.read_config(run) | flags, run) if run else configure(flags)
        if run:
            if fixed := [name for name in flags if name not in RESUMABLE]:
                raise BadInput(f"--{fixed[0].replace('_', '-')} cannot change in a resumed run; start a new one")
            folder.enter_context(record.occupied(run))
            saved = record.load_progress(run, asdict(cfg), RESUMABLE)
            if saved and saved["iteration"] > stages(cfg)[saved["stage"]].iterations:
                raise BadInput(f"--iterations {cfg.iterations}: the run is at {saved['iteration']} already")
            if saved and saved["config"]["iterations"] != cfg.iterations and devices.RANK == 0:
                print(f"It goes on as a run of {cfg.iterations} iterations would: learning rates and ramps may jump.")
        device = settle(cfg.device, cfg.amp, cfg.deterministic, [cfg.patch[0] >> n for n in range(cfg.depth + 1)])
        folder.enter_context(devices.company(device))
        if cfg.sync_norm and devices.WORLD > 1 and device.type != "cuda":
            raise BadInput("--sync-norm: on GPUs alone; leave it out")

        dataset = data.load(cfg.data, cfg.root, cfg.labeled, cfg.holdout, cfg.normalize, cfg.window).to(device)
        if cfg.method != "supervised" and not dataset.unlabeled:
            raise BadInput("no unlabeled case to learn from: lower --labeled, or choose --method supervised")
        nets = networks(cfg, dataset, device, saved)
        run = run or folder.enter_context(record.occupied(devices.first(lambda: record.new_run(asdict(cfg)))))
        if devices.RANK == 0:
            print(dataset, flush=True)
            record.describe(run, asdict(cfg), dataset, device)
            record.rewind_log(run / "log.jsonl", [stage.name for stage in stages(cfg)], saved)
        if cfg.compile:
            shape = cfg.batch_u // devices.WORLD, dataset.channels, *cfg.patch
            devices.compile_all([net for net in nets.values() if isinstance(net, VNet)], shape, cfg.amp)
        with record.patience() as stopped:
            train(cfg, dataset, nets, run, saved, stopped)
        rows = test(cfg, dataset, {name: net for name, net in nets.items() if name in NETWORKS}, run)
        if devices.RANK == 0:
            record.save(run / "student.pt", asdict(cfg), dataset, {"student": nets["student"]})
            record.conclude(asdict(cfg), dataset, rows, run)


def predict(arguments: list[str]) -> None:
    parser = Parser(prog="reciprocal.py predict", description="Segment NIfTI images with a trained network.")
    parser.add_argument("-i", "--input", required=True, type=Path, help="a NIfTI file or a folder of them")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder of the predicted labels")
    parser.add_argument("--checkpoint", required=True, type=Path, help="a run's folder, student.pt or checkpoint.pt")
    parser.add_argument("--network", default="student", choices=NETWORKS, help="default: student")
    add_flags(parser, Config, "device", "amp", "stride", "windows", "largest_component")
    flags = vars(parser.parse_args(arguments))
    source, target, checkpoint, network = (flags.pop(n) for n in ("input", "output", "checkpoint", "network"))
    saved = record.load_checkpoint(checkpoint)
    cfg = config_of(saved["config"] | flags, checkpoint)
    device = settle(cfg.device, cfg.amp)
    net = build(cfg, network, saved["channels"], len(saved["classes"]))
    record.load_weights(net, saved, network, checkpoint)
    net = net.to(device, memory_format=torch.channels_last_3d).eval()
    images = data.find_images(source)
    if any((target / f"{name}.nii.gz").resolve() == path.resolve() for name, paths in images.items() for path in paths):
        raise BadInput(f"-o {target}: predictions would overwrite the images there; choose another folder")
    if target.name.endswith((".nii", ".nii.gz")):
        raise BadInput(f"-o {target}: give the folder of the predictions; each is named as its image")
    make_folder(target)
    failed = []
    for name, paths in tqdm(images.items(), "predicting", disable=QUIET):
        try:
            case = data.read_case(name, paths, None, saved["classes"], cfg.normalize, cfg.window)
            if len(case.image) != saved["channels"]:
                raise BadInput(f"{paths[0]}: {len(case.image)} channels, the network takes {saved['channels']}")
            label = predict_label(net, case.to(device), cfg)
            write_label(target / f"{name}.nii.gz", label.cpu(), case.affine)
        except BadInput as error:
            failed.append(str(error))
    print(f"{len(images) - len(failed)} of {len(images)} images predicted into {target}")
    if failed:
        raise BadInput(f"{len(failed)} failed: " + "; ".join(failed))


if __name__ == "__main__":
    sys.exit(cli(lambda: main(sys.argv[1:])))
