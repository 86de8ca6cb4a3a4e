"""The frame of every command line here: mistakes are one line, flags are the fields of a dataclass, and a file is
written whole or not at all."""

import argparse
import contextlib
import dataclasses
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch


class BadInput(Exception):
    """The user's mistake, told in one line: what is wrong, which file, what to do."""


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are BadInput, one line, too."""

    def error(self, message: str):
        raise BadInput(f"{message} (--help lists the flags)")


def cli(main: Callable[[], int | None]) -> int:
    """The exit status of a program; the user's mistakes, Ctrl-C and SIGTERM are one line on stderr."""
    signals = [signal.SIGINT]

    def terminate(number, _):  # as Ctrl-C ends a program: no file is left half written
        signals.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    try:
        return main() or 0
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or
                re.search("can't allocate|not enough memory|out of memory", str(error))):
            raise
        line, status = "error: out of memory; lower --patch, --batch-l, --batch-u or --windows, or raise --voxel", 2
    except (BadInput, OSError) as error:
        line, status = f"error: {error}", 2
    except KeyboardInterrupt as stop:
        line, status = "; ".join(["stopped", *stop.args]), 128 + signals[-1]
    print(*line.splitlines(), file=sys.stderr)  # a file's name may hold a line break
    return status


@contextlib.contextmanager
def writing(path: Path):
    """Trouble in here is trouble with writing `path`, told in one line."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror}); make room or choose another folder") from None


def write(path: Path, content: bytes | str) -> None:
    """Under another name until it is whole and on the disk: `path` never holds half a file."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            partial.unlink(missing_ok=True)  # what a killed process left; a link there would lead elsewhere
            with open(partial, "xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def flag(default, help: str, choices: tuple | None = None):
    """A field of a configuration that `add_flags` can read."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def add_flags(parser: Parser, config: type, *names: str) -> None:
    """These fields (none named: all) of a dataclass as flags. One that is not given stays out of the result."""
    parser.epilog = "A default gives way to the data set's recipe, the preset, or the run that goes on or is used."
    for field in dataclasses.fields(config):
        if field.name in names or not names:
            kind: dict = dict(type=type(field.default), choices=field.metadata["choices"])
            if isinstance(field.default, bool):
                kind = dict(action=argparse.BooleanOptionalAction)
            elif isinstance(field.default, tuple):
                kind = dict(type=type(field.default[0]), nargs=len(field.default))
            default = f" (default: {field.default})" if field.default != "" else ""
            parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
                                help=field.metadata["help"] + default, **kind)
