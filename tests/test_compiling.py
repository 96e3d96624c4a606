"""Compiled functions are apart from each other: how many a process has makes no difference."""

import tiny
import torch
from torch import Tensor

from modalities.compiling import compiled


@tiny.needs_compiler
def test_a_process_may_compile_any_number_of_functions() -> None:
    def power(exponent: float) -> float:
        def function(x: Tensor) -> Tensor:
            return x**exponent

        return float(compiled(function)(torch.full((), 3.0)))

    with torch._dynamo.config.patch(recompile_limit=2):
        assert [power(exponent) for exponent in (1.0, 2.0, 3.0, 4.0)] == [3, 9, 27, 81]
