"""One training step as a pure function of state and batch: `train_step(state, batch) -> (state, metrics)`.

Plain weights are given to the model by `torch.func.functional_call`; a sharded model has its own. The gradient has
three implementations with one signature: `torch.func.grad_and_value`; `torch.autograd.grad` where activations are
computed anew, which torch.func cannot do; and a backward pass over FSDP2's shards, whose gradients exist only in
`.grad`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call
from torch.utils._pytree import tree_map

from modalities import ema as averaging
from modalities import noise as noise_scale
from modalities.compiling import compiled
from modalities.dist import World, sum_over_ranks
from modalities.ema import EmaConfig
from modalities.loss import (
    NLL,
    Aux,
    Batch,
    LossConfig,
    LossFn,
    count_targets,
    linear_cross_entropy,
    sums_by_source,
)
from modalities.model import Cache, Head, Transformer
from modalities.noise import NoiseConfig
from modalities.optim import Optimizer, OptState, Params, clip_by_global_norm, local
from modalities.profiling import span
from modalities.rng import fold

GradFn = Callable[[Params, Batch], tuple[Params, tuple[Tensor, Aux]]]
Metrics = dict[str, Tensor | float]
TrainStep = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]
Gradients = Callable[[Params, int, Batch], tuple[Params, tuple[Tensor, Aux]]]
Judge = Callable[[Params, Tensor, Tensor], tuple[Params, Tensor]]
"""`judge(guard, loss [], whether loss or gradient are not finite: bool []) -> (guard, 1 to skip the step: fp32 [])`."""
EvalStep = Callable[[Params, Iterable[Batch]], Tensor]
LossTerms = tuple[Tensor, Tensor, Aux]
"""(the loss, -log p(target) of each position, aux)."""
HeadLoss = Callable[..., LossTerms]
"""Of the arguments of `linear_cross_entropy`, and the batch."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """When the loss on held-out data is measured."""

    every: int = 100
    """Steps between two evaluations; 0: at the end alone."""
    samples: int = 0
    """Sequences of the validation set to read, from its beginning; 0: all."""

    def __post_init__(self) -> None:
        for name in ("every", "samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"eval.{name} is {getattr(self, name)}, but must not be negative")


@dataclass
class TrainState:
    """Everything that a step changes. A run is resumed from exactly this."""

    params: Params
    """Name → fp32 master weight: a plain tensor, or a DTensor shard under FSDP2."""
    opt_state: OptState
    step: int = 0
    samples: int = 0
    """Sequences consumed so far: the whole data cursor."""
    guard: Params = field(default_factory=dict)
    """What the guard remembers, by name: small tensors, the same on all ranks; empty where nothing is guarded."""
    ema: Params = field(default_factory=dict)
    """The running mean of `params`, with their names and sharding; empty where none is kept."""
    noise: Params = field(default_factory=dict)
    """Of the gradient noise scale: small tensors, the same on all ranks; empty until it is measured."""


def apply(
    model: Transformer,
    weights: Params,
    tokens_BT: Tensor,
    train: bool,
    positions_BT: Tensor | None = None,
    documents_BT: Tensor | None = None,
    cache: Cache | None = None,
    head: Head | None = None,
) -> Any:
    """What `model` computes with `weights`; a sharded one has its own, and they must be these."""
    inputs, options = (tokens_BT, positions_BT, documents_BT), {"train": train, "cache": cache, "head": head}
    if not isinstance(model, FSDPModule):
        return functional_call(model, weights, inputs, options)
    out = model(*inputs, **options)
    if not torch.is_grad_enabled():
        # What waits for a backward pass to be freed would stay, and grow stale.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    return out


def cast(model: Transformer, params: Params, compute_dtype: torch.dtype) -> Params:
    """Mixed precision is a cast inside the function; FSDP2 does the same by its policy, when it gathers the weights."""
    return params if isinstance(model, FSDPModule) else {name: p.to(compute_dtype) for name, p in params.items()}


def make_loss_fn(
    model: Transformer,
    compute_dtype: torch.dtype,
    train: bool,
    num_sources: int = 1,
    loss: LossConfig = NLL,
    compile_head: bool = False,
    head_loss: HeadLoss | None = None,
) -> LossFn:
    """`loss_fn(params, batch)` for one micro-batch: `inputs` and `targets` int64 [B, T], `num_targets` a number [].

    The batch may have `documents` and `positions` [B, T]. With several sources it has `sources` [B], and `aux` has
    -log p(target) of each. Without `train` the loss is that as well, neither smoothed nor with a z-loss.
    `compile_head`: compile a chunked head's loss by itself, for a model whose blocks are compiled one by one.
    `head_loss`: instead of the cross-entropy alone.
    """
    loss = loss if train else replace(loss, z_loss=0.0, label_smoothing=0.0)

    def loss_fn(params: Params, batch: Batch) -> tuple[Tensor, Aux]:
        weights, targets_BT = cast(model, params, compute_dtype), batch["targets"]

        def head(hidden_BTD: Tensor, weight_VD: Tensor) -> LossTerms:
            vocab_size, softcap = model.config.vocab_size, model.config.logit_softcap
            of_head = (
                hidden_BTD, weight_VD, targets_BT, loss, vocab_size, softcap, batch["num_targets"], compile_head
            )  # fmt: skip
            if head_loss:
                return head_loss(*of_head, batch)
            master_VD = None if isinstance(model, FSDPModule) else params[model.head_weight]
            return *linear_cross_entropy(*of_head, master_VD), {}

        inputs = (batch["inputs"], train, batch.get("positions"), batch.get("documents"))
        value, nll_BT, aux = apply(model, weights, *inputs, head=head)
        if num_sources > 1:
            aux |= sums_by_source(nll_BT.sum(1), targets_BT, batch["sources"], num_sources)
        return value, aux

    return loss_fn


def grad_and_value(
    loss_fn: LossFn,
    sharded: bool,
    compile: bool,
    mode: str = "default",
    by_autograd: bool = False,
    recompute: bool = False,
) -> GradFn:
    """`(params, batch) -> (grads, (loss, aux))`, fp32 gradients with the names and the sharding of `params`.

    `compile`, in the `mode` of torch.compile: as a whole. `by_autograd`: not with torch.func, for a model that computes
    activations anew, or is not compiled as a whole. `recompute`: what that program keeps, as `compiled` says.
    """
    if sharded:
        return grad_by_backward(loss_fn)

    def by_func(params: Params, batch: Batch) -> tuple[Params, tuple[Tensor, Aux]]:
        return torch.func.grad_and_value(loss_fn, has_aux=True)(params, batch)

    if by_autograd:
        grad_fn = grad_by_autograd(compiled(loss_fn, mode, recompute) if compile else loss_fn)
    else:
        grad_fn = compiled(by_func, mode) if compile else by_func
    return out_of_cuda_graph(grad_fn) if compile and mode in ("reduce-overhead", "max-autotune") else grad_fn


def out_of_cuda_graph(grad_fn: GradFn) -> GradFn:
    """The same function with results of its own: a CUDA graph puts the next ones where it has put these."""

    def copied(params: Params, batch: Batch) -> tuple[Params, tuple[Tensor, Aux]]:
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map(torch.clone, grad_fn(params, batch))

    return copied


def grad_by_autograd(loss_fn: LossFn) -> GradFn:
    """The same function for what `torch.func` cannot go through."""

    def grad_fn(params: Params, batch: Batch) -> tuple[Params, tuple[Tensor, Aux]]:
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        loss, aux = loss_fn(leaves, batch)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return dict(zip(leaves, grads, strict=True)), (loss.detach(), detached(aux))

    return grad_fn


def grad_by_backward(loss_fn: LossFn) -> GradFn:
    """The same function over a sharded model's own parameters. Gradients that FSDP2 still keeps back are left out."""

    def grad_fn(params: Params, batch: Batch) -> tuple[Params, tuple[Tensor, Aux]]:
        loss, aux = loss_fn(params, batch)
        loss.backward()
        grads = {}
        for name, param in params.items():
            if param.grad is not None:
                grads[name], param.grad = param.grad, None
        return grads, (loss.detach(), detached(aux))

    return grad_fn


