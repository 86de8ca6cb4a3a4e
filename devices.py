"""Where a run computes: its device, precision, layout and compiler, and the ranks of torchrun on several GPUs.

    torchrun --nproc-per-node 2 reciprocal.py --data la --labeled 0.2
"""

import contextlib
import copy
import functools
import os
import re
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cli import BadInput
from kernels.conv import convolve
from kernels.norm import norm_relu

RANK, WORLD, LOCAL = (int(os.environ.get(name, default)) for name, default in
                      (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


# ---- one device -----------------------------------------------------------------------------------------------------

def settle(name: str, amp: str = "off", deterministic: bool = False, sides: Sequence[int] = (24,)) -> torch.device:
    """The device of a flag, ready to compute; BadInput where it is not there, or convolves volumes of these first sides
    wrongly in bf16."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{LOCAL}" if name == "cuda" else name)
        torch.empty(1, device=device).tolist()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where the messages between ranks go through
    except (RuntimeError, AssertionError):
        raise BadInput(f"--device {name}: not available here; `--device cpu` always is") from None
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic  # the fastest algorithms for shapes that do not change
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    if not all(bf16_is_right(amp, device, side) for side in sides):
        newer = f", or a newer cuDNN than {torch.backends.cudnn.version()}: 9.15 is right" * (device.type == "cuda")
        raise BadInput(f"bf16 convolutions of this network come out wrong here: choose --amp off{newer}")
    return device


def autocast(amp: str, device: torch.device):
    """Autocast to bf16 where asked for; "auto" is on CUDA alone: of CPUs only those with bf16 instructions (AMX or
    AVX512_BF16) are faster in it than in float32, others many times as slow, as are GPUs that only emulate it."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = amp == "bf16" or amp == "auto" and native
    # Without the cache of cast weights: within one step the exam would still see the student from before the lesson.
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)


def bf16_is_right(amp: str, device: torch.device, side: int) -> bool:
    """Whether a convolution under this autocast and its gradients are those of float32, but for rounding. Some versions
    of cuDNN (9.8 to 9.10) get them wrong in bf16 without a word, and oneDNN 3.12, on CPUs with AVX512_BF16 but no AMX,
    the weight's gradient where the first side of a volume is 2."""
    x, weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(
        device, memory_format=torch.channels_last_3d).requires_grad_()
        for shape in ((2, 16, side, 24, 16), (16, 16, 3, 3, 3)))

    def convolution() -> tuple[Tensor, ...]:
        y = nn.functional.conv3d(x, weight, padding=1).float()
        return y, *torch.autograd.grad(y.square().sum(), (x, weight))

    expected = convolution()
    with autocast(amp, device):
        found = convolution()
    return all(bool((one - other).norm() < 0.02 * other.norm())  # 8 bits: 0.003
               for one, other in zip(found, expected, strict=True))


class Unit(nn.Sequential):
    """Convolution, batch normalization, ReLU. On a GPU the last two, and the convolution's bias with them, are one
    function of Triton kernels, convolutions of few channels another; a compiler, or batch norm over several GPUs, takes
    the three as they are."""

    def __init__(self, conv: nn.Conv3d | nn.ConvTranspose3d):
        if (conv.kernel_size[0], conv.stride[0], conv.padding[0]) not in ((3, 1, 1), (2, 2, 0)):
            raise ValueError(f"{conv}: 3x3x3 with padding 1, or 2x2x2 with stride 2")
        super().__init__(conv, nn.BatchNorm3d(conv.out_channels), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, _ = self
        if not x.is_cuda or torch.compiler.is_compiling() or type(norm) is not nn.BatchNorm3d:
            return super().forward(x)
        x = convolve(x, conv.weight, conv.transposed)
        exam = norm.training and not norm.track_running_stats
        running = (None, None) if exam else (norm.running_mean, norm.running_var)
        # num_batches_tracked is left out: nothing reads it, and it would be a launch for each layer
        return norm_relu(x, conv.bias, norm.weight, norm.bias, *running, norm.training, norm.momentum, norm.eps)


class Pointwise(nn.Conv3d):
    """A convolution of 1x1x1, on a CPU in channels_last as the matrix product that it is: with one thread PyTorch's own
    leaves that layout, and what comes before it is the slower for that, forward and back. (Compiled, it does not.)"""

    def forward(self, x: Tensor) -> Tensor:
        layout = x.is_cpu and x.is_contiguous(memory_format=torch.channels_last_3d)
        if layout and not torch.compiler.is_compiling():
            return nn.functional.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)
        return super().forward(x)


