"""Text from a model: `python -m modalities.generate runs/demo --prompt "def "`; also the loop's sampler.

It knows how a model is asked for tokens, how they are drawn and how they become text; what model it is, `trained.py`
knows. Shapes are in the names: B rows of the batch · T tokens · D width · V vocabulary.
"""

import contextlib
import json as jsonlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from modalities import cli
from modalities.dist import broadcast_from_main
from modalities.fsdp import is_split, whole
from modalities.model import Cache, ModelConfig, Transformer, build_skeleton
from modalities.optim import Params
from modalities.rng import fold
from modalities.step import apply, cast
from modalities.trained import Trained, end_tokens, load, load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


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


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How tokens are drawn. Every filter has the definition of transformers, and they follow one another as there."""

    num_tokens: int = 128
    """Length of the continuation, at most [tokens]."""
    temperature: float = 0.8
    """Divides the logits; 0: always the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens are drawn; 0: all."""
    top_p: float = 1.0
    """Only the fewest tokens whose probabilities sum to at least p are drawn (Holtzman et al., arXiv 1904.09751)."""
    min_p: float = 0.0
    """Only tokens of at least p times the probability of the likeliest are drawn (Nguyen et al., arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Over 1: tokens that the prompt or the text has become less likely (Keskar et al., arXiv 1909.05858)."""
    seed: int = 0
    """Another seed, another text."""

    def __post_init__(self) -> None:
        right = {
            "num_tokens": (self.num_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "0 or more"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "over 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "over 0"),
        }
        for name, (is_right, needed) in right.items():
            if not is_right:  # NaN is not, either
                raise ValueError(f"{name} is {getattr(self, name)}, but must be {needed}")


# ------------------------------------------------------------------------------------------------------ the next token


@dataclass(frozen=True)
class Decoder:
    """A model that is asked for next tokens; under FSDP2 all ranks ask together."""

    config: ModelConfig
    next_logits: Callable[..., Tensor]
    """(tokens_BT, positions_BT=, documents_BT=, cache=) -> fp32 logits [B, V] of the token after the last."""
    dtype: torch.dtype
    device: torch.device

    def new_cache(self, batch_size: int, max_len: int) -> Cache:
        return Cache(self.config, batch_size, max_len, self.dtype, self.device)


def make_decoder(model: Transformer, params: Params, dtype: torch.dtype, device: torch.device) -> Decoder:
    """`params` are cast to `dtype` once for all tokens."""
    weights = cast(model, params, dtype)

    def last(hidden_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        return model.logits(hidden_BTD[:, -1], weight_VD).float()

    if is_split(model):  # its ranks would have to divide the length of every text
        weights = {name: whole(p.detach().to(device, dtype)) for name, p in params.items()}
    elif isinstance(model, FSDPModule):
        forward = torch.no_grad()(partial(apply, model, weights, train=False, head=last))
        # Every length is a shape of its own, so compiled code would be compiled again and again.
        return Decoder(model.config, torch.compiler.set_stance("force_eager")(forward), dtype, device)
    # To put the weights into a skeleton for every token would take a third of a small model's time.
    own = build_skeleton(replace(model.config, attention="auto"))
    own.load_state_dict(weights, assign=True)
    return Decoder(model.config, torch.inference_mode()(partial(own, head=last)), dtype, device)


def penalise(logits_BV: Tensor, rows: Sequence[list[int]], penalty: float) -> Tensor:
    """Logits of the tokens that a row has already divided by `penalty`, or multiplied where they are negative."""
    met_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    for met_V, row in zip(met_BV, rows, strict=True):
        met_V[row] = True
    return torch.where(met_BV, torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def warp(logits_BV: Tensor, config: GenerateConfig) -> Tensor:
    """Logits of the distribution to draw from: temperature, then top-k, top-p and min-p; -inf where never drawn."""
    # Shifted, or a small temperature would make infinities.
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / config.temperature
    if config.top_k:
        kept = logits_BV.topk(min(config.top_k, logits_BV.shape[-1])).values
        logits_BV = logits_BV.masked_fill(logits_BV < kept[:, -1:], -torch.inf)
    if config.top_p < 1:
        ascending, order = logits_BV.sort()
        unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - config.top_p
        unlikely[:, -1] = False
        logits_BV = logits_BV.masked_fill(unlikely.scatter(1, order, unlikely), -torch.inf)
    if config.min_p:
        probabilities = logits_BV.softmax(-1)
        unlikely = probabilities < config.min_p * probabilities.amax(-1, keepdim=True)
        logits_BV = logits_BV.masked_fill(unlikely, -torch.inf)
    return logits_BV


def draw(logits_BV: Tensor, config: GenerateConfig, generators: Iterable[torch.Generator]) -> list[int]:
    """A token for every row, from the row's own generator."""
    if not logits_BV.amax(-1).isfinite().all():
        raise ValueError("the model's logits are not finite, so it has no next token; its training has diverged")
    if config.temperature == 0:
        return logits_BV.argmax(-1).tolist()
    sums_BV = warp(logits_BV, config).softmax(-1, dtype=torch.float64).cumsum(-1)
    uniform_B1 = torch.stack([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    # The first token with which the sum exceeds it, which is never one of probability 0.
    return torch.searchsorted(sums_BV, uniform_B1.to(sums_BV.device) * sums_BV[:, -1:], right=True)[:, 0].tolist()


# --------------------------------------------------------------------------------------------------------- many tokens


def generate(
    decoder: Decoder,
    prompts: Sequence[list[int]],
    config: GenerateConfig,
    context: int,
    is_over: Callable[[int, int], bool] = lambda row, token: False,
    use_cache: bool = True,
    first_row: int = 0,
) -> Iterator[dict[int, int]]:
    """Yield, step by step, the new token of each row of `prompts` that goes on.

    A row ends before the token for which `is_over(row, token)`, which is asked once for each, or with `num_tokens`.
    When a row outgrows `context`, the model sees the last half of it from there on. What a row becomes depends neither
    on the others nor on `use_cache` (but for roundings); it is drawn by the seed and its number, from `first_row`.
    """
    rows, begins = [list(prompt) for prompt in prompts], [0] * len(prompts)
    generators = [torch.Generator().manual_seed(fold(config.seed, "generate", first_row + i)) for i in range(len(rows))]
    going = batch = list(range(len(rows)))
    cache, max_len, padding_B1 = None, 0, None

    for step in range(config.num_tokens):
        positions_BT = documents_BT = None
        if cache is None or cache.length == max_len:
            batch = going  # those that are over leave when the rest is read again
            for r in batch:
                if len(rows[r]) - begins[r] > context:
                    begins[r] = len(rows[r]) - max(1, context // 2)
            seen = [rows[r][begins[r] :] for r in batch]
            longest = max(map(len, seen))
            max_len = min(context, longest + config.num_tokens - step)
            cache = decoder.new_cache(len(batch), max_len) if use_cache else None
            tokens_BT, padding_B1 = pad_left(seen, decoder.device)
            if padding_B1 is not None:
                index_T = torch.arange(longest, device=decoder.device)
                documents_BT = torch.where(index_T < padding_B1, -1, 0)
                positions_BT = (index_T - padding_B1).clamp(min=0)
        else:
            tokens_BT = torch.tensor([rows[r][-1:] for r in batch], device=decoder.device)
            positions_BT = None if padding_B1 is None else cache.length - padding_B1

        logits_BV = decoder.next_logits(tokens_BT, positions_BT=positions_BT, documents_BT=documents_BT, cache=cache)
        if config.repetition_penalty != 1:
            logits_BV = penalise(logits_BV, [rows[r] for r in batch], config.repetition_penalty)
        # Ranks must agree, or one would stop and the others wait for it.
        drawn = broadcast_from_main(draw(logits_BV, config, [generators[r] for r in batch]))
        new = {r: token for r, token in zip(batch, drawn, strict=True) if r in going and not is_over(r, token)}
        for r, token in new.items():
            rows[r].append(token)
        going = list(new)
        if not going:
            return
        yield new


def pad_left(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The rows as one tensor [B, T], each at its end, and the length of each one's padding [B, 1] if there is any."""
    longest = max(map(len, rows))
    tokens_BT = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    padding = [[longest - len(row)] for row in rows]
    return tokens_BT, torch.tensor(padding, device=device) if any(p > 0 for (p,) in padding) else None


# ---------------------------------------------------------------------------------------------------------------- text


@dataclass
class Continuation:
    """The text after a prompt, growing token by token."""

    tokenizer: "Tokenizer"
    prompt: list[int]
    ends: frozenset[int] = frozenset()
    """Tokens that end it, and are no part of it."""
    stops: tuple[str, ...] = ()
    """Texts that end it, and are no part of it."""
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    stop_reason: Literal["eod", "string", "length"] = "length"
    certain: int = 0
    """Characters of `text` that no stop string can take back."""
    given: int = 0
    """Characters that `take` has returned."""
    undecoded: list[int] = field(default_factory=list)
    """Tokens that are not yet text, after a few that are: how a token is written may depend on the ones before."""
    num_decoded: int = 0
    """How many of `undecoded` come before."""

    def __post_init__(self) -> None:
        self.undecoded = self.prompt[-5:]
        self.num_decoded = len(self.undecoded)

    def push(self, token: int) -> bool:
        """Append `token`; whether the text is over before or with it."""
        if token in self.ends:
            self.stop_reason = "eod"
            return True
        self.tokens.append(token)
        self.undecoded.append(token)
        return self.decode(whole_characters=True)

    def finish(self) -> None:
        """Nothing comes any more: what was held back is text too."""
        if self.stop_reason != "string":
            self.decode(whole_characters=False)
        self.certain = len(self.text)

    def take(self) -> str:
        """The text that has become certain since this was last asked."""
        piece, self.given = self.text[self.given : self.certain], self.certain
        return piece

    def decode(self, whole_characters: bool) -> bool:
        """Decode the tokens that are not yet text; whether a stop string ends it."""
        before = self.tokenizer.decode(self.undecoded[: self.num_decoded], skip_special_tokens=False)
        after = self.tokenizer.decode(self.undecoded, skip_special_tokens=False)
        # A character may be spread over tokens; without its last byte it is decoded as U+FFFD.
        if len(after) <= len(before) or (whole_characters and after.endswith("\ufffd")):
            return False
        self.text += after[len(before) :]
        self.undecoded = self.undecoded[self.num_decoded :]
        self.num_decoded = len(self.undecoded)
        found = [at for at in (self.text.find(stop, self.certain) for stop in self.stops) if at >= 0]
        if found:
            self.text, self.stop_reason = self.text[: min(found)], "string"
        self.certain = len(self.text) - (0 if found else self.begun_stop())
        return bool(found)

    def begun_stop(self) -> int:
        """Characters at the end of `text` that may be the beginning of a stop string."""
        longest = min(max(map(len, self.stops), default=1) - 1, len(self.text))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self.text[-n:]) for s in self.stops)), 0)


def prompt_tokens(tokenizer: "Tokenizer", prompt: str, eod: int | None) -> list[int]:
    # Training saw documents begin after the end of another, so an empty prompt begins there too.
    return tokenizer.encode(prompt).ids or [eod or 0]


def continue_texts(
    decoder: Decoder,
    texts: Sequence[Continuation],
    config: GenerateConfig,
    context: int,
    use_cache: bool = True,
    first_row: int = 0,
) -> Iterator[None]:
    """Let `texts` grow together; yield after every step, and once when they are finished."""
    prompts = [text.prompt for text in texts]

    def is_over(row: int, token: int) -> bool:
        return texts[row].push(token)

    for _ in generate(decoder, prompts, config, context, is_over, use_cache, first_row):
        yield
    for text in texts:
        text.finish()
    yield


def continue_text(
    decoder: Decoder, tokenizer: "Tokenizer", eod: str, config: SampleConfig, context: int, seed: int
) -> str:
    """The continuation of `config.prompt` as text, which ends where the model ends the document."""
    end = tokenizer.token_to_id(eod)
    ends = frozenset() if end is None else frozenset({end})
    text = Continuation(tokenizer, prompt_tokens(tokenizer, config.prompt, end), ends)
    how = GenerateConfig(num_tokens=config.num_tokens, temperature=config.temperature, seed=seed)
    for _ in continue_texts(decoder, [text], how, context):
        pass
    return text.text


# -------------------------------------------------------------------------------------------------------- command line


def main(
    model: Path,
    /,
    config: GenerateConfig = GenerateConfig(),  # noqa: B008  (it is frozen)
    *,
    prompt: tuple[str, ...] = (),
    prompts: Path | None = None,
    stop: tuple[str, ...] = (),
    batch_size: int = 16,
    context: int | None = None,
    cache: bool = True,
    dtype: Literal["float32", "bfloat16"] | None = None,
    ema: bool = False,
    json: bool = False,
) -> None:
    """Continue texts with a trained model.

    Without a prompt, it asks for one after another on a terminal, and reads one a line from a pipe.

    Args:
        model: A run's folder (its newest checkpoint is used), a checkpoint, or a Hugging Face folder.
        prompt: What the text begins with; may be given several times.
        prompts: A file of prompts, one a line.
        stop: A text that ends the continuation, and is no part of it; may be given several times.
        batch_size: Prompts that are continued together.
        context: Tokens that the model sees; None: what it was trained on.
        cache: Keep keys and values; without, every token costs a pass over the whole text.
        dtype: Computed in; None: as it was trained, or as a Hugging Face folder says.
        ema: Use the running mean of the weights that the run kept (ema.decay).
        json: Print one JSON object a prompt with checkpoint, prompt, text, tokens and stop_reason.
    """
    given = find_prompts(prompt, prompts)
    if batch_size < 1:
        raise ValueError(f"--batch-size is {batch_size}, but must be at least 1")
    if "" in stop:
        raise ValueError("--stop is empty, but must be a text")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load(model, device, ema)
    context = check_context(trained, context)
    if trained.tokenizer is None:
        raise ValueError(f"{model} has no tokenizer (a run: data.tokenizer is empty), so it knows no text")
    tokenizer = load_tokenizer(trained.tokenizer, trained.model.config.vocab_size)
    ends = end_tokens(trained, tokenizer)
    eod = None if trained.eod is None else tokenizer.token_to_id(trained.eod)
    decoder = make_decoder(trained.model, trained.params, getattr(torch, dtype) if dtype else trained.dtype, device)

    def answer(prompts: Sequence[str], first_row: int, stream: bool) -> None:
        texts = [Continuation(tokenizer, prompt_tokens(tokenizer, text, eod), ends, stop) for text in prompts]
        print(prompts[0] if stream else "", end="", flush=True)
        for _ in continue_texts(decoder, texts, config, context, cache, first_row):
            print(texts[0].take() if stream else "", end="", flush=True)
        if stream:
            print()
            return
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True), first_row + 1):
            facts = {"text": text.text, "tokens": text.tokens, "stop_reason": text.stop_reason}
            as_json = jsonlib.dumps({"checkpoint": f"{trained.folder}", "prompt": prompt, **facts})
            print(as_json if json else f"--- prompt {row}\n{prompt}{text.text}", flush=True)

    if given is None:
        for row, line in enumerate(ask()):
            answer([line], row, stream=not json)
        return
    for row in range(0, len(given), batch_size):
        answer(given[row : row + batch_size], row, stream=not json and len(given) == 1)


