"""The loss contract and the token-normalised cross-entropy. It knows logits and targets, not models or ranks.

The contract: `loss_fn(params, batch) -> (loss, aux)`, where `loss` is a *sum* over this micro-batch's valid targets
divided by `batch["num_targets"]`, the number of valid targets in the whole global batch. Losses and gradients of
micro-batches and ranks then add up to those of the global batch, however it is cut. `aux` is a dict of tensors that add
up the same way.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Batch = dict[str, Tensor]
Aux = dict[str, Tensor]
LossFn = Callable[[dict[str, Tensor], Batch], tuple[Tensor, Aux]]

IGNORED = -100  # the target of a position that does not count; PyTorch's convention


def cross_entropy_sum(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """-log p(target), summed over the positions whose target is not -100, computed in at least fp32 [nats]."""
    logits = logits_BTV if logits_BTV.dtype.itemsize > 4 else logits_BTV.float()
    return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")


def cross_entropy_by_row(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """The same, summed over each sequence alone, [B]."""
    logits = logits_BTV if logits_BTV.dtype.itemsize > 4 else logits_BTV.float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(targets_BT.shape).sum(1)


def sums_by_source(loss_B: Tensor, targets_BT: Tensor, sources_B: Tensor, num_sources: int) -> Aux:
    """`source_loss`, the loss summed over the sequences of each source, and `source_targets`, how many; [S]."""
    is_from_BS = sources_B[:, None] == torch.arange(num_sources, device=sources_B.device)
    targets_B = (targets_BT != IGNORED).sum(1)
    # Chosen and not multiplied, so that one source's infinity stays its own.
    return {
        "source_loss": torch.where(is_from_BS, loss_B[:, None], 0).sum(0),
        "source_targets": torch.where(is_from_BS, targets_B[:, None], 0).sum(0),
    }


def count_targets(targets: Tensor) -> Tensor:
    """How many targets count, int64 []."""
    return (targets != IGNORED).sum()
