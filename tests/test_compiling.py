"""Compiled functions are apart from each other, kept between runs, and the time that they took is told."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import tiny
import torch
from torch import Tensor

from modalities.compiling import compile_seconds, compiled, user_cache

# A function that no other run has compiled, for it has a number of its own.
ONCE = """
import json, os, sys, torch
from modalities.compiling import compiled
number = float(sys.argv[1])
value = compiled(lambda x: torch.sin(x * number) + number)(torch.ones(8))
from torch._dynamo.utils import counters  # not before: it settles the place of the cache
counts = [counters["inductor"][f"fxgraph_cache_{kind}"] for kind in ("hit", "miss")]
print(json.dumps({"hits and misses": counts, "folder": os.environ["TORCHINDUCTOR_CACHE_DIR"], "value": value.tolist()}))
"""


def python(code: str, *args: str, **environment: str) -> str:
    """What a new process prints, whose environment names no place for compiled programs unless `environment` does."""
    ours = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
    return subprocess.run(
        [sys.executable, "-c", code, *args], env=ours | environment, capture_output=True, text=True, check=True
    ).stdout.strip()


@tiny.needs_compiler
def test_a_process_may_compile_any_number_of_functions() -> None:
    def power(exponent: float) -> float:
        def function(x: Tensor) -> Tensor:
            return x**exponent

        return float(compiled(function)(torch.full((), 3.0)))

    with torch._dynamo.config.patch(recompile_limit=2):
        assert [power(exponent) for exponent in (1.0, 2.0, 3.0, 4.0)] == [3, 9, 27, 81]


@tiny.needs_compiler
def test_a_second_process_takes_the_programs_of_the_first() -> None:
    number = f"{random.random()}"
    first, second = json.loads(python(ONCE, number)), json.loads(python(ONCE, number))
    assert first["hits and misses"] == [0, 1] and second["hits and misses"] == [1, 0]
    assert first["value"] == second["value"]
    assert first["folder"] == second["folder"] == str(user_cache() / "inductor")


@tiny.needs_compiler
def test_the_seconds_of_compiling_are_those_of_the_first_call() -> None:
    weight = torch.ones(8, requires_grad=True)
    call = compiled(lambda x: (x * 3).exp().sum())
    before, began = compile_seconds(), time.perf_counter()
    loss = call(weight)
    forward = compile_seconds()
    loss.backward()
    after, wall = compile_seconds(), time.perf_counter() - began
    # So small a function takes no time itself; its backward pass may have been compiled with it.
    assert before < forward <= after and 0.2 * wall < after - before <= wall
    call(weight).backward()
    assert compile_seconds() == after


PLACE = "import os; from modalities.compiling import use_cache; use_cache(); print(os.environ.get({!r}))".format(
    "TORCHINDUCTOR_CACHE_DIR"
)


def test_the_place_of_programs_is_the_users_cache_unless_another_is_chosen(tmp_path: Path) -> None:
    assert python(PLACE, XDG_CACHE_HOME=str(tmp_path)) == f"{tmp_path}/modalities/inductor"
    assert python(PLACE, XDG_CACHE_HOME=str(tmp_path), TORCHINDUCTOR_CACHE_DIR="mine") == "mine"
    assert python(PLACE, XDG_CACHE_HOME="/proc/none") == "None", "where it cannot be written, PyTorch's own place does"


def test_that_nothing_was_compiled_is_told_without_loading_the_compiler() -> None:
    code = "import sys; from modalities.compiling import compile_seconds; print(compile_seconds(), "
    assert python(code + "'torch._dynamo.utils' in sys.modules)") == "0.0 False"


@tiny.needs_compiler
def test_a_program_that_recomputes_keeps_less_and_has_the_same_gradient() -> None:
    weights = [torch.randn(32, 32, generator=torch.Generator().manual_seed(i)) / 4 for i in range(8)]
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(9)).requires_grad_()

    def layers(x: Tensor) -> Tensor:
        for gate, up in zip(weights[::2], weights[1::2], strict=True):
            x = x + torch.nn.functional.silu(x @ gate) * (torch.nn.functional.rms_norm(x, (32,)) @ up)
        return x.square().sum()

    kept, grads = [], []
    for recompute in (False, True):
        out = compiled(layers, recompute=recompute)(x)
        kept.append(sum(tensor.nbytes for tensor in out.grad_fn.saved_tensors))
        grads.append(torch.autograd.grad(out, x)[0])
    assert kept[1] < 0.9 * kept[0], kept
    torch.testing.assert_close(grads[1], grads[0])
