"""A trained model ready to be used: from a run, from a checkpoint, or from a Hugging Face folder.

It finds and loads; what is then done with the model (text, evaluation, export, training) is not known here.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from modalities import checkpoint
from modalities.config import from_dict, printable
from modalities.fsdp import assign
from modalities.model import ModelConfig, Transformer, build_skeleton
from modalities.optim import Params

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HALVES = ("bfloat16", "float16")
TOKENIZER_FILES = ("tokenizer_config.json", "chat_template.jinja")
"""What may lie beside a `tokenizer.json` and say more of it: an export looks for these, and an import keeps them."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A trained model that was found, before its weights are read."""

    folder: Path
    """The checkpoint, or the Hugging Face folder."""
    config: ModelConfig
    tokenizer: Path | None
    """Its `tokenizer.json`; None: it was trained on bare tokens."""
    eod: str | None
    """Text of the token that ends documents."""
    recipe: dict[str, Any] | None
    """As in `recipe.json`; None for a Hugging Face folder."""
    dtype: torch.dtype
    """What it computes in: the recipe's `parallel.param_dtype`, or what a Hugging Face folder says (else fp32)."""
    weights: Literal["params", "ema"] = "params"
    """ema: the running mean of the weights in the checkpoint, not they."""


@dataclass(frozen=True, kw_only=True)
class Trained(Found):
    """One with its weights on one device."""

    model: Transformer
    """On the meta device: the skeleton of `params`."""
    params: Params
    """fp32, by the names of `model`."""

    @property
    def context(self) -> int:
        """Longest sequence [tokens]."""
        return self.config.max_seq_len


def find(path: Path, ema: bool = False) -> Found:
    """The model in a run's folder (its newest valid checkpoint), a checkpoint (step-N) or a Hugging Face folder.

    `ema`: its weights are their running mean. Raises ValueError for any other path, for what is damaged or not
    understood in one of these, and where there is no such mean.
    """
    found = find_model(path)
    if not ema:
        return found
    if found.recipe is None or not checkpoint.has_ema(found.folder):
        raise ValueError(
            f"--ema: {found.folder} has no running mean of its weights, which a run keeps where ema.decay is not 0; "
            "leave --ema out"
        )
    return replace(found, weights="ema")


def find_model(path: Path) -> Found:
    if (path / checkpoint.MANIFEST).exists():
        checkpoint.read_manifest(path)
        return find_checkpoint(path)
    if (path / "config.json").is_file():
        return find_hugging_face(path)
    newest = checkpoint.newest(path)
    if newest is None:
        raise ValueError(
            f"{path} holds no checkpoint; give a run (runs/<name>), a checkpoint in it (step-N), "
            "or a Hugging Face folder (config.json and *.safetensors)"
        )
    return find_checkpoint(newest)


def find_checkpoint(folder: Path) -> Found:
    """What a verified checkpoint says of itself."""
    recipe = json.loads((folder / "recipe.json").read_text())
    config = from_dict(ModelConfig, recipe["model"], f"{folder / 'recipe.json'}: model")
    tokenizer = folder.parent / "tokenizer.json"  # the run's own copy
    if not tokenizer.exists():
        tokenizer = Path(recipe["data"]["tokenizer"])
    return Found(
        folder=folder,
        # Attention may be computed here by another backend, for there may be no GPU.
        config=replace(config, attention="auto"),
        tokenizer=tokenizer if recipe["data"]["tokenizer"] else None,
        eod=recipe["data"]["eod"] or None,
        recipe=recipe,
        dtype=getattr(torch, recipe["parallel"]["param_dtype"]),
    )


def find_hugging_face(folder: Path) -> Found:
    """A folder as transformers' `save_pretrained` writes it, with `tokenizer.json` if it is to know text."""
    from modalities import families

    config, facts = families.read_config(folder), read_json(folder / "config.json")
    saved_dtype = str(facts.get("dtype") or facts.get("torch_dtype")).removeprefix("torch.")
    return Found(
        folder=folder,
        config=config,
        tokenizer=folder / "tokenizer.json" if (folder / "tokenizer.json").is_file() else None,
        eod=find_eod(folder, config.vocab_size),
        recipe=None,
        dtype=getattr(torch, saved_dtype) if saved_dtype in HALVES else torch.float32,
    )


def find_eod(folder: Path, vocab_size: int) -> str | None:
    """The text of the token that ends texts, by name or by the number that a folder's files give it; None: unknown."""
    path = folder / "tokenizer_config.json"
    found = read_json(path).get("eos_token")
    eod = found.get("content") if isinstance(found, dict) else found  # an AddedToken is saved with its flags
    if found is not None and not isinstance(eod, str):
        raise ValueError(f"{path}: eos_token is {printable(repr(found))}, but should be a token's text")
    ids = [token for token in eos_ids(folder) or () if 0 <= token < vocab_size]
    if eod or not ids or not (folder / "tokenizer.json").is_file():
        return eod or None
    tokenizer = load_tokenizer(folder / "tokenizer.json", vocab_size)
    return next(filter(None, map(tokenizer.id_to_token, ids)), None)


def eos_ids(folder: Path) -> list[int] | None:
    """The tokens that end a text by the first of a Hugging Face folder's files that says so; None if none does."""
    for name in ("generation_config.json", "config.json"):
        found = read_json(folder / name).get("eos_token_id")
        ids: list[Any] = found if isinstance(found, list) else [found]
        if found is not None and not all(type(token) is int for token in ids):
            raise ValueError(f"{folder / name}: eos_token_id is {printable(repr(found))}, but should be int")
        if found is not None:
            return ids
    return None


def load(path: Path, device: torch.device, ema: bool = False) -> Trained:
    """The model that `find` finds, ready to be used on `device`."""
    found = find(path, ema)
    model = build_skeleton(found.config)
    params = load_weights(found, {name: torch.empty(p.shape, device=device) for name, p in model.named_parameters()})
    return Trained(**vars(found), model=model, params=params)


def load_weights(found: Found, params: Params) -> Params:
    """Read the weights alone into `params`, fp32, plain or sharded; all ranks together. They come back.

    `ValueError` where `params` are of another model.
    """
    shapes = {name: param.shape for name, param in build_skeleton(found.config).named_parameters()}
    for name in shapes | params:
        if name not in shapes or name not in params or shapes[name] != params[name].shape:
            theirs, ours = (list(of[name]) if name in of else "none" for of in (shapes, sizes(params)))
            raise ValueError(
                f"{found.folder} has {name} {theirs}, but this model {ours}; leave model.… as it is in the folder"
            )
    if found.recipe is not None:
        return checkpoint.load_params(found.folder, params, found.weights)
    from modalities import families

    for name, weight in families.read_weights(found.folder, found.config):
        assign(params[name], weight)
    return params


def sizes(params: Params) -> dict[str, torch.Size]:
    return {name: param.shape for name, param in params.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} should hold a JSON object")
    return found


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
    # A file may ask for what only batches of a fixed shape need.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def end_tokens(trained: Trained, tokenizer: "Tokenizer") -> frozenset[int]:
    """The tokens that end a text: those of a Hugging Face folder's own generation, or else the end of documents."""
    ids = eos_ids(trained.folder) if trained.recipe is None else None
    if ids is not None:
        return frozenset(ids)
    end = None if trained.eod is None else tokenizer.token_to_id(trained.eod)
    return frozenset() if end is None else frozenset({end})
