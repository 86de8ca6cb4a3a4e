"""kernels/surface.py against its reference, SciPy's distance transform and MedPy: on a GPU or interpreted."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from aot import ROOT, Job, assert_no_spills
from scipy import ndimage

from kernels import surface
from kernels.surface import reference, surface_scores

triton = pytest.importorskip("triton")
MILLIMETERS = (0.7, 1.3, 3.1)  # no axis like another, no number that binary fractions can express


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    if not request.node.get_closest_marker("gpu"):
        # several tiles, steps and programs even in a small volume
        for name, value in {"TILE": 256, "STEP": 128, "PASS": 128, "PROGRAMS": 2}.items():
            monkeypatch.setattr(surface, name, value)


def blobs(shape, seed, share=0.3):
    field = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 1.5)
    return torch.from_numpy(field > np.quantile(field, 1 - share))


def noise(shape, seed, share):
    return torch.from_numpy(np.random.default_rng(seed).random(shape) < share)


def box(shape, *ranges):
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[tuple(slice(*r) for r in ranges)] = True
    return mask


def witness(prediction, label, spacing=None):
    """A row of scores from SciPy and NumPy."""
    p, q = (mask.cpu().numpy() != 0 for mask in (prediction, label))
    row = [np.count_nonzero(p & q), np.count_nonzero(p), np.count_nonzero(q)]
    cross = ndimage.generate_binary_structure(3, 1)
    surfaces = [mask & ~ndimage.binary_erosion(mask, cross) for mask in (p, q)]
    if not (p.any() and q.any()):
        return row + [math.nan] * 3
    forward, backward = (
        ndimage.distance_transform_edt(~to, spacing)[of] for of, to in (surfaces, reversed(surfaces))
    )
    pooled = np.concatenate((forward, backward))
    return row + [forward.mean(), pooled.mean(), np.percentile(pooled, 95)]


S = (6, 7, 9)
PAIRS = {
    "one voxel each": (box(S, (1, 2), (2, 3), (3, 4)), box(S, (4, 5), (6, 7), (1, 2)), None),
    "opposite corners": (box(S, (0, 1), (0, 1), (0, 1)), box(S, (5, 6), (6, 7), (8, 9)), MILLIMETERS),
    "identical": (box(S, (1, 5), (2, 6), (0, 9)), box(S, (1, 5), (2, 6), (0, 9)), None),
    "nested": (box(S, (0, 6), (0, 6), (1, 9)), box(S, (2, 4), (2, 4), (3, 6)), MILLIMETERS),
    "whole volume": (torch.ones(S, dtype=torch.bool), torch.ones(S, dtype=torch.bool), None),
    "whole volume and one voxel": (torch.ones(S, dtype=torch.bool), box(S, (3, 4), (0, 1), (4, 5)), (3, 1, 1)),
    "one row": (box((1, 1, 250), (0, 1), (0, 1), (0, 5)), box((1, 1, 250), (0, 1), (0, 1), (240, 250)), None),
    "one column": (box((32, 1, 1), (0, 3)), box((32, 1, 1), (29, 32)), None),
    "one voxel in all": (torch.ones(1, 1, 1, dtype=torch.bool), torch.ones(1, 1, 1, dtype=torch.bool), None),
    "far apart": (box((9, 30, 3), (0, 2), (0, 3), (0, 2)), box((9, 30, 3), (7, 9), (27, 30), (1, 3)), None),
    "far apart, thick slices": (box((17, 9, 3), (0, 2)), box((17, 9, 3), (15, 17)), (5.0, 0.3, 0.3)),
    "blobs": (blobs((11, 6, 17), 0), blobs((11, 6, 17), 1), None),
    "blobs in mm": (blobs((5, 13, 11), 2), blobs((5, 13, 11), 3), MILLIMETERS),
    "noise": (noise((9, 8, 7), 4, 0.5), noise((9, 8, 7), 5, 0.02), MILLIMETERS),
    "noise and blob": (noise((7, 9, 16), 6, 0.1), blobs((7, 9, 16), 7), None),
}


@pytest.mark.parametrize("name", PAIRS)
def test_kernels_reference_and_scipy_agree(name, device):
    prediction, label, spacing = PAIRS[name]
    prediction, label = prediction.to(device), label.to(device)
    scores = surface_scores(prediction, label, spacing)
    expected = torch.tensor([witness(prediction, label, spacing)], dtype=torch.float64, device=device)
    assert (scores.shape, scores.dtype, scores.device) == ((1, 6), torch.float64, expected.device)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(reference(prediction, label, spacing), expected, rtol=0, atol=1e-9)
    assert scores[0, 5] == expected[0, 5]  # distances and interpolation alike to the last bit


@pytest.mark.parametrize("seed", range(5))
def test_random_volumes(seed, device):
    rng = np.random.default_rng(seed)
    shape, spacing = tuple(rng.integers(3, 13, 3)), tuple(rng.uniform(0.3, 4, 3))
    prediction = blobs(shape, seed + 10, rng.uniform(0.01, 0.9)) ^ noise(shape, seed, 0.02)
    label = blobs(shape, seed + 20, rng.uniform(0.01, 0.9))
    scores = surface_scores(prediction.to(device), label.to(device), spacing)
    np.testing.assert_allclose(scores[0].cpu(), witness(prediction, label, spacing), rtol=0, atol=1e-9)


@pytest.mark.parametrize("spacing", [None, MILLIMETERS])
def test_medpy(spacing, device):
    binary = pytest.importorskip("medpy.metric.binary")
    prediction, label = blobs((8, 7, 12), 30), blobs((8, 7, 12), 31)
    p, q = prediction.numpy(), label.numpy()
    expected = [binary.asd(p, q, spacing), binary.assd(p, q, spacing), binary.hd95(p, q, spacing)]
    scores = surface_scores(prediction.to(device), label.to(device), spacing)
    np.testing.assert_allclose(scores[0, 3:].cpu(), expected, rtol=0, atol=1e-9)


def test_the_longest_row(device, monkeypatch):
    monkeypatch.setattr(surface, "TILE", 1024)
    p, q = box((1, 2, 1024), (0, 1), (0, 1), (0, 1)), box((1, 2, 1024), (0, 1), (1, 2), (1020, 1024))
    np.testing.assert_allclose(surface_scores(p.to(device), q.to(device))[0].cpu(), witness(p, q), rtol=1e-12)


def test_empty_masks_have_no_distance(device):
    full, empty = torch.ones(3, 4, 5, dtype=torch.bool, device=device), torch.zeros(3, 4, 5, dtype=torch.bool)
    empty, nan = empty.to(device), [math.nan] * 3
    prediction, label = torch.stack([full, empty, empty]), torch.stack([empty, full, empty])
    expected = torch.tensor([[0, 60, 0, *nan], [0, 0, 60, *nan], [0, 0, 0, *nan]], dtype=torch.float64)
    for scores in (surface_scores(prediction, label), reference(prediction, label)):
        torch.testing.assert_close(scores.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def classes(device):
    shape = (4, 5, 9)
    prediction = torch.stack([blobs(shape, 1), box(shape, (0, 0)), noise(shape, 2, 0.1)])
    label = torch.stack([blobs(shape, 3), blobs(shape, 4), box(shape, (3, 4), (2, 4), (0, 3))])
    return prediction.to(device), label.to(device)


@pytest.mark.parametrize("together", [3, 2, 0])
def test_a_batch_of_classes_is_its_single_calls_bit_for_bit(together, device, monkeypatch):
    prediction, label = classes(device)
    single = torch.cat([surface_scores(p, q, MILLIMETERS) for p, q in zip(prediction, label, strict=True)])
    monkeypatch.setattr(surface, "TOGETHER", together * label[0].numel())
    scores = surface_scores(prediction, label, MILLIMETERS)
    torch.testing.assert_close(scores, single, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("poison", [0xFF, 0x01])
def test_what_memory_held_before_changes_no_bit(poison, device, monkeypatch):
    pair, empty = classes(device), torch.empty
    expected = surface_scores(*pair)

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        tensor.view(torch.uint8).fill_(poison)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    torch.testing.assert_close(surface_scores(*pair), expected, rtol=0, atol=0, equal_nan=True)


def test_layout_and_type_of_the_masks_change_no_bit(device):
    prediction, label = classes(device)
    expected = surface_scores(prediction, label)
    strided = (mask.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for mask in (prediction, label))
    torch.testing.assert_close(surface_scores(*strided), expected, rtol=0, atol=0, equal_nan=True)
    integers = surface_scores(prediction.byte() * 255, label.byte() * 2)
    torch.testing.assert_close(integers, expected, rtol=0, atol=0, equal_nan=True)


RNG = np.random.default_rng(0)
SETS = {
    "two": RNG.random(2),
    "two alike": np.full(2, 2.3),
    "ties": np.sqrt(RNG.integers(0, 9, 3000)),
    "nearly all zero": np.where(RNG.random(2500) < 0.06, 7.5, 0),
    "all zero": np.zeros(70),
    "all equal": np.full(100, 2.3),
    "two values, the rank between them": np.repeat([1.5, np.nextafter(1.5, 2)], [95, 5])[RNG.permutation(100)],
    "two values, the rank at the second": np.repeat([1.5, np.nextafter(1.5, 2)], [94, 5])[RNG.permutation(99)],
    "two values an exponent apart": np.repeat([0.3, 80.0], [950, 51])[RNG.permutation(1001)],
    "an outlier": np.append(RNG.random(400), 100),
    "a far cluster": 1e4 + RNG.random(2100) * 1e-6,
    "neighboring numbers": 1 + RNG.integers(0, 40, 200) * np.spacing(1.0),
    "last in its bin": np.array([1.0] * 90 + [2.0] * 5 + [4.0, 4.0, 5.0, 6.0, 7.0]),
    "any magnitude": np.exp2(RNG.uniform(-1000, 1000, 777)),
    "spacings that differ in the last bits": np.sqrt(
        (RNG.integers(0, 4, 4000) * 0.7) ** 2 + (RNG.integers(0, 4, 4000) * (0.1 + 0.2 + 0.4)) ** 2
    ),
    "part 0": RNG.random(21),  # 0.95 * 20 is a whole number
    "part 0.85": np.random.default_rng(0).random(4),  # NumPy's two formulas differ by a bit
}


@pytest.mark.parametrize("name", SETS)
def test_means_and_percentile_of_any_distances(name, device):
    distances = SETS[name]
    n, first = len(distances), len(distances) // 2
    ends = torch.tensor([first, n, n + 3, n + 8, n + 15], device=device)
    scores, bits, programs = torch.empty(1, 6, dtype=torch.float64, device=device), surface.BITS, surface.PROGRAMS
    pooled = torch.from_numpy(distances).to(device)
    tallies = torch.zeros(63 // bits, 2**bits + 2, dtype=torch.int64, device=device)
    parts = torch.full((3, programs), math.nan, dtype=torch.float64, device=device)
    for shift in range(63 - bits, -1, -bits):
        surface._narrow[programs, 1](
            pooled.view(torch.int64), ends, tallies, parts, n, 1, shift, surface.PASS, bits, shift == 0, num_warps=8
        )
    surface._finish[1,](tallies, parts, ends, scores, 1, programs, bits, enable_fp_fusion=False)
    assert scores[0, :3].tolist() == [3, 5, 7]
    means = [distances[:first].mean(), distances.mean()]
    np.testing.assert_allclose(scores[0, 3:5].cpu(), means, rtol=1e-14)
    assert scores[0, 5] == np.percentile(distances, 95)
    higher = torch.from_numpy(distances.view(np.int64) >> bits)  # the last tally: of one prefix, no distance lost
    assert tallies[0, :-2].sum() == (higher == tallies[0, -2].cpu()).sum()


ONE = torch.ones(2, 3, 4, dtype=torch.bool)


@pytest.mark.parametrize("function", [surface_scores, reference])
@pytest.mark.parametrize(
    "prediction, label, spacing, message",
    [
        (ONE, ONE[:1], None, "one shape"),
        (ONE[0], ONE[0], None, "one shape"),
        (ONE, ONE.to("meta"), None, "one device"),
        (ONE[:0], ONE[:0], None, "1 to 1024"),
        (ONE[:, :1, :1].expand(2, 1025, 1), ONE[:, :1, :1].expand(2, 1025, 1), None, "1 to 1024"),
        (ONE, ONE.float(), None, "bool or uint8"),
        (ONE, ONE, (1, 1), "three positive"),
        (ONE, ONE, (1, 0, 1), "three positive"),
        (ONE, ONE, (1, math.nan, 1), "three positive"),
    ],
)
def test_wrong_arguments(function, prediction, label, spacing, message):
    with pytest.raises(ValueError, match=message):
        function(prediction, label, spacing)


def test_without_triton_the_reference_serves():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from kernels.surface import surface_scores\n"
        "mask = torch.ones(1, 1, 2, dtype=torch.bool)\n"
        "assert surface_scores(mask, mask).tolist() == [[2, 2, 2, 0, 0, 0]]\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)


def test_no_configuration_spills():
    def job(kernel, arguments, num_warps=4, maxnreg=None, **constexprs):
        kinds = dict(pair.split(":", 1) for pair in arguments.split())
        kinds |= dict.fromkeys(constexprs, "constexpr")
        return Job(kernel, kinds, constexprs, num_warps, maxnreg=maxnreg)

    shape, table = "D:i32 H:i32 W:i32 T:i32", "s_x:*fp64 dz:*i32 dy:*i32 length:*fp64"
    rows = f"prediction:*u8 label:*u8 reach:*i16 counts:*i64 {shape}"
    compact = "reach:*i16 counts:*i64 ends:*i64 points:*i64 tallies:*i64 volume:i32 span:i32 T:i32"
    narrow = "points:*i64 ends:*i64 tallies:*i64 parts:*fp64 volume:i32 T:i32 shift:i32"
    passes, size = dict(TILE=surface.PASS, BITS=surface.BITS), 63 // surface.BITS * (2**surface.BITS + 2)
    tiles = [(width, dict(ROWS=max(256 // width, 1), WIDTH=width)) for width in (16, 32, 64, 128, 256, 512, 1024)]
    jobs = [
        job("_rows", rows, max(width // 256, 1), STEPS=2048 // max(256, width), **tile, ALIGNED=aligned)
        for width, tile in tiles for aligned in (1, 16)
    ]  # fmt: skip
    jobs += [job("_compact", compact, TILE=2048, SIZE=size)]
    jobs += [
        job("_finish", "tallies:*i64 parts:*fp64 ends:*i64 scores:*fp64 T:i32", PROGRAMS=256, BITS=surface.BITS),
        job("_nearest", f"points:*i64 reach:*i16 ends:*i64 {table} {shape}",
            POINTS=surface.POINTS, OFFSETS=surface.OFFSETS),
        job("_narrow", narrow, 8, LAST=False, **passes),
        job("_narrow", narrow + ":16", 8, LAST=True, **passes),
    ]  # fmt: skip
    carried = [result["carried"] for result in assert_no_spills("kernels.surface", jobs)]
    # three counts of a tile; `best` and j of a block of points; the tally, then both sums and the least distance beyond
    # as well: the interpreter does not see if the compiler forgets one
    assert carried[:14] == [[3]] * 14 and carried[-3:] == [[2], [1], [4]]


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    pair = classes("cuda")
    surface_scores(*pair)  # compiles, and builds the table of offsets
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        surface_scores(*pair)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("spacing", [None, MILLIMETERS])
def test_large_volume(spacing):
    """512 x 512 x 200 with some 190,000 surface voxels a mask; SciPy sees the box around both alone."""
    z, y, x = torch.meshgrid(torch.arange(512), torch.arange(512), torch.arange(200), indexing="ij")
    radius = (((z - 250) / 150.0) ** 2 + ((y - 260) / 150.0) ** 2 + ((x - 100) / 80.0) ** 2).sqrt()
    prediction, label = radius + 0.03 * torch.sin(z / 9.0) < 1, radius + 0.04 * torch.sin(y / 7.0) < 1
    scores = surface_scores(prediction.cuda(), label.cuda(), spacing)
    inside = (slice(90, 410), slice(100, 420), slice(10, 190))
    assert prediction[inside].sum() == prediction.sum() and label[inside].sum() == label.sum()
    expected = witness(prediction[inside], label[inside], spacing)
    np.testing.assert_allclose(scores[0].cpu(), expected, rtol=0, atol=1e-9)
