"""The loss contract and the token-normalised cross-entropy. It knows logits and targets, not models or ranks.

The contract: `loss_fn(params, batch) -> (loss, aux)`, where `loss` is a *sum* over this micro-batch's valid targets
divided by `batch["num_targets"]`, the number of valid targets in the whole global batch. Losses and gradients of
micro-batches and ranks then add up to those of the global batch, however it is cut. `aux` is a dict of tensors that add
up the same way.
"""

from collections.abc import Callable

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


def count_targets(targets: Tensor) -> Tensor:
    """How many targets count, int64 []."""
    return (targets != IGNORED).sum()
