"""Published architectures as functions that return a `ModelConfig`: what each model's own `config.json` says.

They say what is computed, and leave dropout off, as pretraining does today. A preset is a starting point:
`dataclasses.replace(llama3_1b(), max_seq_len=8192, rope_scaling=RopeScaling())`.
"""

from modalities.model import ModelConfig
from modalities.rope import RopeScaling

GPT2_VOCAB, LLAMA2_VOCAB, LLAMA3_VOCAB, QWEN_VOCAB = 50_257, 32_000, 128_256, 151_936


def gpt2_124m() -> ModelConfig:
    """GPT-2 small: 124,439,808 parameters (Radford et al., 2019)."""
    return _gpt2(num_layers=12, width=768, num_heads=12)


def gpt2_350m() -> ModelConfig:
    """GPT-2 medium: 354,823,168 parameters."""
    return _gpt2(num_layers=24, width=1024, num_heads=16)


def gpt2_774m() -> ModelConfig:
    """GPT-2 large: 774,030,080 parameters."""
    return _gpt2(num_layers=36, width=1280, num_heads=20)


def gpt2_1558m() -> ModelConfig:
    """GPT-2 XL: 1,557,611,200 parameters."""
    return _gpt2(num_layers=48, width=1600, num_heads=25)


def _gpt2(num_layers: int, width: int, num_heads: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=GPT2_VOCAB,
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        max_seq_len=1024,
        norm="layernorm",
        positions="learned",
        activation="gelu_tanh",
        bias=True,
    )


def llama_160m() -> ModelConfig:
    """A Llama of our own for quick runs, with GPT-2's vocabulary: 159,789,312 parameters, half of them tables."""
    return ModelConfig(
        vocab_size=GPT2_VOCAB,
        num_layers=12,
        width=768,
        num_heads=6,  # of 128 features, which keep a GPU's matrix units busier than 12 of 64
        num_kv_heads=2,
        mlp_width=2304,
        max_seq_len=2048,
        tied=False,
    )


def llama2_7b() -> ModelConfig:
    """Llama 2 7B: 6,738,415,616 parameters (Touvron et al., arXiv 2307.09288)."""
    return ModelConfig(
        vocab_size=LLAMA2_VOCAB,
        num_layers=32,
        width=4096,
        num_heads=32,
        mlp_width=11_008,
        max_seq_len=4096,
        tied=False,
    )


def llama3_1b() -> ModelConfig:
    """Llama 3.2 1B: 1,235,814,400 parameters; trained on 8,192 tokens, extended 16 times."""
    return ModelConfig(
        vocab_size=LLAMA3_VOCAB,
        num_layers=16,
        width=2048,
        num_heads=32,
        num_kv_heads=8,
        mlp_width=8192,
        max_seq_len=131_072,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(kind="llama3", factor=32.0, original_seq_len=8192),
    )


def llama3_8b() -> ModelConfig:
    """Llama 3.1 8B: 8,030,261,248 parameters (Grattafiori et al., arXiv 2407.21783)."""
    return ModelConfig(
        vocab_size=LLAMA3_VOCAB,
        num_layers=32,
        width=4096,
        num_heads=32,
        num_kv_heads=8,
        mlp_width=14_336,
        max_seq_len=131_072,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_seq_len=8192),
        tied=False,
    )


def mistral_7b() -> ModelConfig:
    """Mistral 7B v0.1, with the sliding window: 7,241,732,096 parameters (Jiang et al., arXiv 2310.06825)."""
    return ModelConfig(
        vocab_size=LLAMA2_VOCAB,
        num_layers=32,
        width=4096,
        num_heads=32,
        num_kv_heads=8,
        mlp_width=14_336,
        max_seq_len=32_768,
        window=4096,
        tied=False,
    )


def qwen2_500m() -> ModelConfig:
    """Qwen2 0.5B: 494,032,768 parameters (Yang et al., arXiv 2407.10671)."""
    return ModelConfig(
        vocab_size=QWEN_VOCAB,
        num_layers=24,
        width=896,
        num_heads=14,
        num_kv_heads=2,
        mlp_width=4864,
        max_seq_len=131_072,
        norm_eps=1e-6,
        rope_theta=1_000_000.0,
        qkv_bias=True,
    )


def qwen3_600m() -> ModelConfig:
    """Qwen3 0.6B: 596,049,920 parameters (Yang et al., arXiv 2505.09388)."""
    return ModelConfig(
        vocab_size=QWEN_VOCAB,
        num_layers=28,
        width=1024,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        mlp_width=3072,
        max_seq_len=40_960,
        norm_eps=1e-6,
        rope_theta=1_000_000.0,
        qk_norm=True,
    )
