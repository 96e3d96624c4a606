"""The coordinate check of µP: how large activations are, and how far some steps move them, at several widths.

`python -m modalities.sweep coord-check --recipe NAME`. Both should not depend on the width; where they do, a learning
rate that is right for one width is wrong for the next (Yang et al., Tensor Programs V, arXiv 2203.03466, appendix D.1).
It knows recipes and the step, and trains in one process, uncompiled, in fp32.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modalities import devices, dist, mup, optim
from modalities.data import TrainData
from modalities.fsdp import init_params
from modalities.model import ModelConfig, Transformer, build_skeleton
from modalities.optim import Params
from modalities.pbin import refuse_existing, write_beside
from modalities.recipe import Recipe, check_ranks, load
from modalities.step import apply, grad_and_value, make_gradients, make_loss_fn

PLACES = ("embedding", "attention", "MLP", "residual stream", "logits")
"""Whose outputs are measured: attention and MLP as the mean over blocks, the residual stream after the last."""
QUANTITIES = ("mean |x|", "mean |x − x at the start|")
STANDARD, MUP = "standard", "µP"


@dataclass(frozen=True)
class Check:
    """What was measured, and at which widths."""

    widths: tuple[int, ...]
    sizes: dict[str, Tensor]
    """By parametrisation: [width, step (from 0, before the first), quantity, place], fp32."""

    def slopes(self, parametrisation: str, step: int) -> Tensor:
        """[quantity, place]: the exponent with which each grows with the width, by least squares on logarithms."""
        x = torch.tensor(self.widths).double().log()
        y = self.sizes[parametrisation][:, step].double().log().flatten(1)
        x = x - x.mean()
        return (x @ y / x.square().sum()).view(len(QUANTITIES), len(PLACES))


def at_width(model: ModelConfig, width: int) -> ModelConfig:
    """`model` of another width: as many layers, heads of the same size, everything else in proportion."""
    if width % model.head_width:
        raise ValueError(f"width {width} is no multiple of the recipe's heads of {model.head_width} features")
    heads = width // model.head_width
    group = math.gcd(heads, model.num_heads // model.kv_heads)
    hidden = round(model.mlp_hidden * width / model.width)
    return replace(
        model, width=width, num_heads=heads, num_kv_heads=heads // group, head_dim=model.head_width, mlp_width=hidden
    )


def check(recipe: Recipe, widths: Sequence[int], steps: int, base_width: int, world: dist.World) -> Check:
    """Train at each width, with µP and without, on the same data from the same seed."""
    check_ranks(recipe, 1)
    plain = replace(recipe.model, mup_base_width=0, mup_base_layers=0, mup_base_head_dim=0)
    bases = {STANDARD: 0, MUP: base_width}
    models = {
        name: [replace(at_width(plain, width), mup_base_width=base) for width in widths] for name, base in bases.items()
    }
    sizes = {name: torch.stack([measure(recipe, model, steps, world) for model in of]) for name, of in models.items()}
    return Check(tuple(widths), sizes)


def measure(recipe: Recipe, model: ModelConfig, steps: int, world: dist.World) -> Tensor:
    """[step, quantity, place] of `model` trained as the recipe says, but at its peak learning rate from the start.

    Step 0 is before the first; what is measured is the same batch each time.
    """
    size = recipe.data.global_batch if recipe.parallel.micro_batch == "auto" else recipe.parallel.micro_batch
    data = TrainData(recipe.data, model.vocab_size, recipe.seed, size, world)
    skeleton = build_skeleton(model)
    params = init_params(skeleton, recipe.seed, world.device)
    devices.keep_freed_memory(params.values(), large_too=True)
    optimizer = optim.make(recipe.optim, params, functools.partial(mup.multiples, model))
    opt_state = optimizer.init(params)
    loss_fn = make_loss_fn(skeleton, torch.float32, train=True, num_sources=len(recipe.data.train), loss=recipe.loss)
    grad_fn = grad_and_value(loss_fn, sharded=False, compile=False, by_autograd=True)
    gradients = make_gradients(grad_fn, recipe.seed, world)
    tokens_BT = data.batch(0)["inputs"][0]
    start, found = activations(skeleton, params, tokens_BT), []
    for step in range(steps + 1):
        now = activations(skeleton, params, tokens_BT)
        change = torch.stack([mean_size([a - b for a, b in zip(now[p], start[p], strict=True)]) for p in PLACES])
        found.append(torch.stack((torch.stack([mean_size(now[place]) for place in PLACES]), change)))
        if step < steps:
            grads, _ = gradients(params, step, data.batch(step * recipe.data.global_batch))
            optim.clip_by_global_norm(grads, recipe.optim.grad_clip)
            params, opt_state = optimizer.update(grads, opt_state, params, recipe.optim.lr)
    return torch.stack(found).cpu()


def mean_size(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.abs().mean() for tensor in tensors]).mean()


@torch.no_grad()
def activations(skeleton: Transformer, params: Params, tokens_BT: Tensor) -> dict[str, list[Tensor]]:
    """The tensors at each of PLACES."""
    found: dict[str, list[Tensor]] = {place: [] for place in PLACES}

    def keep(place: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        found[place].append(output)

    places: list[tuple[nn.Module, str]] = [(skeleton.embed, "embedding"), (skeleton.blocks[-1], "residual stream")]
    for block in skeleton.blocks:
        places += [(block.attn, "attention"), (block.mlp, "MLP")]  # type: ignore[list-item]
    hooks = [module.register_forward_hook(functools.partial(keep, place)) for module, place in places]
    found["logits"].append(apply(skeleton, params, tokens_BT, train=False))
    for hook in hooks:
        hook.remove()
    return found


# ------------------------------------------------------------------------------------------------------ what is shown


def table(found: Check) -> str:
    """The slopes after the last step; at the start for the logits, whose size then says nothing of training."""
    lines = [
        f"growth with the width, as the exponent of a power law, {len(found.sizes[MUP][0]) - 1} steps after the start",
        f"{'':<18}{'mean |x|':^22}{'change':^22}",
        f"{'':<18}" + f"{STANDARD:>11}{MUP:>11}" * 2,
    ]
    slopes = {name: found.slopes(name, -1) for name in (STANDARD, MUP)}
    for i, place in enumerate(PLACES):
        values = [slopes[name][quantity, i] for quantity in range(2) for name in (STANDARD, MUP)]
        lines.append(f"{place:<18}" + "".join(f"{value:>+11.2f}" for value in values))
    return "\n".join(lines)


def draw(found: Check, title: str, out: Path) -> None:
    """The sizes and their changes against the width, a line for each step, both parametrisations side by side."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    steps = len(found.sizes[MUP][0])
    # From light to dark, as training goes on.
    colors = [
        (0.75 - 0.67 * t, 0.84 - 0.55 * t, 0.93 - 0.35 * t) for t in (i / max(1, steps - 1) for i in range(steps))
    ]
    figure = Figure(figsize=(15, 7.2), layout="constrained")
    panels = figure.subplots(len(QUANTITIES), 2 * len(PLACES), sharex=True)
    for q, i, p in ((q, i, p) for q in range(len(QUANTITIES)) for i in range(len(PLACES)) for p in range(2)):
        axes, name = panels[q, 2 * i + p], (STANDARD, MUP)[p]
        for step in range(q, steps):
            label = f"step {step}" if step else "at the start"
            axes.plot(found.widths, found.sizes[name][:, step, q, i], "o-", color=colors[step], ms=3.5, label=label)
        slope = found.slopes(name, -1)[q, i]
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(found.widths, [f"{width}" for width in found.widths], fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
        if q == 0:
            axes.set_title(f"{PLACES[i]}\n{name}", fontsize=10)
        axes.text(0.06, 0.92, f"slope {slope:+.2f}", transform=axes.transAxes, fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if q == 1:
            axes.set_xlabel("width", fontsize=9)
    # The same heights for both, so that slopes can be compared.
    for row in panels:
        for left, right in zip(row[::2], row[1::2], strict=True):
            lows, highs = zip(left.get_ylim(), right.get_ylim(), strict=True)
            low, high = min(lows), max(highs) * 1.5
            # Never less than two decades: what hardly grows should look so.
            wider = max(1.0, 10 / (high / low) ** 0.5)
            left.set_ylim(low / wider, high * wider)
            right.set_ylim(low / wider, high * wider)
            right.tick_params(labelleft=False)
    for q, quantity in enumerate(QUANTITIES):
        panels[q, 0].set_ylabel(quantity)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=steps, frameon=False)
    figure.suptitle(title, fontweight="bold", parse_math=False)
    with write_beside(out) as file:
        figure.savefig(file, format="png", dpi=130)


def main(
    recipe: str,
    widths: tuple[int, ...] = (64, 128, 256, 512),
    steps: int = 4,
    base_width: int = 0,
    out: Path = Path("coord.png"),
) -> None:
    """Draw how activations grow with a recipe's width, in the standard parametrisation and in µP.

    Args:
        recipe: A recipe's name, a path to a .py, or a run's recipe.json.
        widths: Of the models that are trained, multiples of the width of the recipe's heads.
        steps: Optimizer steps, at the recipe's peak learning rate.
        base_width: Where µP is the standard parametrisation; 0: the recipe's own, or the smallest of the widths.
        out: The picture.
    """
    refuse_existing(out)
    if len(set(widths)) < 2 or steps < 1:
        raise ValueError(f"--widths are {widths} and --steps {steps}, but must be at least two widths and one step")
    chosen, _ = load(recipe)
    widths = tuple(sorted(set(widths)))
    with dist.setup() as world:
        if world.size > 1:
            raise ValueError("coord-check is for one process; start it without torchrun")
        found = check(chosen, widths, steps, base_width or chosen.model.mup_base_width or widths[0], world)
    print(table(found))
    draw(found, f"{chosen.name}: activations against width, lr {chosen.optim.lr:g}", out)
    print(f"picture            {out}")
