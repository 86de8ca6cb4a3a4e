"""`python metrics.py compare`: methods of finished runs in a table, tested against one of them."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import wilcoxon

import data
import metrics
import reciprocal
import stats
from cli import BadInput, cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FIELDS = ("set", "network", "case", "class", *stats.METRICS, "failure")
DICE = np.array([[0.81, 0.72, 0.93, 0.64, 0.85, 0.76, 0.57, 0.88], [0.80, 0.75, 0.91, 0.66, 0.83, 0.79, 0.52, 0.84]])


def make_run(folder: Path, dice, *, network="student", part="test", cases="abcdefgh", classes=("x",), iterations=400,
             trained=("l1", "l2"), test=None, edit=None, **config):
    """A run's folder: dice is a number a case, or (cases, classes); None is a failure. edit(row) changes its rows."""
    rows = []
    for case, numbers in zip(cases, dice, strict=False):
        for name, number in zip(classes, np.atleast_1d(numbers), strict=True):
            row = dict(zip(FIELDS, (part, network, case, name, number, 0, 1.0, 1.0, 2.0, 0), strict=True))
            if number is None:
                row |= dict(dice=0.0, asd=math.nan, assd=math.nan, hd95=math.nan, failure=1)
            else:
                row["jaccard"] = number / (2 - number)
            rows.append(row | (edit or (lambda row: {}))(row))
    values = data.RECIPES["hippocampus"] | data.PRESETS[config.get("preset", "strong")]
    values = reciprocal.asdict(reciprocal.config_of(values | dict(data="hippocampus", labeled=0.05) | config))
    split = dict(labeled=trained, unlabeled=["u1", "u2", "u3"], test=test or [*cases])
    summary = dict(config=values, counts="", synthetic=values["data"] == "phantom", iterations=iterations, cases=split)
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    stats.write_csv(folder / "metrics.csv", rows)
    return folder


@pytest.fixture
def run(tmp_path):
    """make_run, each call in a folder of its own."""
    return lambda *arguments, **keys: make_run(tmp_path / f"run{len([*tmp_path.iterdir()])}", *arguments, **keys)


def call(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["metrics.py", "compare", *map(str, arguments)])
    return cli(metrics.main), *capsys.readouterr()


def test_classes_then_seeds_then_cases(run):
    first = run([(0.9, 0.7), (0.5, 0.3), (0.6, 0.4)], classes=("x", "y"), seed=2)
    second = run([(0.7, 0.5), (0.9, 0.7), (0.8, 0.6)], classes=("x", "y"), seed=1)
    (row,) = stats.compare([first, second])
    cases = [0.7, 0.6, 0.6]
    assert (row["method"], row["seeds"], row["test"]) == ("reciprocal (strong)", [1, 2], 3)
    assert (row["labeled"], row["unlabeled"], row["iterations"]) == (2, 3, 400)
    assert row["dice"]["mean"] == pytest.approx(np.mean(cases))
    assert row["dice"]["sd"] == pytest.approx(np.std(cases, ddof=1))
    assert row["dice"]["low"] == pytest.approx(0.6) and row["dice"]["high"] == pytest.approx(0.7)
    assert row["dice"]["n"] == 3
    assert row["by_seed"] == pytest.approx([np.mean([0.6, 0.8, 0.7]), np.mean([0.8, 0.4, 0.5])])


def test_wilcoxon_of_seed_averaged_cases(run):
    runs = [run(dice, seed=seed) for seed, dice in enumerate(DICE)]
    other = DICE - np.array([0.05, 0.01, -0.02, 0.07, 0.04, 0.06, 0.03, 0.08]) - [[0.001], [-0.004]]
    runs += [run(dice, seed=seed, method="supervised") for seed, dice in enumerate(other)]
    reference, row = stats.compare(runs)
    pairs = other.mean(0) - DICE.mean(0)
    assert reference["method"] == row["reference"] == "reciprocal (strong)" and math.isnan(reference["p"])
    assert row["pairs"] == pytest.approx(pairs) and row["difference"]["mean"] == pytest.approx(pairs.mean())
    assert row["difference"]["low"] < pairs.mean() < row["difference"]["high"] < 0
    assert row["p"] == row["p_holm"] == pytest.approx(wilcoxon(pairs).pvalue)
    assert row["p"] != pytest.approx(wilcoxon((other - DICE).ravel()).pvalue)
    swapped = stats.compare(runs, reference="supervised")[0]
    assert swapped["difference"]["mean"] == pytest.approx(-pairs.mean()) and swapped["p"] == pytest.approx(row["p"])


