"""Ranking losses and metrics against slow references per pool, and the coverage of intervals."""

import itertools
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, kendalltau

from lib.ranking import metrics
from lib.ranking.losses import LOSSES

N, K = 40, 5


def pools(seed: int, count: int = N, width: int = K, tied_scores: bool = False):
    """Scores, rewards with many ties, and which candidates are present: at least one. Absent ones have junk values."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(count, width)) * 2
    if tied_scores:
        scores = np.round(scores)
    rewards = rng.integers(0, 4, size=(count, width)) / 3
    present = rng.random((count, width)) < 0.8
    present[np.arange(count), rng.integers(0, width, count)] = True
    present[0] = True
    rewards[:2] = 1 / 3  # pools in which all rewards tie
    scores[~present] = -np.inf
    rewards[~present] = np.where(rng.random((~present).sum()) < 0.5, np.nan, 7.0)
    return scores, rewards, present


def tensors(seed: int):
    return tuple(torch.from_numpy(a) for a in pools(seed))


def gradient(values: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(values.sum(), of)[0]


def summary(per_pool: dict[str, np.ndarray], groups: np.ndarray, seed: int) -> dict[str, Any]:
    return metrics.summarise(per_pool, groups, seed)


# ----------------------------------------------------------------------------------------- losses


def softmax(values):
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def slow_cross_entropy(s, r):
    return -math.log(sum(p for p, x in zip(softmax(s), r, strict=True) if x == max(r)))


def slow_listwise(s, r, temperature=0.25):
    target = softmax([x / temperature for x in r])
    return -sum(t * math.log(p) for t, p in zip(target, softmax(s), strict=True))


def slow_list_mle(s, r):
    total = 0.0
    for value in sorted(set(r), reverse=True):
        tied = [math.exp(x) for x, y in zip(s, r, strict=True) if y == value]
        risk = sum(math.exp(x) for x, y in zip(s, r, strict=True) if y <= value)
        likelihood = math.factorial(len(tied)) * math.prod(tied)
        for place in range(len(tied)):
            likelihood /= risk - place / len(tied) * sum(tied)
        total -= math.log(likelihood)
    return total


def slow_pairwise(s, r, margin=0.0, scale_margin=False):
    costs = []
    for i, j in itertools.permutations(range(len(s)), 2):
        if r[i] > r[j]:
            m = margin * (r[i] - r[j]) if scale_margin else margin
            costs.append(math.log1p(math.exp(m - (s[i] - s[j]))))
    return sum(costs) / max(len(costs), 1)


def slow_regression(s, r):
    return sum((1 / (1 + math.exp(-x)) - y) ** 2 for x, y in zip(s, r, strict=True)) / len(s)


def slow_binary_cross_entropy(s, r):
    chances = [1 / (1 + math.exp(-x)) for x in s]
    return -sum(y * math.log(p) + (1 - y) * math.log(1 - p) for p, y in zip(chances, r, strict=True)) / len(s)


def slow_mse(s, r):
    return sum((x - y) ** 2 for x, y in zip(s, r, strict=True)) / len(s)


def slow_margin_mse(s, r):
    pairs = list(itertools.combinations(range(len(s)), 2))
    return sum(((s[i] - s[j]) - (r[i] - r[j])) ** 2 for i, j in pairs) / max(len(pairs), 1)


def slow_bradley_terry(s, r, margin=0.0):
    return slow_pairwise(s, r, margin, scale_margin=True)


def slow_p_list_mle(s, r):
    order = sorted(range(len(s)), key=lambda i: (-r[i], -s[i]))
    weights = [2.0 ** (len(s) - rank) - 1 for rank in range(1, len(s) + 1)]
    total = sum(weights) or 1.0
    cost = 0.0
    for place, i in enumerate(order):
        rest = math.log(sum(math.exp(s[j]) for j in order[place:]))
        cost += weights[place] / total * (rest - s[i])
    return cost


def slow_lambda_loss(s, r):
    """NDCG-Loss2++ as Wang et al. (2018) define it: rho_ij + mu delta_ij, mu = 10."""
    ranks = {i: place for place, i in enumerate(sorted(range(len(s)), key=lambda i: -s[i]), 1)}
    best = sum(y / math.log2(1 + place) for place, y in enumerate(sorted(r, reverse=True), 1))

    def discount(place):
        return math.log2(1 + place)

    cost = 0.0
    for i, j in itertools.permutations(range(len(s)), 2):
        if r[i] > r[j]:
            rho = abs(1 / discount(ranks[i]) - 1 / discount(ranks[j]))
            apart = abs(ranks[i] - ranks[j])
            delta = abs(1 / discount(apart) - 1 / discount(apart + 1))
            cost += (rho + 10 * delta) * (r[i] - r[j]) / best * math.log1p(math.exp(-(s[i] - s[j])))
    return cost


CASES = [
    ("binary_cross_entropy", slow_binary_cross_entropy, {}),
    ("mse", slow_mse, {}),
    ("margin_mse", slow_margin_mse, {}),
    ("bradley_terry", slow_bradley_terry, {"margin": 0.7}),
    ("p_list_mle", slow_p_list_mle, {}),
    ("lambda_loss", slow_lambda_loss, {}),
    ("cross_entropy", slow_cross_entropy, {}),
    ("listwise", slow_listwise, {}),
    ("listwise", slow_listwise, {"temperature": 1.3}),
    ("list_mle", slow_list_mle, {}),
    ("pairwise", slow_pairwise, {}),
    ("pairwise", slow_pairwise, {"margin": 0.7}),
    ("pairwise", slow_pairwise, {"margin": 0.7, "scale_margin": True}),
    ("regression", slow_regression, {}),
]


@pytest.mark.parametrize(("name", "slow", "arguments"), CASES)
def test_a_loss_equals_the_slow_reference(name, slow, arguments):
    scores, rewards, present = pools(1)
    got = LOSSES[name](*tensors(1), **arguments)
    expected = [slow(s[p].tolist(), r[p].tolist(), **arguments) for s, r, p in zip(scores, rewards, present, strict=True)]  # fmt: skip
    assert got.shape == (N,)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("name", "slow", "arguments"), CASES)
def test_gradients_are_right_and_absent_candidates_get_none(name, slow, arguments):
    scores, rewards, present = (t[:12] for t in tensors(2))
    free = scores.masked_fill(~present, 0).requires_grad_()

    def of_free(x):
        return LOSSES[name](x.masked_fill(~present, -torch.inf), rewards, present, **arguments)

    assert torch.autograd.gradcheck(of_free, (free,))
    direct = (
        scores.clone().requires_grad_()
    )  # -inf is in the leaf itself, so no operation outside the loss hides a NaN
    pull = gradient(LOSSES[name](direct, rewards, present, **arguments), direct)
    assert torch.isfinite(pull).all() and (pull[~present] == 0).all()
    assert pull[present].abs().max() > 0.01


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_the_candidates_does_not_matter(name):
    scores, rewards, present = tensors(3)
    order = torch.argsort(torch.rand(N, K, generator=torch.Generator().manual_seed(0)), dim=1)
    mixed = [t.gather(1, order) for t in (scores, rewards, present)]
    plain, other = scores.clone().requires_grad_(), mixed[0].clone().requires_grad_()
    first, second = LOSSES[name](plain, rewards, present), LOSSES[name](other, *mixed[1:])
    torch.testing.assert_close(first, second, atol=1e-12, rtol=0)
    moved = gradient(first, plain).gather(1, order)
    torch.testing.assert_close(moved, gradient(second, other), atol=1e-12, rtol=0)


def test_pools_whose_rewards_all_tie_cost_what_the_docstrings_say():
    equal, rewards, present = torch.zeros(1, K), torch.full((1, K), 0.5), torch.ones(1, K, dtype=torch.bool)
    uneven = torch.arange(K, dtype=torch.float32)[None]
    least = {"cross_entropy": 0, "listwise": math.log(K), "list_mle": 0, "pairwise": 0, "regression": 0}
    for name, value in least.items():
        assert LOSSES[name](equal, rewards, present).item() == pytest.approx(value, abs=1e-6)
        assert torch.isfinite(LOSSES[name](uneven, rewards, present)).all()
    for name in ("cross_entropy", "pairwise"):  # these losses have no gradient here
        leaf = uneven.clone().requires_grad_()
        assert gradient(LOSSES[name](leaf, rewards, present), leaf).abs().max() < 1e-7


def test_cross_entropy_does_not_mind_which_of_the_tied_best_is_chosen():
    rewards, present = torch.tensor([[1.0, 1.0, 0.0]]), torch.ones(1, 3, dtype=torch.bool)
    sure = LOSSES["cross_entropy"](torch.tensor([[30.0, 0.0, 0.0]]), rewards, present)
    even = LOSSES["cross_entropy"](torch.tensor([[30.0, 30.0, 0.0]]), rewards, present)
    assert sure.item() < 1e-6 and even.item() < 1e-6


def exact_list_likelihood(s, r):
    """The probability of descending rewards under Plackett-Luce, summed over all such orders."""
    total = 0.0
    for order in itertools.permutations(range(len(s))):
        if all(r[a] >= r[b] for a, b in itertools.pairwise(order)):
            weights = [math.exp(s[i]) for i in order]
            total += math.prod(w / sum(weights[i:]) for i, w in enumerate(weights))
    return total


def test_list_mle_bounds_the_exact_likelihood_and_meets_it_at_equal_scores():
    scores, rewards, present = pools(4)
    losses = LOSSES["list_mle"](*tensors(4)).numpy()
    for n in range(N):
        s, r = scores[n, present[n]], rewards[n, present[n]]
        assert losses[n] >= -math.log(exact_list_likelihood(s, r)) - 1e-12
        if len(set(r)) == len(r):
            assert losses[n] == pytest.approx(-math.log(exact_list_likelihood(s, r)), abs=1e-10)
        level = np.array([s[r == x].mean() for x in r])  # tied candidates share a score
        loss = LOSSES["list_mle"](*(torch.from_numpy(x[None]) for x in (level, r, r > -1)))
        assert loss.item() == pytest.approx(-math.log(exact_list_likelihood(level, r)), abs=1e-10)


def test_huge_scores_stay_finite_in_float32():
    scores = torch.tensor([[3e4, -3e4, 1e4, -torch.inf]], requires_grad=True)
    rewards, present = torch.tensor([[0.0, 1.0, 0.5, 0.0]]), torch.tensor([[True, True, True, False]])
    for name, loss in LOSSES.items():
        value = loss(scores, rewards, present)
        assert torch.isfinite(value).all() and torch.isfinite(gradient(value, scores)).all(), name


# ----------------------------------------------------------------------------------------- metrics


def over_all_orders(score, reward, value):
    """The mean of value(rewards from first to last rank) over every order that the scores allow."""
    results = []
    for order in itertools.permutations(range(len(score))):
        if all(score[a] >= score[b] for a, b in itertools.pairwise(order)):
            results.append(value([reward[i] for i in order]))
    return np.mean(results)


def dcg(rewards):
    return sum(r / math.log2(rank + 2) for rank, r in enumerate(rewards))


@pytest.mark.parametrize("tied_scores", [False, True])
def test_metrics_equal_means_over_all_orders_that_the_scores_allow(tied_scores):
    scores, rewards, present = pools(5, tied_scores=tied_scores)
    rewards[2, present[2]] = 0.0
    got = metrics.ranking_metrics(scores, rewards, present)
    for n in range(N):
        s, r = scores[n, present[n]], rewards[n, present[n]]
        top, ideal = max(r), dcg(sorted(r, reverse=True))
        expected = {
            "accuracy": over_all_orders(s, r, lambda x, top=top: x[0] == top),
            "average_reward": over_all_orders(s, r, lambda x: x[0]),
            "mrr": over_all_orders(s, r, lambda x, top=top: 1 / (1 + x.index(top))),
            "ndcg": over_all_orders(s, r, lambda x, ideal=ideal: dcg(x) / ideal) if ideal else 1.0,
            "chance": np.mean(r == top),
            "best_reward": top,
            "mean_reward": r.mean(),
        }
        for name, value in expected.items():
            assert got[name][n] == pytest.approx(value, abs=1e-12), (name, n)


def average_precision(relevant):
    hits = [place for place, right in enumerate(relevant, 1) if right]
    return sum(number / place for number, place in enumerate(hits, 1)) / len(hits)


@pytest.mark.parametrize("tied_scores", [False, True])
def test_retrieval_metrics_are_means_over_all_orders_of_ties(tied_scores, monkeypatch):
    """With a cutoff of 2, so that it matters for pools of five."""
    monkeypatch.setattr(metrics, "CUTOFF", 2)
    scores, rewards, present = pools(8, tied_scores=tied_scores)
    got = metrics.ranking_metrics(scores, rewards, present, relevant=0.6)
    for n in range(N):
        s, r = scores[n, present[n]], rewards[n, present[n]]
        right = r >= 0.6
        if not right.any():
            assert np.isnan(got["map"][n]) and np.isnan(got["mrr_at_10"][n])
        else:
            expected = over_all_orders(s, right, average_precision)
            assert got["map"][n] == pytest.approx(expected, abs=1e-12)
            expected = over_all_orders(s, right, lambda x: 1 / (1 + x.index(True)) if True in x[:2] else 0.0)
            assert got["mrr_at_10"][n] == pytest.approx(expected, abs=1e-12)
        ideal = dcg(sorted(r, reverse=True)[:2])
        if ideal:
            expected = over_all_orders(s, r, lambda x, ideal=ideal: dcg(x[:2]) / ideal)
            assert got["ndcg_at_10"][n] == pytest.approx(expected, abs=1e-12)
        else:
            assert np.isnan(got["ndcg_at_10"][n])


def runs_for_other_tools(graded: bool):
    """Large pools without ties, and the same as qrels and run by name. Grades are whole numbers, as other tools want them."""
    rng = np.random.default_rng(9)
    scores = rng.normal(size=(60, 37))
    present = np.arange(37) < rng.integers(2, 38, 60)[:, None]
    grades = rng.integers(0, 4, scores.shape) * (rng.random(scores.shape) < 0.3)
    grades[:, 0] = 3
    grades = grades if graded else (grades >= 2).astype(int)
    qrels = {f"q{n}": {f"d{k}": int(grades[n, k]) for k in np.flatnonzero(present[n])} for n in range(60)}
    run = {f"q{n}": {f"d{k}": float(scores[n, k]) for k in np.flatnonzero(present[n])} for n in range(60)}
    return (scores, grades / (3 if graded else 1), present), qrels, run


def test_retrieval_metrics_equal_those_of_ir_measures():
    ir_measures = pytest.importorskip("ir_measures", reason="requirements-benchmarks.txt has ir-measures")
    for graded in (False, True):
        arrays, qrels, run = runs_for_other_tools(graded)
        level = 2 if graded else 1
        names = {"map": ir_measures.AP(rel=level), "mrr_at_10": ir_measures.RR(rel=level) @ 10,
                 "ndcg_at_10": ir_measures.nDCG @ 10}  # fmt: skip
        ours = metrics.ranking_metrics(*arrays, relevant=level / 3 if graded else 0.5)
        theirs = {
            (str(m.measure), m.query_id): m.value
            for m in ir_measures.iter_calc([*names.values()], qrels, run)
        }
        for name, measure in names.items():
            expected = [theirs[str(measure), f"q{n}"] for n in range(60)]
            np.testing.assert_allclose(ours[name], expected, atol=1e-9, rtol=0, err_msg=name)


def test_retrieval_metrics_equal_those_of_ranx():
    ranx = pytest.importorskip("ranx", reason="requirements-benchmarks.txt has ranx")
    arrays, qrels, run = runs_for_other_tools(graded=False)
    kept = {q: {d: g for d, g in docs.items() if g} for q, docs in qrels.items()}
    theirs = ranx.evaluate(
        ranx.Qrels(kept), ranx.Run(run), ["map", "mrr@10", "ndcg@10"], make_comparable=True
    )
    ours = metrics.ranking_metrics(*arrays)
    for name, other in (("map", "map"), ("mrr_at_10", "mrr@10"), ("ndcg_at_10", "ndcg@10")):
        assert ours[name].mean() == pytest.approx(theirs[other], abs=1e-9), name


def test_bm25_of_pools_is_that_of_the_library():
    import bm25s

    from lib.ranking.bm25 import bm25_scores

    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(40)]
    texts = np.array([[" ".join(rng.choice(words, 9)) for _ in range(4)] for _ in range(30)], object)
    present = np.arange(4) < rng.integers(1, 5, 30)[:, None]
    prompts = [" ".join(rng.choice([*words, "unheard"], 6)) for _ in range(30)]
    found = bm25_scores(prompts, texts, present)
    index: Any = bm25s.BM25(backend="numpy")
    tokenize: Any = bm25s.tokenize
    index.index(tokenize(texts[present].tolist(), stopwords=None, show_progress=False), show_progress=False)
    every = np.full(present.shape, -1)
    every[present] = np.arange(present.sum())
    for n in range(30):
        tokens = tokenize([prompts[n]], stopwords=None, show_progress=False, return_ids=False)[0]
        expected = index.get_scores([token for token in tokens if token in index.vocab_dict])
        np.testing.assert_allclose(found[n, present[n]], expected[every[n, present[n]]], rtol=1e-5)
    assert (found[~present] == 0).all() and found.std() > 0.1


def test_bm25_reads_words_of_one_character_and_gives_0_where_there_is_no_word():
    from lib.ranking.bm25 import bm25_scores

    present = np.array([[True, True, True], [True, True, False]])
    texts = np.array([["A", "B", "7"], ["B", "7", ""]], object)
    found = bm25_scores(["which one is B ?", "3 + 4 = 7 ?"], texts, present)
    assert (found > 0).tolist() == [[False, True, False], [False, True, False]]
    signs = np.array([["+", "-", "?"], ["=", "!", ""]], object)
    assert (bm25_scores(["which sign?", "+"], signs, present) == 0).all()


@pytest.mark.parametrize("tied_scores", [False, True])
def test_order_metrics(tied_scores):
    scores, rewards, present = pools(6, tied_scores=tied_scores)
    got = metrics.ranking_metrics(scores, rewards, present)
    for n in range(N):
        s, r = scores[n, present[n]], rewards[n, present[n]]
        points = [
            0.5 + 0.5 * np.sign(s[i] - s[j])
            for i, j in itertools.permutations(range(len(s)), 2)
            if r[i] > r[j]
        ]
        if not points:
            assert np.isnan(got["pairwise_accuracy"][n]) and np.isnan(got["kendall_tau"][n])
            continue
        assert got["pairwise_accuracy"][n] == pytest.approx(np.mean(points))
        tau = kendalltau(s, r).statistic if len(set(s)) > 1 else 0.0
        assert got["kendall_tau"][n] == pytest.approx(tau, abs=1e-12)


def test_metrics_of_many_pools_need_the_memory_of_some(monkeypatch):
    """Pairs of candidates are compared for some pools at a time, and the values are the same."""
    scores, rewards, present = pools(7, count=50, width=40, tied_scores=True)
    gold = present.argmax(1)
    whole = metrics.ranking_metrics(scores, rewards, present, gold)
    monkeypatch.setattr(metrics, "_MOST_PAIRS", 3 * 40**2)
    tracemalloc.start()
    parts = metrics.ranking_metrics(scores, rewards, present, gold)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert parts.keys() == whole.keys() and all((len(v) == 50) for v in parts.values())
    for name, values in whole.items():
        np.testing.assert_array_equal(parts[name], values, name)
    np.testing.assert_array_equal(metrics.winner_accuracy(scores, rewards, present), whole["accuracy"])
    assert most < 50 * 40**2 * 8  # bytes of one number for each pair of all pools


def test_gold_counts_only_the_one_candidate_and_shares_tied_scores():
    scores = np.array([[2.0, 2.0, 1.0], [0.0, 3.0, 1.0]])
    rewards = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    values = metrics.ranking_metrics(scores, rewards, np.ones((2, 3), bool), gold=np.array([0, 0]))
    assert values["accuracy"].tolist() == [1, 1]
    assert values["gold_accuracy"].tolist() == [0.5, 0]


def test_a_constant_scorer_gets_what_chance_gets():
    """The gold candidate is first in every pool, so argmax over equal scores would have accuracy 1."""
    rewards = np.tile([1.0, 0.0, 0.25, 0.0], (30, 1))
    values = metrics.ranking_metrics(np.zeros((30, 4)), rewards, np.ones((30, 4), bool))
    table = summary(values, np.arange(30), 0)
    assert values["accuracy"] == pytest.approx(0.25) and (values["kendall_tau"] == 0).all()
    assert table["normalised_reward_ratio"]["value"] == pytest.approx(0)
    assert table["accuracy"]["value"] == pytest.approx(table["chance"])


def test_pools_that_cannot_be_judged_are_refused():
    scores, present = np.zeros((2, 3)), np.ones((2, 3), bool)
    scores[1, 2] = np.nan
    with pytest.raises(ValueError, match="candidate 2 of pool 1 is nan"):
        metrics.ranking_metrics(scores, np.zeros((2, 3)), present)
    present[0] = False
    with pytest.raises(ValueError, match="pool 0 has no candidates"):
        metrics.ranking_metrics(scores, np.zeros((2, 3)), present)


# ----------------------------------------------------------------------------------------- over pools


def test_summary_against_formulas():
    scores, rewards, present = pools(7)
    per_pool = metrics.ranking_metrics(scores, rewards, present)
    table = summary(per_pool, np.arange(N) // 2, 3)
    known = np.where(present, rewards, np.nan)
    chosen = known[np.arange(N), scores.argmax(1)]
    best, mean = np.nanmax(known, 1), np.nanmean(known, 1)
    assert table["reward_ratio"]["value"] == pytest.approx(chosen.sum() / best.sum())
    assert table["normalised_reward_ratio"]["value"] == pytest.approx(
        (chosen - mean).sum() / (best - mean).sum()
    )
    assert table["mean_reward"] == pytest.approx(mean.mean())
    assert table["kendall_tau"]["value"] == pytest.approx(np.nanmean(per_pool["kendall_tau"]))
    for name in ("accuracy", "average_reward", "mrr", "ndcg", "reward_ratio", "normalised_reward_ratio"):
        entry = table[name]
        assert entry["low"] < entry["value"] < entry["high"], name
    assert table == summary(per_pool, np.arange(N) // 2, 3)
    assert table != summary(per_pool, np.arange(N) // 2, 4)


def test_what_no_pool_defines_is_left_out():
    values = metrics.ranking_metrics(np.zeros((4, 3)), np.ones((4, 3)), np.ones((4, 3), bool))
    table = summary(values, np.arange(4), 0)
    assert "kendall_tau" not in table and table["accuracy"]["value"] == 1
    assert table["normalised_reward_ratio"]["value"] == 0


def pages(rng, count: int, size: int):
    """((N,) groups, (N,) hits) of pools whose pages are easy or hard as a whole, so that hits are clustered."""
    easy = np.repeat(np.where(rng.random(count) < 0.5, 0.9, 0.3), size)
    return np.repeat(np.arange(count), size), (rng.random(count * size) < easy).astype(float)


def interval_of(hits, groups, seed):
    flat = np.full_like(hits, 0.5)
    per_pool = {"accuracy": hits, "average_reward": hits, "best_reward": flat * 2, "mean_reward": flat, "chance": flat}  # fmt: skip
    return summary(per_pool, groups, seed)["accuracy"]


@pytest.mark.slow
def test_intervals_cover_as_often_as_they_say_when_pages_are_resampled_whole():
    rng = np.random.default_rng(0)
    covered = {"pages": 0, "pools": 0}
    for trial in range(300):
        groups, hits = pages(rng, 60, 6)
        for name, unit in (("pages", groups), ("pools", np.arange(len(hits)))):
            entry = interval_of(hits, unit, trial)
            covered[name] += entry["low"] <= 0.6 <= entry["high"]
    assert 0.90 < covered["pages"] / 300 < 0.985
    assert covered["pools"] / 300 < 0.88  # intervals of independent pools are too narrow


@pytest.mark.slow
def test_a_paired_difference_is_sharper_than_two_intervals_and_covers():
    rng = np.random.default_rng(2)
    covered, widths = 0, []
    for trial in range(100):
        groups, a = pages(rng, 80, 3)
        b = np.where(rng.random(len(a)) < 0.1, 1 - a, a)  # expected difference: 0.1 * (2 * 0.6 - 1)
        entry = metrics.paired_difference(a, b, groups, trial)
        assert entry["value"] == pytest.approx(a.mean() - b.mean())
        covered += entry["low"] <= 0.02 <= entry["high"]
        alone = interval_of(a, groups, trial)
        widths.append([e["high"] - e["low"] for e in (entry, alone)])
    paired, single = np.mean(widths, 0)
    assert covered > 87 and paired < 0.6 * single
    with pytest.raises(ValueError, match="same pools"):
        metrics.paired_difference(np.ones(3), np.ones(4), np.arange(3), 0)


def test_breakdown_by_label():
    accuracy = np.array([1, 1, 1, 0, 0.5, 1.0])
    table = metrics.breakdown(accuracy, np.array(["1", "1", "2", "2", "2", "3"]))
    assert list(table) == ["1", "2", "3"]
    assert table["2"]["accuracy"] == pytest.approx(0.5) and table["2"]["count"] == 3
    assert table["3"]["low"] == pytest.approx(1 / (1 + 1.959964**2)) and table["3"]["high"] == pytest.approx(
        1
    )
    for row in table.values():  # Wilson's defining property: the ends are _Z standard errors away
        for end in (row["low"], row["high"]):
            assert (end - row["accuracy"]) ** 2 == pytest.approx(
                1.959964**2 * end * (1 - end) / row["count"], abs=1e-9
            )


def test_kinds_of_wrong_candidates():
    scores = np.array([[3.0, 1, 2, -np.inf], [1, 3.0, 3.0, 0], [0, 1, 2, 5.0], [5.0, 0, 0, 0]])
    kinds = np.array([["gold", "swap", "scale", ""], ["gold", "swap", "scale", "swap"],
                      ["gold", "swap", "swap", "scale"], ["gold", "swap", "swap", "scale"]])  # fmt: skip
    table = metrics.chosen_kinds(scores, kinds, kinds == "gold", scores > -np.inf)
    assert list(table) == ["scale", "swap"]
    assert table["scale"] == {
        "count": 4,
        "chosen": 1.5,
        "share_of_errors": pytest.approx(0.75),
        "rate": 1.5 / 4,
    }
    assert table["swap"] == {
        "count": 7,
        "chosen": 0.5,
        "share_of_errors": pytest.approx(0.25),
        "rate": 0.5 / 7,
    }


def test_winners_of_tied_scores_are_a_random_choice_among_them():
    """The best candidate is often listed first: a choice of the first one would be right by position."""
    rewards, present = (
        np.array([[1.0, 0, 0, 0.6], [1, 0, 1, 0]]),
        np.array([[True, True, True, False], [True] * 4]),
    )
    terms = {"length": np.array([[4.0, 2, 0, np.nan], [8, 0, 2, 0]])}
    found = metrics.winners(np.zeros((2, 4)), rewards, present, terms)
    for values in found.values():
        assert values["winner"] == pytest.approx(values["random"])
    per_pool = metrics.ranking_metrics(np.zeros((2, 4)), rewards, present)
    assert found["reward"]["winner"] == pytest.approx(per_pool["average_reward"].mean())
    assert found["reward"]["best"] == 1 and found["length"]["best"] == pytest.approx((4 + 5) / 2)


def test_a_ranker_that_is_right_in_every_pool_has_the_exact_interval():
    """Three of three pools say little about the next one. Kendall's tau runs from -1 to 1, so it reaches twice as far."""
    rewards = np.array([[0.0, 0.5, 1.0]] * 3)
    per_pool = metrics.ranking_metrics(rewards, rewards, np.ones((3, 3), bool), gold=np.full(3, 2))
    found = metrics.summarise(per_pool, np.arange(3), 0)
    low = binomtest(3, 3).proportion_ci(0.95, "exact").low
    for name in ("accuracy", "gold_accuracy", "ndcg", "pairwise_accuracy", "reward_ratio"):
        assert found[name] == pytest.approx({"value": 1, "low": low, "high": 1}), name
    assert found["kendall_tau"] == pytest.approx({"value": 1, "low": 2 * low - 1, "high": 1})
    lead = metrics.paired_difference(np.ones(3), np.zeros(3), np.arange(3), 0)
    assert lead == pytest.approx({"value": 1, "low": 2 * low - 1, "high": 1}) and lead["low"] < 0
