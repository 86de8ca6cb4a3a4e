"""data.py: exact storage, patches equal to numpy's, three layouts, and one line for each kind of bad input."""

import gzip
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch

import data
from cli import BadInput
from data import check, draw, find_images, load, make_case, phantom, read_case
from files import read_nifti, write_label
from reciprocal import Config

SHARED = Path(os.environ.get("RECIPROCAL_SHARED", Path(__file__).parents[2] / "shared"))
SHAPE = (9, 8, 7)


def scan(seed, shape=SHAPE, dtype=np.int16):
    return np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)


def mask(seed, classes=2, shape=SHAPE):
    return np.random.default_rng([seed, 1]).integers(0, classes, shape).astype(np.uint8)


def save(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 2.0, 3.0, 1.0]) if affine is None else affine), path)
    return path


def nnunet(root, labeled=6, unlabeled=3, test=2, channels=1, classes=2):
    """A folder in nnU-Net v2's raw layout."""
    names = ["background", "organ", "tumor"][:classes]
    (root / "dataset.json").write_text(json.dumps({
        "channel_names": {str(c): f"m{c}" for c in range(channels)}, "numTraining": labeled, "file_ending": ".nii.gz",
        "labels": {name: value for value, name in enumerate(names)}}))
    for i in range(labeled + unlabeled + test):
        part = "Tr" if i < labeled + unlabeled else "Ts"
        for c in range(channels):
            save(root / f"images{part}" / f"case{i}_{c:04d}.nii.gz", scan([i, c]))
        if i < labeled or part == "Ts":
            save(root / f"labels{part}" / f"case{i}.nii.gz", mask(i, classes))
    return root


def decathlon(root, labeled=6, test=2, channels=1):
    """A folder in the Medical Segmentation Decathlon's layout, test labels withheld."""
    (root / "dataset.json").write_text(json.dumps({
        "modality": {str(c): f"m{c}" for c in range(channels)}, "numTraining": labeled,
        "labels": {"0": "background", "1": "organ", "2": "tumor"}}))
    for i in range(labeled + test):
        shape = (*SHAPE, channels) if channels > 1 else SHAPE
        save(root / ("imagesTr" if i < labeled else "imagesTs") / f"case_{i:03d}.nii.gz", scan(i, shape))
        if i < labeled:
            save(root / "labelsTr" / f"case_{i:03d}.nii.gz", mask(i, 3))
    return root


def atrium(root, train=5, test=2):
    """A folder in the left-atrium literature's layout; the last training case and the test cases lack a label."""
    names = [f"ID{i}" for i in range(train + test)][::-1]
    for i, name in enumerate(names):
        folder = root / "2018LA_Seg_Training Set" / name
        folder.mkdir(parents=True)
        with h5py.File(folder / "mri_norm2.h5", "w") as file:
            file["image"] = scan(i).astype(np.float32) / 50 + 0.25
            if i < train - 1:
                file["label"] = mask(i)
    (root / "train.list").write_text("\n".join(names[:train]))
    (root / "test.list").write_text("\n".join(names[train:]))
    return root


def get(folder, labeled=1.0, holdout=0.0, normalize="zscore", window=(0, 1)):
    return load(str(folder), "", labeled, holdout, normalize, window)


def case_of(array, label=None, normalize="none", window=(0, 1)):
    return make_case("x", array, label, (1, 1, 1), np.eye(4), normalize, window, "x")


def names(cases):
    return [case.name for case in cases]


# ---- storage ------------------------------------------------------------------------------------------------

FEW = np.random.default_rng(0).standard_normal(200)


@pytest.mark.parametrize("array, dtype", [
    (scan(0, (2, 9, 8, 7)), torch.uint8),
    (np.random.default_rng(0).integers(-2000, 3000, (1, 20, 20, 20)).astype(np.int16), torch.int16),
    (np.array([-32768, 32767, 0, -1], ">i2").reshape(1, 1, 2, 2), torch.uint8),
    (np.array([0, 65535, 40000, 2], np.uint16).reshape(1, 1, 2, 2), torch.uint8),
    (np.arange(256, dtype=np.int16).reshape(1, 1, 1, 256), torch.uint8),
    (np.arange(257, dtype=np.int16).reshape(1, 1, 1, 257), torch.int16),
    (np.random.default_rng(0).integers(-(2**20), 2**20, (1, 9, 9, 9)).astype(np.int32), torch.int16),
    (np.random.default_rng(0).choice(FEW, (1, 9, 9, 9)), torch.uint8),
    (np.random.default_rng(0).standard_normal((2, 30, 30, 30)), torch.float32),
])  # fmt: skip
def test_codes_are_exact(array, dtype):
    case = case_of(array)
    assert case.image.dtype == dtype and (case.levels is None) == (dtype == torch.float32)
    assert case.volume().dtype == torch.float32
    np.testing.assert_array_equal(case.volume().numpy(), array.astype(np.float32))


