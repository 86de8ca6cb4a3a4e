"""What the scores of many cases say: summaries with intervals, tables, and methods compared case by case.

    python metrics.py compare RUN RUN ... [--reference METHOD] [--network teacher] [--set transductive]
                                             [--csv FILE] [--markdown FILE] [--plot FILE]
"""

import csv
import io
import itertools
import json
import math
from pathlib import Path

import numpy as np

import report
from cli import BadInput, Parser, write
from data import PRESETS, RECIPES

OVERLAPS, DISTANCES = ("dice", "jaccard"), ("asd", "assd", "hd95")
METRICS = OVERLAPS + DISTANCES


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
        return "-" if value is None else str(value)  # JSON's for NaN

    titles = {"dice": "Dice %", "by_seed": "by seed", "jaccard": "Jaccard %", "difference": "Dice difference",
              "p_holm": "p (Holm)"}  # fmt: skip
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


# ---- runs compared -----------------------------------------------------------------------------------------

# Fields of Config that do not change what is computed; those that a comparison method ignores, or takes the sum of
IDLE = {"seed", "out", "root", "device", "compile", "graph", "windows", "deterministic", "log_every", "eval_every",
        "eval_cases", "save_every"}  # fmt: skip
UNUSED = {"preset", "loss", "lesson", "student_start", "feedback", "teacher_from", "iterations", "pretrain", "budget"}
BEFORE = {"voxel": [0.0, 0.0, 0.0], "sync_norm": False, "cutmix": False}  # what runs did that lack these fields
OWN = UNUSED | {"method", "labeled", "lr_step"}  # tell runs of one method apart, and no two methods
PAIRS = 6  # of 5 pairs the smallest two-sided p of Wilcoxon's test is 2 / 2**5, above 0.05


def compare(runs: list[Path], reference: str = "", network: str = "student", part: str = "test") -> list[dict]:
    """A row for each method among the folders of finished runs; runs that differ in the seed alone are one method.

    A case counts once: the mean over its foreground classes with a number, then over the seeds. Each metric is the
    interval of these, as in `summarize`; failures counts cases, classes and seeds; by_seed (seeds,): the mean Dice of
    each. pairs (N,): the cases' Dice minus that of the method `reference` (default: reciprocal (strong), else the
    first), fractions; difference: their interval; p: two-sided signed-rank test (Wilcoxon, Biometrics Bulletin
    1(6):80-83, 1945), of the cases: it does not know how much another seed would differ; p_holm: corrected for the
    number of methods tested (Holm, Scand J Stat 6:65-70, 1979). No p (NaN) if a method has fewer than 6 pairs.
    A run with all labels has no transductive case, and then no part in the rows.
    BadInput on a folder that is no finished run, on one method and seed twice, and on numbers that do not compare.
    """
    from scipy.stats import wilcoxon  # here, for it takes long to import

    read, methods, rows = [run for run in (_read_run(run, network, part) for run in runs) if run], {}, []
    if not read:
        raise BadInput("no run has unlabeled cases; leave --set transductive out")
    for run in read:
        peer = next(other for other in read if other["counts"]["labeled"] == run["counts"]["labeled"])
        for key, other, remedy in (("data", read[0], "compare runs of one data set"),
                                   ("spacing", read[0], "score it again: reciprocal.py --resume RUN --spacing UNIT"),
                                   ("scored cases or classes", read[0], "compare runs with one split"),
                                   ("training cases with as many labels", peer, "compare runs with one split")):
            if run[key] != other[key]:
                raise BadInput(f"{run['run']}: other {key} than {other['run']}; leave it out, or {remedy}")
        # what sets methods apart is looked for among runs of one method, any other setting among all
        changes = [f", {k} {v}".removesuffix(" true") for k, v in run["changes"].items()
                   if k in ("lesson", "feedback") or any(other["changes"].get(k) != v for other in read
                   if k not in other["silent"] and (k not in OWN or other["kind"] == run["kind"]))]
        group = methods.setdefault(run["kind"] + "".join(changes), {})
        if (other := group.setdefault(run["seed"], run)) is not run:
            raise BadInput(f"{run['run']}: the method and the seed of {other['run']} again; leave one of them out")
    reference = reference or ("reciprocal (strong)" if "reciprocal (strong)" in methods else next(iter(methods)))
    if reference not in methods:
        raise BadInput(f"--reference {reference}: no such method; choose one of: {'; '.join(methods)}")
    # (seeds, cases, classes, metrics) to (seeds, cases, metrics); what is masked is in no mean
    scores = {name: np.ma.masked_invalid([group[seed]["scores"] for seed in sorted(group)]).mean(2)
              for name, group in methods.items()}  # fmt: skip
    means = {name: score.mean(0) for name, score in scores.items()}  # (cases, metrics)
    for name, group in methods.items():
        run, pairs = next(iter(group.values())), (means[name] - means[reference])[:, 0].compressed()
        row = {"method": name} | run["counts"] | {part: len(means[name]), "seeds": sorted(group)}
        row |= {"by_seed": scores[name][..., 0].mean(1).filled(np.nan), "iterations": run["iterations"]}
        row |= {"failures": sum(other["failures"] for other in group.values())}
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


