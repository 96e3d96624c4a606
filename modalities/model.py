"""The Transformer: what it computes, its initial weights, its parameter and FLOP counts.

One class is GPT-2, Llama, Mistral, Qwen2 and Qwen3, by its config alone; `presets.py` has theirs. It knows nothing of
parallelism, precision, loss or optimizer. Shapes are in the names: B batch · T position · D width · H query heads ·
K key/value heads · E head dim · F hidden width of the MLP · V padded vocabulary · S position looked at.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modalities import mup
from modalities.attention import Backend, Mask, attention, drop, make_mask
from modalities.rope import Rope, RopeScaling, rope_cos_sin, rotate

VOCAB_MULTIPLE = 128
SIZES = (
    "vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width", "max_seq_len", "window",
)  # fmt: skip
# How modules are split among the ranks of a tensor-parallel group: (regular expression, what fsdp.split does with it).
TENSOR_PLAN = (
    (r"embed", "words"),
    (r"positions", "table"),
    (r".*\.(attn|mlp)_norm|final_norm", "sequence"),
    (r".*\.[qk]_norm", "heads"),
    (r".*\.(wq|wk|wv|w_gate|w_up)|head", "columns"),
    (r".*\.(wo|w_down)", "rows"),
)
Head = Callable[[Tensor, Tensor], Any]
"""What becomes of the last hidden states [B, T, D] and the head's weight [V, D], padding rows included."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only Transformer; the defaults are Llama-like."""

    vocab_size: int
    """Tokens of the tokenizer; the embedding has `padded_vocab_size` rows."""
    num_layers: int
    """Blocks."""
    width: int
    """Features of the residual stream (also called hidden size or d_model)."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads, shared by groups of query heads (GQA); None: as many as `num_heads`."""
    head_dim: int | None = None
    """Features of a head; None: `width / num_heads`."""
    mlp_width: int | None = None
    """Hidden features of the MLP; None: 4 × width, or 8/3 × width (up to a multiple of 64) for SwiGLU."""
    max_seq_len: int = 2048
    """Longest sequence [tokens]; the rows of the table where positions are learned."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation, before attention, before the MLP and before the head."""
    norm_eps: float = 1e-5
    """Added to the variance, or to the mean square, under the root."""
    positions: Literal["rope", "learned", "none"] = "rope"
    """Rotary (RoPE, angles in fp32), a learned table added to the embedding, or none (NoPE)."""
    rope_theta: float = 10_000.0
    """Base of RoPE's wavelengths."""
    rope_scaling: RopeScaling = RopeScaling()
    window: int | None = None
    """Sliding window: a token sees itself and the tokens before it, so many in all; None: the whole text so far."""
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    """Gated SiLU (three matrices), GELU, or GPT-2's tanh approximation of it (two matrices)."""
    qk_norm: bool = False
    """RMSNorm over the features of each query and key head, before RoPE."""
    bias: bool = False
    """Biases in linear layers and in LayerNorm."""
    qkv_bias: bool = False
    """Biases in the projections to queries, keys and values alone, as in Qwen2."""
    tied: bool = True
    """The output head is the embedding, transposed."""
    logit_softcap: float = 0.0
    """Logits become softcap × tanh(logits / softcap), as in Gemma 2; 0: they stay as they are."""
    embed_dropout: float = 0.0
    """Probability of dropping features of the embeddings; off in evaluation, as the next two."""
    attn_dropout: float = 0.0
    """Probability of dropping attention weights."""
    resid_dropout: float = 0.0
    """Probability of dropping features of what a block adds to the residual stream."""
    init_std: float = 0.02
    """Standard deviation of initial weights; the projections into the residual stream have it over sqrt(2 × layers)."""
    mup_base_width: int = 0
    """µP: the width that hyperparameters were found at, from which scales follow the width; 0: they do not."""
    mup_base_layers: int = 0
    """µP with depth (CompleteP): the number of layers there; 0: scales do not follow the depth."""
    mup_base_head_dim: int = 0
    """µP where the head's width differs as well: the features of a head there; 0: as many as here."""
    attention: Backend = "auto"
    """What computes attention; all give the same. `attention.py` says what each needs."""

    def __post_init__(self) -> None:
        for name in SIZES:
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"model.{name} is {size}, but must be at least 1")
        for name in ("norm_eps", "rope_theta", "init_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"model.{name} is {getattr(self, name)}, but must be positive")
        if self.head_dim is None and self.width % self.num_heads:
            raise ValueError(
                f"model.num_heads {self.num_heads} does not divide model.width {self.width}; "
                "choose a divisor, or set model.head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"model.num_kv_heads {self.kv_heads} does not divide model.num_heads {self.num_heads}")
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(f"model.head_dim is {self.head_width}, but RoPE rotates pairs of features: make it even")
        if self.rope_scaling.kind != "none" and self.positions != "rope":
            raise ValueError(f"model.rope_scaling is for positions 'rope', but model.positions is {self.positions!r}")
        if self.bias and self.qkv_bias:
            raise ValueError("model.bias has the biases of model.qkv_bias already; set one of them")
        if self.logit_softcap < 0:
            raise ValueError(f"model.logit_softcap is {self.logit_softcap}, but must not be negative")
        for name in ("embed_dropout", "attn_dropout", "resid_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}, but must be in [0, 1)")
        for name in ("mup_base_width", "mup_base_layers", "mup_base_head_dim"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name} is {getattr(self, name)}, but must not be negative")
            if getattr(self, name) and not self.mup_base_width:
                raise ValueError(f"model.{name} is a part of µP, but model.mup_base_width is 0: set it too")
        if self.attn_dropout and self.attention in ("flex", "flash"):
            raise ValueError(f"model.attn_dropout needs model.attention manual or sdpa, not {self.attention}")

    @property
    def dropout(self) -> "Dropout":
        return Dropout(self.embed_dropout, self.attn_dropout, self.resid_dropout)

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def mlp_hidden(self) -> int:
        if self.mlp_width is not None:
            return self.mlp_width
        return 64 * math.ceil(self.width * 8 / 3 / 64) if self.activation == "swiglu" else 4 * self.width

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary up to a multiple of 128, which matrix units prefer."""
        return VOCAB_MULTIPLE * math.ceil(self.vocab_size / VOCAB_MULTIPLE)


class Cache:
    """Keys and values of the tokens that a model has read, with room for `max_len`; a forward pass appends to it."""

    def __init__(
        self, config: ModelConfig, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_layers, 2, batch_size, max_len, config.kv_heads, config.head_width)
        self.kv_L2BSKE = torch.zeros(shape, dtype=dtype, device=device)
        self.documents_BS = torch.zeros((batch_size, max_len), dtype=torch.long, device=device)
        self.length = 0
        """Tokens in it."""
        self.one_document = True

    def append(self, layer: int, k_BTKE: Tensor, v_BTKE: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values [B, S, K, E] of a layer, those of the T new tokens included."""
        end = self.length + k_BTKE.shape[1]
        k_BSKE, v_BSKE = self.kv_L2BSKE[layer, :, :, :end]
        k_BSKE[:, self.length :], v_BSKE[:, self.length :] = k_BTKE, v_BTKE
        return k_BSKE, v_BSKE

    def append_documents(self, num_tokens: int, documents_BT: Tensor | None) -> Tensor | None:
        """The documents of all keys, int64 [B, S]; None while all of them are of one."""
        end = self.length + num_tokens
        if end > self.documents_BS.shape[1]:
            raise ValueError(f"a cache of {self.documents_BS.shape[1]} tokens has no room for {end}")
        if documents_BT is not None:
            self.documents_BS[:, self.length : end], self.one_document = documents_BT, False
        return None if self.one_document else self.documents_BS[:, :end]


class Dropout(NamedTuple):
    """How likely each is dropped: numbers, or tensors [], of which vmap may have one for each of many models."""

    embed: float | Tensor = 0.0
    attn: float | Tensor = 0.0
    resid: float | Tensor = 0.0


def make_norm(config: ModelConfig, features: int) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(features, eps=config.norm_eps)
    return nn.LayerNorm(features, eps=config.norm_eps, bias=config.bias)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        q_width, kv_width = config.num_heads * config.head_width, config.kv_heads * config.head_width
        qkv_bias = config.bias or config.qkv_bias
        self.wq = nn.Linear(config.width, q_width, bias=qkv_bias)
        self.wk = nn.Linear(config.width, kv_width, bias=qkv_bias)
        self.wv = nn.Linear(config.width, kv_width, bias=qkv_bias)
        self.wo = nn.Linear(q_width, config.width, bias=config.bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_width, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_width, eps=config.norm_eps)

    def forward(self, x_BTD: Tensor, rope: Rope, mask: Mask, cache: Cache | None, dropout: Dropout) -> Tensor:
        heads = (*x_BTD.shape[:2], -1, self.config.head_width)
        q_BTHE, k_BSKE, v_BSKE = (w(x_BTD).view(heads) for w in (self.wq, self.wk, self.wv))
        if self.config.qk_norm:
            q_BTHE, k_BSKE = self.q_norm(q_BTHE), self.k_norm(k_BSKE)
        if rope is not None:
            q_BTHE, k_BSKE = rotate(q_BTHE, rope), rotate(k_BSKE, rope)
        q_BTHE = mup.scaled(q_BTHE, mup.query_multiple(self.config))
        if cache is not None:
            k_BSKE, v_BSKE = cache.append(self.layer, k_BSKE, v_BSKE)
        out_BTHE = attention(q_BTHE, k_BSKE, v_BSKE, mask, dropout.attn)
        return self.wo(out_BTHE.flatten(2))


class MLP(nn.Module):
    """Two matrices around a GELU, or three around a gated SiLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        if config.activation == "swiglu":
            self.w_gate = nn.Linear(config.width, config.mlp_hidden, bias=config.bias)
        self.w_up = nn.Linear(config.width, config.mlp_hidden, bias=config.bias)
        self.w_down = nn.Linear(config.mlp_hidden, config.width, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        up_BTF = self.w_up(x_BTD)
        if self.activation == "swiglu":
            return self.w_down(F.silu(self.w_gate(x_BTD)) * up_BTF)
        return self.w_down(F.gelu(up_BTF, approximate="tanh" if self.activation == "gelu_tanh" else "none"))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.multiple = mup.residual_multiple(config)
        self.attn_norm = make_norm(config, config.width)
        self.attn = Attention(config, layer)
        self.mlp_norm = make_norm(config, config.width)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, rope: Rope, mask: Mask, cache: Cache | None, dropout: Dropout) -> Tensor:
        out_BTD = mup.scaled(self.attn(self.attn_norm(x_BTD), rope, mask, cache, dropout), self.multiple)
        x_BTD = x_BTD + drop(out_BTD, dropout.resid)
        return x_BTD + drop(mup.scaled(self.mlp(self.mlp_norm(x_BTD)), self.multiple), dropout.resid)


class Transformer(nn.Module):
    """Tokens in, logits out.

    It has no buffers: what is not a parameter is computed from the config, so that a copy on the meta device serves as
    the skeleton for `torch.func.functional_call`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.padded_vocab_size, config.width)
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_seq_len, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = make_norm(config, config.width)
        if not config.tied:
            self.head = nn.Linear(config.width, config.padded_vocab_size, bias=False)

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        *,
        train: bool | Dropout = False,
        cache: Cache | None = None,
        head: Head | None = None,
    ) -> Any:
        """Logits [B, T, vocab_size], or what `head` makes of the last hidden states and the head's weight.

        `positions`: by default 0 … T-1; `documents`: attention stays within one, and -1 is padding; `train`: with
        dropout, the config's or the one given. With a `cache` the tokens come after those in it, and are appended.
        """
        config, seq_len, device = self.config, tokens_BT.shape[1], tokens_BT.device
        past = 0 if cache is None else cache.length
        keys_BS = documents_BT
        if cache is not None:
            keys_BS = cache.append_documents(seq_len, documents_BT)
            if documents_BT is None and keys_BS is not None:
                documents_BT = torch.zeros_like(tokens_BT)
        mask = make_mask(config.attention, seq_len, past + seq_len, config.window, documents_BT, keys_BS, device)
        if positions_BT is None:
            positions_BT = torch.arange(past, past + seq_len, device=device)[None]
        x_BTD = self.embed(tokens_BT)
        if config.positions == "learned":
            x_BTD = x_BTD + self.positions(positions_BT)
        rope = rope_cos_sin(positions_BT, config) if config.positions == "rope" else None
        dropout = train if isinstance(train, Dropout) else config.dropout if train else Dropout()
        x_BTD = drop(x_BTD, dropout.embed)
        for block in self.blocks:
            x_BTD = block(x_BTD, rope, mask, cache, dropout)
        if cache is not None:
            cache.length += seq_len
        weight_VD = self.embed.weight if config.tied else self.head.weight
        hidden_BTD = mup.scaled(self.final_norm(x_BTD), mup.output_multiple(config))
        return (head or self.logits)(hidden_BTD, weight_VD)

    @property
    def head_weight(self) -> str:
        """The name of the head's weight."""
        return "embed.weight" if self.config.tied else "head.weight"

    def logits(self, hidden_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        """Logits [B, T, vocab_size]. The padding's are left out, for no other tool would count them."""
        logits_BTV = F.linear(hidden_BTD, weight_VD)[..., : self.config.vocab_size]
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits_BTV / cap) if cap else logits_BTV

    def sharding_units(self) -> list[nn.Module]:
        """What is gathered, computed and freed together when the model is sharded; the rest belongs to the root."""
        return list(self.blocks)


