"""Muon (Jordan et al., 2024): momentum whose every update is made nearly orthogonal, for the matrices inside a model.

The arithmetic is that of `torch.optim.Muon`, in the functional form. Matrices that ranks share by rows are
orthogonalised whole, each by one of the ranks. It knows tensors by name and nothing of models.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon, for the matrices that it updates; the rest is AdamW's."""

    matrices: str = r".*\.(wq|wk|wv|wo|w_gate|w_up|w_down)\.weight"
    """Regular expression that the whole names of Muon's parameters match."""
    lr: float = 0.02
    """Peak learning rate; it follows the same schedule as AdamW's."""
    momentum: float = 0.95
    """Decay of the running mean of the gradient."""
    nesterov: bool = True
    """Look one step ahead along the running mean."""
    weight_decay: float = 0.1
    """Decoupled weight decay, times the multiple that `decay_rules` gives a parameter."""
    adjust: Literal["original", "match_rms_adamw"] = "original"
    """Factor of the learning rate for a matrix of A × B: sqrt(max(1, A / B)), as Jordan has it; or 0.2 sqrt(max(A, B)),
    by which updates are as large as AdamW's, so that its learning rate and weight decay fit (arXiv 2502.16982)."""
    newton_schulz_steps: int = 5
    """Iterations of the orthogonalisation."""
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    """Of its odd polynomial: a x + b x³ + c x⁵."""
    eps: float = 1e-7
    """Least norm that an update is divided by."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.muon.{name} is {getattr(self, name)}, but must be finite and not negative")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optim.muon.momentum is {self.momentum}, but must be in [0, 1)")
        if not self.eps > 0:
            raise ValueError(f"optim.muon.eps is {self.eps}, but must be positive")
        if not 1 <= self.newton_schulz_steps < 100:
            raise ValueError(f"optim.muon.newton_schulz_steps is {self.newton_schulz_steps}, but must be in [1, 100)")
        try:
            re.compile(self.matrices)
        except re.error as error:
            raise ValueError(f"optim.muon.matrices: {self.matrices!r} is not a regular expression: {error}") from None


class Rates(NamedTuple):
    """Of one matrix, at one step."""

    lr: float
    decay: float
    """What the weights lose: learning rate × weight decay."""


def init(params: Tensors) -> dict[str, Tensor]:
    """The running means; a ValueError names a parameter that is no matrix."""
    for name, param in params.items():
        if param.ndim != 2:
            raise ValueError(f"optim.muon.matrices matches {name}, but it has {param.ndim} dimensions, not 2")
    return {name: torch.zeros_like(param, requires_grad=False) for name, param in params.items()}


@torch.no_grad()
def update(
    grads: Tensors,
    momenta: Tensors,
    params: Tensors,
    config: MuonConfig,
    rates: Mapping[str, Rates],
    skip: Tensor | None = None,
) -> None:
    """One step, in place, of the parameters that `rates` names; `skip`: as in `optim.Update`. All ranks together."""
    for names in rounds({name: params[name] for name in rates}):
        directions = []
        for name in names:
            grad, momentum = local(grads[name]), local(momenta[name])
            keep(momentum, momentum.lerp(grad, 1 - config.momentum), skip)
            directions.append(grad.lerp(momentum, config.momentum) if config.nesterov else momentum)
        for name, direction in zip(names, orthogonal([params[n] for n in names], directions, config), strict=True):
            param, (lr, decay) = local(params[name]), rates[name]
            # The kernels of torch.optim.Muon, in their order.
            lr *= adjustment(config.adjust, params[name].shape)
            keep(param, param.mul(1 - decay).add_(direction.to(param.device), alpha=-lr), skip)


def keep(old: Tensor, new: Tensor, skip: Tensor | None) -> None:
    """`old` becomes `new`, or stays where `skip` is 1, whatever `new` holds."""
    old.copy_(new if skip is None else torch.where(skip.to(old.device) > 0, old, new))


def adjustment(kind: str, shape: Sequence[int]) -> float:
    """The learning rate's factor for a matrix of `shape`."""
    rows, columns = shape
    return math.sqrt(max(1, rows / columns)) if kind == "original" else 0.2 * math.sqrt(max(rows, columns))


