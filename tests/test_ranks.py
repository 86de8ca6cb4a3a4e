"""Two processes on one machine compute what one does: the loss, the helpers, and a whole run, killed and resumed."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import record

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--data phantom --patch 16 16 16 --stride 32 32 32 --filters 2 --depth 1 --batch-l 2 --batch-u 2 --pretrain 2 "
        "--schedule step --lr 0.01 --log-every 1 --eval-every 2 --eval-cases 3 --save-every 2 --device cpu")


def torchrun(folder, ranks: int, script: str, *arguments) -> subprocess.CompletedProcess:
    """The script in so many processes; one is a plain process."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    return subprocess.run([sys.executable, *launcher, str(path), *map(str, arguments)], env=env, cwd=folder, text=True,
                          capture_output=True, timeout=300)


LOSSES = """
    import torch
    import kernels.dice, ranks

    ranks.join(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    logits, label = torch.randn(4, 3, 5, 6, 7, generator=generator), torch.randint(4, (4, 5, 6, 7), generator=generator)
    label[1] = 0  # the ranks' shares of the classes, and of the voxels that count, differ
    for interpreted in (False, True):  # the reference and the kernels
        kernels.dice.INTERPRETED = interpreted
        for weights in kernels.dice.LOSSES.values():
            z = logits.clone().requires_grad_()
            expected = kernels.dice.dice_ce(z, label.byte(), **weights)
            (wanted,) = torch.autograd.grad(3 * expected, z)
            z = ranks.mine(logits).clone().requires_grad_()
            loss = kernels.dice.dice_ce(z, ranks.mine(label).byte(), **weights, group=ranks.group())
            (gradient,) = torch.autograd.grad(3 * loss, z)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(gradient / ranks.WORLD, ranks.mine(wanted))  # a part of the mean over ranks
            (apart,) = torch.autograd.grad(3 * kernels.dice.dice_ce(z, ranks.mine(label).byte(), **weights), z)
            assert not torch.allclose(apart / ranks.WORLD, ranks.mine(wanted), rtol=1e-3)  # so it does matter
    gradients = [torch.full((2, 2), float(ranks.RANK)), torch.arange(3.0) + ranks.RANK]
    one, other = ranks.average(gradients)
    assert torch.equal(one, torch.full((2, 2), 0.5)) and torch.equal(other, torch.arange(3.0) + 0.5)
    items = list("abcde")
    assert ranks.gather(ranks.mine(items)) == items and ranks.gather([]) == []
    print("rank", ranks.RANK, "agrees")
"""


def test_loss_and_gradients_of_two_ranks_are_those_of_one(tmp_path):
    done = torchrun(tmp_path, 2, LOSSES)
    assert done.returncode == 0, done.stderr
    assert "rank 0 agrees" in done.stdout and "rank 1 agrees" in done.stdout


RUN = """
    import os, signal, sys
    import torch
    from torch.distributed.nn.functional import all_reduce
    import data, kernels.dice, ranks, reciprocal

    kernels.dice.INTERPRETED = False

    class SyncNorm(reciprocal.Norm):
        # batch statistics over all ranks in plain formulas: nn.SyncBatchNorm is for GPUs alone
        def forward(self, x):
            if not self.training:
                return super().forward(x)
            mean, square = (y.mean((0, 2, 3, 4)) for y in (x, x * x))
            if ranks.WORLD > 1:
                mean, square = all_reduce(mean) / ranks.WORLD, all_reduce(square) / ranks.WORLD
            var, n = square - mean**2, x.numel() // x.shape[1] * ranks.WORLD
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * n / (n - 1), self.momentum)
            scale = self.weight * (var + self.eps).rsqrt()
            return (x - mean[:, None, None, None]) * scale[:, None, None, None] + self.bias[:, None, None, None]

    reciprocal.Norm = SyncNorm
    if dying := "--die" in sys.argv:
        sys.argv.remove("--die")
        step = reciprocal.reciprocal_step
        def last_step(*arguments):
            if arguments[2]["iteration"] == 3 and ranks.RANK == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments)
        reciprocal.reciprocal_step = last_step
    sys.exit(data.cli(lambda: reciprocal.main(sys.argv[1:])))
"""


def test_a_run_of_two_ranks_is_that_of_one(tmp_path):
    """Weights, running statistics and log, with batch statistics over both ranks. Then a rank is killed: the run ends
    soon, and goes on with one rank as if nothing had been."""
    arguments = [*TINY.split(), "--iterations", 6]
    one = torchrun(tmp_path, 1, RUN, *arguments, "--out", tmp_path / "one")
    two = torchrun(tmp_path, 2, RUN, *arguments, "--out", tmp_path / "two")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    start = time.monotonic()
    dead = torchrun(tmp_path, 2, RUN, *arguments, "--out", tmp_path / "dead", "--die")
    assert dead.returncode and time.monotonic() - start < 120
    assert record.load_checkpoint(tmp_path / "dead")["iteration"] == 2
    resumed = torchrun(tmp_path, 1, RUN, "--resume", tmp_path / "dead")
    assert resumed.returncode == 0, resumed.stderr
    expected, log = record.load_checkpoint(tmp_path / "one"), (tmp_path / "one/log.jsonl").read_text().splitlines()
    for name in ("two", "dead"):
        assert {p.name for p in (tmp_path / name).rglob("*")} == {p.name for p in (tmp_path / "one").rglob("*")}
        found = record.load_checkpoint(tmp_path / name)
        torch.testing.assert_close(found["nets"], expected["nets"], rtol=1e-3, atol=1e-5)
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        for line, wanted in zip(map(json.loads, lines), map(json.loads, log), strict=True):
            assert (line.pop("stage"), *line) == (wanted.pop("stage"), *wanted)
            assert "dice" in line or line == pytest.approx(wanted, rel=1e-2, abs=1e-6)
        assert len((tmp_path / name / "metrics.csv").read_text().splitlines()) == 1 + 2 * (8 + 16)


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    done = torchrun(tmp_path, 2, RUN, *TINY.split(), "--batch-l", 3, "--out", tmp_path / "run")
    assert done.returncode and "--batch-l 3, --batch-u 2: not a multiple of the 2 ranks" in done.stderr
    assert not (tmp_path / "run").exists()