def detached(aux: Aux) -> Aux:
    return {key: value.detach() for key, value in aux.items()}


def micro_batches(batch: Batch, group: ProcessGroup | None = None) -> Iterator[Batch]:
    """The micro-batches [B, T] of a rank's batch [A, B, T], each with the number of targets of all ranks of `group`."""
    # A batch without targets teaches nothing.
    num_targets = sum_over_ranks(count_targets(batch["targets"]), group).clamp(min=1)
    for i in range(len(batch["inputs"])):
        yield {"num_targets": num_targets, **{key: value[i] for key, value in batch.items()}}


def accumulated_grads(
    grad_fn: GradFn,
    params: Params,
    batch: Batch,
    group: ProcessGroup | None = None,
    sync: Callable[[bool], None] | None = None,
) -> tuple[Params, tuple[Tensor, Aux]]:
    """(gradients, (loss, aux)) of a rank's batch [A, B, T], one micro-batch at a time.

    `group`: the ranks whose batches make up the global one; None: all. `sync`: told before each micro-batch whether it
    is the last, for gradients that are summed over ranks then alone.
    """
    grads: Params = {}
    losses, auxes = [], []
    for i, micro_batch in enumerate(micro_batches(batch, group), start=1):
        if sync is not None:
            sync(i == len(batch["inputs"]))
        new, (loss, aux) = grad_fn(params, micro_batch)
        losses.append(loss)
        auxes.append(aux)
        if grads:
            torch._foreach_add_([local(grads[name]) for name in grads], [local(new[name]) for name in grads])
        else:
            grads = new
    assert grads.keys() == params.keys(), f"no part in the loss: {params.keys() - grads.keys()}"
    aux = {key: torch.stack([aux[key] for aux in auxes]).sum(0) for key in auxes[0]}
    return grads, (torch.stack(losses).sum(), aux)


