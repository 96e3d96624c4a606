"""AdamW, clipping, decay groups and schedules, against float64 and PyTorch's own."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from modalities.model import ModelConfig, build_skeleton
from modalities.optim import (
    OptimConfig,
    Params,
    ScheduleConfig,
    adamw,
    clip_by_global_norm,
    decay_multiples,
    learning_rate,
    lr_multiple,
)

SHAPES = {"embed.weight": (50, 16), "blocks.0.attn.wq.weight": (16, 16), "blocks.0.attn_norm.weight": (16,)}
CONFIG = OptimConfig(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3)
DECAY = {"embed.weight": 0.3, "blocks.0.attn.wq.weight": 0.3, "blocks.0.attn_norm.weight": 0.0}


def random_tensors(seed: int, dtype: torch.dtype) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()
    }


def lr_at(step: int) -> float:
    return 1e-2 * (1 + step % 3)


def run_ours(dtype: torch.dtype, steps: int) -> Params:
    params = random_tensors(0, dtype)
    optimizer = adamw(CONFIG, params)
    state = optimizer.init(params)
    for step in range(steps):
        params, state = optimizer.update(random_tensors(1 + step, dtype), state, params, lr_at(step))
    return params


def run_torch(dtype: torch.dtype, steps: int) -> Params:
    params = {name: torch.nn.Parameter(p) for name, p in random_tensors(0, dtype).items()}
    groups: list[dict[str, Any]] = [{"params": [p], "weight_decay": DECAY[name]} for name, p in params.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    for step in range(steps):
        for name, grad in random_tensors(1 + step, dtype).items():
            params[name].grad = grad
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


def run_by_hand(dtype: torch.dtype, steps: int) -> Params:
    """Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, in float64 whatever `dtype` is."""
    params = {name: p.double() for name, p in random_tensors(0, dtype).items()}
    mean = {name: torch.zeros_like(p) for name, p in params.items()}
    square = {name: torch.zeros_like(p) for name, p in params.items()}
    for step in range(steps):
        for name, grad in random_tensors(1 + step, dtype).items():
            g, lr = grad.double(), lr_at(step)
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.95 * square[name] + 0.05 * g**2
            unbiased_mean, unbiased_square = (
                mean[name] / (1 - 0.9 ** (step + 1)),
                square[name] / (1 - 0.95 ** (step + 1)),
            )
            params[name] = params[name] - lr * DECAY[name] * params[name]
            params[name] = params[name] - lr * unbiased_mean / (unbiased_square.sqrt() + 1e-8)
    return params


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("reference", [run_torch, run_by_hand])
def test_twenty_steps_of_adamw(
    reference: Callable[[torch.dtype, int], Params], dtype: torch.dtype, bound: float
) -> None:
    ours, expected = run_ours(dtype, 20), reference(dtype, 20)
    for name, p in ours.items():
        assert p.dtype == dtype
        torch.testing.assert_close(p.double(), expected[name].double(), rtol=0, atol=bound)


def test_update_is_in_place() -> None:
    params = random_tensors(0, torch.float32)
    optimizer = adamw(CONFIG, params)
    state = optimizer.init(params)
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"} and all(
        set(column) == set(params) for column in state.values()
    )
    held = [*params.values(), *(tensor for column in state.values() for tensor in column.values())]
    before = [tensor.clone() for tensor in held]
    new_params, new_state = optimizer.update(random_tensors(1, torch.float32), state, params, 1e-2)
    returned = [*new_params.values(), *(tensor for column in new_state.values() for tensor in column.values())]
    assert all(a is b for a, b in zip(held, returned, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(held, before, strict=True))
    assert {float(step) for step in new_state["step"].values()} == {1.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.0])
def test_a_skipped_update_leaves_every_bit_and_the_next_one_is_as_if_it_had_not_been(bad: float) -> None:
    params, other = random_tensors(0, torch.float32), random_tensors(0, torch.float32)
    optimizer = adamw(CONFIG, params)
    state, expected = optimizer.init(params), optimizer.init(other)
    skip = torch.ones(())
    for i in range(3):
        held = [*params.values(), *(tensor for column in state.values() for tensor in column.values())]
        before = [tensor.clone() for tensor in held]
        optimizer.update({name: torch.full_like(p, bad) for name, p in params.items()}, state, params, 1e-2, skip)
        assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(held, before, strict=True))
        optimizer.update(random_tensors(1 + i, torch.float32), state, params, 1e-2, 1 - skip)
        optimizer.update(random_tensors(1 + i, torch.float32), expected, other, 1e-2)
    assert all(torch.equal(params[name], other[name]) for name in params)
    assert {float(step) for step in state["step"].values()} == {3.0}


def test_update_carries_no_graph() -> None:
    params: Params = {name: torch.nn.Parameter(p) for name, p in random_tensors(0, torch.float32).items()}
    optimizer = adamw(CONFIG, params)
    state = optimizer.init(params)
    optimizer.update(random_tensors(1, torch.float32), state, params, 1e-2)
    assert not any(tensor.requires_grad for column in state.values() for tensor in column.values())
    assert all(p.is_leaf for p in params.values())


# ------------------------------------------------------------------------------------------------------------- clipping


def global_norm(grads: Params) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))


def million_gradients(spread: float = 1.0) -> Params:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (1000, 999), "b": (999,), "c": (), "d": (0, 3)}
    return {name: torch.randn(shape, generator=generator) * spread + 0.1 for name, shape in shapes.items()}


@pytest.mark.parametrize("spread", [1.0, 1e-6, 1e6])
def test_the_norm_of_a_million_gradients(spread: float) -> None:
    grads = million_gradients(spread)
    exact = global_norm(grads)
    assert float(clip_by_global_norm(grads, 0)) == pytest.approx(exact, rel=1e-6)


def test_gradients_are_scaled_to_the_limit_and_only_above_it() -> None:
    for limit in (0.0, 1e9):
        grads = million_gradients()
        clip_by_global_norm(grads, limit)
        assert all(
            torch.equal(g, original) for g, original in zip(grads.values(), million_gradients().values(), strict=True)
        )
    grads, originals = million_gradients(), million_gradients()
    held = list(grads.values())
    norm = clip_by_global_norm(grads, 2.0)
    assert norm.shape == () and float(norm) == pytest.approx(global_norm(originals), rel=1e-6), "the norm before"
    assert global_norm(grads) == pytest.approx(2.0, rel=1e-6)
    assert all(g is h for g, h in zip(grads.values(), held, strict=True)), "not in place"
    for name, g in grads.items():
        torch.testing.assert_close(g, originals[name] * (2.0 / global_norm(originals)), rtol=1e-5, atol=0)


def test_gradients_of_zero_stay_zero() -> None:
    grads = {"a": torch.zeros(3)}
    assert float(clip_by_global_norm(grads, 1.0)) == 0 and torch.equal(grads["a"], torch.zeros(3))


# --------------------------------------------------------------------------------------------------------- decay groups


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_every_parameter_of_every_model_matches_one_rule(activation: Any, norm: Any, positions: Any) -> None:
    for bias, qk_norm, tied in itertools.product((False, True), repeat=3):
        config = ModelConfig(
            vocab_size=100,
            num_layers=2,
            width=16,
            num_heads=2,
            activation=activation,
            norm=norm,
            positions=positions,
            bias=bias,
            qk_norm=qk_norm,
            tied=tied,
        )
        params = dict(build_skeleton(config).named_parameters())
        multiples = decay_multiples(OptimConfig().decay_rules, params)
        # The rule of thumb of GPT-2's descendants: matrices decay, gains and biases (and positions) do not.
        expected = {name: float(p.ndim == 2 and name != "positions.weight") for name, p in params.items()}
        assert multiples == expected


@pytest.mark.parametrize(
    ("rules", "found"),
    [
        ((("embed.*", 1.0),), "none"),
        ((("embed.*", 1.0), ("hea", 0.0)), "none"),  # the whole name must match
        ((("embed.*", 1.0), ("h.*", 0.0), (".*d", 0.5)), "h.* and .*d"),
        ((), "none"),
    ],
)
def test_a_parameter_without_exactly_one_rule_is_named(rules: tuple[tuple[str, float], ...], found: str) -> None:
    config = OptimConfig(decay_rules=rules)
    with pytest.raises(ValueError) as caught:
        adamw(config, ["head"])
    message = str(caught.value)
    assert "'head'" in message and message.endswith(f"matches {found}") and "\n" not in message


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"lr": -1e-3}, "lr"),
        ({"eps": 0.0}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"grad_clip": -1.0}, "grad_clip"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"decay_rules": (("(", 1.0),)}, "decay_rules"),
    ],
)
def test_an_impossible_optimizer_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"optim.*{named}") as caught:
        OptimConfig(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"warmup": -1}, "warmup"),
        ({"final": -0.1}, "final"),
        ({"kind": "wsd", "decay": -1}, "decay"),
        ({"kind": "wsd"}, "decay"),
        ({"kind": "step", "milestones": (10,), "gamma": -0.5}, "gamma"),
    ],
)
def test_an_impossible_schedule_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"optim.schedule.*{named}") as caught:
        ScheduleConfig(**fields)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ schedules

TOTAL, WARMUP = 110, 10
SCHEDULES = [
    ScheduleConfig(kind="constant", warmup=WARMUP),
    ScheduleConfig(kind="linear", warmup=WARMUP, final=0.2),
    ScheduleConfig(kind="cosine", warmup=WARMUP, final=0.2),
    ScheduleConfig(kind="wsd", warmup=WARMUP, decay=20, final=0.2),
    ScheduleConfig(kind="inverse_sqrt", warmup=WARMUP),
    ScheduleConfig(kind="step", warmup=WARMUP, milestones=(40, 80), gamma=0.5),
]
schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)


def curve(schedule: ScheduleConfig, total: int = TOTAL) -> list[float]:
    return [lr_multiple(schedule, step, 1, total) for step in range(total)]


@schedules
def test_every_schedule_warms_up_peaks_and_never_rises_again(schedule: ScheduleConfig) -> None:
    values = curve(schedule)
    assert values[: WARMUP - 1] == pytest.approx([(step + 1) / WARMUP for step in range(WARMUP - 1)], rel=1e-15)
    assert values[WARMUP - 1] == 1.0
    assert all(0 <= value <= 1 for value in values)
    assert all(a >= b for a, b in itertools.pairwise(values[WARMUP - 1 :]))
    assert abs(values[WARMUP] - 1) < 0.05, "a jump at the warm-up's end"
    assert values == curve(schedule), "not a pure function"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", {60: 1.0, 109: 1.0}),
        ("linear", {10: 1.0, 35: 0.8, 60: 0.6, 109: 0.208}),
        ("cosine", {10: 1.0, 60: 0.6, 35: 0.6 + 0.4 * math.sqrt(0.5), 109: 0.6 - 0.4 * math.cos(math.pi / 100)}),
        ("wsd", {10: 1.0, 60: 1.0, 90: 1.0, 91: 0.96, 100: 0.6, 109: 0.24}),
        ("inverse_sqrt", {9: 1.0, 39: 0.5, 89: 1 / 3}),
        ("step", {10: 1.0, 39: 1.0, 40: 0.5, 79: 0.5, 80: 0.25, 109: 0.25}),
    ],
)
def test_key_points_of_a_schedule(kind: str, expected: dict[int, float]) -> None:
    values = curve(next(schedule for schedule in SCHEDULES if schedule.kind == kind))
    assert {step: values[step] for step in expected} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
def test_a_decay_ends_at_its_final_value_and_stays_there(kind: Any) -> None:
    for final in (0.0, 0.2, 1.0):
        schedule = ScheduleConfig(kind=kind, warmup=WARMUP, decay=20, final=final)
        assert lr_multiple(schedule, TOTAL, 1, TOTAL) == pytest.approx(final, abs=1e-15)
        assert lr_multiple(schedule, 2 * TOTAL, 1, TOTAL) == pytest.approx(final, abs=1e-15)
        assert curve(schedule)[-1] > 0, "the last step should still learn"


@schedules
def test_tokens_and_steps_are_the_same_schedule(schedule: ScheduleConfig) -> None:
    per_step = 5000
    in_tokens = ScheduleConfig(
        kind=schedule.kind,
        unit="tokens",
        warmup=schedule.warmup * per_step,
        decay=schedule.decay * per_step,
        final=schedule.final,
        milestones=tuple(m * per_step for m in schedule.milestones),
        gamma=schedule.gamma,
    )
    for step in range(TOTAL):
        by_steps = learning_rate(OptimConfig(lr=3e-4, schedule=schedule), step, TOTAL, lambda n: n * per_step)
        by_tokens = learning_rate(OptimConfig(lr=3e-4, schedule=in_tokens), step, TOTAL, lambda n: n * per_step)
        assert by_tokens == pytest.approx(by_steps, rel=1e-12)
        assert by_steps == 3e-4 * lr_multiple(schedule, step, 1, TOTAL)


@pytest.mark.parametrize("warmup", [1, 700, 999, 1000, 1001, 5500])
def test_a_warmup_in_tokens_need_not_be_whole_steps(warmup: int) -> None:
    schedule = ScheduleConfig(kind="cosine", unit="tokens", warmup=warmup)
    config = OptimConfig(lr=1.0, schedule=schedule)
    rates = [learning_rate(config, step, 50, lambda n: n * 1000) for step in range(50)]
    rising = [min(1.0, 1000 * (step + 1) / warmup) for step in range(6)]
    assert rates[:6] == pytest.approx(rising, abs=0.03)  # the decay has begun
    assert all(0 < rate <= 1 for rate in rates)


@schedules
@pytest.mark.parametrize("total", [1, 2, 5, 10, 11])
def test_a_run_that_ends_in_its_warmup(schedule: ScheduleConfig, total: int) -> None:
    values = curve(schedule, total)
    assert all(0 < value <= 1 for value in values)
    if schedule.kind != "wsd":  # whose decay may then begin before its warm-up ends
        assert values[:9] == [(step + 1) / 10 for step in range(min(9, total))]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "inverse_sqrt"])
def test_without_a_warmup_the_first_step_is_at_the_peak(kind: Any) -> None:
    assert lr_multiple(ScheduleConfig(kind=kind), 0, 1, 100) == 1.0
    assert lr_multiple(ScheduleConfig(kind=kind, unit="tokens"), 0, 4096, 409600) == 1.0


def test_the_first_and_the_last_line_of_a_logged_run() -> None:
    config = OptimConfig(lr=2e-3, schedule=ScheduleConfig(kind="linear", warmup=4, final=0.0))
    rates = [learning_rate(config, step, 8, lambda n: n * 999) for step in range(8)]
    assert rates == pytest.approx([5e-4, 1e-3, 1.5e-3, 2e-3, 2e-3, 1.5e-3, 1e-3, 5e-4], rel=1e-12)
