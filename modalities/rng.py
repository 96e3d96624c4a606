"""Randomness as a pure function: seeds folded in from (seed, step, rank, purpose), and a shuffle that needs no memory.

Nothing here holds state, so there is no random state to save: whoever knows the seed and the step knows the numbers.
"""

import hashlib

import numpy as np

ROUNDS = 6


def fold(seed: int, *parts: int | str) -> int:
    """A 63-bit seed that depends on every part: `fold(seed, "dropout", step, rank)`."""
    text = "\x1f".join(map(repr, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def permute(indices: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Where a pseudo-random permutation of `range(n)` sends each of `indices` (any shape, int64, each in [0, n)).

    A Feistel network over the next power of two is a bijection; following a cycle until it lands below `n` ("cycle
    walking") restricts it to one on `range(n)`. From n = 33 the domain is under 2n, so a walk takes
    under two rounds on average.
    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.
    """
    assert n > 0
    bits = max(6, int(n - 1).bit_length())  # halves of one or two bits would mix badly
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    keys = [np.uint64(fold(seed, "feistel", r)) for r in range(ROUNDS)]

    def feistel(x: np.ndarray) -> np.ndarray:
        high, low = x >> low_bits, x & low_mask
        for r, key in enumerate(keys):
            if r % 2:
                low = low ^ (_hash(high, key) & low_mask)
            else:
                high = high ^ (_hash(low, key) & high_mask)
        return (high << low_bits) | low

    out = feistel(np.asarray(indices).astype(np.uint64).ravel())
    outside = np.flatnonzero(out >= n)
    while outside.size:
        out[outside] = feistel(out[outside])
        outside = outside[out[outside] >= n]
    return out.astype(np.int64).reshape(np.shape(indices))


def _hash(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014) on `x + key`; the better upper half of its bits."""
    z = x + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z >> np.uint64(32)
