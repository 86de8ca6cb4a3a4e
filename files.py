"""Volumes in files, NIfTI and h5: read with no trust in what a header claims, written whole."""

import gzip
import math
import os
import zlib
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np

from cli import BadInput, write


def read_nifti(path: str | Path) -> tuple[np.ndarray, tuple[float, float, float], np.ndarray]:
    """Array (3D, or 4D with channels last), spacing in mm, affine (4, 4).

    The header is judged before a voxel is read or allocated, and a gzip stream is read to its end, where the
    checksum is; BadInput on any trouble. A plain .nii named .nii.gz is read as well.
    """
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(path, "rb") as stream, np.errstate(all="ignore"):  # judged below
            block = stream.read(540)
            kinds = [k for k in (nib.Nifti1Header, nib.Nifti2Header) if k.may_contain_header(block)]
            if not kinds:
                raise ValueError("not a NIfTI file" if block else "empty file")
            header = kinds[0](block[: kinds[0].sizeof_hdr], check=False)
            if int(header["datatype"]) not in nib.nifti1.data_type_codes:
                raise ValueError(f"unknown datatype {header['datatype']}")
            shape, dtype, affine = header.get_data_shape(), header.get_data_dtype(), header.get_best_affine()
            spacing = nib.affines.voxel_sizes(affine)
            if dtype.kind not in "iuf":
                raise ValueError(f"voxels of type {dtype}, not integers or floats")
            if len(shape) not in (3, 4) or min(shape) < 1:
                raise ValueError(f"shape {shape}, not three axes or four with the channels last")
            if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) <= 1e-6 * spacing.prod():
                raise ValueError("singular or non-finite affine")
            claim = header.get_data_offset() + math.prod(shape) * dtype.itemsize
            most = os.path.getsize(path) * (1032 if packed else 1)  # the best that deflate can do
            if claim > most or math.prod(shape) > 2**31:
                raise ValueError(f"its header claims {shape} voxels, more than it can hold")
            array = header.data_from_fileobj(stream)
            if len(stream.read(2**20)) == 2**20:
                raise ValueError(f"it goes on long after the {shape} voxels of its header")
    except (OSError, EOFError, zlib.error, ValueError, OverflowError, nib.spatialimages.HeaderDataError) as error:
        raise BadInput(f"{path}: {str(error).splitlines()[0]}; copy or convert the file again") from None
    return array, tuple(spacing.tolist()), affine


def read_h5(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        with h5py.File(path) as file:
            image, label = file["image"][()], file["label"][()] if "label" in file else None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: no readable h5 file with an 'image' ({error}); copy it again") from None
    if image.dtype.kind not in "iuf" or not image.size:
        raise BadInput(f"{path}: its image is empty or not of numbers; copy it again")
    if image.ndim != 3 or label is not None and label.shape != image.shape:
        raise BadInput(f"{path}: image or label of another shape than the image's three axes, {image.shape}")
    return image[None], label


def write_label(path: str | Path, label, affine: np.ndarray) -> None:
    """uint8 NIfTI with the given affine; atomic like every `write`."""
    content = nib.Nifti1Image(np.asarray(label, dtype=np.uint8), affine).to_bytes()
    write(Path(path), gzip.compress(content, 6, mtime=0) if str(path).endswith(".gz") else content)