def source_losses(aux: Aux, sources: Sequence[str], group: ProcessGroup | None = None) -> Metrics:
    """`loss/<source>`, the mean over all ranks [nats per token]; NaN for one that has no target in the batch."""
    if "source_loss" not in aux:
        return {}
    means_S = sum_over_ranks(aux["source_loss"], group) / sum_over_ranks(aux["source_targets"], group)
    return {f"loss/{source}": mean for source, mean in zip(sources, means_S, strict=True)}


def parts_of_loss(aux: Aux, group: ProcessGroup | None = None) -> Metrics:
    """`loss/data` and `loss/kl`, the means over all ranks [nats per token], of a loss that has such parts."""
    return {f"loss/{name}": sum_over_ranks(aux[f"{name}_loss"], group) for name in ("data", "kl") if "kl_loss" in aux}


def make_gradients(grad_fn: GradFn, seed: int, world: World, sync: Callable[[bool], None] | None = None) -> Gradients:
    """`gradients(params, step, batch)` for a rank's batch [A, B, T]: (gradients, (this rank's part of the loss, aux)).

    `sync`: as in `accumulated_grads`.
    """

    def gradients(params: Params, step: int, batch: Batch) -> tuple[Params, tuple[Tensor, Aux]]:
        torch.manual_seed(fold(seed, "dropout", step, world.rank))
        return accumulated_grads(grad_fn, params, batch, world.data_group, sync)

    return gradients


