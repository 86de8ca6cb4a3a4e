"""What made step-h100.txt: PYTHONPATH=. python results/bench/step.py

Milliseconds of a step of the default preset and of a supervised one (4 patches) as CUDA graphs, and where they go."""

import collections
import time

import torch
from torch.profiler import ProfilerActivity, profile

import devices
import reciprocal

device, cfg = devices.settle("cuda"), reciprocal.Config()
nets = [reciprocal.VNet(1, 2).to(device, memory_format=torch.channels_last_3d).train() for _ in range(2)]
optimizers = [reciprocal.make_optimizer(cfg, net) for net in nets]
batch = {name: torch.randn(2, 1, *cfg.patch, device=device).to(memory_format=torch.channels_last_3d)
         for name in ("x_l", "x_u", "x_s")}
batch |= {name: (torch.rand(2, *cfg.patch, device=device) > 0.7).byte() for name in ("y_l", "y_s")}
four = dict(x_l=torch.cat([batch["x_l"], batch["x_u"]]), y_l=torch.cat([batch["y_l"], batch["y_s"]]))
for name, step, n, patches in (("reciprocal", reciprocal.reciprocal_step, 2, batch),
                               ("supervised", reciprocal.supervised_step, 1, four)):
    graph, arguments = devices.graphed(step, device), (nets[:n], optimizers[:n], patches, cfg)
    with devices.autocast("bf16", device):
        for _ in range(5):
            graph(*arguments)
        torch.cuda.synchronize()
        start = time.time()
        for _ in range(10):
            graph(*arguments)
        torch.cuda.synchronize()
        print(name, "graph ms", (time.time() - start) * 100)
        del graph
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            for _ in range(2):
                step(*arguments)
            torch.cuda.synchronize()
    times, counts = collections.Counter(), collections.Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.self_device_time_total
            counts[event.name] += 1
    print(name, "GPU ms a step", sum(times.values()) / 2000, "kernels", sum(counts.values()) / 2)
    for kernel, took in times.most_common(45):
        print(f"{took / 2000:9.3f} ms {counts[kernel] / 2:7.1f}  {kernel[:150]}")
