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


def permutation(seed: int, purpose: str, epoch: int, count: int) -> np.ndarray:
    """(count,) int64, a random permutation: a pure function of seed, purpose and epoch."""
    return np.argsort(bits(key(seed, purpose, epoch), np.arange(count), 1)[:, 0], kind="stable")


def hash_fraction(seed: int, purpose: str, text: str) -> float:
    """A number in [0, 1) that depends only on `text`, such as for the split or fold of a document."""
    digest = hashlib.blake2b(f"{int(seed)}/{purpose}/{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2.0**64
