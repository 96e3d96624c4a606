"""Models that differ in numbers alone train together: stacked weights, one vmapped gradient, one AdamW over all.

What a member computes is what its own run by the loop would: the same initial weights, batches, schedule and formulas.
It knows recipes and steps, and nothing of sweeps or files. Shapes are in the names: M member · A micro-batch ·
B sequence · T position · D width · V vocabulary.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from modalities import attention, data, devices, fsdp, mup, optim, step
from modalities.compiling import compiled
from modalities.dist import World
from modalities.loss import IGNORED, Batch
from modalities.model import Dropout, Transformer, build_skeleton
from modalities.optim import OptimConfig, OptState, Params, ScheduleConfig
from modalities.recipe import Recipe
from modalities.rng import fold
from modalities.step import TrainState

LossFn = Callable[[Params, Batch, Params, Dropout], Tensor]
"""`loss_fn(params, batch, terms, dropout)` of one member: its weights, a micro-batch, the weights of its loss's terms,
its rates of dropout."""
LIBRARY = torch.library.Library("aten", "IMPL")
"""Holds the rules of `batch_cpu_attention` for as long as the process lives."""
StepFn = Callable[[Params, OptState, list[Batch], Tensor], Tensor]
"""`step(params, opt_state, micro_batches, lr [M]) -> losses [M]`; it changes the first two in place."""


def alike(recipe: Recipe) -> Recipe:
    """What members that train together have in common: `recipe` with what may differ among them set to one value."""
    return replace(
        recipe,
        name="",
        seed=0,
        model=replace(recipe.model, init_std=1.0, embed_dropout=0.0, attn_dropout=0.0, resid_dropout=0.0),
        loss=replace(recipe.loss, z_loss=0.0, label_smoothing=0.0),
        optim=replace(
            recipe.optim, lr=1.0, weight_decay=0.0, betas=(0.0, 0.0), eps=1.0, grad_clip=0.0, schedule=ScheduleConfig()
        ),
    )


def why_alone(recipe: Recipe) -> str | None:
    """The field for which a member must have a run of its own; None if it can train together with others."""
    fields = {
        "optim.kind": recipe.optim.kind != "adamw",
        "model_from": bool(recipe.model_from),
        "ema.decay": recipe.ema.decay > 0,
        "noise.every": recipe.noise.every > 0,
        "distill": recipe.distill.on,
        "guard.spike_sigma": recipe.guard.spike_sigma > 0,
        "parallel.micro_batch": recipe.parallel.micro_batch == "auto",
        "parallel.activation_checkpointing": recipe.parallel.activation_checkpointing != "none",
    }
    return next((name for name, is_set in fields.items() if is_set), None)


@dataclass(frozen=True)
class Together:
    """What the recipes of members become: a step and an evaluation of all of them at once."""

    recipes: tuple[Recipe, ...]
    step: Callable[[TrainState], TrainState]
    """Consumes the state. The loss of each member and step is in `state.opt_state["record"]`; nothing waits for it."""
    evaluate: Callable[[Params], dict[str, Tensor]]
    """Mean loss [M] by name of the validation set."""


def build(recipes: Sequence[Recipe], world: World) -> tuple[Together, TrainState]:
    """The functions of members that are `alike`, and their state at the beginning, for one process."""
    first, device = recipes[0], world.device
    assert all(alike(recipe) == alike(first) and why_alone(recipe) is None for recipe in recipes)
    parallel, micro_batch = fsdp.without_missing_compiler(first.parallel, device), first.parallel.micro_batch
    assert micro_batch != "auto"
    config = replace(first.model, attention=attention_of(recipes, device))
    model = build_skeleton(config)
    each = [fsdp.init_params(build_skeleton(recipe.model), recipe.seed, device) for recipe in recipes]
    params = {name: torch.stack([one.pop(name) for one in each]) for name in list(each[0])}
    devices.keep_freed_memory(params.values(), large_too=True)  # all logits of all members, in every step

    terms, dropout = loss_terms(recipes, device), dropout_of(recipes, device)
    is_random = any(any(recipe.model.dropout) for recipe in recipes)
    by_seed = len({recipe.seed for recipe in recipes}) > 1
    # A CUDA graph would put the gradients of a micro-batch where it has put those before.
    compile, mode = (
        parallel.compile != "off",
        fsdp.WITHOUT_CUDA_GRAPHS.get(parallel.compile_mode, parallel.compile_mode),
    )
    step_fn = make_step(
        make_gradients(make_loss_fn(model, parallel.compute_dtype), terms, dropout, by_seed, is_random),
        make_update(recipes, {name: param.dim() for name, param in params.items()}, device),
        mode if compile else None,
    )
    read = reader(recipes, micro_batch, world)
    # All of them now, for a copy to a GPU in every step would wait for the step before.
    rates = torch.tensor(
        [[optim.learning_rate(r.optim, i, r.steps, r.tokens_after) for r in recipes] for i in range(first.steps)],
        dtype=torch.float64, device=device,
    )  # fmt: skip

    def advance(state: TrainState) -> TrainState:
        batches = read(state.samples)
        if is_random:
            torch.manual_seed(fold(first.seed, "dropout", state.step))
        losses = step_fn(state.params, state.opt_state, batches, rates[state.step])
        record = state.opt_state["record"]
        record["losses"][state.step] = losses
        note_divergence(record, state.step + 1, first.guard.max_bad_steps)
        samples = state.samples + first.data.batch_at(state.samples)
        return TrainState(state.params, state.opt_state, state.step + 1, samples)

    val = data.open_val(first.data, config.vocab_size, first.eval.samples, micro_batch, world)
    # Once a sweep: one after another, without a compiler, they are done before they would be compiled.
    alone = step.make_loss_fn(model, parallel.compute_dtype, train=False, loss=first.loss)
    eval_step = step.make_eval_step(alone, sharded=False, compile=False)

    def evaluate(params: Params) -> dict[str, Tensor]:
        each = [{name: param[m] for name, param in params.items()} for m in range(len(recipes))]
        return {name: torch.stack([eval_step(one, batches) for one in each]) for name, batches in val.items()}

    return Together(tuple(recipes), advance, evaluate), TrainState(params, init(params, first.steps))


def weights_of(state: TrainState, member: int) -> Params:
    """The weights of one member, as its own run would have them."""
    return {name: param[member] for name, param in state.params.items()}


def cut(state: TrainState, keep: Sequence[int]) -> TrainState:
    """The state of the members at these places alone, a copy."""
    opt_state = {
        kind: {name: x[:, keep] if name == "losses" else x[keep] for name, x in tensors.items()}
        for kind, tensors in state.opt_state.items()
    }
    params = {name: param[keep] for name, param in state.params.items()}
    return TrainState(params, opt_state, state.step, state.samples)


# ------------------------------------------------------------------------------------------------------------ attention


def attention_of(recipes: Sequence[Recipe], device: torch.device) -> Literal["manual", "sdpa"]:
    """The backend that vmap takes all members through at once."""
    recipe, rates = recipes[0], {recipe.model.attn_dropout for recipe in recipes}
    if device.type != "cpu":
        return "manual" if len(rates) > 1 else "sdpa"
    masked = recipe.data.document_mask or recipe.model.window is not None
    short = recipe.data.seq_len <= attention.LONGEST_MANUAL
    if short or masked or any(rates) or recipe.data.sampling != "continuous":
        return "manual"  # the kernel for CPUs has no dropout, and takes masks in a way that the rule below does not
    batch_cpu_attention()
    return "sdpa"


@functools.cache
def batch_cpu_attention() -> None:
    """Give the CPU's attention kernel, forward and backward, the rule for vmap that PyTorch has for GPUs' alone.

    Attention has no weights, so members are more sequences of a batch. Without it each would be called by itself.
    """
    from torch._functorch.autograd_function import custom_function_call_vmap_helper
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    def kernel_of(op: Any) -> Callable[..., Any]:
        def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any, **options: Any) -> Any:
            folded = [
                x
                if not isinstance(x, Tensor)
                else (x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
                for x, dim in zip(args, in_dims, strict=True)
            ]
            out = op(*folded, **options)
            return tuple(x.unflatten(0, (info.batch_size, -1)) for x in out), (0,) * len(out)

        def kernel(keyset: Any, *args: Any, **options: Any) -> Any:
            interpreter: Any = retrieve_current_functorch_interpreter()
            return custom_function_call_vmap_helper(interpreter, rule, op, *args, **options)

        return kernel

    for name in ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"):
        kernel = kernel_of(getattr(torch.ops.aten, name).default)
        LIBRARY.impl(name, kernel, "FuncTorchBatched", with_keyset=True)


# ------------------------------------------------------------------------------------------------------------ the loss


def loss_terms(recipes: Sequence[Recipe], device: torch.device) -> Params:
    """The weights fp32 [M] of the loss's terms beside the cross-entropy, by name, of those that some member has."""
    columns = {name: [getattr(recipe.loss, name) for recipe in recipes] for name in ("z_loss", "label_smoothing")}
    return {name: torch.tensor(column, device=device) for name, column in columns.items() if any(column)}


