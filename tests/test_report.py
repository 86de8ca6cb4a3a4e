"""The pictures of a run show its log and its cases: what is drawn where, in which color, and how it is called."""

import json

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

import data
import report


@pytest.fixture
def figures(monkeypatch):
    """The figures instead of their files."""
    found = []
    monkeypatch.setattr(report, "png", lambda figure: found.append(figure) or b"")
    return found


def test_the_curves_are_those_of_the_log(figures, tmp_path):
    """Stages one after the other, of 1, 2 and 100 iterations: in the last a mean is of 2 values."""
    numbers = np.arange(1, 101)
    lines = [dict(stage=stage, iteration=i, loss_l=5.0 - i) for stage, i in (("start", 1), ("first", 1), ("first", 2))]
    lines += [dict(stage="first", iteration=2, dice=dict(teacher=0.5))]
    (tmp_path / "first.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for i in numbers.tolist():
        lines += [dict(stage="second", iteration=i, loss_u=2.0 * i, loss_l=200.0 - i, loss_exam=1.0,
                       feedback=-50.0 if i == 7 else i / 1000)]
        lines += [dict(stage="second", iteration=i, dice=dict(student=i / 200, teacher=i / 400))] if i % 50 == 0 else []
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("both", "first"):
        report.curves(tmp_path / f"{name}.jsonl", "title")
    losses, feedback, dice = figures[0].axes
    assert len(figures[1].axes) == 2 and figures[0].get_suptitle() == "title"

    means = [line for line in losses.lines if line.get_label().startswith("loss")]
    assert [(line.get_label(), line.get_color()) for line in means] == [
        ("loss_l", "C0"), ("loss_l", "C0"), ("loss_u", "C1"), ("loss_l", "C0"), ("loss_exam", "C2")]
    assert [line.get_xydata().tolist() for line in means[:2]] == [[[1, 4]], [[2, 4], [3, 3]]]
    raw = [line for line in losses.lines if len(line.get_xdata()) == 100]
    for each, mean, y in zip(raw, means[2:], (2.0 * numbers, 200.0 - numbers, np.ones(100)), strict=True):
        assert [*each.get_xdata()] == [*(3 + numbers)] and [*each.get_ydata()] == [*y]
        assert [*mean.get_xdata()] == [*(4 + numbers[:-1])] and [*mean.get_ydata()] == [*(y[:-1] + np.diff(y) / 2)]
    assert [(text.get_text(), text.xy[0]) for text in losses.texts] == [("start", 0), ("first", 1), ("second", 3)]

    dots = next(line for line in feedback.lines if len(line.get_xdata()) == 100)
    assert dots.get_xydata()[[0, 6]].tolist() == [[4, 0.001], [10, -50]]
    assert 0.1 < -feedback.get_ylim()[0] == feedback.get_ylim()[1] < 1  # one value far off flattens no others

    curves = {(line.get_label(), line.get_color(), str(line.get_xydata().tolist())) for line in dice.lines
              if not line.get_label().startswith("_")}
    assert curves == {("teacher", "C1", "[[3.0, 50.0]]"), ("student", "C0", "[[53.0, 25.0], [103.0, 50.0]]"),
                      ("teacher", "C1", "[[53.0, 12.5], [103.0, 25.0]]")}
    for axis, names in (losses, ["loss_l", "loss_u", "loss_exam"]), (dice, ["teacher", "student"]):
        legend, colors = axis.get_legend(), {line.get_label(): line.get_color() for line in axis.lines}
        assert [text.get_text() for text in legend.texts] == names
        assert [line.get_color() for line in legend.get_lines()] == [colors[name] for name in names]


def test_the_overlay_is_of_the_cases(figures):
    """A label that is largest elsewhere than its prediction; no label; an empty one, without and with a prediction."""
    label = np.zeros((12, 11, 10), np.uint8)
    label[3:7, 2:5, 1:4] = 1
    label[5, 2:8, 1:6] = 2
    label[2, 4, 2] = 1  # now slice 4 of axis 1 and slice 2 of axis 2 hold more than their neighbors
    image, predicted, none = torch.randn(2, *label.shape), np.roll(label, (1, 1, 1), (0, 1, 2)), np.zeros_like(label)
    rows = [(0.123, label, predicted, "a, test, Dice 12.3", (5, 4, 2)),
            (np.nan, None, predicted, "b, test, no label", (6, 5, 3)),
            (np.nan, none, none, "c, test, nothing to find", (6, 5, 5)),
            (0.0, none, predicted, "d, test, Dice 0.0", (6, 5, 3))]
    report.overlay([("test", dice, data.Case(score[0], image, None, None if mask is None else torch.from_numpy(mask),
                                             (1.0, 2.0, 6.0), np.eye(4)), prediction)
                    for dice, mask, prediction, score, _ in rows], ["background", "liver", "tumor"], "title")
    axes = iter(figures[0].axes)
    for _, mask, prediction, score, slices in rows:
        for plane, index in enumerate(slices):
            axis, expected, found = next(axes), [], []
            assert axis.get_title(loc="left") == f"{score}\n" * (plane == 0) + f"axis {plane}, slice {index}"
            np.testing.assert_array_equal(axis.images[0].get_array(), image[0].numpy().take(index, plane).T)
            assert axis.images[0].get_clim() == pytest.approx(np.percentile(image[0], (1, 99)))
            assert (axis.images[0].origin, axis.get_aspect()) == ("lower", (3, 6, 2)[plane])
            for drawn, dashed in (prediction, True), (none if mask is None else mask, False):
                cut = drawn.take(index, plane)
                for value in np.unique(cut[cut > 0]):
                    at = np.argwhere(cut == value)
                    expected.append((to_hex(f"C{value}"), dashed, *at.min(0) - 0.5, *at.max(0) + 0.5))
            for contour in axis.collections:
                at = np.concatenate([path.vertices for path in contour.get_paths()])
                dashed = contour.get_linestyle()[0][1] is not None
                found.append((to_hex(contour.get_edgecolor()[0]), dashed, *at.min(0), *at.max(0)))
            assert found == expected
    (legend,) = figures[0].legends
    assert [(text.get_text(), to_hex(line.get_color())) for text, line in
            zip(legend.texts, legend.get_lines(), strict=True)] == [("liver", to_hex("C1")), ("tumor", to_hex("C2"))]
