"""What samplers read and return: texts to fill, samples, and the trace of their rounds. B samples, T positions."""

from dataclasses import dataclass, field

import numpy as np

UNCHANGED, UNMASKED, REMASKED, STILL_MASKED = 0, 1, 2, 3


@dataclass(frozen=True)
class MaskedTexts:
    """Texts of one length to be filled.

    Attributes:
        ids: (B, T); what stands at free positions is not read.
        free: (B, T) bool, to be generated. The other tokens are conditioned on and stay as they are.
        rows: (B,) numbers of the samples, which key their noise.
        truth: (B, T) the original text, for the policy `oracle` alone.
    """

    ids: np.ndarray
    free: np.ndarray
    rows: np.ndarray
    truth: np.ndarray | None = None

    def __getitem__(self, index: slice) -> "MaskedTexts":
        truth = None if self.truth is None else self.truth[index]
        return MaskedTexts(self.ids[index], self.free[index], self.rows[index], truth)


@dataclass
class Round:
    """One round of a trace: the tokens after it, and what happened to each position."""

    ids: np.ndarray  # (B, T), the mask id at masked positions
    events: np.ndarray  # (B, T) UNCHANGED, UNMASKED, REMASKED or STILL_MASKED


@dataclass
class Samples:
    ids: np.ndarray  # (B, T)
    passes: np.ndarray  # (B,) forward passes of each sample
    rounds: list[Round] = field(default_factory=list)

    @property
    def nfe(self) -> float:
        """Forward passes per sample, on average."""
        return float(self.passes.mean()) if len(self.passes) else 0.0


def round_events(masked: np.ndarray, masked_after: np.ndarray, drafts_all: bool) -> np.ndarray:
    """(B, T) events. With `drafts_all`, a position that stays masked had a draft, so it was re-masked."""
    events = np.full(masked.shape, UNCHANGED, np.int8)
    events[masked & ~masked_after] = UNMASKED
    events[masked_after & ~masked] = REMASKED
    events[masked & masked_after] = REMASKED if drafts_all else STILL_MASKED
    return events


def round_of(part: Samples, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, events) after a round. Nothing changes after a part's last round."""
    if number < len(part.rounds):
        return part.rounds[number].ids, part.rounds[number].events
    return part.ids, np.full(part.ids.shape, UNCHANGED, np.int8)
