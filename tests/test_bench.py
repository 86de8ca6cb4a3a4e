"""The benches: what they count is right, and nothing is timed that computes something else."""

import copy
import itertools
import json
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import cli
import kernels.dice
import metrics
import peers
import reciprocal
from reciprocal import VNet

ROOT = Path(__file__).parent.parent
TINY = "--device cpu --patch 16 16 16 --filters 2 --depth 2 --rounds 1"


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """No interpreter, which would only make the loss slow; and the switches of the benches back where they were."""
    monkeypatch.setattr(kernels.dice, "INTERPRETED", False)
    backends, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    for name in ("benchmark", "allow_tf32"):
        monkeypatch.setattr(backends, name, getattr(backends, name))
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """`bench.py ARGUMENTS --json FILE` at a tiny size: its exit status, and what it wrote or None."""

    def run(arguments: str):
        path = tmp_path / "rows.json"
        monkeypatch.setattr("sys.argv", ["bench.py", *shlex.split(f"{TINY} {arguments} --json {path}")])
        return cli.cli(bench.main), json.loads(path.read_text()) if path.exists() else None

    return run


def multiplications(patch, filters: int, depth: int) -> int:
    """Of the V-Net's forward pass for one patch of one channel and two classes."""
    convs, voxels, width = (1, 2, 3, 3, 3), int(np.prod(patch)), [filters * 2**level for level in range(depth + 1)]
    total = voxels * (27 * filters + 2 * filters)  # the first convolution, the head
    for level, (n, w) in enumerate(zip(convs, width, strict=False)):
        pairs = n - 1 + n if level == 0 else 2 * n  # encoder and decoder
        total += (pairs if level < depth else n) * 27 * w * w * voxels // 8**level
    for level, (fine, coarse) in enumerate(itertools.pairwise(width)):
        total += 2 * fine * coarse * voxels // 8**level  # down: 8 taps at an eighth of the voxels; up: one tap a voxel
    return total


@pytest.mark.parametrize("patch, filters, depth", [((112, 112, 80), 16, 4), ((16, 32, 16), 3, 2)])
def test_the_counted_operations_are_those_of_the_network(patch, filters, depth):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        VNet(1, 2, filters, depth)(torch.empty(1, 1, *patch))
    assert counter.get_total_flops() == 2 * multiplications(patch, filters, depth)
    if filters == 16:
        assert round(multiplications(patch, filters, depth) / 1e9, 1) == 40.1


def test_train(run, monkeypatch, capsys):
    right, steps = reciprocal.reciprocal_step, []

    def spy(nets, *others):
        channels_last = nets[0].down[0][0].weight.is_contiguous(memory_format=torch.channels_last_3d)
        steps.append((channels_last, torch.is_autocast_enabled("cpu"), nets[0].training))
        return right(nets, *others)

    monkeypatch.setattr(reciprocal, "reciprocal_step", spy)
    status, result = run("train --batch 2 --dtype bfloat16 --depth 1 --rounds 2")
    assert list(dict.fromkeys(steps)) == [(False, False, True), (True, False, True), (True, True, True)]
    row = result["rows"][1]
    told = f"{row['ms']:.3f} ms  [{row['low']:.3f}, {row['high']:.3f}]  ratio {row['ratio']:.3f}  samples_per_s "
    assert row["low"] < row["ms"] < row["high"] and told in capsys.readouterr().out
    floors = {row["name"]: row["ms"] for row in result["rows"][4:]}
    assert status == 0 and result["rows"][0]["ratio"] == 1 and list(floors) == ["floor, float32", "floor, bfloat16"]
    # four forward passes of two patches, their backward passes twice as much but for the gradient of the input
    flops = 2 * 8 * (3 * multiplications((16, 16, 16), 2, 1) - 27 * 2 * 16**3)
    for row in result["rows"]:
        assert np.isclose(row["tflop_per_s"] * row["ms"] * 1e9, flops)
        assert np.isclose(row["samples_per_s"] * row["ms"], 4000)
        floor = floors["floor, bfloat16" if row["name"].endswith(("bf16", "bfloat16")) else "floor, float32"]
        assert np.isclose(row["share_of_floor"], floor / row["ms"])
    assert result["environment"]["torch"] == torch.__version__ and result["environment"]["device"] == "cpu"
    assert result["arguments"]["patch"] == "[16, 16, 16]" and result["arguments"]["batch"] == "2"