def dropout_of(recipes: Sequence[Recipe], device: torch.device) -> Dropout:
    """The rates, each a number if it is that of all members, else fp32 [M]."""
    columns: Any = zip(*(recipe.model.dropout for recipe in recipes), strict=True)
    return Dropout(*(c[0] if len(set(c)) == 1 else torch.tensor(c, device=device) for c in columns))


def make_loss_fn(model: Transformer, compute_dtype: torch.dtype) -> LossFn:
    """The loss of `step.make_loss_fn` with all logits at once, for the chunked one has no rule for vmap.

    The weights of its terms are tensors [], so that members may differ in them, and in the rates of dropout.
    """
    vocab_size, softcap = model.config.vocab_size, model.config.logit_softcap

    def loss_fn(params: Params, batch: Batch, terms: Params, dropout: Dropout) -> Tensor:
        targets_BT = batch["targets"]

        def head(hidden_BTD: Tensor, weight_VD: Tensor) -> Tensor:
            logits_BTV = F.linear(hidden_BTD, weight_VD[:vocab_size]).float()
            if softcap:
                logits_BTV = softcap * torch.tanh(logits_BTV / softcap)
            normaliser_BT = logits_BTV.logsumexp(-1)
            target_BT = logits_BTV.gather(-1, targets_BT.clamp(min=0)[..., None])[..., 0]
            loss_BT = normaliser_BT - target_BT
            if "label_smoothing" in terms:
                even_BT = normaliser_BT - logits_BTV.mean(-1)
                loss_BT = loss_BT + terms["label_smoothing"] * (even_BT - loss_BT)
            if "z_loss" in terms:
                loss_BT = loss_BT + terms["z_loss"] * normaliser_BT.square()
            return torch.where(targets_BT != IGNORED, loss_BT, 0).sum() / batch["num_targets"]

        weights = {name: param.to(compute_dtype) for name, param in params.items()}
        inputs = (batch["inputs"], batch.get("positions"), batch.get("documents"))
        return functional_call(model, weights, inputs, {"train": dropout, "head": head})

    return loss_fn


