"""Members that train together against the same recipes by `loop.train`, one after another."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from modalities import attention, dist, loop, members
from modalities.log import read_metrics
from modalities.recipe import Recipe
from modalities.step import TrainState


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    """`recipe` with fields replaced, those of a config within as `optim=dict(lr=…)`."""
    parts = {name: replace(getattr(recipe, name), **v) if type(v) is dict else v for name, v in changes.items()}
    return replace(recipe, **parts)


def train_together(recipes: list[Recipe]) -> tuple[members.Together, TrainState]:
    with dist.setup() as world:
        together, state = members.build(recipes, world)
        for _ in range(recipes[0].steps):
            state = together.step(state)
    return together, state


def solo(recipe: Recipe, name: str) -> tuple[torch.Tensor, float]:
    """(loss of each step [steps], validation loss at the end) of the recipe's own run."""
    recipe = replace(recipe, name=name)
    lines = read_metrics(loop.train(recipe))
    losses = torch.tensor([line["loss"] for line in lines if "loss" in line], dtype=torch.float64)
    return losses, [line["val/val/loss"] for line in lines if "val/val/loss" in line][-1]


def assert_equal_to_solo(recipes: list[Recipe], tolerance: float = 1e-5) -> None:
    together, state = train_together(recipes)
    val = together.evaluate(state.params)["val"]
    for i, recipe in enumerate(recipes):
        losses, val_loss = solo(recipe, f"solo-{i}")
        ours = state.opt_state["record"]["losses"][:, i].double()
        assert ((ours - losses) / losses).abs().max() <= tolerance, f"member {i}"
        assert float(val[i]) == pytest.approx(val_loss, rel=tolerance)


def test_each_learns_as_its_own_run(tmp_path: Path) -> None:
    base = tiny.recipe(tmp_path, steps=12)
    schedule = replace(base.optim.schedule, kind="constant", warmup=7)
    assert_equal_to_solo(
        [
            changed(base, optim={"lr": 3e-3, "weight_decay": 0.0, "betas": (0.8, 0.99), "eps": 1e-6}),
            changed(base, seed=1, optim={"grad_clip": 0.3}, model={"init_std": 0.05}),
            changed(base, seed=1, optim={"grad_clip": 0.0, "schedule": schedule}),
            changed(base, loss={"z_loss": 1e-3, "label_smoothing": 0.1}),
        ]
    )


def test_dropout_and_documents_and_bf16_train(tmp_path: Path) -> None:
    base = changed(
        tiny.recipe(tmp_path, steps=6),
        model={"attn_dropout": 0.2, "resid_dropout": 0.1, "embed_dropout": 0.1},
        data={"document_mask": True},
        parallel={"param_dtype": "bfloat16"},
    )
    together, state = train_together([base, changed(base, optim={"lr": 2e-2}), base])
    losses = state.opt_state["record"]["losses"]
    assert losses.isfinite().all() and (losses[-1] < losses[0]).all()
    assert not torch.equal(losses[:, 0], losses[:, 2])  # each member draws for itself
    # Evaluation drops nothing: twice the same.
    first, second = (together.evaluate(state.params)["val"] for _ in range(2))
    assert torch.equal(first, second)


def test_each_has_its_own_rates_of_dropout(tmp_path: Path) -> None:
    """Who drops nothing learns as by itself, whoever trains beside it; who drops a tenth does so on average."""
    base = tiny.recipe(tmp_path, steps=5)
    rates: tuple[dict[str, float], ...] = ({}, {"embed_dropout": 0.5}, {"attn_dropout": 0.5, "resid_dropout": 0.2})
    recipes = [changed(base, model=rate) for rate in rates]
    _, state = train_together(recipes)
    losses, _ = solo(base, "solo")
    record = state.opt_state["record"]["losses"].double()
    assert ((record[:, 0] - losses) / losses).abs().max() <= 1e-5
    assert (record[0, 1:] != record[0, 0]).all() and record.isfinite().all()

    torch.manual_seed(0)
    x, p = torch.full((10_000,), 3.0, dtype=torch.bfloat16), torch.tensor([0.0, 0.1, 0.9])
    dropped = torch.func.vmap(lambda rate: attention.drop(x, rate), randomness="different")(p)
    assert dropped.dtype == x.dtype and torch.equal(dropped[0], x)
    assert (dropped == 0).double().mean(1).tolist() == pytest.approx([0, 0.1, 0.9], abs=0.02)
    assert dropped.double().mean(1).tolist() == pytest.approx([3, 3, 3], rel=0.1)


def test_documents_and_one_micro_batch_as_alone(tmp_path: Path) -> None:
    base = changed(tiny.recipe(tmp_path, steps=5), data={"document_mask": True}, parallel={"micro_batch": 8})
    base = changed(base, model={"logit_softcap": 5.0, "mup_base_width": 16})
    assert_equal_to_solo([base, changed(base, optim={"lr": 3e-3})])


def test_who_diverges_disturbs_nobody(tmp_path: Path) -> None:
    base = changed(tiny.recipe(tmp_path, steps=8), guard={"max_bad_steps": 3}, optim={"grad_clip": 0.0})
    good, wild = changed(base, optim={"lr": 1e-3}), changed(base, optim={"lr": 1e30})
    _, beside_wild = train_together([base, wild, good])
    _, beside_good = train_together([base, good, good])
    for name, param in beside_wild.params.items():
        for i in (0, 2):
            assert torch.equal(param[i], beside_good.params[name][i]), f"{name} of member {i}"
    record = beside_wild.opt_state["record"]
    first_bad = int(record["diverged"][1])
    assert record["diverged"].tolist() == [0, first_bad, 0] and 2 <= first_bad <= 6
    assert record["losses"][:, [0, 2]].isfinite().all()
    # It keeps what it had before the first bad step.
    frozen = members.weights_of(beside_wild, 1)
    assert all(param.isfinite().all() for param in frozen.values()) and float(record["updates"][1]) == first_bad - 1


def test_who_trains_together(tmp_path: Path) -> None:
    base = tiny.recipe(tmp_path)
    for same in (
        changed(base, seed=5, name="b"),
        changed(base, optim={"lr": 1.0, "betas": (0.5, 0.5), "schedule": replace(base.optim.schedule, warmup=1)}),
        changed(base, loss={"z_loss": 0.1, "label_smoothing": 0.2}, model={"init_std": 1.0, "attn_dropout": 0.1}),
    ):
        assert members.alike(same) == members.alike(base) and members.why_alone(same) is None
    for other in (changed(base, steps=21), changed(base, model={"width": 64}), changed(base, data={"seq_len": 16})):
        assert members.alike(other) != members.alike(base)
    assert members.why_alone(changed(base, optim={"kind": "muon"})) == "optim.kind"
    assert members.why_alone(changed(base, ema={"decay": 0.9})) == "ema.decay"


@pytest.mark.slow
@tiny.needs_compiler
@pytest.mark.parametrize("micro_batch", [2, 8])
def test_compiled_as_alone(tmp_path: Path, micro_batch: int) -> None:
    base = changed(tiny.recipe(tmp_path), parallel={"compile": "model", "micro_batch": micro_batch})
    assert_equal_to_solo([base, changed(base, seed=1, optim={"lr": 3e-3}), changed(base, loss={"z_loss": 1e-3})])
