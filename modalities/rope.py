"""Rotary positions (RoPE): the angles of each position, their scalings for longer texts, and the rotation itself.

Su et al., "RoFormer", arXiv 2104.09864. It knows nothing of models. Shapes are in the names: B batch · T position ·
H head · E head dim.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor] | None
"""cos and sin of the angles, [B, T, 1, E/2] in fp32; None: no rotation."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How RoPE's wavelengths are stretched, so that a model reads longer texts than it was trained on."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    """linear: all alike (Chen et al., arXiv 2306.15595); llama3: the long ones; yarn: Peng et al., arXiv 2309.00071."""
    factor: float = 1.0
    """How many times longer texts become."""
    original_seq_len: int = 8192
    """llama3, yarn: the longest text of the training before [tokens]."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths over original_seq_len / this are stretched in full."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths under original_seq_len / this are left as they are."""
    beta_fast: float = 32.0
    """yarn: what turns more often than this within original_seq_len is left as it is [turns]."""
    beta_slow: float = 1.0
    """yarn: what turns less often than this is stretched in full [turns]."""
    attention_factor: float = 0.0
    """yarn: queries and keys are multiplied by this; 0: 0.1 ln(factor) + 1."""

    def __post_init__(self) -> None:
        for name in ("factor", "original_seq_len", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            if not getattr(self, name) > 0:
                raise ValueError(f"model.rope_scaling.{name} is {getattr(self, name)}, but must be positive")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not getattr(self, low) < getattr(self, high):
                raise ValueError(
                    f"model.rope_scaling.{low} is {getattr(self, low)}, but must be less than {high} "
                    f"{getattr(self, high)}"
                )
        if self.attention_factor < 0:
            raise ValueError(
                f"model.rope_scaling.attention_factor is {self.attention_factor}, but must not be negative"
            )


class Turning(Protocol):
    """What is read of a model's config."""

    @property
    def head_width(self) -> int: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def rope_scaling(self) -> RopeScaling: ...


def rope_frequencies(config: Turning, device: torch.device) -> tuple[Tensor, float]:
    """RoPE's angle per position [E/2], fp32, and what its cos and sin are multiplied by.

    Sources: Su et al., "RoFormer", arXiv 2104.09864; `RopeScaling` names those of the scalings.
    """
    scaling, head_dim, theta = config.rope_scaling, config.head_width, config.rope_theta
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    if scaling.kind == "none":
        return frequency, 1.0
    stretched = frequency / scaling.factor
    if scaling.kind == "linear":
        return stretched, 1.0
    if scaling.kind == "llama3":
        turns = frequency * (scaling.original_seq_len / (2 * math.pi))
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept, factor = ((turns - low) / (high - low)).clamp(0, 1), 1.0
    else:

        def dim_of(turns: float) -> float:
            """The pair of features that turns so often within the original length."""
            return head_dim * math.log(scaling.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = (
            max(math.floor(dim_of(scaling.beta_fast)), 0),
            min(math.ceil(dim_of(scaling.beta_slow)), head_dim - 1),
        )
        pair = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
        kept = 1 - ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
        factor = scaling.attention_factor or 0.1 * math.log(max(scaling.factor, 1.0)) + 1
    return kept * frequency + (1 - kept) * stretched, factor


def rope_cos_sin(positions_BT: Tensor, config: Turning) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, 1, E/2] of RoPE's angles, in fp32: bf16 would be off by up to π at T = 4,096."""
    frequency, factor = rope_frequencies(config, positions_BT.device)
    angle = positions_BT[..., None].float() * frequency
    return (angle.cos() * factor)[:, :, None], (angle.sin() * factor)[:, :, None]


def rotate(x_BTHE: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE: the halves of a head turn against each other, as in Llama; in fp32, returned in the dtype of `x`."""
    cos, sin = rope
    # Halved before and joined after in its own dtype, which moves half of the bytes.
    a, b = (half.float() for half in x_BTHE.chunk(2, dim=-1))
    return torch.cat([half.to(x_BTHE.dtype) for half in (a * cos - b * sin, b * cos + a * sin)], dim=-1)