def agreed(loss: Tensor, grad_norm: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """The loss [] of all ranks by this rank's part of it, and whether it or any rank's `grad_norm` is not finite.

    Both have the same bits on all ranks, so that what is decided by them is decided alike.
    """
    bad = (~grad_norm.isfinite()).to(loss)
    loss, bad = sum_over_ranks(torch.stack((loss, bad)), world.data_group)
    if world.data_group is not None:
        # Those that share a tensor have summed the same parts in groups of their own: here the main rank's sum counts.
        loss, bad = sum_over_ranks(torch.stack((loss if world.is_main else torch.zeros_like(loss), bad)))
    return loss, (bad > 0) | ~loss.isfinite()


def make_train_step(
    grad_fn: GradFn,
    optimizer: Optimizer,
    grad_clip: float,
    lr_at: Callable[[int], float],
    seed: int,
    world: World,
    sources: Sequence[str] = (),
    sync: Callable[[bool], None] | None = None,
    judge: Judge | None = None,
    ema: EmaConfig = averaging.OFF,
    noise: NoiseConfig = noise_scale.OFF,
) -> TrainStep:
    """`train_step(state, batch) -> (state, metrics)` for a rank's batch [A, B, T]; it consumes the state it gets.

    `sources`: what the sources are called, if there are several. `sync`: as in `accumulated_grads`. `judge`: says
    whether the step is skipped, which then advances the cursor and the step's number, and changes nothing else.
    """
    gradients = make_gradients(grad_fn, seed, world, sync)
    # Without `sync`, for each micro-batch's gradient is to be that of all ranks.
    measured = make_gradients(
        noise_scale.watched(grad_fn, partial(sum_over_ranks, group=world.data_group)), seed, world
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        measures = noise.due(state.step + 1, len(batch["inputs"]))
        grads, (part, aux) = (measured if measures else gradients)(state.params, state.step, batch)
        lr = lr_at(state.step)
        with span("optimizer"):
            grad_norm = clip_by_global_norm(grads, grad_clip)
            loss, is_bad = agreed(part, grad_norm, world)
            guard, skip = judge(state.guard, loss, is_bad) if judge else (state.guard, None)
            params, opt_state = optimizer.update(grads, state.opt_state, state.params, lr, skip)
            ema_params = averaging.update(ema, state.ema, params, state.step + 1, skip)
        consumed = batch["inputs"].shape[0] * batch["inputs"].shape[1] * world.data_size
        metrics: Metrics = {"loss": loss, "lr": lr, "grad_norm": grad_norm}
        metrics |= source_losses(aux, sources, world.data_group) | parts_of_loss(aux, world.data_group)
        if "skipped" in guard:
            metrics["skipped"] = guard["skipped"]
        seen = state.noise
        if measures:
            seen = noise_scale.update(noise, seen, aux[noise_scale.SQUARES], grad_norm, consumed, skip)
        if noise.every and seen:  # as it was last measured, for not every step is logged
            metrics["noise_scale"] = noise_scale.scale(seen)
        after = (state.step + 1, state.samples + consumed, guard, ema_params, seen)
        return TrainState(params, opt_state, *after), metrics

    return train_step


def make_eval_step(
    loss_fn: LossFn, sharded: bool, compile: bool, mode: str = "default", group: ProcessGroup | None = None
) -> EvalStep:
    """`evaluate(params, batches) -> mean loss over all valid targets of the ranks of `group` [nats]`, fp32 []."""
    if compile and not sharded:
        loss_fn = compiled(loss_fn, mode)

    @torch.no_grad()
    def evaluate(params: Params, batches: Iterable[Batch]) -> Tensor:
        total = count = torch.zeros(())
        for batch in batches:
            one = torch.ones((), device=batch["inputs"].device)
            loss_sum, _ = loss_fn(params, {"num_targets": one, **batch})
            total, count = total.to(loss_sum) + loss_sum, count.to(loss_sum) + count_targets(batch["targets"])
        total, count = sum_over_ranks(torch.stack((total, count)), group)
        return total / count

    return evaluate