def test_holm(run, monkeypatch):
    """Three p values of 0.01, 0.04 and 0.03: 3 * 0.01, 2 * 0.03, and for 0.04 no less than that before it."""
    known = iter([0.01, 0.04, 0.03])
    monkeypatch.setattr("scipy.stats.wilcoxon", lambda pairs: type("Result", (), {"pvalue": next(known)}))
    runs = [run(DICE[0] - 0.01 * i, lr=0.1 + i, seed=1) for i in range(4)]
    rows = stats.compare(runs)
    assert [row["p"] for row in rows[1:]] == [0.01, 0.04, 0.03]
    assert [row["p_holm"] for row in rows[1:]] == pytest.approx([0.03, 0.06, 0.06])
    known = iter([0.9, 0.8, 0.7])
    assert [row["p_holm"] for row in stats.compare(runs)[1:]] == [1, 1, 1]


def test_methods_that_agree(run, monkeypatch, capsys):
    """The test is not asked: SciPy 1.11 raises ValueError where every difference is zero."""
    monkeypatch.setattr("scipy.stats.wilcoxon", None)
    runs = [run(DICE[0]), run(DICE[0], method="supervised")]
    row = stats.compare(runs)[1]
    assert row["p"] == row["p_holm"] == 1 and row["difference"]["low"] == row["difference"]["high"] == 0
    status, out, _ = call(monkeypatch, capsys, *runs)
    assert status == 0 and "+0.00 [+0.00, +0.00]" in out


@pytest.mark.parametrize(("cases", "verdict"), [(5, False), (6, True)])
def test_too_few_cases_for_a_verdict(run, monkeypatch, capsys, cases, verdict):
    runs = [run(DICE[0, :cases], cases="abcdefgh"[:cases]),
            run(DICE[0, :cases] - 0.01 * np.arange(1, cases + 1), cases="abcdefgh"[:cases], method="supervised")]
    row = stats.compare(runs)[1]
    assert math.isnan(row["p"]) == math.isnan(row["p_holm"]) == (not verdict)
    status, out, _ = call(monkeypatch, capsys, *runs)
    assert status == 0 and ("5 cases: too few for a verdict; Wilcoxon's test needs 6" in out) == (not verdict)
    assert ("0.031" in out) == verdict  # 2 / 2**6


def test_a_failure_is_no_distance(run, monkeypatch, capsys):
    """Of seed 1 case a fails in the class x alone, b in all; of seed 2 none; c in all seeds and classes."""
    kinds = dict(classes=("x", "y"), method="supervised")
    ones = [(0.8, 0.6)] * 5
    runs = [run([(None, 0.6), (None, None), (None, None), *ones], seed=1, **kinds),
            run([(0.8, 0.6), (0.8, 0.6), (None, None), *ones], seed=2, **kinds),
            run([(0.8, 0.6)] * 8, classes=("x", "y"))]
    row, other = stats.compare(runs)
    assert (row["failures"], other["failures"]) == (7, 0)
    assert row["hd95"]["mean"] == 2 and row["asd"]["mean"] == 1 and row["hd95"]["n"] == 7  # 0 mm would lower them
    assert row["dice"]["mean"] == pytest.approx(((0.3 + 0.7) / 2 + 0.7 / 2 + 0 + 5 * 0.7) / 8)
    assert row["dice"]["n"] == 8 and len(row["pairs"]) == 8
    status, out, _ = call(monkeypatch, capsys, *runs)
    assert status == 0 and "supervised: 7 failures" in out and "cases with no distance left: 1" in out


def test_distances_of_classes_before_seeds(run):
    """Seed 1 fails in x and is 4 off in y, seed 2 is 2 and 10 off: (4 + 6) / 2, not (2 + 7) / 2 or 16 / 3."""
    far = [{"y": 4.0}, {"x": 2.0, "y": 10.0}]
    runs = [run([(x, 0.8)], classes=("x", "y"), seed=seed, edit=lambda row, far=far[seed - 1]: {
        "hd95": far.get(row["class"], math.nan)}) for seed, x in ((1, None), (2, 0.8))]  # fmt: skip
    assert stats.compare(runs)[0]["hd95"]["mean"] == 5


