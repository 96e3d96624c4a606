"""Muon against torch.optim.Muon, over ranks, and in a run."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from modalities import checkpoint, dist, loop, optim
from modalities.log import read_metrics
from modalities.model import build_skeleton
from modalities.muon import MuonConfig, newton_schulz
from modalities.optim import OptimConfig, OptState, Params
from modalities.recipe import Recipe, memory_per_rank
from modalities.step import TrainState

SHAPES = {
    "blocks.0.attn.wq.weight": (24, 16),
    "blocks.0.attn.wk.weight": (7, 16),  # not divisible by ranks
    "blocks.0.attn.wo.weight": (16, 24),
    "blocks.0.mlp.w_up.weight": (48, 16),
    "blocks.0.mlp.w_down.weight": (1, 48),
    "embed.weight": (20, 16),
    "final_norm.weight": (16,),
}
MATRICES = [name for name in SHAPES if name.startswith("blocks")]
CONFIG = OptimConfig(kind="muon", lr=1e-2, weight_decay=0.3, muon=MuonConfig(weight_decay=0.2))


def random_tensors(seed: int, scale: float = 1.0) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in SHAPES.items()}


def lr_at(step: int) -> float:
    return 1e-2 * (1 + step % 3)


def run(config: OptimConfig, steps: int, place: Callable[[Tensor], Tensor] = Tensor.clone) -> tuple[Params, OptState]:
    """`steps` steps on random gradients, the same however `place` spreads the tensors."""
    params = {name: place(p) for name, p in random_tensors(0).items()}
    optimizer = optim.make(config, params)
    state = optimizer.init(params)
    for step in range(steps):
        grads = {name: place(g) for name, g in random_tensors(1 + step).items()}
        params, state = optimizer.update(grads, state, params, lr_at(step), torch.zeros(()))
    return params, state


# ---------------------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_ten_steps_are_those_of_torch_to_the_bit(adjust: Any, nesterov: bool) -> None:
    config = replace(CONFIG, muon=replace(CONFIG.muon, adjust=adjust, nesterov=nesterov))
    ours, state = run(config, 10)
    theirs = {name: torch.nn.Parameter(p) for name, p in random_tensors(0).items()}
    settings: dict[str, Any] = {"nesterov": nesterov, "adjust_lr_fn": adjust, "weight_decay": 0.2}
    hidden = torch.optim.Muon([theirs[name] for name in MATRICES], lr=0.02, **settings)
    groups: list[dict[str, Any]] = [
        {"params": [theirs["embed.weight"]], "weight_decay": 0.3},
        {"params": [theirs["final_norm.weight"]], "weight_decay": 0.0},
    ]
    rest = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    for step in range(10):
        for name, grad in random_tensors(1 + step).items():
            theirs[name].grad = grad
        for group in rest.param_groups:
            group["lr"] = lr_at(step)
        hidden.param_groups[0]["lr"] = lr_at(step) / 1e-2 * 0.02
        hidden.step()
        rest.step()
    for name, p in ours.items():
        assert torch.equal(p, theirs[name]), name
    for name in MATRICES:
        assert torch.equal(state["momentum"][name], hidden.state[theirs[name]]["momentum_buffer"])


def test_newton_schulz_is_nearly_the_polar_factor_of_float64() -> None:
    matrix = random_tensors(0)["blocks.0.mlp.w_up.weight"]
    for x in (matrix, matrix.T, 1e-3 * matrix):
        u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
        singular = torch.linalg.svdvals(newton_schulz(x, CONFIG.muon).double())
        assert singular.min() > 0.6 and singular.max() < 1.25
        # The directions are the matrix's own, whatever becomes of their lengths.
        turned = u.T @ newton_schulz(x, CONFIG.muon).double() @ vh.T
        assert (turned - torch.diag(turned.diagonal())).abs().max() < 0.05


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.0])
def test_a_skipped_update_leaves_every_bit_and_the_next_one_is_as_if_it_had_not_been(bad: float) -> None:
    params, state = run(CONFIG, 3)
    expected, expected_state = run(CONFIG, 3)
    optimizer = optim.make(CONFIG, params)
    held = [*params.values(), *(tensor for column in state.values() for tensor in column.values())]
    before = [tensor.clone() for tensor in held]
    optimizer.update({name: torch.full_like(p, bad) for name, p in params.items()}, state, params, 1e-2, torch.ones(()))
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(held, before, strict=True))
    for p, s, skip in ((params, state, torch.zeros(())), (expected, expected_state, None)):
        optimizer.update(random_tensors(9), s, p, 1e-2, skip)
    assert all(torch.equal(params[name], expected[name]) for name in params)


def test_muon_has_its_matrices_and_adamw_the_rest() -> None:
    names = [name for name, _ in build_skeleton(tiny.MODEL).named_parameters()]
    state = optim.make(CONFIG, names).init({name: p for name, p in build_skeleton(tiny.MODEL).named_parameters()})
    hidden = {name for name in names if name.startswith("blocks") and "norm" not in name}
    assert set(state["momentum"]) == hidden and len(hidden) == 14
    assert set(state["exp_avg"]) == set(state["exp_avg_sq"]) == set(state["step"]) == set(names) - hidden


def test_what_cannot_be_is_named() -> None:
    fields: list[tuple[dict[str, Any], str]] = [
        ({"lr": -1.0}, "lr"), ({"momentum": 1.0}, "momentum"), ({"eps": 0.0}, "eps"), ({"matrices": "("}, "matrices"),
        ({"newton_schulz_steps": 0}, "newton_schulz_steps"), ({"weight_decay": math.inf}, "weight_decay"),
    ]  # fmt: skip
    for changes, named in fields:
        with pytest.raises(ValueError, match=f"optim.muon.{named}"):
            MuonConfig(**changes)
    with pytest.raises(ValueError, match="optim.lr is 0"):
        OptimConfig(kind="muon", lr=0.0)
    with pytest.raises(ValueError, match="no parameter's name matches 'nothing'"):
        optim.make(replace(CONFIG, muon=MuonConfig(matrices="nothing")), SHAPES)
    every = optim.make(replace(CONFIG, muon=MuonConfig(matrices=".*")), SHAPES)
    with pytest.raises(ValueError, match="matches final_norm.weight, but it has 1 dimensions, not 2"):
        every.init(random_tensors(0))


# ----------------------------------------------------------------------------------------------------------- many ranks


def same_over_ranks(shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    """Ten steps on shards are those on whole tensors, to the bit, whatever the mesh."""
    with dist.setup() as world:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)

        def place(whole: Tensor) -> Tensor:
            placements = [Replicate() if name == "replicate" else Shard(0) for name in names]
            if "tensor" in names and whole.ndim == 2:
                placements[names.index("tensor")] = Shard(1)
            return distribute_tensor(whole.clone(), mesh, placements, src_data_rank=None)

        params, state = run(CONFIG, 10, place)
        expected, expected_state = run(CONFIG, 10)
        assert world.size == math.prod(shape)
        for name, p in params.items():
            assert isinstance(p, DTensor) and torch.equal(p.full_tensor(), expected[name]), name
        for name, m in state["momentum"].items():
            assert isinstance(m, DTensor) and torch.equal(m.full_tensor(), expected_state["momentum"][name]), name


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((2,), ("shard",)),
        pytest.param((2, 2), ("replicate", "shard"), marks=pytest.mark.slow),
        pytest.param((2, 2), ("shard", "tensor"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_shards_are_updated_as_whole_matrices_are(shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    tiny.run_ranks(math.prod(shape), same_over_ranks, shape, names)


# ---------------------------------------------------------------------------------------------------------------- a run


def muon_recipe(folder: Path, **parallel: Any) -> Recipe:
    """Under µP, whose multiples are then everywhere that Muon is."""
    model = replace(tiny.MODEL, mup_base_width=16, mup_base_layers=1, mup_base_head_dim=4)
    base = tiny.recipe(folder, model=model)
    optimizer = replace(base.optim, kind="muon", lr=3e-3, muon=MuonConfig(lr=0.02))
    return replace(base, optim=optimizer, parallel=replace(base.parallel, **parallel))


def train(recipe: Recipe) -> None:
    loop.train(recipe)


def saved_state(recipe: Recipe, step: int) -> TrainState:
    with dist.setup() as world:
        _, state = loop.build(recipe, world)
        return checkpoint.restore(checkpoint.path_of(recipe.folder, step), state)


def test_a_run_learns_and_resumes_to_the_bit(tmp_path: Path) -> None:
    recipe = muon_recipe(tmp_path)
    loop.train(recipe)
    losses = [line["loss"] for line in read_metrics(recipe.folder) if "loss" in line]
    assert losses[-1] < losses[0] - 0.3
    whole = saved_state(recipe, 20)
    shutil.rmtree(checkpoint.path_of(recipe.folder, 20))
    loop.train(recipe)  # from step 10
    again = saved_state(recipe, 20)
    assert again.params.keys() == whole.params.keys()
    assert all(torch.equal(again.params[name], p) for name, p in whole.params.items())
    assert whole.opt_state["momentum"] and whole.opt_state.keys() == again.opt_state.keys()
    for kind, tensors in whole.opt_state.items():
        assert all(torch.equal(again.opt_state[kind][name], tensor) for name, tensor in tensors.items()), kind


def test_a_dry_run_foretells_the_moments(tmp_path: Path) -> None:
    recipe = muon_recipe(tmp_path)
    foretold = memory_per_rank(recipe, ranks=1)
    with dist.setup() as world:
        _, state = loop.build(recipe, world)
    held = sum(t.nbytes for kind, tensors in state.opt_state.items() if kind != "step" for t in tensors.values())
    assert foretold["optimizer"] == pytest.approx(held, rel=1e-6)
    assert foretold["copy being saved"] == pytest.approx(held + foretold["parameters"], rel=1e-6)
    with_adamw = memory_per_rank(tiny.recipe(tmp_path), ranks=1)
    assert 0.6 < foretold["optimizer"] / with_adamw["optimizer"] < 0.9


@pytest.mark.slow  # starts ranks four times
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_sharded_run_is_that_of_one_process(tmp_path: Path, tensor: int) -> None:
    """Gradients differ in their last bits, which bf16 in Newton–Schulz makes more of: losses agree to 1e-3."""
    recipe = muon_recipe(tmp_path, tensor=tensor)
    if tensor > 1:
        recipe = replace(recipe, name="split")
    loop.train(muon_recipe(tmp_path))
    alone = [line["loss"] for line in read_metrics(muon_recipe(tmp_path).folder) if "loss" in line]
    if tensor == 1:  # goes on with a checkpoint of one rank
        shutil.rmtree(checkpoint.path_of(recipe.folder, 20))
    tiny.run_ranks(2 * tensor, train, recipe)
    losses = [line["loss"] for line in read_metrics(recipe.folder) if "loss" in line]
    assert losses[-10:] == pytest.approx(alone[-10:], rel=1e-3)
    if tensor == 1:  # and one rank with those of two
        shutil.rmtree(checkpoint.path_of(recipe.folder, 10))
        assert saved_state(recipe, 20).step == 20
