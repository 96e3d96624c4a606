"""Causal attention by one of several backends that agree: `attention(q, k, v, mask)`.

A query sees itself and what lies before it; with documents only what is of its own, with a sliding window only the last
`window` tokens, itself included. It knows nothing of weights. Shapes are in the names: B batch · T query · S key, of
which the queries are the last T · H query heads · K key/value heads, each shared by H/K query heads · E head dim.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["auto", "manual", "sdpa", "flex", "flash"]

LONGEST_MANUAL = 128
"""Tokens up to which, on a CPU, all scores at once take less time than SDPA's kernel, whose backward pass in bf16 takes
two to three times as long there (`benchmarks/attention.py`)."""


@dataclass(frozen=True)
class Mask:
    """What each query sees, made once for all layers in the form that the backend takes."""

    backend: str
    window: int | None = None
    """Tokens, itself included; None: all before."""
    visible_B1TS: Tensor | None = None
    """manual, sdpa: where a query sees a key; None: wherever it lies no later."""
    blocks: Any = None
    """flex: its BlockMask."""
    sequence_begins: Tensor | None = None
    """flash: where each document begins among all B × T tokens, int32, then B × T up to its length of B × T + 1."""


def drop(x: Tensor, probability: float | Tensor) -> Tensor:
    """x with features dropped at random and the others scaled up by as much, in the dtype of x."""
    if isinstance(probability, Tensor):
        is_kept = torch.rand_like(x, dtype=torch.float32) >= probability
        return torch.where(is_kept, x / (1 - probability), 0).to(x.dtype)
    return F.dropout(x, probability) if probability > 0 else x


def attention(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, mask: Mask, dropout: float | Tensor = 0.0) -> Tensor:
    """softmax(q kᵀ / √E) v over the keys that `mask` shows, [B, T, H, E]; `dropout` of the attention weights, by a
    tensor only with the backend `manual`."""
    return BACKENDS[mask.backend](q_BTHE, k_BSKE, v_BSKE, mask, dropout)


def make_mask(
    backend: Backend,
    num_queries: int,
    num_keys: int,
    window: int | None,
    documents_BT: Tensor | None,
    documents_BS: Tensor | None,
    device: torch.device,
) -> Mask:
    """The mask of `num_queries` at the end of `num_keys`; `documents`, int [B, ·], of the queries and of the keys.

    `ValueError` if `backend` cannot do it here.
    """
    chosen = choose(backend, device)
    if backend == "auto" and device.type == "cpu" and 1 < num_queries == num_keys <= LONGEST_MANUAL:
        chosen = "manual"
    window = None if window is None or window >= num_keys else window
    if chosen == "flex":
        return Mask(
            chosen, window, blocks=_flex_blocks(num_queries, num_keys, window, documents_BT, documents_BS, device)
        )
    if chosen == "flash":
        if num_queries != num_keys:
            chosen = "sdpa"  # a cache: of keys that are padded it knows nothing, and the queries are few
        else:
            begins = None if documents_BT is None else _sequence_begins(documents_BT)
            return Mask(chosen, window, sequence_begins=begins)
    if documents_BT is None and window is None and (num_queries == num_keys or num_queries == 1):
        return Mask(chosen)
    t = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    s = torch.arange(num_keys, device=device)
    visible = (s <= t) if window is None else (s <= t) & (s > t - window)
    if documents_BT is None or documents_BS is None:
        return Mask(chosen, window, visible[None, None])
    return Mask(chosen, window, visible & (documents_BT[:, None, :, None] == documents_BS[:, None, None, :]))


# -------------------------------------------------------------------------------------------------------------- choice


def choose(backend: Backend, device: torch.device) -> str:
    """The backend to use on `device`: the one asked for, or a `ValueError` that says what it needs.

    auto is SDPA: it runs everywhere and under every transform of torch.func, and its own kernel is a flash kernel
    wherever there is neither a window nor a document mask.
    """
    if backend == "auto":
        return "sdpa"
    reason = why_not(backend, device)
    if reason:
        raise ValueError(f"model.attention {backend!r} cannot run here: {reason}; choose another, or auto")
    return backend


def why_not(backend: str, device: torch.device) -> str | None:
    """What `backend` lacks on `device`; None if nothing."""
    if backend == "flash":
        if device.type != "cuda":
            return f"it needs a CUDA device, and this is {device.type}"
        if _flash() is None:
            return "it needs flash-attn (pip install 'modalities[flash]'), or a PyTorch with torch.nn.attention.varlen"
    if backend == "flex" and device.type == "cpu" and torch.is_grad_enabled():
        return "FlexAttention has no backward pass on a CPU"
    return None


@functools.cache
def _flash() -> Callable[..., Tensor] | None:
    """`varlen(q, k, v, begins, longest, window, dropout)` over flat tokens [N, heads, E], of whichever is installed."""
    try:
        from flash_attn.cute import flash_attn_varlen_func as four  # type: ignore[import-not-found]

        def flash_4(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, longest: int, window: int | None) -> Tensor:
            left = (window - 1, 0) if window else (None, None)
            out = four(
                q, k, v, cu_seqlens_q=begins, cu_seqlens_k=begins, max_seqlen_q=longest, max_seqlen_k=longest,
                causal=True, window_size=left,
            )  # fmt: skip
            return out[0] if isinstance(out, tuple) else out

        return flash_4
    except ImportError:
        pass
    try:
        from flash_attn import flash_attn_varlen_func as two  # type: ignore[import-not-found]

        def flash_2(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, longest: int, window: int | None) -> Tensor:
            left = (window - 1, 0) if window else (-1, -1)
            return two(q, k, v, begins, begins, longest, longest, causal=True, window_size=left)

        return flash_2
    except ImportError:
        pass
    try:
        from torch.nn.attention.varlen import varlen_attn

        def torch_varlen(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, longest: int, window: int | None) -> Tensor:
            left = (window - 1, 0) if window else (-1, 0)  # nothing to the right: causal
            grouped = q.shape[1] != k.shape[1]
            out = varlen_attn(q, k, v, begins, begins, longest, longest, window_size=left, enable_gqa=grouped)
            return out[0] if isinstance(out, tuple) else out

        return torch_varlen
    except ImportError:
        return None


# ------------------------------------------------------------------------------------------------------------ backends


def manual(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, mask: Mask, dropout: float | Tensor) -> Tensor:
    """The definition, with scores in at least fp32: the reference that the others are held against."""
    (num_queries, num_heads), (num_keys, kv_heads) = q_BTHE.shape[1:3], k_BSKE.shape[1:3]
    q_BKGTE = q_BTHE.transpose(1, 2).unflatten(1, (kv_heads, num_heads // kv_heads))
    k_BK1SE, v_BK1SE = (x.transpose(1, 2)[:, :, None] for x in (k_BSKE, v_BSKE))
    # Not the product alone: rounded to bf16, large scores would be off by several percent after the exponential.
    dtype = torch.promote_types(q_BTHE.dtype, torch.float32)
    scores = q_BKGTE.to(dtype) @ k_BK1SE.transpose(-1, -2).to(dtype)
    visible = mask.visible_B1TS
    if visible is None:
        visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q_BTHE.device).tril(num_keys - num_queries)
    else:
        visible = visible[:, None]
    scores = (scores / q_BTHE.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf)
    weights = drop(scores.softmax(-1), dropout).to(q_BTHE.dtype)
    return (weights @ v_BK1SE).flatten(1, 2).transpose(1, 2)


def sdpa(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, mask: Mask, dropout: float) -> Tensor:
    """PyTorch's `scaled_dot_product_attention`."""
    out_BHTE = F.scaled_dot_product_attention(
        q_BTHE.transpose(1, 2),
        k_BSKE.transpose(1, 2),
        v_BSKE.transpose(1, 2),
        attn_mask=mask.visible_B1TS,
        # A single query is the last token: it sees every key.
        is_causal=mask.visible_B1TS is None and q_BTHE.shape[1] > 1,
        dropout_p=dropout,
        enable_gqa=q_BTHE.shape[2] != k_BSKE.shape[2],
    )
    return out_BHTE.transpose(1, 2)


