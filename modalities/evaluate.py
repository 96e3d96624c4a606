"""How well a model predicts packed files: `python -m modalities.evaluate runs/demo --data val.pbin`.

Sequences are made as the model's recipe makes those of its validation sets, so the loss is the training loop's own
where the sequences are as long. Several ranks (torchrun) share the sequences; each has the whole model.
"""

import functools
import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from json import dumps, loads
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from modalities import cli, dist, trained
from modalities.config import from_dict
from modalities.data import DataConfig, ValData, open_val
from modalities.loss import IGNORED, Batch
from modalities.step import apply, cast, make_eval_step, make_loss_fn
from modalities.topk import TOKENS_AT_ONCE, write_notes
from modalities.trained import Trained

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEFAULT_SEQ_LEN = 1024  # of a model that no recipe came with


@dataclass(frozen=True, kw_only=True)
class Score:
    """What was predicted, and how well. Scores of several files are added."""

    sequences: int
    tokens: int
    """Targets that count."""
    num_bytes: int | None
    """UTF-8 bytes of the text that these stand for; None without a tokenizer."""
    nats: float
    """-log p of all of them."""

    def __add__(self, other: "Score") -> "Score":
        both = None if self.num_bytes is None or other.num_bytes is None else self.num_bytes + other.num_bytes
        return Score(
            sequences=self.sequences + other.sequences,
            tokens=self.tokens + other.tokens,
            num_bytes=both,
            nats=self.nats + other.nats,
        )

    @property
    def loss(self) -> float:
        """Mean of -log p(token) [nats]."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if not self.loss > 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers. What it takes to predict the ends of documents counts, though they are no
        text (Gao et al., "The Pile", arXiv 2101.00027, section 3.1, has the formula).
        """
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else None


class Counted:
    """Batches, of which it counts targets and the bytes that they stand for while they are read."""

    def __init__(self, batches: Iterable[Batch], bytes_V: Tensor | None) -> None:
        self.batches, self.bytes_V = batches, bytes_V
        self.tokens = self.num_bytes = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            targets = batch["targets"][batch["targets"] != IGNORED].cpu()
            self.tokens += targets.numel()
            self.num_bytes += 0 if self.bytes_V is None else int(self.bytes_V[targets].sum())
            yield batch


def evaluate(
    model: Trained, files: dict[str, ValData], bytes_V: Tensor | None, device: torch.device
) -> dict[str, Score]:
    """The score of `model` on each of `files`, over all ranks; `bytes_V` as `bytes_per_token` makes it."""
    eval_step = make_eval_step(make_loss_fn(model.model, model.dtype, train=False), sharded=False, compile=False)
    weights = cast(model.model, model.params, model.dtype)  # once, not with each batch
    scores = {}
    for name, batches in files.items():
        counted = Counted(batches, bytes_V)
        loss = float(eval_step(weights, counted))
        tokens, num_bytes = dist.sum_over_ranks(
            torch.tensor([counted.tokens, counted.num_bytes], device=device)
        ).tolist()
        if not tokens:
            raise ValueError(f"none of the tokens read from {batches.sequences.path} is a target; give more --samples")
        scores[name] = Score(
            sequences=batches.count,
            tokens=tokens,
            num_bytes=None if bytes_V is None else num_bytes,
            nats=loss * tokens,
        )
    return scores


def write_topk(
    model: Trained, data: DataConfig, out: Path, k: int, temperature: float, batch_size: int, device: torch.device
) -> str:
    """Write what `model` says of each token of the only file of `data.val`, for students; a line on it."""
    weights, vocab_size = cast(model.model, model.params, model.dtype), model.config.vocab_size

    @torch.no_grad()
    def logits(batch: Batch) -> Iterator[Tensor]:
        batch = {key: value.to(device) for key, value in batch.items()}
        inputs = (batch["inputs"], False, batch.get("positions"), batch.get("documents"))
        hidden_BTD, weight_VD = apply(model.model, weights, *inputs, head=lambda hidden, weight: (hidden, weight))
        for hidden_ND in hidden_BTD.flatten(0, 1).split(TOKENS_AT_ONCE):
            yield model.model.logits(hidden_ND, weight_VD)

    count = write_notes(out, data, data.val[0], vocab_size, k, temperature, logits, batch_size)
    return (
        f"{out}: {k} words for each of {count * data.seq_len:,} tokens in {count:,} sequences of {data.seq_len} "
        f"({data.sampling}) of {data.val[0]}, {out.stat().st_size / 1e6:,.1f} MB, by {model.folder}"
    )


