"""What made step-h200.txt (tidied since, not run again on a GPU), in a checkout of commit 6508cec with two older files:

    git show 39c7186:reciprocal.py >old_reciprocal.py; git show 4f112e6^:kernels/dice.py >old_dice.py
    PYTHONPATH=. python results/bench/step-h200.py

Milliseconds of a step as a CUDA graph, the parts of its design put in one by one ("prio": what is now in devices.Graph;
SUMMED is of norm.py as it was), and microseconds of Dice, forward and backward, and forward alone ("fwd")."""

import contextlib
import statistics
import time

import old_dice
import old_reciprocal
import torch

import bench
import devices
import reciprocal
from kernels import dice, norm

start, device, size = time.time(), devices.settle("cuda"), (112, 112, 80)
print(torch.cuda.get_device_name(), torch.__version__, flush=True)
torch.manual_seed(0)
batch = {name: torch.randn(2, 1, *size, device=device).to(memory_format=torch.channels_last_3d)
         for name in ("x_l", "x_u", "x_s")}
batch |= {name: (torch.rand(2, *size, device=device) > 0.7).byte() for name in ("y_l", "y_s")}
four = dict(x_l=torch.cat([batch["x_l"], batch["x_u"]]), y_l=torch.cat([batch["y_l"], batch["y_s"]]))
paper = reciprocal.Config(**reciprocal.PRESETS["paper"], dropout=False)
strong = reciprocal.Config()
new, old, supervised = reciprocal.reciprocal_step, old_reciprocal.reciprocal_step, reciprocal.supervised_step


class NoAside(contextlib.nullcontext):
    def join(self):
        pass


@contextlib.contextmanager
def patched(*patches):
    before = [(module, name, getattr(module, name)) for module, name, _ in patches]
    for module, name, value in patches:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def run(name, step, cfg, *patches, prio=0, more=0):
    """Prints the time of a replay; or, after so many `more`, returns all weights, statistics and scalars."""
    torch.manual_seed(1)
    nets = [reciprocal.VNet(1, 2, dropout=cfg.dropout).train().to(device, memory_format=torch.channels_last_3d)
            for _ in range(1 if step is supervised else 2)]
    optimizers = [reciprocal.make_optimizer(cfg, net) for net in nets]
    data, graph, times = four if step is supervised else batch, devices.graphed(step, device), []
    graph.stream = torch.cuda.Stream(priority=prio)
    with patched(*patches), devices.autocast("bf16", device):
        for seed in range(5 + more):
            torch.manual_seed(seed)
            scalars = graph(nets, optimizers, data, cfg)
        for _ in range(6):
            torch.cuda.synchronize()
            since = time.perf_counter()
            for _ in range(0 if more else 10):
                graph(nets, optimizers, data, cfg)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - since) * 100)
    if more:
        return [x.clone() for net in nets for x in net.state_dict().values()] + list(scalars.values())
    print(f"{name:34s} {statistics.median(times):8.3f} ms  min {min(times):.3f}   mem "
          f"{torch.cuda.max_memory_reserved() / 1e9:.1f} GB  t {time.time() - start:.0f}", flush=True)
    del graph, nets, optimizers
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def rows512(M, C, launch=norm.launch):
    summing, (groups, adding), writing = launch(M, C)
    return summing, (groups, adding | dict(ROWS=512)), writing


one_queue = devices, "Aside", NoAside
run("paper old", old, paper)
run("paper new, one stream", new, paper, one_queue)
run("paper new, two streams", new, paper)
run("paper new, two streams, prio", new, paper, prio=-1)
run("paper two, PARTS 528", new, paper, (norm, "PARTS", 528))
run("paper two, rows 512", new, paper, (norm, "launch", rows512))
run("paper two, SUMMED 4096", new, paper, (norm, "SUMMED", 4096))
run("paper old again", old, paper)
run("strong old", old, strong)
run("strong new, two streams", new, strong)
run("strong new, two streams, prio", new, strong, prio=-1)
run("supervised", supervised, strong)
run("supervised, PARTS 528", supervised, strong, (norm, "PARTS", 528))
run("supervised, rows 512", supervised, strong, (norm, "launch", rows512))
devices.settle("cuda", deterministic=True)
states = [run("", new, strong, *patches, more=8) for patches in ((one_queue,), ())]
print("bits of one stream and two equal:", all(map(torch.equal, *states)), len(states[0]), flush=True)
torch.use_deterministic_algorithms(False)
for dtype, classes in ((torch.bfloat16, 2), (torch.float32, 2), (torch.bfloat16, 14)):
    z = torch.randn(4, classes, *size, device=device, dtype=dtype, requires_grad=True)
    y, one = torch.randint(classes, (4, *size), device=device, dtype=torch.uint8), torch.ones((), device=device)
    calls = {}
    for name, module, blocks in (("old", old_dice, 0), ("new", dice, 0),
                                 *((f"new, {n} blocks", dice, n) for n in (2, 3, 6, 8) if classes == 2)):
        def launch(*shape, base=module.launch, blocks=blocks):
            config, finish = base(*shape)
            return config | (dict(SPAN=config["BLOCK"] * blocks) if blocks else {}), finish

        def both(loss=module.dice_ce, z=z, y=y, one=one):
            torch.autograd.grad(loss(z, y), z, one)

        with patched((module, "launch", launch)):
            calls[name] = bench.captured(both)
            calls[f"{name} fwd"] = bench.captured(torch.no_grad()(lambda loss=module.dice_ce, z=z, y=y: loss(z, y)))
    source, sink = torch.empty(2, 2**26, device=device)
    rows = bench.interleave(calls | {"copy": lambda sink=sink, source=source: sink.copy_(source)}, 3, device)
    times = {row["name"]: 1000 * row["ms"] for row in rows}
    copied = times.pop("copy")
    floor = (3 * z.nbytes + 2 * y.nbytes) * copied / (2 * source.nbytes)
    print(f"dice {dtype} C={classes}: floor {floor:.2f} us, copy {2 * source.nbytes / copied / 1e6:.2f} TB/s  t "
          f"{time.time() - start:.0f}")
    print("   " + "; ".join(f"{name} {took:.2f}" for name, took in times.items()), flush=True)
