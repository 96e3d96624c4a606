"""Which sequence of which source stands at a position of the training order: a pure function, O(1) in the position.

It knows how many sequences each of the S sources has, no file. With one source the order is its own: a permutation
for each epoch. With several, a stage of the training is cut into blocks of positions. A block has a fixed number of
places for each source, which a permutation shuffles; so its shares are exact, and how much of a source went before
it is a product. Each source gives its sequences in its own order, none left out or repeated, in all blocks and stages.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modalities.packing import ranges
from modalities.rng import fold, permute

BLOCK = 65_536  # positions in which the shares are exact


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the training with weights of its own."""

    tokens: int
    """Where it begins [training tokens so far]; it lasts until the next one begins."""
    weights: tuple[float, ...]
    """Share of the sequences drawn from each source, in the order of data.train; 0: none."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(
                f"data.stages: tokens is {self.tokens}, but must be at least 1; data.weights is for before"
            )
        check_weights("data.stages: weights", self.weights)


def check_weights(field: str, weights: Sequence[float]) -> None:
    """Raise ValueError if they are no shares."""
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not sum(weights) > 0:
        raise ValueError(f"{field} are {tuple(weights)}, but must be finite, not negative, and not all 0")


def sequence_numbers(indices: np.ndarray, per_epoch: int, seed: int) -> np.ndarray:
    """The sequences at `indices` (int64, any shape) of the endless order of one source of `per_epoch` sequences.

    Each epoch is a permutation of its own of all of them.
    """
    epochs = indices // per_epoch
    numbers = np.empty_like(indices)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        numbers[here] = permute(indices[here] % per_epoch, per_epoch, fold(seed, "order", epoch))
    return numbers


def apportion(weights: np.ndarray, places: int) -> np.ndarray:
    """`places` shared out in proportion to `weights`, by largest remainder: whole numbers that add up, int64 [S]."""
    quotas = weights / weights.sum() * places
    shares = np.floor(quotas).astype(np.int64)
    remainders = np.where(weights > 0, quotas - shares, -1.0)
    shares[np.argsort(-remainders, kind="stable")[: places - shares.sum()]] += 1
    return shares


class Mixture:
    """The training order over S sources."""

    def __init__(
        self,
        counts: Sequence[int],
        seed: int,
        weights: Sequence[float] = (),
        stages: Sequence[tuple[int, Sequence[float]]] = (),
    ) -> None:
        """`counts`: sequences of each source. `stages`: (first position, weights) of what follows on `weights`,
        which default to the counts. Raises ValueError if a source that has weight never has a turn.
        """
        self.counts, self.seed = counts, seed
        self.block = functools.lru_cache(4)(self._block)
        self.seeds = [fold(seed, "source", s) if s else seed for s in range(len(counts))]
        self.begins = np.array([0, *(first for first, _ in stages)])
        self.weights = np.array([weights or counts, *(w for _, w in stages)], np.float64)
        for weights_S in self.weights:
            starved = np.flatnonzero((weights_S > 0) & (apportion(weights_S, BLOCK) == 0))
            if starved.size:
                raise ValueError(
                    f"the weight {weights_S[starved[0]]:g} of source {starved[0] + 1} in data.train is less than one "
                    f"sequence in {BLOCK:,}; give it more, or 0, in data.weights and data.stages"
                )
        # How much of each source the stages before have used up.
        self.before = np.zeros_like(self.weights, np.int64)
        for stage, length in enumerate(np.diff(self.begins).tolist()):
            self.before[stage + 1] = self.before[stage] + self.used(stage, length)

    def used(self, stage: int, length: int) -> np.ndarray:
        """Sequences of each source in `length` positions of a stage, were it to end there, int64 [S]."""
        blocks, rest = divmod(length, BLOCK)
        return blocks * apportion(self.weights[stage], BLOCK) + apportion(self.weights[stage], rest)

    def drawn(self, samples: int) -> np.ndarray:
        """Sequences of each source in the first `samples` positions, in the last block what is expected; int64 [S]."""
        stage = int(np.searchsorted(self.begins, samples, side="right")) - 1
        return self.before[stage] + self.used(stage, samples - int(self.begins[stage]))

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, number of the sequence within it) at each of `positions`, all int64 and of the same shape."""
        sources, indices = np.zeros_like(positions), positions
        if len(self.counts) > 1:
            sources, indices = self.places(positions)
        numbers = np.empty_like(positions)
        for source in np.unique(sources).tolist():
            here = sources == source
            numbers[here] = sequence_numbers(indices[here], self.counts[source], self.seeds[source])
        return sources, numbers

    def places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, index in the source's own endless order) at each of `positions`."""
        stages = np.searchsorted(self.begins, positions, side="right") - 1
        blocks, within = np.divmod(positions - self.begins[stages], BLOCK)
        sources, indices = np.empty_like(positions), np.empty_like(positions)
        for stage, block in sorted(set(zip(stages.ravel().tolist(), blocks.ravel().tolist(), strict=True))):
            here = (stages == stage) & (blocks == block)
            block_sources, block_indices = self.block(stage, block)
            sources[here], indices[here] = block_sources[within[here]], block_indices[within[here]]
        return sources, indices

    def _block(self, stage: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """`places` of a whole block, as how often a source had its turn before a position takes all before it."""
        length = BLOCK
        if stage + 1 < len(self.begins):  # the next stage may cut it short
            length = min(BLOCK, int(self.begins[stage + 1] - self.begins[stage]) - block * BLOCK)
        shares = apportion(self.weights[stage], length)
        slots = permute(np.arange(length), length, fold(self.seed, "mixture", stage, block))
        sources = np.searchsorted(np.cumsum(shares), slots, side="right")
        first = self.before[stage] + self.used(stage, block * BLOCK)
        indices = np.empty_like(sources)
        indices[np.argsort(sources, kind="stable")] = ranges(first, shares)
        return sources, indices