def make_gradients(
    loss_fn: LossFn, terms: Params, dropout: Dropout, by_seed: bool, is_random: bool
) -> Callable[[Params, Batch], tuple[Params, Tensor]]:
    """`gradients(params, batch) -> (grads, losses [M])`; `by_seed`: whether each member has a batch of its own.

    `is_random`: whether there is dropout, each member's its own. The draws differ from those of a run by itself.
    """
    one = torch.func.grad_and_value(loss_fn)
    randomness = "different" if is_random else "error"
    of_rates = Dropout._make(0 if isinstance(rate, Tensor) else None for rate in dropout)
    every = torch.func.vmap(one, in_dims=(0, 0 if by_seed else None, 0, of_rates), randomness=randomness)

    def gradients(params: Params, batch: Batch) -> tuple[Params, Tensor]:
        return every(params, batch, terms, dropout)

    return gradients


# ----------------------------------------------------------------------------------------------------------- the state


def init(params: Params, steps: int) -> OptState:
    """AdamW's state, and the members' record: `losses` fp32 [steps, M], NaN where there is none yet; `updates` [M] that
    a member has made; `bad` [M], steps in a row that were not finite; `diverged` [M], the first of too many, or 0."""
    first = next(iter(params.values()))
    size, device = len(first), first.device
    counts = {name: torch.zeros(size, dtype=torch.float64, device=device) for name in ("updates", "bad", "diverged")}
    return {
        "exp_avg": {name: torch.zeros_like(param) for name, param in params.items()},
        "exp_avg_sq": {name: torch.zeros_like(param) for name, param in params.items()},
        "record": {"losses": torch.full((steps, size), math.nan, device=device), **counts},
    }