def _read_run(run: Path, network: str, part: str) -> dict | None:
    """What `compare` asks of a run: changes are its settings unlike the defaults, scores (cases, classes, metrics).
    None where the transductive cases are asked for and there are none, since all are labeled."""
    path = run / "summary.json"
    try:
        summary = json.loads(path.read_text())
        config, peer = BEFORE | summary["config"], summary["config"]["method"] != "reciprocal"
        labeled, unlabeled, test = (sorted(summary["cases"][key]) for key in ("labeled", "unlabeled", "test"))
        silent = {"uamt": {"dropout"}, "bcp": {"cutmix"}}.get(config["method"], set())  # they have it anyway
        defaults, settings = (  # texts; a run that --teacher-from names is of this seed
            {key: json.dumps(value).strip('"').replace(f"seed{config['seed']}", "seed")
             for key, value in values.items() if key not in IDLE | silent | (UNUSED if peer else set())}
            for values in (BEFORE | RECIPES.get(config["data"], RECIPES["folder"]) | PRESETS[config["preset"]], config))
        counts = {"labeled": len(labeled), "unlabeled": len(unlabeled)}  # so a share and its number are one setting
        settings |= {"labeled": str(len(labeled))} | ({"iterations": str(summary["iterations"])} if peer else {})
        path = run / "metrics.csv"
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if (row["set"], row["network"]) == (part, network)]
        if part == "transductive" and not unlabeled:
            return None
        if not rows:
            raise BadInput(f"{path}: no scored {part} case of the {network}; leave it out, or see --set and --network")
        rows.sort(key=lambda row: (row["case"], row["class"]))
        scored = [(row["case"], row["class"]) for row in rows]
        names = [sorted(set(column)) for column in zip(*scored, strict=True)]
        if scored != [*itertools.product(*names)]:
            raise ValueError("not each class of each case once")
        scores = np.array([[float(row[metric]) for metric in METRICS] for row in rows]).reshape(*map(len, names), -1)
        return {
            "run": run, "seed": config["seed"], "data": config["data"], "spacing": config["spacing"], "silent": silent,
            "kind": config["method"] + f" ({config['preset']})" * (not peer), "counts": counts,
            "changes": {key: value for key, value in settings.items() if value not in ("", defaults.get(key))},
            "scored cases or classes": (test, scored), "training cases with as many labels": (labeled, unlabeled),
            "iterations": summary["iterations"], "synthetic": summary["synthetic"], "scores": scores,
            "failures": sum(int(r["failure"]) for r in rows)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise BadInput(f"{path}: not what a finished run of this version leaves ({error!r}); leave it out") from None


def main(arguments: list[str]) -> None:
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
    rows.sort(key=lambda row: (row["method"] != reference, -row["dice"]["mean"]))
    columns = ("method", "labeled", "unlabeled", args.set, "iterations", "dice", "by_seed", "jaccard", "asd", "hd95",
               "difference", "p", "p_holm", "failures")  # fmt: skip
    for row in rows:
        line = {key: value for key, value in row.items() if not isinstance(value, dict | np.ndarray)}
        line |= {f"{key}_{k}": v for key in (*METRICS, "difference") for k, v in row[key].items()}
        lines.append(line | {"seeds": len(row["seeds"])})  # their number
        interval = (100 * row["difference"][key] for key in ("mean", "low", "high"))
        difference = "{:+z.2f} [{:+z.2f}, {:+z.2f}]".format(*interval)
        texts = {key: "-" if math.isnan(row[key]) else f"{row[key]:.2g}" for key in ("p", "p_holm")}
        texts["by_seed"] = " / ".join(f"{100 * dice:.2f}" for dice in row["by_seed"])
        texts["difference"] = difference if row["method"] != reference else "reference"
        shown.append({key: (row | lines[-1] | texts)[key] for key in columns})
        if row["failures"]:
            notes.append(f"{row['method']}: {row['failures']} failures without a distance are not in ASD and HD95; "
                         f"cases with no distance left: {row['dice']['n'] - row['hd95']['n']}")  # fmt: skip
    if len({tuple(row["seeds"]) for row in rows}) > 1:
        seeds = "; ".join(f"{row['method']} {', '.join(map(str, row['seeds']))}" for row in rows)
        notes.append(f"Methods have different seeds: {seeds}")
    if missing := len(args.runs) - sum(len(row["seeds"]) for row in rows):
        notes.append(f"Left out, without an unlabeled case: {missing} of {len(args.runs)} runs")
    if (pairs := min(len(row["pairs"]) for row in rows)) < PAIRS:
        notes.append(f"{pairs} cases: too few for a verdict; Wilcoxon's test needs {PAIRS}")
    title = f"{Path(data).name}{', synthetic data' * synthetic}: {args.set} cases, {args.network}"
    notes.insert(0, "Mean ± SD [95% interval] over cases, each the mean of its classes, then seeds. Difference in "
                    f"Dice to {reference}, in points; p: Wilcoxon's signed-rank test of the cases, (Holm): for all "
                    "methods at once")
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
