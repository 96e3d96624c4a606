"""Every mesh × activation checkpointing × compilation trains as one eager process does, and reads what others saved."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from modalities import checkpoint, dist, fsdp, loop
from modalities.config import to_dict
from modalities.fsdp import ParallelConfig
from modalities.model import ModelConfig, build_skeleton
from modalities.optim import OptimConfig
from modalities.recipe import Recipe

STEPS, LR = 10, 1e-3
# The third block is one that every_k passes over; grouped heads, their norms, a window and a softcap are all split.
LLAMA = replace(tiny.MODEL, num_layers=3, qk_norm=True, logit_softcap=20.0, window=20)
GPT2 = ModelConfig(
    vocab_size=100, num_layers=3, width=32, num_heads=4, max_seq_len=64,
    norm="layernorm", positions="learned", activation="gelu_tanh", bias=True, tied=False,
)  # fmt: skip
MESHES: dict[str, dict[str, int]] = {
    "one": {},
    "fsdp2": {"shard": 2},
    "tp2": {"shard": 1, "tensor": 2},
    "fsdp4": {"shard": 4},
    "hsdp": {"replicate": 2, "shard": 2},
    "fsdp2-tp2": {"shard": 2, "tensor": 2},
    "hsdp-tp2": {"replicate": 2, "shard": 1, "tensor": 2},
}
RANKS = {"one": 1, "fsdp2": 2, "tp2": 2, "fsdp4": 4, "hsdp": 4, "fsdp2-tp2": 4, "hsdp-tp2": 4}
MODES = ("none", "full", "every_k", "selective")
Case = tuple[str, str, str]
"""A mesh, a kind of activation checkpointing, and what is compiled."""


def recipe_of(folder: Path, model: ModelConfig, case: Case, dtype: Any = "float32") -> Recipe:
    mesh, mode, compile = case
    options: dict[str, Any] = {"activation_checkpointing": mode, "compile": compile, **MESHES[mesh]}
    return tiny.recipe(
        folder,
        name="-".join(case),
        steps=STEPS,
        model=model,
        # AdamW divides by the gradient's size: where there is next to none, a larger eps keeps roundings small.
        optim=OptimConfig(lr=LR, eps=1e-5),
        parallel=ParallelConfig(micro_batch=2, param_dtype=dtype, **options),
    )


def train(folder: Path, model: ModelConfig, case: Case, world: dist.World, dtype: str) -> None:
    """Train, and leave `<case>.pt` with the losses and the whole weights, and a checkpoint."""
    recipe = recipe_of(folder, model, case, dtype)
    torch._dynamo.reset()
    run, state = loop.build(recipe, world)
    losses = [run.evaluate(state.params, lambda: False)["val"]]
    for _ in range(STEPS):
        state, metrics = run.train_step(state, run.data.batch(state.samples))
        losses.append(torch.as_tensor(metrics["loss"]))
    losses.append(run.evaluate(state.params, lambda: False)["val"])
    weights = {name: fsdp.whole(param.detach()) for name, param in state.params.items()}
    assert list(weights) == [name for name, _ in build_skeleton(model).named_parameters()]
    checkpoint.save(recipe.folder, state, to_dict(recipe), world.is_main)
    if world.is_main:
        torch.save({"losses": torch.stack(losses), "weights": weights}, folder / f"{recipe.name}.pt")


def restore(folder: Path, model: ModelConfig, case: Case, mesh: str, world: dist.World) -> None:
    """What `case` saved is to the bit what `mesh` reads."""
    _, state = loop.build(recipe_of(folder, model, (mesh, "none", "off")), world)
    found = checkpoint.newest(recipe_of(folder, model, case).folder)
    assert found is not None
    state = checkpoint.restore(found, state)
    saved = torch.load(folder / f"{'-'.join(case)}.pt")["weights"]
    for name, param in state.params.items():
        assert torch.equal(fsdp.whole(param.detach()), saved[name]), f"{mesh} reads {name} of {case} otherwise"
    assert state.step == STEPS


def visit(folder: Path, model: ModelConfig, mesh: str, cases: list[Case], saved: list[Case], dtype: str) -> None:
    """In the processes of one start: `mesh` trains its `cases`, and reads what was `saved`."""
    with dist.setup(**MESHES[mesh]) as world:
        for case in cases:
            if case[0] == mesh:
                train(folder, model, case, world, dtype)
        for case in saved:
            restore(folder, model, case, mesh, world)


def visit_all(folder: Path, model: ModelConfig, cases: list[Case], saved: list[Case], dtype: str = "float32") -> None:
    tiny.recipe(folder)  # its data, before ranks look for it
    for mesh, ranks in RANKS.items():
        if ranks == 1:
            visit(folder, model, mesh, cases, saved, dtype)
        else:
            tiny.run_ranks(ranks, visit, folder, model, mesh, cases, saved, dtype)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative to `b`, or to the way that AdamW may have gone: a key's bias has no gradient but its roundings."""
    return float((a.double() - b.double()).norm() / max(float(b.double().norm()), STEPS * LR * b.numel() ** 0.5))


