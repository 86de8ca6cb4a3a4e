"""The pictures: learning curves of a run, overlays of its predictions, differences between methods."""

import io
import itertools
import json
import textwrap
from pathlib import Path

import numpy as np


def read_log(path: Path) -> list[tuple[str, list[dict]]]:
    """The lines of log.jsonl, stage by stage."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(stage, list(group)) for stage, group in itertools.groupby(lines, lambda line: line["stage"])]


def curves(log: Path, title: str) -> bytes:
    """A PNG of the losses, the feedback h and the Dice of a few scored cases, over all stages of a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stages = read_log(log)
    panels = 3 if any(line.get("feedback") for _, lines in stages for line in lines) else 2
    figure, axes = plt.subplots(panels, 1, figsize=(9, 2.7 * panels), sharex=True, constrained_layout=True)
    losses, feedback, dice = axes[0], axes[1], axes[-1]
    begin, colors, dice_curves = 0, {}, {}
    for number, (stage, lines) in enumerate(stages):
        steps = [line for line in lines if "dice" not in line]
        x = begin + np.array([line["iteration"] for line in steps])
        for name in [key for key in steps[0] if key.startswith("loss")]:
            y = np.array([line[name] for line in steps])
            color = colors.setdefault(name, f"C{len(colors)}")
            width = max(1, len(y) // 50)
            losses.plot(x, y, color=color, alpha=0.2, lw=0.5)
            losses.plot(x[width - 1 :], np.convolve(y, np.ones(width) / width, "valid"), color=color, label=name)
        if panels == 3 and "feedback" in steps[0]:
            feedback.plot(x, [line["feedback"] for line in steps], "k.", ms=2)
            feedback.set_ylim(np.array([-1.1, 1.1]) * np.percentile([abs(line["feedback"]) for line in steps], 99))
        for line in lines:
            for name, value in line.get("dice", {}).items():
                dice_curves.setdefault((name, stage), []).append((begin + line["iteration"], 100 * value))
        for axis in axes:
            axis.axvline(begin, color="0.8", lw=0.8)
        row = 1.01 + 0.06 * (number % 2)  # a name may be longer than its stage
        losses.annotate(stage, (begin, row), xycoords=("data", "axes fraction"), fontsize=8)
        begin = x[-1]
    for (name, _), points in dice_curves.items():
        dice.plot(*zip(*points, strict=True), ".-", color={"student": "C0", "teacher": "C1"}[name], label=name)
    losses.set(ylabel="loss")
    if panels == 3:
        feedback.set(ylabel="feedback h")
        feedback.axhline(0, color="0.8", lw=0.8)
    dice.set(ylabel="Dice % of scored cases", xlabel="iteration")
    for axis in (losses, dice):
        handles = dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
        if handles:
            axis.legend(handles.values(), handles.keys(), fontsize=8)
    figure.suptitle(title, fontsize=10)
    return png(figure)


def overlay(panels: list[tuple], classes: list[str], title: str) -> bytes:
    """A PNG of some cases, in rows, and the three planes in columns, each where the label is largest. A panel is (set,
    Dice or NaN, case, prediction (D, H, W)); the label's contours are solid, the prediction's dashed, a color for each
    of the classes, which are named background first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = [plt.cm.tab10.colors[value % 10] for value in range(len(classes))]
    figure, axes = plt.subplots(len(panels), 3, figsize=(9, 3.1 * len(panels)), squeeze=False, constrained_layout=True)
    for row, (name, dice, case, prediction) in zip(axes, panels, strict=True):
        image = case.volume()[0].numpy()
        masks = [prediction] if case.label is None else [case.label.numpy(), prediction]
        shown = masks[0] if masks[0].any() else prediction
        low, high = np.percentile(image, (1, 99))
        score = f"Dice {100 * dice:.1f}" if dice == dice else "no label" if case.label is None else "nothing to find"
        text = f"{case.name}, {name}, {score}\n"
        for plane, axis in enumerate(row):
            others = tuple(i for i in range(3) if i != plane)
            index = int((shown > 0).sum(others).argmax()) if shown.any() else image.shape[plane] // 2
            axis.imshow(image.take(index, plane).T, cmap="gray", vmin=low, vmax=high, origin="lower",
                        aspect=case.spacing[others[1]] / case.spacing[others[0]])
            for mask, style in zip(masks[::-1], ("dashed", "solid"), strict=False):
                cut = mask.take(index, plane).T
                for value in np.unique(cut[cut > 0]) if min(cut.shape) > 1 else ():  # a line has no contour
                    axis.contour(cut == value, [0.5], colors=[colors[value]], linestyles=style,
                                 linewidths=1.2)
            axis.set_axis_off()
            axis.set_title(f"{text * (plane == 0)}axis {plane}, slice {index}", fontsize=8, loc="left")
    figure.suptitle(f"{title}\nlabel solid, prediction dashed", fontsize=10)
    figure.legend([plt.Line2D([], [], color=color) for color in colors[1:]], classes[1:], ncols=6, fontsize=8,
                  loc="outside lower center")
    return png(figure)


def paired(methods: dict[str, tuple[np.ndarray, dict]], reference: str, title: str) -> bytes:
    """A PNG with a column for each method: its cases' differences in Dice to `reference`, fractions (N,), a dot each,
    and beside them their mean with its interval (keys mean, low and high)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(max(7, 1.5 + 1.7 * len(methods)), 5), constrained_layout=True)
    axis.set_yscale("symlog", linthresh=5, linscale=1.5)  # one method far off must not flatten all others
    axis.axhline(0, color="0.4", lw=1)
    for x, (values, interval) in enumerate(methods.values()):
        jitter = np.arange(len(values)) * 0.618034 % 1 - 0.5  # the golden ratio keeps neighbors in rank apart
        axis.plot(x - 0.06 + 0.4 * jitter, 100 * np.sort(values), "o", color=f"C{x % 10}", ms=5, mew=0, alpha=0.5)
        mean, low, high = (100 * interval[key] for key in ("mean", "low", "high"))
        axis.errorbar(x + 0.28, mean, [[mean - low], [high - mean]], fmt="D", color="k", ms=5, capsize=4, lw=1.5)
        axis.annotate(f"{mean:+z.1f}", (x + 0.34, mean), va="center", fontsize=9,
                      bbox=dict(facecolor="w", edgecolor="none", pad=1))  # the zero line ends before it
    names = ["\n".join(textwrap.fill(part, 22) for part in name.split(", ")) for name in methods]
    axis.set_xticks(range(len(methods)), names, fontsize=9)
    axis.set(xlim=(-0.5, len(methods) - 0.3), ylabel=f"Dice minus that of\n{reference}, points")
    bottom, top = axis.get_ylim()
    ticks = [tick for tick in (-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50) if bottom <= tick <= top]
    axis.set_yticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    axis.minorticks_off()
    axis.grid(axis="y", color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    legend = "a dot is a case; diamonds: mean and 95% interval; logarithmic beyond 5 points"
    axis.set_title(f"{title}\n{legend}", fontsize=10)
    return png(figure)


def png(figure) -> bytes:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    return buffer.getvalue()