@pytest.mark.parametrize("shape", [(2, 9, 8, 7), (2, 30, 30, 30)])
def test_normalization_is_numpys(shape):
    array = np.random.default_rng(1).normal(300, 40, shape).astype(np.float32)  # the larger one has no codes
    array[1] *= 3
    zscore = (array - array.mean((1, 2, 3), keepdims=True)) / array.std((1, 2, 3), keepdims=True)
    for normalize in ("zscore", "zscore-crop"):
        np.testing.assert_allclose(case_of(array, normalize=normalize).volume(), zscore, atol=1e-5)
    window = (array.clip(250, 350) - 250) / 100
    np.testing.assert_allclose(case_of(array, normalize="window", window=(250, 350)).volume(), window, atol=1e-6)


# ---- patches ------------------------------------------------------------------------------------------------

def coded(shape=(9, 8, 7), n=1):
    """Cases whose label and image tell the position, so that a crop can be found again."""
    volume = np.arange(np.prod(shape)).reshape(shape)
    return [case_of(volume[None].astype(np.float32) + 1, (volume % 251).astype(np.uint8)) for _ in range(n)]


@pytest.mark.parametrize("augment, patch", [("none", (5, 4, 3)), ("rotflip", (5, 4, 3)), ("rotflip", (4, 4, 4)),
                                            ("flip", (5, 4, 3))])
def test_a_patch_is_numpys_turn_and_flip_of_a_crop(augment, patch):
    case = coded()[0]
    volume, label = case.volume()[0].numpy(), case.label.numpy()
    kinds = set()
    for iteration in range(60):
        image, target = draw([case], 1, patch, seed=3, stream=0, iteration=iteration, augment=augment, classes=251)
        assert image.shape == (1, 1, *patch) and target.shape == (1, *patch) and target.dtype == torch.uint8
        first = np.array(np.unravel_index(int(image.min()) - 1, volume.shape))
        turns = range(4) if augment == "rotflip" else [0]
        flips = {"none": [()], "rotflip": [0, 1], "flip": [a for a in np.ndindex(2, 2, 2)]}[augment]
        found = []
        for k in turns:
            size = (patch[1], patch[0], patch[2]) if k % 2 else patch
            box = tuple(slice(f, f + s) for f, s in zip(first, size, strict=True))
            for flip in flips:
                axes = [i for i in range(3) if flip[i]] if augment == "flip" else flip
                expected = [np.flip(np.rot90(v[box], k), axes) for v in (volume, label)]
                if np.array_equal(expected[0], image[0, 0].numpy()):
                    np.testing.assert_array_equal(expected[1], target[0].numpy())
                    found.append((k, flip))
        assert found
        kinds.update(found)
    assert len(kinds) == {"none": 1, "rotflip": 8, "flip": 8}[augment]


def test_every_offset_is_drawn_evenly_and_the_last_is_one_of_them():
    case = coded((6, 5, 4))[0]
    images, _ = draw([case], 2000, (3, 3, 3), seed=0, stream=0, iteration=0, augment="none")
    starts = np.unravel_index(images.amin((1, 2, 3, 4)).long().numpy() - 1, (6, 5, 4))
    for start, last in zip(starts, (3, 2, 1), strict=True):
        share = np.bincount(start) / len(start)
        assert len(share) == last + 1 and abs(share - 1 / (last + 1)).max() < 0.05


def test_a_small_volume_is_centered_in_zeros_after_normalization():
    array, label = scan(0)[None], mask(0)
    case = case_of(array, label, "zscore")
    image, target = draw([case], 1, (12, 8, 10), seed=0, stream=0, iteration=0, augment="none", classes=2)
    inside = (slice(1, 10), slice(0, 8), slice(1, 8))
    assert torch.equal(image[0, 0][inside], case.volume()[0]) and torch.equal(target[0][inside], case.label)
    assert image.count_nonzero() == case.volume().count_nonzero() and target.sum() == label.sum()
    image, _ = draw([case], 8, (8, 12, 7), seed=0, stream=0, iteration=0, augment="rotflip")
    assert image.shape == (8, 1, 8, 12, 7)


def test_a_draw_depends_on_its_counters_alone():
    cases = [case_of(scan(i)[None], mask(i)) for i in range(5)]

    def at(iteration, **other):
        settings = dict(seed=1, stream=0, augment="rotflip", noise=0.1) | other
        return draw(cases, 3, (4, 4, 4), iteration=iteration, **settings)[0]

    seventh = at(7)
    torch.rand(3)
    assert not torch.equal(at(6), seventh) and torch.equal(at(7), seventh)
    assert not torch.equal(at(7, stream=1), seventh) and not torch.equal(at(7, seed=2), seventh)
    uses = [dict(seed=seed, stream=stream, iteration=0) for seed in (1, 2) for stream in (0, 1)]
    assert len({tuple(data.chosen([*range(9)], 9, **use)) for use in uses}) == 4
    del cases[1:]  # no choice: crops and turns alone
    assert len({tuple(at(7, seed=use["seed"], stream=use["stream"]).flatten().tolist()) for use in uses}) == 4


