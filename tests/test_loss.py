"""Both implementations against float64 and PyTorch's own, targets that do not count, and what is never materialised."""

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modalities import loss
from modalities.compiling import compiled
from modalities.loss import IGNORED, LossConfig, choose, count_targets, linear_cross_entropy, sums_by_source

B, T, D, V, PADDED = 3, 37, 16, 101, 128
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
TERMS = [
    pytest.param(0.0, 0.0, 0.0, id="plain"),
    pytest.param(0.1, 0.0, 0.0, id="smoothing"),
    pytest.param(0.0, 1e-2, 0.0, id="z-loss"),
    pytest.param(0.0, 0.0, 3.0, id="softcap"),
    pytest.param(0.1, 1e-2, 3.0, id="all"),
]
compilable = pytest.mark.parametrize(
    "compile", [pytest.param(False, id="eager"), pytest.param(True, id="compiled", marks=tiny.needs_compiler)]
)


def config(implementation: Literal["plain", "chunked"], smoothing: float = 0.0, z_loss: float = 0.0) -> LossConfig:
    # 10 divides neither 111 tokens nor, with the 9 columns that follow from it, 101 words.
    return LossConfig(implementation=implementation, label_smoothing=smoothing, z_loss=z_loss, chunk_tokens=10)


def inputs(dtype: torch.dtype, spread: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_BTD = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(PADDED, D, generator=generator, dtype=torch.float64) * spread
    targets_BT = torch.randint(V, (B, T), generator=generator)
    targets_BT[torch.rand(B, T, generator=generator) < 0.3] = IGNORED
    return hidden_BTD.to(dtype), weight_VD.to(dtype), targets_BT


def gradients(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    targets_BT: Tensor,
    config: LossConfig,
    softcap: float = 0.0,
    num_targets: float = 77.0,
    transform: Callable[..., Any] = lambda f: f,
) -> Gradients:
    """(gradient of hidden, of weight, loss, nll) by `torch.func`."""

    def loss_fn(hidden_BTD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(hidden_BTD, weight_VD, targets_BT, config, V, softcap, num_targets)

    grad_fn = torch.func.grad_and_value(loss_fn, argnums=(0, 1), has_aux=True)
    grads, values = transform(grad_fn)(hidden_BTD, weight_VD)
    return *grads, *values


def reference(
    hidden_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, smoothing: float, z_loss: float, softcap: float
) -> Gradients:
    """In float64 from log-softmax, by PyTorch's backward pass, one formula after another."""
    hidden, weight = hidden_BTD.double().requires_grad_(), weight_VD.double().requires_grad_()
    is_valid = targets_BT != IGNORED
    logits = hidden[is_valid] @ weight[:V].T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    log_p = logits.log_softmax(-1)
    nll = -log_p[torch.arange(len(log_p)), targets_BT[is_valid]]
    loss = (1 - smoothing) * nll - smoothing * log_p.mean(-1) + z_loss * logits.exp().sum(-1).log() ** 2
    loss = loss.sum() / 77
    nll_BT = torch.zeros(targets_BT.shape, dtype=torch.float64).masked_scatter(is_valid, nll.detach())
    hidden_grad, weight_grad = torch.autograd.grad(loss, (hidden, weight))
    return hidden_grad, weight_grad, loss.detach(), nll_BT


@compilable
@pytest.mark.parametrize("implementation", ["plain", "chunked"])
@pytest.mark.parametrize(("smoothing", "z_loss", "softcap"), TERMS)
def test_both_equal_the_formula_in_float64(
    implementation: Literal["plain", "chunked"], smoothing: float, z_loss: float, softcap: float, compile: bool
) -> None:
    if compile and not (smoothing and z_loss and softcap):
        pytest.skip("compiled once, with everything")
    x = inputs(torch.float64)
    transform = compiled if compile else (lambda f: f)
    found = gradients(*x, config(implementation, smoothing, z_loss), softcap, transform=transform)
    for got, expected in zip(found, reference(*x, smoothing, z_loss, softcap), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@tiny.needs_compiler
def test_a_process_may_compile_the_loss_in_any_number_of_forms() -> None:
    def value(dtype: torch.dtype, smoothing: float, compile: bool) -> Tensor:
        return linear_cross_entropy(*inputs(dtype), config("chunked", smoothing), V, compile=compile)[0]

    with torch._dynamo.config.patch(recompile_limit=2):  # whole chunks, and what is left over
        for form in ((torch.float32, 0.0), (torch.float32, 0.1), (torch.float64, 0.1)):
            torch.testing.assert_close(value(*form, compile=True), value(*form, compile=False))


@pytest.mark.parametrize("implementation", ["plain", "chunked"])
def test_a_backward_pass_gives_what_torch_func_gives(implementation: Literal["plain", "chunked"]) -> None:
    hidden_BTD, weight_VD, targets_BT = inputs(torch.float64)
    expected = gradients(hidden_BTD, weight_VD, targets_BT, config(implementation, 0.1, 1e-2), 3.0)
    hidden_BTD.requires_grad_()
    weight_VD.requires_grad_()
    value, nll_BT = linear_cross_entropy(
        hidden_BTD, weight_VD, targets_BT, config(implementation, 0.1, 1e-2), V, 3.0, 77.0
    )
    assert not nll_BT.requires_grad
    (3 * value).backward()
    assert hidden_BTD.grad is not None and weight_VD.grad is not None
    for got, want in zip((hidden_BTD.grad / 3, weight_VD.grad / 3, value, nll_BT), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_chunks_are_as_near_to_float64_as_the_plain_form(dtype: torch.dtype, spread: float) -> None:
    x = inputs(dtype, spread)
    expected = reference(*x, 0.0, 0.0, 0.0)
    errors = {}
    for implementation in ("plain", "chunked"):
        found = gradients(*x, config(implementation))
        assert [value.dtype for value in found] == [dtype, dtype, torch.float32, torch.float32]
        errors[implementation] = [
            float((got.double() - want).norm() / want.norm()) for got, want in zip(found, expected, strict=True)
        ]
    for plain, chunked in zip(errors["plain"], errors["chunked"], strict=True):
        assert chunked <= 1.03 * plain + 1e-7, errors
    assert max(errors["chunked"]) < (2e-2 if dtype == torch.bfloat16 else 1e-5), errors


@compilable
@pytest.mark.parametrize("implementation", ["plain", "chunked"])
def test_the_gradient_of_the_weight_that_another_was_cast_from(
    implementation: Literal["plain", "chunked"], compile: bool
) -> None:
    hidden_BTD, master_VD, targets_BT = inputs(torch.float32)
    hidden_BTD = hidden_BTD.bfloat16()

    def loss_fn(hidden_BTD: Tensor, master_VD: Tensor) -> Tensor:
        weight_VD = master_VD.bfloat16()
        terms = (targets_BT, config(implementation, 0.1, 1e-2), V, 3.0, 77.0)
        # Twice, for a lookup of words has a gradient for the weight, too.
        value, _ = linear_cross_entropy(hidden_BTD + weight_VD[:T], weight_VD, *terms, master_VD=master_VD)
        return value

    grad_fn = torch.func.grad_and_value(loss_fn, argnums=(0, 1))
    (_, grad_VD), value = (compiled(grad_fn) if compile else grad_fn)(hidden_BTD, master_VD)
    weight_VD = master_VD.bfloat16().double().requires_grad_()
    hidden = (hidden_BTD + weight_VD[:T].detach().bfloat16()).double() + weight_VD[:T] - weight_VD[:T].detach()
    expected = linear_cross_entropy(hidden, weight_VD, targets_BT, config("plain", 0.1, 1e-2), V, 3.0, 77.0)[0]
    (expected_VD,) = torch.autograd.grad(expected, weight_VD)
    assert grad_VD.dtype == torch.float32
    assert float((grad_VD.double() - expected_VD).norm() / expected_VD.norm()) < 6e-3
    torch.testing.assert_close(value.double(), expected.detach(), rtol=2e-3, atol=0)


def test_the_gradient_of_a_master_weight_is_nearer_to_float64() -> None:
    hidden_BTD, weight_VD, targets_BT = inputs(torch.bfloat16)
    expected = reference(hidden_BTD, weight_VD, targets_BT, 0.0, 0.0, 0.0)[1]
    errors = []
    for master_VD in (None, weight_VD.float()):
        of = weight_VD if master_VD is None else master_VD
        of.requires_grad_()
        terms = (targets_BT, config("chunked"), V, 0.0, 77.0, False, master_VD)
        value, _ = linear_cross_entropy(hidden_BTD, weight_VD.detach() if of is not weight_VD else of, *terms)
        (grad,) = torch.autograd.grad(value, of)
        errors.append(float((grad.double() - expected).norm() / expected.norm()))
    assert errors[1] < errors[0], errors


@pytest.mark.parametrize("implementation", ["plain", "chunked"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equal_to_pytorchs_own(implementation: Literal["plain", "chunked"], smoothing: float) -> None:
    hidden_BTD, weight_VD, targets_BT = inputs(torch.float32)
    value, _ = linear_cross_entropy(hidden_BTD, weight_VD, targets_BT, config(implementation, smoothing), V)
    logits = (hidden_BTD @ weight_VD[:V].T).flatten(0, 1)
    expected = F.cross_entropy(logits, targets_BT.flatten(), reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    if not smoothing and hasattr(F, "linear_cross_entropy"):
        hidden_ND = hidden_BTD.flatten(0, 1)
        fused = F.linear_cross_entropy(hidden_ND, weight_VD[:V], targets_BT.flatten(), reduction="sum")
        torch.testing.assert_close(value, fused, rtol=1e-6, atol=0)


@compilable
@pytest.mark.parametrize("implementation", ["plain", "chunked"])
def test_an_ignored_target_contributes_exactly_nothing(
    implementation: Literal["plain", "chunked"], compile: bool
) -> None:
    hidden_BTD, weight_VD, targets_BT = inputs(torch.bfloat16)
    transform = compiled if compile else (lambda f: f)
    ignored_BT = targets_BT == IGNORED
    hidden_grad, weight_grad, value, nll_BT = gradients(
        hidden_BTD, weight_VD, targets_BT, config(implementation, 0.1, 1e-2), transform=transform
    )
    assert not hidden_grad[ignored_BT].any() and not nll_BT[ignored_BT].any()
    assert bool((hidden_grad[~ignored_BT].abs().sum(-1) > 0).all())
    assert not weight_grad[V:].any(), "rows of padding"
    others_BTD = torch.where(ignored_BT[..., None], -7, hidden_BTD)
    others = gradients(others_BTD, weight_VD, targets_BT, config(implementation, 0.1, 1e-2), transform=transform)
    assert torch.equal(others[2], value) and torch.equal(others[1], weight_grad)


@pytest.mark.parametrize("implementation", ["plain", "chunked"])
def test_all_targets_ignored(implementation: Literal["plain", "chunked"]) -> None:
    hidden_BTD, weight_VD, targets_BT = inputs(torch.float32)
    found = gradients(
        hidden_BTD, weight_VD, torch.full_like(targets_BT, IGNORED), config(implementation, 0.1, 1e-2), 3.0
    )
    assert all(not value.any() for value in found)


@pytest.mark.parametrize("implementation", ["plain", "chunked"])
def test_evaluation_makes_no_gradients(implementation: Literal["plain", "chunked"]) -> None:
    hidden_BTD, weight_VD, targets_BT = inputs(torch.float32)
    with torch.no_grad():
        value, nll_BT = linear_cross_entropy(
            hidden_BTD, weight_VD.requires_grad_(), targets_BT, config(implementation), V
        )
    assert not value.requires_grad
    torch.testing.assert_close(nll_BT, reference(hidden_BTD, weight_VD, targets_BT, 0, 0, 0)[3].float())
    torch.testing.assert_close(nll_BT.sum(), value)


class Largest(TorchDispatchMode):
    """Records the most elements that an operation's result has, views left out."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def test_only_the_plain_form_has_all_logits() -> None:
    torch.manual_seed(0)
    hidden_ND, weight_VD, targets_N = torch.randn(512, 8), torch.randn(1000, 8), torch.randint(1000, (512,))
    with Largest() as plain:
        linear_cross_entropy(hidden_ND, weight_VD, targets_N, config("plain"), 1000)
    with Largest() as chunked:  # which the operator would hide
        terms = (0.0, 0.0, 0.0, 1000, 0, "", 32, True, False)
        loss._in_chunks(hidden_ND, weight_VD, None, targets_N, torch.ones(()), *terms)
    assert (plain.numel, chunked.numel) == (512 * 1000, 32 * 1000)


def test_plain_goes_through_vmap() -> None:
    hidden_BTD, weight_VD, targets_BT = inputs(torch.float64)
    weights = torch.stack((weight_VD, 2 * weight_VD))

    def loss_fn(weight_VD: Tensor) -> Tensor:
        return linear_cross_entropy(hidden_BTD, weight_VD, targets_BT, config("plain", 0.1, 1e-2), V)[0]

    grads, losses = torch.func.vmap(torch.func.grad_and_value(loss_fn))(weights)
    for i in range(2):
        grad, value = torch.func.grad_and_value(loss_fn)(weights[i])
        torch.testing.assert_close((grads[i], losses[i]), (grad, value), rtol=1e-12, atol=1e-14)


def test_auto_materialises_small_logits_alone() -> None:
    auto = LossConfig()
    assert choose(auto, 512, 4096, torch.bfloat16) == "plain"
    assert choose(auto, 4096, 50_304, torch.bfloat16) == "chunked"
    assert choose(LossConfig(implementation="plain"), 4096, 50_304, torch.bfloat16) == "plain"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"z_loss": -1.0}, "loss.z_loss is -1.0, but must"),
        ({"z_loss": math.nan}, "loss.z_loss is nan, but must"),
        ({"label_smoothing": 1.0}, "loss.label_smoothing is 1.0, but must"),
        ({"chunk_tokens": 0}, "loss.chunk_tokens is 0, but must"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**values)


def test_count_targets() -> None:
    _, _, targets_BT = inputs(torch.float32)
    assert int(count_targets(targets_BT)) == sum(t != -100 for row in targets_BT.tolist() for t in row)
    assert count_targets(targets_BT).dtype == torch.int64


def test_sources_add_up_to_the_whole_and_keep_their_infinities() -> None:
    _, _, targets_BT = inputs(torch.float32)
    loss_B = torch.tensor([1.5, float("inf"), 2.0])
    aux = sums_by_source(loss_B, targets_BT, torch.tensor([2, 1, 2]), num_sources=4)
    assert aux["source_loss"].tolist() == [0, float("inf"), 3.5, 0]
    counts = (targets_BT != IGNORED).sum(1)
    assert aux["source_targets"].tolist() == [0, counts[1], counts[0] + counts[2], 0]
    assert aux["source_targets"].dtype == torch.int64 and aux["source_targets"].sum() == count_targets(targets_BT)
