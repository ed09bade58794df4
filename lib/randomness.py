"""Counter-based random numbers: each is a function of its purpose, not of earlier draws.

Every draw of the project is `f(seed, purpose, indices)`: a word that says what the number is for, and indices such as the
step and the number of the sample. No state is saved or restored. A resumed run, a run on more processes and a run with
an additional validation draw the same numbers. The generator is the finaliser of splitmix64, used as a counter-based
hash (Steele, Lea and Flood, OOPSLA 2014) and vectorised in numpy.
"""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, the increment of splitmix64
_ROW = np.uint64(0xD1B54A32D192ED03)  # an odd constant unrelated to the above, so rows and columns differ


def key(seed: int, purpose: str, *indices: int) -> int:
    """The 64-bit key of a draw. It is the same in all processes, on all machines and in all Python versions."""
    text = "/".join([str(int(seed)), purpose, *(str(int(i)) for i in indices)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, in place: every input bit influences every output bit. `z` must be a new uint64 array."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def bits(draw_key: int, rows, columns: int) -> np.ndarray:
    """(R, columns) uint64. Row r depends only on `rows[r]`: any subset of the rows gives the same numbers."""
    rows = np.atleast_1d(np.asarray(rows, dtype=np.int64)).astype(np.uint64)
    base = _mix(rows * _ROW + np.uint64(draw_key & 0xFFFFFFFFFFFFFFFF))  # (R,)
    return _mix(base[:, None] + np.arange(1, columns + 1, dtype=np.uint64) * _GOLDEN)


def uniform(draw_key: int, rows, columns: int) -> np.ndarray:
    """(R, columns) float64 in [0, 1). As in `bits`, row r depends only on `rows[r]`."""
    return (bits(draw_key, rows, columns) >> np.uint64(11)) * (1.0 / (1 << 53))


MAX_SORTED = (
    10**7
)  # samples of a permutation that is held in memory; longer ones are computed by a Feistel network
_ROUNDS = 8
_CHUNK = 2**16


class Permutation:
    """A random permutation of 0 to count - 1: a pure function of seed, purpose and epoch. `p[index]` are its values.

    Up to `MAX_SORTED` samples it is a sorted array of draws. A longer one is a keyed Feistel network over the next
    power of two (Luby and Rackoff, SIAM J. Comput. 1988), which needs no memory. A value that is too large is
    encrypted again until it is below `count` (cycle walking; Black and Rogaway, CT-RSA 2002).
    """

    def __init__(self, seed: int, purpose: str, epoch: int, count: int):
        self.count, self._key = count, key(seed, purpose, epoch)
        self._order = _sorted_draws(self._key, count) if count <= MAX_SORTED else None

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        """(...) int64, the values at some positions from 0 to count - 1."""
        if self._order is not None:
            return self._order[index].astype(np.int64)
        return feistel(self._key, self.count, index)


def _sorted_draws(draw_key: int, count: int) -> np.ndarray:
    """(count,) the order of one draw per sample."""
    draws = np.empty(count, np.uint64)
    for start in range(0, count, _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, count))
        draws[rows] = bits(draw_key, rows, 1)[:, 0]
    return np.argsort(draws, kind="stable").astype(np.int32)  # of at most MAX_SORTED samples


def feistel(draw_key: int, count: int, index: np.ndarray) -> np.ndarray:
    """(...) int64, the values of a keyed permutation of 0 to count - 1 at some positions."""
    index = np.asarray(index, np.int64)
    if index.size and not (index.min() >= 0 and index.max() < count):
        raise IndexError(f"positions {index.min()} to {index.max()} of a permutation of {count} samples")
    width = max(int(count - 1).bit_length(), 2)
    low_bits = np.uint64(width // 2)
    low_mask = np.uint64((1 << (width // 2)) - 1)
    high_mask = np.uint64((1 << (width - width // 2)) - 1)
    keys = bits(draw_key, 0, _ROUNDS)[0]  # (rounds,)
    result = index.reshape(-1).astype(np.uint64)
    walking = np.arange(len(result))
    while len(walking):
        high, low = result[walking] >> low_bits, result[walking] & low_mask
        for number, round_key in enumerate(keys):
            if number % 2:
                high = high ^ (_mix(low * _ROW + round_key) & high_mask)
            else:
                low = low ^ (_mix(high * _ROW + round_key) & low_mask)
        result[walking] = (high << low_bits) | low
        walking = walking[result[walking] >= np.uint64(count)]
    return result.astype(np.int64).reshape(index.shape)


def permutation(seed: int, purpose: str, epoch: int, count: int) -> np.ndarray:
    """(count,) int64, all values of `Permutation`."""
    return Permutation(seed, purpose, epoch, count)[np.arange(count)]


def sample(seed: int, purpose: str, count: int, size: int) -> np.ndarray:
    """(min(size, count),) int64, sorted: samples drawn without repetition, the first of a permutation."""
    return np.sort(Permutation(seed, purpose, 0, count)[np.arange(min(size, count))])


def hash_fraction(seed: int, purpose: str, text: str) -> float:
    """A number in [0, 1) that depends only on `text`, such as for the split or fold of a document."""
    digest = hashlib.blake2b(f"{int(seed)}/{purpose}/{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2.0**64