def test_an_epoch_holds_each_case_once():
    cases = [case_of(np.array([i, -1], np.int16).reshape(1, 2, 1, 1)) for i in range(6)]
    drawn = [draw(cases, 2, (2, 1, 1), seed=0, stream=0, iteration=i, augment="none")[0] for i in range(6)]
    first, second = torch.cat(drawn).amax((1, 2, 3, 4)).view(2, 6)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(6)) and not torch.equal(first, second)


@pytest.mark.parametrize("n", [1, 3, 4, 7])
def test_no_batch_holds_a_case_twice(n):
    batches = [data.chosen([*range(7)], n, seed=0, stream=0, iteration=i) for i in range(50)]
    assert all(len({*batch}) == n for batch in batches) and {*sum(batches, [])} == {*range(7)}
    assert sorted(data.chosen([0, 1, 2], 7, seed=0, stream=0, iteration=5)) == sorted([0, 1, 2] * 2 + [
        data.chosen([0, 1, 2], 7, seed=0, stream=0, iteration=5)[0]])  # more than there are: all in turn


def test_noise_is_clipped_and_unlabeled_draws_have_no_label():
    case = case_of(scan(0, (1, 30, 30, 30)).astype(np.float32))
    plain, label = draw([case], 1, (20, 20, 20), seed=0, stream=0, iteration=0, augment="none")
    noisy, _ = draw([case], 1, (20, 20, 20), seed=0, stream=0, iteration=0, augment="none", noise=0.5)
    grain = (noisy - plain) / 0.5
    case = case_of(scan(0, (2, 8, 8, 8)))
    every = draw([case], 2, (8, 8, 8), seed=0, stream=0, iteration=0, augment="none", noise=0.5)[0] - case.volume()
    assert torch.corrcoef(every.view(4, -1)).fill_diagonal_(0).abs().max() < 0.2  # each patch and channel its own
    assert label is None and abs(grain).max() <= 2 + 1e-4 and 0.8 < grain.std() < 1 and abs(grain.mean()) < 0.05


# ---- voxel size ---------------------------------------------------------------------------------------------

def ramp(shape=(24, 20, 30), spacing=(1.0, 2.0, 0.5)):
    """A case whose image tells how many mm a voxel's center is from the corner, and its label whether 12 in x."""
    x, y, z = (np.arange(n) * step + step / 2 for n, step in zip(shape, spacing, strict=True))
    image = np.float32(x[:, None, None] + 100 * y[:, None] + 10000 * z)
    return replace(case_of(image[None], np.uint8(image % 100 > 12)), spacing=spacing)


@pytest.mark.parametrize("augment", ["none", "rotflip", "flip"])
@pytest.mark.parametrize("voxel, steps", [((2, 4, 1), (2, 4, 1)), ((0, 0, 1.5), (1, 2, 1.5)), ((3, 0, 0), (3, 2, 0.5))])
def test_patches_have_the_voxel_size_asked_for(voxel, steps, augment):
    case, turned = ramp(), set()
    for iteration in range(20):
        image, label = draw([case], 1, (4, 4, 5), seed=0, stream=0, iteration=iteration, augment=augment, voxel=voxel,
                            classes=2)
        assert image.shape == (1, 1, 4, 4, 5) and label.shape == (1, 4, 4, 5) and label.dtype == torch.uint8
        found = [image[0, 0].double().diff(dim=axis) for axis in range(3)]
        assert all((step - step.mean()).abs().max() < 0.1 for step in found)  # the last of float32's bits is 0.02 here
        expected = np.multiply(steps, (1, 100, 10000))
        if turn := abs(found[0].mean()) > 50:
            expected = expected[[1, 0, 2]]
        np.testing.assert_allclose([step.mean().abs() for step in found], expected, rtol=1e-3)
        turned.add(bool(turn))
    assert turned == ({False, True} if augment == "rotflip" else {False})


@pytest.mark.parametrize("factor", [2, 2.5, 3, 4])
def test_a_resampled_label_lies_where_its_image_does(factor):
    """The coarse voxel whose center is past the border of the label is labeled, for any factor."""
    case = ramp()  # the border is at 12 mm, and no center of a coarse voxel
    image, label = draw([case], 4, (4, 4, 4), seed=0, stream=0, iteration=0, augment="rotflip", voxel=(factor, 0, 0),
                        classes=2)
    past = image[:, 0] % 100 - 12
    assert 0.2 < label.float().mean() < 0.8
    assert torch.equal(label[past.abs() > 0.26], (past[past.abs() > 0.26] > 0).to(torch.uint8))
    inside = (case.label[None] == 1).float()
    whole = data.resize(inside, case.grid((factor, 0, 0)))[0]
    coarse = data.resize_label(case.label, case.grid((factor, 0, 0)), 2)
    assert torch.equal(coarse, (whole > 0.5).to(torch.uint8))


