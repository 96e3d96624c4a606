"""`torch.compile` as all of the package uses it; it knows functions, and nothing of what they compute."""

import os
import shutil
import types
from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled as a whole for the shapes that it is called with."""
    # A copy of its code, for PyTorch keeps eight programs for a piece of *code*, which all closures of one line share:
    # the ninth model of a process would fail.
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, fullgraph=True, dynamic=False)


def can_compile(device: torch.device) -> bool:
    """Whether there is a compiler for `device`: on a CPU it needs one of C++, which a bare machine lacks."""
    return device.type != "cpu" or shutil.which(os.environ.get("CXX", "g++")) is not None
