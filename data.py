"""From a folder of cases to random training patches on the device.

Three layouts are read as they are, told apart by their content:

    left atrium of the literature    nnU-Net v2 raw                   Medical Segmentation Decathlon
    FOLDER/                          FOLDER/                          FOLDER/
      train.list, test.list            dataset.json (channel_names)     dataset.json (modality)
      2018LA_Seg_Training Set/         imagesTr/CASE_0000.nii.gz        imagesTr/CASE.nii.gz (channels:
        ID/mri_norm2.h5                imagesTr/CASE_0001.nii.gz          the fourth axis)
          (image, label)               labelsTr/CASE.nii.gz             labelsTr/CASE.nii.gz
                                       imagesTs/, labelsTs/             imagesTs/, labelsTs/

A training image without a label file is an unlabeled case. An all-zero label is a real negative.

    python data.py check FOLDER        everything that is wrong with it, a line each
"""

import functools
import hashlib
import json
import math
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import devices
from cli import BadInput, Parser, cli
from files import read_h5, read_nifti
from phantom import scan


@dataclass
class Case:
    """One scan. A volume has few distinct values, so a voxel is a code into a table of them: exact, a quarter
    of the bytes of float32, and normalization touches some hundred levels, not millions of voxels."""

    name: str
    image: Tensor  # (C, D, H, W) uint8 or int16 codes, or float32 values where levels is None
    levels: Tensor | None  # (C, L) float32, normalized: value = levels[c, code]
    label: Tensor | None  # (D, H, W) uint8
    spacing: tuple[float, float, float]  # mm, in the order of the array's axes
    affine: np.ndarray  # (4, 4), voxels to mm

    def volume(self) -> Tensor:  # (C, D, H, W) float32
        if self.levels is None:
            return self.image
        return torch.stack([table.index_select(0, code.flatten().int()).view(code.shape)  # [uint8] is a mask
                            for table, code in zip(self.levels, self.image, strict=True)])

    def to(self, device) -> "Case":
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})

    def grid(self, voxel: tuple[float, float, float]) -> np.ndarray:
        """Its shape in voxels of that size, in mm; an axis of 0 stays as it is."""
        size = np.where(voxel, voxel, self.spacing)
        return np.rint(np.multiply(self.image.shape[1:], self.spacing) / size).clip(1).astype(int)


@dataclass
class Dataset:
    labeled: list[Case]
    unlabeled: list[Case]  # may carry a label, never trained on: scored as "transductive"
    test: list[Case]  # may lack a label: predicted, not scored
    classes: list[str]  # names, background first
    channels: int

    def to(self, device: torch.device) -> "Dataset":
        """Training cases on the GPU where they fill less than half of it: their patches are cut there."""
        volumes = [v for case in self.labeled + self.unlabeled for v in (case.image, case.label) if v is not None]
        if device.type != "cuda" or 2 * sum(v.nbytes for v in volumes) > torch.cuda.mem_get_info(device)[0]:
            return self
        return replace(self, **{name: [case.to(device) for case in getattr(self, name)]
                                for name in ("labeled", "unlabeled")})

    def scored(self, name: str) -> list[Case]:
        """Those with a label to compare with: of "test", or "transductive" ones, trained on as images alone."""
        return [case for case in (self.test if name == "test" else self.unlabeled) if case.label is not None]

    def __str__(self) -> str:
        blind = sum(case.label is None for case in self.test)
        note = f" ({blind} of them without a label: predicted, not scored)" if blind else ""
        return f"labeled {len(self.labeled)}, unlabeled {len(self.unlabeled)}, test {len(self.test)}{note}"


# ---- data sets and presets by name: values of Config, and where the files come from ------------------------

_LA = dict(  # the left-atrium literature's settings, which are the paper's
    patch=(112, 112, 80), stride=(18, 18, 4), batch_l=2, batch_u=2, filters=16, depth=4, dropout=True,
    optimizer="sgd", lr=0.01, schedule="step", lr_step=2500, iterations=6000, pretrain=6000, seed=1337,
    augment="rotflip", noise=0.0, voxel=(0.0, 0.0, 0.0), normalize="zscore", window=(-125.0, 275.0), holdout=0.0)
