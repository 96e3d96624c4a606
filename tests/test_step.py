"""The step: two gradient implementations and a float64 reference agree, and the batch may be cut anyhow."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch._inductor.utils import run_and_get_code
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from modalities import dist, fsdp, step
from modalities.data import DataConfig, TrainData
from modalities.loss import Batch, LossConfig
from modalities.model import ModelConfig, build_skeleton
from modalities.optim import OptimConfig, Params, adamw
from modalities.pbin import write_pbin
from modalities.step import TrainState

WORLD = dist.World(rank=0, size=1, device=torch.device("cpu"), mesh=None)
GPT2 = ModelConfig(
    vocab_size=100, num_layers=2, width=32, num_heads=4, max_seq_len=64,
    norm="layernorm", positions="learned", activation="gelu_tanh", bias=True, tied=False,
)  # fmt: skip
CHUNKED = LossConfig(implementation="chunked", chunk_tokens=10)
MODELS = {"llama": tiny.MODEL, "gpt2": GPT2, "qk_norm": replace(tiny.MODEL, qk_norm=True)}


def initial(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Params:
    params = fsdp.init_params(build_skeleton(config), 0, WORLD.device)
    return {name: p.to(dtype) for name, p in params.items()}


def with_count(batch: Batch) -> Batch:
    return {"num_targets": (batch["targets"] != -100).sum(), **batch}


def reference_grads(config: ModelConfig, batch: Batch) -> Params:
    """Float64, by torch.autograd.grad through a loss that is spelt out."""
    params = {name: p.requires_grad_() for name, p in initial(config, torch.float64).items()}
    logits = functional_call(build_skeleton(config), params, (batch["inputs"],))
    log_p = logits.log_softmax(-1)
    valid = batch["targets"] != -100
    picked = log_p[valid].gather(1, batch["targets"][valid][:, None])
    return dict(zip(params, torch.autograd.grad(-picked.mean(), list(params.values())), strict=True))


def assert_grads_equal(grads: Params, expected: Params, bound: float) -> None:
    """The largest difference of every parameter's gradient is within `bound` of its largest entry.

    Without RoPE a key's bias has no gradient at all, so what is under 1 % of the largest of all counts as 1 %.
    """
    assert grads.keys() == expected.keys()
    floor = 0.01 * max(float(want.abs().max()) for want in expected.values())
    for name, want in expected.items():
        error = float((grads[name].double() - want.double()).abs().max()) / max(float(want.abs().max()), floor)
        assert error <= bound, f"{name}: {error:.1e}"


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    "compile", [pytest.param(False, id="eager"), pytest.param(True, id="compiled", marks=tiny.needs_compiler)]
)
@pytest.mark.parametrize("loss_config", [LossConfig(implementation="plain"), CHUNKED], ids=["plain", "chunked"])
def test_torch_func_gradients_equal_float64(config: ModelConfig, compile: bool, loss_config: LossConfig) -> None:
    batch = tiny.batch(config, (4, 33), ignored=0.3)
    loss_fn = step.make_loss_fn(build_skeleton(config), torch.float32, train=True, loss=loss_config)
    grads, (loss, _) = step.grad_and_value(loss_fn, sharded=False, compile=compile)(initial(config), with_count(batch))
    assert_grads_equal(grads, reference_grads(config, batch), 1e-5)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_backward_gradients_equal_float64(config: ModelConfig) -> None:
    batch = tiny.batch(config, (4, 33), ignored=0.3)
    model = build_skeleton(config).to_empty(device="cpu")
    values = initial(config)
    model.load_state_dict(values)
    loss_fn = step.make_loss_fn(model, torch.float32, train=True)
    grads, _ = step.grad_and_value(loss_fn, sharded=True, compile=False)(
        dict(model.named_parameters()), with_count(batch)
    )
    assert_grads_equal(grads, reference_grads(config, batch), 1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_bf16_gradients_are_fp32_and_near_float64() -> None:
    batch = tiny.batch(tiny.MODEL, (8, 33))
    loss_fn = step.make_loss_fn(build_skeleton(tiny.MODEL), torch.bfloat16, train=True)
    grads, (loss, _) = step.grad_and_value(loss_fn, sharded=False, compile=False)(
        initial(tiny.MODEL), with_count(batch)
    )
    assert loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in grads.values())
    assert_grads_equal(grads, reference_grads(tiny.MODEL, batch), 5e-2)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=["fp64", "fp32"])
def test_micro_batches_give_the_same_gradients(dtype: torch.dtype, bound: float) -> None:
    # Targets are ignored unevenly, so a mean of means would be wrong.
    whole = tiny.batch(tiny.MODEL, (8, 32), ignored=0.4)
    whole["targets"][:3] = -100
    loss_fn = step.make_loss_fn(build_skeleton(tiny.MODEL), dtype, train=True)
    grad_fn = step.grad_and_value(loss_fn, sharded=False, compile=False)
    params = initial(tiny.MODEL, dtype)
    expected, (expected_loss, _) = step.accumulated_grads(grad_fn, params, {k: v[None] for k, v in whole.items()})
    for micro_batches in (2, 4):
        cut = {k: v.view(micro_batches, -1, 32) for k, v in whole.items()}
        grads, (loss, _) = step.accumulated_grads(grad_fn, params, cut)
        assert_grads_equal(grads, expected, bound)
        torch.testing.assert_close(loss, expected_loss, rtol=bound, atol=0)


@tiny.needs_compiler
def test_documents_and_sources_go_through_the_compiled_gradient() -> None:
    config = tiny.MODEL
    batch = with_count(tiny.packed_batch(config, (4, 33), num_sources=3))
    results = []
    for compile in (False, True):
        loss_fn = step.make_loss_fn(build_skeleton(config), torch.float32, train=True, num_sources=3)
        results.append(step.grad_and_value(loss_fn, sharded=False, compile=compile)(initial(config), batch))
    (grads, (loss, aux)), (compiled_grads, (compiled_loss, compiled_aux)) = results
    assert_grads_equal(compiled_grads, grads, 1e-5)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(compiled_aux, aux, rtol=1e-6, atol=0)
    # Without the documents it is another loss.
    plain = {key: value for key, value in batch.items() if key not in ("documents", "positions")}
    loss_fn = step.make_loss_fn(build_skeleton(config), torch.float32, train=True, num_sources=3)
    assert abs(float(loss_fn(initial(config), plain)[0] - loss)) > 1e-6


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_the_losses_of_the_sources_are_the_loss(micro_batches: int) -> None:
    batch = tiny.packed_batch(tiny.MODEL, (8, 32), num_sources=3)
    params, skeleton = initial(tiny.MODEL), build_skeleton(tiny.MODEL)
    one = step.grad_and_value(step.make_loss_fn(skeleton, torch.float32, train=True), sharded=False, compile=False)
    three = step.make_loss_fn(skeleton, torch.float32, train=True, num_sources=3)
    cut = {key: value.unflatten(0, (micro_batches, -1)) for key, value in batch.items()}
    expected, (expected_loss, no_aux) = step.accumulated_grads(one, params, cut)
    grads, (loss, aux) = step.accumulated_grads(step.grad_and_value(three, False, False), params, cut)
    assert no_aux == {} and aux["source_targets"].sum() == (batch["targets"] != -100).sum()
    assert_grads_equal(grads, expected, 1e-6)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(aux["source_loss"].sum() / aux["source_targets"].sum(), loss, rtol=1e-6, atol=0)
    losses = step.source_losses(aux, "abc")
    for source, name in enumerate("abc"):
        own = {key: value[None, batch["sources"] == source] for key, value in batch.items()}
        _, (alone, _) = step.accumulated_grads(one, params, own)
        torch.testing.assert_close(losses[f"loss/{name}"], alone, rtol=1e-6, atol=0)


def test_a_source_without_targets_has_no_loss() -> None:
    batch = tiny.packed_batch(tiny.MODEL, (1, 4, 32), num_sources=2)
    batch["targets"][batch["sources"] == 1] = -100
    state, train_step = make_train_step(tiny.MODEL, lr=0.0, sources=("web", "chat"))
    _, metrics = train_step(state, batch)
    assert list(metrics) == ["loss", "lr", "grad_norm", "loss/web", "loss/chat"]
    torch.testing.assert_close(metrics["loss/web"], metrics["loss"], rtol=1e-6, atol=0)
    assert torch.as_tensor(metrics["loss/chat"]).isnan()


def test_a_masked_target_has_no_effect_to_the_bit(tmp_path: Path) -> None:
    """Two files that differ in targets that are masked, and nowhere else: the last of each sequence is no input."""
    tokens = np.random.default_rng(0).integers(0, 100, 33 * 8)
    last = np.arange(len(tokens)) % 33 == 32
    mask = ~(last & (np.arange(len(tokens)) < 33 * 6))
    for name, values, vocab_size in (
        ("a", tokens, 100), ("b", np.where(mask, tokens, (tokens + 7) % 100), 100), ("mask", mask, 2)
    ):  # fmt: skip
        with write_pbin(tmp_path / f"{name}.pbin", vocab_size) as append:
            append(values)
    loss_fn = step.make_loss_fn(build_skeleton(tiny.MODEL), torch.float32, train=True)
    grad_fn = step.grad_and_value(loss_fn, sharded=False, compile=False)

    def grads_of(name: str, masks: tuple[str, ...]) -> tuple[Params, torch.Tensor]:
        config = DataConfig(
            train=(str(tmp_path / f"{name}.pbin"),), masks=masks, seq_len=32, global_batch=8, reuse_last_target=False
        )
        batch = TrainData(config, 100, 0, 4, WORLD).read(0)
        assert int((batch["targets"] == -100).sum()) == (6 if masks else 0)
        grads, (loss, _) = step.accumulated_grads(grad_fn, initial(tiny.MODEL), batch)
        return grads, loss

    masked = (str(tmp_path / "mask.pbin"),)
    (a, loss_a), (b, loss_b) = grads_of("a", masked), grads_of("b", masked)
    assert torch.equal(loss_a, loss_b) and all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(grads_of("a", ())[1], grads_of("b", ())[1])


def same_on_ranks(config: ModelConfig, compile: bool) -> None:
    """Gradients and the losses of the sources on two ranks are those of one process."""
    batch = tiny.packed_batch(config, (8, 32), num_sources=3)
    plain = step.make_loss_fn(build_skeleton(config), torch.float32, train=True, num_sources=3)
    expected, (loss, aux) = step.grad_and_value(plain, sharded=False, compile=False)(initial(config), with_count(batch))
    with dist.setup() as world:
        model = build_skeleton(config)
        fsdp.parallelize(
            model, world.mesh, fsdp.ParallelConfig(param_dtype="float32", compile="block" if compile else "off")
        )
        params = fsdp.init_params(model, 0, world.device)
        loss_fn = step.make_loss_fn(model, torch.float32, True, 3, CHUNKED, compile_head=compile)
        mine = {k: v.chunk(world.size)[world.rank].unflatten(0, (2, -1)) for k, v in batch.items()}
        grads, (_, own) = step.accumulated_grads(step.grad_and_value(loss_fn, True, compile), params, mine)
        whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}
        assert_grads_equal(whole, expected, 1e-5)
        losses = torch.stack([torch.as_tensor(value) for value in step.source_losses(own, "abc").values()])
    torch.testing.assert_close(losses, aux["source_loss"] / aux["source_targets"], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "compile", [pytest.param(False, id="eager"), pytest.param(True, id="compiled", marks=tiny.needs_compiler)]
)
def test_documents_and_sources_on_ranks_are_those_of_one_process(compile: bool) -> None:
    tiny.run_ranks(2, same_on_ranks, tiny.MODEL, compile)


def make_train_step(
    config: ModelConfig, lr: float, sources: tuple[str, ...] = ("train",)
) -> tuple[TrainState, step.TrainStep]:
    loss_fn = step.make_loss_fn(build_skeleton(config), torch.float32, train=True, num_sources=len(sources))
    grad_fn = step.grad_and_value(loss_fn, sharded=False, compile=False)
    params = initial(config)
    optimizer = adamw(OptimConfig(weight_decay=0.0), params)
    return TrainState(params, optimizer.init(params)), step.make_train_step(
        grad_fn, optimizer, 1.0, lambda i: lr, seed=0, world=WORLD, sources=sources
    )


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_one_batch_can_be_learnt_by_heart(config: ModelConfig) -> None:
    state, train_step = make_train_step(config, lr=1e-2)
    batch = tiny.batch(config, (1, 4, 32))
    for _ in range(150):
        state, metrics = train_step(state, batch)
    assert float(metrics["loss"]) < 0.05
    assert (state.step, state.samples) == (150, 600)


def test_a_batch_without_targets_teaches_nothing() -> None:
    batch = tiny.batch(tiny.MODEL, (1, 2, 32), ignored=1.0)
    loss_fn = step.make_loss_fn(build_skeleton(tiny.MODEL), torch.float32, train=True)
    grads, (loss, _) = step.accumulated_grads(
        step.grad_and_value(loss_fn, sharded=False, compile=False), initial(tiny.MODEL), batch
    )
    assert loss == 0 and all((grad == 0).all() for grad in grads.values())


def test_the_judge_sees_the_loss_and_a_step_that_it_skips_only_moves_the_cursor() -> None:
    loss_fn = step.make_loss_fn(build_skeleton(tiny.MODEL), torch.float32, train=True)
    grad_fn, params = step.grad_and_value(loss_fn, sharded=False, compile=False), initial(tiny.MODEL)
    optimizer = adamw(OptimConfig(), params)
    seen = []

    def odd_steps(guard: Params, loss: torch.Tensor, is_bad: torch.Tensor) -> tuple[Params, torch.Tensor]:
        seen.append((float(loss), bool(is_bad)))
        return {"skipped": guard.get("skipped", torch.zeros(())) + len(seen) % 2}, torch.tensor(float(len(seen) % 2))

    state = TrainState(params, optimizer.init(params))
    train_step = step.make_train_step(grad_fn, optimizer, 1.0, lambda i: 1e-2, 0, WORLD, judge=odd_steps)
    for i in range(1, 5):
        before = {name: p.clone() for name, p in state.params.items()}
        state, metrics = train_step(state, tiny.batch(tiny.MODEL, (2, 2, 32), seed=i))
        unchanged = [torch.equal(p, before[name]) for name, p in state.params.items()]
        assert all(unchanged) if i % 2 else not any(unchanged)
        assert (state.step, state.samples, metrics["skipped"]) == (i, 4 * i, (i + 1) // 2)
        assert seen[-1] == (float(metrics["loss"]), False)
    assert {float(count) for count in state.opt_state["step"].values()} == {2.0}


@pytest.mark.parametrize(("loss", "norm"), [(1.0, math.nan), (1.0, math.inf), (math.nan, 1.0), (-math.inf, 1.0)])
def test_a_loss_or_a_gradient_that_is_not_finite_is_bad(loss: float, norm: float) -> None:
    value, is_bad = step.agreed(torch.tensor(loss), torch.tensor(norm), WORLD)
    assert is_bad and not step.agreed(torch.tensor(1.0), torch.tensor(1.0), WORLD)[1]
    torch.testing.assert_close(value, torch.tensor(loss), equal_nan=True)


def test_a_step_depends_on_its_arguments_alone() -> None:
    config = replace(tiny.MODEL, embed_dropout=0.2, attn_dropout=0.2, resid_dropout=0.2)
    results = []
    for noise in (1, 2):
        state, train_step = make_train_step(config, lr=1e-2)
        for i in range(3):
            torch.manual_seed(noise)  # what the global generator held before must not matter
            state, metrics = train_step(state, tiny.batch(config, (2, 2, 32), seed=i))
        results.append((state.params, metrics["loss"]))
    assert float(results[0][1]) == float(results[1][1])
    assert all(torch.equal(results[0][0][name], results[1][0][name]) for name in results[0][0])


@tiny.needs_compiler
def test_compiled_gradients_are_summed_in_a_fixed_order() -> None:
    """Two threads that added to one row of the embedding's gradient as they came made runs differ from step 130 on."""
    loss_fn = step.make_loss_fn(build_skeleton(tiny.MODEL), torch.float32, train=True)
    grad_fn = step.grad_and_value(loss_fn, sharded=False, compile=True)
    batch = with_count(tiny.batch(tiny.MODEL, (16, 64)))
    torch.set_num_threads(2)
    try:
        with dist.setup():
            _, code = run_and_get_code(grad_fn, initial(tiny.MODEL), batch)
    finally:
        torch.set_num_threads(1)
    assert code and not any("atomic_add" in text for text in code)


