"""`torch.compile` as all of the package uses it; it knows functions, and nothing of what they compute."""

import contextlib
import os
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config

# The compiler orders a program to need little memory, but goes by size alone, and puts what only the end needs first.
# Where all that could come next is larger than this, it takes what is needed first.
LARGE_BYTES = 2**25
# The compiler's own limits to what it computes anew in a backward pass, although it could; in all it spares products,
# attention and reductions.
LIMITS = {"ban_recompute_used_far_apart", "ban_recompute_long_fusible_chains", "ban_recompute_materialized_backward"}


def compiled(function: Callable[..., Any], mode: str = "default", recompute: bool = False) -> Callable[..., Any]:
    """`function`, compiled as a whole for the shapes that it is called with; `mode` as torch.compile has it.

    `recompute`: its backward pass computes anew whatever can be fused into what needs it, and only the rest is kept.
    """
    use_cache()
    import torch._inductor.config  # which takes two seconds, and is needed only now

    # Or a step with the chunked loss would be traced anew at each start, for it has an autograd.Function.
    if hasattr(torch._functorch.config, "autograd_cache_allow_custom_autograd_functions"):
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    # What a torch of another version has not, it does without.
    if hasattr(torch._inductor.config, "size_threshold_for_succ_based_strategy"):
        torch._inductor.config.size_threshold_for_succ_based_strategy = LARGE_BYTES
    program = torch.compile(with_own_code(function), fullgraph=True, dynamic=False, mode=mode)
    if not recompute:
        return program

    def call(*args: Any) -> Any:
        with torch._functorch.config.patch({limit: False for limit in LIMITS}):
            return program(*args)

    return call


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with a copy of its code, to be compiled apart from all others.

    PyTorch keeps eight programs for a piece of *code*, which all closures of one line share: the ninth model of a
    process would fail.
    """
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def can_compile(device: torch.device) -> bool:
    """Whether there is a compiler for `device`: on a CPU it needs one of C++, which a bare machine lacks."""
    return device.type != "cpu" or shutil.which(os.environ.get("CXX", "g++")) is not None


def use_cache() -> None:
    """Keep compiled programs from run to run in the user's cache, unless TORCHINDUCTOR_CACHE_DIR names a place."""
    # PyTorch's own place is in /tmp, which the nodes of a cluster clear between jobs.
    folder = user_cache() / "inductor"
    with contextlib.suppress(OSError):  # where the home cannot be written, PyTorch's own place must do
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def user_cache() -> Path:
    """The package's folder in the user's cache, for what can be found anew at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "modalities"


def compile_seconds() -> float:
    """Seconds that this process has spent in torch.compile so far, by PyTorch's own account."""
    if "torch._dynamo.utils" not in sys.modules:  # then nothing was compiled, and importing it takes a second
        return 0.0
    from torch._dynamo.utils import compilation_time_metrics

    # Backward passes are compiled apart, when they are first needed; all else happens within a frame's compilation.
    parts = ("_compile.compile_inner", "backward._backward_impl")
    return sum(sum(compilation_time_metrics.get(part, ())) for part in parts)
