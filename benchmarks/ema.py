"""What a running mean of the weights costs: a training step with it and without.

    python benchmarks/ema.py [--recipe gpt2_60m --repeats 5 --every 1 --global-batch 0]

The recipe's own step on random tokens, after two that compile and warm up; with and without take turns in one process,
on the same state. The update alone is timed as well, for a step's own time varies by more than it takes. On a CPU the
figures are CPU seconds, on a GPU seconds until it is done. Medians (least – most).
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from modalities import dist, ema, loop, recipe  # noqa: E402  (the line above lets a checkout be found)
from modalities.ema import EmaConfig  # noqa: E402
from modalities.pbin import write_pbin  # noqa: E402
from modalities.recipe import Recipe  # noqa: E402


def on_random_tokens(chosen: Recipe, folder: Path, global_batch: int) -> Recipe:
    """The recipe with as many random tokens as two of its steps take, and nothing to evaluate."""
    size = global_batch or chosen.data.global_batch
    tokens = np.random.default_rng(0).integers(0, chosen.model.vocab_size, 2 * size * chosen.data.seq_len + 1)
    with write_pbin(folder / "random.pbin", chosen.model.vocab_size) as append:
        append(tokens)
    data = replace(
        chosen.data, train=(f"{folder / 'random.pbin'}",), names=(), weights=(), stages=(), masks=(), val=(),
        val_masks=(), tokenizer="", ramp=(), global_batch=size,
    )  # fmt: skip
    return replace(chosen, data=data)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        began = time.process_time()
        call()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="gpt2_60m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--global-batch", type=int, default=0)
    args = parser.parse_args()
    config = EmaConfig(decay=0.999, every=args.every)
    with tempfile.TemporaryDirectory() as folder, dist.setup() as world:
        chosen = on_random_tokens(recipe.load(args.recipe)[0], Path(folder), args.global_batch)
        run, state = loop.build(replace(chosen, ema=config), world)
        mean = state.ema
        times: dict[str, list[float]] = {"step without": [], "step with": [], "update alone": []}
        for i in range(2 + 2 * args.repeats):
            batch, kept = run.data.batch(state.samples), mean if i % 2 else {}

            def step(kept: dict[str, torch.Tensor] = kept, batch: dict[str, torch.Tensor] = batch) -> None:
                nonlocal state
                state, _ = run.train_step(replace(state, ema=kept), batch)

            took = seconds(step, world.device)
            if i >= 2:
                times["step with" if kept else "step without"].append(took)
        skip, one = torch.zeros((), device=world.device), EmaConfig(decay=0.999)
        for _ in range(args.repeats + 1):
            times["update alone"].append(
                seconds(lambda: ema.update(one, mean, state.params, 1000, skip), world.device) / args.every
            )
        del times["update alone"][0]  # it warms up
    medians = {name: statistics.median(values) for name, values in times.items()}
    unit = "CPU seconds" if world.device.type == "cpu" else "seconds"
    print(f"{args.recipe}, global batch {chosen.data.global_batch} × {chosen.data.seq_len}, {world.device}")
    print(f"| | {unit} | of a step |\n|---|---|---|")
    for name, values in times.items():
        share = medians[name] / medians["step without"]
        print(f"| {name} | {medians[name]:.4f} ({min(values):.4f} – {max(values):.4f}) | {share:.2%} |")


if __name__ == "__main__":
    main()
