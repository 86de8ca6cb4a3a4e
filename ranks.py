"""More than one GPU: what the processes of torchrun share. In a single process every function is the identity.

    torchrun --nproc-per-node 2 reciprocal.py --data la --labeled 0.2

A rank trains on its share of each batch; gradients are averaged over the ranks before anything is made of them, and
the Dice loss adds up the ranks' sums, so that any number of ranks computes what one would. Random numbers belong to a
sample and not to a rank, so a run may go on with another number of ranks. (DistributedDataParallel averages in hooks
of `backward`, which `torch.autograd.grad`, and so the feedback, never calls: here the same all-reduce is explicit.)
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

RANK, WORLD, LOCAL = (int(os.environ.get(name, default)) for name, default in
                      (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def join(device: torch.device) -> None:
    """Meet the other ranks. One that is gone is noticed within the timeout."""
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=100))


def group():
    return dist.group.WORLD if dist.is_initialized() else None


def first(make: Callable):
    """What the first rank makes, on all of them."""
    made = [make() if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(made)
    return made[0]


def mine(items: Sequence) -> Sequence:
    """This rank's share: every WORLD-th, from its own number on."""
    return items[RANK::WORLD]


def gather(items: list) -> list:
    """The shares of all ranks in the order that `mine` took them from."""
    if WORLD == 1:
        return items
    shares: list = [None] * WORLD
    dist.all_gather_object(shares, items)
    return [shares[i % WORLD][i // WORLD] for i in range(sum(map(len, shares)))]


def average(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """The mean over the ranks, all tensors in one message: 4 bytes a weight."""
    if WORLD == 1:
        return gradients
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = (flat / WORLD).split([gradient.numel() for gradient in gradients])
    return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]


def average_buffers(nets: Sequence[nn.Module]) -> None:
    """Batch norm's running statistics, which each rank has of its own patches, become those of all."""
    buffers = [buffer for net in nets for buffer in net.buffers() if buffer.is_floating_point()]
    for buffer, mean in zip(buffers, average(buffers), strict=True):
        buffer.copy_(mean)