def test_a_scan_smaller_than_the_patch_is_resampled_as_a_whole():
    case = ramp()
    assert case.grid((2, 4, 1)).tolist() == [12, 10, 15] and case.grid((0, 0, 0)).tolist() == [24, 20, 30]
    image, _ = draw([case], 1, (16, 16, 16), seed=0, stream=0, iteration=0, augment="none", voxel=(2, 4, 1))
    whole = data.resize(case.volume(), case.grid((2, 4, 1)))
    assert torch.equal(image[0, 0, 2:14, 3:13, 0:15], whole[0]) and image.count_nonzero() == 12 * 10 * 15
    image, _ = draw([case], 1, (4, 4, 4), seed=0, stream=0, iteration=0, augment="none", voxel=(1e3, 1e3, 1e3))
    assert image.count_nonzero() == 1  # all of it in one voxel
    image, _ = draw([case], 1, (8, 8, 8), seed=0, stream=0, iteration=0, augment="none", voxel=(0.1, 0.1, 0.1))
    assert image.shape == (1, 1, 8, 8, 8)  # less than one of the scan's voxels along an axis


@pytest.mark.parametrize("shape", [(3, 2, 7), (2, 1, 7), (5, 3, 7), (6, 4, 6), (1, 1, 1)])
def test_a_coarser_voxel_is_the_mean_of_what_it_covers(shape):
    volume = torch.randn(2, 6, 4, 7, generator=torch.Generator().manual_seed(0))
    fine = volume.double().numpy()
    for axis, new in enumerate(shape, start=1):  # each voxel in as many parts as the new grid has, then whole blocks
        fine = np.repeat(fine, new, axis)
        fine = fine.reshape(*fine.shape[:axis], new, -1, *fine.shape[axis + 1 :]).mean(axis + 1)
    np.testing.assert_allclose(data.resize(volume, shape), fine, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_allclose(data.resize(volume, shape), fine, atol=1e-6)


def test_a_finer_voxel_lies_between_its_neighbors():
    volume = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    for shape in ((8, 9, 5), (4, 4, 6), (5, 3, 50)):
        expected = torch.nn.functional.interpolate(volume[None], shape, mode="trilinear")[0]
        np.testing.assert_allclose(data.resize(volume, shape), expected, atol=1e-5)
    assert data.resize(volume, (4, 3, 5)) is volume
    large = torch.arange(1000.0).view(1, 1000, 1, 1)  # sizes that are nearly alike
    np.testing.assert_allclose(data.resize(large, (1001, 1, 1))[0, 1:-1, 0, 0],
                               (np.arange(1, 1000) + 0.5) * 1000 / 1001 - 0.5, rtol=1e-6)


def test_a_coarser_label_is_the_majority():
    label = torch.tensor([0, 0, 3, 3, 3, 7, 7, 1, 7], dtype=torch.uint8).view(9, 1, 1)
    assert data.resize_label(label, (3, 1, 1), 8).flatten().tolist() == [0, 3, 7]
    assert data.resize_label(label, (4, 1, 1), 8).dtype == torch.uint8
    assert data.resize_label(label, (9, 1, 1), 8) is label
    assert data.resize_label(label, (18, 2, 1), 8)[::2, 0, 0].tolist() == label.flatten().tolist()


# ---- layouts ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layout, counts, channels, classes", [
    (nnunet, (6, 3, 2), 1, ["background", "organ"]),
    (lambda root: nnunet(root, channels=2, classes=3), (6, 3, 2), 2, ["background", "organ", "tumor"]),
    (decathlon, (6, 0, 2), 1, ["background", "organ", "tumor"]),
    (lambda root: decathlon(root, channels=2), (6, 0, 2), 2, ["background", "organ", "tumor"]),
    (atrium, (4, 1, 2), 1, ["background", "left atrium"]),
], ids=["nnunet", "nnunet-2-channels", "decathlon", "decathlon-4d", "atrium"])
def test_layouts(tmp_path, layout, counts, channels, classes):
    found = get(layout(tmp_path))
    assert (len(found.labeled), len(found.unlabeled), len(found.test)) == counts
    assert found.channels == channels and found.classes == classes
    assert all(case.image.shape == (channels, *SHAPE) for case in found.labeled + found.unlabeled + found.test)
    assert all(case.label.shape == SHAPE for case in found.labeled)
    assert all(case.label is None for case in found.unlabeled)
    assert check(tmp_path)[0] == []


def test_voxels_labels_and_geometry_arrive(tmp_path):
    found = get(nnunet(tmp_path, channels=2), normalize="none")
    case = next(case for case in found.labeled if case.name == "case3")
    np.testing.assert_array_equal(case.volume(), np.stack([scan([3, 0]), scan([3, 1])]))
    np.testing.assert_array_equal(case.label, mask(3))
    assert case.spacing == (1.0, 2.0, 3.0)
    np.testing.assert_array_equal(case.affine, np.diag([1, 2, 3, 1]))
    spec(tmp_path, labels={"tumor": 2, "background": 0, "organ": 1})
    assert get(tmp_path).classes == ["background", "organ", "tumor"]


