"""A run's folder: its checkpoints and log, and the rows beside its own in the final table."""

import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import data
import devices
import report
import stats
from cli import BadInput, make_folder, write, writing
from files import read_nifti

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second process out of a run there
    fcntl = None

PREDICTED = {"test": "predictions", "transductive": "transductive"}  # the folders of the sets


def new_run(config: dict) -> Path:
    """The folder of --out, which must not hold anything, or a new one in runs/."""
    name = f"{Path(config['data']).resolve().name}-{config['method']}-{config['labeled']:g}-seed{config['seed']}"
    numbered = (Path("runs", name + suffix) for suffix in ["", *(f"-{i}" for i in range(2, 1000))])
    run = Path(config["out"]) if config["out"] else next(path for path in numbered if not path.exists())
    if any(run.glob("[!.]*")):  # a hidden file: of a process that was killed before it wrote any other
        raise BadInput(f"--out {run}: in use; --resume {run} goes on with it, else remove it or choose another folder")
    make_folder(run)
    return run


@contextlib.contextmanager
def occupied(run: Path):
    """A run's folder for this process alone: the kernel gives it back when the process ends, however it ends. Who is
    stopped in here is told how to go on."""
    with writing(run / ".lock"):
        file = open(run / ".lock", "w")  # noqa: SIM115  closed below
    with file:
        try:
            if fcntl and devices.RANK == 0:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{run}: another process works in it; wait for its end or choose another folder") from None
        try:
            yield run
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"--resume {run} goes on") from None


@contextlib.contextmanager
def patience():
    """Ctrl-C and SIGTERM wait in the list that this yields, so that a step is done as a whole or not at all, and take
    effect at the end; a second one does not wait."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}  # they raise
    waiting = []

    def wait(number, _):
        signal.signal(number, handlers[number])
        waiting.append(number)

    try:
        for number in handlers:
            signal.signal(number, wait)
        yield waiting
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in waiting:
        handlers[number](number, None)


def describe(run: Path, config: dict, dataset: data.Dataset, device: torch.device) -> None:
    """config.json, cases.json (the split) and environment.json; BadInput if a resumed run finds another split."""
    cases = {name: [case.name for case in getattr(dataset, name)] for name in ("labeled", "unlabeled", "test")}
    before = run / "cases.json"
    if before.exists() and before.read_bytes() != json.dumps(cases, indent=1).encode():
        raise BadInput(f"{before}: the data set has other cases now; bring back those of this file, or start a new run")
    for name, content in (("config", config), ("cases", cases), ("environment", environment(device))):
        write(run / f"{name}.json", json.dumps(content, indent=1))


def environment(device: torch.device) -> dict:
    """What a number depends on besides the config: versions, hardware, commit, command."""
    here, commit = Path(__file__).parent, ""
    if shutil.which("git") and (here / ".git").exists():
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(describe, cwd=here, text=True, capture_output=True, check=False).stdout.strip()
    return dict(commit=commit, command=" ".join(sys.argv), python=platform.python_version(), torch=torch.__version__,
                triton=getattr(sys.modules.get("triton"), "__version__", None), cudnn=torch.backends.cudnn.version(),
                numpy=np.__version__, platform=platform.platform(), threads=torch.get_num_threads(),
                device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device))


def read_config(run: Path) -> dict:
    try:
        return {} | json.loads((run / "config.json").read_text())
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{run / 'config.json'}: not the config of a run ({error}); start a new one") from None


def save(path: Path, config: dict, dataset: data.Dataset, nets: dict[str, torch.nn.Module], **progress) -> None:
    """Weights and all that `predict` and `--resume` need to know of them; BadInput on weights that are not finite."""
    weights = {name: net.state_dict() for name, net in nets.items()}
    if not all(value.isfinite().all() for net in weights.values() for value in net.values()):
        raise BadInput(f"{path}: the weights are no longer finite; lower --lr (what stood there is from before)")
    about = dict(config=config, classes=dataset.classes, channels=dataset.channels)
    save_checkpoint(path, about | dict(nets=weights) | progress)


def save_checkpoint(path: Path, content: dict) -> None:
    """A file of torch.save whose SHA-256 rides along as the zip archive's comment: torch.load takes it as any other,
    and `load_checkpoint` sees a flipped byte, which torch.load does not."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    archive = buffer.getvalue()
    digest = hashlib.sha256(archive).hexdigest().encode()
    write(path, archive[:-2] + len(digest).to_bytes(2, "little") + digest)


