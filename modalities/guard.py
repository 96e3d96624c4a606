"""What keeps a run from learning nonsense: bad numbers, loss spikes and silently corrupted ranks.

On the device, in the step: whether its update is skipped (`make_judge`). On the host, after it: whether the run stops
or rolls back (`Guard`). It knows the step, but neither checkpoints nor recipes.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from modalities import dist
from modalities.log import Log
from modalities.loss import Batch
from modalities.model import Transformer
from modalities.optim import Params, local
from modalities.step import Gradients, Judge, TrainState

NOT_FINITE, SPIKE = 1, 2
MAX_ROLLBACKS = 3  # to one checkpoint
NONE_YET = 1e300
"""In place of a loss that there was not yet: no loss is far above a mean with it. JSON has it, and has no NaN."""

Measure = Callable[[Tensor], Tensor]
"""One number [] of a tensor."""
Probe = Callable[[TrainState, Batch, Measure], "Measured"]
Place = tuple[tuple[str, int], ...]
"""Which part of a tensor a rank has: its coordinates in the dimensions of the mesh that the tensor is cut along."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What is done about bad numbers, loss spikes and ranks that compute wrongly."""

    max_bad_steps: int = 10
    """Steps in a row whose loss or gradient is not finite, or whose loss is a spike, after which the run stops. Each is
    skipped: it changes no weight."""
    spike_sigma: float = 0.0
    """A loss so many standard deviations above the mean of the last `spike_window` losses is a spike; 0: none is."""
    spike_window: int = 100
    """Losses that a spike is measured by; before there are so many nothing is a spike."""
    spike_action: Literal["skip", "rollback"] = "skip"
    """skip: the spike changes no weight; rollback: back to the newest checkpoint, and on with the sequences after the
    spike, so that all since the checkpoint are passed over, not the spike's alone: those of up to `checkpoint.every`
    steps. To see it at once, rollback waits for the loss of each step."""
    replicas_every: int = 0
    """Steps between two checks that ranks which should hold the same bits do, and that a gradient computed again is the
    same to the bit (two more gradients; not on GPUs, which add in any order); 0: never."""

    def __post_init__(self) -> None:
        if self.max_bad_steps < 1:
            raise ValueError(f"guard.max_bad_steps is {self.max_bad_steps}, but must be at least 1")
        if not 0 <= self.spike_sigma < math.inf:
            raise ValueError(f"guard.spike_sigma is {self.spike_sigma}, but must be finite and not negative")
        if self.spike_window < 2:
            raise ValueError(f"guard.spike_window is {self.spike_window}, but must be at least 2 losses")
        if self.replicas_every < 0:
            raise ValueError(f"guard.replicas_every is {self.replicas_every}, but must not be negative")

    @property
    def rolls_back(self) -> bool:
        return self.spike_sigma > 0 and self.spike_action == "rollback"


# ------------------------------------------------------------------------------------------------------- on the device


def remembered(config: GuardConfig, saved: Params, device: torch.device) -> Params:
    """What the judge keeps, fp64 on `device`: from `saved` what fits, the rest as at a run's beginning.

    `skipped` and `in_row`: steps so far, and in a row up to the last [0-d]. `verdict`: on the last [0-d]. `losses`: the
    last ones that were no spike, the oldest first [spike_window].
    """
    shapes: dict[str, tuple[int, ...]] = {"skipped": (), "in_row": (), "verdict": ()}
    if config.spike_sigma:
        shapes["losses"] = (config.spike_window,)
    kept = {}
    for name, shape in shapes.items():
        if name in saved and saved[name].shape == shape:
            kept[name] = saved[name].to(device, torch.float64)
        else:
            beginning = NONE_YET if name == "losses" else 0.0
            kept[name] = torch.full(shape, beginning, dtype=torch.float64, device=device)
    return kept


def make_judge(config: GuardConfig) -> Judge:
    """Skips a step that is not finite or a spike, and counts; all on the device, the same on all ranks."""

    def judge(saved: Params, loss: Tensor, is_bad: Tensor) -> tuple[Params, Tensor]:
        kept, loss = remembered(config, saved, loss.device), loss.double()
        verdict = NOT_FINITE * is_bad.double()
        if config.spike_sigma:
            std, mean = torch.std_mean(kept["losses"])
            verdict = verdict + SPIKE * (~is_bad & (loss > mean + config.spike_sigma * std)).double()
        skip = verdict > 0
        new = {"skipped": kept["skipped"] + skip, "in_row": (kept["in_row"] + 1) * skip, "verdict": verdict}
        if config.spike_sigma:
            new["losses"] = torch.where(skip, kept["losses"], torch.cat((kept["losses"][1:], loss[None])))
        return new, skip.float()

    return judge