def test_a_class_that_is_absent_is_left_out(run):
    """Absent from the label, and predicted by one method only: NaN in the other, and no pair."""
    absent = dict.fromkeys(stats.METRICS, math.nan)
    first = run(DICE[0], edit=lambda row: absent if row["case"] == "a" else {})
    row = stats.compare([first, run([None, *DICE[0, 1:] - 0.1], method="supervised")])[1]
    assert row["pairs"] == pytest.approx(np.full(7, -0.1)) and row["difference"]["n"] == 7 and row["dice"]["n"] == 8


def names(runs):
    return [row["method"] for row in stats.compare(runs)]


def test_names(run):
    plain, off = run(DICE[0]), run(DICE[0], feedback="off")
    assert names([plain]) == ["reciprocal (strong)"]
    assert names([off, plain]) == ["reciprocal (strong), feedback off", "reciprocal (strong)"]
    assert stats.compare([off, plain])[0]["reference"] == "reciprocal (strong)"
    assert names([off, run(DICE[0], method="mt")]) == ["reciprocal (strong), feedback off", "mt"]
    assert names([run(DICE[0], lesson="mixed")]) == ["reciprocal (strong), lesson mixed"]
    several = [run(DICE[0], method="bcp", cutmix=True), run(DICE[0], method="bcp", cutmix=False, seed=2), plain,
               run(DICE[0], method="mt", cutmix=False), run(DICE[0], lesson="mixed", cutmix=True)]
    assert names(several) == ["bcp", "reciprocal (strong)", "mt", "reciprocal (strong), cutmix, lesson mixed"]
    assert stats.compare(several)[0]["reference"] == "reciprocal (strong)"
    assert names([plain, run(DICE[0], preset="paper", lr_step=9)]) == ["reciprocal (strong)", "reciprocal (paper)"]
    assert names([plain, run(DICE[0], method="mt", filters=2)]) == ["reciprocal (strong)", "mt, filters 2"]
    paper, loss = run(DICE[0], preset="paper"), run(DICE[0], preset="paper", loss="dice", lr=0.1)
    assert names([plain, paper]) == ["reciprocal (strong)", "reciprocal (paper)"]
    assert names([loss, paper]) == ["reciprocal (paper), loss dice, lr 0.1", "reciprocal (paper)"]
    supervised = [run(DICE[0], method="supervised", iterations=n) for n in (800, 1000)]
    assert names(supervised) == ["supervised, iterations 800", "supervised, iterations 1000"]
    assert stats.compare(supervised)[1]["reference"] == "supervised, iterations 800"
    bound = run(DICE[0], method="supervised", iterations=800, trained=["l1"], labeled=1.0)
    assert names([plain, supervised[0], bound]) == ["reciprocal (strong)", "supervised, labeled 2",
                                                    "supervised, labeled 1"]
    assert names([plain, run(DICE[0], labeled=2.0, seed=2)]) == ["reciprocal (strong)"]
    for key, value in dict(lr=0.1, augment="flip", normalize="window", noise=0.1, amp="bf16", voxel=(1.0, 1.0, 1.0),
                           patch=(32, 32, 32), supervised_loss="ce", stride=(8, 8, 8), batch_l=9).items():
        for method in ("reciprocal", "supervised"):
            assert len(names([run(DICE[0], method=method), run(DICE[0], method=method, seed=2, **{key: value})])) == 2
    assert names([run(DICE[0], method="uamt", dropout=True), run(DICE[0], method="uamt", seed=2)]) == ["uamt"]
    assert names([run(DICE[0], dropout=True), run(DICE[0], method="uamt")]) == ["reciprocal (strong)", "uamt"]


