"""The best learning rate at several widths: it stays put under µP, and moves without.

    python benchmarks/mup.py [--widths 64 128 256 512 --steps 100 --optimizer adamw --out docs/mup.png]

A byte-level model of two blocks reads Python's own standard library, each batch once and the same for all; a warm-up,
then linear decay to zero. Its loss is the mean of the last tenth of the steps. At the smallest width, the base of µP,
both are one. With `--optimizer muon` the swept rate is Muon's, and AdamW keeps 0.01 for the rest.
"""

import argparse
import functools
import math
import sysconfig
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from modalities import dist, mup, optim, step
from modalities.fsdp import init_params
from modalities.model import ModelConfig, build_skeleton
from modalities.optim import OptimConfig, ScheduleConfig
from modalities.pbin import refuse_existing, write_beside

LIBRARY = Path(sysconfig.get_path("stdlib"))
HEAD_DIM = 32
ADAMW_LR = 0.01
GRIDS = {"adamw": range(-12, -4), "muon": range(-8, -1)}
"""Learning rates, as powers of two."""
KINDS = ("standard", "µP")
Losses = dict[tuple[str, int], dict[float, float]]
"""By parametrisation and width: learning rate → loss, NaN where it diverged."""


def batches(steps: int, batch: int, seq_len: int) -> torch.Tensor:
    """int64 [steps, batch, seq_len + 1] of bytes: windows from all over the library, none of them twice."""
    files = sorted(path for path in LIBRARY.rglob("*.py") if "site-packages" not in path.parts)
    text = np.frombuffer(b"".join(path.read_bytes() for path in files), np.uint8)
    windows = text[: len(text) // (seq_len + 1) * (seq_len + 1)].reshape(-1, seq_len + 1)
    if len(windows) < steps * batch:
        raise ValueError(f"Python's library has {len(windows):,} windows of {seq_len + 1} bytes alone; lower --steps")
    order = np.random.default_rng(0).permutation(len(windows))[: steps * batch]
    return torch.from_numpy(windows[order].astype(np.int64)).view(steps, batch, seq_len + 1)


def model_of(width: int, kind: str, base: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=256,
        num_layers=2,
        width=width,
        num_heads=width // HEAD_DIM,
        activation="gelu",
        init_std=0.06,  # at the base about the best of 0.02, 0.06 and 0.12: µP carries over what was found there
        mup_base_width=base if kind == "µP" else 0,
    )


def train(
    model: ModelConfig, config: OptimConfig, data: torch.Tensor, grad_fn: step.GradFn, world: dist.World
) -> float:
    """The mean loss of the last tenth of the steps [nats per byte]; NaN where it diverged."""
    skeleton, steps = build_skeleton(model), len(data)
    params = init_params(skeleton, 0, world.device)
    optimizer = optim.make(config, params, functools.partial(mup.multiples, model))
    opt_state, losses = optimizer.init(params), []
    for i, tokens in enumerate(data.to(world.device)):
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "num_targets": torch.tensor(tokens[:, 1:].numel())}
        grads, (loss, _) = grad_fn(params, batch)
        optim.clip_by_global_norm(grads, config.grad_clip)
        lr = optim.learning_rate(config, i, steps, int)
        params, opt_state = optimizer.update(grads, opt_state, params, lr)
        losses.append(loss)
        if i % 20 == 0 and not loss.isfinite():
            return math.nan
    return float(torch.stack(losses[-max(1, steps // 10) :]).mean())


def measure(args: argparse.Namespace, world: dist.World) -> Losses:
    data, base = batches(args.steps, args.batch, args.seq_len), min(args.widths)
    found: Losses = {}
    for width in args.widths:
        for kind in KINDS:
            if width == base and kind == "µP":  # to the bit the standard one
                found[kind, width] = found["standard", width]
                continue
            model, began = model_of(width, kind, base), time.perf_counter()
            loss_fn = step.make_loss_fn(build_skeleton(model), getattr(torch, args.dtype), train=True)
            grad_fn = step.grad_and_value(loss_fn, False, args.compile, by_autograd=not args.compile)
            row = found[kind, width] = {}
            for lr in lrs(args):
                row[lr] = train(model, optimizer_of(args, lr), data, grad_fn, world)
            print(f"{kind} {width}: {time.perf_counter() - began:.0f} s", flush=True)
    return found


def lrs(args: argparse.Namespace) -> list[float]:
    return [2.0**power for power in args.powers or GRIDS[args.optimizer]]


def optimizer_of(args: argparse.Namespace, lr: float) -> OptimConfig:
    schedule = ScheduleConfig(kind="linear", warmup=args.steps // 10, final=0.0)
    config = OptimConfig(lr=lr, betas=(0.9, 0.95), schedule=schedule)
    if args.optimizer == "adamw":
        return config
    return replace(config, kind="muon", lr=ADAMW_LR, muon=replace(config.muon, lr=lr))


def least(row: dict[float, float]) -> float:
    """The learning rate of the grid with the least loss."""
    return min(row, key=lambda lr: math.inf if math.isnan(row[lr]) else row[lr])


def best(row: dict[float, float]) -> float:
    """The learning rate of the least loss, between the grid's by the parabola through the three about it."""
    lr = least(row)
    before, lowest, after = (row.get(near, math.nan) for near in (lr / 2, lr, lr * 2))
    if math.isnan(before) or math.isnan(after):
        return lr
    return lr * 2 ** ((before - after) / (2 * (before - 2 * lowest + after)))


def table(found: Losses) -> str:
    """A row for each model; then how the best learning rate follows the width, and what it costs to keep the base's."""
    rates = list(next(iter(found.values())))
    lines = [
        f"| | width | {' | '.join(f'lr {lr:.2g}' for lr in rates)} | best lr |",
        "|---|---|" + "---|" * (len(rates) + 1),
    ]
    for (kind, width), row in found.items():
        cells = ["–" if math.isnan(row[lr]) else f"{row[lr]:.3f}" for lr in rates]
        lines.append(f"| {kind} | {width} | {' | '.join(cells)} | {best(row):.2g} |")
    widths = sorted({width for _, width in found})
    narrow, wide = widths[0], widths[-1]
    lines += [
        "",
        f"| | best lr grows as the width to the | loss at width {wide} with the best lr of {narrow} | with its own |",
        "|---|---|---|---|",
    ]
    for kind in KINDS:
        x, y = np.log(widths), np.log([best(found[kind, width]) for width in widths])
        kept, own = (found[kind, wide][least(found[kind, width])] for width in (narrow, wide))
        lines.append(f"| {kind} | {np.polyfit(x, y, 1)[0]:+.2f} | {kept:.3f} | {own:.3f} |")
    return "\n".join(lines)


def draw(found: Losses, title: str, out: Path) -> None:
    """Loss against learning rate, a curve for each width, the best of each marked; both parametrisations."""
    from matplotlib.figure import Figure

    widths = sorted({width for _, width in found})
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    finite = [loss for row in found.values() for loss in row.values() if not math.isnan(loss)]
    for axes, kind in zip(panels, KINDS, strict=True):
        for i, width in enumerate(widths):
            t, row = i / max(1, len(widths) - 1), found[kind, width]
            color = (0.70 - 0.62 * t, 0.82 - 0.53 * t, 0.92 - 0.34 * t)
            axes.plot(row.keys(), row.values(), "o-", ms=3.5, color=color, label=f"width {width}")
            axes.plot(best(row), row[least(row)], "*", ms=13, color=color, markeredgecolor="white", zorder=3)
        axes.set_xscale("log", base=2)
        axes.set(title=f"{'standard parametrisation' if kind == 'standard' else kind}", xlabel="learning rate")
        # What diverged would flatten all else.
        axes.set_ylim(min(finite) - 0.05, min(finite) + 1.2)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("loss [nats per byte]")
    panels[0].legend(frameon=False)
    figure.suptitle(title, fontweight="bold")
    with write_beside(out) as file:
        figure.savefig(file, format="png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--powers", type=int, nargs="+", help="learning rates, as powers of two")
    parser.add_argument("--optimizer", choices=GRIDS, default="adamw")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.out:
        refuse_existing(args.out)
    with dist.setup() as world:
        found = measure(args, world)
    print(table(found))
    if args.out:
        swept = {"adamw": "AdamW", "muon": "Muon"}[args.optimizer]
        draw(found, f"The best learning rate of {swept} by width, {args.steps} steps", args.out)


if __name__ == "__main__":
    main()