def check_topk(data: DataConfig, vocab_size: int, k: int, temperature: float, samples: int, ranks: int) -> None:
    """Raise ValueError if --save-topk cannot be had with the other flags."""
    if ranks > 1:
        raise ValueError("--save-topk is for one process; start it without torchrun")
    if len(data.val) != 1 or samples:
        raise ValueError("--save-topk is of one whole file; give --data TRAIN.pbin, and no --samples")
    if not 1 <= k <= vocab_size:
        raise ValueError(f"--topk is {k}, but must be between 1 and the model's vocab_size {vocab_size:,}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"--topk-temperature is {temperature}, but must be positive and finite")


def bytes_per_token(tokenizer: "Tokenizer", vocab_size: int, eod: str | None) -> Tensor:
    """UTF-8 bytes of the text that each token adds to what lies before it, int64 [vocab_size].

    Special tokens and the end of documents add none.
    """
    vocab = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=False).items()}
    if '"ByteLevel"' in dumps(loads(tokenizer.to_str())["decoder"]):
        sizes = {i: len(token) for i, token in vocab.items()}  # a character of its alphabet is a byte
    else:
        # The first token of a text may lose a space or stand without one, the second does not.
        once, twice = (tokenizer.decode_batch([[i] * n for i in vocab]) for n in (1, 2))
        added = (len(b.encode()) - len(a.encode()) for a, b in zip(once, twice, strict=True))
        sizes = dict(zip(vocab, added, strict=True))
        # The bytes of SentencePiece, which alone are no text.
        sizes |= {i: 1 for i, token in vocab.items() if len(token) == 6 and token.startswith("<0x")}
    for i, token in tokenizer.get_added_tokens_decoder().items():
        sizes[i] = 0 if token.special or token.content == eod else len(token.content.encode())
    return torch.tensor([sizes.get(i, 0) for i in range(vocab_size)])


def data_config(model: Trained, data: tuple[str, ...], masks: tuple[str, ...], seq_len: int | None) -> DataConfig:
    """The recipe's way of making sequences, or else the default one, applied to other files; a ValueError if it cannot.

    Without `data` these are the recipe's validation sets.
    """
    if model.recipe is not None:
        config = from_dict(DataConfig, model.recipe["data"], f"{model.folder / 'recipe.json'}: data")
    else:
        config = DataConfig(val=(), seq_len=min(model.context, DEFAULT_SEQ_LEN))
    if data:
        config = replace(config, val=data, val_masks=masks)
    elif masks:
        raise ValueError("--masks needs --data: the files that they mask")
    if not config.val:
        raise ValueError("there is nothing to evaluate on; give --data FILE.pbin")
    seq_len = config.seq_len if seq_len is None else seq_len
    if not 1 <= seq_len <= model.context:
        raise ValueError(f"--seq-len is {seq_len}, but must be between 1 and the model's context of {model.context}")
    return replace(config, seq_len=seq_len)


def show(scores: dict[str, Score]) -> str:
    """A table of a row for each score."""
    rows = [("source", "sequences", "tokens", "bytes", "loss", "perplexity", "bits/byte")]
    for name, score in scores.items():
        size = "–" if score.num_bytes is None else f"{score.num_bytes:,}"
        bits = "–" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"
        counts = f"{score.sequences:,}", f"{score.tokens:,}", size
        rows.append((name, *counts, f"{score.loss:.4f}", f"{score.perplexity:,.2f}", bits))
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        "  ".join((name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, others, strict=True))))
        for name, *cells in rows
    )


