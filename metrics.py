"""Dice, Jaccard, average surface distance and 95% Hausdorff distance of volumes; tables, intervals, tests.

    python metrics.py PRED LABEL [--spacing mm] [--csv FILE] [--empty diagonal]
    python metrics.py compare RUN RUN ... [--reference METHOD] [--csv FILE] [--markdown FILE] [--plot FILE]

Definitions: MedPy's. A mask's surface is the mask minus its erosion by the 6-neighbor cross; outside the
volume is background. asd: mean over the prediction's surface of the distance to the label's, this direction
alone; assd and hd95: mean, and linearly interpolated 95th percentile, of the distances of both directions
pooled (MedPy before 0.5 took the mean of the two asd as assd). In voxels, or in the unit of `spacing`.

Empty masks. Both empty: the class is absent, every metric NaN and in no average. Exactly one empty: a
failure, Dice = Jaccard = 0 and no distance (NaN); failures are counted and shown, never averaged in as 0 mm.
`--empty diagonal` makes every distance of a failure the length of the volume's diagonal.
"""

import csv
import functools
import io
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.spatial import cKDTree

import report
from data import PRESETS, RECIPES, BadInput, Parser, cli, read_nifti, write

OVERLAPS, DISTANCES = ("dice", "jaccard"), ("asd", "assd", "hd95")
METRICS = OVERLAPS + DISTANCES
REACH = 24  # voxels around a column within which others are searched, along the finer axis
PROBES = 2**16  # reads at once: half a megabyte of indices, which stays in the cache


def dice(prediction, label, spacing=None) -> float:
    """2|P∩L| / (|P| + |L|); arguments as in `score`."""
    return _overlaps(*_counts(prediction, label, spacing))[0]


def jaccard(prediction, label, spacing=None) -> float:
    """|P∩L| / |P∪L|; arguments as in `score`."""
    return _overlaps(*_counts(prediction, label, spacing))[1]


def asd(prediction, label, spacing=None) -> float:
    """Average surface distance from prediction to label alone; arguments as in `score`."""
    return float(_nearest(*_surfaces(*_masks(prediction, label, spacing))).mean())


def assd(prediction, label, spacing=None) -> float:
    """Mean distance of both directions pooled; arguments as in `score`."""
    return score(prediction, label, spacing)["assd"]


def hd95(prediction, label, spacing=None) -> float:
    """95th percentile of the distances of both directions pooled; arguments as in `score`."""
    return score(prediction, label, spacing)["hd95"]


def score(prediction, label, spacing=None) -> dict[str, float]:
    """All five metrics of two masks, which share the work.

    prediction, label: arrays or tensors (D, H, W) or (H, W), foreground where not 0. spacing: a number for
    each axis, or one for all; default 1. BadInput on another rank, unequal shapes or a spacing not positive.
    """
    row = score_classes(prediction != 0, label != 0, {True: "foreground"}, spacing)[0]
    return {metric: row[metric] for metric in METRICS}


def score_classes(prediction, label, classes: list[str] | dict[int, str], spacing=None) -> list[dict]:
    """A row for each foreground class of two integer volumes: class, the five metrics, failure (0 or 1).

    classes: names in the order of the values, background first, or {value: name}. Volumes on a GPU are
    scored there, all classes at once and with one synchronization.
    """
    spacing = _spacing(prediction, label, spacing)
    names = classes if isinstance(classes, dict) else dict(enumerate(classes))
    names = {value: name for value, name in names.items() if value != 0}
    if torch.is_tensor(prediction) and prediction.is_cuda and prediction.ndim == 3 and max(prediction.shape) <= 1024:
        from kernels.surface import surface_scores  # here, for Triton takes long to import

        values = torch.tensor(list(names), device=prediction.device)[:, None, None, None]
        numbers = surface_scores(prediction == values, label == values, spacing).tolist()
    else:
        numbers = [_numbers(*_masks(prediction == value, label == value, spacing)) for value in names]
    rows = []
    for name, (both, first, second, *distances) in zip(names.values(), numbers, strict=True):
        scores = *_overlaps(both, first, second), *distances
        failure = int((first == 0) != (second == 0))
        rows.append({"class": name} | dict(zip(METRICS, scores, strict=True)) | {"failure": failure})
    return rows


