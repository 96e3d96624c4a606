"""AdamW and Muon as `init` and `update`, clipping, weight-decay groups, and learning rates as functions of the step.

It knows tensors by name and nothing of models. `update` consumes its inputs: it changes the tensors that it is given.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw as adamw_kernel

from modalities import muon
from modalities.muon import MuonConfig
from modalities.mup import Multiples, Rule

Params = dict[str, Tensor]
OptState = dict[str, dict[str, Tensor]]
MultiplesOf = Callable[[str, Rule], Multiples]
"""Of a parameter's name and what updates it: by how much its hyperparameters differ from the config's."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate as a multiple of its peak: a linear warm-up, then `kind`."""

    kind: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt", "step"] = "cosine"
    """Shape after the warm-up; wsd is warm-up, stable, decay (Hu et al., arXiv 2404.06395)."""
    unit: Literal["steps", "tokens"] = "steps"
    """Unit of `warmup`, `decay` and `milestones`."""
    warmup: int = 0
    """Length of the warm-up [unit]."""
    decay: int = 0
    """wsd: length of the linear decay at the end [unit]."""
    final: float = 0.1
    """linear, cosine, wsd: multiple of the peak that the run ends at."""
    milestones: tuple[int, ...] = ()
    """step: where the rate is multiplied by `gamma` [unit]."""
    gamma: float = 0.1
    """step: factor at each milestone."""

    def __post_init__(self) -> None:
        for name in ("warmup", "decay", "final", "gamma"):
            if getattr(self, name) < 0:
                raise ValueError(f"optim.schedule.{name} is {getattr(self, name)}, but must not be negative")
        if self.kind == "wsd" and self.decay < 1:
            raise ValueError(f"optim.schedule.decay is {self.decay}; wsd needs the length of its decay, at least 1")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), or Muon and AdamW, with clipping by global norm."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices inside the model, AdamW for the rest."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the root of the mean square."""
    weight_decay: float = 0.1
    """Decoupled weight decay, times the multiple that `decay_rules` gives a parameter."""
    decay_rules: tuple[tuple[str, float], ...] = (
        (r"(embed|head)\.weight|.*\.(wq|wk|wv|wo|w_gate|w_up|w_down)\.weight", 1.0),
        (r"positions\.weight|.*norm\.(weight|bias)|.*\.w\w+\.bias", 0.0),
    )
    """(regular expression, multiple of weight_decay): every parameter's whole name must match exactly one."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0: no clipping."""
    schedule: ScheduleConfig = ScheduleConfig()
    muon: MuonConfig = MuonConfig()

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "grad_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name} is {getattr(self, name)}, but must be finite and not negative")
        if self.kind == "muon" and self.lr == 0:
            raise ValueError("optim.lr is 0, but with optim.kind muon must be positive: both rates follow its schedule")
        if not self.eps > 0:
            raise ValueError(f"optim.eps is {self.eps}, but must be positive")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas is {self.betas}, but each must be in [0, 1)")
        for pattern, _ in self.decay_rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"optim.decay_rules: {pattern!r} is not a regular expression: {error}") from None


class Update(Protocol):
    """`update(grads, opt_state, params, lr) -> (params, opt_state)`, in place.

    `skip`: fp32 []; where it is 1 everything keeps its bits, whatever `grads` hold. It is read on the device alone.
    """

    def __call__(
        self, grads: Params, opt_state: OptState, params: Params, lr: float, skip: Tensor | None = None
    ) -> tuple[Params, OptState]: ...


class Optimizer(NamedTuple):
    """`init(params) -> opt_state`, and the update that goes with it."""

    init: Callable[[Params], OptState]
    update: Update


def unchanged(name: str, rule: Rule) -> Multiples:
    """Hyperparameters as the config has them."""
    return Multiples()


def make(config: OptimConfig, names: Iterable[str], multiples: MultiplesOf = unchanged) -> Optimizer:
    """The optimizer that `config` describes, for the parameters `names`.

    A ValueError where no decay rule fits one, or Muon has none.
    """
    names = list(names)
    if config.kind == "adamw":
        return adamw(config, names, multiples)
    matrices = [name for name in names if re.fullmatch(config.muon.matrices, name)]
    if not matrices:
        raise ValueError(f"optim.muon.matrices: no parameter's name matches {config.muon.matrices!r}")
    ours = {name: multiples(name, config.muon.adjust) for name in matrices}
    decays = decay_multiples(config.decay_rules, names)
    rest = adamw(config, [name for name in names if name not in ours], multiples)

    def init(params: Params) -> OptState:
        return rest.init(params) | {"momentum": muon.init({name: params[name] for name in matrices})}

    def update(
        grads: Params, opt_state: OptState, params: Params, lr: float, skip: Tensor | None = None
    ) -> tuple[Params, OptState]:
        rest.update(grads, opt_state, params, lr, skip)
        rate = lr / config.lr * config.muon.lr
        decay = {name: config.muon.weight_decay * decays[name] * ours[name].weight_decay for name in matrices}
        rates = {name: muon.Rates(rate * m.lr, rate * m.lr * decay[name]) for name, m in ours.items()}
        muon.update(grads, opt_state["momentum"], params, config.muon, rates, skip)
        return params, opt_state

    return Optimizer(init, update)