_CUBE = dict(_LA, patch=(96, 96, 96), stride=(16, 16, 16))
_SMALL = dict(_LA, patch=(32, 32, 32), stride=(16, 16, 16), filters=8, depth=3, dropout=False, lr=0.05,
              schedule="poly", iterations=200, pretrain=100, augment="none", seed=1, eval_every=50, eval_cases=8,
              save_every=100)  # tuned for two CPU cores
RECIPES: dict[str, dict] = {
    "la": _LA,
    "la-coarse": dict(_LA, voxel=(1.5625, 1.5625, 1.5625), patch=(48, 48, 32), stride=(24, 24, 16), depth=3,
                      schedule="poly", iterations=800, pretrain=600, normalize="zscore-crop", holdout=0.2,
                      eval_every=200, eval_cases=8, save_every=200),  # ours, for a CPU
    "pancreas": dict(_CUBE, batch_l=4, batch_u=5, dropout=False, optimizer="adam", lr=1e-3, iterations=20000,
                     pretrain=4000, seed=1124, augment="none", noise=0.05, normalize="window",
                     voxel=(1.0, 1.0, 1.0)),  # the paper's
    "breast": _CUBE,  # ours: the paper publishes no settings
    "hippocampus": dict(_SMALL, patch=(32, 48, 32), stride=(16, 24, 16), iterations=400, pretrain=200, holdout=0.2),
    "phantom": _SMALL,
    "folder": dict(_CUBE, stride=(32, 32, 32), holdout=0.2),  # any other data
}
PRESETS = {
    "paper": dict(loss="ce", lesson="pseudo", student_start="random", feedback="scalar"),
    "strong": dict(loss="dice+ce", lesson="both", student_start="pretrained", feedback="scalar"),
}
SOURCES = {
    "la": "2018 Atrial Segmentation Challenge in the h5 layout of github.com/yulequan/UA-MT, folder data",
    "la-coarse": "the files of la, whose folder is the --root, in voxels 2.5 times as long",
    "pancreas": "NIH Pancreas-CT (cancerimagingarchive.net) as nnU-Net v2 raw, cropped to the label",
    "breast": "the paper's 200 breast MR are private: bring your own as nnU-Net v2 raw",
    "hippocampus": "Task04_Hippocampus of medicaldecathlon.com, unpacked",
}


# ---- random patches ----------------------------------------------------------------------------------------

def draw(cases: list[Case], n: int, patch: tuple[int, int, int], *, seed: int, stream: int, iteration: int,
         augment: str, noise: float = 0, voxel=(0, 0, 0), classes=0, device="cpu") -> tuple[Tensor, Tensor | None]:
    """n random patches, or this rank's share of them: image (n, C, *patch) float32; label (n, *patch) uint8, below
    `classes`, or None where that is 0.

    Every random number comes from (seed, stream, iteration, sample) alone: neither resuming nor the order of
    calls changes anything; `stream` keeps the uses apart. Cases come without replacement within an epoch of
    whole batches, a crop starts at any valid offset, and a volume smaller than the patch is centered in zeros.

    augment: "rotflip", the left-atrium literature's rot90 of the first two axes and a flip of one of them;
    "flip", each axis with probability 0.5; "none". noise: standard deviation of Gaussian noise on the normalized
    image, clipped at two standard deviations (0.05 in the paper's pancreas experiments). voxel: the size in mm of
    the patch's voxels, to which a crop of whole voxels is resampled; 0 leaves an axis as the scan has it.
    """
    samples = []
    for sample, case in devices.mine([*enumerate(chosen(cases, n, seed=seed, stream=stream, iteration=iteration), 1)]):
        rng = np.random.default_rng([seed, stream, iteration, sample])
        samples.append(_patch(case, patch, rng, augment, noise, voxel, classes, device))
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(labels) if classes else None


