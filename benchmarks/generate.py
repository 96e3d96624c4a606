"""What the cache of keys and values is worth: 256 new tokens with it and without, on the CPU.

    python benchmarks/generate.py [--num-tokens 256] [--repeats 5] [--dtype float32] [--threads 2]

Random weights, which take as long as trained ones; one sampled text; the two take turns, and a figure is the median of
the repeats. The tokens must be the same.
"""

import statistics
import time
from typing import Literal

import torch

from modalities import cli, fsdp
from modalities.generate import Decoder, GenerateConfig, generate, make_decoder
from modalities.model import ModelConfig, build_skeleton, num_params

CPU = torch.device("cpu")
MODELS = {
    "demo": ModelConfig(vocab_size=8192, num_layers=4, width=192, num_heads=3, max_seq_len=512),
    "12 layers": ModelConfig(vocab_size=50_257, num_layers=12, width=512, num_heads=8, max_seq_len=512),
}


def timed(decoder: Decoder, prompt: list[int], how: GenerateConfig, use_cache: bool) -> tuple[float, list[int]]:
    """Seconds, and the tokens."""
    began = time.perf_counter()
    steps = generate(decoder, [prompt], how, decoder.config.max_seq_len, use_cache=use_cache)
    tokens = [new[0] for new in steps]
    return time.perf_counter() - began, tokens


def main(
    num_tokens: int = 256,
    repeats: int = 5,
    dtype: Literal["float32", "bfloat16"] = "float32",
    threads: int = 2,
    models: tuple[str, ...] = tuple(MODELS),
    prompts: tuple[int, ...] = (16, 256),
) -> None:
    """Print a row for every model and length of the prompt.

    Args:
        num_tokens: Tokens to generate.
        repeats: Texts a figure.
        dtype: What is computed in.
        threads: Of the CPU.
        models: By name.
        prompts: Lengths of the prompts [tokens].
    """
    torch.set_num_threads(threads)
    how = GenerateConfig(num_tokens=num_tokens, temperature=0.8)
    print(f"{num_tokens} new tokens, {dtype}, {threads} thread(s), median of {repeats}")
    print(
        f"{'model':<12}{'parameters':>12}{'prompt':>8}{'cache [s]':>12}{'without [s]':>13}{'ratio':>8}{'tokens/s':>10}"
    )
    for name in models:
        model = build_skeleton(MODELS[name])
        decoder = make_decoder(model, fsdp.init_params(model, 0, CPU), getattr(torch, dtype), CPU)
        timed(decoder, [1], GenerateConfig(num_tokens=2), use_cache=True)  # what is set up once
        for length in prompts:
            prompt = torch.randint(MODELS[name].vocab_size, (length,)).tolist()
            with_cache, without = [], []
            for _ in range(repeats):
                seconds, tokens = timed(decoder, prompt, how, use_cache=True)
                with_cache.append(seconds)
                seconds, others = timed(decoder, prompt, how, use_cache=False)
                without.append(seconds)
                # bf16 rounds otherwise where the shapes differ.
                assert tokens == others or dtype != "float32", "the cache changed the text"
            fast, slow = statistics.median(with_cache), statistics.median(without)
            size = f"{num_params(MODELS[name]) / 1e6:.1f}M"
            times = f"{fast:>12.2f}{slow:>13.2f}{slow / fast:>8.1f}{num_tokens / fast:>10.0f}"
            print(f"{name:<12}{size:>12}{length:>8}{times}", flush=True)


if __name__ == "__main__":
    cli.run(lambda args: cli.call(main, args, prog="python benchmarks/generate.py"))
