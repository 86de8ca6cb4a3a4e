"""What bench.py measures against: the reciprocal step, the sliding window, the loss and the surface distances as the
authors' code, the literature and other libraries compute them."""

import copy
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage


def authors_step(nets, optimizers, batch, cfg) -> dict:
    """The step as the authors' code performs it: four forward and four backward passes, the teacher's losses one
    backward each, every set of gradients copied."""
    (teacher, student), (t_optimizer, s_optimizer) = nets, optimizers

    def gradients(net, loss, retain=False):
        net.zero_grad()
        loss.backward(retain_graph=retain)
        return copy.deepcopy([p.grad for p in net.parameters()])

    t_logits_u = teacher(batch["x_u"])
    pseudo_label = t_logits_u.detach().argmax(1)
    g_u = gradients(student, F.cross_entropy(student(batch["x_u"]), pseudo_label))
    s_optimizer.step()
    g_l = gradients(student, F.cross_entropy(student(batch["x_l"]), batch["y_l"].long()))
    h = cfg.lr * sum((u * v).sum() for u, v in zip(g_u, g_l, strict=True))
    g_t = gradients(teacher, F.cross_entropy(teacher(batch["x_l"]), batch["y_l"].long()))
    g_h = gradients(teacher, h * F.cross_entropy(t_logits_u, pseudo_label))
    for p, one, other in zip(teacher.parameters(), g_t, g_h, strict=True):
        p.grad = one + other
    t_optimizer.step()
    return {"feedback": h}


def authors_segment(net, image: np.ndarray, patch, stride) -> np.ndarray:
    """Class probabilities as the authors' code makes them: a window at a time, the sums in NumPy on the host."""
    total, visits = np.zeros((net.classes, *image.shape[1:]), np.float32), np.zeros(image.shape[1:], np.float32)
    starts = [[min(i * s, n - p) for i in range(math.ceil((n - p) / s) + 1)]
              for n, p, s in zip(visits.shape, patch, stride, strict=True)]
    for corner in itertools.product(*starts):
        box = (..., *(slice(a, a + p) for a, p in zip(corner, patch, strict=True)))
        with torch.no_grad():
            logits = net(torch.from_numpy(image[box][None]).to(net.head.weight.device))
        total[box] += logits.softmax(1)[0].cpu().numpy()
        visits[box] += 1
    return total / visits


@torch.no_grad()
def monai_segment(net, image: torch.Tensor, patch, stride, windows: int) -> np.ndarray:
    """MONAI's sliding windows: image (C, D, H, W) on the host to labels (D, H, W) there."""
    from monai.inferers import sliding_window_inference

    overlap = [1 - (s + 0.5) / p for s, p in zip(stride, patch, strict=True)]  # MONAI rounds the stride down
    x = image[None].to(net.head.weight.device)
    probs = sliding_window_inference(x, patch, windows, lambda x: net(x).softmax(1), overlap)
    return probs[0].argmax(0).cpu().numpy()


def eager_loss(logits, label):
    """Cross-entropy + Dice as the left-atrium literature writes them, a class at a time."""
    probs, dice = logits.softmax(1), 0
    for c in range(1, logits.shape[1]):
        p, t = probs[:, c], (label == c).float()
        dice += 1 - (2 * (p * t).sum() + 1e-5) / ((p * p).sum() + (t * t).sum() + 1e-5)
    return 0.5 * F.cross_entropy(logits, label.long()) + 0.5 * dice / (logits.shape[1] - 1)


def monai_loss(logits, label):
    """Not the same number: MONAI's Dice neither squares nor takes the batch as one."""
    from monai.losses import DiceCELoss

    loss = DiceCELoss(softmax=True, to_onehot_y=True, lambda_dice=0.5, lambda_ce=0.5)
    return loss(logits, label[:, None].long())


def by_medpy(prediction, label) -> dict:
    from medpy.metric import binary

    return dict(dice=binary.dc(prediction, label), jaccard=binary.jc(prediction, label),
                asd=binary.asd(prediction, label), hd95=binary.hd95(prediction, label))


def by_scipy(prediction, label) -> dict:
    """The definitions by SciPy's distance transform on the masks' common box."""
    box = ndimage.find_objects((prediction | label).astype(int))[0]
    masks = [np.pad(mask[box], 1) for mask in (prediction, label)]
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in masks]
    there, back = (ndimage.distance_transform_edt(~b)[a] for a, b in (surfaces, surfaces[::-1]))
    return dict(asd=there.mean(), hd95=np.percentile(np.concatenate([there, back]), 95))


def by_cupy(prediction: torch.Tensor, label: torch.Tensor) -> dict:
    import cupy
    from cupyx.scipy import ndimage as gpu

    surfaces = [mask & ~gpu.binary_erosion(mask) for mask in map(cupy.asarray, (prediction, label))]
    near = [gpu.distance_transform_edt(~b)[a] for a, b in (surfaces, surfaces[::-1])]
    return dict(asd=float(near[0].mean()), hd95=float(cupy.percentile(cupy.concatenate(near), 95)))


def by_distorch(prediction: torch.Tensor, label: torch.Tensor) -> dict:
    """Between the centers of voxels, as the others (by default it takes their corners), in float32. Its two 95th
    percentiles, one a direction, are no hd95."""
    from distorch.metrics import pixel_center_metrics

    found = pixel_center_metrics(prediction[None], label[None])
    return dict(asd=found.AverageSurfaceDistance_1_to_2.item())
