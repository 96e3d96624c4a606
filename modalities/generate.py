"""Text from a checkpoint: `python -m modalities.generate runs/demo --prompt "def "`; also the loop's sampler."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from json import dumps, loads
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modalities import checkpoint, cli
from modalities.config import from_dict
from modalities.dist import broadcast_from_main
from modalities.model import ModelConfig, Transformer, build_skeleton
from modalities.optim import Params
from modalities.rng import fold
from modalities.step import apply, cast

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LogitsFn = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The text that a run generates of itself while it trains."""

    every: int = 0
    """Steps between two samples; 0: none."""
    prompt: str = "def "
    """What the text begins with."""
    num_tokens: int = 64
    """Length of the continuation [tokens]."""
    temperature: float = 0.8
    """Divides the logits; 0: always the likeliest token."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.num_tokens < 1 or self.temperature < 0:
            raise ValueError("sample: every and temperature must not be negative, and num_tokens must be at least 1")


def make_logits_fn(model: Transformer, params: Params, dtype: torch.dtype) -> LogitsFn:
    """`tokens [1, T] -> logits of the next token [vocab_size]`; under FSDP2 all ranks call it together."""
    weights = cast(model, params, dtype)

    # Every length is a shape of its own, so compiled code would be compiled again and again.
    @torch.compiler.set_stance("force_eager")
    @torch.no_grad()
    def logits_fn(tokens_1T: Tensor) -> Tensor:
        return apply(model, weights, tokens_1T, train=False)[0, -1, : model.config.vocab_size].float()

    return logits_fn


def generate(
    logits_fn: LogitsFn,
    prompt: list[int],
    num_tokens: int,
    temperature: float,
    context: int,
    seed: int,
    stop: int | None,
    device: torch.device,
) -> Iterator[int]:
    """Yield up to `num_tokens` tokens after `prompt`, ending before `stop`; the model sees the last `context`."""
    tokens = list(prompt)
    generator = torch.Generator().manual_seed(fold(seed, "generate"))
    for _ in range(num_tokens):
        logits = logits_fn(torch.tensor([tokens[-context:]], device=device)).cpu()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        token = broadcast_from_main(token)  # ranks must agree, or one would stop and the others wait for it
        if token == stop:
            return
        tokens.append(token)
        yield token


def load_tokenizer(path: Path, vocab_size: int) -> "Tokenizer":
    """A `tokenizer.json` that a model of `vocab_size` tokens can be used with, or a ValueError."""
    from tokenizers import Tokenizer

    if not path.is_file():
        raise ValueError(f"the tokenizer {path} is missing; data.tokenizer says where it is")
    tokenizer = Tokenizer.from_file(str(path))
    if tokenizer.get_vocab_size() > vocab_size:
        raise ValueError(
            f"the tokenizer {path} has {tokenizer.get_vocab_size():,} tokens, but model.vocab_size is {vocab_size:,}"
        )
    return tokenizer


def continue_text(
    logits_fn: LogitsFn, tokenizer: "Tokenizer", config: SampleConfig, context: int, seed: int, device: torch.device
) -> str:
    """The continuation of `config.prompt` as text."""
    stop = tokenizer.token_to_id("<|endoftext|>")
    # Training saw documents begin after the end of another, so an empty prompt begins there too.
    prompt = tokenizer.encode(config.prompt).ids or ([stop] if stop is not None else [0])
    tokens = generate(logits_fn, prompt, config.num_tokens, config.temperature, context, seed, stop, device)
    return tokenizer.decode(list(tokens), skip_special_tokens=False)


def load(path: Path) -> tuple[Transformer, Params, dict[str, Any], Path]:
    """Model, weights on the CPU, recipe (as JSON) and tokenizer of a checkpoint, or of a run's newest one."""
    if (path / checkpoint.MANIFEST).exists():
        folder = path
        checkpoint.read_manifest(folder)
    else:
        newest = checkpoint.newest(path)
        if newest is None:
            raise ValueError(f"{path} holds no checkpoint; give a run (runs/<name>) or a checkpoint in it (step-N)")
        folder = newest
    recipe = loads((folder / "recipe.json").read_text())
    model = build_skeleton(from_dict(ModelConfig, recipe["model"], "model"))
    params = {name: torch.empty(p.shape) for name, p in model.named_parameters()}
    tokenizer = folder.parent / "tokenizer.json"
    return (
        model,
        checkpoint.load_params(folder, params),
        recipe,
        tokenizer if tokenizer.exists() else Path(recipe["data"]["tokenizer"]),
    )


def main(
    run: Path, /, prompt: str = "", num_tokens: int = 128, temperature: float = 0.8, seed: int = 0, json: bool = False
) -> None:
    """Continue a text with a trained model.

    Args:
        run: A run's folder (its newest checkpoint is used), or a checkpoint.
        prompt: What the text begins with.
        num_tokens: Length of the continuation [tokens].
        temperature: Divides the logits; 0: always the likeliest token.
        seed: Another seed, another text.
        json: Print one JSON object with prompt, text and checkpoint's run instead of the text.
    """
    config = SampleConfig(prompt=prompt, num_tokens=num_tokens, temperature=temperature)
    model, params, recipe, tokenizer = load(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, recipe["parallel"]["param_dtype"])
    logits_fn = make_logits_fn(model, {name: p.to(device) for name, p in params.items()}, dtype)
    text = continue_text(
        logits_fn, load_tokenizer(tokenizer, model.config.vocab_size), config, recipe["data"]["seq_len"], seed, device
    )
    print(dumps({"run": str(run), "prompt": prompt, "text": text}) if json else prompt + text)


if __name__ == "__main__":
    cli.run(lambda args: cli.call(main, args, prog="python -m modalities.generate"))
