"""The mean of several models' weights: soups of runs, or the last checkpoints of one.

Models that were trained on from the same weights can be averaged (Wortsman et al., arXiv 2203.05482), and the mean of a
run's last checkpoints does what a decay of the learning rate would (Hägele et al., arXiv 2405.18392).
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from modalities import adopt, checkpoint, families, trained
from modalities.model import ModelConfig, build_skeleton
from modalities.trained import Found

OF_TRAINING = ("attention", "embed_dropout", "attn_dropout", "resid_dropout", "init_std", "max_seq_len")
"""Of the model's fields, those in which the models may differ. A table of positions has a shape to be compared by."""


def average(models: tuple[Path, ...], /, out: Path, weights: tuple[float, ...] = (), last: int = 0) -> None:
    """Make the mean of several models' weights a run with one checkpoint, of step 0.

    Args:
        models: Runs (of each the newest checkpoint), checkpoints and Hugging Face folders of one and the same model.
        out: The run's folder to be made; it has the recipe and the tokenizer of the first.
        weights: Of each model; they must add up to 1, and may be negative. Without any, all are alike.
        last: Of the one run that is given, its last so many checkpoints.
    """
    adopt.refuse_out(out)
    sources = last_of(models, last) if last else [trained.find(model) for model in models]
    shares = check_weights(weights, len(sources))
    for source in sources[1:]:
        check_same(sources[0], source)
    params = {name: mean.float() for name, mean in means(sources, shares)}
    adopt.adopt(params, sources[0], out)
    listed = " + ".join(f"{share:.4g} × {source.folder}" for share, source in zip(shares, sources, strict=True))
    print(f"{out}: {listed}, as the checkpoint step-00000000")


def last_of(models: Sequence[Path], last: int) -> list[Found]:
    """The last `last` checkpoints of the only run in `models`, all verified."""
    if last < 1:
        raise ValueError(f"--last is {last}, but must be at least 1")
    if len(models) != 1:
        raise ValueError(f"--last is for the checkpoints of one run, but {len(models)} models are given")
    folders = checkpoint.steps(models[0])[:last]
    if len(folders) < last:
        raise ValueError(f"{models[0]} has {len(folders)} checkpoint(s), but --last is {last}")
    return [trained.find(folder) for folder in folders]


def check_weights(weights: Sequence[float], count: int) -> list[float]:
    """The weight of each of `count` models."""
    if not count:
        raise ValueError("there is nothing to average; give runs, checkpoints or Hugging Face folders")
    if not weights:
        return [1 / count] * count
    if len(weights) != count:
        raise ValueError(f"--weights has {len(weights)} number(s) for {count} model(s); give one for each")
    if not abs(sum(weights) - 1) <= 1e-6:  # nor NaN
        raise ValueError(f"--weights add up to {sum(weights):.6g}, but must add up to 1")
    return list(weights)


def check_same(one: Found, other: Found) -> None:
    """Raise ValueError if the weights of the two mean different things, or have different shapes."""
    ours, theirs = in_full(one.config), in_full(other.config)
    for field in fields(ModelConfig):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if a != b and field.name not in OF_TRAINING:
            raise ValueError(
                f"model.{field.name} is {a} in {one.folder}, but {b} in {other.folder}; "
                "only weights of the same model have a mean"
            )
    shapes = [{name: p.shape for name, p in build_skeleton(c).named_parameters()} for c in (ours, theirs)]
    for name, shape in shapes[0].items():
        if shapes[1][name] != shape:
            raise ValueError(
                f"{name} is {list(shape)} in {one.folder}, but {list(shapes[1][name])} in {other.folder}; "
                "only weights of the same model have a mean"
            )


def in_full(config: ModelConfig) -> ModelConfig:
    """`config` with numbers for what follows from others."""
    return replace(config, num_kv_heads=config.kv_heads, head_dim=config.head_width, mlp_width=config.mlp_hidden)


def means(sources: Sequence[Found], shares: Sequence[float]) -> Iterator[tuple[str, Tensor]]:
    """(name, the mean in float64) of each parameter; of the sources one tensor at a time is in memory."""
    for name, param in build_skeleton(sources[0].config).named_parameters():
        total = torch.zeros(param.shape, dtype=torch.float64)
        for source, share in zip(sources, shares, strict=True):
            total += share * read(source, name, param.shape).double()
        yield name, total


def read(source: Found, name: str, shape: torch.Size) -> Tensor:
    """One parameter, whole."""
    if source.recipe is None:
        return dict(families.read_weights(source.folder, source.config, {name}))[name]
    return checkpoint.load_params(source.folder, {name: torch.empty(shape)}, source.weights)[name]
