"""The loss contract, and the cross-entropy of a linear layer's logits with or without materialising them.

It knows hidden states, the head's weight and targets, not models or ranks. Shapes are in the names: B batch ·
T position · N = B·T tokens · D width · V vocabulary · S source.

The contract: `loss_fn(params, batch) -> (loss, aux)`, where `loss` is a *sum* over this micro-batch's valid targets
divided by `batch["num_targets"]`, the number of valid targets in the whole global batch. Losses and gradients of
micro-batches and ranks then add up to those of the global batch, however it is cut. `aux` is a dict of tensors that add
up the same way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor, Partial, Shard

from modalities.compiling import with_own_code

Batch = dict[str, Tensor]
Aux = dict[str, Tensor]
LossFn = Callable[[dict[str, Tensor], Batch], tuple[Tensor, Aux]]
Implementation = Literal["plain", "chunked"]

IGNORED = -100  # the target of a position that does not count; PyTorch's convention
EAGER_BLOCK = 2**18  # logits
PLAIN_BYTES = 2**26  # smaller logits are materialised: benchmarks/RESULTS.md has where the two take equal time


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised, and how it is computed."""

    z_loss: float = 0.0
    """Weight of logsumexp(logits)², which keeps logits small (PaLM, arXiv 2204.02311, uses 1e-4)."""
    label_smoothing: float = 0.0
    """Share of the target distribution that is spread evenly over the vocabulary."""
    implementation: Literal["auto", "plain", "chunked"] = "auto"
    """plain: all logits at once; chunked: never more than `chunk_tokens` tokens' logits; auto: by the logits' size."""
    chunk_tokens: int = 512
    """Tokens whose logits exist at a time, where chunked; more is faster up to a point."""

    def __post_init__(self) -> None:
        if not 0 <= self.z_loss < float("inf"):
            raise ValueError(f"loss.z_loss is {self.z_loss}, but must not be negative, and finite")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"loss.label_smoothing is {self.label_smoothing}, but must be at least 0 and less than 1")
        if self.chunk_tokens < 1:
            raise ValueError(f"loss.chunk_tokens is {self.chunk_tokens}, but must be at least 1")


NLL = LossConfig()
"""The cross-entropy alone."""


def choose(config: LossConfig, num_tokens: int, vocab_size: int, dtype: torch.dtype) -> Implementation:
    """The implementation for `num_tokens` tokens of a micro-batch, their logits in `dtype`."""
    if config.implementation != "auto":
        return config.implementation
    return "plain" if num_tokens * vocab_size * dtype.itemsize < PLAIN_BYTES else "chunked"


