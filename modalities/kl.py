"""Distillation: the head's cross-entropy mixed with the divergence from a teacher, chunk by chunk of tokens.

It knows hidden states, the weights of the heads and targets, not models, ranks or files. Neither model's logits ever
exist in full. A teacher speaks through a batch: `teacher_hidden` [B, T, E] and `teacher_weight` [V, E], its last hidden
states and its head; or `teacher_words` [B, T, K] and `teacher_log_probs` [B, T, K + 1], what it wrote down before.
Shapes as in `loss`, and E the teacher's width · K words that it named.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from modalities.loss import (
    IGNORED,
    Aux,
    Batch,
    LossConfig,
    choose,
    math_dtype,
    maybe_compiled,
    row_blocks,
    softcapped,
    token_chunk_,
)

# What of a batch the operator is given, in its order.
OF_TEACHER = ("teacher_hidden", "teacher_weight", "teacher_words", "teacher_log_probs")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Learning from a trained model as well as from the data (Hinton et al., arXiv 1503.02531)."""

    teacher: str = ""
    """A run, a checkpoint or a Hugging Face folder of the same vocabulary; empty: no teacher, or teacher_topk."""
    teacher_topk: str = ""
    """Instead of the teacher: what `modalities.evaluate TEACHER --data TRAIN.pbin --save-topk FILE` wrote. The words
    that are not in it count as one, which has the rest of the probability."""
    weight: float = 0.5
    """Share of the divergence in the loss; the rest is the data's."""
    temperature: float = 1.0
    """Both models' logits are divided by it; the divergence is multiplied by its square, so that gradients stay."""
    kind: Literal["forward", "reverse"] = "forward"
    """forward: KL(teacher ‖ student), to cover what the teacher holds possible; reverse: KL(student ‖ teacher), to do
    nothing that it holds impossible (Gu et al., arXiv 2306.08543)."""

    def __post_init__(self) -> None:
        if self.teacher and self.teacher_topk:
            raise ValueError("distill.teacher and distill.teacher_topk are both given; give one of them")
        if not 0 < self.weight <= 1:
            raise ValueError(f"distill.weight is {self.weight}, but must be more than 0 and at most 1")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"distill.temperature is {self.temperature}, but must be positive and finite")

    @property
    def on(self) -> bool:
        return bool(self.teacher or self.teacher_topk)


def distillation(
    config: DistillConfig,
    teacher_softcap: float,
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    targets_BT: Tensor,
    loss: LossConfig,
    vocab_size: int,
    softcap: float,
    num_targets: Tensor | float,
    compile: bool,
    batch: Batch,
) -> tuple[Tensor, Tensor, Aux]:
    """(loss [] to be minimised, -log p(target) [B, T], detached, aux) by what the `batch` holds of a teacher.

    The loss is the sum of (1 - weight) · what `linear_cross_entropy` has, plus weight · temperature² · KL [nats], over
    the positions whose target is not -100, divided by `num_targets`. `aux` has the two parts `data_loss` (pure, before
    smoothing and z-loss) and `kl_loss` (times temperature²), each divided by `num_targets` and not yet weighted.
    """
    assert not isinstance(weight_VD, DTensor), "a head split among ranks was to be refused"
    hidden_ND, targets_N = hidden_BTD.flatten(0, -2), targets_BT.flatten()
    scale = torch.ones((), device=hidden_BTD.device, dtype=math_dtype(hidden_BTD)) / num_targets
    teacher = (batch[name].flatten(0, -2) if name in batch else None for name in OF_TEACHER)
    plain = choose(loss, len(targets_N), vocab_size, hidden_BTD.dtype) == "plain"
    total, nll_N, kl_N, _, _ = _Distilled.apply(
        hidden_ND, weight_VD, targets_N, scale, *teacher,
        softcap, loss.label_smoothing, loss.z_loss,
        teacher_softcap, config.temperature, config.weight, config.kind == "reverse",
        vocab_size, len(targets_N) if plain else loss.chunk_tokens,
        torch.is_grad_enabled(), compile or torch.compiler.is_compiling(),
    )  # fmt: skip
    aux = {"data_loss": (nll_N.sum() * scale).detach(), "kl_loss": (kl_N.sum() * scale).detach()}
    return total, nll_N.view(targets_BT.shape), aux


def lumped(log_p_NV: Tensor, words_NK: Tensor, log_probs_NC: Tensor) -> Tensor:
    """The teacher's log-probabilities [N, V] by those of K words and, last, of the rest, in which it is the student.

    So the divergence is the one between K + 1 outcomes, the last of which is any other word; and its gradient too.
    """
    # What was rounded on its way into a file is made to add up to one again.
    known_NC = log_probs_NC.to(log_p_NV.dtype).log_softmax(1)
    words_NK = words_NK.long()
    rest_N1 = log_p_NV.scatter(1, words_NK, -torch.inf).logsumexp(1, keepdim=True)
    return (log_p_NV + (known_NC[:, -1:] - rest_N1)).scatter(1, words_NK, known_NC[:, :-1])


