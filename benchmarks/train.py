"""Our training step against others' on this machine: tokens/s, memory, and whether all lose the same.

    python benchmarks/train.py [--recipe gpt2_60m --seq-len 512 --micro-batch 8 --steps 3 --repeats 2]

The same architecture, initial weights, batches, learning rate, clipping and fused AdamW for all; words are drawn by
Zipf's law. Contestants are KIND DTYPE, of a process of their own, and take turns; a row whose package is missing says
so. Kinds:

    plain compiled  the loop of nanoGPT: our Transformer as an nn.Module with logits and F.cross_entropy in one
                    torch.compile, torch.autocast, backward, clip_grad_norm_, torch.optim.AdamW(fused=True)
    plain eager     the same without torch.compile; in fp32 it is what Modalities runs
    ours            loop.build(recipe) and its train_step; ours selective: with selective activation checkpointing
    trainer         Hugging Face's Trainer with a LlamaForCausalLM; trainer compiled: its torch_compile=True
    litgpt          litgpt's GPT, loss and the lines of its pretrain.py that train, with lightning's Fabric

The Trainer needs accelerate, and litgpt other versions than ours: pip install --no-deps --target DIR accelerate psutil
litgpt lightning pytorch-lightning lightning-utilities torchmetrics jsonargparse typeshed_client, and PYTHONPATH=DIR
before the command. torchtitan 0.3 is not here: it imports triton, which PyTorch for CPUs has not.

Memory is the peak of a step beyond what the process had before it (libraries, weights, optimizer state) and beyond
fp32 gradients. The first step compiles, or loads what PyTorch has kept from an earlier run.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modalities.data import TrainData
    from modalities.optim import Params
    from modalities.recipe import Recipe

ROOT = Path(__file__).parents[1]
CONTESTANTS = ("plain compiled bfloat16", "ours bfloat16", "plain eager float32", "trainer bfloat16", "litgpt bfloat16")
WARMUP, MEMORY = 2, 1  # steps before and after the timed ones: the first compiles; the last is measured for memory
# Of the largest relative difference from the reference's loss at any step: bf16's roundings differ by what is kept in
# fp32 (autocast keeps the residual stream so, we do not).
BOUND = {"float32": 1e-4, "bfloat16": 2e-3}


@dataclass
class Meter:
    """The time, memory and loss of steps, whoever's loop it is."""

    timed: int
    grad_bytes: int
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory: float = 0.0
    """MiB."""

    def begin(self) -> None:
        from benchmarks.loss import reset_peak

        # Not at the timed steps, for what it returns to the system must be got anew.
        self.before = reset_peak("cpu") if len(self.losses) >= WARMUP + self.timed else 0
        self.began, self.cpu_began = time.perf_counter(), time.process_time()

    def end(self, loss: float) -> None:
        from benchmarks.loss import peak

        self.seconds.append(time.perf_counter() - self.began)
        self.cpu_seconds.append(time.process_time() - self.cpu_began)
        self.losses.append(loss)
        if self.before:
            self.memory = (peak("cpu") - self.before - self.grad_bytes) / 2**20

    def facts(self) -> dict[str, Any]:
        timed = slice(WARMUP, WARMUP + self.timed)
        return {
            "first": self.seconds[0],
            "seconds": self.seconds[timed],
            "cpu": self.cpu_seconds[timed],
            "memory": self.memory,
            "losses": self.losses,
        }


def contest(kind: str, dtype: str, recipe_path: str) -> None:
    """In a process of its own: train, and print what the meter has."""
    from modalities.model import num_params
    from modalities.recipe import from_json

    recipe = from_json(Path(recipe_path))
    recipe = replace(recipe, parallel=replace(recipe.parallel, param_dtype=dtype))  # type: ignore[arg-type]
    meter = Meter(timed=recipe.steps - WARMUP - MEMORY, grad_bytes=4 * num_params(recipe.model))
    KINDS[kind](recipe, meter)
    print(f"\n{json.dumps(meter.facts())}")