def test_dropout_differs_between_steps_and_is_off_in_evaluation() -> None:
    config = replace(tiny.MODEL, embed_dropout=0.2, attn_dropout=0.2, resid_dropout=0.2)
    state, train_step = make_train_step(config, lr=0.0)
    batch = tiny.batch(config, (1, 2, 32))
    losses = [float(train_step(replace(state, step=i), batch)[1]["loss"]) for i in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]
    loss_fn = step.make_loss_fn(build_skeleton(config), torch.float32, train=False)
    evaluate = step.make_eval_step(loss_fn, sharded=False, compile=False)
    micro = {k: v[0] for k, v in batch.items()}
    assert evaluate(state.params, [micro]) == evaluate(state.params, [micro])


def test_evaluation_is_the_mean_over_valid_targets_of_all_batches() -> None:
    params = initial(tiny.MODEL)
    skeleton = build_skeleton(tiny.MODEL)
    evaluate = step.make_eval_step(step.make_loss_fn(skeleton, torch.float32, train=False), False, False)
    batches = [tiny.batch(tiny.MODEL, (2, 32), seed, ignored=0.5 * seed) for seed in (0, 1)]
    logits, targets = [], []
    for batch in batches:
        valid = batch["targets"] != -100
        logits.append(functional_call(skeleton, params, (batch["inputs"],))[valid])
        targets.append(batch["targets"][valid])
    expected = torch.nn.functional.cross_entropy(torch.cat(logits).double(), torch.cat(targets))
    torch.testing.assert_close(evaluate(params, batches).double(), expected, rtol=1e-6, atol=0)