def _numbers(prediction, label, spacing) -> list[float]:
    first, second, _ = _surfaces(prediction, label, spacing)
    there = _nearest(first, second, spacing)
    pooled = np.concatenate((there, _nearest(second, first, spacing)))
    distances = there.mean(), pooled.mean(), np.percentile(pooled, 95)
    return np.array([*_counts(prediction, label, spacing), *distances]).tolist()


def _counts(prediction, label, spacing) -> tuple[int, int, int]:
    prediction, label, _ = _masks(prediction, label, spacing)
    return np.count_nonzero(prediction & label), np.count_nonzero(prediction), np.count_nonzero(label)


def _overlaps(both, first, second) -> tuple[float, float]:
    total = first + second
    return (2 * both / total, both / (total - both)) if total else (math.nan, math.nan)


def _spacing(prediction, label, spacing) -> tuple[float, ...]:
    shape, other = tuple(prediction.shape), tuple(label.shape)
    scale = np.ravel(1.0 if spacing is None else spacing)
    if shape != other or len(shape) not in (2, 3):
        raise BadInput(f"prediction {shape}, label {other}: give the same shape of two or three axes")
    if len(scale) not in (1, len(shape)) or not ((scale > 0) & (scale < math.inf)).all():
        raise BadInput(f"spacing {spacing}: give a positive number for each of the {len(shape)} axes")
    return tuple(np.broadcast_to(scale, len(shape)).astype(float).tolist())


def _masks(prediction, label, spacing) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    spacing = _spacing(prediction, label, spacing)
    pair = (np.asarray(v.cpu() if torch.is_tensor(v) else v) for v in (prediction, label))
    return *(v if v.dtype == bool else v != 0 for v in pair), spacing


def _surfaces(prediction, label, spacing):
    """Both surfaces in the box of both masks with an empty voxel behind each axis; spacing.

    Flat, the box is a ring: a step that leaves it on any side ends in the empty voxels behind it, or behind the
    line before. So the erosion need not ask where the border is; nor need the search below, which pads more.
    """
    axes = {*range(prediction.ndim)}
    if not (prediction.any() and label.any()):
        return *np.zeros((2, *[1] * len(axes)), bool), spacing
    lines = (np.flatnonzero((prediction | label).any(tuple(axes - {axis}))) for axis in axes)
    box, surfaces = tuple(slice(line[0], line[-1] + 1) for line in lines), []
    for mask in (prediction[box], label[box]):
        grid = np.ascontiguousarray(np.pad(mask, (0, 1)))
        flat, inside = grid.ravel(), grid.ravel().copy()
        for stride in grid.strides:  # in bytes, hence in voxels
            inside &= np.roll(flat, stride) & np.roll(flat, -stride)
        surfaces.append((flat & ~inside).reshape(grid.shape))
    return *surfaces, spacing


def _nearest(source, target, spacing) -> np.ndarray:
    """Distance from each voxel of source, in C order, to the nearest of target; one NaN where there is none.

    Two sweeps give every voxel the distance to the target within its column (first axis). Then only columns are
    searched, the nearest first, until the next is farther than the best so far. The few voxels that get to the
    end of the table ask a k-d tree. Squares are summed in the order of SciPy's distance transform: its bits.
    """
    points = np.unravel_index(np.flatnonzero(source), source.shape)
    if not len(points[0]):
        return np.array([math.nan])
    height = np.where(target, np.int32(0), np.int32(len(target)))
    for sweep, before in ((height[1:], height[:-1]), (height[-2::-1], height[:0:-1])):
        for here, last in zip(sweep, before, strict=True):
            np.minimum(here, last + 1, out=here)
    heights = np.full((len(target), *(n + REACH for n in target.shape[1:])), math.inf)
    heights[tuple(map(slice, target.shape))] = np.append((np.arange(len(target)) * spacing[0]) ** 2, math.inf)[height]
    offsets, squares, lengths = _columns(spacing[1:])
    steps = np.array(heights.strides[1:]) // heights.itemsize @ offsets
    start, places = 0, np.ravel_multi_index(points, heights.shape)
    best, left = np.full(len(places), math.inf), np.arange(len(places))
    while start < len(steps) and len(left):
        stop = start + PROBES // len(left) + 1
        square = heights.take(places[left] + steps[start:stop, None])  # (tried, left); negative indices wrap
        for along in squares:
            square += along[start:stop, None]
        best[left] = np.minimum(best[left], square.min(0))
        left, start = left[best[left] > lengths[min(stop, len(lengths) - 1)]], stop
    if len(left):
        far, near = np.stack(points, 1)[left], np.argwhere(target)
        tree = cKDTree(near * spacing, balanced_tree=False, compact_nodes=False)  # 3 times as fast on a grid
        nearest = near[tree.query(far * spacing)[1]]
        best[left] = np.add.reduce(np.square((nearest - far) * spacing).T)
    return np.sqrt(best)