def load_checkpoint(path: str | Path) -> dict:
    """What `save_checkpoint` wrote; of a run's folder its checkpoint.pt, else its student.pt."""
    path = Path(path)
    if path.is_dir():
        path = path / ("checkpoint.pt" if (path / "checkpoint.pt").exists() else "student.pt")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: no checkpoint to read there ({error.strerror})") from None
    archive, digest = content[:-66] + b"\0\0", content[-64:]
    if content[:2] + content[-66:-64] != b"PK\x40\0" or hashlib.sha256(archive).hexdigest().encode() != digest:
        raise BadInput(f"{path}: damaged, or not a checkpoint of this program; take another one")
    try:
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if saved.keys() >= {"config", "classes", "channels", "nets"}:
            return saved
    except Exception:  # noqa: BLE001  a file made to do harm may raise anything
        pass
    raise BadInput(f"{path}: holds something else than the weights of this program; take another one")


def load_progress(run: Path, config: dict, may_change: tuple[str, ...]) -> dict | None:
    """The checkpoint that a run goes on from, None before its first; BadInput where it is another run's."""
    path = run / "checkpoint.pt"
    if not path.exists():
        return None
    saved = load_checkpoint(path)
    others = [k for k, value in config.items() if k not in may_change and saved["config"].get(k, value) != value]
    if others or not saved.keys() >= {"stage", "iteration", "optimizers"}:
        raise BadInput(f"{path}: of another run ({', '.join(others) or 'weights alone'}); bring back the one that was "
                       "there, or remove it to start from the beginning")
    return saved


def load_weights(net: torch.nn.Module, saved: dict, name: str, source) -> None:
    try:
        net.load_state_dict(saved["nets"][name])
    except KeyError:
        raise BadInput(f"{source}: holds no {name}, only {', '.join(saved['nets'])}") from None
    except RuntimeError:
        raise BadInput(f"{source}: weights of another network; channels, classes, filters and depth differ") from None


def rewind_log(path: Path, stages: list[str], saved: dict | None) -> None:
    """Drop what was logged after the checkpoint `saved`: it will be done, and logged, again."""
    reached = (saved["stage"], saved["iteration"]) if saved else (0, 0)
    kept = []
    for line in path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn line
            entry = json.loads(line)
            if line.endswith("\n") and (stages.index(entry["stage"]), entry["iteration"]) <= reached:
                kept.append(line)
    write(path, "".join(kept))


def append_log(path: Path, lines: list[dict], lasting: bool) -> None:
    """`lasting`, which takes its time, before a checkpoint that is past these lines."""
    with writing(path), open(path, "a") as log:
        log.writelines(json.dumps(line) + "\n" for line in lines)
        log.flush()
        if lasting:
            os.fsync(log.fileno())


def read_scalars(pending: list[dict]) -> list[dict]:
    """Lines of the log whose scalars are still tensors, with numbers, in one read from the device; BadInput if one is
    NaN or infinite, with the names of the `cases` that the step took, which are else left out."""
    names = [name for name, value in pending[0].items() if torch.is_tensor(value)]
    values = torch.stack([torch.stack([line[name] for name in names]) for line in pending]).tolist()
    lines = [line | dict(zip(names, row, strict=True)) for line, row in zip(pending, values, strict=True)]
    for line, row in zip(lines, values, strict=True):
        cases = ", ".join(dict.fromkeys(line.pop("cases")))
        if not np.isfinite(row).all():
            wrong = next(name for name in names if not np.isfinite(line[name]))
            raise BadInput(f"{line['stage']}, iteration {line['iteration']}: {wrong} is not finite, in patches of "
                           f"{cases}; lower --lr or look at these cases (a checkpoint is from before)")
    return lines


