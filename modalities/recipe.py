"""`Recipe`: one run, composed of the configs beside the code that they configure. JSON both ways, and by name.

A recipe is a Python file that defines `recipe = Recipe(...)`; or the `recipe.json` of a run.
"""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from modalities import cli, memory, teacher, trained
from modalities.checkpoint import CheckpointConfig
from modalities.config import from_dict, to_dict
from modalities.data import DataConfig, TrainData
from modalities.dist import World, degrees
from modalities.ema import EmaConfig
from modalities.fingerprints import ResumeConfig
from modalities.fsdp import ParallelConfig, check_split, without_missing_compiler
from modalities.generate import SampleConfig
from modalities.guard import GuardConfig
from modalities.heartbeat import WatchdogConfig
from modalities.kl import DistillConfig
from modalities.log import LogConfig
from modalities.loss import LossConfig
from modalities.model import ModelConfig, flops_per_token, num_params
from modalities.noise import NoiseConfig
from modalities.optim import OptimConfig
from modalities.ranks import RanksError, is_main, world_size
from modalities.step import EvalConfig

# Of the model's fields: what is free to differ from the model whose weights are taken, and what is not.
OF_TRAINING = ("attention", "embed_dropout", "attn_dropout", "resid_dropout", "init_std")
OF_WEIGHTS = (
    "vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width", "norm", "positions",
    "activation", "qk_norm", "bias", "qkv_bias", "tied", "mup_base_width", "mup_base_layers", "mup_base_head_dim",
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
    distill: DistillConfig = DistillConfig()
    ema: EmaConfig = EmaConfig()
    noise: NoiseConfig = NoiseConfig()
    eval: EvalConfig = EvalConfig()
    sample: SampleConfig = SampleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: ResumeConfig = ResumeConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    guard: GuardConfig = GuardConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, but must be at least 1")
        schedule = self.optim.schedule
        length = self.steps if schedule.unit == "steps" else self.tokens_after(self.steps)
        if schedule.kind == "wsd" and schedule.warmup + schedule.decay > length:
            raise ValueError(
                f"optim.schedule: warmup {schedule.warmup} and decay {schedule.decay} do not fit into the run's "
                f"{length} {schedule.unit}"
            )
        if self.model.attention == "flash" and self.parallel.param_dtype == "float32":
            raise ValueError(
                "model.attention 'flash' computes in bfloat16 alone, but parallel.param_dtype is float32; change one"
            )
        names = self.data.source_names
        if self.distill.on and len(names) > 1 and {"data", "kl"} & {*names}:
            raise ValueError("data.names has data or kl, which loss/data and loss/kl of distillation are; rename it")
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
        """At the run's beginning; a ramp changes it."""
        return self.data.global_batch * self.data.seq_len

    def tokens_after(self, steps: int) -> int:
        """Training tokens that the first `steps` steps consume."""
        return self.data.samples_after(steps) * self.data.seq_len

    @property
    def tokens_of_steps(self) -> str:
        """The tokens of a step, in words; with a ramp, of the first and of the last."""
        sizes = sorted({self.data.batch_at(self.data.samples_after(step)) for step in (0, self.steps - 1)})
        return " to ".join(f"{size * self.data.seq_len:,}" for size in sizes)


def check_ranks(recipe: Recipe, ranks: int) -> None:
    """Raise ValueError if a global batch cannot be cut evenly into the ranks' parts and micro-batches."""
    parallel = recipe.parallel
    replicate, shard, tensor = degrees(ranks, parallel.replicate, parallel.shard, parallel.tensor)
    check_split(recipe.model, tensor)
    if recipe.data.seq_len % tensor:
        raise ValueError(
            f"data.seq_len {recipe.data.seq_len} is not divisible by parallel.tensor {tensor}; change one of them"
        )
    reshard = parallel.reshard_after_forward
    if not isinstance(reshard, bool) and shard % reshard:
        raise RanksError(f"parallel.reshard_after_forward {reshard} does not divide parallel.shard {shard}; change it")
    parts, micro = replicate * shard, recipe.parallel.micro_batch
    cut = parts if micro == "auto" else parts * micro
    for i, batch in enumerate(recipe.data.batch_sizes):
        if batch % cut:
            field = "data.ramp's" if i else "data.global_batch"
            per_tensor = f" ({ranks} / parallel.tensor {recipe.parallel.tensor})" if recipe.parallel.tensor > 1 else ""
            by = "" if micro == "auto" else f" × parallel.micro_batch {micro} = {cut}"
            raise RanksError(f"{field} {batch} is not divisible by {parts} rank(s){per_tensor}{by}; change one of them")


def load(name: str) -> tuple[Recipe, Path]:
    """The recipe called `name` (a name, a path to a `.py`, or to a run's `recipe.json`), and the file it came from."""
    path = cli.find_recipe(name)
    recipe = from_json(path) if path.suffix == ".json" else _from_python(path)
    return recipe if recipe.name else replace(recipe, name=path.stem), path


def from_json(path: Path) -> Recipe:
    """The recipe in a run's `recipe.json`; a ValueError names the file and the field."""
    try:
        return from_dict(Recipe, as_written_today(json.loads(path.read_text())))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def as_written_today(values: Any) -> Any:
    """What a recipe.json holds, where an earlier version wrote it otherwise."""
    match values:
        case {"parallel": {"compile": bool(on)}}:  # before it was said what is compiled
            values["parallel"]["compile"] = "model" if on else "off"
    return values


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


def memory_per_rank(recipe: Recipe, ranks: int, device_type: str = "cpu") -> memory.Parts:
    """The parts of a rank's memory at its fullest [bytes]; for a micro-batch of "auto" with one sequence."""
    parallel, data = without_missing_compiler(recipe.parallel, torch.device(device_type)), recipe.data
    replicate, shard, tensor = degrees(ranks, parallel.replicate, parallel.shard, parallel.tensor)
    micro = 1 if parallel.micro_batch == "auto" else parallel.micro_batch
    moments = memory.moments_per_parameter(recipe.model, recipe.optim)
    parts = memory.per_rank(
        recipe.model,
        parallel,
        recipe.loss,
        micro,
        data.seq_len,
        accumulated=max(data.batch_sizes) // (replicate * shard * micro),
        shards=shard * tensor,
        sharded=ranks > 1,
        device_type=device_type,
        moments=moments,
    )
    weights = parts["optimizer"] / moments  # the rank's own in fp32, where they are not in the host's memory
    if recipe.ema.decay:
        parts["EMA"] = weights
    if recipe.distill.on:
        head = recipe.model.padded_vocab_size * recipe.model.width
        parts["gradient of the head in chunks"] = head * (4.0 + parallel.compute_dtype.itemsize)
    if recipe.distill.teacher:
        chunk = recipe.loss.chunk_tokens
        parts["teacher"] = teacher.memory_per_rank(recipe.distill, parallel, chunk, micro * data.seq_len, shard)
    if device_type == "cpu" and recipe.checkpoint.background:  # a GPU's copy lies in the host's memory
        parts["copy being saved"] = weights + parts["optimizer"] + parts.get("EMA", 0.0)
    return parts


def dry_run(recipe: Recipe) -> None:
    """Print the resolved recipe, its size, FLOPs, memory per rank and the first batch's shape, once for all ranks."""
    ranks = world_size()
    check_ranks(recipe, ranks)
    if recipe.model_from:
        check_start(recipe, trained.find(Path(recipe.model_from)))
    teacher.check_recipe(
        recipe.distill, recipe.model, recipe.data.tokenizer, recipe.data.seq_len, recipe.parallel.tensor
    )
    description = describe(recipe, ranks)
    if is_main():
        print(description)


def describe(recipe: Recipe, ranks: int) -> str:
    parallel = recipe.parallel
    is_auto = parallel.micro_batch == "auto"
    first_rank = World(rank=0, size=ranks, device=torch.device("cpu"), mesh=None, tensor=parallel.tensor)
    micro = 1 if parallel.micro_batch == "auto" else parallel.micro_batch
    data = TrainData(recipe.data, recipe.model.vocab_size, recipe.seed, micro, first_rank)
    shape = tuple(data.read(0)["inputs"].shape)
    searched = "; parallel.micro_batch auto is searched when training starts: here with 1" if is_auto else ""
    return "\n".join(
        (
            json.dumps(to_dict(recipe), indent=2),
            f"parameters       {num_params(recipe.model):,}",
            f"FLOPs per token  {flops_per_token(recipe.model, recipe.data.seq_len):,}",
            *(f"training data    {fact}" for fact in data.facts(recipe.data.samples_after(recipe.steps))),
            f"memory per rank  {describe_memory(recipe, ranks)}{searched}",
            f"first batch      {shape} a rank: micro-batches × sequences × tokens",
        )
    )


def describe_memory(recipe: Recipe, ranks: int) -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = memory_per_rank(recipe, ranks, device.type)
    listed = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in parts.items())
    there = (
        f" of {torch.cuda.get_device_properties(device).total_memory / 2**30:,.1f} GiB" if device.type == "cuda" else ""
    )
    return f"about {sum(parts.values()) / 2**20:,.0f} MiB{there} on {ranks} rank(s): {listed}"
