"""Dice, Jaccard, average surface distance and 95% Hausdorff distance of volumes.

    python metrics.py PRED LABEL [--spacing mm] [--csv FILE] [--empty diagonal]
    python metrics.py compare RUN RUN ...        (its flags: stats.py)

Definitions: MedPy's. A mask's surface is the mask minus its erosion by the 6-neighbor cross; outside the
volume is background. asd: mean over the prediction's surface of the distance to the label's, this direction
alone; assd and hd95: mean, and linearly interpolated 95th percentile, of the distances of both directions
pooled (MedPy before 0.5 took the mean of the two asd as assd). In voxels, or in the unit of `spacing`.

Empty masks. Both empty: the class is absent, every metric NaN and in no average. Exactly one empty: a
failure, Dice = Jaccard = 0 and no distance (NaN); failures are counted and shown, never averaged in as 0 mm.
`--empty diagonal` makes every distance of a failure the length of the volume's diagonal.
"""

import functools
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.spatial import cKDTree

import stats
from cli import BadInput, Parser, cli
from files import read_nifti
from stats import DISTANCES, METRICS

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
    scored there (given Triton), all classes at once and with one synchronization.
    """
    spacing = _spacing(prediction, label, spacing)
    names = classes if isinstance(classes, dict) else dict(enumerate(classes))
    names = {value: name for value, name in names.items() if value != 0}
    on_gpu = torch.is_tensor(prediction) and prediction.is_cuda and importlib.util.find_spec("triton")
    if on_gpu and prediction.ndim == 3 and max(prediction.shape) <= 1024:
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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path}: invalid ({error!r}); needs labels, name and value") from None


def main() -> None:
    if sys.argv[1:2] == ["compare"]:
        return stats.main(sys.argv[2:])
    parser = Parser(description="Score predicted label volumes.")
    parser.add_argument("prediction", type=Path, help="a NIfTI file or a folder of them")
    parser.add_argument("label", type=Path, help="the true ones, under the same names")
    parser.add_argument("--spacing", choices=("voxels", "mm"), default="voxels", help="unit of the distances")
    parser.add_argument("--csv", type=Path, help="write a line for each case and class to this file")
    parser.add_argument("--empty", choices=("none", "diagonal"), default="none", help="distance of a failure")
    args = parser.parse_args()
    rows = evaluate(args.prediction, args.label, args.spacing, args.empty)
    if args.csv:
        stats.write_csv(args.csv, rows)
    summaries = stats.summarize(rows, by=("class",)) + [{"class": "mean"} | s for s in stats.summarize(rows, by=())]
    print(stats.table(rows, args.spacing), stats.table(summaries, args.spacing), sep="\n\n")


if __name__ == "__main__":
    sys.exit(cli(main))
