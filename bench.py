"""Times that mean something: peers and ours in one interleaved run, after a check that they agree.

    python bench.py train      the reciprocal step: the authors' formulation against ours
    python bench.py infer      sliding windows over one volume: the authors' loop and MONAI's against ours
    python bench.py dice       softmax + cross-entropy + Dice, forward and backward, against eager, compiled, MONAI
    python bench.py norm       batch norm + ReLU, forward and backward, against PyTorch's, eager and compiled (on a GPU)
    python bench.py conv       the 3x3x3 convolution, forward and backward, against cuDNN; for --dtype bfloat16
    python bench.py surface    Dice, Jaccard, ASD and 95HD of a pair of masks against MedPy, SciPy, CuPy, DisTorch

Every round times each contestant once, so that whatever else the machine does hits all of them; the table shows the
median with the 20% and 80% quantiles and the ratio to the first row. Only ratios travel between machines. The peers
are in peers.py; those that are not installed are left out. Data and weights are synthetic.

The floor of `train` and `infer` is arithmetic: the operations of the network's convolutions, counted by PyTorch while
the first row computes (a multiplication and an addition are two), at the rate of a large matrix product in the row's
dtype. That product is timed in the same rounds; the last rows show its time for as many operations. On a GPU float32
means TF32 in both, PyTorch's default for convolutions; the checks are in full float32. A step moves bytes as well,
which this floor leaves out; peak_mb is the GPU memory that a call takes beyond weights, optimizer and input.
The floor of `dice`, `norm` and `conv` is the fewest bytes (their kernels' files count them) at the speed of a copy.
"""

import argparse
import copy
import functools
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch.optim.swa_utils import update_bn
from torch.utils.flop_counter import FlopCounterMode

import data
import devices
import metrics
import peers
import reciprocal
import record
from cli import BadInput, Parser, cli, write
from kernels import conv, norm
from kernels.dice import dice_ce, reference
from kernels.surface import surface_scores

Contestant = tuple[Callable[[], object], torch.dtype]  # what is timed, and what its floor is counted in
AMP = {torch.float32: "off", torch.bfloat16: "bf16"}
COMPILED = "ours, compiled"
installed = importlib.util.find_spec  # None where a package is not