@functools.lru_cache
def _columns(spacing):
    """Offsets (rank - 1, N) to the columns around, by distance; their squares along each axis; the sums (N,).
    None is missing: the table ends where a column could be outside the square of REACH."""
    offsets = np.indices((2 * REACH + 1,) * len(spacing)).reshape(len(spacing), -1) - REACH
    squares = np.square(offsets * np.array(spacing)[:, None])
    lengths = np.add.reduce(squares)
    order = np.argsort(lengths)
    order = order[lengths[order] <= (REACH * min(spacing)) ** 2]
    return offsets[:, order], squares[:, order], lengths[order]


def summarize(rows: list[dict], by: tuple[str, ...] = ("set", "network")) -> list[dict]:
    """A summary for each group of rows (`case` and what `score_classes` gives) that agree in the keys `by`.

    It holds these keys; cases, failures, absent (the latter two count rows); and for each metric a dict of
    mean, sd, low, high, n over the n cases with a number, a case being the mean over its classes. sd divides
    by n - 1; low and high are the 95% percentile interval of 10,000 bootstrap resamples, seed fixed.
    """
    groups: dict[tuple, dict[str, list[dict]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), {}).setdefault(row["case"], []).append(row)
    summaries = []
    for key, cases in groups.items():
        group = sum(cases.values(), [])
        summary = dict(zip(by, key, strict=True)) | {"cases": len(cases)}
        summary["failures"] = sum(row["failure"] for row in group)
        summary["absent"] = sum(math.isnan(row["dice"]) for row in group)
        for metric in METRICS:
            numbers = ([r[metric] for r in case if not math.isnan(r[metric])] for case in cases.values())
            summary[metric] = _interval(np.array([np.mean(case) for case in numbers if case]))
        summaries.append(summary)
    return summaries


def _interval(values) -> dict[str, float]:
    if not len(values):
        return dict.fromkeys(("mean", "sd", "low", "high"), math.nan) | {"n": 0}
    means = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    numbers = values.mean(), values.std(ddof=int(len(values) > 1)), *np.percentile(means, (2.5, 97.5))
    return dict(zip(("mean", "sd", "low", "high"), map(float, numbers), strict=True)) | {"n": len(values)}


def table(rows: list[dict], unit: str = "voxels", markdown: bool = False) -> str:
    """Rows of scores, or summaries of them, as aligned text or GitHub's Markdown: overlaps in percent, distances
    in `unit`."""

    def cell(key, value) -> str:
        if isinstance(value, dict):
            return "{} ± {} [{}, {}]".format(*(cell(key, value[k]) for k in ("mean", "sd", "low", "high")))
        if isinstance(value, float):
            return "-" if math.isnan(value) else f"{value * (100 if key in OVERLAPS else 1):.2f}"
        return str(value)

    titles = {"dice": "Dice %", "jaccard": "Jaccard %", "difference": "Dice difference", "p_holm": "p (Holm)"}
    titles |= {m: f"{m.upper()} {unit}" for m in DISTANCES}
    lines = [[titles.get(key, key) for key in rows[0]]]
    lines += [[cell(key, row[key]) for key in rows[0]] for row in rows]
    if markdown:
        return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows of scores as they are: fractions, not percent."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue())


