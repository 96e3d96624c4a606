"""The gradient noise scale (McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv 1812.06162).

B_simple = tr(Σ) / |G|², where G is the true gradient and Σ the covariance of one sequence's gradient: in a batch of so
many, noise and signal are equal. It is measured in sequences, as `data.global_batch` is.

Both estimates compare the squared norms of small parts of a batch with that of the whole. Part i of k has N_i of the
batch's N targets, and G_i is its mean gradient over them. It is assumed that a part's noise falls as 1 / N_i, so that
E|G_i|² = |G|² + τ / N_i, and for the whole |G|² + τ / N. Then Σ (N_i / N) |G_i|² exceeds the square of the whole by
(k - 1) τ / N, which gives τ and |G|² without bias; for n sequences tr(Σ) is n τ / N. Parts of equal size make this the
paper's appendix A.1.

It knows gradients by name and the loss contract, and nothing of models or ranks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from modalities.loss import IGNORED, Aux, Batch, LossFn, count_targets
from modalities.optim import Params, global_norm

GradFn = Callable[[Params, Batch], tuple[Params, tuple[Tensor, Aux]]]

SQUARES = "squares"
"""In `aux`: Σ (N / N_i) |g_i|² over the parts, g_i being the part's share of the whole gradient, and their number."""


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """The gradient noise scale while a run trains: `noise_scale` in metrics.jsonl, train/noise_scale in TensorBoard.

    The parts that are compared are a step's micro-batches. On several ranks a part is the micro-batches of all ranks
    together, for FSDP2 sums their gradients before any can be seen. It is of the gradient before it is clipped.
    """

    every: int = 0
    """Steps between two measurements, which need at least two micro-batches a step; 0: none."""
    decay: float = 0.95
    """Of the running means of tr(Σ) and of |G|², whose ratio is logged: 0.95 averages over some 20 measurements."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"noise.every is {self.every}, but must not be negative")
        if not 0 <= self.decay < 1:  # nor NaN
            raise ValueError(f"noise.decay is {self.decay}, but must be at least 0 and less than 1")

    def due(self, steps: int, parts: int) -> bool:
        """Whether the step after which there are so many `steps`, of so many micro-batches, is measured."""
        return self.every > 0 and steps % self.every == 0 and parts > 1


OFF = NoiseConfig()


def check(config: NoiseConfig, parts: int, micro_batch: int) -> None:
    """Raise ValueError if steps of at most so many `parts` cannot be measured."""
    if config.every and parts < 2:
        remedy = f"lower parallel.micro_batch {micro_batch}" if micro_batch > 1 else "raise data.global_batch"
        raise ValueError(
            f"noise.every {config.every} compares the micro-batches of a step, but a step has one on each rank; "
            f"{remedy}, or leave noise.every at 0"
        )


def estimate(weighted: Tensor, whole: Tensor, parts: Tensor | int, sequences: int) -> tuple[Tensor, Tensor]:
    """(|G|², tr(Σ) of one sequence), unbiased, by the squares of the `parts` (as SQUARES has them) and of the whole."""
    noise = (weighted - whole) / (parts - 1)
    return whole - noise, sequences * noise


# ------------------------------------------------------------------------------------------------- while a run trains


def watched(grad_fn: GradFn, total: Callable[[Tensor], Tensor]) -> GradFn:
    """`grad_fn`, with SQUARES of its micro-batch in `aux`. `total`: the sum of a number over the ranks that share one.

    Its gradients must be those of all ranks, so FSDP2 has to sum them at each micro-batch.
    """

    def grad_and_squares(params: Params, batch: Batch) -> tuple[Params, tuple[Tensor, Aux]]:
        grads, (loss, aux) = grad_fn(params, batch)
        count = total(count_targets(batch["targets"]))
        # What has no target has no gradient either, and is no part.
        weighted = batch["num_targets"] / count.clamp(min=1) * global_norm(grads.values()).square()
        return grads, (loss, {**aux, SQUARES: torch.stack((weighted.double(), (count > 0).double()))})

    return grad_and_squares


def update(
    config: NoiseConfig, means: Params, squares: Tensor, grad_norm: Tensor, sequences: int, skip: Tensor | None = None
) -> Params:
    """The running means "square" (|G|²) and "trace" (tr(Σ)) [], fp64, after a step; empty ones begin at 0.

    `squares`: SQUARES of the step. `grad_norm`: of its gradient before it is clipped. `sequences`: in its batch. A step
    that is skipped (`skip` 1), or that is not finite, leaves them as they are. They lack the same factor, 1 - decay^n
    after n measurements, which their ratio does not show.
    """
    weighted, parts = squares.unbind()
    found = dict(
        zip(("square", "trace"), estimate(weighted, grad_norm.double().square(), parts, sequences), strict=True)
    )
    usable = torch.stack(list(found.values())).isfinite().all()
    if skip is not None:
        usable &= skip == 0
    zero = torch.zeros_like(weighted)
    before = {name: means[name].to(weighted) if name in means else zero for name in found}
    return {
        name: torch.where(usable, torch.lerp(value, before[name], config.decay), before[name])
        for name, value in found.items()
    }


def scale(means: Params) -> Tensor:
    """B_simple [sequences], []; NaN where noise outweighs what was measured of |G|², or nothing was."""
    return torch.where(means["square"] > 0, means["trace"] / means["square"], torch.nan)


# ----------------------------------------------------------------------------------------------- sequence by sequence


class Measured(NamedTuple):
    """The noise of the gradient over some sequences."""

    loss: float
    """Mean over their targets [nats]."""
    square: float
    """|G|²; not positive where noise outweighs it in so few sequences."""
    trace: float
    """tr(Σ) of one sequence."""
    sequences: int

    @property
    def norm(self) -> float:
        """|G|; NaN where its square is not positive."""
        return math.sqrt(self.square) if self.square > 0 else math.nan

    @property
    def scale(self) -> float:
        """B_simple [sequences]; infinite where |G|² is not positive."""
        return self.trace / self.square if self.square > 0 else math.inf


@torch.no_grad()
def per_example(loss_fn: LossFn, params: Params, batch: Batch, chunk: int = 8) -> Measured:
    """The noise over the n ≥ 2 sequences of `batch` [n, T], by the gradient of each: parts of one sequence.

    They are computed by `vmap` over `loss_fn`, which has to be the plain one; `chunk` of them are in memory at a time,
    each as large as `params`, which are on one device.
    """
    num_targets = count_targets(batch["targets"])
    counts_N = (batch["targets"] != IGNORED).flatten(1).sum(1)

    def of_one(example: Batch) -> tuple[Params, Tensor]:
        alone = {key: value[None] for key, value in example.items()}
        grads, (loss, _) = grad_and_value(loss_fn, has_aux=True)(params, {**alone, "num_targets": num_targets})
        return grads, loss

    whole = {name: torch.zeros_like(param) for name, param in params.items()}
    weighted = loss = torch.zeros((), dtype=torch.float64, device=counts_N.device)
    for first in range(0, len(counts_N), chunk):
        grads, losses_C = vmap(of_one, randomness="different")(
            {key: value[first : first + chunk] for key, value in batch.items()}
        )
        weights_C = num_targets / counts_N[first : first + chunk].clamp(min=1)
        weighted = weighted + (weights_C * squares_of_each(grads)).sum()
        loss = loss + losses_C.double().sum()
        for name, grad in grads.items():
            whole[name] += grad.sum(0)
    parts = (counts_N > 0).sum()
    square, trace = estimate(weighted, global_norm(whole.values()).double().square(), parts, len(counts_N))
    return Measured(float(loss), float(square), float(trace), len(counts_N))


def squares_of_each(grads: Params) -> Tensor:
    """The squared norm of each gradient [C] of `grads` [C, …], fp64."""
    # Row by row, as `global_norm` does, for the same reason.
    rows = (torch.linalg.vector_norm(grad, dim=-1).double().square() for grad in grads.values())
    return torch.stack([row.reshape(len(row), -1).sum(1) for row in rows]).sum(0)
