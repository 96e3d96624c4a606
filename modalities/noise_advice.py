"""Which global batch a run should have: `python -m modalities.sweep batch-size --run runs/demo`.

It measures the gradient noise scale at a run's checkpoints, sequence by sequence, and says what a batch costs by it
(McCandlish et al., arXiv 1812.06162): to a given loss, training at batch B takes S_min (1 + B_noise / B) steps and
E_min (1 + B / B_noise) sequences. At B_noise both are twice the least there can be.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch

from modalities import checkpoint, dist, durable, log, loop, noise, ranks, trained
from modalities import recipe as recipes
from modalities.data import TrainData
from modalities.model import build_skeleton, num_params
from modalities.noise import Measured
from modalities.pbin import refuse_existing, write_beside
from modalities.recipe import Recipe
from modalities.step import make_loss_fn

CHUNK_BYTES = 2**30
"""About so much the gradients of a chunk of sequences may take."""
CHECKPOINTS = 4
"""Of a training that is made for the measurement."""
HEADING = f"{'step':>8}  {'loss':>8}  {'|G|':>9}  {'tr Σ':>9}  {'B_simple [sequences]':>20}  {'[tokens]':>12}"


@dataclass(frozen=True)
class Row:
    step: int
    measured: Measured


def main(
    *,
    run: Path | None = None,
    recipe: str = "",
    steps: int = 200,
    samples: int = 64,
    data: tuple[str, ...] = (),
    chunk: int = 0,
    out: Path | None = None,
) -> None:
    """Measure the gradient noise scale, and advise a global batch.

    Args:
        run: A run's folder, all checkpoints of which are measured, or one checkpoint.
        recipe: In its place: the recipe of a short training, which is then the run NAME-noise.
        steps: Of that training.
        samples: Sequences whose gradients are computed for each checkpoint; more make it surer.
        data: Packed files to take them from; by default the run's own, where its training stands.
        chunk: Sequences whose gradients are in memory at a time; 0: as many as 1 GiB holds, up to 16.
        out: The picture to be made; by default noise.png in the run's folder, drawn anew.
    """
    if (run is None) == (not recipe):
        raise ValueError("give either --run, a run to measure, or --recipe, what to train for it")
    for flag, value, least in (("steps", steps, 1), ("samples", samples, 2), ("chunk", chunk, 0)):
        if value < least:
            raise ValueError(f"--{flag} is {value}, but must be at least {least}")
    if ranks.world_size() > 1:
        raise ValueError("the noise scale is measured in one process; start it without torchrun")
    if out is not None:
        refuse_existing(out)
    folder = run if run is not None else train_for_it(recipe, steps)
    checkpoints, rows = find_checkpoints(folder), []
    used = recipes.from_json(checkpoints[-1].folder / "recipe.json")
    print(HEADING)
    with dist.setup() as world:
        for found in checkpoints:
            rows.append(measure(found, samples, data, chunk, world))
            print(in_words(rows[-1], used.data.seq_len), flush=True)
    known = [row for row in rows if math.isfinite(row.measured.scale)]
    if not known:
        raise ValueError(f"|G|² is drowned in the noise of {samples} sequences; give --samples {4 * samples} or more")
    print(advice(known[-1], used))
    picture = out or checkpoints[-1].folder.parent / "noise.png"
    with write_beside(picture) if out else picture.open("wb") as file:
        draw(known, while_training(checkpoints[-1].folder.parent), used, file)
    print(f"curves: {picture}")


def train_for_it(name: str, steps: int) -> Path:
    """The folder of a run of so many steps, for its checkpoints; one that is there already goes on."""
    recipe, source = recipes.load(name)
    short = replace(
        recipe,
        name=f"{recipe.name}-noise",
        steps=steps,
        checkpoint=replace(
            recipe.checkpoint, every=max(1, steps // CHECKPOINTS), keep_last=0, keep_every=0, keep_best=0
        ),
        eval=replace(recipe.eval, every=0),
        sample=replace(recipe.sample, every=0),
    )
    return loop.train(short, source)


def find_checkpoints(folder: Path) -> list[trained.Found]:
    """The valid checkpoints of a run, the first step first, or the one that `folder` is; a ValueError without any."""
    one = (folder / checkpoint.MANIFEST).exists()
    found = []
    for path in [folder] if one else reversed(checkpoint.steps(folder)):
        try:
            found.append(trained.find(path))
        except ValueError as error:
            print(f"warning: {error}; passing over it", file=sys.stderr)
    if not found:
        raise ValueError(f"{folder} holds no valid checkpoint; give a run (runs/<name>) or a checkpoint in it (step-N)")
    return found


def measure(found: trained.Found, samples: int, data: Sequence[str], chunk: int, world: dist.World) -> Row:
    """The noise at a checkpoint, over the sequences that its run would read next; in fp32, and without a teacher."""
    recipe = recipes.from_json(found.folder / "recipe.json")
    facts = durable.read_facts(found.folder)
    # Plain attention and logits, for the kernels that training uses have no gradient of each sequence.
    model = build_skeleton(replace(recipe.model, attention="manual"))
    params = {name: torch.empty(p.shape, device=world.device) for name, p in model.named_parameters()}
    params = trained.load_weights(found, params)
    loss_fn = make_loss_fn(model, torch.float32, train=True, loss=replace(recipe.loss, implementation="plain"))
    config = replace(recipe.data, global_batch=samples, ramp=())
    if data:
        config = replace(config, train=tuple(data), names=(), weights=(), stages=(), masks=())
    read = TrainData(config, recipe.model.vocab_size, recipe.seed, samples, world).read(facts["samples"])
    batch = {key: value[0].to(world.device) for key, value in read.items()}
    fits = CHUNK_BYTES // (4 * num_params(recipe.model))
    torch.manual_seed(recipe.seed)  # of dropout
    return Row(facts["step"], noise.per_example(loss_fn, params, batch, chunk or max(1, min(16, samples, fits))))


def in_words(row: Row, seq_len: int) -> str:
    """A row of the table. What exceeds the sequences that it was measured by is a guess, and said to be."""
    found = row.measured
    rough = (
        "" if found.scale <= found.sequences else f"  rough: measured by {found.sequences} sequences; more --samples"
    )
    return (
        f"{row.step:>8}  {found.loss:>8.4f}  {found.norm:>9.4g}  {found.trace:>9.4g}  {found.scale:>20,.1f}  "
        f"{found.scale * seq_len:>12,.0f}{rough}"
    )


def sensible(scale: float, micro_batch: int) -> int:
    """The global batch nearest to `scale` by ratio that is a power of two times the micro-batch."""
    return micro_batch * 2 ** max(0, round(math.log2(scale / micro_batch))) if scale > 0 else micro_batch


def costs(batch: float, scale: float) -> tuple[float, float]:
    """(steps / S_min, sequences / E_min) to a given loss at a batch, by the noise scale: equation 2.11 of the paper."""
    return 1 + scale / batch, 1 + batch / scale


def advice(row: Row, recipe: Recipe) -> str:
    """What the newest measurement says of the recipe's batch, and of others."""
    scale, now = max(row.measured.scale, 1e-9), recipe.data.global_batch
    micro_batch = 1 if recipe.parallel.micro_batch == "auto" else recipe.parallel.micro_batch
    best = sensible(scale, micro_batch)
    lines = [
        f"After step {row.step} the critical batch is about {scale:,.1f} sequences of {recipe.data.seq_len} tokens.",
        f"Advised: --data.global-batch {best}, in micro-batches of {micro_batch}.",
        f"{'global batch':>14}  {'steps / fewest':>14}  {'sequences / fewest':>18}",
    ]
    for batch in sorted({now, *(max(micro_batch, best * factor // 4) for factor in (1, 2, 4, 8, 16))}):
        steps, sequences = costs(batch, scale)
        mark = ", ".join([*["now"] * (batch == now), *["advised"] * (batch == best)])
        lines.append(f"{batch:>14,}  {steps:>14.2f}  {sequences:>18.2f}  {mark}".rstrip())
    return "\n".join(lines)


def while_training(run: Path) -> list[tuple[int, float]]:
    """(step, noise scale) that the run itself has logged, where noise.every was set."""
    lines = log.read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    return [(int(line["step"]), line["noise_scale"]) for line in lines if line.get("noise_scale") is not None]


def draw(rows: Sequence[Row], logged: Sequence[tuple[int, float]], recipe: Recipe, file: BinaryIO) -> None:
    """The noise scale over the run, and what a batch costs by the newest of them, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    scales, now = [row.measured.scale for row in rows], recipe.data.global_batch
    if logged:
        left.plot(*zip(*logged, strict=True), color="C0", linewidth=1, alpha=0.4, label="by micro-batches, in training")
    left.plot([row.step for row in rows], scales, "o-", color="C0", label="by sequences, at checkpoints")
    left.axhline(now, color="0.5", linestyle="--", linewidth=1, label=f"data.global_batch {now}")
    left.set(title=f"{recipe.name}: gradient noise scale", xlabel="step", ylabel="B_simple [sequences]")
    left.set_ylim(bottom=0)
    scale = max(scales[-1], 1e-9)
    low, high = max(1.0, min(scale, now) / 16), max(scale, now) * 16
    batches = [low * (high / low) ** (i / 100) for i in range(101)]
    for which, color, label in ((0, "C3", "steps / fewest"), (1, "C2", "sequences / fewest")):
        right.plot(batches, [costs(batch, scale)[which] for batch in batches], color=color, label=label)
    right.axvline(scale, color="C0", linewidth=1, label=f"noise scale {scale:,.1f}")
    right.axvline(now, color="0.5", linestyle="--", linewidth=1, label=f"data.global_batch {now}")
    right.set(title=f"What a batch costs after step {rows[-1].step}", xlabel="global batch [sequences]", ylabel="ratio")
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set(xlim=(low, high))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(edgecolor="none")
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_formatter("{x:g}")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