def evaluate(prediction: Path, label: Path, unit: str = "voxels", empty: str = "none") -> list[dict]:
    """A row for each case and class of two NIfTI files, or of two folders of them matched by name.

    Classes are what a dataset.json beside the folder of labels names, else the values in the two files (1 if
    there are none). A label without a prediction fails in every class, the reverse is BadInput.
    """
    predictions, labels = _files(prediction), _files(label)
    if prediction.is_file() and label.is_file():
        predictions = dict(zip(labels, predictions.values(), strict=True))
    if stray := ", ".join(sorted(predictions.keys() - labels.keys())):
        raise BadInput(f"{prediction}: no label in {label} for {stray}; add it or remove the prediction")
    declared, rows = _declared(label if label.is_dir() else label.parent), []
    for case, path in labels.items():
        truth, spacing, affine = read_nifti(path)
        guess, _, other = np.zeros_like(truth), spacing, affine
        if case in predictions:
            guess, _, other = read_nifti(predictions[case])
        else:
            print(f"{case}: no prediction in {prediction}, counted as a failure", file=sys.stderr)
        if guess.shape != truth.shape or not np.allclose(affine, other, rtol=1e-3, atol=1e-3):
            raise BadInput(f"{predictions[case]}: other shape or affine than {path}; resample it")
        values = np.union1d(truth, guess).tolist()
        if wrong := [value for value in values if value not in (declared or range(256))]:
            raise BadInput(f"{predictions.get(case, path)} or {path}: {wrong[0]:g} is no label; correct it")
        names = declared or {value: f"{value:g}" for value in values if value} or {1: "1"}
        scale = spacing if unit == "mm" else (1.0,) * truth.ndim
        for row in score_classes(guess, truth, names, scale):
            row["failure"] = int(row["failure"] or case not in predictions)
            if row["failure"] and empty == "diagonal":
                row |= dict.fromkeys(DISTANCES, math.hypot(*np.multiply(truth.shape, scale)))
            rows.append({"case": case} | row)
    return rows


def _files(path: Path) -> dict[str, Path]:
    found = [path] if path.is_file() else sorted(path.glob("[!.]*.nii")) + sorted(path.glob("[!.]*.nii.gz"))
    files = {file.name.removesuffix(".gz").removesuffix(".nii"): file for file in found}
    if not files or len(files) < len(found):
        raise BadInput(f"{path}: " + ("a case as .nii and .nii.gz" if files else "no .nii or .nii.gz"))
    return dict(sorted(files.items()))


def _declared(folder: Path) -> dict[int, str]:
    path = folder.resolve().parent / "dataset.json"
    try:
        labels = json.loads(path.read_text())["labels"].items() if path.is_file() else ()
        return dict((v, k) if isinstance(v, int) else (int(k), v) for k, v in labels)  # nnU-Net, Decathlon
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path}: invalid ({error!r}); needs labels, name and value") from None


# ---- runs compared -----------------------------------------------------------------------------------------

# Fields of Config that do not change what is computed; those that `supervised` does not use, or only their sum.
IDLE = {"seed", "out", "root", "device", "windows", "deterministic", "log_every", "eval_every", "eval_cases",
        "save_every"}  # fmt: skip
UNUSED = {"preset", "loss", "lesson", "student_start", "feedback", "teacher_from", "iterations", "pretrain"}
PAIRS = 6  # of 5 pairs the smallest two-sided p of Wilcoxon's test is 2 / 2**5, above 0.05