def note_divergence(record: Params, done: int, max_bad_steps: int) -> None:
    """After step `done`: a member with so many bad steps in a row has diverged, and stays as it was before them."""
    is_new = (record["bad"] >= max_bad_steps) & (record["diverged"] == 0)
    record["diverged"].add_(is_new * (done - max_bad_steps + 1))


# ----------------------------------------------------------------------------------------------------------- optimizer


def hyperparameters(configs: Sequence[OptimConfig], device: torch.device) -> Params:
    """What AdamW takes of each member, fp64 [M] by name."""
    rows = {
        "beta1": [config.betas[0] for config in configs],
        "beta2": [config.betas[1] for config in configs],
        "eps": [config.eps for config in configs],
        "decay": [config.weight_decay for config in configs],
        "clip": [config.grad_clip or math.inf for config in configs],
    }
    return {name: torch.tensor(row, dtype=torch.float64, device=device) for name, row in rows.items()}


def make_update(
    recipes: Sequence[Recipe], dims: Mapping[str, int], device: torch.device
) -> Callable[[Params, Params, OptState, Tensor, Tensor], None]:
    """`update(params, grads, opt_state, losses [M], lr [M])`: clipping and AdamW of all members, in place.

    `dims`: of each stacked tensor, by name.

    The formulas of `torch.optim.AdamW(fused=True)`, which the loop takes, with a number for each member. A member whose
    loss or gradient is not finite keeps every bit, as it would by itself.
    """
    config, of = recipes[0].optim, hyperparameters([recipe.optim for recipe in recipes], device)
    decays = optim.decay_multiples(config.decay_rules, list(dims))
    model = recipes[0].model
    kinds = {name: (dim, mup.multiples(model, name, "adamw"), decays[name]) for name, dim in dims.items()}

    def update(params: Params, grads: Params, opt_state: OptState, losses: Tensor, lr: Tensor) -> None:
        record = opt_state["record"]
        norms = torch.stack([squares(grad) for grad in grads.values()]).sum(0).sqrt()
        is_bad = ~(norms.isfinite() & losses.isfinite())
        skip = is_bad | (record["diverged"] > 0)
        record["bad"].copy_((record["bad"] + 1) * is_bad)
        record["updates"].add_(~skip)
        # In fp64, for 1 - beta2 loses digits in fp32.
        rate = lr / (1 - of["beta1"] ** record["updates"])
        root = (1 - of["beta2"] ** record["updates"]).sqrt()
        scale = (of["clip"].float() / (norms + 1e-6)).clamp(max=1.0)

        def columns(dim: int, times: mup.Multiples, decay: float) -> list[Tensor]:
            shrink = 1 - lr * of["decay"] * (times.lr * decay * times.weight_decay)
            numbers = (1 - of["beta1"], of["beta2"], 1 - of["beta2"], root, of["eps"] * times.eps, shrink)
            return [as_column(number, dim) for number in (skip, scale, rate * times.lr, *numbers)]

        # Few differ, and the compiler looks at every one.
        shared = {kind: columns(*kind) for kind in dict.fromkeys(kinds.values())}
        for name, param in params.items():
            skipped, clip, step_size, gain1, beta2, gain2, norm, eps, shrink = shared[kinds[name]]
            mean, square = opt_state["exp_avg"][name], opt_state["exp_avg_sq"][name]
            grad = grads[name] * clip
            new_mean = mean + (grad - mean) * gain1
            new_square = square * beta2 + grad * grad * gain2
            new_param = param * shrink - step_size * new_mean / (new_square.sqrt() / norm + eps)
            for old, new in ((mean, new_mean), (square, new_square), (param, new_param)):
                old.copy_(torch.where(skipped, old, new))

    return update