def flex(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, mask: Mask, dropout: float) -> Tensor:
    """FlexAttention (Dong et al., arXiv 2412.05496), which skips the blocks that the mask hides."""
    if dropout:
        raise ValueError("model.attention 'flex' has no dropout; set model.attn_dropout to 0, or choose sdpa")
    out_BHTE = _compiled_flex()(
        q_BTHE.transpose(1, 2),
        k_BSKE.transpose(1, 2),
        v_BSKE.transpose(1, 2),
        block_mask=mask.blocks,
        enable_gqa=q_BTHE.shape[2] != k_BSKE.shape[2],
    )
    return out_BHTE.transpose(1, 2)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled it computes all scores. A caller that is compiled itself inlines this.
    return torch.compile(flex_attention, dynamic=False)


def _flex_blocks(
    num_queries: int,
    num_keys: int,
    window: int | None,
    documents_BT: Tensor | None,
    documents_BS: Tensor | None,
    device: torch.device,
) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        last = t + (num_keys - num_queries)
        seen = s <= last
        if window is not None:
            seen = seen & (s > last - window)
        if documents_BT is not None and documents_BS is not None:
            seen = seen & (documents_BT[b, t] == documents_BS[b, s])
        return seen

    batch = None if documents_BT is None else documents_BT.shape[0]
    return create_block_mask(visible, batch, None, num_queries, num_keys, device=device)


def flash(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, mask: Mask, dropout: float) -> Tensor:
    """FlashAttention's variable-length kernel: every document, or else every row, is a sequence of its own."""
    if dropout:
        raise ValueError("model.attention 'flash' has no dropout here; set model.attn_dropout to 0, or choose sdpa")
    if q_BTHE.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError("model.attention 'flash' needs parallel.param_dtype bfloat16; choose it, or sdpa")
    varlen = _flash()
    assert varlen is not None
    batch, num_queries = q_BTHE.shape[:2]
    begins = mask.sequence_begins
    if begins is None:
        begins = torch.arange(0, batch * num_queries + 1, num_queries, dtype=torch.int32, device=q_BTHE.device)
    flat = (x.flatten(0, 1) for x in (q_BTHE, k_BSKE, v_BSKE))
    return varlen(*flat, begins, num_queries, mask.window).view(q_BTHE.shape)


def _sequence_begins(documents_BT: Tensor) -> Tensor:
    """Where documents begin in the flattened tokens, int32 [B × T + 1]: the rest is filled with empty sequences.

    So the shape tells nothing of the documents, and compiled code serves every batch.
    """
    is_first = torch.ones_like(documents_BT, dtype=torch.bool)
    is_first[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    total = documents_BT.numel()
    index = torch.arange(total, device=documents_BT.device)
    begins = torch.where(is_first.flatten(), index, total).sort().values
    return torch.cat((begins, begins.new_tensor([total]))).int()


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "manual": manual,
    "sdpa": sdpa,
    "flex": flex,
    "flash": flash,
}
