"""Schedules of sampling: how many tokens are masked after each round, and the temperature of each round.

All policies that re-mask share one schedule, so they differ only in the positions that they choose. A policy that never
re-masks unmasks as many tokens in every round, as in MDLM and LLaDA, at one temperature. Tokens of one round are drawn
independently, so any other division would harm it.
"""

import numpy as np

from lib.sections.sampler import SamplerConfig

MIN_ROUNDS = 8  # with fewer rounds, corrector steps would leave too few rounds for unmasking


def masked_shares(config: SamplerConfig, rounds: int, remasks: bool = True) -> np.ndarray:
    """(rounds,) share of the free tokens that is masked after each round; the last is 0.

    - linear: evenly from `start_ratio` to `end_ratio`; their mean if only one round lies between the first mask and the end.
      Policies that never re-mask: evenly from 1 to 0.
    - cosine: cos(pi/2 x done), which unmasks slowly at first (MaskGIT, Chang et al. 2022).
    - custom: `masking_ratios`, one for each round but the last. For another number of rounds they are interpolated.
    - threshold: the shares of linear, as an upper limit.

    All but custom end with corrector steps: `corrector_share` of the rounds keep one share masked. Each step re-masks a few
    tokens and resamples them, each token `corrector_resampling` times on average (the loop of ReMDM, Wang et al. 2025).
    Policies that never re-mask have no corrector steps.
    """
    if config.schedule == "custom":
        ratios = np.asarray(config.masking_ratios)
        progress = np.linspace(0, 1, rounds - 1)
        return np.append(np.interp(progress, np.linspace(0, 1, len(ratios)), ratios), 0.0)
    if not remasks and config.schedule != "cosine":
        return 1 - np.arange(1, rounds + 1) / rounds
    steps = corrector_steps(config, rounds, remasks)
    unmasking_rounds = rounds - steps
    end = min(config.end_ratio, config.corrector_resampling / steps) if steps else config.end_ratio
    if config.schedule == "cosine":
        shares = np.cos(np.pi / 2 * np.arange(1, unmasking_rounds) / unmasking_rounds)
    elif unmasking_rounds == 2:  # `start_ratio` alone would leave nearly all tokens to one round
        shares = [(config.start_ratio + end) / 2]
    else:
        shares = np.linspace(config.start_ratio, end, unmasking_rounds - 1)
    return np.concatenate([shares, np.full(steps, end), [0.0]])


def corrector_steps(config: SamplerConfig, rounds: int, remasks: bool) -> int:
    """How many of the last rounds are corrector steps: they resample tokens and unmask nothing new."""
    if not remasks or config.schedule == "custom" or rounds < MIN_ROUNDS:
        return 0
    return int(config.corrector_share * (rounds - 1))


def temperatures(config: SamplerConfig, rounds: int, remasks: bool = True) -> np.ndarray:
    """(rounds,) sampling temperature of each round. Corrector steps have their own, usually lower, factor."""
    by_round = np.full(rounds, config.temperature)
    by_round[rounds - corrector_steps(config, rounds, remasks) :] *= config.corrector_temperature
    return by_round


def masked_counts_by_round(shares: np.ndarray, free: np.ndarray) -> np.ndarray:
    """(rounds, B) tokens that are masked after each round, for rows with `free[b]` tokens to generate.

    A row with more than one token keeps at least one masked until the last round, and unmasks at least one in the first.
    """
    counts = np.rint(shares[:, None] * free[None, :]).astype(np.int64)
    counts[:-1] = np.clip(counts[:-1], np.minimum(1, free), np.maximum(free - 1, 0))
    return counts
