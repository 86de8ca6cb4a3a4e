"""The embedded data set: synthetic scans that need no download, and that few labels do not explain."""

import numpy as np
from scipy.ndimage import gaussian_filter


def scan(i: int) -> tuple[str, np.ndarray, np.ndarray]:
    """Name, image (D, H, W) uint8 and label (D, H, W) bool of the i-th scan: an organ of two warped ellipsoids among
    distractors of its intensity, under a bias field and noise."""
    rng = np.random.default_rng([2023, i])
    shape = rng.integers((38, 38, 34), (45, 45, 41))
    fields = [gaussian_filter(rng.standard_normal(shape), sigma) for sigma in (5, 5, 5, 3, 12)]
    *warp, texture, bias = (f / f.std() for f in fields)
    grid = np.stack(np.indices(shape), -1) / shape * 2 - 1 + 0.1 * np.stack(warp, -1)  # (D, H, W, 3)
    centers, radii = rng.uniform(-0.9, 0.9, (8, 3)), rng.uniform(0.12, 0.28, (8, 3))
    centers[0], radii[0] = rng.uniform(-0.25, 0.25, 3), rng.uniform(0.3, 0.45, 3)
    centers[1], radii[1] = centers[0] + rng.uniform(-0.35, 0.35, 3), rng.uniform(0.2, 0.35, 3)
    first, second, *others = ((((grid - c) / r) ** 2).sum(-1) < 1 for c, r in zip(centers, radii, strict=True))
    image, label = 80 + 12 * texture, first | second
    for other in others:
        image[other] = rng.uniform(105, 150)
    image[label] = 125
    image = gaussian_filter(image, 0.7) * (1 + 0.15 * bias) + 14 * rng.standard_normal(shape)
    return f"phantom_{i:02d}", image.clip(0, 255).round().astype(np.uint8), label