def check(folder: Path, cases: list[Case], loss_bound: float = 1e-5, weight_bound: float = 1e-5) -> None:
    """Losses are within a bound at every step, and each weight in the norm of its differences."""
    expected = torch.load(folder / "one-none-off.pt")
    wrong = []
    for case in cases:
        found = torch.load(folder / f"{'-'.join(case)}.pt")
        loss = float(((found["losses"] - expected["losses"]) / expected["losses"]).abs().max())
        weight = max(distance(found["weights"][name], want) for name, want in expected["weights"].items())
        print(f"{'-'.join(case):30} loss {loss:.1e} weights {weight:.1e}")
        if loss > loss_bound or weight > weight_bound:
            wrong.append(f"{case}: losses differ by {loss:.1e}, weights by {weight:.1e}")
    assert not wrong, wrong


@pytest.mark.slow
@tiny.needs_compiler
@pytest.mark.parametrize(
    ("model", "dtype", "loss_bound", "weight_bound"),
    [
        pytest.param(LLAMA, "float32", 1e-5, 1e-5, id="llama"),
        pytest.param(GPT2, "float32", 1e-5, 1e-5, id="gpt2"),
        # Roundings of 2^-9 fall otherwise where sums are cut otherwise, or several operations are one.
        pytest.param(LLAMA, "bfloat16", 1e-4, 1e-2, id="bf16"),
    ],
)
def test_all_of_the_grid(
    tmp_path: Path, model: ModelConfig, dtype: str, loss_bound: float, weight_bound: float
) -> None:
    cases = [(mesh, mode, compile) for mesh in MESHES for mode in MODES for compile in ("off", "model")]
    cases.append(("one", "full", "block"))  # what "model" means as well where the model is sharded
    visit_all(tmp_path, model, cases, [], dtype)
    check(tmp_path, cases, loss_bound, weight_bound)
    visit_all(tmp_path, model, [], [(mesh, "none", "off") for mesh in MESHES])


QUICK: list[Case] = [
    ("one", "none", "off"),
    ("fsdp2", "selective", "off"),
    ("tp2", "every_k", "model"),
    ("fsdp4", "none", "off"),
    ("hsdp", "full", "off"),
    ("fsdp2-tp2", "full", "off"),
]


@tiny.needs_compiler
def test_every_mesh_trains_as_one_process(tmp_path: Path) -> None:
    visit_all(tmp_path, LLAMA, QUICK, [])
    check(tmp_path, QUICK)
    # Not all pairs, for a start takes seconds: one process reads what every mesh wrote.
    with dist.setup() as world:
        for case in QUICK:
            restore(tmp_path, LLAMA, case, "one", world)
