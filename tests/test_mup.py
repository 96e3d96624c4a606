"""µP: its rules against the papers' tables, what they do to activations, and what becomes of them in an export."""

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from modalities import cli, coordinates, fsdp, hf, loop, mup, optim, trained
from modalities.config import from_dict, to_dict
from modalities.model import Cache, ModelConfig, build_skeleton
from modalities.optim import OptimConfig, Params
from modalities.step import apply

CPU = torch.device("cpu")
GPT2: dict[str, Any] = {"norm": "layernorm", "positions": "learned", "activation": "gelu_tanh", "bias": True}


def small(**changes: Any) -> ModelConfig:
    sizes = {"vocab_size": 50, "num_layers": 4, "width": 32, "num_heads": 4, "mlp_width": 64, "max_seq_len": 16}
    return ModelConfig(**(sizes | changes))


def initial(config: ModelConfig, seed: int = 0) -> Params:
    return fsdp.init_params(build_skeleton(config), seed, CPU)


def logits(config: ModelConfig, params: Params) -> torch.Tensor:
    tokens = torch.randint(config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    return apply(build_skeleton(config), params, tokens, train=False)


# -------------------------------------------------------------------------------------------------------------- at base


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_at_the_base_everything_is_the_standard_model_to_the_bit(tmp_path: Path, kind: Any) -> None:
    plain = tiny.recipe(tmp_path, steps=2, optim=OptimConfig(lr=1e-2))
    plain = replace(plain, optim=replace(plain.optim, kind=kind))
    base = replace(plain.model, mup_base_width=32, mup_base_layers=2, mup_base_head_dim=8)
    found = []
    for name, model in (("plain", plain.model), ("base", base)):
        recipe = replace(plain, name=name, model=model)
        loop.train(recipe)
        found.append(trained.load(recipe.folder, CPU).params)
    assert all(torch.equal(p, found[1][name]) for name, p in found[0].items())
    assert not torch.equal(found[0]["embed.weight"], initial(plain.model)["embed.weight"])


def test_a_recipe_of_before_has_no_mup() -> None:
    old = {key: value for key, value in to_dict(small()).items() if not key.startswith("mup")}
    assert from_dict(ModelConfig, old, "model") == small()
    old = {key: value for key, value in to_dict(OptimConfig()).items() if key not in ("kind", "muon")}
    assert from_dict(OptimConfig, old, "optim") == OptimConfig()


def test_what_cannot_be_is_named() -> None:
    for field in ("mup_base_width", "mup_base_layers", "mup_base_head_dim"):
        with pytest.raises(ValueError, match=f"model.{field} is -1"):
            small(**{field: -1})
    for field in ("mup_base_layers", "mup_base_head_dim"):
        with pytest.raises(ValueError, match=f"model.{field} is a part of µP, but model.mup_base_width is 0"):
            small(**{field: 2})


# ------------------------------------------------------------------------------------------------------------ the rules


def test_the_tables_of_the_papers() -> None:
    """Tensor Programs V, table 8, and CompleteP, table 1: twice as wide and four times as deep as the base."""
    m, d = 2.0, 4.0
    config = small(width=64, num_heads=4, mup_base_width=32, mup_base_layers=1, mup_base_head_dim=8)
    expected = {
        "embed.weight": (1, 1, 1 / m),
        "final_norm.weight": (1, 1, 1 / m),
        "head.weight": (1, 1, 1 / m),
        "positions.weight": (1, 1, 1 / m),
        "blocks.1.attn_norm.weight": (1, 1, 1 / (m * d)),
        "blocks.1.attn.wq.bias": (1, 1, 1 / (m * d)),
        **{f"blocks.1.attn.{w}.weight": (1 / m, m, 1 / (m * d)) for w in ("wq", "wk", "wv", "wo")},
        **{f"blocks.1.mlp.{w}.weight": (1 / m, m, 1 / (m * d)) for w in ("w_gate", "w_up", "w_down")},
    }
    for name, values in expected.items():
        assert mup.multiples(config, name, "adamw") == values, name
    wq = "blocks.1.attn.wq.weight"
    assert mup.multiples(config, wq, "original")[:2] == (1, 1)
    assert mup.multiples(config, wq, "match_rms_adamw")[:2] == pytest.approx((m**-0.5, m**0.5))
    assert mup.init_multiple(config, wq) == m**-0.5 and mup.init_multiple(config, "embed.weight") == 1
    assert (mup.output_multiple(config), mup.residual_multiple(config)) == (1 / m, 1 / d)
    # From heads of 8 to heads of 16: 1/√8 · 8/16 in all, by attention's own 1/√16 and the rest before it.
    assert mup.query_multiple(config) / math.sqrt(16) == pytest.approx(8 / 16 / math.sqrt(8))


def test_initial_weights_follow_the_width_and_the_base_depth() -> None:
    plain, wide = initial(small(width=256)), initial(small(width=256, mup_base_width=64, mup_base_layers=1))
    for name, p in plain.items():
        ratio = 1.0
        if "norm" not in name and name.startswith("blocks"):
            ratio = 0.5  # 1 / √(256 / 64)
        if name.endswith(("wo.weight", "w_down.weight")):
            ratio *= 2  # √(2 · 4 layers) is √(2 · 1 layer)
        torch.testing.assert_close(wide[name], p * ratio, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", ["adamw", "match_rms_adamw", "original"])
def test_learning_rate_times_weight_decay_does_not_follow_the_width(rule: Any) -> None:
    for name, _ in build_skeleton(small()).named_parameters():
        multiples = mup.multiples(small(width=128, num_heads=16, mup_base_width=32), name, rule)
        assert multiples.lr * multiples.weight_decay == 1, name


def test_the_optimizer_takes_each_parameters_own_multiples() -> None:
    """One step of AdamW on gradients of one sign moves a weight by its own rate, and decays it as at the base."""
    config = small(width=128, num_heads=16, mup_base_width=32)
    skeleton = build_skeleton(config)
    names = [name for name, _ in skeleton.named_parameters()]
    params = {name: torch.ones(p.shape) for name, p in skeleton.named_parameters()}
    optimizer = optim.make(OptimConfig(weight_decay=0.1), names, lambda name, rule: mup.multiples(config, name, rule))
    grads = {name: torch.full_like(p, 3.0) for name, p in params.items()}
    optimizer.update(grads, optimizer.init(params), params, 0.01)
    for name, p in params.items():
        hidden = name.startswith("blocks") and "norm" not in name
        moved = 0.01 / 4 if hidden else 0.01
        decayed = 0.0 if "norm" in name else 0.01 * 0.1
        torch.testing.assert_close(p, torch.full_like(p, 1 - decayed - moved), rtol=1e-6, atol=0)


def test_a_cache_and_a_whole_pass_agree() -> None:
    config = small(mup_base_width=8, mup_base_layers=1, mup_base_head_dim=2)
    model, params = build_skeleton(config), initial(config)
    tokens = torch.randint(50, (1, 8), generator=torch.Generator().manual_seed(0))
    cache = Cache(config, 1, 8, torch.float32, CPU)
    steps = [apply(model, params, tokens[:, i : i + 1], train=False, cache=cache) for i in range(8)]
    torch.testing.assert_close(torch.cat(steps, 1), apply(model, params, tokens, train=False), rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- exports


@pytest.mark.parametrize("family", [{}, GPT2, {"qk_norm": True, "tied": False}, {"qkv_bias": True, "tied": False}])
def test_folded_weights_of_a_standard_model_give_the_same_logits(family: dict[str, Any]) -> None:
    for base in itertools.product((8, 24), (1, 3), (2, 8)):
        fields = dict(zip(("mup_base_width", "mup_base_layers", "mup_base_head_dim"), base, strict=True))
        config = small(**family, **fields)
        generator = torch.Generator().manual_seed(0)
        params = {n: torch.randn(p.shape, generator=generator) for n, p in build_skeleton(config).named_parameters()}
        params = {name: p.double() for name, p in params.items()}
        folded = {name: mup.scaled(p, mup.folded_multiple(config, name)) for name, p in params.items()}
        expected = logits(config, params)
        torch.testing.assert_close(logits(mup.standard(config), folded), expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(logits(mup.standard(config), params), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_is_exported_as_a_standard_model(tmp_path: Path, tied: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model = replace(tiny.MODEL, tied=tied, mup_base_width=12, mup_base_layers=3, mup_base_head_dim=6)
    recipe = tiny.recipe(tmp_path, steps=4, model=model)
    loop.train(recipe)
    hf.export(recipe.folder, tmp_path / "out")
    assert "µP's multiples folded into them; logits differ by at most" in capsys.readouterr().out
    ours, theirs = trained.load(recipe.folder, CPU), trained.load(tmp_path / "out", CPU)
    assert theirs.config.mup_base_width == 0 and theirs.config.tied == tied
    expected = logits(ours.config, ours.params)
    assert (logits(theirs.config, theirs.params) - expected).abs().max() <= 1e-6 * expected.abs().max()


# ----------------------------------------------------------------------------------------------------- coordinate check


def test_activations_grow_with_the_width_but_not_under_mup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny.recipe(tmp_path)
    recipe = replace(recipe, optim=replace(recipe.optim, lr=5e-3))
    path = tmp_path / "wide.json"
    path.write_text(json.dumps(to_dict(recipe)))
    out = tmp_path / "coord.png"
    args = ["--recipe", f"{path}", "--widths", "32", "64", "128", "256", "--steps", "3", "--out", f"{out}"]
    cli.call(coordinates.main, args, prog="coord-check")
    lines = capsys.readouterr().out.splitlines()
    table = {line[:18].strip(): [float(cell) for cell in line[18:].split()] for line in lines[3:8]}
    assert set(table) == set(coordinates.PLACES)
    for place, (size, size_mup, change, change_mup) in table.items():
        assert abs(size_mup) < 0.25 and abs(change_mup) < 0.25, (place, table)
        if place != "embedding":
            assert size > 0.5 and change > 0.5, (place, table)
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="coord.png exists already"):
        cli.call(coordinates.main, args, prog="coord-check")


def test_widths_keep_heads_and_proportions() -> None:
    model = small(num_heads=8, num_kv_heads=2, width=64, mlp_width=160)
    wide = coordinates.at_width(model, 256)
    assert (wide.num_heads, wide.kv_heads, wide.head_width, wide.mlp_hidden) == (32, 8, 8, 640)
    assert coordinates.at_width(model, 8).kv_heads == 1
    with pytest.raises(ValueError, match="width 60 is no multiple of the recipe's heads of 8 features"):
        coordinates.at_width(model, 60)


@pytest.mark.slow  # a process of its own that trains nine models
def test_the_benchmark_finds_best_learning_rates(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    command = [
        sys.executable, f"{root / 'benchmarks' / 'mup.py'}", "--widths", "32", "64", "--steps", "6", "--powers", "-8",
        "-7", "-6", "--no-compile", "--seq-len", "16", "--batch", "2", "--out", f"{tmp_path / 'mup.png'}",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{root}"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    rows = [
        line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith(("| standard", "| µP"))
    ]
    assert [row[:2] for row in rows[:4]] == [["standard", "32"], ["µP", "32"], ["standard", "64"], ["µP", "64"]]
    assert rows[0][2:] == rows[1][2:] and rows[2][2:] != rows[3][2:] and len(rows) == 6
    assert all(0.0038 < float(row[-1]) < 0.017 for row in rows[:4])
    assert (tmp_path / "mup.png").read_bytes().startswith(b"\x89PNG")