def compare(runs: list[Path], reference: str = "", network: str = "student", part: str = "test") -> list[dict]:
    """A row for each method among the folders of finished runs; runs that differ in the seed alone are one method.

    A case counts once: the mean over its foreground classes with a number, then over the seeds. Each metric is the
    interval of these, as in `summarize`; failures counts cases, classes and seeds. pairs (N,): the cases' Dice minus
    that of the method `reference` (default: reciprocal (strong), else the first), fractions; difference: their
    interval; p: two-sided signed-rank test (Wilcoxon, Biometrics Bulletin 1(6):80-83, 1945); p_holm: corrected for
    the number of methods tested (Holm, Scand J Stat 6:65-70, 1979). No p (NaN) if a method has fewer than 6 pairs.
    BadInput on a folder that is no finished run, on one method and seed twice, and on numbers that do not compare.
    """
    from scipy.stats import wilcoxon  # here, for it takes long to import

    read, methods, rows = [_read_run(run, network, part) for run in runs], {}, []
    for run in read:
        peer = next(other for other in read if other["share"] == run["share"])
        for key, other, remedy in (("data", read[0], "compare runs of one data set"),
                                   ("spacing", read[0], "score it again: reciprocal.py --resume RUN --spacing UNIT"),
                                   ("scored cases or classes", read[0], "compare runs with one split"),
                                   ("training cases at the same --labeled", peer, "compare runs with one split")):
            if run[key] != other[key]:
                raise BadInput(f"{run['run']}: other {key} than {other['run']}; leave it out, or {remedy}")
        alike = [other["changes"] for other in read if other["kind"] == run["kind"]]
        changes = [f", {k} {v}" for k, v in run["changes"].items() if any(other.get(k) != v for other in alike)]
        group = methods.setdefault(run["kind"] + "".join(changes), {})
        if (other := group.setdefault(run["seed"], run)) is not run:
            raise BadInput(f"{run['run']}: the method and the seed of {other['run']} again; leave one of them out")
    reference = reference or ("reciprocal (strong)" if "reciprocal (strong)" in methods else next(iter(methods)))
    if reference not in methods:
        raise BadInput(f"--reference {reference}: no such method; choose one of: {'; '.join(methods)}")
    # (seeds, cases, classes, metrics) to (cases, metrics); what is masked is in no mean
    means = {name: np.ma.masked_invalid([group[seed]["scores"] for seed in sorted(group)]).mean(2).mean(0)
             for name, group in methods.items()}  # fmt: skip
    for name, group in methods.items():
        run, pairs = next(iter(group.values())), (means[name] - means[reference])[:, 0].compressed()
        row = {"method": name} | run["counts"] | {part: len(means[name]), "seeds": sorted(group)}
        row |= {"iterations": run["iterations"], "failures": sum(other["failures"] for other in group.values())}
        row |= {metric: _interval(v.compressed()) for metric, v in zip(METRICS, means[name].T, strict=True)}
        row |= {"difference": _interval(pairs), "p": math.nan, "p_holm": math.nan, "pairs": pairs}
        rows.append(row | {"reference": reference} | {key: run[key] for key in ("data", "synthetic", "spacing")})
    others, highest = [row for row in rows if row["method"] != reference], 0.0
    if min(len(row["pairs"]) for row in rows) >= PAIRS:
        for row in others:  # where no pair differs the test is undefined, and an error in older SciPy
            row["p"] = float(wilcoxon(row["pairs"]).pvalue) if row["pairs"].any() else 1.0
        for rank, row in enumerate(sorted(others, key=lambda row: row["p"])):
            highest = row["p_holm"] = max(highest, min(1.0, row["p"] * (len(others) - rank)))
    return rows


