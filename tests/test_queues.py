"""The two queues of a step (devices.Aside) do not race: shown without a GPU, by what each of them has waited for."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import devices
import kernels.dice
import reciprocal
from reciprocal import Config, VNet, reciprocal_step


@dataclass
class Memory:
    storage: StorageWeakRef
    home: int  # the queue that asked for it, to which it returns as soon as nothing refers to it
    written: tuple[int, int]  # the queue, and its count then
    read: dict[int, int]  # the last count of each queue that did


class Queues(TorchDispatchMode):
    """Counts the operations of each queue as a GPU would do them. `waited[a][b]` is the count of b that a has waited
    for. `races` has the operations on memory that the other queue may still write, or, to be written, read."""

    def __init__(self):
        super().__init__()
        self.queue, self.waited, self.alive, self.freed, self.races = 0, [[0, 0], [0, 0]], {}, [], []

    def follow(self, operation, *uses: tuple[int, int]) -> None:
        self.races += [operation for queue, count in uses if self.waited[self.queue][queue] < count]

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs, own = kwargs or {}, self.waited[self.queue]
        own[self.queue] += 1
        now = self.queue, own[self.queue]
        for key in [key for key, memory in self.alive.items() if memory.storage.expired()]:
            self.freed.append(self.alive.pop(key))
        for memory in [memory for memory in self.freed if memory.home == self.queue]:  # this operation may be given it
            self.follow(operation, memory.written, *memory.read.items())
            self.freed.remove(memory)
        result = operation(*args, **kwargs)
        changed = {id(x) for n, about in enumerate(operation._schema.arguments)
                   if about.alias_info and about.alias_info.is_write
                   for x in tree_leaves(args[n] if n < len(args) else kwargs.get(about.name))}
        for x in tree_leaves((args, kwargs, result)):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                memory = self.alive.setdefault(storage._cdata, Memory(StorageWeakRef(storage), self.queue, now, {}))
                self.follow(operation, memory.written)
                if id(x) in changed:
                    self.follow(operation, *memory.read.items())
                    memory.written = now
                else:
                    memory.read[self.queue] = now[1]
        return result


def races(monkeypatch, without="", steps=3, **changes) -> list:
    queues, joins = Queues(), iter(range(100))

    class Aside:
        def __init__(self, device):
            if without != "fork":
                queues.waited[1][0] = queues.waited[0][0]

        def __enter__(self):
            queues.queue = 1

        def __exit__(self, *_):
            queues.queue = 0

        def join(self):
            if without != ("first join", "last join")[next(joins) % 2]:
                queues.waited[0][1] = queues.waited[1][1]

    monkeypatch.setattr(devices, "Aside", Aside)
    monkeypatch.setattr(kernels.dice, "INTERPRETED", False)
    cfg, scalars = replace(Config(), **changes), []
    torch.manual_seed(0)
    nets = [VNet(1, 3, filters=2, depth=1, dropout=True).train() for _ in range(2)]
    optimizers = [reciprocal.make_optimizer(cfg, net) for net in nets]
    with queues:
        for iteration in range(steps):
            batch = {name: torch.randn(2, 1, 4, 6, 8) for name in ("x_l", "x_u", "x_s")}
            batch |= {name: torch.randint(3, (2, 4, 6, 8)) for name in ("y_l", "y_s")}
            scalars.append(reciprocal_step(nets, optimizers, batch | dict(iteration=iteration), cfg))
        for name in scalars[0]:
            torch.stack([values[name] for values in scalars])
    assert min(map(max, queues.waited)) > 100 * steps  # both had work
    return queues.races


@pytest.mark.parametrize("changes", [
    dict(lesson="pseudo"), dict(feedback="difference", lesson="mixed", cutmix=True), dict(feedback="shuffled"),
    dict(feedback="off", cutmix=True), dict(optimizer="adam")], ids=str)
def test_the_queues_of_a_step_do_not_race(changes, monkeypatch):
    assert not races(monkeypatch, **changes)


@pytest.mark.parametrize("without", ["fork", "first join", "last join"])
def test_each_wait_is_needed(without, monkeypatch):
    assert races(monkeypatch, without)