def interleave(contestants: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> list[dict]:
    """Milliseconds of a call of each contestant, all of them in turn each round, after two rounds to warm up. A turn
    is as many calls as take 0.2 s, 20 at most, so that on a GPU waiting for the last of them does not count."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    calls = dict.fromkeys(contestants, 1)
    wait = dict(cuda=lambda: torch.cuda.synchronize(device), mps=torch.mps.synchronize).get(device.type, lambda: None)
    for turn in range(-2, rounds):
        for name, call in contestants.items():
            wait()
            start = time.perf_counter()
            for _ in range(calls[name]):
                call()
            wait()
            took = 1000 * (time.perf_counter() - start) / calls[name]
            if turn < 0:
                calls[name] = int(np.clip(200 / took, 1, 20))
            else:
                times[name].append(took)
    first = np.median(next(iter(times.values())))
    return [dict(name=name, ms=float(np.median(t)), low=float(np.quantile(t, 0.2)), high=float(np.quantile(t, 0.8)),
                 ratio=float(np.median(t) / first)) for name, t in times.items()]


def attempt(name: str, call: Callable[[], object], optional: bool):
    """The first call of a contestant; None, and a line that says so, where an optional one fails."""
    try:
        return call()
    except Exception as error:  # whatever stops it, the others are timed
        if not optional:
            raise
        print(f"{name}: left out, {(str(error) or repr(error)).splitlines()[0]}")


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """A call as a CUDA graph: the time of the GPU, without the host's, which hands it over kernel by kernel."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call()  # compiles what has to be compiled
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def memory(call: Callable[[], object]) -> float:
    """GPU memory in MB that a call takes at most beyond what lies there before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def above_floor(contestants: dict[str, Contestant], flops: int, samples: int, args) -> list[dict]:
    """`interleave` for calls of so many operations and samples, with the floor of each dtype in the last rows."""
    torch.backends.cudnn.allow_tf32 = True
    side = 8192 if args.device.type == "cuda" else 1024  # some CPUs take seconds for that in bf16
    factors = {dtype: torch.randn(side, side, device=args.device, dtype=dtype) for _, dtype in contestants.values()}
    everyone = contestants | {f"floor, {str(dtype)[6:]}": (lambda x=x: x @ x, dtype) for dtype, x in factors.items()}
    rows = interleave({name: call for name, (call, _) in everyone.items()}, args.rounds, args.device)
    floor = {}
    for row, dtype in zip(rows[len(contestants):], factors, strict=True):
        row |= {key: row[key] * flops / (2 * side**3) for key in ("ms", "low", "high", "ratio")}
        floor[dtype] = row["ms"]
    for row, (call, dtype) in zip(rows, everyone.values(), strict=True):
        row |= dict(samples_per_s=1000 * samples / row["ms"], tflop_per_s=flops / row["ms"] / 1e9,
                    share_of_floor=floor[dtype] / row["ms"])
        if args.device.type == "cuda" and row["name"] in contestants and "graph" not in row["name"]:
            row["peak_mb"] = memory(call)  # a graph has its memory from before
    return rows


def train(args) -> list[dict]:
    """Both formulations of the `--preset paper` step, from the same weights on the same patches."""
    cfg = reciprocal.Config(**reciprocal.PRESETS["paper"], filters=args.filters, depth=args.depth,
                            patch=tuple(args.patch), batch_l=args.batch, batch_u=args.batch, dropout=False).check()
    start = [reciprocal.VNet(1, 2, cfg.filters, cfg.depth).train() for _ in range(2)]
    batch = dict(x_l=torch.randn(cfg.batch_l, 1, *cfg.patch), x_u=torch.randn(cfg.batch_u, 1, *cfg.patch))
    batch["y_l"] = (F.avg_pool3d(batch["x_l"], 5, 1, 2)[:, 0] > 0).byte()

    def contestant(step, memory_format, dtype=torch.float32, compiled=False, graph=False) -> Contestant:
        nets = [copy.deepcopy(net).to(args.device, memory_format=memory_format) for net in start]
        optimizers = [reciprocal.make_optimizer(cfg, net) for net in nets]
        there = {name: x.to(args.device, memory_format=memory_format if x.ndim == 5 else torch.contiguous_format)
                 for name, x in batch.items()}
        for net in nets if compiled else ():
            net.compile()
        step = devices.graphed(step, args.device) if graph else step

        def call() -> torch.Tensor:
            with devices.autocast(AMP[dtype], args.device):
                return step(nets, optimizers, there, cfg)["feedback"]

        return call, dtype

    ours = functools.partial(contestant, reciprocal.reciprocal_step, torch.channels_last_3d)
    contestants = {"authors' formulation": contestant(peers.authors_step, torch.contiguous_format),
                   "ours, contiguous": contestant(reciprocal.reciprocal_step, torch.contiguous_format), "ours": ours()}
    best = torch.bfloat16 if args.device.type == "cuda" or args.dtype == "bfloat16" else torch.float32
    if best == torch.bfloat16:
        contestants["ours, bf16"] = ours(best)
    if graph := args.device.type == "cuda":
        contestants["ours, bf16, graph"] = ours(best, graph=True)
    if args.compile:
        contestants[COMPILED + ", graph" * graph] = ours(best, compiled=True, graph=graph)
    with FlopCounterMode(display=False) as counter:
        expected = contestant(peers.authors_step, torch.contiguous_format)[0]().item()
    for name, (call, dtype) in list(contestants.items()):
        feedback = attempt(name, call, optional=name.startswith(COMPILED))
        if feedback is None:
            del contestants[name]
            continue
        if not math.isclose(feedback, expected, rel_tol=5e-2 if dtype == torch.float32 else 0.5):
            raise BadInput(f"{name}: the first feedback is {feedback.item()}, not {expected}; nothing is timed")
        for _ in range(3 * name.endswith("graph")):
            call()  # the fourth call captures: that belongs in no round
    return above_floor(contestants, counter.get_total_flops(), cfg.batch_l + cfg.batch_u, args)


def infer(args) -> list[dict]:
    """The labels of one volume, from the image on the host to the labels on the host. A sample is the volume.

    On one CPU thread PyTorch has a slow way of its own for small convolutions of a single sample: at small sizes most
    of the gain of several windows is that."""
    image = data.pad(F.avg_pool3d(torch.randn(1, *args.volume), 5, 1, 2), args.patch)
    image /= image.std()
    case = data.Case("noise", image, None, None, (1.0, 1.0, 1.0), np.eye(4))
    net = reciprocal.VNet(1, 2, args.filters, args.depth)
    window = image[(..., *map(slice, args.patch))]
    pair = torch.stack([window, window.flip(-1)])
    update_bn([pair], net)
    with torch.no_grad():  # as many voxels of one class as of the other: that labels agree says something then
        net.head.bias -= net.eval()(pair).mean((0, 2, 3, 4))
    ours = copy.deepcopy(net.to(args.device)).to(memory_format=torch.channels_last_3d)

    def segment(windows: int, dtype=torch.float32) -> Contestant:
        cfg = reciprocal.Config(patch=args.patch, stride=args.stride, depth=args.depth, windows=windows,
                                amp=AMP[dtype]).check()
        return lambda: reciprocal.predict_label(ours, case.to(args.device), cfg).cpu().numpy(), dtype

    theirs = functools.partial(peers.authors_segment, net, image.numpy(), args.patch, args.stride)
    several = reciprocal.Config.windows
    contestants = {"authors' loop": (lambda: theirs().argmax(0), torch.float32), "ours, 1 window": segment(1),
                   f"ours, {several} windows": segment(several)}
    if args.device.type == "cuda":
        contestants[f"ours, {several} windows, bf16"] = segment(several, torch.bfloat16)
    if installed("monai"):
        monai = functools.partial(peers.monai_segment, net, image, args.patch, args.stride, several)
        contestants[f"MONAI, {several} windows"] = monai, torch.float32
    with FlopCounterMode(display=False) as counter:
        expected = theirs()
    others = {name: differing(name, call(), expected, 1e-3 if dtype == torch.float32 else 0.3)
              for name, (call, dtype) in contestants.items()}
    rows = above_floor(contestants, counter.get_total_flops(), 1, args)
    for row, n in zip(rows, others.values(), strict=False):  # the floor's rows have none
        row["voxels_differ"] = n
    return rows


def differing(name: str, label: np.ndarray, probs: np.ndarray, tie: float) -> int:
    """How many voxels are labeled otherwise than by the greatest of `probs`; BadInput where that is no tie."""
    second, best = np.sort(probs, 0)[-2:]
    differ = label != probs.argmax(0)
    if wrong := int((differ & ~(best - second <= tie)).sum()):  # NaN is no tie
        raise BadInput(f"{name}: {wrong} of {label.size} voxels have another label; nothing is timed")
    return int(differ.sum())


def against_bytes(args, ours, reference, inputs: tuple, dy, moved: int, checked: int = 1,
                  others: dict[str, tuple[Callable, float]] | None = None) -> list[dict]:
    """A kernel's function, its reference and `others`, forward and backward, gradients of all inputs that want one,
    with the fewest bytes at the speed of a copy as the floor; on a GPU as CUDA graphs, too. Before, the first
    gradients, so many, are compared with the reference's, in relation to whose norm the tolerances are."""
    forms = (others or {}) | {"reference": (reference, math.inf)}
    if args.device.type == "cuda":
        forms |= {"torch.compile of the reference": (torch.compile(reference), math.inf), "ours": (ours, 1e-2)}
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    dys = {name: torch.ones_like(form(*inputs)) if dy is None else dy for name, (form, _) in forms.items()}
    calls = {name: lambda name=name, form=form: torch.autograd.grad(form(*inputs), leaves, dys[name])
             for name, (form, _) in forms.items()}
    expected = [gradient.float() for gradient in calls["reference"]()[:checked]]
    for name, (_, tolerance) in forms.items():
        for found, right in zip(calls[name](), expected, strict=False):
            if not (found - right).norm() <= tolerance * right.norm():
                raise BadInput(f"{name}: another gradient than the reference; nothing is timed")
    graphs = {f"{name}, graph": captured(call) for name, call in calls.items() if args.device.type == "cuda"}
    rows = interleave(calls | graphs, args.rounds, args.device)
    source, sink = torch.empty(2, 2**26, device=args.device)
    (copied,) = interleave({"copy": lambda: sink.copy_(source)}, args.rounds, args.device)
    floor = moved * copied["ms"] / (2 * source.nbytes)
    for row in rows:
        row |= dict(gb_per_s=moved / row["ms"] / 1e6, share_of_floor=floor / row["ms"])
        if args.device.type == "cuda" and row["name"] in calls:
            row["mb_beyond_gradient"] = memory(calls[row["name"]]) - leaves[0].nbytes / 1e6
    return rows


def volumes(n: int, args) -> list[torch.Tensor]:
    """Random ones of `--batch` patches and `--filters` channels, channels last."""
    draw = torch.randn(n, args.batch, *args.patch, args.filters, device=args.device, dtype=getattr(torch, args.dtype))
    return list(draw.movedim(-1, 2))


def dice(args) -> list[dict]:
    shape = (args.batch, args.classes, *args.patch)
    logits = torch.randn(shape, device=args.device, dtype=getattr(torch, args.dtype), requires_grad=True)
    label = torch.randint(args.classes, shape[:1] + shape[2:], device=args.device, dtype=torch.uint8)
    # the literature's formulas compute in the dtype of the logits, the others in float32
    others = {"eager, as in the literature": (peers.eager_loss, 1e-2 if args.dtype == "float32" else 0.1)}
    if installed("monai"):
        others["MONAI DiceCELoss (another form)"] = peers.monai_loss, math.inf
    moved = 3 * logits.nbytes + 2 * label.nbytes
    return against_bytes(args, dice_ce, reference, (logits, label), None, moved, others=others)


def normalize(args) -> list[dict]:
    x, dy = volumes(2, args)
    weights = torch.zeros(3, args.filters, device=args.device)  # no offset: to add it in bf16 would be another rounding
    weights[1:].normal_()
    inputs = *(y.requires_grad_() for y in (x, *weights)), None, None, True
    return against_bytes(args, norm.norm_relu, norm.reference, inputs, dy, 8 * x.nbytes)


def convolve(args) -> list[dict]:
    if args.dtype == "float32":
        raise BadInput("--dtype: the kernels of conv are for bfloat16 and float16")
    x, dy = volumes(2, args)
    weight = torch.randn(args.filters, args.filters, 3, 3, 3, device=args.device)
    inputs = x.requires_grad_(), weight.to(memory_format=torch.channels_last_3d).requires_grad_()
    return against_bytes(args, conv.convolve, conv.reference, inputs, dy, 6 * x.nbytes, checked=2)


def blobs(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Two irregular masks that mostly agree, as a prediction and a label do; synthetic."""
    rng = np.random.default_rng(0)
    fields = [ndimage.gaussian_filter(rng.standard_normal(shape), 6) for _ in range(2)]
    rough, other = (field / field.std() for field in fields)
    ball = sum(x**2 for x in np.ix_(*(np.linspace(-1, 1, n) for n in shape))) + 0.1 * rough
    return ball + 0.04 * other < 0.45, ball < 0.45


def surface(args) -> list[dict]:
    if min(args.patch) < 8:
        raise BadInput("--patch: 8 or more, or the masks may be empty")
    masks = blobs(tuple(args.patch))
    pairs = {"cpu": masks, "cuda": [torch.from_numpy(mask).to(args.device) for mask in masks]}
    contestants = {name: functools.partial(function, *pairs[where]) for name, package, function, where in (
        ("MedPy", "medpy", peers.by_medpy, "cpu"),
        ("SciPy distance transform on the box", "scipy", peers.by_scipy, "cpu"),
        ("ours, CPU", "scipy", metrics.score, "cpu"),
        ("ours, GPU", "triton", metrics.score, "cuda"),
        ("CuPy distance transform", "cupy", peers.by_cupy, "cuda"),
        ("DisTorch, float32, percentiles not pooled", "distorch", peers.by_distorch, "cuda"),
    ) if installed(package) and where in ("cpu", args.device.type)}
    expected = peers.by_scipy(*masks)
    for name, call in list(contestants.items()):
        found = attempt(name, call, optional=not name.startswith("ours"))
        if found is None:
            del contestants[name]
            continue
        keys, close = (("asd",), 1e-5) if "DisTorch" in name else (expected, 1e-9)
        if any(not abs(found[key] - expected[key]) <= close for key in keys):
            raise BadInput(f"{name}: another distance than SciPy's; nothing is timed")
    if args.device.type == "cuda":
        contestants["ours, GPU, graph"] = captured(functools.partial(surface_scores, *pairs["cuda"]))
    return interleave(contestants, args.rounds, args.device)


BENCHES = {"train": train, "infer": infer, "dice": dice, "norm": normalize, "conv": convolve, "surface": surface}
SIZES = {"train": dict(patch=(48, 48, 32), batch=2, filters=16),
         "infer": dict(patch=(48, 48, 32), volume=(72, 72, 56), stride=(24, 24, 12), filters=8),
         "dice": dict(patch=(112, 112, 80), batch=4), "norm": dict(patch=(112, 112, 80), batch=4, filters=16),
         "conv": dict(patch=(112, 112, 80), batch=2, filters=16), "surface": dict(patch=(190, 140, 88))}
LEFT_ATRIUM = dict(patch=(112, 112, 80), volume=(190, 140, 88), stride=(18, 18, 4), filters=16)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--device", type=devices.settle, default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the table, the arguments and the environment to this file")
    parser.add_argument("--patch", type=int, nargs=3, help="voxels a side; of the masks for surface")
    parser.add_argument("--volume", type=int, nargs=3, help="voxels a side, for infer")
    parser.add_argument("--stride", type=int, nargs=3, help="for infer")
    parser.add_argument("--batch", type=int, help="patches; so many labeled and so many unlabeled ones for train")
    parser.add_argument("--classes", type=int, default=2, help="for dice")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="for dice, norm and conv; bfloat16 is one row more for train on a CPU")
    parser.add_argument("--filters", type=int, help="for train, infer, norm and conv")
    parser.add_argument("--depth", type=int, default=4, help="for train and infer")
    parser.add_argument("--compile", action="store_true", help="for train: a row with compiled networks")
    args = parser.parse_args()
    on_gpu = args.device.type == "cuda" and args.bench in ("train", "infer")
    for name, size in (SIZES[args.bench] | (LEFT_ATRIUM if on_gpu else {})).items():
        setattr(args, name, size if getattr(args, name) is None else getattr(args, name))
        if np.min(getattr(args, name)) < 1:
            raise BadInput(f"--{name}: 1 or more")
    if args.rounds < 1 or not 2 <= args.classes <= 256:
        raise BadInput("--rounds: 1 or more; --classes: 2 to 256")
    torch.backends.cudnn.allow_tf32 = False  # for the checks
    torch.backends.cuda.matmul.allow_tf32 = True  # for the floors, but from here on: compiled code is compiled for it
    torch.manual_seed(0)
    rows = BENCHES[args.bench](args)
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        more = "".join(f"  {name} {row[name]:.3f}".removesuffix(".000") for name in list(row)[5:])
        print(f"{row['name']:{width}}  {row['ms']:10.3f} ms  [{row['low']:.3f}, {row['high']:.3f}]  "
              f"ratio {row['ratio']:.3f}{more}")
    if args.json:
        about = dict(arguments={k: str(v) for k, v in vars(args).items()}, environment=record.environment(args.device))
        write(args.json, json.dumps(about | dict(rows=rows), indent=1))


if __name__ == "__main__":
    sys.exit(cli(main))
