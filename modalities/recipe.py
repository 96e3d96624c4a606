"""`Recipe`: one run, composed of the configs beside the code that they configure. JSON both ways, and by name.

A recipe is a Python file that defines `recipe = Recipe(...)`; or the `recipe.json` of a run.
"""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from modalities import cli, trained
from modalities.checkpoint import CheckpointConfig
from modalities.config import from_dict, to_dict
from modalities.data import DataConfig, TrainData
from modalities.dist import World
from modalities.fsdp import ParallelConfig
from modalities.generate import SampleConfig
from modalities.log import LogConfig
from modalities.loss import LossConfig
from modalities.model import ModelConfig, flops_per_token, num_params
from modalities.optim import OptimConfig
from modalities.ranks import is_main, world_size
from modalities.step import EvalConfig

# Of the model's fields: what is free to differ from the model whose weights are taken, and what is not.
OF_TRAINING = ("attention", "embed_dropout", "attn_dropout", "resid_dropout", "init_std")
OF_WEIGHTS = (
    "vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width", "norm", "positions",
    "activation", "qk_norm", "bias", "qkv_bias", "tied",
)  # fmt: skip
IN_FULL = {"num_kv_heads": "kv_heads", "head_dim": "head_width", "mlp_width": "mlp_hidden"}
"""Where a field may be None, the property that has its value."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run, whole: the same recipe on the same data gives the same weights."""

    name: str = ""
    """The run's name, and its folder in `log.dir`; empty: the name of the recipe's file."""
    steps: int
    """Optimizer steps."""
    seed: int = 0
    """All randomness comes from it: initial weights, data order, dropout, samples."""
    model: ModelConfig
    model_from: str = ""
    """Weights to start from: a run, a checkpoint or a Hugging Face folder, of this very model; empty: random ones."""
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    eval: EvalConfig = EvalConfig()
    sample: SampleConfig = SampleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, but must be at least 1")
        schedule, stride = self.optim.schedule, 1 if self.optim.schedule.unit == "steps" else self.tokens_per_step
        if schedule.kind == "wsd" and schedule.warmup + schedule.decay > self.steps * stride:
            raise ValueError(
                f"optim.schedule: warmup {schedule.warmup} and decay {schedule.decay} do not fit into the run's "
                f"{self.steps * stride} {schedule.unit}"
            )
        if self.model.attention == "flash" and self.parallel.param_dtype == "float32":
            raise ValueError(
                "model.attention 'flash' computes in bfloat16 alone, but parallel.param_dtype is float32; change one"
            )
        if "/" in self.name or self.name in (".", ".."):
            raise ValueError(f"name is {self.name!r}, but must be a folder's name; log.dir says where it lies")
        if self.data.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"data.seq_len {self.data.seq_len} is longer than model.max_seq_len {self.model.max_seq_len}; "
                "shorten the one or raise the other"
            )

    @property
    def folder(self) -> Path:
        return Path(self.log.dir) / self.name

    @property
    def tokens_per_step(self) -> int:
        return self.data.global_batch * self.data.seq_len


def check_ranks(recipe: Recipe, ranks: int) -> None:
    """Raise ValueError if the global batch cannot be cut evenly into ranks and micro-batches."""
    batch, micro = recipe.data.global_batch, recipe.parallel.micro_batch
    if batch % (ranks * micro):
        raise ValueError(
            f"data.global_batch {batch} is not divisible by {ranks} rank(s) × parallel.micro_batch {micro} = "
            f"{ranks * micro}; change one of them"
        )


def load(name: str) -> tuple[Recipe, Path]:
    """The recipe called `name` (a name, a path to a `.py`, or to a run's `recipe.json`), and the file it came from."""
    path = cli.find_recipe(name)
    recipe = from_json(path) if path.suffix == ".json" else _from_python(path)
    return recipe if recipe.name else replace(recipe, name=path.stem), path