def build_skeleton(config: ModelConfig) -> Transformer:
    """The model on the meta device: shapes and code, no memory."""
    with torch.device("meta"):
        return Transformer(config)


def initial_weight(config: ModelConfig, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """The fp32 initial value of one parameter, whole, on the generator's device.

    Norm weights are 1, biases 0, the rest normal; projections into the residual stream are scaled down by
    sqrt(2 × layers), so that its variance does not grow with depth (Radford et al., GPT-2, 2019). µP as `mup.py` says.
    """
    if name.endswith("bias"):
        return torch.zeros(shape, device=generator.device)
    if "norm" in name:
        return torch.ones(shape, device=generator.device)
    std = config.init_std * mup.init_multiple(config, name)
    if name.endswith(("wo.weight", "w_down.weight")):
        std /= math.sqrt(2 * mup.init_layers(config))
    return torch.empty(shape, device=generator.device).normal_(std=std, generator=generator)


def num_params(config: ModelConfig) -> int:
    """Parameters, a tied head counted once."""
    linear_bias = 0
    if config.bias:
        linear_bias = config.width  # wo
        linear_bias += config.mlp_hidden * (2 if config.activation == "swiglu" else 1) + config.width
    if config.bias or config.qkv_bias:
        linear_bias += (config.num_heads + 2 * config.kv_heads) * config.head_width
    norm = config.width * (2 if config.norm == "layernorm" and config.bias else 1)
    qk_norm = 2 * config.head_width if config.qk_norm else 0
    block = _matmul_weights_per_block(config) + linear_bias + 2 * norm + qk_norm
    tables = config.padded_vocab_size * (1 if config.tied else 2)
    tables += config.max_seq_len if config.positions == "learned" else 0
    return config.num_layers * block + tables * config.width + norm


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Floating-point operations of matrix multiplications for one token of training: forward and twice that backward.

    2 per weight and token, the head included, the embedding's look-up not; attention at `seq_len` counted in full,
    without crediting the causal mask. Source: Chowdhery et al., PaLM, arXiv 2204.02311, appendix B.
    """
    weights = config.num_layers * _matmul_weights_per_block(config) + config.padded_vocab_size * config.width
    attention = config.num_layers * 2 * seq_len * config.num_heads * config.head_width
    return 3 * 2 * (weights + attention)


def _matmul_weights_per_block(config: ModelConfig) -> int:
    attention = config.width * config.head_width * 2 * (config.num_heads + config.kv_heads)
    return attention + config.width * config.mlp_hidden * (3 if config.activation == "swiglu" else 2)
