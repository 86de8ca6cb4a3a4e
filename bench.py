"""Times that mean something: peers and ours in one interleaved run, after a check that they agree.

    python bench.py train      the reciprocal step: the authors' formulation against ours
    python bench.py dice       softmax + cross-entropy + Dice, forward and backward, against eager, compiled, MONAI
    python bench.py surface    Dice, Jaccard, ASD and 95HD of a pair of masks against MedPy, SciPy, CuPy, DisTorch
    python bench.py train --patch 112 112 80 --json train.json

Every round times each contestant once, so that whatever else the machine does hits all of them; the table shows the
median with the 20% and 80% quantiles and the ratio to the first row. Only ratios travel between machines. Peers that
are not installed are left out; where there is no GPU the rows are the CPU's.
"""

import argparse
import copy
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

import data
import devices
import metrics
import reciprocal
import record
from cli import BadInput, Parser, cli
from kernels.dice import dice_ce, reference


def interleave(contestants: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> list[dict]:
    """Milliseconds of a call of each contestant, all of them in turn each round, after one round to warm up. On a
    GPU a turn is 20 calls, so that waiting for the last of them does not count."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    calls = 20 if device.type == "cuda" else 1
    for turn in range(rounds + 1):
        for name, call in contestants.items():
            wait(device)
            start = time.perf_counter()
            for _ in range(calls):
                call()
            wait(device)
            if turn:
                times[name].append(1000 * (time.perf_counter() - start) / calls)
    first = np.median(next(iter(times.values())))
    return [dict(name=name, ms=float(np.median(t)), low=float(np.quantile(t, 0.2)), high=float(np.quantile(t, 0.8)),
                 ratio=float(np.median(t) / first)) for name, t in times.items()]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def authors_step(nets, optimizers, batch, cfg) -> dict:
    """The step as the authors' code performs it: four forward and four backward passes, the teacher's losses one
    backward each, every set of gradients copied, the feedback read back to the host."""
    (teacher, student), (t_optimizer, s_optimizer) = nets, optimizers

    def gradients(net, loss, retain=False):
        net.zero_grad()
        loss.backward(retain_graph=retain)
        return copy.deepcopy([p.grad for p in net.parameters()])

    t_logits_u = teacher(batch["x_u"])
    pseudo_label = t_logits_u.detach().argmax(1)
    g_u = gradients(student, F.cross_entropy(student(batch["x_u"]), pseudo_label))
    s_optimizer.step()
    g_l = gradients(student, F.cross_entropy(student(batch["x_l"]), batch["y_l"].long()))
    h = cfg.lr * sum((u * v).sum().item() for u, v in zip(g_u, g_l, strict=True))
    g_t = gradients(teacher, F.cross_entropy(teacher(batch["x_l"]), batch["y_l"].long()))
    g_h = gradients(teacher, h * F.cross_entropy(t_logits_u, pseudo_label))
    for p, one, other in zip(teacher.parameters(), g_t, g_h, strict=True):
        p.grad = one + other
    t_optimizer.step()
    return {"feedback": torch.tensor(h)}


def train(args) -> list[dict]:
    """Both formulations of the `--preset paper` step, from the same weights on the same patches."""
    cfg = reciprocal.Config(**reciprocal.PRESETS["paper"], filters=args.filters, depth=args.depth,
                            patch=tuple(args.patch), batch_l=args.batch, batch_u=args.batch, dropout=False).check()
    torch.manual_seed(0)
    start = [reciprocal.VNet(1, 2, cfg.filters, cfg.depth).train() for _ in range(2)]
    batch = dict(x_l=torch.randn(cfg.batch_l, 1, *cfg.patch), x_u=torch.randn(cfg.batch_u, 1, *cfg.patch))
    batch["y_l"] = (F.avg_pool3d(batch["x_l"], 5, 1, 2)[:, 0] > 0).byte()

    def contestant(step, memory_format):
        nets = [copy.deepcopy(net).to(args.device, memory_format=memory_format) for net in start]
        optimizers = [reciprocal.make_optimizer(cfg, net) for net in nets]
        there = {name: x.to(args.device, memory_format=memory_format if x.ndim == 5 else torch.contiguous_format)
                 for name, x in batch.items()}
        return lambda: step(nets, optimizers, there, cfg)["feedback"]

    contestants = {
        "authors' formulation": contestant(authors_step, torch.contiguous_format),
        "ours, contiguous": contestant(reciprocal.reciprocal_step, torch.contiguous_format),
        "ours": contestant(reciprocal.reciprocal_step, torch.channels_last_3d),
    }
    first = [call().item() for call in contestants.values()]
    if not np.allclose(first, first[0], rtol=1e-2):
        raise BadInput(f"the formulations disagree on the first feedback: {first}; nothing is timed")
    return interleave(contestants, args.rounds, args.device)


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def eager_loss(logits, label):
    """Cross-entropy + Dice as the left-atrium literature writes them, a class at a time."""
    probs, dice = logits.softmax(1), 0
    for c in range(1, logits.shape[1]):
        p, t = probs[:, c], (label == c).float()
        dice += 1 - (2 * (p * t).sum() + 1e-5) / ((p * p).sum() + (t * t).sum() + 1e-5)
    return 0.5 * F.cross_entropy(logits, label.long()) + 0.5 * dice / (logits.shape[1] - 1)


def dice(args) -> list[dict]:
    """Forward + backward. The floor is the fewest bytes (kernels/dice.py counts them) at the speed of a plain copy."""
    torch.manual_seed(0)
    shape = (args.batch, args.classes, *args.patch)
    logits = torch.randn(shape, device=args.device, dtype=getattr(torch, args.dtype), requires_grad=True)
    label = torch.randint(args.classes, shape[:1] + shape[2:], device=args.device, dtype=torch.uint8)
    losses = {"eager, as in the literature": eager_loss, "reference": reference}
    if args.device.type == "cuda":
        losses |= {"torch.compile of the reference": torch.compile(reference), "ours": dice_ce}
    if installed("monai"):
        from monai.losses import DiceCELoss

        monai = DiceCELoss(softmax=True, to_onehot_y=True, lambda_dice=0.5, lambda_ce=0.5)
        losses["MONAI DiceCELoss (another form)"] = lambda logits, label: monai(logits, label[:, None].long())

    def both(loss):
        return lambda: torch.autograd.grad(loss(logits, label), logits)[0]

    expected = both(reference)().float()
    for name in ("eager, as in the literature", "ours"):
        if name in losses and not torch.allclose(both(losses[name])().float(), expected, rtol=1e-2,
                                                 atol=1e-3 * expected.abs().max().item()):
            raise BadInput(f"{name}: another gradient than the reference; nothing is timed")
    rows = interleave({name: both(loss) for name, loss in losses.items()}, args.rounds, args.device)
    moved = label.numel() * (3 * args.classes * logits.element_size() + 2 * label.element_size())
    source = torch.empty(2**26, device=args.device)
    sink = torch.empty_like(source)
    (copied,) = interleave({"copy": lambda: sink.copy_(source)}, args.rounds, args.device)
    floor = moved / (8 * source.numel() / copied["ms"])
    for row, loss in zip(rows, losses.values(), strict=True):
        row |= dict(gb_per_s=moved / row["ms"] / 1e6, share_of_floor=floor / row["ms"])
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            both(loss)()
            beyond = torch.cuda.max_memory_allocated() - before - logits.numel() * logits.element_size()
            row["mb_beyond_gradient"] = beyond / 1e6
    return rows


def blobs(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Two irregular masks that mostly agree, as a prediction and a label do; synthetic."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    fields = [ndimage.gaussian_filter(rng.standard_normal(shape), 6) for _ in range(2)]
    rough, other = (field / field.std() for field in fields)
    ball = (grid**2).sum(0) + 0.1 * rough
    return ball + 0.04 * other < 0.45, ball < 0.45


def by_scipy(prediction, label) -> dict:
    """The definitions by SciPy's distance transform on the masks' common box."""
    box = ndimage.find_objects((prediction | label).astype(int))[0]
    masks = [np.pad(mask[box], 1) for mask in (prediction, label)]
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in masks]
    there, back = (ndimage.distance_transform_edt(~b)[a] for a, b in (surfaces, surfaces[::-1]))
    return dict(asd=there.mean(), hd95=np.percentile(np.concatenate([there, back]), 95))


def surface(args) -> list[dict]:
    prediction, label = blobs(tuple(args.patch))
    contestants = {"SciPy distance transform on the box": lambda: by_scipy(prediction, label),
                   "ours, CPU": lambda: metrics.score(prediction, label)}
    if installed("medpy"):
        from medpy.metric import binary

        contestants = {"MedPy": lambda: dict(dice=binary.dc(prediction, label), jaccard=binary.jc(prediction, label),
                                             asd=binary.asd(prediction, label),
                                             hd95=binary.hd95(prediction, label))} | contestants
    if args.device.type == "cuda":
        there = [torch.from_numpy(mask).to(args.device) for mask in (prediction, label)]
        contestants["ours, GPU"] = lambda: metrics.score(*there)
        if installed("cupy"):
            import cupy
            from cupyx.scipy import ndimage as gpu

            masks = [cupy.asarray(mask) for mask in (prediction, label)]

            def by_cupy():
                surfaces = [mask & ~gpu.binary_erosion(mask) for mask in masks]
                near = [gpu.distance_transform_edt(~b)[a] for a, b in (surfaces, surfaces[::-1])]
                return dict(asd=float(near[0].mean()), hd95=float(cupy.percentile(cupy.concatenate(near), 95)))

            contestants["CuPy distance transform"] = by_cupy
        if installed("distorch"):
            from distorch.metrics import boundary_metrics

            contestants["DisTorch (percentiles not pooled)"] = lambda: boundary_metrics(*(m[None] for m in there))
    expected = by_scipy(prediction, label)
    for name, call in contestants.items():
        if "DisTorch" not in name and any(abs(call()[key] - value) > 1e-9 for key, value in expected.items()):
            raise BadInput(f"{name}: another distance than SciPy's; nothing is timed")
    return interleave(contestants, args.rounds, args.device)


BENCHES = {"train": train, "dice": dice, "surface": surface}
SIZES = {"train": (64, 64, 48), "dice": (112, 112, 80), "surface": (190, 140, 88)}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--device", type=devices.settle, default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the table, the arguments and the environment to this file")
    parser.add_argument("--patch", type=int, nargs=3, help=f"voxels a side (default: {SIZES})")
    parser.add_argument("--batch", type=int, help="patches (default: 2 labeled + 2 unlabeled for train, 4 for dice)")
    parser.add_argument("--classes", type=int, default=2, help="for dice")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="for dice")
    parser.add_argument("--filters", type=int, default=16, help="for train")
    parser.add_argument("--depth", type=int, default=4, help="for train")
    args = parser.parse_args()
    args.patch = args.patch or SIZES[args.bench]
    args.batch = args.batch or {"train": 2, "dice": 4}.get(args.bench)
    rows = BENCHES[args.bench](args)
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        more = "".join(f"  {name} {row[name]:.2f}" for name in list(row)[5:])
        print(f"{row['name']:{width}}  {row['ms']:10.3f} ms  [{row['low']:.3f}, {row['high']:.3f}]  "
              f"ratio {row['ratio']:.3f}{more}")
    if args.json:
        arguments = {name: str(value) for name, value in vars(args).items()}
        result = dict(arguments=arguments, environment=record.environment(args.device), rows=rows)
        data.write(args.json, json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(cli(main))
