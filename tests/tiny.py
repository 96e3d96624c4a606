"""A tiny run for the tests: data that can be learnt, a recipe of it, and real ranks (gloo) to run it on."""

import math
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing

from modalities.checkpoint import CheckpointConfig
from modalities.data import DataConfig
from modalities.fsdp import ParallelConfig
from modalities.generate import SampleConfig
from modalities.log import LogConfig
from modalities.model import ModelConfig
from modalities.optim import OptimConfig, ScheduleConfig
from modalities.pbin import write_pbin
from modalities.recipe import Recipe
from modalities.step import EvalConfig

MODEL = ModelConfig(vocab_size=100, num_layers=2, width=32, num_heads=4, num_kv_heads=2, mlp_width=48, max_seq_len=64)

# torch.compile needs a C++ compiler on a CPU. A bare machine has none, and trains without (test_train.py shows that).
needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="there is no C++ compiler")


def write_tokens(path: Path, num_tokens: int, seed: int = 0, vocab_size: int = 100) -> Path:
    """A `.pbin` in which each token mostly follows from the one before it."""
    rng = np.random.default_rng(seed)
    tokens = np.empty(num_tokens, np.int64)
    tokens[0] = 0
    noise = rng.integers(0, vocab_size, num_tokens)
    surprise = rng.random(num_tokens) < 0.1
    for i in range(1, num_tokens):
        tokens[i] = noise[i] if surprise[i] else (7 * tokens[i - 1] + 3) % vocab_size
    with write_pbin(path, vocab_size) as append:
        append(tokens)
    return path


def recipe(folder: Path, **changes: Any) -> Recipe:
    """A recipe of 20 steps on data in `folder`, fp32 and eager, whose runs lie in `folder/runs`."""
    for name, seed in (("train", 0), ("val", 1)):
        if not (folder / f"{name}.pbin").exists():
            write_tokens(folder / f"{name}.pbin", 4000, seed)
    base = Recipe(
        name="tiny",
        steps=20,
        model=MODEL,
        data=DataConfig(
            train=(str(folder / "train.pbin"),),
            val=(str(folder / "val.pbin"),),
            tokenizer="",
            seq_len=32,
            global_batch=8,
        ),
        optim=OptimConfig(lr=1e-2, schedule=ScheduleConfig(warmup=3)),
        parallel=ParallelConfig(micro_batch=2, param_dtype="float32", compile="off"),
        eval=EvalConfig(every=10, samples=7),
        sample=SampleConfig(every=0),
        checkpoint=CheckpointConfig(every=10),
        log=LogConfig(every=1, dir=str(folder / "runs"), tensorboard=False),
    )
    return replace(base, **changes)


def batch(model: ModelConfig, shape: tuple[int, ...], seed: int = 0, ignored: float = 0.0) -> dict[str, torch.Tensor]:
    """Random inputs and targets of `shape`, a share of the targets ignored."""
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randint(model.vocab_size, (2, *shape), generator=generator)
    targets[torch.rand(shape, generator=generator) < ignored] = -100
    return {"inputs": inputs, "targets": targets}


def packed_batch(
    model: ModelConfig, shape: tuple[int, ...], num_sources: int, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Such a batch of several sources, whose sequences hold documents of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(shape, generator=generator) < 0.15
    begins[..., 0] = False
    index = torch.arange(shape[-1])
    return {
        **batch(model, shape, seed, ignored=0.3),
        "documents": begins.cumsum(-1),
        "positions": index - torch.where(begins, index, 0).cummax(-1).values,
        "sources": torch.arange(math.prod(shape[:-1])).view(shape[:-1]) % num_sources,
    }


def run_ranks(ranks: int, function: Callable[..., object], *args: Any) -> None:
    """Call `function(*args)` in `ranks` new processes with torchrun's environment; raise what they raise."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_rank, (ranks, port, function, args), nprocs=ranks, start_method="spawn")


def _rank(rank: int, ranks: int, port: int, function: Callable[..., object], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{ranks}")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=f"{port}")
    torch.set_num_threads(1)
    function(*args)