def squares(grad: Tensor) -> Tensor:
    """The sum of squares [M] of the members' gradients [M, …]; row by row, as `optim.global_norm` has it."""
    return torch.linalg.vector_norm(grad, dim=-1).square().view(len(grad), -1).sum(1)


def as_column(values: Tensor, dim: int) -> Tensor:
    """A number or truth for each member, [M], in the shape that broadcasts with stacked tensors of `dim` dimensions."""
    return (values if values.dtype == torch.bool else values.float()).view(-1, *(1,) * (dim - 1))


def make_step(
    gradients: Callable[[Params, Batch], tuple[Params, Tensor]],
    update: Callable[[Params, Params, OptState, Tensor, Tensor], None],
    mode: str | None,
) -> StepFn:
    """One step of all members: one program where a step has one micro-batch, else two; `mode` None: not compiled."""

    def one(params: Params, opt_state: OptState, batch: Batch, lr: Tensor) -> Tensor:
        grads, losses = gradients(params, batch)
        update(params, grads, opt_state, losses, lr)
        return losses

    def program(function: Callable[..., Any]) -> Callable[..., Any]:
        return compiled(function, mode) if mode else function

    whole, part, end = program(one), program(gradients), program(update)

    @torch.no_grad()
    def step_fn(params: Params, opt_state: OptState, batches: list[Batch], lr: Tensor) -> Tensor:
        if len(batches) == 1:
            return whole(params, opt_state, batches[0], lr)
        grads, losses = part(params, batches[0])
        for batch in batches[1:]:
            more, partial = part(params, batch)
            torch._foreach_add_(list(grads.values()), [more[name] for name in grads])
            losses = losses + partial
        end(params, grads, opt_state, losses, lr)
        return losses

    return step_fn


# ----------------------------------------------------------------------------------------------------------- the batch


def reader(recipes: Sequence[Recipe], micro_batch: int, world: World) -> Callable[[int], list[Batch]]:
    """`read(samples)`: the micro-batches of the step that begins there, [B, T]; with several seeds [M, B, T].

    The stream of a seed is read once for all members that have it.
    """
    config, vocab_size = recipes[0].data, recipes[0].model.vocab_size
    seeds = list(dict.fromkeys(recipe.seed for recipe in recipes))
    streams = [data.TrainData(config, vocab_size, seed, micro_batch, world) for seed in seeds]
    of_member = [seeds.index(recipe.seed) for recipe in recipes]

    def read(samples: int) -> list[Batch]:
        by_seed = [list(step.micro_batches(stream.batch(samples))) for stream in streams]
        for batch in itertools.chain.from_iterable(by_seed):
            batch.pop("sources", None)  # the loss of each source is not told apart here
        if len(seeds) == 1:
            return by_seed[0]
        return [
            {key: torch.stack([micro[s][key] for s in of_member]) for key in micro[0]}
            for micro in zip(*by_seed, strict=True)
        ]

    return read
