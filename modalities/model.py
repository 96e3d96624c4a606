"""The Transformer: what it computes, its initial weights, its parameter and FLOP counts.

It knows nothing of parallelism, precision, loss or optimizer. Shapes are in the names: B batch · T position · D width ·
H query heads · K key/value heads · E head dim · F hidden width of the MLP · V padded vocabulary · S position looked at.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB_MULTIPLE = 128
SIZES = ("vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width", "max_seq_len")
Rope = tuple[Tensor, Tensor] | None


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
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    """Gated SiLU (three matrices), GELU, or GPT-2's tanh approximation of it (two matrices)."""
    qk_norm: bool = False
    """RMSNorm over the features of each query and key head, before RoPE."""
    bias: bool = False
    """Biases in linear layers and in LayerNorm."""
    tied: bool = True
    """The output head is the embedding, transposed."""
    dropout: float = 0.0
    """Probability of dropping embeddings, attention weights and block outputs; off in evaluation."""
    init_std: float = 0.02
    """Standard deviation of initial weights; the projections into the residual stream have it over sqrt(2 × layers)."""

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
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout is {self.dropout}, but must be in [0, 1)")

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


def rope_cos_sin(positions_BT: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, 1, head_dim/2] of RoPE's angles, in fp32: bf16 would be off by up to π at T = 4,096.

    Source: Su et al., "RoFormer", arXiv 2104.09864, with the halves of a head rotated against each other as in Llama.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BT.device) / head_dim
    angle = positions_BT[..., None].float() * theta**-exponent
    return angle.cos()[:, :, None], angle.sin()[:, :, None]


def rotate(x_BTHE: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE applied to heads: in fp32, returned in the dtype of `x`."""
    cos, sin = rope
    a, b = x_BTHE.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BTHE.dtype)


def drop(x: Tensor, probability: float, train: bool) -> Tensor:
    return F.dropout(x, probability) if train and probability > 0 else x


def make_norm(config: ModelConfig, features: int) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(features, eps=config.norm_eps)
    return nn.LayerNorm(features, eps=config.norm_eps, bias=config.bias)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads, or attention to what a mask [B, 1, T, S] lets it see."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        q_width, kv_width = config.num_heads * config.head_width, config.kv_heads * config.head_width
        self.wq = nn.Linear(config.width, q_width, bias=config.bias)
        self.wk = nn.Linear(config.width, kv_width, bias=config.bias)
        self.wv = nn.Linear(config.width, kv_width, bias=config.bias)
        self.wo = nn.Linear(q_width, config.width, bias=config.bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_width, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_width, eps=config.norm_eps)

    def forward(self, x_BTD: Tensor, rope: Rope, visible_B1TS: Tensor | None, train: bool) -> Tensor:
        heads = (*x_BTD.shape[:2], -1, self.config.head_width)
        q_BTHE, k_BTKE, v_BTKE = (w(x_BTD).view(heads) for w in (self.wq, self.wk, self.wv))
        if self.config.qk_norm:
            q_BTHE, k_BTKE = self.q_norm(q_BTHE), self.k_norm(k_BTKE)
        if rope is not None:
            q_BTHE, k_BTKE = rotate(q_BTHE, rope), rotate(k_BTKE, rope)
        out_BHTE = F.scaled_dot_product_attention(
            q_BTHE.transpose(1, 2),
            k_BTKE.transpose(1, 2),
            v_BTKE.transpose(1, 2),
            attn_mask=visible_B1TS,
            is_causal=visible_B1TS is None,
            dropout_p=self.config.dropout if train else 0.0,
            enable_gqa=self.config.kv_heads != self.config.num_heads,
        )
        return self.wo(out_BHTE.transpose(1, 2).flatten(2))


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
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attn_norm = make_norm(config, config.width)
        self.attn = Attention(config)
        self.mlp_norm = make_norm(config, config.width)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, rope: Rope, visible_B1TS: Tensor | None, train: bool) -> Tensor:
        x_BTD = x_BTD + drop(self.attn(self.attn_norm(x_BTD), rope, visible_B1TS, train), self.dropout, train)
        return x_BTD + drop(self.mlp(self.mlp_norm(x_BTD)), self.dropout, train)


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
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = make_norm(config, config.width)
        if not config.tied:
            self.head = nn.Linear(config.width, config.padded_vocab_size, bias=False)

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        *,
        train: bool = False,
    ) -> Tensor:
        """Logits [B, T, V]. `train`: dropout; `positions`: by default 0 … T-1; attention stays within a document."""
        config, visible_B1TS = self.config, None
        if documents_BT is not None:
            visible_B1TS = (documents_BT[:, None, :, None] == documents_BT[:, None, None, :]).tril()
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        x_BTD = self.embed(tokens_BT)
        if config.positions == "learned":
            x_BTD = x_BTD + self.positions(positions_BT)
        rope = rope_cos_sin(positions_BT, config.head_width, config.rope_theta) if config.positions == "rope" else None
        x_BTD = drop(x_BTD, config.dropout, train)
        for block in self.blocks:
            x_BTD = block(x_BTD, rope, visible_B1TS, train)
        return F.linear(self.final_norm(x_BTD), self.embed.weight if config.tied else self.head.weight)

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
    sqrt(2 × layers), so that its variance does not grow with depth (Radford et al., GPT-2, 2019).
    """
    if name.endswith("bias"):
        return torch.zeros(shape, device=generator.device)
    if "norm" in name:
        return torch.ones(shape, device=generator.device)
    std = config.init_std
    if name.endswith(("wo.weight", "w_down.weight")):
        std /= math.sqrt(2 * config.num_layers)
    return torch.empty(shape, device=generator.device).normal_(std=std, generator=generator)


def num_params(config: ModelConfig) -> int:
    """Parameters, a tied head counted once."""
    linear_bias = 0
    if config.bias:
        linear_bias = (config.num_heads + 2 * config.kv_heads) * config.head_width + config.width  # q k v o
        linear_bias += config.mlp_hidden * (2 if config.activation == "swiglu" else 1) + config.width
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
