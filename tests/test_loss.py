"""Cross-entropy against float64, and targets that do not count."""

import pytest
import torch
from torch import Tensor

from modalities.loss import IGNORED, count_targets, cross_entropy_by_row, cross_entropy_sum, sums_by_source

B, T, V = 3, 40, 1000


def logits_and_targets(dtype: torch.dtype, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits_BTV = (torch.randn(B, T, V, generator=generator) * spread).to(dtype)
    targets_BT = torch.randint(V, (B, T), generator=generator)
    targets_BT[torch.rand(B, T, generator=generator) < 0.3] = IGNORED
    return logits_BTV.requires_grad_(), targets_BT


def reference(logits_BTV: Tensor, targets_BT: Tensor) -> tuple[float, Tensor]:
    """Loss and gradient in float64, from log-sum-exp and softmax written out."""
    logits = logits_BTV.detach().double()
    total, grad = 0.0, torch.zeros_like(logits)
    for b, t in (targets_BT != IGNORED).nonzero().tolist():
        shifted = logits[b, t] - logits[b, t].max()
        total += float(shifted.exp().sum().log() - shifted[targets_BT[b, t]])
        grad[b, t] = shifted.exp() / shifted.exp().sum()
        grad[b, t, targets_BT[b, t]] -= 1
    return total, grad


@pytest.mark.parametrize(
    ("dtype", "loss_bound", "grad_bound"),
    [
        (torch.float64, 1e-14, 1e-14),
        (torch.float32, 1e-6, 1e-6),
        # The loss of bf16 logits is as exact as of fp32 ones; the gradient is rounded to bf16 (8 bits) at the end.
        (torch.bfloat16, 1e-6, 2**-8),
    ],
)
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_loss_and_gradient_against_float64(
    dtype: torch.dtype, loss_bound: float, grad_bound: float, spread: float
) -> None:
    logits_BTV, targets_BT = logits_and_targets(dtype, spread)
    loss = cross_entropy_sum(logits_BTV, targets_BT)
    (grad_BTV,) = torch.autograd.grad(loss, logits_BTV)
    expected_loss, expected_grad_BTV = reference(logits_BTV, targets_BT)
    assert loss.shape == () and loss.dtype == torch.promote_types(dtype, torch.float32)
    assert grad_BTV.dtype == dtype
    assert loss.item() == pytest.approx(expected_loss, rel=loss_bound)
    torch.testing.assert_close(
        grad_BTV.double(), expected_grad_BTV, rtol=grad_bound, atol=1e-6 if dtype.itemsize < 8 else 1e-15
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ignored_target_contributes_exactly_nothing(dtype: torch.dtype) -> None:
    logits_BTV, targets_BT = logits_and_targets(dtype)
    ignored_BT = targets_BT == IGNORED
    loss = cross_entropy_sum(logits_BTV, targets_BT)
    (grad_BTV,) = torch.autograd.grad(loss, logits_BTV)
    assert torch.equal(grad_BTV[ignored_BT], torch.zeros_like(grad_BTV[ignored_BT]))
    assert bool((grad_BTV[~ignored_BT].abs().sum(-1) > 0).all())
    others_BTV = logits_BTV.detach().clone()
    others_BTV[ignored_BT] = 1e4
    assert torch.equal(cross_entropy_sum(others_BTV, targets_BT), loss)
    kept = cross_entropy_sum(logits_BTV[~ignored_BT][None], targets_BT[~ignored_BT][None])
    torch.testing.assert_close(kept, loss, rtol=1e-6, atol=0)


def test_all_targets_ignored() -> None:
    logits_BTV, targets_BT = logits_and_targets(torch.float32)
    loss = cross_entropy_sum(logits_BTV, torch.full_like(targets_BT, IGNORED))
    (grad_BTV,) = torch.autograd.grad(loss, logits_BTV)
    assert loss.item() == 0
    assert torch.equal(grad_BTV, torch.zeros_like(grad_BTV))


def test_the_parts_of_a_batch_add_up() -> None:
    logits_BTV, targets_BT = logits_and_targets(torch.float32)
    rows = [cross_entropy_sum(logits_BTV[b : b + 1], targets_BT[b : b + 1]) for b in range(B)]
    torch.testing.assert_close(torch.stack(rows).sum(), cross_entropy_sum(logits_BTV, targets_BT), rtol=1e-6, atol=0)


def test_count_targets() -> None:
    _, targets_BT = logits_and_targets(torch.float32)
    assert int(count_targets(targets_BT)) == sum(t != -100 for row in targets_BT.tolist() for t in row)
    assert count_targets(targets_BT).dtype == torch.int64
    assert int(count_targets(torch.tensor([[0, -100]]))) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_are_the_sums_of_their_own_targets(dtype: torch.dtype) -> None:
    logits_BTV, targets_BT = logits_and_targets(dtype)
    targets_BT[1] = IGNORED
    rows = cross_entropy_by_row(logits_BTV, targets_BT)
    alone = torch.stack([cross_entropy_sum(logits_BTV[b : b + 1], targets_BT[b : b + 1]) for b in range(B)])
    assert rows.dtype == alone.dtype and rows[1] == 0
    torch.testing.assert_close(rows, alone, rtol=1e-6, atol=0)


def test_sources_add_up_to_the_whole_and_keep_their_infinities() -> None:
    _, targets_BT = logits_and_targets(torch.float32)
    loss_B = torch.tensor([1.5, float("inf"), 2.0])
    aux = sums_by_source(loss_B, targets_BT, torch.tensor([2, 1, 2]), num_sources=4)
    assert aux["source_loss"].tolist() == [0, float("inf"), 3.5, 0]
    counts = (targets_BT != IGNORED).sum(1)
    assert aux["source_targets"].tolist() == [0, counts[1], counts[0] + counts[2], 0]
    assert aux["source_targets"].dtype == torch.int64 and aux["source_targets"].sum() == count_targets(targets_BT)
