"""Ranking metrics over pools of candidates, with 95 % intervals. All inputs and outputs are arrays.

`ranking_metrics` returns values per pool; the other functions aggregate them. No value depends on the order of the
candidates. Tied scores count as the expectation of a uniform draw among them. All candidates with the best reward are
correct. Values tie when they are exactly equal.

Legend: N pools, K candidates.
"""

import numpy as np

from lib.metrics import SHARE, Estimate, ratio, sum_by

# Limits of metrics whose range is not [0, 1]
_LIMITS = {"kendall_tau": (-1.0, 1.0), "normalised_reward_ratio": (-np.inf, 1.0), "difference": (-1.0, 1.0)}
RELEVANT, CUTOFF = 0.5, 10  # reward from which a candidate is relevant; ranks of mrr_at_10 and ndcg_at_10
_Z = 1.959964  # the 97.5 % quantile of the standard normal distribution
_MOST_PAIRS = 2**22  # pairs of candidates that are compared at a time: memory does not grow with the pools
_BASELINES = ("chance", "best_reward", "mean_reward")  # they do not depend on the scores and have no interval


def ranking_metrics(
    scores: np.ndarray,
    rewards: np.ndarray,
    present: np.ndarray,
    gold: np.ndarray | None = None,
    relevant: float = RELEVANT,
) -> dict[str, np.ndarray]:
    """name -> (N,) float64, one value per pool. Without tied scores, map, mrr_at_10 and ndcg_at_10 are those of trec_eval.

    | name              | meaning                                                                             |
    |-------------------|-------------------------------------------------------------------------------------|
    | accuracy          | probability that the winner (highest score) has the best reward                     |
    | chance            | the accuracy of a random choice                                                     |
    | gold_accuracy     | probability that the winner is the candidate `gold` (N,); only if given             |
    | average_reward    | reward of the winner                                                                |
    | best_reward       | highest reward of the pool                                                          |
    | mean_reward       | mean reward of the pool: the reward of a random choice                              |
    | mrr               | 1 / rank of the first candidate with the best reward                                |
    | ndcg              | gain = reward, discount 1 / log2(1 + rank), over all K; 1 if every reward is 0      |
    | map               | average precision of the relevant candidates; NaN if there is none                  |
    | mrr_at_10         | 1 / rank of the first relevant candidate, 0 beyond rank 10; NaN if there is none    |
    | ndcg_at_10        | as ndcg, over the first 10 ranks; NaN if every reward is 0                          |
    | pairwise_accuracy | share of pairs of different reward in order; tied scores 1/2; NaN without pairs     |
    | kendall_tau       | tau-b; 0 if only the scores are constant, NaN if the rewards are                    |

    Args:
        scores: (N, K), finite where present; other values are ignored.
        rewards: (N, K) in [0, 1] where present; other values are ignored.
        present: (N, K) bool, at least one per pool.
        relevant: the reward from which a candidate is relevant.

    Raises:
        ValueError: a pool has no candidates, or a score is not finite.
    """
    _check(scores, present)
    size = max(1, _MOST_PAIRS // max(scores.shape[1], 1) ** 2)
    found = []
    for start in range(0, max(len(scores), 1), size):
        block = slice(start, start + size)
        golden = None if gold is None else np.asarray(gold)[block]
        found.append(_metrics(scores[block], rewards[block], present[block], golden, relevant))
    return {name: np.concatenate([values[name] for values in found]) for name in found[0]}


def winner_accuracy(scores: np.ndarray, rewards: np.ndarray, present: np.ndarray) -> np.ndarray:
    """(N,) the accuracy of `ranking_metrics` alone. Arguments and errors are the same."""
    _check(scores, present)
    reward = np.where(present, rewards, -np.inf)
    return (_choice(np.where(present, scores, -np.inf)) * (reward == reward.max(1, keepdims=True))).sum(1)


def _metrics(
    scores: np.ndarray, rewards: np.ndarray, present: np.ndarray, gold: np.ndarray | None, relevant: float
) -> dict[str, np.ndarray]:
    """`ranking_metrics` of some pools. Needs memory for all pairs of their candidates."""
    score = np.where(present, scores, -np.inf).astype(np.float64)
    reward = np.where(present, rewards, -np.inf)
    gain = np.where(present, rewards, 0.0).astype(np.float64)
    best = reward == reward.max(1, keepdims=True)  # (N, K)
    choice = _choice(score)
    values = {
        "accuracy": (choice * best).sum(1),
        "chance": best.sum(1) / present.sum(1),
        "average_reward": (choice * gain).sum(1),
        "best_reward": gain.max(1, where=present, initial=-np.inf),
        "mean_reward": gain.sum(1) / present.sum(1),
        "mrr": _reciprocal_rank(score, best),
        "ndcg": _ndcg(score, gain, present),
    }
    right = present & (gain >= relevant)
    some, any_gain = right.any(1), gain.max(1) > 0
    first = _reciprocal_rank(score, right, CUTOFF)
    values |= {
        "map": np.where(some, _average_precision(score, right, present), np.nan),
        "mrr_at_10": np.where(some, first, np.nan),
        "ndcg_at_10": np.where(any_gain, _ndcg(score, gain, present, CUTOFF), np.nan),
    }
    if gold is not None:
        values["gold_accuracy"] = np.take_along_axis(choice, gold[:, None], 1)[:, 0]
    return values | _order_metrics(score, gain, present)


def _check(scores: np.ndarray, present: np.ndarray) -> None:
    if not present.any(1).all():
        raise ValueError(f"pool {int(np.argmin(present.any(1)))} has no candidates")
    wrong = np.argwhere(present & ~np.isfinite(scores))
    if len(wrong):
        n, k = map(int, wrong[0])
        raise ValueError(
            f"the score of candidate {k} of pool {n} is {scores[n, k]}, expected a finite number"
        )


def _choice(score: np.ndarray) -> np.ndarray:
    """(N, K) probability of each candidate to win: tied highest scores share 1."""
    winner = score == score.max(1, keepdims=True)
    return winner / winner.sum(1, keepdims=True)


def _reciprocal_rank(score: np.ndarray, best: np.ndarray, cutoff: int | None = None) -> np.ndarray:
    """(N,) expected 1 / rank of the first candidate of `best`, 0 beyond `cutoff`. Tied scores are in random order."""
    top = np.where(best, score, -np.inf).max(1, keepdims=True)
    above, tied = (score > top).sum(1), score == top
    size, right = tied.sum(1), (tied & best).sum(1)
    value, not_found = np.zeros(len(score)), np.ones(len(score))
    for drawn in range(
        score.shape[1]
    ):  # draw from the tie without replacement until one of the best is found
        hit = not_found * np.clip(right / np.maximum(size - drawn, 1), 0, 1)
        rank = above + drawn + 1
        value += np.where(rank <= cutoff, hit / rank, 0.0) if cutoff is not None else hit / rank
        not_found = not_found - hit
    return value


def _average_precision(score: np.ndarray, right: np.ndarray, present: np.ndarray) -> np.ndarray:
    """(N,) expected average precision of the candidates `right` (N, K). Tied scores are in random order.

    A tie has n candidates, r of them right. Its position j is right with probability r / n. Then (j - 1) (r - 1) / (n - 1) right
    ones of the tie are expected before it (McSherry and Najork, 2008). 0 where no candidate is right.
    """
    order = np.argsort(-score, 1, kind="stable")
    sorted_score, hit = (np.take_along_axis(a, order, 1) for a in (score, right))
    here = np.take_along_axis(present, order, 1)
    rank = np.arange(score.shape[1])
    opens = np.ones(score.shape, bool)
    opens[:, 1:] = sorted_score[:, 1:] != sorted_score[:, :-1]
    above = np.maximum.accumulate(np.where(opens, rank, 0), 1)  # (N, K) candidates before the tie
    closes = np.roll(opens, -1, 1)
    closes[:, -1] = True
    end = np.minimum.accumulate(np.where(closes, rank + 1, score.shape[1])[:, ::-1], 1)[:, ::-1]
    sums = np.concatenate([np.zeros((len(score), 1)), np.cumsum(hit, 1)], 1)
    found = np.take_along_axis(sums, above, 1)
    size, rights = end - above, np.take_along_axis(sums, end, 1) - found
    index = rank - above  # from 0
    before = found + np.where(size > 1, index * (rights - 1) / np.maximum(size - 1, 1), 0.0)
    value = np.where(here, rights / size * (before + 1) / (rank + 1), 0.0)
    return value.sum(1) / np.maximum(right.sum(1), 1)


def _ndcg(score: np.ndarray, gain: np.ndarray, present: np.ndarray, cutoff: int | None = None) -> np.ndarray:
    """(N,) NDCG, of the first `cutoff` ranks. A tied candidate has the mean discount of the ranks of its tie (McSherry and Najork, 2008)."""
    discount = 1 / np.log2(np.arange(score.shape[1]) + 2)
    discount[cutoff:] = discount[cutoff:] * (cutoff is None)
    cumulative = np.append(0.0, np.cumsum(discount))  # (K + 1,) sums over the first ranks
    above = (score[:, None, :] > score[:, :, None]).sum(2)  # (N, K)
    size = (score[:, None, :] == score[:, :, None]).sum(2)
    expected = np.where(present, (cumulative[above + size] - cumulative[above]) / size, 0.0)
    ideal = (-np.sort(-gain, 1) * discount).sum(1)
    return np.where(ideal > 0, (gain * expected).sum(1) / np.where(ideal > 0, ideal, 1), 1.0)


def _order_metrics(score: np.ndarray, gain: np.ndarray, present: np.ndarray) -> dict[str, np.ndarray]:
    """pairwise_accuracy and kendall_tau (Kendall, 1945) from the signs of all pairs."""
    first, second = np.triu_indices(score.shape[1], 1)
    pair = present[:, first] & present[:, second]  # (N, K (K - 1) / 2)
    finite = np.where(present, score, 0.0)
    by_score = np.where(pair, np.sign(finite[:, first] - finite[:, second]), 0)
    by_reward = np.where(pair, np.sign(gain[:, first] - gain[:, second]), 0)
    agreement = (by_score * by_reward).sum(1)
    ordered, scored = np.abs(by_reward).sum(1), np.abs(by_score).sum(1)
    known = ordered > 0
    accuracy = (agreement / np.where(known, ordered, 1) + 1) / 2  # agreement is correct less wrong pairs
    tau = agreement / np.sqrt(np.maximum(ordered, 1) * np.maximum(scored, 1))
    return {
        "pairwise_accuracy": np.where(known, accuracy, np.nan),
        "kendall_tau": np.where(known, tau, np.nan),
    }


# ----------------------------------------------------------------------------------------- over pools


def summarise(
    per_pool: dict[str, np.ndarray], groups: np.ndarray, seed: int
) -> dict[str, float | dict[str, float]]:
    """Means over pools, and two ratios of sums. Intervals resample whole groups (lib/metrics.py).

    `reward_ratio` is the reward of the winners over the best reward. `normalised_reward_ratio` subtracts the reward of
    a random choice from both, so that 0 is random and 1 is best. A metric skips the pools where it is NaN. A metric
    that is NaN everywhere is missing from the result.

    Args:
        per_pool: result of `ranking_metrics`.
        groups: (N,) of any type. Pools of one group are resampled together.

    Returns:
        name -> value for chance, best_reward and mean_reward; name -> {value, low, high} for the others.
    """
    chosen, best, mean = (per_pool[k] for k in ("average_reward", "best_reward", "mean_reward"))
    ratios = {k: _mean(v) for k, v in per_pool.items() if k not in _BASELINES and not np.isnan(v).all()}
    ratios |= {
        "reward_ratio": (chosen, best),
        "normalised_reward_ratio": (chosen - mean, best - mean),
    }
    result: dict[str, float | dict[str, float]] = {
        k: e._asdict() for k, e in _intervals(ratios, groups, seed).items()
    }
    return result | {k: float(per_pool[k].mean()) for k in _BASELINES}


def paired_difference(a: np.ndarray, b: np.ndarray, groups: np.ndarray, seed: int) -> dict[str, float]:
    """{value, low, high} of mean(a) - mean(b), where a and b are (N,) accuracies on the same pools in one order."""
    if a.shape != b.shape:
        raise ValueError(f"paired values must be of the same pools, found shapes {a.shape} and {b.shape}")
    return _intervals({"difference": _mean(a - b)}, groups, seed)["difference"]._asdict()


def breakdown(accuracy: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, float]]:
    """label -> {accuracy, count, low, high}, labels sorted. Wilson's interval (1927).

    Unlike the bootstrap, it is valid for labels with few pools. It assumes that the pools of a label are independent.
    """
    names, label_index = np.unique(np.asarray(labels).astype(str), return_inverse=True)
    count = np.bincount(label_index)
    share = np.bincount(label_index, accuracy) / count
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z * np.sqrt(share * (1 - share) / count + (_Z / (2 * count)) ** 2) / (1 + _Z**2 / count)
    low, high = np.clip([middle - half, middle + half], 0, 1)
    columns = {"accuracy": share, "count": count, "low": low, "high": high}
    return {str(n): {k: column[i].item() for k, column in columns.items()} for i, n in enumerate(names)}