def ours(recipe: "Recipe", meter: Meter, checkpointing: str = "none") -> None:
    from modalities import dist, loop

    parallel = replace(recipe.parallel, activation_checkpointing=checkpointing)  # type: ignore[arg-type]
    recipe = replace(recipe, parallel=parallel)
    with dist.setup() as world:
        run, state = loop.build(recipe, world)
        for _ in range(recipe.steps):
            meter.begin()
            state, metrics = run.train_step(state, run.data.batch(state.samples))
            meter.end(float(metrics["loss"]))


def beginning(recipe: "Recipe") -> "tuple[TrainData, Params]":
    """The batches and initial weights of `ours`; and PyTorch as a bare script has it."""
    import torch

    from modalities import dist, loop

    with dist.setup() as world:
        run, state = loop.build(recipe, world)
    torch.use_deterministic_algorithms(False)
    return run.data, state.params


def plain(recipe: "Recipe", meter: Meter, compile: bool) -> None:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from modalities.model import Transformer

    data, params = beginning(recipe)
    model = Transformer(recipe.model)
    model.load_state_dict(params)
    del params
    optimizer = torch.optim.AdamW(decay_groups(recipe, model), recipe.optim.lr, recipe.optim.betas, fused=True)
    is_bf16 = recipe.parallel.param_dtype == "bfloat16"

    def loss_of(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        logits_BTV = model(inputs_BT, train=True)
        # autocast leaves F.cross_entropy in bf16 on a CPU, though not on a GPU.
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())

    loss_fn = torch.compile(loss_of) if compile else loss_of
    for step in range(recipe.steps):
        meter.begin()
        batch, losses = data.batch(step * recipe.data.global_batch), []
        for inputs_BT, targets_BT in zip(batch["inputs"], batch["targets"], strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
                loss = loss_fn(inputs_BT, targets_BT) / len(batch["inputs"])
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.end(float(sum(losses)))


def decay_groups(recipe: "Recipe", model: Any) -> list[dict[str, Any]]:
    """The groups of torch.optim that say what the recipe's `decay_rules` say: matrices decay, and vectors do not."""
    decay = recipe.optim.weight_decay
    matrices = [param for param in model.parameters() if param.ndim > 1]
    vectors = [param for param in model.parameters() if param.ndim <= 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def as_llama(recipe: "Recipe", params: "Params") -> dict[str, Any]:
    """`params` under the names that Hugging Face gives a Llama's; a tied head is not among them."""
    from modalities import families

    stored = families.layout(recipe.model)
    return {name: part.join([params[ours] for ours in part.rows]) for name, part in stored.items()}


def trainer(recipe: "Recipe", meter: Meter, compile: bool) -> None:
    import_module("accelerate")  # the Trainer needs it, and would say so in many lines
    import transformers
    from torch import Tensor

    from modalities import families

    data, params = beginning(recipe)
    config = families.config_to_hf(recipe.model)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    missing, unexpected = model.load_state_dict(as_llama(recipe, params), strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected, (missing, unexpected)
    del params
    optim = recipe.optim
    sequences: list[dict[str, Tensor]] = []
    for step in range(recipe.steps):
        batch = data.batch(step * recipe.data.global_batch)
        for inputs_T, targets_T in zip(batch["inputs"].flatten(0, 1), batch["targets"].flatten(0, 1), strict=True):
            sequences.append({"input_ids": inputs_T, "labels": targets_T, "shift_labels": targets_T})

    losses: list[float] = []

    class Trainer(transformers.Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)  # divided by the micro-batches already
            losses.append(loss.item())
            return loss

    class Callback(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            losses.clear()
            meter.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            meter.end(sum(losses))

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            bf16=recipe.parallel.param_dtype == "bfloat16",
            torch_compile=compile,
            max_steps=recipe.steps,
            per_device_train_batch_size=batch["inputs"].shape[1],
            gradient_accumulation_steps=batch["inputs"].shape[0],
            optim="adamw_torch_fused",
            learning_rate=optim.lr,
            lr_scheduler_type="constant",
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_epsilon=optim.eps,
            weight_decay=optim.weight_decay,
            max_grad_norm=optim.grad_clip,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        Trainer(model=model, args=arguments, train_dataset=sequences, callbacks=[Callback()]).train()


def litgpt(recipe: "Recipe", meter: Meter) -> None:
    import torch

    fabric = import_module("lightning").Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    theirs = import_module("litgpt")
    copy_weights = import_module("litgpt.scripts.convert_hf_checkpoint").copy_weights_hf_llama
    chunked_cross_entropy = import_module("litgpt.utils").chunked_cross_entropy

    data, params = beginning(recipe)
    model = recipe.model
    config = theirs.Config(
        block_size=model.max_seq_len, padded_vocab_size=model.padded_vocab_size, vocab_size=model.padded_vocab_size,
        n_layer=model.num_layers, n_head=model.num_heads, n_embd=model.width, head_size=model.head_width,
        n_query_groups=model.kv_heads, intermediate_size=model.mlp_hidden, rotary_percentage=1.0, bias=False,
        parallel_residual=False, norm_class_name="RMSNorm", norm_eps=model.norm_eps, mlp_class_name="LLaMAMLP",
        rope_base=int(model.rope_theta),
    )  # fmt: skip
    gpt = theirs.GPT(config)
    weights: dict[str, torch.Tensor] = {}
    copy_weights(config, {}, weights, as_llama(recipe, params))
    if model.tied:
        gpt.transformer.wte.weight = gpt.lm_head.weight
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    gpt.load_state_dict(weights)
    del params, weights
    gpt.max_seq_length = recipe.data.seq_len
    groups = decay_groups(recipe, gpt)
    compiled = fabric.setup(torch.compile(gpt))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(groups, recipe.optim.lr, recipe.optim.betas, fused=True))
    for step in range(recipe.steps):
        meter.begin()
        batch, losses = data.batch(step * recipe.data.global_batch), []
        for inputs_BT, targets_BT in zip(batch["inputs"], batch["targets"], strict=True):
            loss = chunked_cross_entropy(compiled(inputs_BT), targets_BT)
            fabric.backward(loss / len(batch["inputs"]))
            losses.append(loss.detach() / len(batch["inputs"]))
        fabric.clip_gradients(compiled, optimizer, max_norm=recipe.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        meter.end(float(sum(losses)))


KINDS: "dict[str, Callable[[Recipe, Meter], None]]" = {
    "ours": ours,
    "ours selective": functools.partial(ours, checkpointing="selective"),
    "plain compiled": functools.partial(plain, compile=True),
    "plain eager": functools.partial(plain, compile=False),
    "trainer": functools.partial(trainer, compile=False),
    "trainer compiled": functools.partial(trainer, compile=True),
    "litgpt": litgpt,
}


def write_run(
    folder: Path, name: str, steps: int, global_batch: int, micro_batch: int, seq_len: int, lr: float = 3e-4
) -> Path:
    """The JSON of a recipe in `folder` for the model of recipe `name`, with data of its own beside it."""
    import numpy as np

    from modalities import recipe as recipes
    from modalities.config import to_dict
    from modalities.data import DataConfig
    from modalities.optim import ScheduleConfig
    from modalities.pbin import write_pbin

    base, _ = recipes.load(name)
    # The padding counts as words, so that nobody has to cut it off the logits: nanoGPT does not.
    model = replace(
        base.model, vocab_size=base.model.padded_vocab_size, max_seq_len=max(seq_len, base.model.max_seq_len)
    )
    share = 1 / np.arange(1, model.vocab_size + 1)
    tokens = np.random.default_rng(0).choice(
        model.vocab_size, size=steps * global_batch * seq_len + 1, p=share / share.sum()
    )
    with write_pbin(folder / "words.pbin", model.vocab_size) as append:
        append(tokens)
    data = DataConfig(
        train=(str(folder / "words.pbin"),), val=(), tokenizer="", seq_len=seq_len, global_batch=global_batch
    )
    recipe = replace(
        base,
        steps=steps,
        model=model,
        data=data,
        optim=replace(base.optim, lr=lr, schedule=ScheduleConfig(kind="constant")),
        parallel=replace(base.parallel, micro_batch=micro_batch),
        eval=replace(base.eval, every=0),
        sample=replace(base.sample, every=0),
    )
    path = folder / "recipe.json"
    path.write_text(json.dumps(to_dict(recipe)))
    return path


def environment(**changes: str) -> dict[str, str]:
    """Ours for a process that imports from this checkout."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **changes}


def run(contestant: str, recipe_path: Path) -> dict[str, Any]:
    """What the meter of a contestant's process had; or `failed`, the last line of its complaint."""
    kind, dtype = contestant.rsplit(" ", 1)
    command = [sys.executable, __file__, "--contest", json.dumps([kind, dtype, str(recipe_path)])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        return {"failed": (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main(
    *,
    recipe: str = "gpt2_60m",
    seq_len: int = 512,
    micro_batch: int = 8,
    accumulate: int = 1,
    lr: float = 3e-4,
    steps: int = 3,
    repeats: int = 2,
    contestants: tuple[str, ...] = CONTESTANTS,
) -> None:
    """Print the table; exit status 1 if losses differ by more than the bound, or a loop of this file did not run.

    Args:
        recipe: Whose model and optimizer.
        seq_len: Tokens of a sequence.
        micro_batch: Sequences put through the model at once.
        accumulate: Micro-batches of a step.
        lr: Learning rate, of all steps; the larger, the further bf16's roundings drive losses apart.
        steps: Timed steps of a process.
        repeats: Processes of each contestant.
        contestants: KIND DTYPE of each; the first is what the others' time and memory are compared with, and the
            losses are compared with the first of float32, or with the first.
    """
    for contestant in contestants:
        kind, _, dtype = contestant.rpartition(" ")
        if kind not in KINDS or dtype not in BOUND:
            raise ValueError(f"contestant {contestant!r} is not KIND DTYPE: {', '.join(KINDS)}; {', '.join(BOUND)}")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory() as folder:
        total = WARMUP + steps + MEMORY
        path = write_run(Path(folder), recipe, total, micro_batch * accumulate, micro_batch, seq_len, lr)
        for _ in range(repeats):
            for name in contestants:
                found[name].append(run(name, path))
    tokens = micro_batch * accumulate * seq_len
    print(
        f"{recipe}'s model, {accumulate} × {micro_batch} × {seq_len} = {tokens:,} tokens a step, {os.cpu_count()} cores"
    )
    if not report(found, tokens):
        sys.exit("a loop without packages of others did not run, or losses differ by more than the bound")


def report(found: dict[str, list[dict[str, Any]]], tokens: int) -> bool:
    """Print the table; whether all ran that need no packages of others, and all losses are within their bound."""
    print(
        "\n| step | tokens/s | ratio | median s | least – most | CPU-s | first s | MiB | ratio | loss | difference |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|"
    )
    ran = {name: runs for name, runs in found.items() if not any("failed" in one for one in runs)}
    reference = next((name for name in ran if name.endswith("float32")), next(iter(ran), ""))
    base_time = base_memory = 0.0
    fine = True
    for name, runs in found.items():
        if name not in ran:
            fine &= name.startswith(("trainer", "litgpt"))
            print(f"| {name} | did not run: {next(one['failed'] for one in runs if 'failed' in one)} |")
            continue
        seconds = sorted(s for one in runs for s in one["seconds"])
        middle, memory = statistics.median(seconds), statistics.median(one["memory"] for one in runs)
        base_time, base_memory = base_time or middle, base_memory or memory
        losses, expected = runs[0]["losses"], ran[reference][0]["losses"]
        difference = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
        fine &= difference <= BOUND[name.rsplit(" ", 1)[1]]
        print(
            f"| {name} | {tokens / middle:,.0f} | {base_time / middle:.2f}× | {middle:.3f} "
            f"| {seconds[0]:.3f} – {seconds[-1]:.3f} | {statistics.median(s for one in runs for s in one['cpu']):.2f} "
            f"| {statistics.median(one['first'] for one in runs):.1f} | {memory:,.0f} | {memory / base_memory:.2f}× "
            f"| {losses[0]:.4f} – {losses[-1]:.4f} | {difference:.1e} |"
        )
    bounds = ", ".join(f"{bound:.0e} in {dtype}" for dtype, bound in BOUND.items())
    print(f"\ndifference: the largest of any step's loss, relative to that of {reference!r}; at most {bounds}")
    return fine


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--contest"]:
        contest(*json.loads(sys.argv[2]))
    else:
        from modalities import cli

        cli.run(lambda args: cli.call(main, args))