def _read_run(run: Path, network: str, part: str) -> dict:
    """What `compare` asks of a run: changes are its settings unlike the defaults, scores (cases, classes, metrics)."""
    path = run / "summary.json"
    try:
        summary = json.loads(path.read_text())
        config, supervised = summary["config"], summary["config"]["method"] == "supervised"
        labeled, unlabeled, test = (sorted(summary["cases"][key]) for key in ("labeled", "unlabeled", "test"))
        defaults, settings = (  # texts; a run that --teacher-from names is of this seed
            {key: json.dumps(value).strip('"').replace(f"seed{config['seed']}", "seed")
             for key, value in values.items() if key not in IDLE | (UNUSED if supervised else set())}
            for values in (RECIPES.get(config["data"], RECIPES["folder"]) | PRESETS[config["preset"]], config))
        settings |= {"iterations": str(summary["iterations"])} if supervised else {}
        path = run / "metrics.csv"
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if (row["set"], row["network"]) == (part, network)]
        if not rows:
            raise BadInput(f"{path}: no scored {part} case of the {network}; leave it out, or see --set and --network")
        rows.sort(key=lambda row: (row["case"], row["class"]))
        scored = [(row["case"], row["class"]) for row in rows]
        names = [sorted(set(column)) for column in zip(*scored, strict=True)]
        if scored != [*itertools.product(*names)]:
            raise ValueError("not each class of each case once")
        scores = np.array([[float(row[metric]) for metric in METRICS] for row in rows]).reshape(*map(len, names), -1)
        return {
            "run": run, "seed": config["seed"], "data": config["data"], "spacing": config["spacing"],
            "kind": config["method"] + f" ({config['preset']})" * (not supervised), "share": config["labeled"],
            "changes": {key: value for key, value in settings.items() if value not in ("", defaults.get(key))},
            "counts": {"labeled": len(labeled), "unlabeled": len(unlabeled)}, "scored cases or classes": (test, scored),
            "training cases at the same --labeled": (labeled, unlabeled), "iterations": summary["iterations"],
            "synthetic": summary["synthetic"], "scores": scores, "failures": sum(int(r["failure"]) for r in rows)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise BadInput(f"{path}: not what a finished run leaves ({error!r}); finish the run or leave it out") from None


def _compare(arguments: list[str]) -> None:
    parser = Parser(prog="metrics.py compare", description="A table of methods, each tested against one of them.")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="the folder of a finished run")
    parser.add_argument("--reference", metavar="METHOD", default="", help="the others are tested against it")
    parser.add_argument("--network", choices=("student", "teacher"), default="student")
    parser.add_argument("--set", choices=("test", "transductive"), default="test")
    for name, text in (("csv", "a line for each method, fractions"), ("markdown", "the table for a README"),
                       ("plot", "a PNG of the cases' differences")):
        parser.add_argument(f"--{name}", metavar="FILE", type=Path, help=f"write {text}")
    args = parser.parse_args(arguments)
    rows, shown, notes, lines = compare(args.runs, args.reference, args.network, args.set), [], [], []
    reference, data, unit, synthetic = (rows[0][key] for key in ("reference", "data", "spacing", "synthetic"))
    columns = ("method", "labeled", "unlabeled", args.set, "seeds", "iterations", "dice", "jaccard", "asd", "hd95",
               "difference", "p", "p_holm", "failures")  # fmt: skip
    for row in rows:
        line = {key: value for key, value in row.items() if not isinstance(value, dict | np.ndarray)}
        line |= {f"{key}_{k}": v for key in (*METRICS, "difference") for k, v in row[key].items()}
        lines.append(line | {"seeds": len(row["seeds"])})  # their number
        difference = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * row["difference"][k] for k in ("mean", "low", "high")))
        texts = {key: "-" if math.isnan(row[key]) else f"{row[key]:.2g}" for key in ("p", "p_holm")}
        texts["difference"] = difference if row["method"] != reference else "reference"
        shown.append({key: (row | lines[-1] | texts)[key] for key in columns})
        if row["failures"]:
            notes.append(f"{row['method']}: {row['failures']} failures without a distance are not in ASD and HD95; "
                         f"cases with no distance left: {row['dice']['n'] - row['hd95']['n']}")  # fmt: skip
    if len({tuple(row["seeds"]) for row in rows}) > 1:
        seeds = "; ".join(f"{row['method']} {', '.join(map(str, row['seeds']))}" for row in rows)
        notes.append(f"Methods have different seeds: {seeds}")
    if (pairs := min(len(row["pairs"]) for row in rows)) < PAIRS:
        notes.append(f"{pairs} cases: too few for a verdict; Wilcoxon's test needs {PAIRS}")
    title = f"{Path(data).name}{', synthetic data' * synthetic}: {args.set} cases, {args.network}"
    notes.insert(0, "Mean ± SD [95% interval] over cases, each the mean of its classes, then seeds. Difference in "
                    f"Dice to {reference}, in points; p: Wilcoxon's signed-rank test, (Holm): for all methods at once")
    if args.plot:
        others = {row["method"]: (row["pairs"], row["difference"]) for row in rows if row["method"] != reference}
        if not others:
            raise BadInput(f"--plot {args.plot}: nothing but {reference}; add runs of another method")
        write(args.plot, report.paired(others, reference, title))
    if args.csv:
        write_csv(args.csv, lines)
    if args.markdown:
        write(args.markdown, "\n\n".join((title, table(shown, unit, markdown=True), *notes)) + "\n")
    print(title, table(shown, unit), "\n".join(notes), sep="\n\n")


def main() -> None:
    if sys.argv[1:2] == ["compare"]:
        return _compare(sys.argv[2:])
    parser = Parser(description="Score predicted label volumes.")
    parser.add_argument("prediction", type=Path, help="a NIfTI file or a folder of them")
    parser.add_argument("label", type=Path, help="the true ones, under the same names")
    parser.add_argument("--spacing", choices=("voxels", "mm"), default="voxels", help="unit of the distances")
    parser.add_argument("--csv", type=Path, help="write a line for each case and class to this file")
    parser.add_argument("--empty", choices=("none", "diagonal"), default="none", help="distance of a failure")
    args = parser.parse_args()
    rows = evaluate(args.prediction, args.label, args.spacing, args.empty)
    if args.csv:
        write_csv(args.csv, rows)
    summaries = summarize(rows, by=("class",)) + [{"class": "mean"} | s for s in summarize(rows, by=())]
    print(table(rows, args.spacing), table(summaries, args.spacing), sep="\n\n")


if __name__ == "__main__":
    sys.exit(cli(main))