def find_prompts(prompt: tuple[str, ...], file: Path | None) -> list[str] | None:
    """The prompts of flags, of a file or of a pipe; None on a terminal, where they are asked for."""
    if prompt and file is not None:
        raise ValueError("--prompt and --prompts are both given; give one of them")
    if prompt:
        return list(prompt)
    if file is None and sys.stdin.isatty():
        return None
    # Characters other than the newline, at which splitlines would split, may be in a prompt.
    lines = (sys.stdin.read() if file is None else file.read_text(encoding="utf-8")).removesuffix("\n").split("\n")
    if lines == [""]:
        raise ValueError(f"there is no prompt in {file or 'the standard input'}; give one a line, or --prompt TEXT")
    return lines


def check_context(trained: Trained, context: int | None) -> int:
    """The tokens that the model is to see: what is asked for, else as many as it was trained on."""
    longest = trained.context
    if context is None:
        return longest if trained.recipe is None else min(longest, trained.recipe["data"]["seq_len"])
    if not 1 <= context <= longest:
        raise ValueError(f"--context is {context}, but must be from 1 to the model's max_seq_len {longest}")
    return context


def ask() -> Iterator[str]:
    """The lines that are typed on the terminal, until an empty one or the end of the file."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` the arrow keys)
    print("Each line is a prompt; an empty one ends.", file=sys.stderr)
    with contextlib.suppress(EOFError):
        while line := input("> "):
            yield line


def run(args: list[str]) -> None:
    """`main` with what the flags say."""
    from tyro.conf import OmitArgPrefixes, UseAppendAction

    # `--prompt A --prompt B`, and the fields of GenerateConfig without its name before them.
    cli.call(main, args, prog="python -m modalities.generate", config=(UseAppendAction, OmitArgPrefixes))


if __name__ == "__main__":
    cli.run(run)
