"""Presets: sizes as published, counts as PyTorch counts them."""

import inspect
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modalities import presets
from modalities.model import ModelConfig, build_skeleton, flops_per_token, num_params
from modalities.rope import RopeScaling

PUBLISHED = {
    "gpt2_124m": 124_439_808,
    "gpt2_350m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1558m": 1_557_611_200,
    "llama_160m": 159_789_312,  # our own
    "llama2_7b": 6_738_415_616,
    "llama3_1b": 1_235_814_400,
    "llama3_8b": 8_030_261_248,
    "mistral_7b": 7_241_732_096,
    "qwen2_500m": 494_032_768,
    "qwen3_600m": 596_049_920,
}


def preset(name: str) -> ModelConfig:
    return getattr(presets, name)()


def counted_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward by PyTorch's own counter on the meta device.

    It counts matrix multiplications alone, 2 per multiplication and addition; a look-up in a table is none. On that
    device SDPA is its two plain products over all T × T scores, hidden ones included, grouped heads each for itself.
    """
    model = build_skeleton(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, seq_len, dtype=torch.long, device="meta")).sum().backward()
    return counter.get_total_flops() / seq_len


def test_every_preset_is_checked() -> None:
    functions = dict(inspect.getmembers(presets, inspect.isfunction))
    assert {name for name in functions if not name.startswith("_")} == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_has_the_published_number_of_parameters(name: str) -> None:
    config = preset(name)
    real = sum(parameter.numel() for parameter in build_skeleton(config).parameters())
    padding = (config.padded_vocab_size - config.vocab_size) * config.width * (1 if config.tied else 2)
    assert num_params(config) == real == PUBLISHED[name] + padding
    assert f"{PUBLISHED[name]:,} parameters" in getattr(presets, name).__doc__


@pytest.mark.parametrize("name", PUBLISHED)
def test_flops_are_those_that_pytorch_counts(name: str) -> None:
    config = preset(name)
    assert counted_flops_per_token(config, 256) == flops_per_token(config, 256)


def test_flops_beyond_the_window_count_what_it_hides() -> None:
    """As with the causal mask: the convention is that of scores computed in full."""
    config = replace(preset("mistral_7b"), num_layers=2, window=64)
    assert counted_flops_per_token(config, 256) == flops_per_token(config, 256)


@pytest.mark.parametrize("attention", ["manual", "sdpa"])
def test_flops_do_not_depend_on_who_attends(attention: Literal["manual", "sdpa"]) -> None:
    config = replace(preset("llama3_1b"), num_layers=2, attention=attention)
    assert counted_flops_per_token(config, 256) == flops_per_token(config, 256)


def test_scaling_is_that_of_the_published_models() -> None:
    assert preset("llama3_1b").rope_scaling == RopeScaling(kind="llama3", factor=32.0, original_seq_len=8192)
    assert preset("llama3_8b").rope_scaling == RopeScaling(kind="llama3", factor=8.0, original_seq_len=8192)
