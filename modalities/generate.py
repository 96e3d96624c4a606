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
        for name, least in (("every", 0), ("num_tokens", 1), ("temperature", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"sample.{name} is {getattr(self, name)}, but must be at least {least}")


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
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more precise
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from None
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocab_size:
        raise ValueError(f"the tokenizer {path} has token {largest:,}, but model.vocab_size is {vocab_size:,}")
    return tokenizer


def continue_text(
    logits_fn: LogitsFn,
    tokenizer: "Tokenizer",
    eod: str,
    config: SampleConfig,
    context: int,
    seed: int,
    device: torch.device,
) -> str:
    """The continuation of `config.prompt` as text, which ends where the model ends the document."""
    stop = tokenizer.token_to_id(eod)
    # Training saw documents begin after the end of another, so an empty prompt begins there too.
    prompt = tokenizer.encode(config.prompt).ids or ([stop] if stop is not None else [0])
    tokens = generate(logits_fn, prompt, config.num_tokens, config.temperature, context, seed, stop, device)
    return tokenizer.decode(list(tokens), skip_special_tokens=False)


@dataclass(frozen=True)
class Loaded:
    """A checkpoint, ready to be used on one device."""

    folder: Path
    model: Transformer
    params: Params
    recipe: dict[str, Any]
    """As in its `recipe.json`."""
    tokenizer: Path


def load(path: Path, device: torch.device) -> Loaded:
    """A checkpoint, or a run's newest one; a ValueError says what is missing."""
    if (path / checkpoint.MANIFEST).exists():
        checkpoint.read_manifest(path)
    folder = path if (path / checkpoint.MANIFEST).exists() else checkpoint.newest(path)
    if folder is None:
        raise ValueError(f"{path} holds no checkpoint; give a run (runs/<name>) or a checkpoint in it (step-N)")
    recipe = loads((folder / "recipe.json").read_text())
    model = build_skeleton(from_dict(ModelConfig, recipe["model"], "model"))
    params = checkpoint.load_params(folder, {name: torch.empty(p.shape) for name, p in model.named_parameters()})
    tokenizer = folder.parent / "tokenizer.json"  # the run's own copy
    if not tokenizer.exists():
        tokenizer = Path(recipe["data"]["tokenizer"])
    return Loaded(folder, model, {name: p.to(device) for name, p in params.items()}, recipe, tokenizer)


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
        json: Print one JSON object with the checkpoint, the prompt and the text instead of the text.
    """
    config = SampleConfig(prompt=prompt, num_tokens=num_tokens, temperature=temperature)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load(run, device)
    data = loaded.recipe["data"]
    if not data["tokenizer"]:
        raise ValueError(f"{run} was trained without a tokenizer (data.tokenizer is empty), so it knows no text")
    tokenizer = load_tokenizer(loaded.tokenizer, loaded.model.config.vocab_size)
    logits_fn = make_logits_fn(loaded.model, loaded.params, getattr(torch, loaded.recipe["parallel"]["param_dtype"]))
    text = continue_text(logits_fn, tokenizer, data["eod"], config, data["seq_len"], seed, device)
    print(dumps({"checkpoint": f"{loaded.folder}", "prompt": prompt, "text": text}) if json else prompt + text)


if __name__ == "__main__":
    cli.run(lambda args: cli.call(main, args, prog="python -m modalities.generate"))