class Reading:
    """What the judge counted at a step, on its way to the host: `read` waits for that step, not for later ones."""

    def __init__(self, state: TrainState, batch: Batch) -> None:
        self.state, self.batch = state, batch
        self.counts, self.copied = torch.stack((state.guard["in_row"], state.guard["verdict"])), None
        if self.counts.is_cuda:
            pinned = torch.empty(2, dtype=self.counts.dtype, pin_memory=True)
            self.counts = pinned.copy_(self.counts, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def read(self) -> tuple[int, int]:
        """(steps skipped in a row, verdict)."""
        if self.copied is not None:
            self.copied.synchronize()
        in_row, verdict = self.counts.tolist()
        return int(in_row), int(verdict)


# ------------------------------------------------------------------------------------------------------- a look inside


@dataclass
class Measured:
    """What was measured of a step's gradient: one number [] each."""

    own: list[Tensor]
    """Of the rank's own part: its loss, and under FSDP2 the gradients of each unit before they are summed over ranks,
    which replicas without shards do not show."""
    summed: dict[str, Tensor]
    """Of the gradient of all ranks by the parameter's name, this rank's shard of it."""


class ReduceScatter:
    """FSDP2's reduce-scatter, which lets `measure` see what it is given."""

    def __init__(self) -> None:
        self.measure: Measure | None = None
        self.found: list[Tensor] = []

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        if self.measure is not None:
            self.found.append(self.measure(input_tensor))
        newer = getattr(torch.distributed, "reduce_scatter_single", None)  # PyTorch 2.13 has renamed it
        reduce_scatter = newer or torch.distributed.reduce_scatter_tensor
        return reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def make_probe(gradients: Gradients, model: Transformer) -> Probe:
    """`probe(state, batch, measure)`: the gradient of the step that led to `state`, computed again and measured."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    tap = ReduceScatter()

    def probe(state: TrainState, batch: Batch, measure: Measure) -> Measured:
        for unit in units:  # here and not before, so that a run that looks nowhere runs on PyTorch's own
            unit.set_custom_reduce_scatter(tap)  # type: ignore[arg-type]
        tap.measure, tap.found = measure, []
        try:
            grads, (loss, _) = gradients(state.params, state.step - 1, batch)
        finally:
            tap.measure = None
        if loss.is_cuda:
            torch.cuda.synchronize()  # FSDP2 sums in a stream of its own
        return Measured([measure(loss), *tap.found], {name: measure(local(grad)) for name, grad in grads.items()})

    return probe


def is_finite(tensor: Tensor) -> Tensor:
    return tensor.isfinite().all()


def find_bad(probe: Probe, state: TrainState, batch: Batch) -> str:
    """Whose loss or gradient it was that was not finite, and the first such parameter; all ranks together."""
    found = probe(state, batch, is_finite)
    loss, *own = (bool(number) for number in found.own)
    parameters = [name for name, number in found.summed.items() if not number]
    ranks = dist.gather_objects((not loss, not all(own), parameters))
    first = min((names[0] for _, _, names in ranks if names), key=list(state.params).index, default=None)
    where = []
    for i, what in enumerate(("the loss", "the gradient")):
        bad = [rank for rank, facts in enumerate(ranks) if facts[i]]
        if bad:
            where = [f"{what} of {name_ranks(bad)}"]
            break  # a loss that is not finite makes its gradient so
    if first is not None:
        where.append(f"the gradient of {first}, the first such parameter")
    return " and ".join(where) or "nothing when it was computed again, so look at the hardware"


def name_ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


# --------------------------------------------------------------------------------------------------- silent corruption

HASHED_AT_ONCE = 2**22
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """int64 []: the sum of a tensor's elements as integers, each times an odd number of its place, modulo 2^64.

    One element's difference times an odd number is never 0, so no flipped bit is missed. Sums of integers do not depend
    on their order, so the same bits give the same sum on any device. Two elements that change places are missed only
    where the numbers of their places agree in some 33 bits.
    """
    bits = tensor.detach().flatten().view(BITS[tensor.dtype.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for first in range(0, len(bits), HASHED_AT_ONCE):
        part = bits[first : first + HASHED_AT_ONCE].long()
        place = torch.arange(first + 1, first + 1 + len(part), device=bits.device) * 0x1E3779B97F4A7C15
        place = (place ^ (place >> 29)) * 0x3F58476D1CE4E5B9
        total += (part * ((place ^ (place >> 32)) | 1)).sum()
    return total


def place_of(tensor: Tensor) -> Place:
    if not isinstance(tensor, DTensor):
        return ()
    mesh = tensor.device_mesh
    names, coordinates = mesh.mesh_dim_names, mesh.get_coordinate()
    assert names is not None and coordinates is not None
    dims = zip(names, coordinates, tensor.placements, strict=True)
    return tuple((name, i) for name, i, placement in dims if not placement.is_replicate())


def checksums(state: TrainState) -> dict[Place, dict[str, int]]:
    """The checksum of each of this rank's tensors, by the place and the name."""
    columns = {
        "": state.params,
        " (ema)": state.ema,
        **{f" ({column})": tensors for column, tensors in state.opt_state.items()},
    }
    named = {name + column: tensor for column, tensors in columns.items() for name, tensor in tensors.items()}
    sums = torch.stack([checksum(local(tensor)).to(state_device(state)) for tensor in named.values()]).tolist()
    by_place: dict[Place, dict[str, int]] = defaultdict(dict)
    for (name, tensor), value in zip(named.items(), sums, strict=True):
        by_place[place_of(tensor)][name] = value
    return by_place


def state_device(state: TrainState) -> torch.device:
    return local(next(iter(state.params.values()))).device


def odd_ranks(values: dict[int, str]) -> list[int]:
    """The ranks whose value is not that of most; all of them where no value is."""
    common, count = Counter(values.values()).most_common(1)[0]
    return [rank for rank, value in values.items() if value != common or count * 2 <= len(values)]


def find_unlike(state: TrainState) -> str | None:
    """Which ranks hold other bits than those that should hold the same, if any do; all ranks together."""
    sums = checksums(state)
    # One value of each place, for every rank sees those of all.
    short = {place: hashlib.sha256(str(named).encode()).hexdigest() for place, named in sums.items()}
    by_place: dict[Place, dict[int, str]] = defaultdict(dict)
    for rank, of_rank in enumerate(dist.gather_objects(short)):
        for place, value in of_rank.items():
            by_place[place][rank] = value
    unlike = {place: values for place, values in by_place.items() if len(set(values.values())) > 1}
    if not unlike:
        return None
    place, values = next(iter(unlike.items()))
    by_rank = dist.gather_objects(sums.get(place, {}))
    odd, names = odd_ranks(values), by_rank[min(values)]
    first = next(name for name in names if len({by_rank[rank][name] for rank in values}) > 1)
    if len(odd) == len(values):
        return (
            f"{name_ranks(odd)} should hold the same bits and do not, first in {first}; which is wrong, none can tell"
        )
    return f"{name_ranks(odd)} of the {len(values)} ranks that should hold the same bits does not, first in {first}"


def find_unrepeatable(probe: Probe, state: TrainState, batch: Batch) -> str | None:
    """Which ranks compute another gradient when they compute it again; all ranks together."""
    one, two = (probe(state, batch, checksum) for _ in range(2))
    own = bool((torch.stack(one.own) != torch.stack(two.own)).any())
    parameters = [name for name in one.summed if bool(one.summed[name] != two.summed[name])]
    ranks = dist.gather_objects((own, parameters))
    # What one rank computes is in the gradients of all; whose own part differs is where it comes from.
    odd = [rank for rank, facts in enumerate(ranks) if facts[0]] or [
        rank for rank, facts in enumerate(ranks) if facts[1]
    ]
    if not odd:
        return None
    first = min((names[0] for _, names in ranks if names), key=list(state.params).index, default="the loss")
    return f"{name_ranks(odd)} computed two gradients from the same weights and samples, unlike first in {first}"


def repeats(device: torch.device) -> bool:
    """Whether what is computed again must have the same bits: a GPU adds in any order unless it is told not to."""
    return device.type == "cpu" or torch.are_deterministic_algorithms_enabled()


# --------------------------------------------------------------------------------------------------------- on the host


class Diverged(ValueError):
    """Too many steps in a row were skipped, beginning with step `first`."""

    def __init__(self, line: str, first: int) -> None:
        super().__init__(line)
        self.first = first


@dataclass
class Guard:
    """`state = guard(state, batch)` after each step: goes on, rolls back, or ends the run with a line (ValueError).

    `restore`: the state of the newest checkpoint, in the tensors of the one it is given; None where there is none.
    `last`: the run's last step. Each step's counts are read: on a GPU a step late, so that the host never waits for the
    step that was just started; at once on a CPU, for a rollback, and after the last step, of which no later one tells.
    All ranks read the same and do the same. Ending the run saves nothing.
    """

    config: GuardConfig
    probe: Probe
    restore: Callable[[TrainState], TrainState | None]
    out: Log
    world: dist.World
    last: int
    pending: Reading | None = None
    rollbacks: Counter[int] = field(default_factory=Counter)
    """By the step of the checkpoint."""
    sound: str = "this start"
    """When the ranks were last found to be alike."""

    def __post_init__(self) -> None:
        if self.config.replicas_every and not repeats(self.world.device):
            self.out.say("guard.replicas_every: weights are compared, but on a GPU no gradient need repeat to the bit")

    def __call__(self, state: TrainState, batch: Batch) -> TrainState:
        every = self.config.replicas_every
        for reading in self.readings(state, batch):
            in_row, verdict = reading.read()
            if in_row >= self.config.max_bad_steps:
                raise Diverged(self.why_it_stops(reading, in_row, verdict), reading.state.step - in_row + 1)
            if verdict == SPIKE and self.config.rolls_back:
                return self.roll_back(state, batch)
        if every and state.step % every == 0:
            with self.out.aside(state.step):
                self.check_ranks(state, batch)
        return state

    def readings(self, state: TrainState, batch: Batch) -> Iterable[Reading]:
        """What is to be waited for after this step, the earlier first."""
        before, now = self.pending, Reading(state, batch)
        late = self.world.device.type != "cpu" and not self.config.rolls_back and state.step < self.last
        self.pending = now if late else None
        return [reading for reading in (before, None if late else now) if reading]

    def why_it_stops(self, reading: Reading, in_row: int, verdict: int) -> str:
        state, samples = reading.state, samples_of(reading.state, reading.batch, self.world)
        if verdict == SPIKE:
            why = f"a loss more than {self.config.spike_sigma} sigma above those before; raise guard.spike_sigma"
        else:
            where = find_bad(self.probe, state, reading.batch)
            why = f"not finite: {where}; lower optim.lr, or look at these samples"
        return (
            f"{in_row} steps in a row were skipped, up to step {state.step} with samples {samples}: {why}. They "
            "changed no weight, and stopping saves nothing: the same command goes on from the newest checkpoint"
        )

    def roll_back(self, state: TrainState, batch: Batch) -> TrainState:
        """The newest checkpoint's state, its cursor behind the spike; where there is none, the step is only skipped."""
        samples = samples_of(state, batch, self.world)
        with self.out.aside(state.step):
            restored = self.restore(state)
        if restored is None:
            self.out.say(f"step {state.step}: a loss spike, skipped, for there is no checkpoint to go back to")
            return state
        self.rollbacks[restored.step] += 1
        if self.rollbacks[restored.step] > MAX_ROLLBACKS:
            raise ValueError(
                f"the loss spiked again after {MAX_ROLLBACKS} rollbacks to step {restored.step}, at step {state.step} "
                f"with samples {samples}; raise guard.spike_sigma, lower optim.lr, or look at these samples"
            )
        self.out.say(
            f"step {state.step}: a loss spike with samples {samples}; back to step {restored.step}, passing over "
            f"{state.samples - restored.samples} sequences, {restored.samples} to {state.samples - 1}"
        )
        self.out.start_clock(restored.step)
        return replace(restored, samples=state.samples)

    def check_ranks(self, state: TrainState, batch: Batch) -> None:
        problem = find_unlike(state)
        if problem is None and repeats(self.world.device):
            problem = find_unrepeatable(self.probe, state, batch)
        if problem is not None:
            raise ValueError(
                f"after step {state.step} {problem}; a machine is at fault, so leave it out, remove the checkpoints "
                f"since {self.sound}, which may hold it too, and start the same command again"
            )
        self.sound = f"step {state.step}"


def samples_of(state: TrainState, batch: Batch, world: dist.World) -> str:
    """The sequences of the global batch of the step that led to `state`, by their place in the data's order."""
    size = batch["inputs"].shape[0] * batch["inputs"].shape[1] * world.data_size
    return f"{state.samples - size} to {state.samples - 1}"