def from_json(path: Path) -> Recipe:
    """The recipe in a run's `recipe.json`; a ValueError names the file and the field."""
    try:
        return from_dict(Recipe, json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _from_python(path: Path) -> Recipe:
    spec = importlib.util.spec_from_file_location(f"recipes.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is the user's code, which may raise anything
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    recipe = getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{path} defines no `recipe = Recipe(...)`")
    try:  # what Python lets pass (3.0 for 3, a list for a tuple) would not come back from recipe.json as it was
        return from_dict(Recipe, to_dict(recipe))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def start_from(recipe: Recipe, path: Path, folder: Path) -> Recipe:
    """`recipe` for the model at `path` and its tokenizer, with its weights to start from.

    A run in `folder` that was begun so keeps what it began with: the source may have been trained on since, or be gone.
    """
    old = from_json(folder / "recipe.json") if (folder / "recipe.json").is_file() else None
    if old is not None and path in (Path(old.model_from), Path(old.model_from).parent):
        model, begun, tokenizer, eod = old.model, old.model_from, old.data.tokenizer, old.data.eod
    else:
        found = trained.find(path)
        # The checkpoint itself, for a run's newest may be another tomorrow.
        model, begun, tokenizer, eod = found.config, str(found.folder), str(found.tokenizer or ""), found.eod or ""
        # How it is computed and trained is the recipe's.
        model = replace(model, **{name: getattr(recipe.model, name) for name in OF_TRAINING})
    data = replace(recipe.data, seq_len=min(recipe.data.seq_len, model.max_seq_len))
    if tokenizer:
        data = replace(data, tokenizer=tokenizer, eod=eod)
    return replace(recipe, model=model, model_from=begun, data=data)


def check_start(recipe: Recipe, found: trained.Found) -> None:
    """Raise ValueError if the weights of `found` would mean something else in the recipe's model."""
    for name in OF_WEIGHTS:
        theirs, ours = (getattr(model, IN_FULL.get(name, name)) for model in (found.config, recipe.model))
        if theirs != ours:
            raise ValueError(
                f"model.{name} is {ours}, but the weights of model_from {found.folder} are for {theirs}; "
                "leave the model as it is there"
            )


def parse(recipe: Recipe, args: Sequence[str], prog: str) -> Recipe:
    """`recipe` with the fields that flags such as `--optim.lr 3e-4` override."""
    return cli.parse(Recipe, args, default=recipe, prog=prog)


def memory_per_rank(recipe: Recipe, ranks: int) -> dict[str, float]:
    """Estimated peak memory of a rank by part [bytes].

    Weights, gradients and AdamW's two means in fp32, a shard of each. Activations: what the backward pass of a block
    reads, about 8 times the width and 4 times the MLP's hidden width a token. Logits: in the compute dtype, in fp32,
    and their gradient.
    """
    params = num_params(recipe.model)
    tokens = recipe.parallel.micro_batch * recipe.data.seq_len
    compute = recipe.parallel.compute_dtype.itemsize
    per_layer = 8 * recipe.model.width + 4 * recipe.model.mlp_hidden
    return {
        "parameters": params * (4 / ranks + (compute if compute < 4 else 0)),
        "gradients": params * 4 / ranks,
        "optimizer": params * 8 / ranks,
        "activations": tokens * recipe.model.num_layers * per_layer * compute,
        "logits": tokens * recipe.model.padded_vocab_size * (compute + 8),
    }


def dry_run(recipe: Recipe) -> None:
    """Print the resolved recipe, its size, FLOPs, memory per rank and the first batch's shape, once for all ranks."""
    ranks = world_size()
    check_ranks(recipe, ranks)
    if recipe.model_from:
        check_start(recipe, trained.find(Path(recipe.model_from)))
    description = describe(recipe, ranks)
    if is_main():
        print(description)


def describe(recipe: Recipe, ranks: int) -> str:
    first_rank = World(rank=0, size=ranks, device=torch.device("cpu"), mesh=None)
    data = TrainData(recipe.data, recipe.model.vocab_size, recipe.seed, recipe.parallel.micro_batch, first_rank)
    shape = tuple(data.read(0)["inputs"].shape)
    memory = memory_per_rank(recipe, ranks)
    parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in memory.items())
    return "\n".join(
        (
            json.dumps(to_dict(recipe), indent=2),
            f"parameters       {num_params(recipe.model):,}",
            f"FLOPs per token  {flops_per_token(recipe.model, recipe.data.seq_len):,}",
            *(f"training data    {fact}" for fact in data.facts(recipe.steps * recipe.data.global_batch)),
            f"memory per rank  about {sum(memory.values()) / 2**20:,.0f} MiB on {ranks} rank(s): {parts}",
            f"first batch      {shape} a rank: micro-batches × sequences × tokens",
        )
    )