def newton_schulz(matrix: Tensor, config: MuonConfig) -> Tensor:
    """U Vᵀ, nearly, of a matrix U S Vᵀ, in bf16: singular values of about 0.7 to 1.2 (Jordan et al., 2024)."""
    a, b, c = config.coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if tall else x  # the smaller of both products with its transpose
    x = x / x.norm().clamp(min=config.eps)
    for _ in range(config.newton_schulz_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


# ----------------------------------------------------------------------------------------------------------- many ranks


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def row_group(param: Tensor) -> ProcessGroup | None:
    """The ranks that share a matrix by rows alone; None if it is whole here, or split in another way as well."""
    if not isinstance(param, DTensor):
        return None
    cut = [i for i, placement in enumerate(param.placements) if not placement.is_replicate()]
    # A tensor-parallel matrix is cut twice; its outer cut is a subclass of Shard, whose rows lie otherwise.
    rows = len(cut) == 1 and type(param.placements[cut[0]]) is Shard and param.placements[cut[0]] == Shard(0)
    return param.device_mesh.get_group(cut[0]) if rows else None


def rounds(params: Tensors) -> Iterator[list[str]]:
    """The names in groups: as many matrices as there are ranks to orthogonalise them, alike in size."""
    shared: dict[ProcessGroup, list[str]] = {}
    for name, param in params.items():
        group = row_group(param)
        if group is None:
            yield [name]
        else:
            shared.setdefault(group, []).append(name)
    for group, names in shared.items():
        names = sorted(names, key=lambda name: (-params[name].numel(), name))
        for first in range(0, len(names), group.size()):
            yield names[first : first + group.size()]


def orthogonal(params: Sequence[Tensor], directions: Sequence[Tensor], config: MuonConfig) -> list[Tensor]:
    """This rank's parts of the orthogonalised `directions`, of which it has its parts; they are cut as `params`."""
    param, direction = params[0], directions[0]
    group = row_group(param)
    if group is not None:
        # What is offloaded comes to where the ranks can exchange it; in bf16, as it is orthogonalised.
        device = param.device_mesh.device_type  # type: ignore[attr-defined]
        parts = [part.to(device, torch.bfloat16) for part in directions]
        return orthogonal_rows(parts, [p.shape[0] for p in params], group, config)
    if not isinstance(param, DTensor):
        return [newton_schulz(direction, config)]
    mesh, placements = param.device_mesh, param.placements
    sharded = DTensor.from_local(
        direction.to(mesh.device_type), mesh, placements, run_check=False, shape=param.shape, stride=param.stride()
    )
    whole = newton_schulz(sharded.full_tensor(), config).contiguous()
    return [local(distribute_tensor(whole, mesh, placements, src_data_rank=None))]


def orthogonal_rows(
    parts: Sequence[Tensor], rows: Sequence[int], group: ProcessGroup, config: MuonConfig
) -> list[Tensor]:
    """This rank's rows of matrices, at most one a rank, orthogonalised; `parts`: these rows before, `rows`: of each.

    Rank i gets the whole of matrix i, and gives everyone their rows of the result back. All ranks together.
    """
    size, me = group.size(), group.rank()
    given = [part.numel() for part in parts] + [0] * (size - len(parts))
    got, whole = [0] * size, parts[0].new_empty(0)
    if me < len(parts):
        chunk, columns = math.ceil(rows[me] / size), parts[me].shape[1]
        got = [max(0, min(chunk, rows[me] - rank * chunk)) * columns for rank in range(size)]
        whole = parts[0].new_empty(rows[me] * columns)
    torch.distributed.all_to_all_single(whole, torch.cat([part.flatten() for part in parts]), got, given, group)
    if me < len(parts):
        whole = newton_schulz(whole.view(rows[me], -1), config).flatten()
    out = parts[0].new_empty(sum(given))
    torch.distributed.all_to_all_single(out, whole, given, got, group)
    return [piece.view(part.shape) for piece, part in zip(out.split(given), parts, strict=False)]
