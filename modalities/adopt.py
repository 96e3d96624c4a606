"""Runs whose weights come from elsewhere: a folder with one checkpoint, of step 0, to generate from and to train on.

A folder is whole or not there. Where the weights come from, and how they were made, is not known here.
"""

import json
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from modalities import checkpoint
from modalities.config import to_dict
from modalities.data import DataConfig
from modalities.fsdp import ParallelConfig
from modalities.optim import Params
from modalities.pbin import fsync, refuse_existing
from modalities.step import TrainState
from modalities.trained import TOKENIZER_FILES, Found


def adopt(params: Params, source: Found, out: Path) -> None:
    """Make `out` a run of the weights `params`, with the tokenizer of `source` and its recipe, if it has one."""
    recipe = {
        **(source.recipe or new_recipe(source)),
        "name": out.resolve().name,
        "model_from": str(out),  # so that a run of this recipe under another name starts from these weights
    }
    recipe["log"] = {**recipe.get("log", {}), "dir": str(out.parent)}
    texts: dict[str, Path] = {}
    if source.tokenizer is not None:
        recipe["data"] = {**recipe["data"], "tokenizer": str(out / "tokenizer.json")}
        texts = {name: source.tokenizer.with_name(name) for name in TOKENIZER_FILES}
        texts["tokenizer.json"] = source.tokenizer
    with folder_beside(out) as part:
        checkpoint.save(part, TrainState(params, {}), recipe, is_main=True)
        (part / "recipe.json").write_bytes(as_json(recipe))
        for name, file in texts.items():
            if file.is_file():
                shutil.copyfile(file, part / name)


def new_recipe(source: Found) -> dict[str, Any]:
    """A recipe for a model that none came with."""
    data = DataConfig(
        # Whoever trains on it names data of their own.
        train=("data/train.pbin",),
        val=(),
        tokenizer="",
        eod=source.eod or "" if source.tokenizer is not None else "",
        seq_len=min(DataConfig.seq_len, source.config.max_seq_len),
    )
    parallel = ParallelConfig(param_dtype="bfloat16" if source.dtype == torch.bfloat16 else "float32")
    return {
        "steps": 1,
        "model": to_dict(source.config),
        "data": to_dict(data),
        "parallel": to_dict(parallel),
    }


# ---------------------------------------------------------------------------------------------------------------- files


def refuse_out(out: Path) -> None:
    """ValueError for a folder that exists, or that a run would take for one of its checkpoints."""
    refuse_existing(out)
    whole = out.resolve()
    if re.fullmatch(r"step-\d+", whole.name) and any(whole.parent.glob(f"step-*/{checkpoint.MANIFEST}")):
        raise ValueError(f"{out} would lie among the checkpoints of a run and be taken for one; give another --out")


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A new folder that becomes `path` when the block ends and vanishes when it raises; an existing one is refused."""
    refuse_existing(path)
    # A name of its own, so that two processes with the same target cannot write into one folder.
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    part.mkdir(parents=True)
    try:
        yield part
        for file in [file for file in part.rglob("*") if file.is_file()]:
            fsync(file)
        fsync(part)
        refuse_existing(path)
        part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    fsync(path.parent)


def as_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