def chosen_kinds(
    scores: np.ndarray, kinds: np.ndarray, correct: np.ndarray, present: np.ndarray
) -> dict[str, dict[str, float]]:
    """Which kinds of wrong candidates the ranker chooses, the most frequent first.

    Args:
        kinds: (N, K) str, how each candidate was made.
        correct: (N, K) bool. Correct candidates are excluded.

    Returns:
        kind -> `count` of its candidates; `chosen`, the expected number of pools that it wins (tied scores share);
        `share_of_errors`, chosen over all wrong choices; `rate`, chosen over count.
    """
    _check(scores, present)
    wrong = present & ~correct
    names, kind_index = np.unique(np.asarray(kinds)[wrong].astype(str), return_inverse=True)
    won = _choice(np.where(present, scores, -np.inf))[wrong]
    count = np.bincount(kind_index, minlength=len(names))
    chosen = np.bincount(kind_index, won, len(names))
    order = np.argsort(-chosen, kind="stable")
    return {
        str(names[i]): {
            "count": int(count[i]),
            "chosen": float(chosen[i]),
            "share_of_errors": float(chosen[i] / max(won.sum(), 1e-12)),
            "rate": float(chosen[i] / count[i]),
        }
        for i in order
    }


def winners(
    scores: np.ndarray, rewards: np.ndarray, present: np.ndarray, terms: dict[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """Mean over pools of the reward and of each of its terms (N, K).

    Returns:
        name -> {winner, random, best}: the mean of the candidates with the highest score, of all candidates, and of the
        candidates with the highest reward. Ties count as the expectation of a uniform draw among them.
    """
    choices = {
        "winner": _choice(np.where(present, scores, -np.inf)),
        "random": present / present.sum(1, keepdims=True),
        "best": _choice(np.where(present, rewards, -np.inf)),
    }
    return {
        name: {
            who: float((choice * np.where(choice > 0, value, 0.0)).sum(1).mean())
            for who, choice in choices.items()
        }
        for name, value in ({"reward": rewards} | terms).items()
    }


def _mean(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean as a ratio: (numerators, denominators). Both are 0 where the value is NaN."""
    known = ~np.isnan(values)
    return np.where(known, values, 0.0), known.astype(np.float64)


def _intervals(
    ratios: dict[str, tuple[np.ndarray, np.ndarray]], groups: np.ndarray, seed: int
) -> dict[str, Estimate]:
    """sum(numerators) / sum(denominators) by name, with intervals. All use the same resamples of groups."""
    found = {}
    for name, pair in ratios.items():
        numerators, denominators = sum_by(groups, *pair)
        found[name] = ratio(numerators, denominators, limits=_LIMITS.get(name, SHARE), seed=seed)
    return found
