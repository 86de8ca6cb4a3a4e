"""Times that mean something: peers and ours in one interleaved run, after a check that they agree.

    python bench.py train                   the reciprocal step: the authors' formulation against ours
    python bench.py train --patch 112 112 80 --filters 16 --json out.json

Every round times each contestant once, so that whatever else the machine does hits all of them; the table shows the
median with the 20% and 80% quantiles and the ratio to the first row. Only ratios travel between machines.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import reciprocal
import report
from data import BadInput, Parser


def interleave(contestants: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> list[dict]:
    """Milliseconds of each contestant, one call of each a round, after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, call in contestants.items():
            wait(device)
            start = time.perf_counter()
            call()
            wait(device)
            if turn:
                times[name].append(1000 * (time.perf_counter() - start))
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


BENCHES = {"train": train}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--device", type=reciprocal.pick_device, default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the table, the arguments and the environment to this file")
    parser.add_argument("--patch", type=int, nargs=3, default=(48, 48, 32))
    parser.add_argument("--batch", type=int, default=2, help="labeled and unlabeled patches a step, each")
    parser.add_argument("--filters", type=int, default=16)
    parser.add_argument("--depth", type=int, default=4)
    args = parser.parse_args()
    rows = BENCHES[args.bench](args)
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        print(f"{row['name']:{width}}  {row['ms']:10.2f} ms  [{row['low']:.2f}, {row['high']:.2f}]  {row['ratio']:.2f}")
    if args.json:
        arguments = {name: str(value) for name, value in vars(args).items()}
        result = dict(arguments=arguments, environment=report.environment(args.device), rows=rows)
        data.write(args.json, json.dumps(result, indent=1))


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
