"""Time and memory of the head's loss with its gradients: all logits at once, or in chunks; compiled, or eager.

    python benchmarks/loss.py [--tokens 4096 --width 512 --vocab 50304 --chunk-tokens 512 --repeats 7]

Hidden states in bf16, and the head's weight in fp32 and cast within, as in a step of one process; "sharded" stands for
a weight that is in bf16 already, as FSDP2 hands it over. On a GPU if there is one. Every figure is of a process of its
own, after a first call that compiles; the contestants take turns. Memory is the peak of a call beyond what the process
had before it (libraries, code, hidden states, weight) and beyond the gradients that it returns.
"""

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONTESTANTS = (
    "plain compiled", "chunked compiled", "plain eager", "chunked eager", "plain compiled sharded",
    "chunked compiled sharded",
)  # fmt: skip


def contest(name: str, tokens: int, width: int, vocab: int, chunk_tokens: int, calls: int) -> None:
    """In a process of its own: prints the seconds of each call, and its memory [MiB]."""
    import torch
    from torch import Tensor

    from modalities.loss import LossConfig, linear_cross_entropy

    implementation, mode, *sharded = name.split()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden_BTD = torch.randn(1, tokens, width).to(device, torch.bfloat16)
    weight_VD = (torch.randn(vocab, width) * 0.02).to(device, torch.bfloat16 if sharded else torch.float32)
    targets_BT = torch.randint(vocab, (1, tokens)).to(device)
    config = LossConfig(implementation=implementation, chunk_tokens=chunk_tokens)  # type: ignore[arg-type]

    def loss_fn(hidden_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        terms = (targets_BT, config, vocab, 0.0, float(tokens), False)
        master_VD = None if sharded else weight_VD
        return linear_cross_entropy(hidden_BTD, weight_VD.to(hidden_BTD.dtype), *terms, master_VD)[0]

    grad_fn = torch.func.grad_and_value(loss_fn, argnums=(0, 1))
    if mode == "compiled":
        grad_fn = torch.compile(grad_fn, fullgraph=True, dynamic=False)
    grad_fn(hidden_BTD, weight_VD)

    seconds, peaks = [], []
    for _ in range(calls):
        before = reset_peak(device)
        began = time.perf_counter()
        grads, loss = grad_fn(hidden_BTD, weight_VD)
        assert loss.isfinite()  # on a GPU it waits
        seconds.append(time.perf_counter() - began)
        peaks.append((peak(device) - before - sum(grad.nbytes for grad in grads)) / 2**20)
        del grads, loss
    print(f"\n{json.dumps({'seconds': seconds, 'memory': max(peaks)})}")


def reset_peak(device: str) -> int:
    """Begin to measure the peak anew; bytes in use now."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed must not hide what this one needs
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return status("VmHWM")


def status(field: str) -> int:
    """Bytes that Linux reports of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main(
    *,
    tokens: int = 4096,
    width: int = 512,
    vocab: int = 50_304,
    chunk_tokens: int = 512,
    repeats: int = 5,
    calls: int = 3,
    contestants: tuple[str, ...] = CONTESTANTS,
) -> None:
    """Print the table.

    Args:
        tokens: Tokens of a micro-batch.
        width: Width of the model.
        vocab: Rows of the head.
        chunk_tokens: Tokens whose logits exist at a time, where chunked.
        repeats: Processes of each contestant.
        calls: Timed calls in each process.
        contestants: Which to run; the first is what the others are compared with.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name in contestants:
            arguments = json.dumps([name, tokens, width, vocab, chunk_tokens, calls])
            command = [sys.executable, __file__, "--contest", arguments]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(f"{name} failed: {done.stderr[-2000:]}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{tokens:,} tokens, width {width}, {vocab:,} words, chunks of {chunk_tokens} tokens")
    print("\n| loss and gradients | median s | least – most | ratio | MiB | ratio |\n|---|---|---|---|---|---|")
    base_time = base_memory = 0.0
    for name, runs in found.items():
        seconds = sorted(s for run in runs for s in run["seconds"])
        middle, memory = statistics.median(seconds), statistics.median(run["memory"] for run in runs)
        base_time, base_memory = base_time or middle, base_memory or memory
        print(
            f"| {name} | {middle:.3f} | {seconds[0]:.3f} – {seconds[-1]:.3f} | {middle / base_time:.2f}× "
            f"| {memory:,.0f} | {memory / base_memory:.2f}× |"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contest"]:
        contest(*json.loads(sys.argv[2]))
    else:
        sys.path.insert(0, str(ROOT))
        from modalities import cli

        cli.run(lambda args: cli.call(main, args))