def test_what_makes_no_other_method(run):
    """Where and how fast a run went; what `supervised` does not use; the seed in another run's name."""
    still = dict(out="x", root="y", device="cpu", compile=True, graph=False, windows=1, deterministic=True, log_every=3,
                 eval_every=7, eval_cases=2, save_every=9)  # fmt: skip
    older = run(DICE[0], seed=3) / "summary.json"
    summary = json.loads(older.read_text())
    del summary["config"]["voxel"], summary["config"]["graph"]
    older.write_text(json.dumps(summary))
    assert len(names([run(DICE[0]), run(DICE[0], seed=2, **still), older.parent])) == 1
    unused = dict(preset="paper", feedback="off", teacher_from="z", pretrain=9)
    supervised = [run(DICE[0], method="supervised"), run(DICE[0], method="supervised", seed=2, **unused)]
    assert names(supervised) == ["supervised"]
    taught = [run(DICE[0], seed=seed, teacher_from=f"runs/a-seed{seed}") for seed in (1, 2)]
    assert len(names(taught)) == 1
    assert names([*taught, run(DICE[0])]) == ["reciprocal (strong), teacher_from runs/a-seed", "reciprocal (strong)"]


def test_the_upper_bound_has_its_own_counts(run):
    upper = run(DICE[0], method="supervised", trained=["l1", "l2", "u1"], labeled=1.0)
    assert [(row["labeled"], row["unlabeled"]) for row in stats.compare([run(DICE[0]), upper])] == [(2, 3), (3, 3)]


def test_a_run_with_all_labels_is_in_no_table_of_unlabeled_cases(run, monkeypatch, capsys):
    upper, other = run(DICE[0], method="supervised", labeled=1.0), run(DICE[0], part="transductive")
    summary = json.loads((upper / "summary.json").read_text())
    summary["cases"]["unlabeled"] = []
    (upper / "summary.json").write_text(json.dumps(summary))
    assert call(monkeypatch, capsys, upper, "--set", "transductive")[::2] == (
        2, "error: no run has unlabeled cases; leave --set transductive out\n")
    status, shown, _ = call(monkeypatch, capsys, upper, other, "--set", "transductive")
    assert status == 0 and "Left out, without an unlabeled case: 1 of 2 runs" in shown and "supervised" not in shown
    status, shown, _ = call(monkeypatch, capsys, other, "--set", "transductive")
    assert status == 0 and "Left out" not in shown


def test_set_and_network(run):
    both = run(DICE[0])
    for network, part, dice in (("teacher", "test", DICE[1]), ("student", "transductive", DICE[1, :6])):
        other = run(dice, network=network, part=part)
        with open(both / "metrics.csv", "a") as file:
            file.writelines((other / "metrics.csv").read_text().splitlines(keepends=True)[1:])
        assert stats.compare([both])[0]["dice"]["mean"] == pytest.approx(DICE[0].mean())
        (row,) = stats.compare([both], network=network, part=part)
        assert row["dice"]["mean"] == pytest.approx(dice.mean()) and row[part] == len(dice)


# ---- the command line -----------------------------------------------------------------------------------


def test_files(run, tmp_path, monkeypatch, capsys):
    runs = [run(DICE[0], seed=1), run(DICE[1], seed=2), run(DICE[0] - 0.05, method="supervised")]
    files = [tmp_path / name for name in ("a.csv", "a.md", "a.png")]
    status, out, _ = call(monkeypatch, capsys, *runs, "--csv", files[0], "--markdown", files[1], "--plot", files[2])
    assert status == 0 and "synthetic" not in out
    assert "Methods have different seeds: reciprocal (strong) 1, 2; supervised 1" in out
    rows = stats.compare(runs)
    with open(files[0], newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == ["reciprocal (strong)", "supervised"]
    for row, line in zip(rows, lines, strict=True):
        assert (int(line["seeds"]), int(line["iterations"]), int(line["test"])) == (len(row["seeds"]), 400, 8)
        for name in ("dice", "jaccard", "asd", "hd95", "difference"):
            for key in ("mean", "sd", "low", "high"):
                assert float(line[f"{name}_{key}"]) == row[name][key]
        assert float(line["p_holm"]) == pytest.approx(row["p_holm"], nan_ok=True)
    title, _, head, rule, *body = files[1].read_text().splitlines()[:6]
    assert title == "hippocampus: test cases, student" and set(rule) == set("| -")
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    cells = dict(zip(columns, [cell.strip() for cell in body[1].strip("|").split("|")], strict=True))
    mean, sd, low, high = (100 * rows[1]["dice"][key] for key in ("mean", "sd", "low", "high"))
    assert cells["Dice %"] == f"{mean:.2f} ± {sd:.2f} [{low:.2f}, {high:.2f}]" and cells["method"] == "supervised"
    mean, low, high = (100 * rows[1]["difference"][key] for key in ("mean", "low", "high"))
    assert cells["Dice difference"] == f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]" and cells["p"] == f"{rows[1]['p']:.2g}"
    assert [cells[name] for name in ("labeled", "unlabeled", "test", "failures")] == ["2", "3", "8", "0"]
    assert cells["by seed"] == f"{100 * rows[1]['dice']['mean']:.2f}"
    assert body[0].count("reference") == 1
    assert files[2].read_bytes().startswith(b"\x89PNG") and files[2].stat().st_size > 10_000