def _chunk_(
    logits_NV: Tensor,
    targets_N: Tensor,
    scale_N: Tensor,
    teacher_NV: Tensor | None,
    words_NK: Tensor | None,
    log_probs_NC: Tensor | None,
    softcap: float,
    smoothing: float,
    z: float,
    teacher_softcap: float,
    temperature: float,
    weight: float,
    reverse: bool,
    with_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, -log p(target), KL times temperature²) of some tokens, [N].

    Puts the loss's gradient in place of the logits.
    """
    grads_NV = logits_NV.to(math_dtype(logits_NV), copy=True)
    student_NV = softcapped(logits_NV, softcap)
    log_p_NV = (student_NV / temperature).log_softmax(1)
    if teacher_NV is not None:
        log_q_NV = (softcapped(teacher_NV, teacher_softcap) / temperature).log_softmax(1)
    else:
        assert words_NK is not None and log_probs_NC is not None
        log_q_NV = lumped(log_p_NV, words_NK, log_probs_NC)
    p_NV, surplus_NV = log_p_NV.exp(), log_p_NV - log_q_NV
    if reverse:
        kl_N = (p_NV * surplus_NV).sum(1)
        kl_grads_NV = p_NV * (surplus_NV - kl_N[:, None])
    else:
        q_NV = log_q_NV.exp()
        kl_N = -(q_NV * surplus_NV).sum(1)
        kl_grads_NV = p_NV - q_NV
    kl_N = torch.where(targets_N != IGNORED, temperature**2 * kl_N, 0)
    loss_N, nll_N, _, _ = token_chunk_(grads_NV, targets_N, (1 - weight) * scale_N, softcap, smoothing, z, with_grads)
    if with_grads:
        if softcap:
            kl_grads_NV = kl_grads_NV * (1 - (student_NV / softcap).square())
        scale_N1 = scale_N[:, None]
        # One temperature of the square is gone with the division of the logits. Chosen, for 0 times infinity is none.
        logits_NV.copy_(grads_NV + torch.where(scale_N1 != 0, (weight * temperature * scale_N1) * kl_grads_NV, 0))
    return (1 - weight) * loss_N + weight * kl_N, nll_N, kl_N


# An operator of its own for the reason that `loss` gives, and made like the one there.
torch.library.define(
    "modalities::linear_distillation",
    "(Tensor hidden_ND, Tensor weight_VD, Tensor targets_N, Tensor scale, "
    "Tensor? teacher_hidden_NE, Tensor? teacher_weight_VE, Tensor? words_NK, Tensor? log_probs_NC, "
    "float softcap, float smoothing, float z, float teacher_softcap, float temperature, float weight, bool reverse, "
    "int vocab_size, int chunk_tokens, bool with_grads, bool compile) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("modalities::linear_distillation", "Autograd")(torch.library.fallthrough_kernel)


def _in_chunks(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    scale: Tensor,
    teacher_hidden_NE: Tensor | None,
    teacher_weight_VE: Tensor | None,
    words_NK: Tensor | None,
    log_probs_NC: Tensor | None,
    softcap: float,
    smoothing: float,
    z: float,
    teacher_softcap: float,
    temperature: float,
    weight: float,
    reverse: bool,
    vocab_size: int,
    chunk_tokens: int,
    with_grads: bool,
    compile: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], -log p(target) [N], KL [N], gradients of hidden [N, D] and weight [V, D], which are empty without)."""
    terms = (softcap, smoothing, z, teacher_softcap, temperature, weight, reverse, with_grads)
    chunk_ = maybe_compiled(_chunk_, compile)
    scale_N = torch.where(targets_N != IGNORED, scale, 0)
    loss_N, nll_N, kl_N = (torch.empty_like(scale_N) for _ in range(3))
    hidden_grad_ND, weight_grad_VD = (torch.empty_like(x if with_grads else x[:0]) for x in (hidden_ND, weight_VD))
    # What chunks have to say of the weight is added up in full precision, and rounded once.
    sum_VD = torch.zeros_like(weight_VD if with_grads else weight_VD[:0], dtype=scale.dtype)
    words_VD = weight_VD[:vocab_size]
    for first in range(0, len(hidden_ND), chunk_tokens):
        chunk = slice(first, first + chunk_tokens)
        logits_NV = hidden_ND[chunk] @ words_VD.T
        teacher_NV = None
        if teacher_hidden_NE is not None and teacher_weight_VE is not None:
            teacher_NV = teacher_hidden_NE[chunk] @ teacher_weight_VE[:vocab_size].T
        of_tokens = [x if x is None else x[chunk] for x in (targets_N, scale_N, words_NK, log_probs_NC)]
        for rows in row_blocks(logits_NV, compile):
            targets, scales, words, log_probs = (x if x is None else x[rows] for x in of_tokens)
            teacher = None if teacher_NV is None else teacher_NV[rows]
            loss_N[chunk][rows], nll_N[chunk][rows], kl_N[chunk][rows] = chunk_(
                logits_NV[rows], targets, scales, teacher, words, log_probs, *terms
            )
        if with_grads:
            torch.mm(logits_NV, words_VD, out=hidden_grad_ND[chunk])
            sum_VD[:vocab_size] += logits_NV.T @ hidden_ND[chunk]
    return loss_N.sum() * scale, nll_N, kl_N, hidden_grad_ND, weight_grad_VD.copy_(sum_VD)


torch.library.impl("modalities::linear_distillation", "CompositeExplicitAutograd", _in_chunks)


@torch.library.register_fake("modalities::linear_distillation")
def _shapes(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, scale: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with_grads = options[-2]
    nll_N, kl_N = (scale.new_empty(len(targets_N)) for _ in range(2))
    hidden_grad_ND, weight_grad_VD = (torch.empty_like(x if with_grads else x[:0]) for x in (hidden_ND, weight_VD))
    return torch.empty_like(scale), nll_N, kl_N, hidden_grad_ND, weight_grad_VD


class _Distilled(torch.autograd.Function):
    """The gradients are made with the loss, from the same logits; a backward pass only scales them."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return torch.ops.modalities.linear_distillation(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[3:])
        ctx.num_inputs = len(inputs)

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grads = (grad * loss_grad for grad in ctx.saved_tensors)
        return *grads, *(None for _ in range(ctx.num_inputs - 2))
