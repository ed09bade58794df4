"""Random numbers that are functions of what they are for, not of what was drawn before.

Every draw in the project is `f(seed, purpose, indices)`: a word that says what the number is for, and indices
such as the step and the number of the sample. Nothing is saved or restored, so a resumed run, a run on more
processes, and a run with an extra validation pass in between all see the same numbers. The generator is
splitmix64's finaliser used as a counter-based hash (Steele, Lea and Flood, OOPSLA 2014), vectorised in numpy.

Knows nothing about tensors, tokens or training.
"""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, the increment of splitmix64
_ROW = np.uint64(0xD1B54A32D192ED03)  # an odd constant unrelated to the above, so rows and columns differ


def key(seed: int, purpose: str, *indices: int) -> int:
    """64-bit key of a draw. Stable across processes, machines and Python versions."""
    text = "/".join([str(int(seed)), purpose, *(str(int(i)) for i in indices)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(z: np.ndarray) -> np.ndarray:
    """Splitmix64's finaliser, in place on a fresh uint64 array: every input bit reaches every output bit."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def bits(draw_key: int, rows, columns: int) -> np.ndarray:
    """(R, columns) uint64. Row r depends on `rows[r]` alone: any subset of rows gives the same numbers."""
    rows = np.atleast_1d(np.asarray(rows, dtype=np.int64)).astype(np.uint64)
    base = _mix(rows * _ROW + np.uint64(draw_key & 0xFFFFFFFFFFFFFFFF))  # (R,)
    return _mix(base[:, None] + np.arange(1, columns + 1, dtype=np.uint64) * _GOLDEN)


def uniform(draw_key: int, rows, columns: int) -> np.ndarray:
    """(R, columns) float64 in [0, 1), keyed per row as `bits` is."""
    return (bits(draw_key, rows, columns) >> np.uint64(11)) * (1.0 / (1 << 53))


def permutation(seed: int, purpose: str, epoch: int, count: int) -> np.ndarray:
    """A random order of `count` things, (count,) int64: a pure function of seed, purpose and epoch."""
    return np.argsort(bits(key(seed, purpose, epoch), np.arange(count), 1)[:, 0], kind="stable")


def hash_fraction(seed: int, purpose: str, text: str) -> float:
    """A number in [0, 1) that depends on `text` only: which split or fold a document belongs to."""
    digest = hashlib.blake2b(f"{int(seed)}/{purpose}/{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2.0**64