def test_what_the_picture_shows(monkeypatch):
    """Each case of each method but the reference once, its mean, and the interval around it, a column a method."""
    figures = []
    monkeypatch.setattr(stats.report, "png", lambda figure: figures.append(figure) or b"")
    drawn = {"supervised": (DICE[1] - DICE[0], dict(mean=-0.01, low=-0.02, high=0.01)),
             "mt": (DICE[0] - 0.6, dict(mean=0.05, low=0.02, high=0.06))}
    stats.report.paired(drawn, "reciprocal (strong)", "title")
    (axis,) = figures[0].axes
    dots = [line for line in axis.lines if len(line.get_ydata()) == 8]
    diamonds = [container[0].get_xydata()[0] for container in axis.containers]
    bars = [container[2][0].get_paths()[0].vertices for container in axis.containers]
    for x, (values, interval) in enumerate(drawn.values()):
        assert sorted(dots[x].get_ydata()) == pytest.approx(sorted(100 * values))
        mean, *ends = (100 * interval[key] for key in ("mean", "low", "high"))
        assert diamonds[x][1] == pytest.approx(mean) and bars[x][:, 1] == pytest.approx(ends)
        assert (axis.texts[x].get_text(), axis.texts[x].xy[1]) == (f"{mean:+.1f}", diamonds[x][1])
        columns = [*dots[x].get_xdata(), diamonds[x][0], *bars[x][:, 0], axis.texts[x].xy[0]]
        assert np.allclose(columns, x, atol=0.35)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["supervised", "mt"]
    assert [float(label.get_text()) for label in axis.get_yticklabels()] == [*axis.get_yticks()]
    assert "reciprocal (strong)" in axis.get_ylabel() and axis.lines[0].get_ydata() == [0, 0]


def test_synthetic_data_is_called_so(run, tmp_path, monkeypatch, capsys):
    phantom = run(DICE[0], data="phantom")
    status, out, _ = call(monkeypatch, capsys, phantom, "--markdown", tmp_path / "a.md", "--csv", tmp_path / "a.csv")
    assert status == 0 and out.startswith("phantom, synthetic data: ")
    assert (tmp_path / "a.md").read_text().startswith("phantom, synthetic data: ")
    assert "True" in (tmp_path / "a.csv").read_text()


def bad_inputs(run, tmp_path):
    good = run(DICE[0])
    yield "summary.json", [good, tmp_path / "nowhere"]
    torn = run(DICE[0], seed=3)
    (torn / "summary.json").write_text((torn / "summary.json").read_text()[:-9])
    yield f"{torn / 'summary.json'}: not what a finished run of this version leaves", [torn]
    unscored = run(DICE[0], seed=4)
    (unscored / "metrics.csv").unlink()
    yield f"{unscored / 'metrics.csv'}: not what", [unscored]
    for name, text in (("not what", "set,network\ntest,student\n"), ("no scored test case", ""),
                       ("not what", (good / "metrics.csv").read_text().replace("0.81", "x"))):
        bad = run(DICE[0], seed=5)
        (bad / "metrics.csv").write_text(text)
        yield f"{bad / 'metrics.csv'}: {name}", [bad]
    twice = run([*DICE[0], 0.8], cases="abcdefgha", seed=6)
    yield f"{twice / 'metrics.csv'}: not what a finished run of this version leaves (ValueError('not each", [twice]
    yield "no scored test case of the teacher", [good, "--network", "teacher"]
    again = run(DICE[0])
    yield f"{again}: the method and the seed of {good} again", [good, again]
    yield "again; leave one of them out", [good, good]
    less, other = run(DICE[0, :7], cases="abcdefg", seed=7), run(DICE[0], cases="abcdefgi", seed=8)
    for different in (less, other, run(DICE[0], test=["z"], seed=9), run(DICE[0], classes=("y",), seed=10)):
        yield f"{different}: other scored cases or classes than {good}; leave it out", [good, different]
    trained = run(DICE[0], trained=["l1", "l3"], method="supervised")
    yield f"{trained}: other training cases with as many labels than {good}", [good, trained]
    yield "other spacing than", [good, run(DICE[0], spacing="mm", seed=11)]
    yield "other data than", [good, run(DICE[0], data="la", seed=12)]
    yield "--reference x: no such method; choose one of: reciprocal (strong)", [good, "--reference", "x"]
    yield "nothing but reciprocal (strong)", [good, "--plot", tmp_path / "a.png"]
    yield "cannot be written", [good, "--csv", tmp_path / "nowhere" / "a.csv"]
    yield "required: RUN", []