def linear_cross_entropy(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    targets_BT: Tensor,
    config: LossConfig,
    vocab_size: int,
    softcap: float = 0.0,
    num_targets: Tensor | float = 1.0,
    compile: bool = False,
    master_VD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the logits `hidden @ weight.T`: (loss [] to be minimised, -log p(target) [B, T], detached).

    The loss is the sum of -log p(target) [nats], smoothed, plus z_loss · logsumexp², over the positions whose target is
    not -100, divided by `num_targets`; the second is pure, and 0 where the target is -100. Both are in at least fp32.
    The weight's rows from `vocab_size` on are padding and take no part. `softcap` c: c · tanh(logits / c), 0 for none.
    `compile`: compile what is done with a chunk, although the caller is not compiled. Where the weight is a DTensor,
    its rows split among ranks that have the same hidden states, each has the logits of its own words alone.
    `master`: what the weight was cast from; chunked, the gradient is made for it instead, which takes less time.
    """
    first_word, group = 0, ""
    if isinstance(weight_VD, DTensor):
        mesh = weight_VD.device_mesh
        assert isinstance(hidden_BTD, DTensor) and weight_VD.placements == (Shard(0),)
        # A rank knows what its own words have to say of the hidden states' gradient: the sum of all is wanted.
        hidden_BTD, weight_VD = hidden_BTD.to_local(grad_placements=(Partial(),)), weight_VD.to_local()
        first_word, group = mesh.get_local_rank() * len(weight_VD), mesh.get_group().group_name
    hidden_ND, targets_N = hidden_BTD.flatten(0, -2), targets_BT.flatten()
    # The gradients are rounded to the dtype of the weights after the division: once, as in a backward pass.
    scale = torch.ones((), device=hidden_BTD.device, dtype=math_dtype(hidden_BTD)) / num_targets
    terms = (softcap, config.label_smoothing, config.z_loss)
    plain = choose(config, len(targets_N), min(vocab_size, len(weight_VD)), hidden_BTD.dtype) == "plain"
    if plain and not group:
        loss, nll_N = _plain(hidden_ND, weight_VD[:vocab_size], targets_N, scale, *terms)
    else:
        chunk_tokens = len(targets_N) if plain else config.chunk_tokens
        options = (chunk_tokens, torch.is_grad_enabled(), compile or torch.compiler.is_compiling())
        words = (vocab_size, first_word, group)
        if master_VD is not None and master_VD.dtype == weight_VD.dtype:
            master_VD = None  # it may be the weight itself
        loss, nll_N, _, _ = _Chunked.apply(hidden_ND, weight_VD, master_VD, targets_N, scale, *terms, *words, *options)
    return loss, nll_N.view(targets_BT.shape)


def math_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _plain(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, scale: Tensor, softcap: float, smoothing: float, z: float
) -> tuple[Tensor, Tensor]:
    logits_NV = F.linear(hidden_ND, weight_VD).to(math_dtype(hidden_ND))
    if softcap:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    nll_N = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="none")
    loss_N = nll_N
    if smoothing:
        loss_N = F.cross_entropy(
            logits_NV, targets_N, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing
        )
    if z:
        loss_N = loss_N + torch.where(targets_N != IGNORED, z * logits_NV.logsumexp(1).square(), 0)
    return loss_N.sum() * scale, nll_N.detach()


# ---------------------------------------------------------------------------------------------------------- in chunks
#
# A chunk is some tokens and the whole vocabulary: it has their loss, one product for the gradient of their hidden
# states, and one for their share of the weight's gradient. Shares are added up in fp32. To a weight of 16 bits that
# gradient would then be rounded twice, so it gets a second pass, which takes all tokens and some of the vocabulary: the
# logits are computed twice, but the gradient of these rows of the weight is one product, rounded once.


def token_chunk_(
    logits_NV: Tensor, targets_N: Tensor, scale_N: Tensor, softcap: float, smoothing: float, z: float, with_grads: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, -log p(target), m, Σ exp(logit - m)) of some tokens, [N], m the largest logit.

    Puts the loss's gradient in place of the logits.
    """
    logits = softcapped(logits_NV, softcap)
    max_N = logits.amax(1)
    sum_N = torch.exp(logits - max_N[:, None]).sum(1)
    target_logit_N = logits.gather(1, targets_N.clamp(min=0)[:, None])[:, 0]
    mean_N = logits.mean(1) if smoothing else max_N
    loss_N, nll_N = _loss_terms(targets_N, max_N, sum_N, target_logit_N, mean_N, smoothing, z)
    if with_grads:
        words_V = torch.arange(logits.shape[1], device=logits.device, dtype=torch.int32)
        # In int32, of which a vector register holds as many as of fp32.
        targets_N1, max_N1, sum_N1, scale_N1 = (x[:, None] for x in (targets_N.to(torch.int32), max_N, sum_N, scale_N))
        _logits_to_grads_(
            logits_NV, words_V, targets_N1, max_N1, sum_N1, scale_N1, logits.shape[1], softcap, smoothing, z
        )
    return loss_N, nll_N, max_N, sum_N


def _loss_terms(
    targets_N: Tensor, max_N: Tensor, sum_N: Tensor, target_logit_N: Tensor, mean_N: Tensor, smoothing: float, z: float
) -> tuple[Tensor, Tensor]:
    """(loss, -log p(target)) of some tokens by m, Σ exp(logit - m), the target's logit and the mean of the logits."""
    # m and the logarithm stay apart, for their sum has lost digits that the probabilities of large logits need.
    is_valid_N, log_sum_N = targets_N != IGNORED, sum_N.log()
    nll_N = torch.where(is_valid_N, log_sum_N - (target_logit_N - max_N), 0)
    loss_N = nll_N
    if smoothing:
        even_N = torch.where(is_valid_N, log_sum_N - (mean_N - max_N), 0)
        loss_N = (1 - smoothing) * nll_N + smoothing * even_N
    if z:
        loss_N = loss_N + torch.where(is_valid_N, z * (max_N + log_sum_N).square(), 0)
    return loss_N, nll_N


def _logits_to_grads_(
    logits: Tensor,
    words: Tensor,
    targets: Tensor,
    max_: Tensor,
    sum_: Tensor,
    scale: Tensor,
    vocab_size: int,
    softcap: float,
    smoothing: float,
    z: float,
) -> None:
    """Put the loss's gradient in place of the logits of some words and tokens.

    `words` are the words, and the rest is of the tokens, both in a shape that broadcasts with the logits.
    """
    capped, share = softcapped(logits, softcap), 1 / sum_
    if z:
        share = share * (1 + 2 * z * (max_ + sum_.log()))
    grads = torch.exp(capped - max_) * share
    grads = torch.where(words == targets, grads - (1 - smoothing), grads)
    if smoothing:
        grads = grads - smoothing / vocab_size
    if softcap:
        grads = grads * (1 - (capped / softcap).square())
    # Chosen and not multiplied by 0, so that nothing of an ignored position gets through, be it infinite.
    logits.copy_(torch.where(scale != 0, grads * scale, 0))


def _largest(logits_NV: Tensor, softcap: float) -> Tensor:
    return softcapped(logits_NV, softcap).amax(1)


def _sums(logits_NV: Tensor, targets_N: Tensor, max_N: Tensor, softcap: float, first_word: int) -> Tensor:
    """What adds up over the ranks that share the words [3, N]: Σ exp(logit - m), the target's logit, Σ logit."""
    logits, word_N = softcapped(logits_NV, softcap), targets_N - first_word
    is_here_N = (word_N >= 0) & (word_N < logits.shape[1])
    target_logit_N = logits.gather(1, torch.where(is_here_N, word_N, 0)[:, None])[:, 0]
    sum_N = torch.exp(logits - max_N[:, None]).sum(1)
    return torch.stack((sum_N, torch.where(is_here_N, target_logit_N, 0), logits.sum(1)))


def _shared_token_chunk_(
    logits_NV: Tensor,
    targets_N: Tensor,
    scale_N: Tensor,
    softcap: float,
    smoothing: float,
    z: float,
    with_grads: bool,
    vocab_size: int,
    first_word: int,
    group: str,
    compile: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`token_chunk_` where this rank has the logits of the words from `first_word` on, and `group` has all."""
    ranks = _resolve_process_group(group)  # type: ignore[arg-type]
    max_N = maybe_compiled(_largest, compile)(logits_NV, softcap)
    torch.distributed.all_reduce(max_N, torch.distributed.ReduceOp.MAX, group=ranks)
    sums_3N = maybe_compiled(_sums, compile)(logits_NV, targets_N, max_N, softcap, first_word)
    torch.distributed.all_reduce(sums_3N, group=ranks)
    sum_N, target_logit_N, all_N = sums_3N
    loss_N, nll_N = _loss_terms(targets_N, max_N, sum_N, target_logit_N, all_N / vocab_size, smoothing, z)
    if with_grads:
        words_V = torch.arange(logits_NV.shape[1], device=logits_NV.device, dtype=torch.int32) + first_word
        of_tokens = (x[:, None] for x in (targets_N.to(torch.int32), max_N, sum_N, scale_N))
        maybe_compiled(_logits_to_grads_, compile)(logits_NV, words_V, *of_tokens, vocab_size, softcap, smoothing, z)
    return loss_N, nll_N, max_N, sum_N


def softcapped(logits_NV: Tensor, softcap: float) -> Tensor:
    logits = logits_NV.to(math_dtype(logits_NV))
    return softcap * torch.tanh(logits / softcap) if softcap else logits


@cache
def _program(function: Callable[..., Any], *_: Any) -> Callable[..., Any]:
    return torch.compile(with_own_code(function), fullgraph=True)


def maybe_compiled(function: Callable[..., Any], compile: bool) -> Callable[..., Any]:
    """`function`, compiled apart for each dtype and each value of what is not a tensor, so for any number of them."""

    def call(*args: Any) -> Any:
        return _program(function, *(x.dtype if isinstance(x, Tensor) else x for x in args))(*args)

    return call if compile else function


def row_blocks(logits: Tensor, compile: bool) -> list[slice]:
    """Rows to be worked on at a time. Uncompiled code has intermediate results, which shall stay in the cache."""
    num_rows, num_columns = logits.shape
    rows = max(1, EAGER_BLOCK // num_columns) if logits.device.type == "cpu" and not compile else num_rows
    return [slice(i, i + rows) for i in range(0, num_rows, rows)]


# An operator of its own, for compiling would unroll the loops, and fuse chunks until all logits exist at once.
torch.library.define(
    "modalities::linear_cross_entropy",
    "(Tensor hidden_ND, Tensor weight_VD, Tensor? master_VD, Tensor targets_N, Tensor scale, float softcap, "
    "float smoothing, float z, int vocab_size, int first_word, str group, int chunk_tokens, bool with_grads, "
    "bool compile) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("modalities::linear_cross_entropy", "Autograd")(torch.library.fallthrough_kernel)


def _in_chunks(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    master_VD: Tensor | None,
    targets_N: Tensor,
    scale: Tensor,
    softcap: float,
    smoothing: float,
    z: float,
    vocab_size: int,
    first_word: int,
    group: str,
    chunk_tokens: int,
    with_grads: bool,
    compile: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [], -log p(target) [N], gradients of hidden [N, D] and weight [V, D], which are empty without grads).

    The weight's is in the dtype of `master`, if that is given. With a `group` the weight's rows are the words from
    `first_word` on, and the hidden states' gradient is theirs.
    """
    num_tokens = len(hidden_ND)
    chunk_tokens = min(chunk_tokens, num_tokens)
    chunk_ = maybe_compiled(token_chunk_, compile)
    if group:
        chunk_ = partial(
            _shared_token_chunk_, vocab_size=vocab_size, first_word=first_word, group=group, compile=compile
        )
    scale_N = torch.where(targets_N != IGNORED, scale, 0)
    loss_N, nll_N, max_N, sum_N = (torch.empty_like(scale_N) for _ in range(4))
    hidden_grad_ND, weight_grad_VD = _empty_grads(hidden_ND, weight_VD, master_VD, with_grads)
    num_words = min(len(weight_VD), vocab_size - first_word)
    weight_grad_VD[num_words:] = 0
    adds_up = weight_grad_VD.dtype == scale.dtype
    weight_VD = weight_VD[:num_words]
    # One buffer for all logits: fresh memory for each chunk would cost more than what is done with it.
    logits = hidden_ND.new_empty(chunk_tokens * num_words)
    for first in range(0, num_tokens, chunk_tokens):
        chunk = slice(first, first + chunk_tokens)
        hidden, targets, scales = hidden_ND[chunk], targets_N[chunk], scale_N[chunk]
        logits_NV = logits[: len(hidden) * num_words].view(len(hidden), num_words)
        torch.mm(hidden, weight_VD.T, out=logits_NV)
        # In one piece where ranks exchange sums, for they may have different numbers of words.
        for rows in row_blocks(logits_NV, compile or bool(group)):
            loss_N[chunk][rows], nll_N[chunk][rows], max_N[chunk][rows], sum_N[chunk][rows] = chunk_(
                logits_NV[rows], targets[rows], scales[rows], softcap, smoothing, z, with_grads
            )
        if with_grads:
            # Transposed, which oneDNN has ready in two thirds of the time.
            hidden_grad_ND[chunk] = torch.mm(weight_VD.T, logits_NV.T).T
            if adds_up:
                _add_product_(weight_grad_VD[:num_words], logits_NV, hidden, is_first=first == 0)
    if with_grads and not adds_up:
        of_tokens = (targets_N.to(torch.int32), max_N, sum_N, scale_N)
        terms = (vocab_size, softcap, smoothing, z)
        _weight_gradient(
            weight_grad_VD[:num_words], weight_VD, hidden_ND, logits, of_tokens, first_word, terms, compile
        )
    return loss_N.sum() * scale, nll_N, hidden_grad_ND, weight_grad_VD


def _empty_grads(
    hidden_ND: Tensor, weight_VD: Tensor, master_VD: Tensor | None, with_grads: bool
) -> tuple[Tensor, Tensor]:
    of = (hidden_ND, weight_VD if master_VD is None else master_VD)
    hidden_grad_ND, weight_grad_VD = (torch.empty_like(x if with_grads else x[:0]) for x in of)
    return hidden_grad_ND, weight_grad_VD


def _add_product_(sum_VD: Tensor, grads_NV: Tensor, hidden_ND: Tensor, is_first: bool) -> None:
    """Add gradsᵀ · hidden to the sum, or put it there as the first of what is added up."""
    # Some rows at a time, for as long as a CPU's cache has their product at hand.
    words = 2048 if sum_VD.device.type == "cpu" else len(sum_VD)
    for first in range(0, len(sum_VD), words):
        rows = slice(first, first + words)
        share_VD = torch.mm(grads_NV[:, rows].T, hidden_ND)
        sum_VD[rows].copy_(share_VD) if is_first else sum_VD[rows].add_(share_VD)


def _weight_gradient(
    grads_VD: Tensor,
    weight_VD: Tensor,
    hidden_ND: Tensor,
    logits: Tensor,
    of_tokens: tuple[Tensor, ...],
    first_word: int,
    terms: tuple[int, float, float, float],
    compile: bool,
) -> None:
    """Fill the weight's gradient; `logits` is memory for those of some words, which are computed once more."""
    chunk_words = max(1, len(logits) // len(hidden_ND))
    for first in range(0, len(weight_VD), chunk_words):
        chunk = slice(first, min(first + chunk_words, len(weight_VD)))
        weight = weight_VD[chunk]
        # A row for each word: the product takes half the time of one from a row for each token.
        logits_VN = logits[: len(hidden_ND) * len(weight)].view(len(weight), len(hidden_ND))
        torch.mm(weight, hidden_ND.T, out=logits_VN)
        words_V1 = torch.arange(chunk.start, chunk.stop, device=logits.device, dtype=torch.int32)[:, None] + first_word
        for rows in row_blocks(logits_VN, compile):
            maybe_compiled(_logits_to_grads_, compile)(logits_VN[rows], words_V1[rows], *of_tokens, *terms)
        torch.mm(logits_VN, hidden_ND, out=grads_VD[chunk])


torch.library.impl("modalities::linear_cross_entropy", "CompositeExplicitAutograd", _in_chunks)


@torch.library.register_fake("modalities::linear_cross_entropy")
def _shapes(
    hidden_ND: Tensor, weight_VD: Tensor, master_VD: Tensor | None, targets_N: Tensor, scale: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = _empty_grads(hidden_ND, weight_VD, master_VD, with_grads=options[-2])
    return torch.empty_like(scale), scale.new_empty(len(targets_N)), *grads


class _Chunked(torch.autograd.Function):
    """The gradients are made with the loss, from the same logits; a backward pass only scales them."""

    @staticmethod
    def forward(
        hidden_ND: Tensor, weight_VD: Tensor, master_VD: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.ops.modalities.linear_cross_entropy(hidden_ND, weight_VD, master_VD, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        _, nll_N, hidden_grad_ND, weight_grad_VD = output
        ctx.mark_non_differentiable(nll_N, hidden_grad_ND, weight_grad_VD)
        ctx.save_for_backward(hidden_grad_ND, weight_grad_VD)
        ctx.of_master, ctx.num_inputs = inputs[2] is not None, len(inputs)

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden_grad_ND, weight_grad_VD = ctx.saved_tensors
        # A scalar leaves the dtype as it is.
        of_weight = (weight_grad_VD * loss_grad, None)
        of_weight = of_weight[::-1] if ctx.of_master else of_weight
        return hidden_grad_ND * loss_grad, *of_weight, *(None for _ in range(ctx.num_inputs - 3))


# ------------------------------------------------------------------------------------------------------------- sources


def sums_by_source(loss_B: Tensor, targets_BT: Tensor, sources_B: Tensor, num_sources: int) -> Aux:
    """`source_loss`, the loss summed over the sequences of each source, and `source_targets`, how many; [S]."""
    is_from_BS = sources_B[:, None] == torch.arange(num_sources, device=sources_B.device)
    targets_B = (targets_BT != IGNORED).sum(1)
    # Chosen and not multiplied, so that one source's infinity stays its own.
    return {
        "source_loss": torch.where(is_from_BS, loss_B[:, None], 0).sum(0),
        "source_targets": torch.where(is_from_BS, targets_B[:, None], 0).sum(0),
    }


def count_targets(targets: Tensor) -> Tensor:
    """How many targets count, int64 []."""
    return (targets != IGNORED).sum()