def compile_all(nets: list[nn.Module], shape: tuple[int, ...], amp: str) -> None:
    """torch.compile of networks that are alike, for patches (B, C, D, H, W); or a line that says why not. A copy tries
    it first, forward and back: the compiler of a machine may be missing."""
    trial, device = copy.deepcopy(nets[0]).train(), next(nets[0].parameters()).device
    trial.compile()
    try:
        with autocast(amp, device):
            patches = torch.zeros(shape, device=device).to(memory_format=torch.channels_last_3d)
            trial(patches).float().sum().backward()
    except Exception as error:  # noqa: BLE001  whatever it is, an uncompiled network trains
        print(f"--compile is left out, it fails here: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        return
    for net in nets:
        net.compile()


def graphed(step: Callable, device: torch.device) -> Callable:
    """The step as a `Graph` on a GPU; on a CPU, and among several ranks, as it is."""
    return Graph(step) if device.type == "cuda" and WORLD == 1 else step


class Aside:
    """A second queue of a GPU. What is called under `with` follows what was called before the Aside was made, and what
    went this way before, but does not see what the first queue computes meanwhile; `join` has the first queue wait for
    it, and must be the last that a step does with an Aside. In between the GPU computes both queues at once, and small
    kernels of one fill what the other leaves idle. A tensor that both queues use must live until they are joined, here
    or by the next Aside. On a CPU, and among several ranks, all is done in the order of the text."""

    def __init__(self, device: torch.device):
        self.stream = second_stream(device) if device.type == "cuda" and WORLD == 1 else None
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def __enter__(self):
        self.within = torch.cuda.stream(self.stream)  # of None it is no change
        self.within.__enter__()

    def __exit__(self, *error):
        self.within.__exit__(*error)

    def join(self) -> None:
        if self.stream:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)


@functools.cache
def second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one alone: each has memory of its own


class Graph:
    """A step function as one CUDA graph: the host hands over one launch instead of some thousands, for which the GPU
    would wait. For steps that compute the same whatever the numbers in `batch` beside its tensors.

    The first three steps run as they are, so that optimizers have their states and cuDNN its choices; the next is
    captured, which computes nothing, and from then on replayed with the learning rates and patches of each call, and
    the random numbers that follow from the seed of torch.manual_seed."""

    def __init__(self, step: Callable):
        self.step, self.calls, self.graph = step, 0, torch.cuda.CUDAGraph()
        self.stream = torch.cuda.Stream(priority=-1)  # its kernels go first, those of an Aside fill the gaps

    def __call__(self, nets: list, optimizers: list, batch: dict, cfg) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == 1:
            self.rates = [torch.empty((), device=self.stream.device) for _ in optimizers]
        for rate, optimizer in zip(self.rates, optimizers, strict=True):
            rate.fill_(optimizer.param_groups[0]["lr"])
        if self.calls < 4:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # that captures: autograd stays with the one that a weight met first
                scalars = self.on_device(nets, optimizers, batch, cfg)
            torch.cuda.current_stream().wait_stream(self.stream)
            return scalars
        if self.calls == 4:
            self.inputs = {name: x.clone() for name, x in batch.items() if isinstance(x, Tensor)}
            try:
                with torch.cuda.graph(self.graph, stream=self.stream):
                    self.scalars = self.on_device(nets, optimizers, batch | self.inputs, cfg)
            except RuntimeError as error:
                cause = error.__context__ or error  # what ended the capture, not that it was ended
                if not isinstance(cause, RuntimeError):
                    raise cause from None
                raise BadInput(f"--no-graph is needed here: {str(cause).splitlines()[0]}") from None
        for name, x in self.inputs.items():
            x.copy_(batch[name])
        self.graph.replay()
        return {name: value.clone() for name, value in self.scalars.items()}

    def on_device(self, nets: list, optimizers: list, batch: dict, cfg) -> dict[str, Tensor]:
        """The step with learning rates that a replay reads anew."""
        groups = [optimizer.param_groups[0] for optimizer in optimizers]
        rates = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, self.rates, strict=True):
                group["lr"] = rate
            return self.step(nets, optimizers, batch, cfg)
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate


# ---- the ranks of torchrun ------------------------------------------------------------------------------------------
#
# In a single process every function is the identity. A rank trains on its share of each batch; gradients are averaged
# over the ranks before anything is made of them, and the Dice loss adds up the ranks' sums, so that any number of ranks
# computes what one would. A patch belongs to a sample and not to a rank, so a run may go on with another number of
# ranks; dropout, boxes, and the comparison methods' noise and turns are each rank's own. (DistributedDataParallel
# averages in hooks of `backward`, which `torch.autograd.grad`, and so the feedback, never calls: here the same
# all-reduce is explicit.)

@contextlib.contextmanager
def company(device: torch.device):
    """Among the other ranks. That one of them is gone shows as an error of the next call to it."""
    if WORLD > 1:
        patience = timedelta(hours=1)  # for a rank with one case more; the dead do not keep the others waiting
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    try:
        yield
    except RuntimeError as error:
        if WORLD == 1 or not (isinstance(error, dist.DistError) or re.search("peer|Timed out", str(error))):
            raise
        raise BadInput(f"rank {RANK}: another rank is gone; see what it said, and go on with --resume") from None
    finally:
        if WORLD > 1:
            dist.destroy_process_group()


def group():
    return dist.group.WORLD if dist.is_initialized() else None


def first(make: Callable):
    """What the first rank makes, on all of them."""
    made = [make() if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(made)
    return made[0]


def anywhere(flag: bool, ask: bool) -> bool:
    """Whether the flag is set on any rank, if `ask` (the answer has to be waited for); else none is taken to be."""
    if WORLD == 1 or not ask:
        return flag and WORLD == 1
    asked = torch.tensor(float(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(asked)
    return bool(asked)


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