def test_h5_keeps_the_list_order_and_is_normalized_again_only_where_asked_to(tmp_path):
    found = get(atrium(tmp_path), labeled=2)
    assert names(found.labeled) == ["ID6", "ID5"] and names(found.unlabeled) == ["ID4", "ID3", "ID2"]
    np.testing.assert_array_equal(found.labeled[0].volume()[0], scan(0).astype(np.float32) / 50 + 0.25)
    np.testing.assert_array_equal(found.labeled[0].label, mask(0))
    assert [case.label is None for case in found.unlabeled] == [False, False, True]  # transductive, then bare
    assert found.labeled[0].spacing == (0.625, 0.625, 0.625) and (found.labeled[0].affine == np.eye(4)).all()
    again = get(tmp_path, labeled=2, normalize="zscore-crop").labeled[0].volume()[0]
    np.testing.assert_allclose(again, (scan(0) - scan(0).mean()) / scan(0).std(), atol=1e-5)


def test_labeled_sets_are_nested_and_the_holdout_stays(tmp_path):
    nnunet(tmp_path, labeled=10)
    smaller, held = set(), None
    for labeled in (0.1, 2, 0.5, 7, 1.0):
        found = get(tmp_path, labeled, holdout=0.2)
        few, test = set(names(found.labeled)), names(found.test)
        assert smaller <= few and len(few) == (labeled if labeled > 1 else int(labeled * 8 + 0.5))
        assert held in (None, test) and len(test) == 2 + 2
        assert len(few | set(names(found.unlabeled)) | set(test)) == 15 == len(few) + len(found.unlabeled) + len(test)
        smaller, held = few, test
    assert names(get(tmp_path, 3).labeled) == ["case7", "case4", "case1"]  # must not move: kept runs are compared by it
    found = get(tmp_path, 0.5, holdout=0.45)  # halves are rounded up
    assert (len(found.labeled), len(found.test)) == (3, 2 + 5)


def test_macos_litter_is_ignored_and_plain_nii_is_read(tmp_path):
    nnunet(tmp_path)
    (tmp_path / "imagesTr" / "._case0_0000.nii.gz").write_bytes(b"litter")
    packed = tmp_path / "imagesTr" / "case1_0000.nii.gz"
    packed.write_bytes(gzip.decompress(packed.read_bytes()))  # plain by content
    assert len(get(tmp_path).labeled) == 6


def test_an_all_zero_label_is_a_real_negative_however_well_it_packs(tmp_path):
    nnunet(tmp_path)
    save(tmp_path / "imagesTr" / "case0_0000.nii.gz", scan(0, (150, 150, 150)))
    save(tmp_path / "labelsTr" / "case0.nii.gz", np.zeros((150, 150, 150), np.uint8))
    assert [int(case.label.sum()) for case in get(tmp_path).labeled if case.name == "case0"] == [0]


def test_scaled_integers_keep_their_scale(tmp_path):
    image = nib.Nifti1Image(scan(0), np.eye(4))
    image.header.set_slope_inter(0.5, -10)
    nib.save(image, tmp_path / "x.nii.gz")
    np.testing.assert_allclose(read_nifti(tmp_path / "x.nii.gz")[0], nib.load(tmp_path / "x.nii.gz").get_fdata())


def test_phantom_is_always_the_same_and_worth_training_on():
    one, two = phantom(2), phantom(3)
    assert all(torch.equal(a.image, b.image) and torch.equal(a.label, b.label) for a, b in zip(one, two, strict=False))
    assert all(0.01 < (case.label > 0).float().mean() < 0.2 for case in two)
    assert [int(case.label.sum()) for case in two] == pytest.approx([1566, 2854, 1740], rel=0.02)
    bright = [case.volume()[0][case.label > 0].mean().item() for case in two]
    assert bright == pytest.approx([1.461, 1.771, 0.975], rel=0.02)
    assert load("phantom", "", 0.2, 0.0, "window", (0, 100)).labeled[0].volume().amax() == 1
    found = load("phantom", "", 0.2, 0.0, "zscore", (0, 1))
    assert len({*names(found.labeled + found.unlabeled + found.test)}) == 28
    assert (len(found.labeled), len(found.unlabeled), len(found.test)) == (4, 16, 8)


def test_real_hippocampus():
    if not (SHARED / "hippocampus").is_dir():
        pytest.skip("hippocampus is not in RECIPROCAL_SHARED")
    found = load("hippocampus", str(SHARED / "hippocampus"), 0.05, 0.2, "zscore", (0, 1))
    assert (len(found.labeled), len(found.unlabeled), len(found.test)) == (8, 152, 60 + 40)
    assert found.classes == ["background", "Anterior", "Posterior"]
    assert abs(found.labeled[0].volume().mean()) < 1e-4 and found.labeled[0].label.max() == 2


def test_every_recipe_is_a_config():
    """No recipe names a field that does not exist, or leaves out what another data set's recipe decides."""
    for recipe in data.RECIPES.values():
        assert Config(**recipe).check() and recipe.keys() >= data.RECIPES["la"].keys()
    assert data.SOURCES.keys() == data.RECIPES.keys() - {"phantom", "folder"}


