"""The order over several sources: exact shares, every sequence once an epoch, stages, and a start anywhere."""

import numpy as np
import pytest

from modalities.mixture import BLOCK, Mixture, Stage, apportion, sequence_numbers

COUNTS = (700, 301, 50)


def test_one_source_has_the_order_that_it_always_had() -> None:
    assert sequence_numbers(np.arange(12), 37, 0).tolist() == [3, 7, 12, 27, 28, 29, 23, 22, 4, 14, 25, 34]
    assert Mixture([37], 0).at(np.arange(30, 42))[1].tolist() == [17, 5, 13, 15, 8, 6, 9, 0, 9, 11, 3, 22]
    sources, numbers = Mixture([6430], 3).at(10**9 + np.arange(6))
    assert numbers.tolist() == [1263, 2273, 3444, 3027, 1169, 5932] and not sources.any()


def test_a_batch_larger_than_an_epoch() -> None:
    numbers = sequence_numbers(np.arange(3, 38), per_epoch=7, seed=0)
    assert [sorted(numbers[4 + 7 * e : 11 + 7 * e].tolist()) for e in range(4)] == [list(range(7))] * 4
    assert sequence_numbers(np.arange(5, 8), per_epoch=1, seed=0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, 0.2, 0.1), (3, 0, 5), (1e-3, 1, 1)])
def test_shares_are_exact_within_each_block(weights: tuple[float, ...]) -> None:
    sources, _ = Mixture(COUNTS, 0, weights).at(np.arange(3 * BLOCK))
    expected = apportion(np.array(weights, float), BLOCK)
    assert np.abs(expected - np.array(weights) / sum(weights) * BLOCK).max() < 1
    for block in sources.reshape(3, BLOCK):
        assert np.array_equal(np.bincount(block, minlength=3), expected)
    # Shuffled within: a thousandth of a block has about its share too.
    shares = np.bincount(sources[:5000], minlength=3) / 5000
    assert np.abs(shares - np.array(weights) / sum(weights)).max() < 0.03


def test_default_weights_are_the_numbers_of_sequences() -> None:
    mixture = Mixture(COUNTS, 0)
    drawn = np.bincount(mixture.at(np.arange(2 * BLOCK))[0])
    assert np.allclose(drawn / drawn.sum(), np.array(COUNTS) / sum(COUNTS), atol=1 / BLOCK)
    assert mixture.drawn(2 * BLOCK).tolist() == drawn.tolist()


def test_every_sequence_once_an_epoch_of_its_source() -> None:
    sources, numbers = Mixture(COUNTS, 0, (0.5, 0.3, 0.2)).at(np.arange(2 * BLOCK))
    orders = []
    for source, count in enumerate(COUNTS):
        own = numbers[sources == source]
        epochs = own[: len(own) // count * count].reshape(-1, count)
        assert (np.sort(epochs, axis=1) == np.arange(count)).all() and len(epochs) > 5
        orders.append(epochs[0, :50] * 1000 // count)
    assert not np.array_equal(orders[0], orders[1]), "sources are shuffled differently"


STAGES = [(1000, (0.0, 1.0, 1.0)), (1000 + BLOCK + 77, (1.0, 0.0, 3.0)), (1000 + BLOCK + 77 + 5, (1.0, 1.0, 1.0))]


def test_stages_begin_where_they_should_and_nothing_is_lost_or_repeated() -> None:
    mixture = Mixture(COUNTS, 0, (1.0, 1.0, 0.0), STAGES)
    end = 3 * BLOCK
    sources, _ = mixture.places(np.arange(end))
    first, second, third = (begin for begin, _ in STAGES)
    assert np.bincount(sources[:first], minlength=3).tolist() == [500, 500, 0]
    assert np.bincount(sources[first : first + BLOCK], minlength=3).tolist() == [0, BLOCK // 2, BLOCK // 2]
    assert 0 not in sources[first:second] and 1 not in sources[second:third]
    assert set(sources[third:].tolist()) == {0, 1, 2}
    _, indices = mixture.places(np.arange(end))
    for source in range(3):
        assert np.array_equal(indices[sources == source], np.arange((sources == source).sum())), "in its own order"
    for stop in (first, first + BLOCK, second, third, third + BLOCK):
        assert mixture.drawn(stop).tolist() == np.bincount(sources[:stop], minlength=3).tolist()


def test_stages_that_begin_at_the_same_sequence() -> None:
    mixture = Mixture((9, 9), 0, (1, 0), [(4, (0, 1)), (4, (1, 0))])
    assert mixture.places(np.arange(9))[0].tolist() == [0] * 9
    assert mixture.places(np.arange(9))[1].tolist() == list(range(9))


@pytest.mark.parametrize("first", [0, 999, 10**9, 10**9 + 123, 10**15])
def test_any_cut_of_the_positions_gives_the_same(first: int) -> None:
    mixture = Mixture(COUNTS, 1, (0.6, 0.3, 0.1), STAGES)
    positions = first + np.arange(300)
    sources, numbers = mixture.at(positions)
    for i in (0, 7, 299):
        assert [values.tolist() for values in mixture.at(positions[i : i + 1])] == [[sources[i]], [numbers[i]]]
    for ranks in (2, 4):
        parts = [mixture.at(part) for part in np.split(positions, ranks)]
        assert np.array_equal(np.concatenate([part[1] for part in parts]), numbers)
    square = mixture.at(positions.reshape(20, 15))
    assert np.array_equal(square[0].ravel(), sources) and np.array_equal(square[1].ravel(), numbers)
    assert not np.array_equal(Mixture(COUNTS, 2, (0.6, 0.3, 0.1), STAGES).at(positions)[1], numbers)


def test_apportion_adds_up() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        weights = rng.random(rng.integers(1, 9)) * (rng.random() < 0.9)
        weights[rng.integers(len(weights))] = 1.0
        places = int(rng.integers(0, 1000))
        shares = apportion(weights, places)
        assert shares.sum() == places and np.abs(shares - weights / weights.sum() * places).max() < 1
        assert not shares[weights == 0].any()


def test_a_source_that_would_never_have_its_turn_is_refused() -> None:
    with pytest.raises(ValueError, match="the weight 1e-06 of source 2 in data.train is less than one sequence in"):
        Mixture((5, 5), 0, (1.0, 1e-6))
    with pytest.raises(ValueError, match="source 1 in data.train"):
        Mixture((5, 5), 0, (), [(10, (1e-6, 1.0))])


@pytest.mark.parametrize("weights", [(), (0.0, 0.0), (-1.0, 2.0), (float("nan"), 1.0), (float("inf"), 1.0)])
def test_weights_that_are_no_shares_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"data\.stages: weights are \(.*\), but must be finite"):
        Stage(tokens=5, weights=weights)
    with pytest.raises(ValueError, match="tokens is 0"):
        Stage(tokens=0, weights=(1.0,))
