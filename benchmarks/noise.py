"""How near the estimates of the gradient noise scale come to what is known, and what measuring it costs a step.

    python benchmarks/noise.py [--samples 16384 --steps 200 --repeats 3 --model-steps 31]

Known: a quadratic whose optimum differs from sample to sample by a normal distribution, in 64 dimensions whose
curvatures go from 1 to 10^-2; its noise scale is set to several values. `by sequences` is `noise.per_example` over
`samples`; `by micro-batches` is what a run logs, over `steps` steps of 16 micro-batches of 16. The errors are of the
estimate against the truth, the median and the worst of `repeats` seeds.

Not known, but the same for both: a Transformer of 20,000 parameters at its initial weights. Last, the CPU time of its
step (four micro-batches) that is measured against one that is not, which for larger models is less.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402  (the line above lets a checkout be found)

from modalities import dist, loop, noise, step  # noqa: E402
from modalities.data import TrainData  # noqa: E402
from modalities.loss import Aux, Batch, LossConfig  # noqa: E402
from modalities.model import build_skeleton  # noqa: E402
from modalities.noise import NoiseConfig  # noqa: E402
from modalities.optim import OptimConfig, Optimizer, Params  # noqa: E402
from modalities.step import TrainState  # noqa: E402

WORLD = dist.World(rank=0, size=1, device=torch.device("cpu"), mesh=None)
CURVATURE = torch.logspace(0, -2, 64)
SCALES = (1.0, 10.0, 100.0)
STILL = Optimizer(lambda params: {}, lambda grads, state, params, lr, skip=None: (params, state))
"""It leaves the weights where they are."""


def quadratic(params: Params, batch: Batch) -> tuple[Tensor, Aux]:
    """The mean of ½ Σ h (x - c)² over samples of the optimum c: the gradient's mean is h x, its variance (h s)²."""
    losses_BT = (CURVATURE * (params["x"] - batch["optima"]).square() / 2).sum(-1)
    return losses_BT.sum() / batch["num_targets"], {}


def samples(shape: tuple[int, ...], seed: int) -> Batch:
    optima = torch.randn(*shape, 1, len(CURVATURE), generator=torch.Generator().manual_seed(seed))
    return {"optima": optima, "targets": torch.zeros(*shape, 1, dtype=torch.long), "inputs": torch.zeros(*shape, 1)}


def by_micro_batches(params: Params, steps: int, seed: int) -> float:
    grad_fn = step.grad_and_value(quadratic, sharded=False, compile=False)
    config = NoiseConfig(every=1, decay=0.999)
    train_step = step.make_train_step(grad_fn, STILL, 0.0, lambda i: 0.0, 0, WORLD, noise=config)
    state = TrainState(params, {})
    for i in range(steps):
        state, _ = train_step(state, samples((16, 16), seed * steps + i))
    return float(noise.scale(state.noise))


def known(num_samples: int, steps: int, repeats: int) -> None:
    print("| true noise scale | by sequences, error | worst | by micro-batches, error | worst |\n|---|---|---|---|---|")
    for scale in SCALES:
        # All optima have the deviation 1, and x lies on a diagonal: B = Σ h² / Σ (h x)².
        params = {"x": torch.full((len(CURVATURE),), scale**-0.5)}
        sequences = [
            noise.per_example(quadratic, params, samples((num_samples,), seed), 512).scale for seed in range(repeats)
        ]
        micro = [by_micro_batches(params, steps, seed) for seed in range(repeats)]
        cells = []
        for found in (sequences, micro):
            errors = [abs(value / scale - 1) for value in found]
            cells += [f"{statistics.median(errors):.1%}", f"{max(errors):.1%}"]
        print(f"| {scale:g} | {' | '.join(cells)} |")


def of_model(steps: int, folder: Path) -> None:
    config = NoiseConfig(every=1, decay=0.999)
    recipe = tiny.recipe(folder, optim=OptimConfig(lr=0.0), noise=config)
    run, state = loop.build(recipe, WORLD)
    plain, _ = loop.build(replace(recipe, noise=noise.OFF), WORLD)
    seconds: dict[str, list[float]] = {"measured": [], "not": []}
    for _ in range(steps):
        batch = run.data.batch(state.samples)
        for name, train_step in (("not", plain.train_step), ("measured", run.train_step)):
            began = time.process_time()
            after, _ = train_step(state, batch)
            seconds[name].append(time.process_time() - began)
        state = after
    loss_fn = step.make_loss_fn(
        build_skeleton(replace(recipe.model, attention="manual")), torch.float32, True,
        loss=LossConfig(implementation="plain"),
    )  # fmt: skip
    data = TrainData(replace(recipe.data, global_batch=124), recipe.model.vocab_size, recipe.seed, 124, WORLD)
    exact = noise.per_example(loss_fn, state.params, {key: value[0] for key, value in data.read(0).items()})
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print("\n| a Transformer | by sequences | by micro-batches | step that is measured over one that is not |")
    print("|---|---|---|---|")
    ratio = medians["measured"] / medians["not"]
    print(f"| noise scale [sequences] | {exact.scale:.2f} | {float(noise.scale(state.noise)):.2f} | {ratio:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (("--samples", 16384), ("--steps", 200), ("--repeats", 3), ("--model-steps", 31)):
        parser.add_argument(flag, type=int, default=default)
    args = parser.parse_args()
    known(args.samples, args.steps, args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        of_model(args.model_steps, Path(folder))


if __name__ == "__main__":
    main()