def test_recipes_are_those_of_the_kept_runs_and_of_the_literature():
    for run in "hippocampus-0.05/reciprocal-mixed-seed1", "la-coarse-dropout/mt-seed1337":
        kept = json.loads((Path(__file__).parents[1] / "results" / run / "summary.json").read_text())["config"]
        recipe = json.loads(json.dumps(data.RECIPES[kept["data"]]))
        assert {key: kept[key] for key in recipe} == recipe

    def beyond(name, other):
        return {key: value for key, value in data.RECIPES[name].items() if value != data.RECIPES[other][key]}

    assert beyond("pancreas", "la") == dict(
        patch=(96, 96, 96), stride=(16, 16, 16), batch_l=4, batch_u=5, dropout=False, optimizer="adam", lr=1e-3,
        iterations=20000, pretrain=4000, seed=1124, augment="none", noise=0.05, normalize="window", voxel=(1, 1, 1))
    assert beyond("la", "la-coarse") == dict(
        patch=(112, 112, 80), stride=(18, 18, 4), depth=4, schedule="step", iterations=6000, pretrain=6000,
        voxel=(0, 0, 0), normalize="zscore", holdout=0)


# ---- bad input ----------------------------------------------------------------------------------------------

def header(**fields):
    """Spoil fields of the header of an uncompressed, then gzipped NIfTI file."""
    def spoil(path):
        head = nib.Nifti1Header(gzip.decompress(path.read_bytes())[:348], check=False)
        rest = gzip.decompress(path.read_bytes())[348:]
        for key, value in fields.items():
            head[key] = value
        path.write_bytes(gzip.compress(head.binaryblock + rest))
    return spoil


def content(change, plain=False):
    """Change the bytes of a file, or of what is packed in it."""
    return lambda path: path.write_bytes(change(path.read_bytes()) if not plain
                                         else gzip.compress(change(gzip.decompress(path.read_bytes()))))


def voxels(change, dtype=np.float32):
    def spoil(path):
        array = np.asanyarray(nib.load(path).dataobj).astype(dtype)
        save(path, change(array))
    return spoil


def put(value):
    def change(array):
        array[2, 3, 4] = value
        return array
    return change


