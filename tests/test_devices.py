"""One device: precision and compiler are tried before they are trusted. Two processes compute what one does: the loss,
the helpers, and a whole run, killed and resumed."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import devices
import kernels.dice
import reciprocal
import record
from cli import BadInput, cli

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--data phantom --patch 16 16 16 --stride 32 32 32 --filters 2 --depth 1 --batch-l 2 --batch-u 2 --pretrain 2 "
        "--schedule step --lr 0.01 --log-every 1 --eval-every 2 --eval-cases 3 --save-every 2 --device cpu")


def torchrun(folder, ranks: int, script: str, *arguments, endpoint: str = "") -> subprocess.CompletedProcess:
    """The script in so many processes; one is a plain process, if not the share of one of two nodes, which meet at the
    endpoint."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    where = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"] if endpoint else ["--standalone"]
    launcher = ["-m", "torch.distributed.run", *where, f"--nproc-per-node={ranks}"] if ranks > 1 or endpoint else []
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    return subprocess.run([sys.executable, *launcher, str(path), *map(str, arguments)], env=env, cwd=folder, text=True,
                          capture_output=True, timeout=300)


LOSSES = """
    import torch
    import devices, kernels.dice

    company = devices.company(torch.device("cpu"))
    company.__enter__()
    generator = torch.Generator().manual_seed(0)
    logits, label = torch.randn(4, 3, 5, 6, 7, generator=generator), torch.randint(4, (4, 5, 6, 7), generator=generator)
    label[1] = 0  # the ranks' shares of the classes, and of the voxels that count, differ
    for interpreted in (False, True):  # the reference and the kernels
        kernels.dice.INTERPRETED = interpreted
        for weights in kernels.dice.LOSSES.values():
            z = logits.clone().requires_grad_()
            expected = kernels.dice.dice_ce(z, label.byte(), **weights)
            (wanted,) = torch.autograd.grad(3 * expected, z)
            z = devices.mine(logits).clone().requires_grad_()
            loss = kernels.dice.dice_ce(z, devices.mine(label).byte(), **weights, group=devices.group())
            (gradient,) = torch.autograd.grad(3 * loss, z)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(gradient / devices.WORLD, devices.mine(wanted))  # a part of the mean over ranks
            (apart,) = torch.autograd.grad(3 * kernels.dice.dice_ce(z, devices.mine(label).byte(), **weights), z)
            assert not torch.allclose(apart / devices.WORLD, devices.mine(wanted), rtol=1e-3)  # so it does matter
    gradients = [torch.full((2, 2), float(devices.RANK)), torch.arange(3.0) + devices.RANK]
    one, other = devices.average(gradients)
    assert torch.equal(one, torch.full((2, 2), 0.5)) and torch.equal(other, torch.arange(3.0) + 0.5)
    items = list("abcde")
    assert devices.gather(devices.mine(items)) == items and devices.gather([]) == []
    assert devices.anywhere(devices.RANK == 1, ask=True) and not devices.anywhere(True, ask=False)
    print("agrees")
    company.__exit__(None, None, None)
"""


