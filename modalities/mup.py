"""µP, the maximal update parametrisation: how scales follow a model's width and depth, so that what is best stays best.

Width: Yang et al., Tensor Programs V, arXiv 2203.03466, table 8 (the form in which a tied head is possible). Depth,
weight decay and eps: Dey et al., CompleteP, arXiv 2505.01618, table 1 with α = 1. Muon: the spectral condition, Yang et
al., arXiv 2310.17813. All as functions of sizes and names; at the base width and depth every number here is exactly 1.
"""

import math
import re
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from torch import Tensor

HIDDEN = re.compile(r".*\.(wq|wk|wv|wo|w_gate|w_up|w_down)\.weight")
"""Matrices of which both sides grow with the width."""
Rule = Literal["adamw", "original", "match_rms_adamw"]
"""What updates a parameter: AdamW, or Muon with that `muon.adjust`."""


Config = TypeVar("Config", bound=Any)


class Sizes(Protocol):
    """What is read of a model's config."""

    @property
    def width(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def head_width(self) -> int: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def mup_base_width(self) -> int: ...
    @property
    def mup_base_layers(self) -> int: ...
    @property
    def mup_base_head_dim(self) -> int: ...


class Multiples(NamedTuple):
    """What a parameter's learning rate, weight decay and eps are multiplied by."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


def width_ratio(config: Sizes) -> float:
    """How many times wider than the base model; 1 where µP is off."""
    return config.width / (config.mup_base_width or config.width)


def depth_ratio(config: Sizes) -> float:
    """How many times deeper than the base model; 1 where the depth rule is off."""
    return config.num_layers / (config.mup_base_layers or config.num_layers)


def scaled(x: Tensor, multiple: float) -> Tensor:
    """`x` × `multiple`, and `x` itself where that is 1."""
    return x if multiple == 1 else x * multiple


# ----------------------------------------------------------------------------------------------------------- the model


def init_multiple(config: Sizes, name: str) -> float:
    """Of a weight's initial standard deviation: hidden matrices keep the size of what leaves them."""
    return width_ratio(config) ** -0.5 if HIDDEN.fullmatch(name) else 1.0


def init_layers(config: Sizes) -> int:
    """The depth that initial projections into the residual stream are scaled for: `residual_multiple` does the rest."""
    return config.mup_base_layers or config.num_layers


def output_multiple(config: Sizes) -> float:
    """Of the logits: the last hidden state and the head come to agree, so that their product grows as the width."""
    return 1 / width_ratio(config)


def residual_multiple(config: Sizes) -> float:
    """Of what each half of a block adds to the residual stream."""
    return 1 / depth_ratio(config)


def query_multiple(config: Sizes) -> float:
    """Of the queries, which makes attention's 1/√E a 1/E: queries and keys come to agree as well."""
    return (config.mup_base_head_dim / config.head_width) ** 0.5 if config.mup_base_head_dim else 1.0


def folded_multiple(config: Sizes, name: str) -> float:
    """Of a parameter in a standard model that computes the same: the multiples above, each in a weight before it.

    That of the logits goes into the last norm, and so the head may be tied.
    """
    queries = "q_norm" if config.qk_norm else "wq"
    if name.startswith("final_norm."):
        return output_multiple(config)
    if re.fullmatch(r".*\.(wo|w_down)\.\w+", name):
        return residual_multiple(config)
    return query_multiple(config) if re.fullmatch(rf".*\.{queries}\.\w+", name) else 1.0


def standard(config: Config) -> Config:
    """The same model without µP, which has these weights."""
    return replace(config, mup_base_width=0, mup_base_layers=0, mup_base_head_dim=0)


# ------------------------------------------------------------------------------------------------------- the optimizer


def multiples(config: Sizes, name: str, rule: Rule) -> Multiples:
    """Of the hyperparameters of a parameter `name` that `rule` updates.

    lr × weight decay of a parameter stays what it is at the base width: the rate at which a weight forgets should not
    depend on the width (Wortsman et al., arXiv 2309.14322, call it independent weight decay).
    """
    m = width_ratio(config)
    if not HIDDEN.fullmatch(name):
        lr = 1.0
    elif rule == "adamw":
        lr = 1 / m  # an update of equal signs has a spectral norm that grows as the width
    elif rule == "match_rms_adamw":
        lr = 1 / math.sqrt(m)  # it undoes what the rule's factor √width adds to a spectral norm of 1
    else:
        lr = 1.0  # the update's spectral norm, √max(1, rows / columns), is what the condition asks for
    in_block = name.startswith("blocks.")
    return Multiples(lr, 1 / lr, 1 / (m * (depth_ratio(config) if in_block else 1.0)))
