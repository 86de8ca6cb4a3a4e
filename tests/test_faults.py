"""Nothing lost, nothing trusted blindly: the promises of a run, attacked. Killed and stopped processes, full disks,
files that were damaged or made to do harm, and results with nothing in them."""

import ast
import contextlib
import copy
import functools
import gzip
import hashlib
import json
import math
import os
import pickle
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
import tracemalloc
import warnings
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from test_data import SHAPE, content, header, mask, nnunet, save, scan
from torch.utils._python_dispatch import TorchDispatchMode

import data
import kernels.dice
import reciprocal
import record
from baselines import COMPARISONS
from cli import BadInput
from cli import cli as exit_status

ROOT = Path(__file__).parents[1]
SMALL = shlex.split("--patch 8 8 8 --stride 8 8 8 --filters 2 --depth 1 --batch-l 1 --batch-u 1 --iterations 6 "
                    "--pretrain 5 --log-every 1 --eval-every 2 --eval-cases 1 --save-every 2 --device cpu --dropout "
                    "--holdout 0")


@pytest.fixture(autouse=True)
def loss_without_interpreter(monkeypatch):
    """These tests are about the run; Triton's interpreter would only make its loss slow."""
    monkeypatch.setattr(kernels.dice, "INTERPRETED", False)


@pytest.fixture(autouse=True)
def handlers_of_before():
    """`cli` takes SIGTERM over; after a test it is pytest's again."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return nnunet(tmp_path_factory.mktemp("own"), labeled=4)


@pytest.fixture
def no_report(monkeypatch):
    """Training alone: no scores, no pictures."""
    monkeypatch.setattr(reciprocal, "test", lambda *_: [])
    monkeypatch.setattr(record, "conclude", lambda *_: None)


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    """The folder of a run that nothing disturbed, by its flags."""
    @functools.cache
    def finished(*flags) -> Path:
        run = tmp_path_factory.mktemp("straight") / "run"
        assert cli("--data", folder, "--labeled", 3, "--out", run, *SMALL, *flags) == 0
        return run
    return finished


def cli(*arguments) -> int:
    return exit_status(lambda: reciprocal.main([str(argument) for argument in arguments]))


def one_line(capsys) -> str:
    """What the user is told: one line on stderr and no traceback."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def forked(work) -> int:
    """The signal that ended a child process that does `work`, 0 if none did."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) * -1


def program(*arguments) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.Popen([sys.executable, "reciprocal.py", *map(str, arguments)], cwd=ROOT, text=True,
                            env=environment | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def wait_for(condition, seconds=60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def at(monkeypatch, number, iteration, event) -> None:
    """`event()` happens in the middle of a step of this stage: the student is updated, the rest is not."""
    stages = reciprocal.stages

    def spoiled(cfg):
        found = stages(cfg)
        whole = found[number].step

        def step(nets, optimizers, batch, cfg):
            if batch["iteration"] != iteration:
                return whole(nets, optimizers, batch, cfg)
            with pytest.MonkeyPatch.context() as patch:
                trained = found[number].nets  # of a pre-training the teacher alone
                optimizer = optimizers[trained.index("student") if "student" in trained else -1]
                original = optimizer.step
                patch.setattr(optimizer, "step", lambda: (original(), event()))
                return whole(nets, optimizers, batch, cfg)

        found[number].step = step
        return found

    monkeypatch.setattr(reciprocal, "stages", spoiled)


def same(one, other) -> bool:
    """Equal in every bit, whatever it is made of."""
    if torch.is_tensor(one):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same_run(one: Path, other: Path) -> None:
    saved = [record.load_checkpoint(run / "checkpoint.pt") for run in (one, other)]
    for name in ("nets", "optimizers", "stage", "iteration", "classes", "channels"):
        assert same(saved[0][name], saved[1][name]), name
    assert (one / "log.jsonl").read_text() == (other / "log.jsonl").read_text()


def log(run: Path, key="lr") -> list[dict]:
    return [line for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if key in line]


# ---- a run goes on bit for bit ---------------------------------------------------------------------------------------

KILLED = {
    "teacher's pre-training": (0, 3, []),
    "student's pre-training": (1, 3, []),
    "reciprocal": (2, 3, []),
    "paper, adam": (1, 3, ["--preset", "paper", "--optimizer", "adam", "--schedule", "poly"]),
} | {method: (0, 9, ["--method", method, "--patch", "16", "16", "16"]) for method in COMPARISONS}


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, autograd's threads do not survive a fork")
@pytest.mark.parametrize("number, iteration, flags", KILLED.values(), ids=KILLED)
def test_killed_and_resumed_equals_straight(number, iteration, flags, folder, straight, no_report, tmp_path,
                                            monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at(patch, number, iteration, lambda: os.kill(os.getpid(), signal.SIGKILL))
        start = ["--data", folder, "--labeled", 3, "--out", run, *SMALL, *flags]
        assert forked(lambda: cli(*start)) == signal.SIGKILL
    saved = record.load_checkpoint(run)
    assert (saved["stage"], saved["iteration"]) == (number, iteration - 1) and log(run)[-1]["iteration"] == iteration
    assert cli("--resume", run) == 0
    assert_same_run(run, straight(*flags))
    last = record.load_checkpoint(run)
    assert all(any("running_mean" in key for key in last["nets"][name]) for name in ("student", "teacher")
               if name in last["nets"])
    assert any(optimizer["state"] for optimizer in last["optimizers"])


def test_finished_run_can_be_extended(folder, straight, no_report, tmp_path):
    """With the schedule `step`, 6 and 6 more iterations are 12."""
    run, flags = tmp_path / "run", ["--lr-step", 4]
    assert cli("--data", folder, "--labeled", 3, "--out", run, *SMALL, *flags) == 0
    assert cli("--resume", run, "--iterations", 12) == 0
    assert_same_run(run, straight("--iterations", "12", "--lr-step", "4"))
    assert len({line["lr"] for line in log(run) if line["stage"] == "reciprocal"}) == 3


def test_extended_poly_run_takes_the_longer_schedule_and_says_so(folder, no_report, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli("--data", folder, "--labeled", 3, "--out", run, *SMALL, "--schedule", "poly", "--lr", 0.1) == 0
    assert "would" not in capsys.readouterr().out
    assert cli("--resume", run, "--iterations", 12) == 0
    assert "It goes on as a run of 12 iterations would" in capsys.readouterr().out
    rates = [line["lr"] for line in log(run) if line["stage"] == "reciprocal"]
    expected = [0.1 * (1 - i / (6 if i < 6 else 12)) ** 0.9 for i in range(12)]
    assert rates == pytest.approx(expected)


def test_run_cannot_be_shortened_below_where_it_is(straight, capsys):
    run = straight()
    before = (run / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert cli("--resume", run, "--iterations", 4) == 2
    assert "the run is at 6" in one_line(capsys) and (run / "checkpoint.pt").read_bytes() == before


# ---- stopped ---------------------------------------------------------------------------------------------------------

SIGNALS = {"ctrl-c": (signal.SIGINT, 130), "sigterm": (signal.SIGTERM, 143)}


@pytest.mark.parametrize("number, status", SIGNALS.values(), ids=SIGNALS)
def test_stopped_run_finishes_its_step_and_says_how_to_go_on(number, status, folder, straight, no_report, tmp_path,
                                                             monkeypatch, capsys):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at(patch, 2, 2, lambda: os.kill(os.getpid(), number))  # between two checkpoints, in the middle of a step
        assert cli("--data", folder, "--labeled", 3, "--out", run, *SMALL, "--log-every", 2) == status
    assert capsys.readouterr().err == f"stopped; --resume {run} goes on\n"
    saved = record.load_checkpoint(run)
    assert (saved["stage"], saved["iteration"]) == (2, 3) and [line["iteration"] for line in log(run)][-3:] == [1, 2, 3]
    assert cli("--resume", run) == 0
    assert_same_run(run, straight())


def test_second_signal_does_not_wait_and_saves_no_half_step(folder, straight, no_report, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at(patch, 2, 2, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
        assert cli("--data", folder, "--labeled", 3, "--out", run, *SMALL) == 130
    assert record.load_checkpoint(run)["iteration"] == 2
    assert cli("--resume", run) == 0
    assert_same_run(run, straight())


def test_stopped_while_reading_leaves_nothing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "load", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert cli("--data", folder, "--out", tmp_path / "run", *SMALL) == 143
    assert capsys.readouterr().err == "stopped\n" and not list(tmp_path.iterdir())


def test_stopped_while_scoring_says_how_to_go_on(folder, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(reciprocal, "write_label", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert cli("--data", folder, "--labeled", 3, "--out", run, *SMALL) == 130
    assert f"--resume {run}" in capsys.readouterr().err
    assert cli("--resume", run) == 0 and (run / "summary.json").exists()


@pytest.mark.parametrize("number, status", SIGNALS.values(), ids=SIGNALS)
def test_program_is_stopped(number, status, folder, tmp_path):
    run = tmp_path / "run"
    child = program("--data", folder, "--labeled", 3, "--out", run, *SMALL, "--method", "supervised", "--iterations",
                    10**6, "--log-every", 3, "--save-every", 1000)
    try:
        wait_for(lambda: (run / "log.jsonl").exists() and (run / "log.jsonl").read_text().count("\n") > 8)
        child.send_signal(number)
        _, error = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == status and error == f"stopped; --resume {run} goes on\n"
    done = record.load_checkpoint(run)["iteration"]
    assert [line["iteration"] for line in log(run)] == list(range(1, done + 1))


# ---- one process a run -----------------------------------------------------------------------------------------------

def test_second_process_is_refused_until_the_first_is_dead(folder, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    monkeypatch.setattr(reciprocal, "train", lambda *_: pytest.fail("two train in one folder"))
    child = program("--data", folder, "--labeled", 3, "--out", run, *SMALL, "--method", "supervised", "--iterations",
                    10**6, "--save-every", 1)
    try:
        wait_for((run / "checkpoint.pt").exists)
        for arguments in (["--resume", run], ["--data", folder, "--out", run, *SMALL]):
            assert cli(*arguments) == 2
            assert str(run) in one_line(capsys)
        assert child.poll() is None
    finally:
        child.kill()
        child.communicate()
    with record.occupied(run):  # the kernel has let go of it
        pass


def test_two_new_runs_do_not_share_a_folder(folder, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    with record.occupied(run):
        assert cli("--data", folder, "--labeled", 3, "--out", run, *SMALL) == 2
    assert "another process" in one_line(capsys) and [path.name for path in run.iterdir()] == [".lock"]


def test_folder_of_a_run_killed_before_its_first_file_is_free(folder, no_report, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").touch()
    (run / ".config.json.partial").write_text("{")
    assert cli("--data", folder, "--labeled", 3, "--out", run, *SMALL) == 0
    assert not list(run.glob(".*.partial"))


# ---- saving ----------------------------------------------------------------------------------------------------------

def checkpoint(value=0, size=10) -> dict:
    return dict(config={}, classes=[], channels=1, nets={}, weights=torch.full((size,), float(value)))


@pytest.mark.slow
def test_killed_while_saving_leaves_a_whole_checkpoint(tmp_path):
    """At a random instant, 60 times, half of them of the writing: what is there was saved, and whole."""
    path, partial = tmp_path / "checkpoint.pt", tmp_path / ".checkpoint.pt.partial"
    rng, interrupted = np.random.default_rng(0), 0
    record.save_checkpoint(path, checkpoint())
    for trial in range(60):
        partial.unlink(missing_ok=True)
        child = os.fork()
        if not child:
            value = 1
            while True:
                record.save_checkpoint(path, checkpoint(value, 500_000))
                value += 1
        time.sleep(0.03)
        while trial % 2 and not partial.exists():
            assert os.waitpid(child, os.WNOHANG) == (0, 0)  # it lives and will write
        time.sleep(rng.uniform(0, 0.001 if trial % 2 else 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        interrupted += partial.exists()
        weights = record.load_checkpoint(path)["weights"]
        assert len(weights) in (10, 500_000) and (weights == weights[0]).all()
    assert interrupted > 10  # the kills met the writing
    record.save_checkpoint(path, checkpoint())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@contextlib.contextmanager
def files_of_at_most(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path):
    path = tmp_path / "checkpoint.pt"
    record.save_checkpoint(path, checkpoint(1))
    with files_of_at_most(50_000), pytest.raises(BadInput, match="checkpoint.pt: cannot be written.*too large"):
        record.save_checkpoint(path, checkpoint(2, 100_000))
    assert record.load_checkpoint(path)["weights"][0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_log_that_does_not_fit_is_told_and_rewound(tmp_path):
    path, lines = tmp_path / "log.jsonl", [dict(stage="mt", iteration=i, loss=0.1) for i in range(1, 2000)]
    record.append_log(path, lines[:9], lasting=True)
    with files_of_at_most(50_000), pytest.raises(BadInput, match="log.jsonl: cannot be written.*too large"):
        record.append_log(path, lines[9:], lasting=True)
    assert not path.read_text().endswith("\n")  # a torn line
    path.write_bytes(path.read_bytes() + b"\xff")
    record.rewind_log(path, ["mt"], dict(stage=0, iteration=7))
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:7]


@contextlib.contextmanager
def mounted(path: Path, options: str):
    path.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_full_disk_stops_the_run_and_costs_nothing(folder, straight, no_report, tmp_path, monkeypatch, capsys):
    expected = straight()
    capsys.readouterr()
    with mounted(tmp_path / "disk", "size=1m") as disk:
        run, filler = disk / "run", disk / "filler"

        def fill():
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

        with monkeypatch.context() as patch:
            at(patch, 2, 2, fill)
            assert cli("--data", folder, "--labeled", 3, "--out", run, *SMALL) == 2
        assert "No space left" in (told := one_line(capsys)) and str(run) in told
        assert record.load_checkpoint(run)["iteration"] == 2 and not list(run.glob(".*.partial"))
        filler.unlink()
        assert cli("--resume", run) == 0
        assert_same_run(run, expected)


@pytest.mark.parametrize("arguments", ["train", "predict"])
def test_read_only_folder_is_one_line(arguments, folder, straight, tmp_path, capsys):
    run = straight()
    capsys.readouterr()
    with contextlib.ExitStack() as stack:
        where = tmp_path / "read-only"
        if os.geteuid():
            where.mkdir(mode=0o500)
        else:
            stack.enter_context(mounted(where, "ro"))
        if arguments == "train":
            status = cli("--data", folder, "--labeled", 3, "--out", where / "run", *SMALL)
        else:
            status = cli("predict", "-i", folder / "imagesTs", "-o", where / "masks", "--checkpoint", run)
        assert status == 2 and f"{where}/" in (told := one_line(capsys)) and "another folder" in told


def test_out_of_gpu_memory_says_what_to_lower(folder, tmp_path, monkeypatch, capsys):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    at(monkeypatch, 2, 2, full)
    assert cli("--data", folder, "--labeled", 3, "--out", tmp_path / "run", *SMALL) == 2
    told = one_line(capsys)
    assert all(flag in told for flag in ("--patch", "--batch-l", "--batch-u", "--windows"))
    assert record.load_checkpoint(tmp_path / "run")["iteration"] == 2


def test_loss_that_is_not_finite_names_the_cases(folder, tmp_path, monkeypatch, capsys):
    run, drawn, patch_of = tmp_path / "run", [], data._patch
    monkeypatch.setattr(data, "_patch", lambda case, *rest: (drawn.append(case.name), patch_of(case, *rest))[1])

    stages = reciprocal.stages

    def spoiled(cfg):
        found = stages(cfg)
        whole = found[2].step

        def step(nets, optimizers, batch, cfg):
            if batch["iteration"] != 3:
                return whole(nets, optimizers, batch, cfg)
            drawn[:] = drawn[-3:]  # x_u, x_l and x_s of this step
            return {name: value * math.nan for name, value in whole(nets, optimizers, batch, cfg).items()}

        found[2].step = step
        return found

    monkeypatch.setattr(reciprocal, "stages", spoiled)
    assert cli("--data", folder, "--labeled", 3, "--out", run, *SMALL) == 2
    told = one_line(capsys)
    assert "reciprocal, iteration 4: loss_u is not finite" in told
    assert {name for name in (f"case{i}" for i in range(9)) if name in told} == set(drawn) and drawn
    assert record.load_checkpoint(run)["iteration"] == 2 and len(log(run)) == 5 + 5 + 3
    assert all(math.isfinite(line["loss_l"]) for line in log(run))


def test_what_is_not_finite_is_neither_saved_nor_overlooked(tmp_path):
    net, dataset = torch.nn.Linear(1, 1), data.Dataset([], [], [], [], 1)
    torch.nn.init.constant_(net.bias, math.inf)
    with pytest.raises(BadInput, match="no longer finite"):
        record.save(tmp_path / "a.pt", {}, dataset, dict(student=net))
    lines = [dict(stage="mt", iteration=i, cases=["ab"[i]], loss=torch.tensor([math.nan, 1.0][i])) for i in range(2)]
    with pytest.raises(BadInput, match="iteration 0: loss is not finite, in patches of a;"):
        record.read_scalars(lines)
    assert not list(tmp_path.iterdir())


def test_case_that_turns_bad_while_others_are_predicted(folder, straight, tmp_path, monkeypatch, capsys):
    run, images, masks = straight(), tmp_path / "scans", tmp_path / "masks"
    capsys.readouterr()
    paths = [save(images / f"{name}.nii.gz", scan(i)) for i, name in enumerate("abc")]
    predict_label = reciprocal.predict_label

    def truncate(*arguments):
        paths[1].write_bytes(paths[1].read_bytes()[:100])
        return predict_label(*arguments)

    monkeypatch.setattr(reciprocal, "predict_label", truncate)
    assert cli("predict", "-i", images, "-o", masks, "--checkpoint", run) == 2
    assert "b.nii.gz" in one_line(capsys) and sorted(path.name for path in masks.iterdir()) == ["a.nii.gz", "c.nii.gz"]


# ---- checkpoints that are not to be trusted --------------------------------------------------------------------------

def sealed(path: Path, archive: bytes) -> None:
    """These bytes under a checksum that is right."""
    archive += b"\0\0"
    digest = hashlib.sha256(archive).hexdigest().encode()
    path.write_bytes(archive[:-2] + b"\x40\0" + digest)


def test_any_flipped_byte_is_seen_before_anything_is_loaded(tmp_path, monkeypatch):
    path, rng = tmp_path / "checkpoint.pt", np.random.default_rng(0)
    record.save_checkpoint(path, checkpoint(1, 3000))
    whole = path.read_bytes()
    assert record.load_checkpoint(path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was loaded"))
    for position in {*range(60), *range(-150, 0), *rng.integers(len(whole), size=400).tolist()}:
        bad = bytearray(whole)
        bad[position] ^= 1 << rng.integers(8)
        path.write_bytes(bad)
        with pytest.raises(BadInput, match="checkpoint.pt: damaged"):
            record.load_checkpoint(path)
    for bad in (b"", whole[:-1], whole[: len(whole) // 2], whole[1:], whole + b"\0", whole + whole):
        path.write_bytes(bad)
        with pytest.raises(BadInput, match="checkpoint.pt: damaged"):
            record.load_checkpoint(path)


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["zip", "pickle", "weights"])
def test_checkpoint_that_would_run_code_does_not(kind, folder, straight, tmp_path, capsys):
    run = straight()
    capsys.readouterr()
    harm, bad = tmp_path / "harm", tmp_path / "bad.pt"
    if kind == "pickle":
        sealed(bad, pickle.dumps(Harm(harm)))
    elif kind == "zip":
        record.save_checkpoint(bad, checkpoint() | dict(config=Harm(harm)))
    else:
        record.save_checkpoint(bad, record.load_checkpoint(run) | dict(nets=dict(student=Harm(harm))))
    for arguments in (["predict", "-i", folder / "imagesTs", "-o", tmp_path / "masks", "--checkpoint", bad],
                      ["--data", folder, "--labeled", 3, "--out", tmp_path / "run", *SMALL, "--student-from", bad]):
        assert cli(*arguments) == 2
        assert "bad.pt" in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pt"]
    if kind == "pickle":  # it would have done harm
        pickle.loads(bad.read_bytes())
        assert harm.exists()


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:1000]),
    lambda path: path.write_bytes(b"<!DOCTYPE html>" * 100),
    lambda path: torch.save({"state_dict": {}}, path),
    lambda path: sealed(path, b"PK" + bytes(1000)),
    lambda path: record.save_checkpoint(path, {"nets": {}}),
    lambda path: record.save_checkpoint(path, [1, 2]),
    lambda path: (path.unlink(), path.mkdir()),
], ids=["empty", "truncated", "html", "foreign", "no-archive", "without-keys", "list", "folder"])  # fmt: skip
def test_checkpoint_that_is_none_is_one_line(spoil, folder, straight, tmp_path, capsys):
    run = straight()
    path = tmp_path / "checkpoint.pt"
    path.write_bytes((run / "checkpoint.pt").read_bytes())
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    spoil(path)
    before = path.is_file() and path.read_bytes()
    capsys.readouterr()
    for arguments in (["predict", "-i", folder / "imagesTs", "-o", tmp_path / "masks", "--checkpoint", path],
                      ["--resume", tmp_path]):
        assert cli(*arguments) == 2
        assert "checkpoint.pt" in one_line(capsys)
    assert (path.is_file() and path.read_bytes()) == before and not (tmp_path / "masks").exists()


@pytest.mark.parametrize("other, told", [("student.pt", "weights alone"), ("--seed 2", "seed"),
                                         ("--method mt", "method")])
def test_checkpoint_of_another_run_is_refused(other, told, folder, straight, no_report, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli("--data", folder, "--labeled", 3, "--out", run, *SMALL) == 0
    source = run / other if other == "student.pt" else straight(*other.split()) / "checkpoint.pt"
    (run / "checkpoint.pt").write_bytes(source.read_bytes())
    capsys.readouterr()
    assert cli("--resume", run) == 2
    assert told in (line := one_line(capsys)) and "checkpoint.pt" in line


def test_checkpoint_of_another_class_count_is_refused(folder, straight, tmp_path, capsys):
    run, root = straight(), tmp_path / "data"
    root.mkdir()
    nnunet(root, labeled=4, classes=3)
    capsys.readouterr()
    assert cli("--data", root, "--labeled", 3, "--out", tmp_path / "run", *SMALL, "--teacher-from", run) == 2
    assert "classes" in one_line(capsys) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, text", [("config.json", "[]"), ("config.json", "{"), ("config.json", '{"epochs": 3}'),
                                        ("config.json", '{"patch": "big"}'), ("cases.json", "{")])
def test_damaged_files_of_a_run_are_one_line(name, text, folder, no_report, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli("--data", folder, "--labeled", 3, "--out", run, *SMALL) == 0
    before = (run / "checkpoint.pt").read_bytes()
    (run / name).write_text(text)
    capsys.readouterr()
    assert cli("--resume", run) == 2
    one_line(capsys)
    assert (run / "checkpoint.pt").read_bytes() == before and (run / name).read_text() == text


# ---- names and sources -----------------------------------------------------------------------------------------------

def files_below(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if not path.is_dir()}


def test_names_in_a_list_cannot_leave_the_output_folder(tmp_path, monkeypatch):
    """Cases called `..`, an absolute path, and paths that climb: all is written inside the run."""
    root, run = tmp_path / "data", tmp_path / "runs" / "run"
    inside = root / "2018LA_Seg_Training Set"
    names = ["A", "B", "../../outside/C", str(tmp_path / "absolute" / "D"), "x/y/E", ".."]
    for i, name in enumerate(names):
        path = inside / name / "mri_norm2.h5"
        (inside / "x" / "y").mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file["image"], file["label"] = scan(i).astype(np.float32), mask(i)
    (root / "train.list").write_text("\n".join(names[:2]))
    (root / "test.list").write_text("\n".join(names[2:]))
    before = files_below(tmp_path)
    assert cli("--data", root, "--labeled", 0.5, "--out", run, *SMALL, "--iterations", 1, "--pretrain", 1) == 0
    new = files_below(tmp_path) - before
    assert len([path for path in new if path.parent == run / "predictions"]) == 4
    assert all(run in path.parents for path in new)


def test_list_with_bytes_that_no_file_name_has_is_one_line(tmp_path, capsys):
    (tmp_path / "train.list").write_bytes(b"A\0B \xff\xfe " + b"long" * 100)
    assert cli("--data", tmp_path, *SMALL) == 2
    assert "one of" in one_line(capsys)


def test_links_do_not_lead_out_of_the_output_folder(folder, straight, tmp_path):
    """Input that is a link is predicted under the link's name, and links in the output folder are replaced, what they
    point to is not."""
    run, images, masks, victim = straight(), tmp_path / "scans", tmp_path / "masks", tmp_path / "victim"
    images.mkdir(), masks.mkdir()
    victim.write_text("precious")
    (images / "a.nii.gz").symlink_to(save(tmp_path / "elsewhere" / "b.nii.gz", scan(0)))
    (masks / "a.nii.gz").symlink_to(victim)
    (masks / ".a.nii.gz.partial").symlink_to(victim)
    assert cli("predict", "-i", images, "-o", masks, "--checkpoint", run) == 0
    assert victim.read_text() == "precious" and not (masks / "a.nii.gz").is_symlink()
    assert [path.name for path in masks.iterdir()] == ["a.nii.gz"]
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["b.nii.gz"]


def test_name_that_cannot_be_shown_is_refused_in_one_line(folder, straight, tmp_path, capsys):
    run = straight()
    capsys.readouterr()
    for name in ("a\nb", "a\x1b[2J", "a\udcff"):  # a line break, an escape sequence, bytes that are no UTF-8
        path = save(tmp_path / "scans" / f"{name}.nii.gz", scan(0))
        assert cli("predict", "-i", path, "-o", tmp_path / "masks", "--checkpoint", run) == 2
        assert "rename it" in (told := one_line(capsys)) and told[:-1].isprintable()
    assert not list((tmp_path / "masks").iterdir())
    assert cli("--resume", tmp_path / "no\nrun") == 2
    one_line(capsys)


def calls_of(source: str) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]


def dangers(source: str) -> list[str]:
    """Calls that would run what a file or a name says."""
    found = []
    for call in calls_of(source):
        name, keywords = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        found += [name] * (name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"))
        found += [name] * (name.split(".")[0] in ("pickle", "marshal", "shelve", "dill", "joblib"))
        found += [name] * (name == "torch.load" and keywords.get("weights_only") != "True")
        found += [name] * any(keywords.get(key, "False") != "False" for key in ("shell", "allow_pickle"))
    return found


def test_no_source_runs_what_it_reads():
    sources = [*ROOT.glob("*.py"), *(ROOT / "kernels").glob("*.py")]
    assert len(sources) > 8
    assert [(path.name, dangers(path.read_text())) for path in sources if dangers(path.read_text())] == []
    assert any("torch.load" in ast.unparse(call.func) for call in calls_of((ROOT / "record.py").read_text()))
    for bad in ("eval(x)", "os.system(x)", "subprocess.run(x, shell=True)", "torch.load(x)", "pickle.load(x)",
                "torch.load(x, weights_only=False)", "np.load(x, allow_pickle=True)"):
        assert dangers(bad), bad


# ---- bad input: what the other files do not have ---------------------------------------------------------------------

@pytest.mark.parametrize("arguments", ["--data {0} --out {0}/../run",
                                       "predict -i {0} -o {0}/../masks --checkpoint {1}"])
def test_empty_folder_is_one_line(arguments, straight, tmp_path, capsys):
    run, empty = straight(), tmp_path / "empty"
    empty.mkdir()
    capsys.readouterr()
    assert cli(*arguments.format(empty, run).split()) == 2
    assert str(empty) in one_line(capsys) and [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("spoil", [
    header(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]),
    header(dim=[3, 1290, 1290, 1290, 1, 1, 1, 1]),
    content(lambda raw: raw + bytes(2**26), plain=True),
], ids=["huge", "below-2**31", "bomb"])
def test_file_that_claims_or_holds_too_much_takes_little_memory(spoil, tmp_path):
    path = save(tmp_path / "a.nii.gz", scan(0))
    spoil(path)
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match="a.nii.gz"):
            data.read_nifti(path)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def nifti_mutant(whole: bytes, rng) -> bytes:
    """A NIfTI file with some of its header replaced, or cut short, packed or not."""
    raw = bytearray(whole)
    for _ in range(rng.integers(1, 5)):
        kind, place = rng.integers(5), int(rng.integers(352))
        if kind == 0:
            raw[place : place + 1] = rng.bytes(1)
        elif kind == 1:
            field = nib.nifti1.header_dtype.names[rng.integers(len(nib.nifti1.header_dtype.names))]
            dtype, offset = nib.nifti1.header_dtype.fields[field][:2]
            raw[offset : offset + dtype.itemsize] = rng.bytes(dtype.itemsize)
        elif kind == 2:
            value = rng.choice([0, -1, 1, np.nan, np.inf, -np.inf, 3e38, 1e-40, 2.0**31, 1e10])
            raw[place // 4 * 4 : place // 4 * 4 + 4] = np.float32(value).tobytes()
        elif kind == 3:
            value = rng.choice([0, -1, 1, 2, 3, 4, 16, 64, 128, 256, 512, 768, 1024, 1536, 2304, 32767, -32768])
            raw[place // 2 * 2 : place // 2 * 2 + 2] = np.int16(value).tobytes()
        elif rng.random() < 0.2:
            del raw[int(rng.integers(len(raw))) :]
            raw += bytes(400 - len(raw)) if rng.random() < 0.5 and len(raw) < 400 else b""
    packed = gzip.compress(bytes(raw), 1) if rng.random() < 0.3 else bytes(raw)
    return packed[: rng.integers(len(packed) + 1)] if rng.random() < 0.05 else packed


@pytest.mark.parametrize("trials", [400, pytest.param(6000, marks=pytest.mark.slow)])
def test_no_nifti_header_raises_anything_but_bad_input(trials, tmp_path):
    rng, path, read = np.random.default_rng(trials), tmp_path / "a.nii", 0
    two = nib.Nifti2Image(scan(1, (4, 3, 2)), np.eye(4)).to_bytes()
    for trial in range(trials):
        whole = two if trial % 5 == 0 else nib.Nifti1Image(scan(0, (4, 3, 2)), np.diag([1, 2, 3, 1])).to_bytes()
        path.write_bytes(nifti_mutant(whole, rng))
        label = [None, path][trial % 2]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # they would be more lines on the terminal
            try:
                case = data.read_case("a", [path], label, ["background", "organ"], "zscore", (0, 1))
                assert case.volume().isfinite().all() and case.image.ndim == 4
                read += 1
            except BadInput as error:
                assert "a.nii" in str(error) and len(str(error)) < 500
    assert 0.02 * trials < read < 0.9 * trials


JUNK = [None, True, -1, 0, 1, 2, 2.5, 1e400, 10**400, "", "0", "1", "-1", "ignore", "a\nb", [], [0, 1], {}, {"0": "x"},
        {"background": 0, "organ": 1}, {"0": "background", "1": "organ"}, {"background": 0, "organ": [1]}, [[[]]],
        {"background": 0, "organ": True}, {"0": None, "1": {}}, {"background": 0.0, "organ": 1}, "\ud800"]


def json_mutant(spec: dict, rng) -> bytes:
    spec = copy.deepcopy(spec)
    for _ in range(rng.integers(1, 4)):
        place = spec
        if rng.random() < 0.4 and isinstance(spec.get("labels"), dict):
            place = spec["labels"]
        keys = [*place, "modality", "channel_names", "labels", "numTraining", "0", "organ"]
        place[keys[rng.integers(len(keys))]] = copy.deepcopy(JUNK[rng.integers(len(JUNK))])
    text = json.dumps(JUNK[rng.integers(len(JUNK))] if rng.random() < 0.1 else spec).encode()
    if rng.random() < 0.2:
        at = int(rng.integers(len(text)))
        text = text[:at] + rng.bytes(int(rng.integers(3))) + text[at + int(rng.integers(3)) :]
    return text


@pytest.mark.parametrize("trials", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_no_dataset_json_raises_anything_but_bad_input(trials, tmp_path):
    spec = json.loads((nnunet(tmp_path, labeled=1, unlabeled=0, test=0) / "dataset.json").read_text())
    rng, good = np.random.default_rng(trials), 0
    mutants = [json_mutant(spec, rng) for _ in range(trials)]
    mutants += [b"[" * 10**5, b'{"labels":' * 10**5, b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"", b"1" * 10**5]
    for mutant in mutants:
        (tmp_path / "dataset.json").write_bytes(mutant)
        faults, summary = data.check(tmp_path)
        assert all(line.isprintable() for line in [*faults, summary])
        try:
            data.load(str(tmp_path), "", 1.0, 0.0, "zscore", (0, 1))
            good += 1
        except BadInput:
            assert faults
    assert 0.02 * trials < good < 0.9 * trials


# ---- determinism -----------------------------------------------------------------------------------------------------

def test_a_seed_gives_the_same_weights_twice(folder, straight, no_report, tmp_path):
    for name, flags in (("again", []), ("other", ["--seed", 3]), ("deterministic", ["--deterministic"])):
        assert cli("--data", folder, "--labeled", 3, "--out", tmp_path / name, *SMALL, *flags) == 0
    assert_same_run(tmp_path / "again", straight())
    nets = [record.load_checkpoint(run)["nets"] for run in (straight(), tmp_path / "other", tmp_path / "deterministic")]
    assert not same(nets[0], nets[1]) and same(nets[0], nets[2])


class Raising(TorchDispatchMode):
    """The operations met that torch.use_deterministic_algorithms forbids on CUDA, as its documentation lists them."""

    LIST = re.compile("_?(adaptive_)?avg_pool[23]d_backward|adaptive_max_pool2d_backward|fractional_max_pool|"
                      "max_unpool|upsample_.*_backward|reflection_pad.d_backward|nll_loss2d|_ctc_loss_backward|"
                      "_embedding_bag|put_?$|histc|bincount|median|grid_sampler_.*_backward|scatter_reduce")

    def __torch_dispatch__(self, operation, types, arguments=(), kwargs=None):
        name = operation.overloadpacket.__name__
        self.met |= {name} if self.LIST.match(name) or name == "cumsum" and arguments[0].is_floating_point() else set()
        return operation(*arguments, **kwargs or {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, no kernel is interpreted")
@pytest.mark.parametrize("method", ["reciprocal", *COMPARISONS])
def test_no_operation_of_a_step_is_forbidden_to_deterministic_cuda(method, folder, no_report, tmp_path, monkeypatch):
    """With the loss by its kernels, as on CUDA. The step of a method that pools would be found."""
    monkeypatch.setattr(kernels.dice, "INTERPRETED", True)
    with Raising() as raising:
        raising.met = set()
        torch.nn.AvgPool3d(2)(torch.zeros(1, 1, 2, 2, 2, requires_grad=True)).sum().backward()
        assert raising.met == {"avg_pool3d_backward"}
        raising.met = set()
        flags = ["--method", method, "--iterations", 2, "--pretrain", 1, "--feedback", "shuffled"]
        flags += ["--patch", 16, 16, 16] * (method == "sassnet")
        assert cli("--data", folder, "--labeled", 3, "--out", tmp_path / "run", *SMALL, *flags) == 0
    assert not raising.met


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["reciprocal", *COMPARISONS])
def test_deterministic_on_a_gpu(method, folder, no_report, tmp_path):
    """No operation of the step raises, and two runs are equal."""
    flags = ["--patch", 16, 16, 16] * (method == "sassnet")
    for name in ("one", "two"):
        assert cli("--data", folder, "--labeled", 3, "--out", tmp_path / name, *SMALL, "--method", method, *flags,
                   "--device", "cuda", "--deterministic") == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.gpu
def test_resumed_equals_straight_on_a_gpu(folder, no_report, tmp_path, monkeypatch):
    """Stopped while the step is a CUDA graph, three iterations after a checkpoint; it resumes with plain steps."""
    flags = ["--labeled", 3, *SMALL, "--iterations", 12, "--save-every", 5, "--device", "cuda", "--deterministic"]
    assert cli("--data", folder, "--out", tmp_path / "straight", *flags) == 0
    rate = reciprocal.learning_rate

    def stopped(cfg, iteration, iterations):
        if (iteration, iterations) == (8, 12):
            raise KeyboardInterrupt
        return rate(cfg, iteration, iterations)

    with monkeypatch.context() as patch:
        patch.setattr(reciprocal, "learning_rate", stopped)
        assert cli("--data", folder, "--out", tmp_path / "resumed", *flags) == 130
    assert cli("--resume", tmp_path / "resumed") == 0
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


def test_the_order_in_which_files_are_read_does_not_matter(folder, monkeypatch):
    def found():
        return data.load(str(folder), "", 3, 0.0, "zscore", (0, 1))

    expected, read_nifti, rng, order = found(), data.read_nifti, np.random.default_rng(0), []
    delays = {path: rng.uniform(0, 0.05) for path in sorted(folder.rglob("*.nii.gz"))}

    def slow(path):
        time.sleep(delays[path])
        order.append(path)
        return read_nifti(path)

    monkeypatch.setattr(data, "read_nifti", slow)
    again = found()
    images = [path.name for path in order if "images" in str(path)]
    for part in ("labeled", "unlabeled", "test"):
        one, other = getattr(expected, part), getattr(again, part)
        assert [case.name for case in one] == [case.name for case in other]
        assert all(torch.equal(a.volume(), b.volume()) for a, b in zip(one, other, strict=True))
    names = [f"{case.name}_0000.nii.gz" for case in again.labeled + again.unlabeled + again.test]
    assert sorted(images) == sorted(names) and images != names


# ---- results with nothing in them ------------------------------------------------------------------------------------

def voxel(*at) -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8)
    if at:
        label[at] = 1
    return label


NAN = math.nan
FULL = np.ones(SHAPE, np.uint8)
RESULTS = {  # label, prediction, and the organ's Dice, hd95 and failure; the tumor is in neither
    "absent from both": (voxel(), voxel(), NAN, NAN, 0),
    "nothing predicted": (voxel(4, 4, 4), voxel(), 0, NAN, 1),
    "nothing to find": (voxel(), voxel(4, 4, 4), 0, NAN, 1),
    "one voxel, found": (voxel(4, 4, 4), voxel(4, 4, 4), 1, 0, 0),
    "one voxel, missed": (voxel(4, 4, 4), voxel(4, 4, 1), 0, 3, 0),
    "a voxel of the edge": (voxel(0, 0, 0), voxel(8, 0, 0), 0, 8, 0),
    "everything": (FULL, FULL, 1, 0, 0),
    "everything predicted": (voxel(), FULL, 0, NAN, 1),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("label, prediction, dice, hd95, failure", RESULTS.values(), ids=RESULTS)
def test_degenerate_results_tell_the_truth(label, prediction, dice, hd95, failure, tmp_path, monkeypatch, capsys):
    """From the files to the table, with a single test case and no warning on the way."""
    root, run = tmp_path / "data", tmp_path / "run"
    root.mkdir()
    nnunet(root, labeled=2, unlabeled=1, test=1, classes=3)
    save(root / "labelsTs" / "case3.nii.gz", label)
    monkeypatch.setattr(reciprocal, "predict_label", lambda *_, **__: torch.from_numpy(prediction))
    assert cli("--data", root, "--labeled", 1.0, "--out", run, *SMALL, "--method", "mt", "--iterations", 1,
               "--pretrain", 1) == 0
    out, error = capsys.readouterr()
    assert "arning" not in out + error
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    rows = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    assert [(row["network"], row["class"]) for row in rows] == [
        (network, name) for network in ("student", "teacher") for name in ("organ", "tumor")]
    for row in rows:
        expected = (dice, hd95, failure) if row["class"] == "organ" else (NAN, NAN, 0)
        found = tuple(float(row[key]) for key in ("dice", "hd95", "failure"))
        np.testing.assert_equal(found, expected)
    text = (run / "summary.json").read_text()
    assert "NaN" not in text + (run / "log.jsonl").read_text()
    for score in json.loads(text)["scores"]:
        assert (score["cases"], score["failures"], score["absent"]) == (1, failure, 1 + math.isnan(dice))
        for metric, value in (("dice", dice), ("hd95", hd95)):
            known = not math.isnan(value)
            assert score[metric]["n"] == known and score[metric]["mean"] == (value if known else None)
    shown = out.split("\n\n")[-2].splitlines()
    assert len(shown) == 4 and ("-" if math.isnan(dice) else f"{100 * dice:.2f}") in shown[-1]
    for line in log(run, "dice"):
        assert line["dice"] == ({} if math.isnan(dice) else dict.fromkeys(("student", "teacher"), dice))
    assert all((run / name).stat().st_size > 5000 for name in ("curves.png", "overlay.png"))