def test_bad_input_is_one_line(run, tmp_path, monkeypatch, capsys):
    for message, arguments in bad_inputs(run, tmp_path):
        status, out, error = call(monkeypatch, capsys, *arguments)
        assert status == 2 and not out and error.count("\n") == 1, error
        assert error.startswith("error: ") and message in error, error
    with pytest.raises(BadInput, match="leave it out"):
        stats.compare([run(DICE[0]), run(DICE[0], data="la")])


def ready() -> bool:
    made, *given = (ROOT / name for name in (".venv/installed", "pyproject.toml", "constraints.txt"))
    return made.exists() and made.stat().st_mtime >= max(path.stat().st_mtime for path in given)


@pytest.mark.skipif(not ready(), reason="./train.sh would install its environment first")
@pytest.mark.parametrize("arguments, message", [
    ([], "give a folder for the runs"), (["OUT", "--patches", "3"], "--patches"),
    (["OUT", "--patch", "3", "3", "3"], "each side must be a multiple of"),
    (["OUT", "--data", "phantom", "--method", "mt"], "--method is for this script"),
    (["OUT", "--lesson", "mixed"], "--lesson is for this script"),
    (["OUT", "--cutmix"], "--cutmix is for this script"),
    (["OUT", "--student-start", "random"], "--student-start is for this script"),
    (["OUT", "--data", "phantom", "--patch", "8", "8", "8"], "at least 16"),  # for sassnet
    (["OUT", "--seed", "2"], "--seed is for this script"),
    (["OUT", "--resume", "x"], "--resume is for this script")])