@pytest.mark.parametrize("wrong, bf16", [(float("nan"), 1), (1.1, 1), (1, float("nan")), (1, 3)])
def test_train_refuses_another_feedback(run, monkeypatch, capsys, wrong, bf16):
    step = reciprocal.reciprocal_step
    monkeypatch.setattr(reciprocal, "reciprocal_step", lambda *a: {
        "feedback": step(*a)["feedback"] * (bf16 if torch.is_autocast_enabled("cpu") else wrong)})
    assert run("train --batch 2 --dtype bfloat16") == (2, None)
    name = "ours, contiguous" if wrong != 1 else "ours, bf16"
    assert f"{name}: the first feedback is" in capsys.readouterr().err


def test_the_authors_step_is_ours():
    """The feedback and what two steps make of both networks, in float64."""
    cfg = reciprocal.Config(**reciprocal.PRESETS["paper"], dropout=False, lr=0.1)
    start, batch = [VNet(1, 2, 2, 2).double() for _ in range(2)], {}
    for name in ("x_l", "x_u"):
        batch[name] = torch.randn(2, 1, 16, 16, 16, dtype=torch.float64)
    batch["y_l"] = (batch["x_l"][:, 0] > 0).byte()
    results = []
    for step in (peers.authors_step, reciprocal.reciprocal_step):
        nets = copy.deepcopy(start)
        optimizers = [reciprocal.make_optimizer(cfg, net) for net in nets]
        feedback = [step(nets, optimizers, batch, cfg)["feedback"].item() for _ in range(2)]
        results.append((feedback, [dict(net.named_parameters()) for net in nets]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_networks_that_do_not_compile_are_left_out(run, monkeypatch, capsys):
    def broken(x):
        raise RuntimeError("no compiler\nmore of it")

    monkeypatch.setattr(VNet, "compile", lambda net: setattr(net, "forward", broken))
    status, result = run("train --batch 2 --compile")
    assert status == 0 and len(result["rows"]) == 4
    assert "ours, compiled: left out, no compiler\n" in capsys.readouterr().out


def test_infer(run, monkeypatch):
    right, asked = reciprocal.predict_label, []
    monkeypatch.setattr(reciprocal, "predict_label", lambda net, case, cfg: asked.append(cfg) or right(net, case, cfg))
    status, result = run("infer --volume 20 24 16 --stride 4 8 8")
    assert status == 0 and {row.get("voxels_differ") for row in result["rows"][:3]} <= set(range(20))
    assert list(dict.fromkeys((cfg.windows, *cfg.patch, *cfg.stride) for cfg in asked)) == [
        (n, 16, 16, 16, 4, 8, 8) for n in (1, reciprocal.Config.windows)]
    windows = 2 * 2 * 1
    for row in result["rows"]:
        assert np.isclose(row["tflop_per_s"] * row["ms"] * 1e9, windows * 2 * multiplications((16, 16, 16), 2, 2))


def test_infer_refuses_other_labels(run, monkeypatch, capsys):
    right = reciprocal.predict_label
    monkeypatch.setattr(reciprocal, "predict_label", lambda *a: right(*a).roll(1, 0))
    assert run("infer --volume 20 24 16 --stride 4 8 8") == (2, None)
    assert "ours, 1 window: " in capsys.readouterr().err


def test_the_authors_window_is_ours():
    torch.manual_seed(0)
    net, image = VNet(1, 3, 2, 2).eval(), torch.randn(1, 19, 24, 16)
    theirs = peers.authors_segment(net, image.numpy(), (16, 16, 16), (5, 3, 4))
    ours = reciprocal.segment(net, image, (16, 16, 16), (5, 3, 4))
    assert np.allclose(theirs, ours, atol=1e-6)


def test_only_ties_may_be_labeled_otherwise():
    probs = np.float32([[0.9, 0.5001, 0.2], [0.1, 0.4999, 0.8]]).reshape(2, 3, 1, 1)
    assert bench.differing("same", np.uint8([0, 0, 1]).reshape(3, 1, 1), probs, 1e-3) == 0
    assert bench.differing("tie", np.uint8([0, 1, 1]).reshape(3, 1, 1), probs, 1e-3) == 1
    with pytest.raises(cli.BadInput, match="wrong: 1 of 3 voxels"):
        bench.differing("wrong", np.uint8([1, 1, 1]).reshape(3, 1, 1), probs, 1e-3)


@pytest.mark.parametrize("key, wrong", [("asd", float("nan")), ("asd", 0.2087), ("hd95", 1.001)])
def test_surface_refuses_other_distances(run, monkeypatch, capsys, key, wrong):
    monkeypatch.setattr(metrics, "score", lambda *masks: peers.by_scipy(*masks) | {key: wrong})
    assert 0.2 < peers.by_scipy(*bench.blobs((16, 16, 16)))["asd"] < 0.2087
    assert run("surface") == (2, None)
    assert "ours, CPU: another distance" in capsys.readouterr().err


def test_the_peers_scores_are_ours():
    """Of masks that differ more than those of the bench."""
    prediction, label = bench.blobs((24, 24, 24))
    prediction = np.roll(prediction, (4, 1), (1, 2)) & (np.arange(24) < 14)
    expected = metrics.score(prediction, label)
    for peer in peers.by_medpy, peers.by_scipy:
        found = peer(prediction, label)
        assert found == pytest.approx({key: expected[key] for key in found}) and found["hd95"] > 2


def test_a_peer_that_fails_is_left_out(run, monkeypatch, capsys):
    monkeypatch.setattr(bench, "installed", lambda package: package in ("medpy", "scipy"))
    monkeypatch.setattr(peers, "by_medpy", lambda *_: [][0])
    status, result = run("surface")
    assert status == 0 and [row["name"][:5] for row in result["rows"]] == ["SciPy", "ours,"]
    assert "MedPy: left out, list index out of range\n" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [float("nan"), 1.1])
def test_dice_refuses_other_gradients(run, monkeypatch, capsys, wrong):
    right = peers.eager_loss
    monkeypatch.setattr(peers, "eager_loss", lambda *a: wrong * right(*a))
    assert run("dice --batch 1") == (2, None)
    assert "another gradient" in capsys.readouterr().err


def test_all_the_gradients_that_are_asked_for_are_compared():
    """Here the second alone is wrong."""
    args = SimpleNamespace(device=torch.device("cpu"), rounds=1)
    inputs = [torch.randn(9, requires_grad=True) for _ in range(2)]
    others = {"other": (lambda x, weight: x * weight + weight, 1e-2)}
    with pytest.raises(cli.BadInput, match="other: another gradient"):
        bench.against_bytes(args, None, torch.mul, inputs, None, 1, checked=2, others=others)


@pytest.mark.parametrize("arguments, moved", [  # bytes a voxel, as the kernels' files count them, of 2 channels
    ("dice --classes 3", 3 * 3 * 4 + 2), ("dice --dtype bfloat16", 3 * 2 * 2 + 2), ("norm", 8 * 2 * 4),
    ("conv --dtype bfloat16", 6 * 2 * 2)])
def test_the_floor_is_the_bytes_at_the_speed_of_a_copy(run, monkeypatch, arguments, moved):
    for module, ours in (bench, "dice_ce"), (bench.norm, "norm_relu"), (bench.conv, "convolve"):
        monkeypatch.setattr(module, ours, None)  # on a CPU the reference is measured, and not ours as the reference
    monkeypatch.setattr(bench.time, "perf_counter", itertools.count().__next__)  # each turn takes a second
    for row in run(f"{arguments} --batch 1")[1]["rows"]:
        assert row["gb_per_s"] == pytest.approx(moved * 16**3 / 1e9)
        assert row["share_of_floor"] == pytest.approx(moved * 16**3 / 2**29)  # 256 MiB are read and written


def test_the_floor_is_the_operations_at_the_speed_of_a_product(run, monkeypatch):
    monkeypatch.setattr(bench.time, "perf_counter", itertools.count().__next__)
    rows = run("train --batch 2")[1]["rows"]
    share = rows[0]["tflop_per_s"] * 1e12 / (2 * 1024**3)
    for key, factor in dict(ms=1000, low=1000, high=1000, ratio=1).items():
        assert rows[-1][key] == pytest.approx(factor * share)


@pytest.mark.parametrize("arguments", ["train --batch 0", "infer --volume 20 0 16", "train --rounds 0",
                                       "dice --classes 1", "dice --classes 257", "surface --patch 7 8 8", "conv"])
def test_sizes_that_measure_nothing_are_refused(run, arguments):
    assert run(arguments) == (2, None)


@pytest.mark.parametrize("name", ["dice", "norm", "conv"])
def test_the_rounding_of_bf16_is_accepted(run, name):
    assert run(f"{name} --batch 1 --dtype bfloat16")[0] == 0


def test_a_turn_is_as_many_calls_as_fill_it(monkeypatch):
    """All of them in turn; the two rounds to warm up, which are slower here, do not count."""
    clock, calls = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def contestant(name, seconds):
        def call():
            clock[0] += next(seconds)
            calls.append(name)
        return call

    seconds = dict(quick=itertools.repeat(0.001), slow=iter((30, 20, 1, 2, 3, 9, 10)))
    both = {name: contestant(name, each) for name, each in seconds.items()}
    quick, slow = bench.interleave(both, 5, torch.device("cpu"))
    assert calls == ["quick", "slow"] + 6 * (20 * ["quick"] + ["slow"])
    assert [quick[key] for key in ("ms", "low", "high", "ratio")] == pytest.approx([1, 1, 1, 1])
    assert [slow[key] for key in ("ms", "low", "high", "ratio")] == pytest.approx([3000, 1800, 9200, 3000])


def test_bench_gpu_skips_what_is_done_or_failed_and_stops_in_time(tmp_path):
    def call(*parts, **variables):
        settings = [f"{name}={value}" for name, value in variables.items()]
        done = subprocess.run(["env", *settings, ROOT / "bench_gpu.sh", tmp_path, *parts], text=True,
                              capture_output=True)
        return done.returncode, done.stdout + done.stderr

    subprocess.run(["bash", "-n", ROOT / "bench_gpu.sh"], check=True)
    (tmp_path / "train.done").touch()
    assert call("train", PYTHON="false") == (0, f"all parts are done; results in {tmp_path}/keep\n")
    asleep = tmp_path / "asleep"
    asleep.write_text("#!/bin/sh\nexec sleep $SLEEP\n")
    asleep.chmod(0o755)
    status, text = call("norm-float32", "infer", PYTHON=asleep, SLEEP=4, LIMIT=33, MARGIN=30)
    assert status == 3 and "norm-float32: status 0" in text and "\ninfer: not begun, " in text
    assert call("infer", LIMIT=7, MARGIN=8) == (2, "error: LIMIT 7: more than MARGIN 8, or no part would begin\n")
    status, text = call("infer", "dice-float32-2", "train", PYTHON="false")
    assert status == 1 and text.endswith("failed: infer dice-float32-2\n")
    assert call("infer", PYTHON="true")[0] == 0 and (tmp_path / "infer.done").exists()
    assert not (tmp_path / "infer.failed").exists() and (tmp_path / "dice-float32-2.failed").exists()
    assert [call("surface", PYTHON=asleep, SLEEP=60, LIMIT=2, MARGIN=1)[0] for _ in range(2)] == [3, 1]  # cut off twice
    for part in ("tests", "surface-large", "dice-float32-14", "dice-bfloat16-2", "dice-bfloat16-14",
                 "norm-float32", "norm-bfloat16", "conv-bfloat16"):
        (tmp_path / f"{part}.done").touch()
    assert call(PYTHON="true", SEEDS=" ") == (1, "failed: dice-float32-2 surface\n")  # unless named, not tried again
    assert call("nothing") == (2, "error: no part nothing; the header of this file lists them\n")
    assert (tmp_path / "keep" / "results.tar.gz.aa").exists()


@pytest.mark.parametrize("readme,column", [("README.md", slice(2, 4)), ("results/README.md", slice(3, 4))])
def test_the_kept_benches_have_the_numbers_of_their_tables(readme, column):
    """A table's row, and those below it without a command, are of the JSON that it links: `ms` or `ratio`."""
    rows, read = [], 0
    for line in (ROOT / readme).read_text().splitlines():
        if kept := re.search(r"\(((?:\w+/)*)([\w-]+-(?:cpu|h100|h200)[\w-]*\.json)\)", line):
            rows = json.loads((ROOT / "results/bench" / kept[2]).read_text())["rows"]
        elif not line.startswith("| |"):
            rows = []
        cells = " ".join(line.split("|")[column]) if rows else ""
        for number in re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w.])", cells):
            decimals = len(number.partition(".")[2])
            assert any(f"{row[key]:.{decimals}f}" == number for row in rows for key in ("ms", "ratio")), line
            read += 1
    assert read > 10
