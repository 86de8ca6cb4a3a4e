"""The frame of every command line here: mistakes are one line, and the flags are the fields of a dataclass."""

import argparse
import dataclasses
import signal
import sys
from collections.abc import Callable

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
    except torch.OutOfMemoryError:
        line, status = "error: out of GPU memory; lower --patch, --batch-l, --batch-u or --windows", 2
    except (BadInput, OSError) as error:
        line, status = f"error: {error}", 2
    except KeyboardInterrupt as stop:
        line, status = "; ".join(["stopped", *stop.args]), 128 + signals[-1]
    print(*line.splitlines(), file=sys.stderr)  # a file's name may hold a line break
    return status


def flag(default, help: str, choices: tuple | None = None):
    """A field of a configuration that `add_flags` can read."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def add_flags(parser: Parser, config: type, *names: str) -> None:
    """These fields (none named: all) of a dataclass as flags. One that is not given stays out of the result."""
    for field in dataclasses.fields(config):
        if field.name in names or not names:
            kind: dict = dict(type=type(field.default), choices=field.metadata["choices"])
            if isinstance(field.default, bool):
                kind = dict(action=argparse.BooleanOptionalAction)
            elif isinstance(field.default, tuple):
                kind = dict(type=type(field.default[0]), nargs=len(field.default))
            parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
                                help=f"{field.metadata['help']} (default: {field.default}, or the recipe's)", **kind)
