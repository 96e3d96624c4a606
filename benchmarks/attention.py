"""Attention on a CPU: all scores at once against PyTorch's SDPA, forward and backward, each compiled.

    python benchmarks/attention.py [--lengths 64 128 256 512 --tokens 4096 --heads 8 --head-dim 64 --repeats 7]

Causal, without documents. The contestants take turns; medians, milliseconds of CPU time of all threads.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from modalities.attention import Backend, attention, make_mask  # noqa: E402  (the line above lets a checkout be found)
from modalities.compiling import compiled  # noqa: E402

BACKENDS: tuple[Backend, ...] = ("sdpa", "manual")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def both_ways(backend: Backend, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Callable[[], object]:
    """A call that computes the attention of random tensors [B, T, H, E] and its gradients."""
    q, k, v, grad = (torch.randn(shape, dtype=dtype) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    mask = make_mask(backend, shape[1], shape[1], None, None, None, torch.device("cpu"))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask)

    program = compiled(attend)
    return lambda: torch.autograd.grad(program(*inputs), inputs, grad)


def cpu_ms(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return 1000 * (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    print("| dtype | tokens of a sequence | sdpa ms | manual ms | manual / sdpa |\n|---|---|---|---|---|")
    for name, dtype in DTYPES.items():
        for length in args.lengths:
            shape = (max(1, args.tokens // length), length, args.heads, args.head_dim)
            calls = {backend: both_ways(backend, shape, dtype) for backend in BACKENDS}
            for call in calls.values():
                call()  # compiles
            rounds = [{backend: cpu_ms(call) for backend, call in calls.items()} for _ in range(args.repeats)]
            sdpa, manual = (statistics.median(found[backend] for found in rounds) for backend in BACKENDS)
            print(f"| {name} | {length} | {sdpa:.1f} | {manual:.1f} | {manual / sdpa:.2f}× |", flush=True)


if __name__ == "__main__":
    main()