def progress(lines: list[dict]) -> str:
    """The last losses, the feedback and the Dice among these lines of the log, for the progress bar."""
    last = {name: value for line in lines for name, value in line.items() if name not in ("stage", "iteration", "lr")}
    dice = "".join(f"  Dice {name} {100 * value:.1f}" for name, value in last.pop("dice", {}).items())
    return "  ".join(f"{k} {v:.1e}" if k == "feedback" else f"{k} {v:.3f}" for k, v in last.items()) + dice


def title(config: dict) -> str:
    preset = f" ({config['preset']})" if config["method"] == "reciprocal" else ""
    other = [key for key in ("lesson", "feedback") if config[key] != data.PRESETS[config["preset"]][key]]
    preset += "".join(f", {key} {config[key]}" for key in other if preset)
    synthetic = ", synthetic data" * (config["data"] == "phantom")
    cutmix = ", cutmix" * (config["cutmix"] and config["method"] != "bcp")
    return f"{Path(config['data']).name} {config['method']}{preset}{cutmix}, seed {config['seed']}{synthetic}"


def lower_bounds(summary: dict, run: Path) -> list[dict]:
    """Summaries of the supervised runs beside this one: the same cases, as many iterations, scored alike."""
    same, rows = ("cases", "iterations"), []
    scoring = ("data", "seed", "spacing", "stride", "patch", "voxel", "largest_component")
    for path in sorted(run.parent.glob("*/summary.json")) if summary["config"]["method"] != "supervised" else ():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not a summary of this version
            other = json.loads(path.read_text())
            theirs = stats.BEFORE | other["config"]
            alike = [other[name] == summary[name] for name in same]
            alike += [theirs[name] == summary["config"][name] for name in scoring]
            if other["config"]["method"] == "supervised" and all(alike):
                rows += [row | dict(network=f"lower bound ({path.parent.name})") for row in other["scores"]]
    return rows


def panels(dataset: data.Dataset, rows: list[dict], run: Path) -> list[tuple]:
    """What the overlay shows: (set, Dice or NaN, case, prediction (D, H, W)) of the worst, the median and the best
    test case by the student, of transductive ones where no test case is scored, of the first three where none is."""
    cases = {"test": dataset.test, "transductive": dataset.scored("transductive")}
    name = "test" if dataset.scored("test") or not cases["transductive"] else "transductive"
    dice = {case.name: [row["dice"] for row in rows if row["case"] == case.name and row["network"] == "student"
                        and not np.isnan(row["dice"])] for case in cases[name]}
    known = sorted((np.mean(dice[case.name]), i) for i, case in enumerate(cases[name]) if dice[case.name])
    chosen = [known[i] for i in sorted({0, len(known) // 2, len(known) - 1})] if known else [
        (np.nan, i) for i in range(min(3, len(cases[name])))]
    read = lambda case: read_nifti(run / PREDICTED[name] / f"{case.name}.nii.gz")[0]  # noqa: E731
    return [(name, mean, cases[name][i].to("cpu"), read(cases[name][i])) for mean, i in chosen]


def conclude(config: dict, dataset: data.Dataset, rows: list[dict], run: Path) -> None:
    """metrics.csv, summary.json, the pictures and the final table of a run."""
    counts = str(dataset)
    scores = stats.summarize(rows)
    iterations = sum(len([line for line in lines if "lr" in line]) for _, lines in report.read_log(run / "log.jsonl"))
    summary = dict(config=config, counts=counts, synthetic=config["data"] == "phantom", iterations=iterations,
                   cases=json.loads((run / "cases.json").read_text()), scores=scores)
    summary = json.loads(json.dumps(summary), parse_constant=lambda _: None)  # JSON has no NaN
    write(run / "summary.json", json.dumps(summary, indent=1))
    write(run / "curves.png", report.curves(run / "log.jsonl", title(config)))
    if shown := panels(dataset, rows, run):
        write(run / "overlay.png", report.overlay(shown, dataset.classes, title(config)))
    print(f"\n{title(config)}: {counts}")
    if scores:
        stats.write_csv(run / "metrics.csv", rows)
        print(stats.table(scores + lower_bounds(summary, run), config["spacing"]))
    else:
        print("No case with a label to score: predictions only.")
    print(f"\n{run}: {', '.join(sorted(path.name + '/' * path.is_dir() for path in run.glob('[!.]*')))}")
