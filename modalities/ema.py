"""A running mean of the weights (EMA): its decay, its update, and how a model computes with it.

It knows tensors by name, and nothing of models, steps or checkpoints.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from modalities.optim import Params, local


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """An exponential moving average of the weights, kept beside them (Polyak and Juditsky, 1992).

    Training does not read it. It is evaluated beside the weights, saved with them, and used where `--ema` is given.
    """

    decay: float = 0.0
    """Share of the mean that a step leaves: 0.999 averages over about the last 1,000 steps; 0: no mean is kept. After
    the first n steps it is (1 + n) / (10 + n) at most, so that the random initial weights are soon forgotten."""
    every: int = 1
    """Steps between two updates, each of as many steps' decay; where that very step is skipped there is none."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:  # nor NaN
            raise ValueError(f"ema.decay is {self.decay}, but must be at least 0 (no mean) and less than 1")
        if self.every < 1:
            raise ValueError(f"ema.every is {self.every}, but must be at least 1 step")

    def decay_after(self, steps: int) -> float:
        """The decay of the update after so many steps: the warm-up is that of TensorFlow's ExponentialMovingAverage."""
        return min(self.decay, (1 + steps) / (10 + steps)) ** self.every


OFF = EmaConfig()


def init(config: EmaConfig, params: Params) -> Params:
    """The mean of nothing but `params`, with their names and sharding; empty where none is kept."""
    return {name: param.detach().clone() for name, param in params.items()} if config.decay else {}


@torch.no_grad()
def restart(ema: Params, params: Params) -> None:
    """Put the mean where the weights are."""
    for name, mean in ema.items():
        local(mean).copy_(local(params[name]))


@torch.no_grad()
def update(config: EmaConfig, ema: Params, params: Params, steps: int, skip: Tensor | None = None) -> Params:
    """The mean after so many `steps`, the last of which made `params`; in place, and empty where none is kept.

    `skip`: fp32 []; where it is 1 the mean keeps its bits. It is read on the device alone.
    """
    if not ema or steps % config.every:
        return ema
    means, weights = [local(mean) for mean in ema.values()], [local(params[name]) for name in ema]
    share = torch.full((), 1 - config.decay_after(steps), device=means[0].device)
    if skip is not None:
        share = share * (1 - skip.to(share.device))  # mean + 0 · (weight - mean) has the bits of the mean
    # As tensors also where a number would do: on a CPU that takes four times as long.
    torch._foreach_lerp_(means, weights, [share] * len(means))
    return ema


@contextmanager
def as_weights(params: Params, ema: Params) -> Iterator[Params]:
    """The mean as weights to give to the model of `params`, which come back as they were whatever happens.

    Plain tensors are the mean's own. A sharded model computes with its own weights alone, so each rank exchanges its
    shards for the mean's until the block ends, one tensor at a time.
    """
    if not any(isinstance(param, DTensor) for param in params.values()):
        yield ema
        return
    exchanged = []
    try:
        for name, mean in ema.items():
            exchange(params[name], mean)
            exchanged.append(name)
        yield params
    finally:
        for name in exchanged:
            exchange(params[name], ema[name])


@torch.no_grad()
def exchange(one: Tensor, other: Tensor) -> None:
    """Give each of two tensors the values of the other, in the memory that it has."""
    a, b = local(one), local(other)
    before = a.clone()
    a.copy_(b)
    b.copy_(before)