def test_the_script_refuses_in_one_line_before_the_first_run(tmp_path, arguments, message):
    arguments = [str(tmp_path / word) if word == "OUT" else word for word in arguments]
    done = subprocess.run([ROOT / "train.sh", "compare", *arguments], text=True, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert not any(tmp_path.iterdir())


def test_the_script_makes_each_run_once_and_goes_on(tmp_path):
    """With a Python that notes what it is called for, but for what the script asks it before the first run."""
    shutil.copy(ROOT / "train.sh", tmp_path)
    python, out = tmp_path / ".venv" / "bin" / "python", tmp_path / "out"
    python.parent.mkdir(parents=True)
    (tmp_path / ".venv" / "installed").touch()
    for name in ("mt-seed5/config.json", "reciprocal-seed7/.lock", "supervised-seed5/config.json",
                 "supervised-seed5/summary.json"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()

    def called(answer, status=0, *given, **variables):
        (tmp_path / "calls").write_text("")
        python.write_text(f'#!/bin/sh\n[ "$1" != - ] || {answer}\ncat >/dev/null\necho "$@" >>calls\nexit {status}\n')
        python.chmod(0o755)
        done = subprocess.run([tmp_path / "train.sh", "compare", "out", *given], stdin=subprocess.DEVNULL,
                              env=os.environ | variables, timeout=100)
        return done.returncode, (tmp_path / "calls").read_text().splitlines()

    assert called("{ echo usage; exit; }") == (0, [])
    assert called("{ echo --iterations 9; exit; }", 3) == (3, ["reciprocal.py --seed 1 --out out/reciprocal-seed1"])
    assert {*re.findall(r"--seed (\S+)", str(called("{ echo --iterations 9; exit; }")))} == {"1", "2", "3"}
    given = ["--data", "hippocampus", "--labeled", "16", "--iterations", "900", "--pretrain", "300", "--lr-step", "600"]
    status, (*calls, last) = called(f'exec {sys.executable} "$@"', 0, *given, SEEDS="5 7", PYTHONPATH=str(ROOT))
    assert status == 0 and last == ("metrics.py compare out/mt-seed5/ out/reciprocal-seed7/ out/supervised-seed5/ "
                                    "--csv out/compare.csv --markdown out/compare.md --plot out/compare.png")
    calls.remove("reciprocal.py --resume out/mt-seed5")
    longer = dict(preset="paper", iterations=1200, lr_step=800)  # its teacher's 300 are the student's, too
    methods = {"reciprocal": {}, "reciprocal-mixed": dict(lesson="mixed"),
               "reciprocal-mixed-cutmix": dict(lesson="mixed", cutmix=True), "reciprocal-off": dict(feedback="off"),
               "reciprocal-shuffled": dict(feedback="shuffled"), "reciprocal-paper": longer,
               "reciprocal-paper-off": longer | dict(feedback="off"),
               "supervised-cutmix": dict(method="supervised", cutmix=True),
               "supervised-cutmix-patches": dict(method="supervised", cutmix=True, budget="patches"),
               "supervised-patches": dict(method="supervised", budget="patches")}
    methods |= {name: dict(method=name) for name in ("supervised", "mt", "uamt", "sassnet", "tcsm", "bcp")}
    expected = {f"out/{name}-seed{seed}": dict(seed=seed) | flags for name, flags in methods.items() for seed in (5, 7)}
    del expected["out/mt-seed5"], expected["out/supervised-seed5"]
    shared = dict(data="hippocampus", labeled=16, iterations=900, pretrain=300, lr_step=600, resume=None)
    parser = reciprocal.train_parser()
    found = [vars(parser.parse_args(call.removeprefix("reciprocal.py ").split())) for call in calls]
    assert {flags.pop("out"): flags for flags in found} == {name: shared | own for name, own in expected.items()}
    assert len(calls) == len(expected)


@pytest.mark.parametrize("folder,text,part", [
    ("hippocampus-0.05", "results/hippocampus-0.05/compare.md", "test"),
    ("hippocampus-0.1", "results/hippocampus-0.1/compare.md", "test"),
    *((folder, "results/README.md", part) for part in ("test", "transductive")
      for folder in ("hippocampus-0.1-long", "hippocampus-boxes", "la-coarse-dropout")),
    ("la-coarse", "results/la-coarse/compare.md", "test"),
    ("la-coarse", "results/la-coarse/transductive.md", "transductive"), ("la", "results/README.md", "transductive")])
def test_the_kept_runs_have_the_numbers_of_their_table(folder, text, part):
    same = r", labeled 16\b"  # said only where an upper bound is in the table, which has no unlabeled case
    rows = [re.sub(rf"[*]| \[.*?\]|{same}", "", line).split("|") for line in (ROOT / text).read_text().splitlines()]
    rows = [[cell.strip() for cell in cells] for cells in rows]
    for row in stats.compare(sorted((ROOT / "results" / folder).glob("*-seed*")), part=part):
        dice = "{:.2f} ± {:.2f}".format(*(100 * row["dice"][key] for key in ("mean", "sd")))
        assert any({re.sub(same, "", row["method"]), dice} <= set(line) for line in rows), (row["method"], dice)


@pytest.mark.parametrize("row,folders", [("hippocampus MR", ("hippocampus-0.1-long", "hippocampus-boxes")),
                                         ("left atrium MR", ("la-coarse-dropout",))])
def test_the_first_table_has_the_numbers_of_the_kept_runs(row, folders):
    """A column is the runs of a name, in the one folder that has them."""
    columns = ("supervised", "mt", "uamt", "sassnet", "tcsm", "bcp", "reciprocal", "reciprocal-mixed-cutmix",
               "supervised-all")
    numbers = re.search(rf"^\| {row}.*?\|(.*)\|$", README, re.M)[1].split("|")
    for name, number in zip(columns, numbers, strict=True):
        runs = [run for folder in folders for run in (ROOT / "results" / folder).glob(f"{name}-seed*")]
        assert number.strip("* ") == (f"{100 * stats.compare(runs)[0]['dice']['mean']:.1f}" if runs else ""), name
