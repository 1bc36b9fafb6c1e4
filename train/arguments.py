"""Checks of command-line arguments, before anything is loaded. A value of a wrong type ends the call with status 2."""

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Number = TypeVar("Number", int, float)


def at_least(minimum: Number) -> Callable[[str], Number]:
    """The type of a finite number that is not less than `minimum` and has its type.

    Raises:
        argparse.ArgumentTypeError: from the returned function, for any other text.
    """
    kind = type(minimum)

    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = -math.inf
        if not minimum <= value < math.inf:
            name = "an integer" if kind is int else "a finite number"
            raise argparse.ArgumentTypeError(f"the value is {text}; it must be {name} of at least {minimum}.")
        return kind(value)

    return parse


def torch_device(text: str) -> str:
    """The type of a torch device that can be used on this machine, such as "cpu" or "cuda:1".

    Raises:
        argparse.ArgumentTypeError: there is no such device.
    """
    import torch  # here, so that `--help` is fast

    try:
        torch.zeros(1, device=text).item()  # the tensors of device "meta" have no values
    except (RuntimeError, AssertionError, ImportError) as error:  # depends on the kind of device
        reason = str(error).split("\n")[0].split(". ")[0]
        usable = "cpu or cuda" if torch.cuda.is_available() else "cpu"
        raise argparse.ArgumentTypeError(f"{text} cannot be used on this machine ({reason}); use {usable}.") from None
    return text


def ensure_writable(folder: Path) -> None:
    """Create a folder if it does not exist, and check that files can be written to it.

    Raises:
        OSError: it cannot be created or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
