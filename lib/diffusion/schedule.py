"""How many tokens are still masked after each round of sampling.

Policies that take back share one schedule, so that only the choice of places differs; those that take nothing back write to
the end, at one temperature.
"""

import numpy as np

from lib.sections.sampler import SamplerConfig

LEAST_ROUNDS = 8  # with fewer, held rounds would leave too few for writing


def masked_shares(config: SamplerConfig, rounds: int, takes_back: bool = True) -> np.ndarray:
    """(rounds,) share of the free tokens left masked after each round; the last is 0.

    linear: evenly from start_ratio to end_ratio; cosine: cos(pi/2 x done), slow at first (Chang et al., MaskGIT,
    2022); custom: `masking_ratios`, one for each round after the first, read off between them for another number of
    rounds; threshold: the shares
    of linear, as the most that a round leaves masked.

    Of all but custom the last rounds, `corrector_share` of them, stay at one share: the text stands but for what is taken back
    and written anew (the loop of ReMDM, Wang et al. 2025), every token `corrector_resampling` times in the mean, so that many
    rounds change little at once. A policy that takes nothing back needs them for writing.
    """
    if config.schedule == "custom":
        given = np.asarray(config.masking_ratios)
        places = np.linspace(0, 1, len(given)), np.linspace(0, 1, rounds - 1)
        return np.append(np.interp(places[1], places[0], given), 0.0)
    held = held_rounds(config, rounds, takes_back)
    falling = rounds - held
    end = min(config.end_ratio, config.corrector_resampling / held) if held else config.end_ratio
    if config.schedule == "cosine":
        shares = np.cos(np.pi / 2 * np.arange(1, falling) / falling)
    else:
        shares = np.linspace(config.start_ratio, end, falling - 1)
    return np.concatenate([shares, np.full(held, end), [0.0]])


def held_rounds(config: SamplerConfig, rounds: int, takes_back: bool) -> int:
    """How many of the last rounds only correct what stands; none where all are needed for writing."""
    if not takes_back or config.schedule == "custom" or rounds < LEAST_ROUNDS:
        return 0
    return int(config.corrector_share * (rounds - 1))


def temperatures(config: SamplerConfig, rounds: int, takes_back: bool = True) -> np.ndarray:
    """(rounds,) temperature at which each round draws: what the held rounds write anew is drawn colder."""
    heats = np.full(rounds, config.temperature)
    heats[rounds - held_rounds(config, rounds, takes_back) :] *= config.corrector_temperature
    return heats


def masked_counts_left(shares: np.ndarray, free: np.ndarray) -> np.ndarray:
    """(rounds, B) tokens left masked after each round, for rows with `free[b]` tokens to write.

    At least one token is left until the last round where there is more than one, so no round is idle at its end.
    """
    counts = np.rint(shares[:, None] * free[None, :]).astype(np.int64)
    counts[:-1] = np.clip(counts[:-1], np.minimum(1, free), np.maximum(free - 1, 0))
    return counts
