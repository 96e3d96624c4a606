"""The memory-free permutation and the folded seeds."""

import numpy as np
import pytest

from modalities.rng import fold, permute


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 1000, 4096, 4097, 65535, 65536, 65537, 300_000])
def test_permute_is_a_bijection(n: int) -> None:
    for seed in (0, 1, 2**62):
        assert np.array_equal(np.sort(permute(np.arange(n), n, seed)), np.arange(n))


@pytest.mark.parametrize("n", [1000, 65536, 10**10])
def test_permute_is_deterministic_and_differs_by_seed(n: int) -> None:
    indices = np.arange(500)
    first = permute(indices, n, 7)
    assert np.array_equal(first, permute(indices, n, 7))
    for seed in (6, 8, 7 + 2**32):
        assert np.count_nonzero(first == permute(indices, n, seed)) < 10


def test_permute_works_element_by_element_on_any_shape() -> None:
    indices = np.random.default_rng(0).integers(0, 1000, (3, 4, 5))
    before = indices.copy()
    out = permute(indices, 1000, 1)
    assert out.shape == (3, 4, 5) and out.dtype == np.int64
    assert np.array_equal(indices, before), "the argument was changed"
    for place in np.ndindex(3, 4, 5):
        assert out[place] == permute(np.array([indices[place]]), 1000, 1)[0] == permute(indices[place], 1000, 1)
    assert permute(np.empty(0, np.int64), 1000, 1).shape == (0,)


@pytest.mark.parametrize("n", [10**10, 2**40 + 1, 2**62])
def test_permute_of_a_range_too_large_for_memory(n: int) -> None:
    indices = np.unique(np.concatenate([np.arange(50_000), np.arange(n - 50_000, n)]))
    out = permute(indices, n, 3)
    assert out.min() >= 0 and out.max() < n
    assert len(np.unique(out)) == len(indices)
    assert abs(out.mean() / n - 0.5) < 0.005  # standard error 0.0009


@pytest.mark.parametrize("seed", range(3))
def test_permute_looks_shuffled(seed: int) -> None:
    n = 60_000
    positions = np.arange(n)
    out = permute(positions, n, seed)
    for lag in (1, 2, 16, 1024):
        assert abs(np.corrcoef(out[:-lag], out[lag:])[0, 1]) < 5 / np.sqrt(n)
    assert abs(np.abs(out - positions).mean() - n / 3) < 5 * n / np.sqrt(17 * n)  # the mean distance in a fair shuffle
    assert np.count_nonzero(out == positions) < 12  # Poisson, mean 1
    other = permute(positions, n, seed + 1)
    for sent_to, source in ((out, positions), (out, other), (out % 16, positions % 16), (out % 16, positions)):
        assert chi_square(source, sent_to) < 225 + 5 * np.sqrt(2 * 225)  # 15 × 15 degrees of freedom


def chi_square(a: np.ndarray, b: np.ndarray) -> float:
    """Of the counts of 16 × 16 cells, each variable cut into 16 equal ranges."""
    cells = np.histogram2d(a, b, bins=16)[0]
    expected = cells.sum() / 256
    return float(((cells - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("n", [2, 3, 5, 16])
def test_over_seeds_each_place_of_a_small_range_is_as_likely(n: int) -> None:
    counts = np.zeros((n, n))
    for seed in range(1000):
        counts[np.arange(n), permute(np.arange(n), n, seed)] += 1
    freedom = (n - 1) ** 2
    assert ((counts - 1000 / n) ** 2 / (1000 / n)).sum() < freedom + 5 * np.sqrt(2 * freedom)


def test_fold_depends_on_every_part_and_on_their_order() -> None:
    parts: list[tuple[int | str, ...]] = [
        (0,),
        (1,),
        (0, 0),
        (0, 1),
        (1, 0),
        (0, "a"),
        (0, "a", 1),
        (0, 1, "a"),
        (0, "a1"),
        (0, "a", "1"),
        (0, "1", "a"),
        (0, "a\x1f1"),
        (0, "a'\x1f'1"),
        (0, "a, 1"),
        (0, "", "a"),
        (0, "a", ""),
        (0, 12, 3),
        (0, 1, 23),
        (0, "1"),
        (0, -1),
        (0, 2**63),
    ]
    seeds = [fold(part[0], *part[1:]) for part in parts if isinstance(part[0], int)]
    assert len(set(seeds)) == len(parts)
    assert seeds == [fold(part[0], *part[1:]) for part in parts if isinstance(part[0], int)]


def test_fold_gives_63_bits_without_collisions() -> None:
    seeds = np.array([fold(0, "dropout", step, rank) for step in range(10_000) for rank in range(2)])
    assert seeds.dtype == np.int64 and seeds.min() >= 0
    assert len(np.unique(seeds)) == len(seeds)
    for bit in range(63):
        assert abs(((seeds >> bit) & 1).mean() - 0.5) < 0.02  # over five standard errors


def test_fold_is_the_same_in_every_version() -> None:
    # Runs are reproduced from their recipe: a change here would change the weights and the data order of all of them.
    assert fold(0, "init", "embed.weight") == 3322836570805499341
    assert permute(np.arange(6), 1000, 0).tolist() == [467, 584, 219, 568, 336, 660]
