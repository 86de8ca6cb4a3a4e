"""metrics.py against MedPy, bit for bit; the rules for empty masks; summaries; the command line."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

import metrics
import stats
from cli import BadInput, cli

SPACINGS = [None, 0.3, (2.0, 1.0, 0.5), (0.7, 1.3, 3.1), (5.0, 0.4, 0.4), (1e-3, 1.0, 1.0)]


def blob(rng, shape, smooth=2.0):
    mask = gaussian_filter(rng.standard_normal(shape), smooth) > 0.02
    mask[tuple(rng.integers(0, shape))] = True
    return mask


def medpy(prediction, label, spacing=None):
    binary = pytest.importorskip("medpy.metric.binary")
    return {
        "dice": binary.dc(prediction, label),
        "jaccard": binary.jc(prediction, label),
        "asd": binary.asd(prediction, label, spacing),
        "assd": binary.assd(prediction, label, spacing),
        "hd95": binary.hd95(prediction, label, spacing),
    }


def same(prediction, label, spacing=None):
    expected = medpy(prediction, label, spacing)
    assert metrics.score(prediction, label, spacing) == expected
    for name, value in expected.items():
        assert getattr(metrics, name)(prediction, label, spacing) == value, name


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", range(25))
def test_blobs(seed, spacing):
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, 26, 3)
    same(blob(rng, shape, rng.uniform(0, 3)), blob(rng, shape, rng.uniform(0, 3)), spacing)


@pytest.mark.parametrize("spacing", [None, (0.7, 1.3)])
@pytest.mark.parametrize("seed", range(10))
def test_two_dimensions(seed, spacing):
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, 60, 2)
    same(blob(rng, shape), blob(rng, shape), spacing)


@pytest.mark.parametrize("spacing", [None, (0.7, 1.3, 3.1)])
@pytest.mark.parametrize("seed", range(5))
def test_beyond_the_probe(seed, spacing):
    """So far apart and unequal that some points find their neighbor by the probe and most by the tree."""
    rng = np.random.default_rng(seed)
    first, second = np.zeros((2, 50, 40, 45), bool)
    first[:20, :15, :15] = blob(rng, (20, 15, 15))
    second[8:14, 12:18, 13:17] = True
    second[40:, 30:, 40:] = blob(rng, (10, 10, 5))
    same(first, second, spacing)
    same(first, second & (np.arange(50) >= 40)[:, None, None], spacing)


R = metrics.REACH


@pytest.mark.parametrize(("spacing", "near", "far"), [
    (None, (R + 1, 0), (R, R)), ((1, 1, 5), (R + 6, 0), (0, 10)), ((1, 5, 1), (0, R + 6), (10, 0))])  # fmt: skip
def test_end_of_the_table(spacing, near, far):
    """The nearest column lies outside the searched square, a farther one inside."""
    prediction, label = np.zeros((2, 3, 70, 70), bool)
    prediction[1, 9, 9] = label[1, 9 + near[0], 9 + near[1]] = label[1, 9 + far[0], 9 + far[1]] = True
    same(prediction, label, spacing)


@pytest.mark.parametrize("width", range(R - 1, R + 4))
def test_search_across_the_border(width):
    """A step back from the first voxel of a line does not come in again at the end of the line before."""
    for shape, start, end in (((9, width, 1), (5, 0, 0), (4, -1, 0)), ((1, 2, width), (0, 1, 0), (0, 0, -1))):
        prediction, label = np.zeros((2, *shape), bool)
        prediction[start] = label[end] = True
        same(prediction, label)
        same(label, prediction)


def test_corners_of_the_volume():
    full = np.ones((9, 8, 7), bool)
    corner, opposite = np.zeros((2, 9, 8, 7), bool)
    corner[0, 0, 0] = opposite[-1, -1, -1] = True
    for prediction in (full, corner, opposite, corner | opposite):
        for label in (full, corner, opposite, corner | opposite):
            same(prediction, label, (0.7, 1.3, 3.1))


def test_by_hand():
    prediction, label = np.zeros((2, 12, 1, 20), bool)
    prediction[3, 0, 4] = label[6, 0, 8] = True
    assert metrics.score(prediction, label) == dict(dice=0, jaccard=0, asd=5, assd=5, hd95=5)
    assert metrics.asd(prediction, label, (2, 1, 2)) == 10
    prediction[6, 0, 8] = True
    assert metrics.score(prediction, label) == dict(dice=2 / 3, jaccard=0.5, asd=2.5, assd=5 / 3, hd95=4.5)
    assert metrics.score(label, label) == dict(dice=1, jaccard=1, asd=0, assd=0, hd95=0)


def test_asd_is_one_directional():
    prediction, label = np.zeros((2, 5, 5, 30), bool)
    prediction[2, 2, 2] = label[2, 2, 2] = label[2, 2, 22] = True
    assert metrics.asd(prediction, label) == 0
    assert metrics.asd(label, prediction) == 10


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_tensors_and_dtypes(kind):
    rng = np.random.default_rng(0)
    first, second = blob(rng, (11, 12, 13)), blob(rng, (11, 12, 13))
    expected = metrics.score(first, second, (0.7, 1.3, 3.1))
    tensors = [torch.from_numpy(m).to(kind) * torch.tensor(1 if kind == torch.bool else 3, dtype=kind)
               for m in (first, second)]  # fmt: skip
    assert metrics.score(*tensors, (0.7, 1.3, 3.1)) == expected
    assert metrics.score(tensors[0], second, (0.7, 1.3, 3.1)) == expected
    assert metrics.score(tensors[0].numpy(), tensors[1].numpy(), (0.7, 1.3, 3.1)) == expected
    assert metrics.score(np.asfortranarray(first), second[::-1][::-1], (0.7, 1.3, 3.1)) == expected
    for name in metrics.METRICS:
        assert getattr(metrics, name)(*tensors, (0.7, 1.3, 3.1)) == expected[name]


@pytest.mark.gpu
@pytest.mark.parametrize("spacing", [None, (0.7, 1.3, 3.1)])
def test_gpu_agrees(spacing):
    rng = np.random.default_rng(0)
    label = (blob(rng, (40, 41, 42)) + 2 * blob(rng, (40, 41, 42))) % 4
    prediction = np.roll(label, 2, 0)
    prediction[prediction == 3] = 0
    rows = metrics.score_classes(prediction, label, ["background", "a", "b", "c", "d"], spacing)
    on_gpu = (torch.from_numpy(v).cuda() for v in (prediction, label))
    others = metrics.score_classes(*on_gpu, ["background", "a", "b", "c", "d"], spacing)
    for row, other in zip(rows, others, strict=True):
        assert (row["class"], row["failure"]) == (other["class"], other["failure"])
        for name in metrics.METRICS:
            assert row[name] == pytest.approx(other[name], rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 8)])
def test_empty_masks(shape):
    empty, full = np.zeros(shape, bool), np.ones(shape, bool)
    assert all(math.isnan(value) for value in metrics.score(empty, empty).values())
    for pair in ((empty, full), (full, empty)):
        score = metrics.score(*pair)
        assert score["dice"] == score["jaccard"] == 0
        assert all(math.isnan(score[name]) for name in metrics.DISTANCES)
        assert math.isnan(metrics.asd(*pair))


@pytest.mark.parametrize("shapes", [((4, 4), (4, 5)), ((4,), (4,)), ((1, 4, 4, 4),) * 2, ((4, 4), (1, 4, 4))])
def test_bad_shapes(shapes):
    for name in (*metrics.METRICS, "score"):
        with pytest.raises(BadInput, match="shape"):
            getattr(metrics, name)(*map(np.ones, shapes))


@pytest.mark.parametrize("spacing", [(1, 1), (1, 1, 0), (1, 1, -1), (1, 1, math.nan), (1, 1, math.inf), -2.0])
def test_bad_spacing(spacing):
    with pytest.raises(BadInput, match="spacing"):
        metrics.score(np.ones((3, 3, 3)), np.ones((3, 3, 3)), spacing)


def test_classes():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, (9, 9, 9)).astype(np.uint8)
    prediction = np.where(label == 2, 0, label)
    rows = metrics.score_classes(prediction, label, ["background", "one", "two", "three"], (1, 1, 2))
    assert [row["class"] for row in rows] == ["one", "two", "three"]
    assert [row["failure"] for row in rows] == [0, 1, 0]
    assert [row["dice"] for row in rows[:2]] == [1, 0] and math.isnan(rows[2]["dice"])
    tensors = torch.from_numpy(prediction), torch.from_numpy(label)
    named = metrics.score_classes(*tensors, {2: "two"}, (1, 1, 2))
    np.testing.assert_equal(named, rows[1:2])


def rows_of(dice, hd95, failure=0, case="a", name="x", **keys):
    row = dict.fromkeys(metrics.METRICS, 0.0) | {"dice": dice, "hd95": hd95, "failure": failure}
    return keys | {"case": case, "class": name} | row


def test_summary_means_classes_before_cases():
    rows = [rows_of(0.5, 1.0, case="a", name="x"), rows_of(0.7, 3.0, case="a", name="y"),
            rows_of(0.8, 6.0, case="b", name="x"), rows_of(math.nan, math.nan, case="b", name="y"),
            rows_of(0.0, math.nan, failure=1, case="c", name="x")]  # fmt: skip
    (summary,) = stats.summarize(rows, by=())
    assert (summary["cases"], summary["failures"], summary["absent"]) == (3, 1, 1)
    assert summary["dice"]["mean"] == pytest.approx((0.6 + 0.8 + 0.0) / 3) and summary["dice"]["n"] == 3
    assert summary["dice"]["sd"] == pytest.approx(np.std([0.6, 0.8, 0.0], ddof=1))
    assert (summary["hd95"]["mean"], summary["hd95"]["n"]) == (4.0, 2)  # a failure is not 0 mm
    (alone,) = stats.summarize(rows[-1:], by=())
    assert alone["dice"] == {"mean": 0, "sd": 0, "low": 0, "high": 0, "n": 1}
    assert alone["hd95"]["n"] == 0 and math.isnan(alone["hd95"]["mean"])


def test_summary_groups():
    rows = [rows_of(d, 1.0, case=c, set=s, network=n)
            for s, n, d in (("test", "student", 0.9), ("test", "teacher", 0.8), ("other", "student", 0.7))
            for c in "ab"]  # fmt: skip
    summaries = stats.summarize(rows)
    assert [(s["set"], s["network"], s["cases"]) for s in summaries] == [
        ("test", "student", 2), ("test", "teacher", 2), ("other", "student", 2)]  # fmt: skip
    assert [round(s["dice"]["mean"], 9) for s in summaries] == [0.9, 0.8, 0.7]
    assert stats.summarize([]) == []
    text = stats.table(summaries, "mm").splitlines()
    assert len(text) == 4 and "HD95 mm" in text[0] and "90.00 ± 0.00 [90.00, 90.00]" in text[1]


def test_interval_is_scipys_and_covers():
    """The percentile bootstrap of SciPy, and near the normal interval on many normal values."""
    bootstrap = pytest.importorskip("scipy.stats").bootstrap
    values = np.random.default_rng(3).normal(10, 2, 400)
    (summary,) = stats.summarize([rows_of(v, 1.0, case=i) for i, v in enumerate(values)], by=())
    low, high = summary["dice"]["low"], summary["dice"]["high"]
    other = bootstrap((values,), np.mean, method="percentile", random_state=1).confidence_interval
    half = 1.96 * values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((other.low, other.high), abs=0.02)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


# ---- the command line -----------------------------------------------------------------------------------


def save(path: Path, volume, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([0.5, 2.0, 3.0, 1.0]) if affine is None else affine
    nib.save(nib.Nifti1Image(np.asarray(volume), affine), path)
    return path


def run(*arguments):
    script = Path(metrics.__file__)
    return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def folders(tmp_path):
    """Two classes, three cases: predicted perfectly, a voxel off along the first axis, not at all."""
    label = np.zeros((20, 12, 10), np.uint8)
    label[4:10, 3:9, 3:7], label[12:15, 3:9, 3:7] = 1, 2
    for i in range(3):
        save(tmp_path / "labelsTr" / f"c_{i:04d}.nii.gz", label)
    save(tmp_path / "masks" / "c_0000.nii.gz", label)
    save(tmp_path / "masks" / "c_0001.nii.gz", np.roll(label, 1, 0))
    (tmp_path / "labelsTr" / "._c_0000.nii.gz").write_bytes(b"a Mac's leftover")
    return tmp_path / "masks", tmp_path / "labelsTr", label


def test_evaluate(folders, capsys):
    masks, labels, label = folders
    rows = metrics.evaluate(masks, labels)
    assert [(r["case"], r["class"]) for r in rows] == [(f"c_000{i}", c) for i in range(3) for c in "12"]
    assert rows[0]["dice"] == 1 and rows[0]["hd95"] == 0
    assert {k: rows[2][k] for k in metrics.METRICS} == metrics.score(np.roll(label, 1, 0) == 1, label == 1)
    assert [r["failure"] for r in rows] == [0, 0, 0, 0, 1, 1]
    assert rows[4]["dice"] == 0 and math.isnan(rows[4]["hd95"])
    assert "c_0002: no prediction" in capsys.readouterr().err
    in_mm = metrics.evaluate(masks, labels, "mm")
    expected = metrics.asd(np.roll(label, 1, 0) == 1, label == 1, (0.5, 2, 3))
    assert in_mm[2]["asd"] == expected != rows[2]["asd"]
    more = label.copy()
    more[0, 0, 0] = 1
    save(masks / "c_0001.nii.gz", more)
    assert metrics.evaluate(masks, labels)[2]["asd"] == metrics.asd(more == 1, label == 1) > 0  # 0 the other way


@pytest.mark.parametrize(("unit", "size"), [("voxels", (20, 12, 10)), ("mm", (10, 24, 30))])
def test_diagonal(folders, unit, size):
    rows = metrics.evaluate(*folders[:2], unit, "diagonal")
    assert [rows[4][name] for name in metrics.DISTANCES] == pytest.approx([math.hypot(*size)] * 3)
    assert rows[4]["failure"] == 1 and rows[2]["hd95"] < 3
    assert stats.summarize(rows, by=())[0]["hd95"]["n"] == 3


@pytest.mark.parametrize("labels", ['{"background": 0, "head": 1, "tail": 2, "x": 3}',
                                    '{"0": "background", "1": "head", "2": "tail", "3": "x"}'])  # fmt: skip
def test_dataset_json_names_classes(folders, labels):
    (folders[1].parent / "dataset.json").write_text(f'{{"labels": {labels}}}')
    rows = metrics.evaluate(*folders[:2])
    assert [row["class"] for row in rows[:3]] == ["head", "tail", "x"]
    assert math.isnan(rows[2]["dice"]) and rows[2]["failure"] == 0


def test_missing_prediction_of_an_empty_label_is_a_failure(tmp_path):
    for folder in ("masks", "labels"):
        save(tmp_path / folder / "a.nii.gz", np.ones((4, 4, 4), np.uint8))
    save(tmp_path / "labels" / "b.nii.gz", np.zeros((4, 4, 4), np.uint8))
    rows = metrics.evaluate(tmp_path / "masks", tmp_path / "labels")
    assert [row["failure"] for row in rows] == [0, 1]


def test_command_line(folders, tmp_path):
    done = run(*folders[:2], "--spacing", "mm", "--csv", tmp_path / "scores.csv")
    assert done.returncode == 0, done.stderr
    assert "c_0002: no prediction" in done.stderr and "HD95 mm" in done.stdout
    last = done.stdout.splitlines()[-1].split()
    assert last[:4] == ["mean", "3", "2", "0"] and "±" in last
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and rows[0]["dice"] == "1.0"
    assert rows[5]["hd95"] == "nan" and rows[5]["failure"] == "1"
    files = run(folders[0] / "c_0001.nii.gz", folders[1] / "c_0002.nii.gz")  # two files need no common name
    assert files.returncode == 0 and "c_0002  1 " in files.stdout


def bad_inputs(folders):
    masks, labels, label = folders
    other = masks.parent / "other"
    yield "no label in", [save(other / "stray" / "c_0009.nii", label).parent, labels]
    yield "no .nii", [other / "nowhere", labels]
    yield "shape or affine", [save(other / "c_0000.nii", label[1:]), labels / "c_0000.nii.gz"]
    yield "shape or affine", [save(other / "a.nii", label, np.eye(4)), labels / "c_0000.nii.gz"]
    yield "0.5 is no label", [save(other / "b.nii", label * np.float32(0.5)), labels / "c_0000.nii.gz"]
    yield "-2 is no label", [save(other / "d.nii", -label.astype(np.int16)), labels / "c_0000.nii.gz"]
    yield "nan is no label", [save(other / "e.nii", np.where(label, np.nan, 0)), labels / "c_0000.nii.gz"]
    yield "cut.nii.gz", [other / "cut.nii.gz", labels / "c_0000.nii.gz"]
    yield "scores.csv", [masks, labels, "--csv", other / "nowhere" / "scores.csv"]
    save(other / "twice" / "c_0000.nii", label)
    save(other / "twice" / "c_0000.nii.gz", label)
    yield "a case as .nii and .nii.gz", [other / "twice", labels]


def test_bad_input_is_one_line(folders, monkeypatch, capsys):
    cut = folders[0].parent / "other" / "cut.nii.gz"
    cut.parent.mkdir()
    cut.write_bytes((folders[1] / "c_0000.nii.gz").read_bytes()[:60])
    for message, arguments in bad_inputs(folders):
        monkeypatch.setattr(sys, "argv", ["metrics.py", *map(str, arguments)])
        assert cli(metrics.main) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and message in error, error
    (folders[1].parent / "dataset.json").write_text('{"labels": ["head"]}')
    done = run(*folders[:2])
    assert done.returncode == 2 and "dataset.json: invalid" in done.stderr and "Traceback" not in done.stderr
    (folders[1].parent / "dataset.json").write_text('{"labels": {"background": 0, "head": 1}}')
    with pytest.raises(BadInput, match="2 is no label"):
        metrics.evaluate(*folders[:2])