def test_loss_and_gradients_of_two_ranks_are_those_of_one(tmp_path):
    done = torchrun(tmp_path, 2, LOSSES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agrees") == 2


UAMT = """
    import sys
    import torch
    import baselines, devices, kernels.dice, reciprocal

    kernels.dice.INTERPRETED = False
    baselines.noisy = lambda x: x  # that, dropout and batch statistics are a rank's own
    with devices.company(torch.device("cpu")):
        torch.manual_seed(0)
        nets = [reciprocal.VNet(1, 2, 2, 1).eval() for _ in range(2)]
        optimizers = [torch.optim.SGD(net.parameters(), lr=100.0) for net in nets]
        x_l, x_u = torch.randn(2, 4, 1, 8, 8, 8)
        x_u[::2] *= 9  # the teacher is certain of other shares of what each rank sees
        batch = dict(x_l=devices.mine(x_l), y_l=devices.mine(x_l[:, 0] > 0).byte(), x_u=devices.mine(x_u))
        baselines.uamt_step(nets, optimizers, batch | dict(iteration=9, iterations=10), reciprocal.Config())
        if devices.RANK == 0:
            torch.save(nets[0].state_dict(), sys.argv[1])
"""


def test_uamt_is_as_certain_on_two_ranks_as_on_one(tmp_path):
    for ranks in (1, 2):
        done = torchrun(tmp_path, ranks, UAMT, f"{ranks}.pt")
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{ranks}.pt", weights_only=True) for ranks in (1, 2))
    torch.testing.assert_close(two, one)


RUN = """
    import os, signal, sys
    import torch
    from torch.distributed.nn.functional import all_reduce
    import cli, devices, kernels.dice, reciprocal

    kernels.dice.INTERPRETED = False

    class SyncNorm(torch.nn.BatchNorm3d):
        # batch statistics over all ranks in plain formulas: nn.SyncBatchNorm is for GPUs alone
        def forward(self, x):
            if not self.training:
                return super().forward(x)
            mean, square = (y.mean((0, 2, 3, 4)) for y in (x, x * x))
            if devices.WORLD > 1:
                mean, square = all_reduce(mean) / devices.WORLD, all_reduce(square) / devices.WORLD
            var, n = square - mean**2, x.numel() // x.shape[1] * devices.WORLD
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum * self.track_running_stats)
                self.running_var.lerp_(var * n / (n - 1), self.momentum * self.track_running_stats)
            scale = self.weight * (var + self.eps).rsqrt()
            return (x - mean[:, None, None, None]) * scale[:, None, None, None] + self.bias[:, None, None, None]

    if "--own-statistics" in sys.argv:
        sys.argv.remove("--own-statistics")
    else:
        torch.nn.BatchNorm3d = SyncNorm
    step, test, number = reciprocal.reciprocal_step, reciprocal.test, None
    if sys.argv[-2] == "--kill":
        number = signal.Signals[sys.argv[-1]]
        del sys.argv[-2:]

    def signalled(nets, optimizers, batch, cfg):
        if number and batch["iteration"] == 3 and devices.RANK == 1:
            os.kill(os.getpid(), number)
        return step(nets, optimizers, batch, cfg)

    def compared(cfg, dataset, nets, run):
        one, *others = devices.gather([[b.tolist() for net in nets.values() for b in net.buffers()]])
        assert all(other == one for other in others)
        return test(cfg, dataset, nets, run)

    reciprocal.reciprocal_step, reciprocal.test = signalled, compared
    sys.exit(cli.cli(lambda: reciprocal.main(sys.argv[1:])))
"""


def test_a_run_of_two_ranks_is_that_of_one(tmp_path):
    """Weights, running statistics and log, with batch statistics over both ranks. Then a rank is killed: the run ends
    soon, and goes on with one rank as if nothing had been."""
    arguments = [*TINY.split(), "--iterations", 6]
    one = torchrun(tmp_path, 1, RUN, *arguments, "--out", tmp_path / "one")
    two = torchrun(tmp_path, 2, RUN, *arguments, "--out", tmp_path / "two")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    start = time.monotonic()
    dead = torchrun(tmp_path, 2, RUN, *arguments, "--out", tmp_path / "dead", "--kill", "SIGKILL")
    assert dead.returncode and time.monotonic() - start < 120
    assert "--resume" in dead.stderr  # in the line of the rank that is left
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


def test_a_rank_killed_on_one_node_ends_the_run_on_both(tmp_path):
    """Two nodes that share a folder and this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = "localhost:{1}".format(*free.getsockname())
    arguments, start = [*TINY.split(), "--iterations", 6, "--out", tmp_path / "run"], time.monotonic()
    with ThreadPoolExecutor(2) as nodes:
        done = [nodes.submit(torchrun, tmp_path, 1, RUN, *arguments, "--kill", "SIGKILL", endpoint=endpoint)
                for _ in range(2)]
        dead = [node.result() for node in done]
    assert all(node.returncode for node in dead) and time.monotonic() - start < 120
    assert sum("another rank is gone" in node.stderr for node in dead) == 1
    assert record.load_checkpoint(tmp_path / "run")["iteration"] == 2
    resumed = torchrun(tmp_path, 1, RUN, "--resume", tmp_path / "run")
    assert resumed.returncode == 0, resumed.stderr


def test_running_statistics_of_each_rank_become_those_of_all(tmp_path):
    done = torchrun(tmp_path, 2, RUN, *TINY.split(), "--iterations", 2, "--own-statistics", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr


def test_a_signal_to_one_rank_stops_all(tmp_path):
    run = tmp_path / "run"
    flags = ["--iterations", 5, "--log-every", 3, "--out", run]  # the signal comes after the last but one look
    done = torchrun(tmp_path, 2, RUN, *TINY.split(), *flags, "--kill", "SIGTERM")
    assert done.returncode and f"stopped; --resume {run} goes on\n" in done.stderr, done.stderr
    assert record.load_checkpoint(run)["iteration"] == 5 and not (run / "predictions").exists()


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    done = torchrun(tmp_path, 2, RUN, *TINY.split(), "--batch-l", 3, "--out", tmp_path / "run")
    assert done.returncode and "--batch-l 3, --batch-u 2: no multiple of 2 ranks" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", [lambda y: 1.1 * y, lambda y: 1.1 * y - 0.1 * y.detach()], ids=["y", "gradient"])
def test_bf16_convolutions_are_checked(wrong, monkeypatch):
    cpu, right = torch.device("cpu"), torch.nn.functional.conv3d
    assert devices.bf16_is_right("off", cpu, 2) and devices.bf16_is_right("bf16", cpu, 24)

    def conv3d(x, weight, padding):
        y = right(x, weight, padding=padding)
        return wrong(y) if len(x[0, 0]) == 4 and torch.is_autocast_enabled("cpu") else y

    monkeypatch.setattr(torch.nn.functional, "conv3d", conv3d)
    assert devices.bf16_is_right("off", cpu, 4) and not devices.bf16_is_right("bf16", cpu, 4)
    devices.settle("cpu", "bf16", sides=(16, 8))
    with pytest.raises(BadInput, match="choose --amp off$"):
        devices.settle("cpu", "bf16", sides=(16, 8, 4))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_pointwise_is_the_convolution_and_keeps_the_layout(memory_format):
    torch.manual_seed(0)
    ours, plain = devices.Pointwise(5, 3, 1), torch.nn.Conv3d(5, 3, 1)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 6, 4, 7).contiguous(memory_format=memory_format).requires_grad_()
    found, expected = ours(x), plain(x)
    assert found.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(found, expected)
    grad_output = torch.randn_like(expected)
    for one, other in zip(*(torch.autograd.grad(out, (x, *net.parameters()), grad_output)
                            for out, net in ((found, ours), (expected, plain))), strict=True):
        torch.testing.assert_close(one, other)


def test_a_compiler_that_fails_is_left_out_before_the_first_step(monkeypatch, tmp_path, capsys):
    def missing(*_, **__):
        raise RuntimeError("no compiler here\nand a long story")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: setattr(net, "forward", missing))
    run = tmp_path / "run"
    arguments = [*TINY.split(), "--iterations", "1", "--out", str(run), "--compile"]
    assert cli(lambda: reciprocal.main(arguments)) == 0
    assert "--compile is left out, it fails here: RuntimeError: no compiler here\n" in capsys.readouterr().out
    assert (run / "summary.json").exists()


@pytest.mark.slow
def test_compiled_networks_train_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels.dice, "INTERPRETED", False)
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        arguments = [*TINY.split(), "--iterations", "3", "--out", str(tmp_path / name), *more]
        assert cli(lambda arguments=arguments: reciprocal.main(arguments)) == 0
    plain, compiled = (record.load_checkpoint(tmp_path / name)["nets"] for name in ("plain", "compiled"))
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-5)