def chosen(cases: list[Case], n: int, *, seed: int, stream: int, iteration: int) -> list[Case]:
    """The case of each patch that `draw` draws."""
    epoch, batch = divmod(iteration, max(1, len(cases) // n))  # a batch across two epochs could hold a case twice
    # numpy pads a short seed with zeros: the last entry, 0 here and 1 up in `draw`, keeps the generators apart
    order = np.random.default_rng([seed, stream, epoch, 0]).permutation(len(cases))
    return [cases[order[(batch * n + sample) % len(cases)]] for sample in range(n)]


def _patch(case, patch, rng, augment, noise, voxel, classes, device) -> tuple[Tensor, Tensor | None]:
    turns, flips = 0, []
    if augment == "rotflip":
        turns, flips = int(rng.integers(4)), [int(rng.integers(1, 3))]
    elif augment == "flip":
        flips = [axis for axis in (1, 2, 3) if rng.random() < 0.5]
    axes = [1, 0, 2] if turns % 2 else [0, 1, 2]
    shape, grid = np.array(case.image.shape[1:]), case.grid(voxel)
    size = np.minimum(np.take(patch, axes), grid)
    span = np.rint(size * shape / grid).clip(1).astype(int)  # the same in the scan's own voxels
    start = rng.integers(shape - span + 1)
    box = tuple(map(slice, start, start + span))

    def cut(volume):  # codes are moved while they are small, and decoded last
        return volume[:, *box].to(device).rot90(turns, (1, 2)).flip(flips)

    image = pad(resize(replace(case, image=cut(case.image), label=None).to(device).volume(), size[axes]), patch)
    if noise:
        generator = torch.Generator(device).manual_seed(int(rng.integers(2**63)))
        image = image + noise * torch.randn(image.shape, generator=generator, device=device).clamp_(-2, 2)
    return image, pad(resize_label(cut(case.label[None])[0], size[axes], classes)[None], patch)[0] if classes else None


def resize(volume: Tensor, shape: Sequence[int]) -> Tensor:
    """(C, d, h, w) float32 over the same box in `shape` voxels, axis by axis: a new voxel is the mean of what it covers
    where they grow larger, interpolated between its neighbors where they grow smaller."""
    for axis, (old, new) in enumerate(zip(volume.shape[1:], map(int, shape), strict=True), start=1):
        if old != new:
            with torch.autocast(volume.device.type, enabled=False):
                volume = (volume.movedim(axis, -1) @ _weights(old, new, volume.device)).movedim(-1, axis)
    return volume


@functools.lru_cache(256)  # else the host would wait for the GPU at each patch
def _weights(old: int, new: int, device: torch.device) -> Tensor:
    centers = (torch.arange(new, dtype=torch.float64) + 0.5) * (old / new) - 0.5
    weights = ((max(old / new, 1) + 1) / 2 - (torch.arange(old)[:, None] - centers).abs()).clamp(0, 1)
    return (weights / weights.sum(0)).float().to(device)


def resize_label(label: Tensor, shape: Sequence[int], classes: int) -> Tensor:
    """(D, H, W) uint8: a new voxel has the class that covers most of it, or that is nearest where they grow smaller."""
    if label.shape == tuple(shape):
        return label
    shares = torch.stack([label == value for value in range(classes)]).float()
    return resize(shares, shape).max(0).indices.to(torch.uint8)


def pad(volume: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(C, d, h, w), centered in zeros where it is smaller than `shape`."""
    missing = np.maximum(np.subtract(shape, volume.shape[1:]), 0)[::-1]  # F.pad begins with the last axis
    return F.pad(volume, np.stack([missing // 2, missing - missing // 2], 1).flatten().tolist())


# ---- one case ----------------------------------------------------------------------------------------------

def read_case(name: str, image_paths: list[Path], label_path: Path | None, classes: list[str], normalize: str,
              window: tuple[float, float]) -> Case:
    """One case from one file or a file a channel, checked and normalized. An h5 file had its z-score as a whole scan,
    before it was cropped: crops of one organ differ in contrast by up to five times, which "zscore-crop" takes away."""
    if not name.isprintable():
        raise BadInput(f"{str(image_paths[0])!a}: a name with characters that cannot be shown; rename it")
    if image_paths[0].suffix == ".h5":
        normalize = "zscore" if normalize == "zscore-crop" else "none"
        spacing, affine = (0.625, 0.625, 0.625), np.eye(4)  # the challenge's; files without an affine get the identity
        image, label = read_h5(image_paths[0])
    else:
        stems = [stem(path) for path in image_paths]
        if stems not in ([name], [f"{name}_{i:04d}" for i in range(len(stems))]):
            raise BadInput(f"{image_paths[0]}: one case has {stems}; add the channel or remove the duplicate")
        files = image_paths + [label_path] * bool(label_path)
        (first, spacing, affine), *others = map(read_nifti, files)
        for path, (array, _, other) in zip(files[1:], others, strict=True):
            if array.shape != first.shape[:3] or not np.allclose(affine, other, rtol=1e-3, atol=1e-3):
                raise BadInput(f"{path}: shape {array.shape} or affine unlike those of {files[0]}; resample it")
        arrays = [first, *(array for array, _, _ in others)]
        label = arrays.pop() if label_path else None
        image = np.moveaxis(np.concatenate([a.reshape(*first.shape[:3], -1) for a in arrays], -1), -1, 0)
    for value in [] if label is None else np.unique(label):
        if value not in range(len(classes)):  # neither are 0.5, -1 and NaN
            remedy = "divide by 255" if value == 255 else "correct it, or declare the value"
            raise BadInput(f"{label_path}: label {value:g} is none of 0 to {len(classes) - 1}; {remedy}")
    return make_case(name, image, label, spacing, affine, normalize, window, image_paths[0])


def make_case(name, image, label, spacing, affine, normalize, window, path) -> Case:
    """Arrays to tensors: voxels to codes, and the table of their values normalized channel by channel."""
    with np.errstate(over="ignore"):
        image = np.ascontiguousarray(image, np.float32 if image.dtype.kind == "f" else None)
    table = np.unique(image)
    if not np.isfinite(table).all():
        raise BadInput(f"{path}: NaN or infinite voxels; replace them")
    if any(channel.min() == channel.max() for channel in image):
        raise BadInput(f"{path}: constant image; leave the case out")
    few = len(table) <= 2**15
    image = encode(image, table) if few else image
    rows = [(table, np.bincount(c.ravel(), minlength=len(table))) if few else (c, None) for c in image]
    values = torch.from_numpy(np.stack([standardize(*row, normalize, window) for row in rows]))
    image, levels = (torch.from_numpy(image), values) if few else (values, None)
    label = None if label is None else torch.from_numpy(np.ascontiguousarray(label, np.uint8))
    return Case(name, image, levels, label, spacing, affine)


def encode(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The position of each voxel's value in the sorted table of all values."""
    dtype = np.uint8 if len(table) <= 256 else np.int16
    if image.dtype.kind == "f" or image.dtype.itemsize > 2:
        return np.searchsorted(table, image).astype(dtype)
    lookup = np.zeros(2**16, dtype)  # 30 times as fast; negative integers count from its end
    lookup[table] = np.arange(len(table))
    return lookup[image]


def standardize(values: np.ndarray, counts: np.ndarray | None, normalize: str, window) -> np.ndarray:
    """z-score, or a window to [0, 1], in float64; counts tells how often each value occurs, None for once."""
    values = values.astype(np.float64)
    if normalize in ("zscore", "zscore-crop"):
        values -= np.average(values, weights=counts)
        values /= np.average(values**2, weights=counts) ** 0.5
    elif normalize == "window":
        values = (values.clip(*window) - window[0]) / (window[1] - window[0])
    return values.astype(np.float32)


# ---- a folder of cases -------------------------------------------------------------------------------------

def stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def group(folder: Path, numbered: bool) -> dict[str, list[Path]]:
    """Case name to files; `numbered` is nnU-Net's naming, CASE_0000 and up, a file a channel."""
    cases = {}
    for path in sorted(p for p in folder.glob("[!.]*") if p.name.endswith((".nii", ".nii.gz"))):
        cases.setdefault(re.sub(r"_\d{4}$", "", stem(path)) if numbered else stem(path), []).append(path)
    return cases


def find_images(path: str | Path) -> dict[str, list[Path]]:
    """The case of a file, or all of a folder: {name: [a file a channel]}; nnU-Net's naming where there is a _0000."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    cases = group(folder, numbered=any(name.endswith("_0000") for name in group(folder, numbered=False)))
    cases = {name: files for name, files in cases.items() if path.is_dir() or path in files}
    if not cases:
        raise BadInput(f"{path}: no .nii or .nii.gz image here; dcm2niix makes them of DICOM")
    return cases


def scan_h5(folder: Path) -> tuple[list, list, list[str], int, list[str], list[str]]:
    """Training and test cases as (name, images, label), classes, channels, faults that forbid training and notes
    that do not; no voxel is read."""
    parts = []
    for path in (folder / "train.list", folder / "test.list"):
        names = path.read_bytes().decode(errors="replace").split() if path.is_file() else []
        files = [folder / "2018LA_Seg_Training Set" / name / "mri_norm2.h5" for name in names]
        parts.append([(file.parent.name, [file], file) for file in files])  # no list can name another folder
    return *parts, ["background", "left atrium"], 1, [], []


def scan_nifti(folder: Path) -> tuple[list, list, list[str], int, list[str], list[str]]:
    """The same for nnU-Net's layout and the Decathlon's."""
    path, faults, parts = folder / "dataset.json", [], []
    if not path.is_file():
        raise BadInput(f"{folder}: no such folder, or neither train.list (left atrium) nor dataset.json (nnU-Net v2, "
                       "Decathlon) in it; the top of data.py draws the three layouts, --data phantom needs none")
    try:
        spec = json.loads(path.read_text())
        channels = len(spec.get("channel_names") or spec["modality"])
        classes = {value if isinstance(value, int) else int(name): name if isinstance(value, int) else value
                   for name, value in spec["labels"].items()}  # nnU-Net has name: integer, MSD integer: name
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path}: invalid, or lacks channel_names (modality) or labels, which are numbers, no regions: "
                       f"{error!r}") from None
    if spec.get("file_ending", ".nii.gz") not in (".nii", ".nii.gz"):
        raise BadInput(f"{path}: file_ending {spec['file_ending']!a}; convert the volumes to .nii.gz")
    names = [str(classes[i]) for i in sorted(classes)]
    usable = 2 <= len({*names}) == len(names) <= 256 and "ignore" not in names and "".join(names).isprintable()
    if sorted(classes) != list(range(len(names))) or not usable:
        raise BadInput(f"{path}: labels must be 0, 1, 2, ... without a gap, names printable, no two alike or 'ignore'")
    for part in ("Tr", "Ts"):
        images = group(folder / f"images{part}", numbered="channel_names" in spec)
        labels = group(folder / f"labels{part}", numbered=False)
        faults += [f"{files[0]}: label without an image, or of a case with two; remove it or add the image"
                   for name, files in labels.items() if name not in images or len(files) > 1]
        parts.append([(name, files, labels.get(name, [None])[0]) for name, files in images.items()])
    train, test = parts
    train = [train[i] for i in np.random.default_rng(0).permutation(len(train))]  # names may follow sites or dates
    counts = len(train), sum(label is not None for _, _, label in train)
    declared, notes = spec.get("numTraining", counts[0]), []
    if declared not in counts:
        notes.append(f"{path}: numTraining is {declared!a}, not {counts[1]}, the number of labels; correct it")
    return train, test, names, channels, faults, notes


def gather(folder: Path, normalize: str, window: tuple[float, float]) -> tuple[Dataset, list[str], list[str]]:
    """Every case of a folder, with the faults and notes found on the way; BadInput if there is nothing to read."""
    scan = scan_h5 if (folder / "train.list").is_file() else scan_nifti
    train, test, classes, channels, faults, notes = scan(folder)

    def attempt(entry) -> Case | BadInput:
        try:
            case = read_case(*entry, classes, normalize, window)
            if len(case.image) == channels:
                return case
            return BadInput(f"{entry[1][0]}: {len(case.image)} channels, {channels} declared; correct either")
        except BadInput as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        found = list(tqdm(pool.map(attempt, train + test), "reading", len(train + test), disable=None))
    faults += [str(case) for case in found if isinstance(case, BadInput)]
    train, test = ([c for c in part if isinstance(c, Case)] for part in (found[: len(train)], found[len(train) :]))
    seen = {}
    for case in train + test:
        levels = b"" if case.levels is None else case.levels.numpy().tobytes()
        content = hashlib.blake2b(case.image.numpy().tobytes() + levels + repr(case.image.shape).encode()).digest()
        if twin := seen.get(case.name) or seen.get(content):
            faults.append(f"{folder}: cases {twin} and {case.name} have one name or image; remove or rename one")
        seen[case.name] = seen[content] = case.name
    labeled, unlabeled = [c for c in train if c.label is not None], [c for c in train if c.label is None]
    if not labeled:
        faults.append(f"{folder}: no labeled training case; give one at least a label")
    return Dataset(labeled, unlabeled, test, classes, channels), faults, notes


def load(data: str, root: str, labeled: float, holdout: float, normalize: str,
         window: tuple[float, float]) -> Dataset:
    """A data set in memory; BadInput where anything is wrong with it.

    data: "phantom", another recipe's name (`root` is its folder, data/NAME if empty), or any folder. holdout:
    the share of the labeled training cases that becomes test cases. labeled: of the rest, the share (up to 1) or
    number that keeps its label. No seed changes the order of the cases: a larger labeled set contains each
    smaller one, and the held-out cases stay.
    """
    if data == "phantom":
        cases = phantom(28, normalize, window)
        found = Dataset(cases[:20], [], cases[20:], ["background", "organ"], 1)
    else:
        folder = Path(root or f"data/{data}") if data in SOURCES else Path(data)
        if not folder.is_dir():
            source = SOURCES.get(data, "a folder of your own has one of the layouts that data.py begins with")
            flag = "--root" if data in SOURCES else "--data"
            raise BadInput(f"{flag} {folder}: no such folder ({source}); --data phantom runs without any")
        found, faults, _ = gather(folder, normalize, window)
        if faults:
            raise BadInput(f"{faults[0]} (one of {len(faults)}, see python data.py check {folder})")
    if not 0 <= holdout < 1 or not labeled > 0:
        raise BadInput(f"--holdout {holdout:g}, --labeled {labeled:g}: shares from 0 to 1, or a number of labels")
    keep = len(found.labeled) - math.floor(holdout * len(found.labeled) + 0.5)
    n = math.floor(labeled * keep + 0.5) if labeled <= 1 else labeled
    if n not in range(1, keep + 1):
        raise BadInput(f"{data}: --labeled {labeled:g} is {n:g} of the {keep} labeled cases that --holdout "
                       f"{holdout:g} leaves; choose another share up to 1 or number over 1, or a lower --holdout")
    cases, n = found.labeled, int(n)
    return replace(found, labeled=cases[:n], unlabeled=cases[n:keep] + found.unlabeled, test=found.test + cases[keep:])


def check(folder: str | Path) -> tuple[list[str], str]:
    """Every fault of a data set, a line each, found in one pass; and a line that sums it up."""
    try:
        found, faults, notes = gather(Path(folder), "none", (0, 1))
    except BadInput as error:
        return [str(error)], ""
    cases = found.labeled + found.unlabeled + found.test
    shapes, spacings = sorted(tuple(c.image.shape) for c in cases), sorted(c.spacing for c in cases)
    spans = " to ".join(map(str, shapes[:1] + shapes[-1:])), " to ".join(map(str, spacings[:1] + spacings[-1:]))
    differ = " (they differ: --voxel resamples)" * (not np.allclose(spacings, spacings[:1], rtol=0.01))
    return faults + notes, (f"{found}; classes {', '.join(found.classes)}; shapes {spans[0]}; "
                            f"spacings {spans[1]} mm{differ}")


def phantom(n: int, normalize: str = "zscore", window=None) -> list[Case]:
    """n synthetic labeled scans, always the same."""
    return [make_case(name, image[None], label, (1.0, 1.0, 1.0), np.eye(4), normalize, window, name)
            for name, image, label in map(scan, range(n))]


def main() -> int:
    parser = Parser(description="Look a data set over.")
    parser.add_argument("command", choices=["check"], help="everything that is wrong, a line each")
    parser.add_argument("folder")
    faults, summary = check(parser.parse_args().folder)
    print(*(faults or [summary]), sep="\n")
    return 2 if faults else 0


if __name__ == "__main__":
    sys.exit(cli(main))