def as_json(score: Score) -> dict[str, Any]:
    """A score as JSON has it, which knows no infinity."""
    means = {"loss": score.loss, "perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}
    finite = {key: value if value is not None and math.isfinite(value) else None for key, value in means.items()}
    return {"sequences": score.sequences, "tokens": score.tokens, "bytes": score.num_bytes, **finite}


def report(model: Trained, config: DataConfig, scores: dict[str, Score], json: bool) -> str:
    """The scores of each file and of all together, as a table or as one JSON object."""
    total = functools.reduce(operator.add, scores.values())
    if json:
        sources = {name: as_json(score) for name, score in scores.items()}
        facts = {"model": f"{model.folder}", "seq_len": config.seq_len}
        return dumps({**facts, "sources": sources, "total": as_json(total)})
    mean = " (EMA)" if model.weights == "ema" else ""
    head = f"{model.folder}{mean}: sequences of {config.seq_len} tokens, {config.sampling}, {model.dtype}"
    return f"{head}\n{show(scores | {'total': total} if len(scores) > 1 else scores)}"


def main(
    model: Path,
    /,
    data: tuple[str, ...] = (),
    masks: tuple[str, ...] = (),
    seq_len: int | None = None,
    batch_size: int = 8,
    samples: int = 0,
    dtype: Literal["float32", "bfloat16"] | None = None,
    ema: bool = False,
    json: bool = False,
    save_topk: Path | None = None,
    topk: int = 32,
    topk_temperature: float = 1.0,
) -> None:
    """Measure loss, perplexity and bits per byte of a trained model on packed files, each of them and all together.

    Args:
        model: A run's folder (its newest checkpoint is used), a checkpoint, or a Hugging Face folder.
        data: Files packed with the model's tokenizer; without any the recipe's validation sets.
        masks: Their mask files, as in data.val_masks.
        seq_len: Length of a sequence [tokens]; by default the recipe's, or up to 1,024 of a Hugging Face folder.
        batch_size: Sequences that a rank puts through the model at once.
        samples: Sequences to read of each file, from its beginning; 0: all.
        dtype: Computed in; None: as it was trained, or as a Hugging Face folder says.
        ema: With the running mean of the weights that the run kept (ema.decay).
        json: Print one JSON object instead of the table.
        save_topk: Instead, write the model's likeliest words after each token of --data there, for a student's
            distill.teacher_topk.
        topk: So many words.
        topk_temperature: The student's distill.temperature.
    """
    for flag, value, least in (("batch-size", batch_size, 1), ("samples", samples, 0)):
        if value < least:
            raise ValueError(f"--{flag} is {value}, but must be at least {least}")
    with dist.setup() as world:
        with dist.all_or_none():
            loaded = trained.load(model, world.device, ema)
            if dtype:
                loaded = replace(loaded, dtype=getattr(torch, dtype))
            config, vocab_size = data_config(loaded, data, masks, seq_len), loaded.model.config.vocab_size
            if save_topk is not None:
                check_topk(config, vocab_size, topk, topk_temperature, samples, world.size)
                print(write_topk(loaded, config, save_topk, topk, topk_temperature, batch_size, world.device))
                return
            files, bytes_V = open_val(config, vocab_size, samples, batch_size, world), None
            if loaded.tokenizer is not None and loaded.tokenizer.is_file():
                tokenizer = trained.load_tokenizer(loaded.tokenizer, vocab_size)
                bytes_V = bytes_per_token(tokenizer, vocab_size, loaded.eod)
        scores = evaluate(loaded, files, bytes_V, world.device)
        if world.is_main:
            print(report(loaded, config, scores, json))
            if bytes_V is None and not json:
                print("no bits per byte: the model has no tokenizer.json, which would tell how long the text is")


if __name__ == "__main__":
    cli.run(lambda args: cli.call(main, args, prog="python -m modalities.evaluate"))