def adamw(config: OptimConfig, names: Iterable[str], multiples: MultiplesOf = unchanged) -> Optimizer:
    """AdamW by PyTorch's fused kernel for the parameters `names`; a ValueError where no decay rule fits one."""
    groups: dict[tuple[float, Multiples], list[str]] = defaultdict(list)
    for name, decay in decay_multiples(config.decay_rules, names).items():
        groups[decay, multiples(name, "adamw")].append(name)

    def init(params: Params) -> OptState:
        own = {name: params[name] for members in groups.values() for name in members}
        return {
            "step": {name: torch.zeros((), device=p.device) for name, p in own.items()},
            "exp_avg": {name: torch.zeros_like(p, requires_grad=False) for name, p in own.items()},
            "exp_avg_sq": {name: torch.zeros_like(p, requires_grad=False) for name, p in own.items()},
        }

    @torch.no_grad()
    def update(
        grads: Params, opt_state: OptState, params: Params, lr: float, skip: Tensor | None = None
    ) -> tuple[Params, OptState]:
        for (decay, multiple), members in groups.items():
            # An element's update reads only that element, so a rank updates its own shard as a plain tensor.
            columns = (params, grads, opt_state["exp_avg"], opt_state["exp_avg_sq"])
            p, g, mean, square = ([local(column[name]) for name in members] for column in columns)
            # The kernel itself would not wait for a copy to the CPU, where offloaded weights are.
            found_inf = None if skip is None else skip.to(p[0].device)
            adamw_kernel(
                p,
                g,
                mean,
                square,
                max_exp_avg_sqs=[],
                state_steps=[opt_state["step"][name] for name in members],
                fused=True,
                amsgrad=False,
                beta1=config.betas[0],
                beta2=config.betas[1],
                lr=lr * multiple.lr,
                weight_decay=config.weight_decay * decay * multiple.weight_decay,
                eps=config.eps * multiple.eps,
                maximize=False,
                found_inf=found_inf,
            )
        return params, opt_state

    return Optimizer(init, update)


def decay_multiples(rules: tuple[tuple[str, float], ...], names: Iterable[str]) -> dict[str, float]:
    """The multiple of weight decay of each parameter; a ValueError names one that does not match exactly one rule."""
    multiples = {}
    for name in names:
        matches = [(pattern, multiple) for pattern, multiple in rules if re.fullmatch(pattern, name)]
        if len(matches) != 1:
            found = " and ".join(pattern for pattern, _ in matches) or "none"
            raise ValueError(f"optim.decay_rules: parameter {name!r} must match exactly one rule, but matches {found}")
        multiples[name] = matches[0][1]
    return multiples


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def clip_by_global_norm(grads: Params, max_norm: float) -> Tensor:
    """Scale `grads` in place to a global L2 norm of at most `max_norm` (0: as they are); returns the norm before."""
    norm = global_norm(grads.values())
    if max_norm > 0:
        parts = [local(g) for g in grads.values()]
        torch._foreach_mul_(parts, (max_norm / (norm + 1e-6)).clamp(max=1.0).to(parts[0].device))
    return norm


def global_norm(grads: Iterable[Tensor]) -> Tensor:
    """The L2 norm [] of all elements, each counted once, however many ranks have it."""
    squares = defaultdict(list)
    for grad in grads:
        groups: tuple[ProcessGroup, ...] = ()
        if isinstance(grad, DTensor):
            groups = tuple(grad.device_mesh.get_group(i) for i, p in enumerate(grad.placements) if not p.is_replicate())
        # Row by row, for an fp32 norm of a million elements is off by 2e-5 on a CPU; and without a copy of the squares.
        squares[groups].append(torch.linalg.vector_norm(local(grad), dim=-1).square().sum())
    sums = []
    for groups, parts in squares.items():
        sums.append(torch.stack(parts).sum())
        for group in groups:
            torch.distributed.all_reduce(sums[-1], group=group)
    return torch.stack(sums).sum().sqrt()


def lr_multiple(config: ScheduleConfig, position: float, stride: float, total: float) -> float:
    """The learning rate over its peak, at a step that starts at `position` of `total` and consumes `stride` [unit].

    The warm-up counts the step itself, so that the first step already learns; the decay counts what lies before it,
    so that the last step still does.
    """
    if position + stride < config.warmup:
        return (position + stride) / config.warmup
    after = max(0.0, position - config.warmup)
    length = max(1.0, total - config.warmup)
    if config.kind == "linear":
        return 1 - (1 - config.final) * min(1.0, after / length)
    if config.kind == "cosine":
        return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, after / length)))
    if config.kind == "wsd":
        decayed = min(1.0, max(0.0, (position - (total - config.decay)) / config.decay))
        return 1 - (1 - config.final) * decayed
    if config.kind == "inverse_sqrt":
        start = max(config.warmup, stride)
        return math.sqrt(start / max(position + stride, start))
    if config.kind == "step":
        return config.gamma ** sum(position >= milestone for milestone in config.milestones)
    return 1.0


def learning_rate(config: OptimConfig, step: int, total_steps: int, tokens_after: Callable[[int], int]) -> float:
    """The learning rate of step `step` (from 0) of a run of `total_steps`; `tokens_after(n)`: what n steps consume."""
    after = int if config.schedule.unit == "steps" else tokens_after
    position, total = after(step), after(total_steps)
    return config.lr * lr_multiple(config.schedule, position, after(step + 1) - position, total)