IMAGE = {
    "missing": lambda path: path.rename(path.with_name("case8_0001.nii.gz")),
    "0-byte": content(lambda raw: b""),
    "html": content(lambda raw: b"<!DOCTYPE html><html>" + b"not found " * 100),
    "truncated-gzip": content(lambda raw: raw[: len(raw) // 2]),
    "gzip-checksum": content(lambda raw: raw[:-8] + bytes([raw[-8] ^ 1]) + raw[-7:]),
    "gzip-content": content(lambda raw: raw[:200] + bytes([raw[200] ^ 255]) + raw[201:]),
    "truncated-voxels": content(lambda raw: raw[:-20], plain=True),
    "huge": header(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]),
    "bomb": content(lambda raw: raw + bytes(2**22), plain=True),
    "zero-dimension": header(dim=[3, 9, 0, 7, 1, 1, 1, 1]),
    "negative-dimension": header(dim=[3, 9, -8, 7, 1, 1, 1, 1]),
    "nan-affine": header(srow_x=[np.nan, 0, 0, 0]),
    "singular-affine": header(srow_x=[0, 0, 0, 0]),
    "unknown-type": header(datatype=77),
    "complex": voxels(lambda a: a, np.complex64),
    "rgb": header(datatype=128, bitpix=24),
    "2d": voxels(lambda a: a[:, :, 0]),
    "4d": voxels(lambda a: np.stack([a, a + 1], -1)),
    "nan": voxels(put(np.nan)),
    "infinite": voxels(put(np.inf)),
    "constant": voxels(lambda a: np.full_like(a, 0.1)),
}
LABEL = {
    "shape": voxels(lambda a: a[1:], np.uint8),
    "affine": lambda path: save(path, mask(0), np.eye(4)),
    "origin": lambda path: save(path, mask(0), np.diag([1.0, 2.0, 3.0, 1.0]) + 9 * np.eye(4, k=3)),
    "fractional": voxels(put(0.5)),
    "undeclared": voxels(put(2)),
    "negative": voxels(put(-1)),
    "255": voxels(put(255), np.uint8),
    "not-finite": voxels(put(np.nan)),
}


@pytest.mark.parametrize("spoil, file", [
    *(pytest.param(spoil, "imagesTr/case8_0000.nii.gz", id=f"image-{key}") for key, spoil in IMAGE.items()),
    *(pytest.param(spoil, "labelsTr/case5.nii.gz", id=f"label-{key}") for key, spoil in LABEL.items()),
])
def test_a_bad_file_gets_one_line_that_names_it(tmp_path, spoil, file):
    nnunet(tmp_path)
    spoil(tmp_path / file)
    with pytest.raises(BadInput, match=Path(file).name.split("_")[0].split(".")[0]) as told:
        get(tmp_path)
    assert "\n" not in str(told.value) and "Error(" not in str(told.value)


def spec(root, **changes):
    content = json.loads((root / "dataset.json").read_text()) | changes
    (root / "dataset.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def copy(source, target):
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(source.read_bytes())


@pytest.mark.parametrize("spoil, told", [
    (lambda root: (root / "dataset.json").unlink(), "neither train.list"),
    (lambda root: (root / "dataset.json").write_text("{"), "dataset.json: invalid"),
    (lambda root: (root / "dataset.json").write_text("[]"), "dataset.json: invalid"),
    (lambda root: spec(root, channel_names=None), "dataset.json: invalid"),
    (lambda root: spec(root, labels=None), "dataset.json: invalid"),
    (lambda root: spec(root, labels={"background": 0, "organ": 2}), "without a gap"),
    (lambda root: spec(root, labels={"background": 0, "region": [1, 2]}), "dataset.json: invalid"),
    (lambda root: spec(root, labels={"background": 0, "ignore": 1}), "ignore"),
    (lambda root: spec(root, labels={"0": "background", "1": "organ", "2": "organ"}), "no two alike"),
    (lambda root: spec(root, channel_names={"0": "T1", "1": "T2"}), "1 channels, 2 declared"),
    (lambda root: save(root / "labelsTr" / "nobody.nii.gz", mask(0)), "nobody.nii.gz: label without an image"),
    (lambda root: save(root / "labelsTr" / "case0.nii", mask(0)), "case0.nii: label without an image, or of a case"),
    (lambda root: save(root / "imagesTr" / "case0_0000.nii", scan(99)), "duplicate"),
    (lambda root: save(root / "imagesTr" / "case0_0002.nii.gz", scan(99)), "add the channel"),
    (lambda root: save(root / "imagesTs" / "case0_0000.nii.gz", scan(99)), "cases case0 and case0"),
    (lambda root: copy(root / "imagesTr" / "case0_0000.nii.gz", root / "imagesTs" / "new_0000.nii.gz"), "and new"),
    (lambda root: [path.unlink() for path in (root / "labelsTr").iterdir()], "no labeled training case"),
    (lambda root: [path.unlink() for path in root.rglob("*.nii.gz")], "no labeled training case"),
])
def test_a_bad_folder_gets_one_line(tmp_path, spoil, told):
    nnunet(tmp_path)
    spoil(tmp_path)
    with pytest.raises(BadInput, match=told) as error:
        get(tmp_path)
    assert "\n" not in str(error.value)
    assert any(told in line for line in check(tmp_path)[0])


def h5(path, **content):
    with h5py.File(path, "w") as file:
        file.update(content)


@pytest.mark.parametrize("spoil, told", [
    (lambda path: h5(path, image=scan(0), label=mask(0) * 255), "ID6/mri_norm2.h5: label 255 .* divide by 255"),
    (lambda path: h5(path, image=scan(0), label=mask(0)[1:]), "shape"),
    (lambda path: h5(path, label=mask(0)), "no readable h5"),
    (lambda path: path.write_bytes(b"not h5"), "no readable h5"),
    (lambda path: path.unlink(), "no readable h5"),
    (lambda path: (path.parents[2] / "test.list").write_text("ID6"), "cases ID6 and ID6"),
])
def test_a_bad_h5_case_gets_one_line(tmp_path, spoil, told):
    spoil(atrium(tmp_path) / "2018LA_Seg_Training Set" / "ID6" / "mri_norm2.h5")
    with pytest.raises(BadInput, match=told) as error:
        get(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("labeled, holdout", [(0, 0), (-1, 0), (0.01, 0), (7, 0), (2.5, 0), (6, 0.2), (np.nan, 0),
                                              (np.inf, 0), (1.0, 1.0), (1.0, -0.1), (1.0, 1.5)])
def test_an_impossible_share_gets_one_line(tmp_path, labeled, holdout):
    with pytest.raises(BadInput, match="--labeled"):
        get(nnunet(tmp_path), labeled, holdout)


def test_missing_data_tells_where_to_get_it(tmp_path):
    with pytest.raises(BadInput, match="UA-MT.*--data phantom"):
        load("la", str(tmp_path / "nowhere"), 1.0, 0.0, "zscore", (0, 1))
    with pytest.raises(BadInput, match="no such folder"):
        get(tmp_path / "nowhere")


def test_check_lists_every_fault_in_one_pass(tmp_path):
    """Each kind of bad file in a case of its own, and what is wrong with the folder: a line each."""
    spoiled = [(spoil, "imagesTr/case{}_0000.nii.gz") for key, spoil in IMAGE.items() if key != "missing"]
    spoiled += [(spoil, "labelsTr/case{}.nii.gz") for spoil in LABEL.values()]
    n = len(spoiled)
    nnunet(tmp_path, labeled=n + 6, unlabeled=1, test=1)
    told = []
    for i, (spoil, file) in enumerate(spoiled):
        spoil(tmp_path / file.format(i))
        told.append(Path(file.format(i)).name)
    image = (tmp_path / "imagesTr").joinpath
    image(f"case{n}_0000.nii.gz").rename(image(f"case{n}_0001.nii.gz"))
    copy(image(f"case{n + 1}_0000.nii.gz"), image(f"case{n + 1}_0000.nii"))
    copy(image(f"case{n + 2}_0000.nii.gz"), image(f"case{n + 3}_0000.nii.gz"))
    save(tmp_path / "imagesTs" / f"case{n + 4}_0000.nii.gz", scan(999))
    save(tmp_path / "labelsTr" / "nobody.nii.gz", mask(0))
    spec(tmp_path, numTraining=77)
    told += [f"case{n}_0001", f"case{n + 1}_0000.nii", f"case{n + 2} and case{n + 3}|case{n + 3} and case{n + 2}",
             f"case{n + 4} and case{n + 4}", "nobody", "numTraining"]
    faults, summary = check(tmp_path)
    for text in told:
        assert sum(bool(re.search(text, line)) for line in faults) == 1, text
    assert len(faults) == len(told) > 30 and all(line.isprintable() for line in faults)
    assert "labeled 4, unlabeled 1, test 2" in summary


def test_a_wrong_count_in_dataset_json_does_not_forbid_training(tmp_path):
    spec(nnunet(tmp_path), numTraining=77)
    assert len(get(tmp_path).labeled) == 6


def test_the_command_prints_faults_and_exits_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data.py", "check", str(nnunet(tmp_path))])
    assert data.main() == 0 and "labeled 6, unlabeled 3, test 2" in capsys.readouterr().out
    IMAGE["nan"](tmp_path / "imagesTr" / "case0_0000.nii.gz")
    assert data.main() == 2 and "case0_0000" in capsys.readouterr().out


# ---- prediction's side ----------------------------------------------------------------------------------------

def test_a_label_is_written_whole_or_not_at_all(tmp_path):
    affine = np.array([[0, -2, 0, 5], [1, 0, 0, -7], [0, 0, 3, 1], [0, 0, 0, 1.0]])
    for name in ("x.nii.gz", "x.nii"):
        write_label(tmp_path / name, torch.from_numpy(mask(0)), affine)
        label, spacing, found = read_nifti(tmp_path / name)
        np.testing.assert_array_equal(label, mask(0))
        np.testing.assert_array_equal(found, affine)
        assert spacing == (1, 2, 3) and label.dtype == np.uint8
    before = (tmp_path / "x.nii").read_bytes()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(BadInput, match="x.nii: cannot be written"):
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        write_label(tmp_path / "x.nii", mask(1), affine)
    assert (tmp_path / "x.nii").read_bytes() == before and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(BadInput, match="cannot be written"):
        write_label(tmp_path / "nowhere" / "x.nii.gz", mask(0), affine)


def test_images_are_found_by_file_and_by_folder(tmp_path):
    for name in ("a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii", "b_0001.nii", "._a_0000.nii.gz", "notes.txt"):
        save(tmp_path / name, scan(0)) if ".nii" in name else (tmp_path / name).touch()
    a, b = [tmp_path / "a_0000.nii.gz", tmp_path / "a_0001.nii.gz"], [tmp_path / "b_0000.nii", tmp_path / "b_0001.nii"]
    assert find_images(tmp_path) == {"a": a, "b": b}
    assert find_images(a[0]) == find_images(str(a[1])) == {"a": a}
    plain = save(tmp_path / "plain" / "case_0012.nii.gz", scan(0))
    assert find_images(plain) == find_images(plain.parent) == {"case_0012": [plain]}
    for nothing in (tmp_path / "notes.txt", tmp_path / "nowhere", tmp_path / "nowhere.nii.gz"):
        with pytest.raises(BadInput, match="no .nii"):
            find_images(nothing)


def test_a_case_without_a_label_is_read_and_normalized(tmp_path):
    case = read_case("a", [save(tmp_path / "a.nii.gz", scan(0))], None, ["background", "organ"], "zscore", (0, 1))
    assert case.label is None and abs(case.volume().mean()) < 1e-5 and abs(case.volume().std() - 1) < 1e-2
    channels = [save(tmp_path / "b_0000.nii.gz", scan(0)), save(tmp_path / "b_0001.nii.gz", scan(1, (9, 8, 6)))]
    with pytest.raises(BadInput, match="b_0001"):
        read_case("b", channels, None, ["background", "organ"], "zscore", (0, 1))


def test_the_decathlon_may_number_its_cases_with_four_digits(tmp_path):
    decathlon(tmp_path)
    for path in list(tmp_path.rglob("*.nii.gz")):
        path.rename(path.with_name(path.name.replace("_", "_0")))
    assert len(get(tmp_path).labeled) == 6


def test_pad_is_centered():
    assert data.pad(torch.ones(1, 2, 3, 9), (5, 3, 4))[0, :, 0, 0].tolist() == [0, 1, 1, 0, 0]
