"""Training objectives and their reports, tested with models whose every probability is known.

A table of probabilities stands in for a network: what a loss, an evaluation and a baseline must be can then be summed by
hand over the real tokens. Padding gets opinions so wild that one counted position would show.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from lib.config import load_config
from lib.errors import BadData
from lib.metrics import auroc_estimate
from lib.sections.masking import RandomMasking
from lib.training.data import Rows, Sequences, Splits, Windows
from lib.training.objectives.base import batch_losses, result_row
from lib.training.objectives.candidates import CandidateSplits
from lib.training.objectives.language_model import MaskedDiffusion, MaskingTokens, WindowSplits
from lib.training.objectives.next_token import NextToken
from lib.training.objectives.ranker import BestCandidate, TokenPools
from lib.training.objectives.sequence_scorer import ScoredSequences, SequenceClasses, SequenceScore
from lib.training.objectives.token_classifier import LabelledTokens, TokenClasses
from lib.training.train_model import context_of, make_objective
from tests.trainings import CPU, context

V, PAD, MASK, CLS = 14, 0, 1, 2


def lists(rows) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array([list(map(int, r)) for r in rows], pa.list_(pa.int32()))])


def documents(rows) -> pa.Table:
    """A table of examples, each a document of its own."""
    return pa.table({"token_ids": lists(rows), "continues": [False] * len(rows)})


def three_splits(train, selection, held_out, width: int, **changes) -> WindowSplits:
    """What a language objective learns from, chooses by and reports on; every held-out window is a group."""
    parts = [Windows(documents(rows), width, PAD) for rows in (train, selection, held_out)]
    tiles = parts[2].tiled()
    extra: dict[str, Any] = {"groups": np.arange(tiles.count)} | changes
    return WindowSplits(parts[0], parts[1].tiled(), tiles, **extra)


@torch.no_grad()
def evaluate(target: Any, model: nn.Module) -> dict[str, float]:
    return target.evaluate(model)


@torch.no_grad()
def report(target: Any, model: nn.Module) -> tuple[dict, list]:
    return target.report(model)


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


# --- next tokens ---------------------------------------------------------------------------------------------------------


class Bigrams(nn.Module):
    """The logits of the next token are a row of a table, chosen by the last token; after padding they are extreme."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(V, V, generator=torch.Generator().manual_seed(0)) * 2)

    def forward(self, input_ids, attention_mask=None, **_):
        table = self.table.clone()
        table[PAD] = torch.linspace(-90, 90, V)
        return SimpleNamespace(logits=table[input_ids])

    def nll(self, row) -> float:
        """Nats of a text; the first token is conditioned on [CLS]."""
        logs = log_softmax(self.table.detach().numpy().astype(np.float64))
        return -sum(logs[a, b] for a, b in zip([CLS, *row[:-1]], row, strict=True))


RAGGED = [np.random.default_rng(i).integers(4, V, size) for i, size in enumerate((12, 3, 7, 12, 1, 5))]
OTHERS = [np.random.default_rng(10 + i).integers(4, V, size) for i, size in enumerate((2, 12, 4, 9))]


def next_token(train=RAGGED, selection=OTHERS, held_out=RAGGED, label="ar", **changes) -> NextToken:
    parts = three_splits(train, selection, held_out, 12, **changes)
    return NextToken(context(label, batch_size=6, evaluation_examples=100), parts, CLS)


def test_a_causal_model_pays_for_every_token_given_those_before_it_and_for_no_padding():
    target, model = next_token(), Bigrams()
    of_selection, of_held_out = (
        sum(model.nll(r) for r in rows) / sum(map(len, rows)) for rows in (OTHERS, RAGGED)
    )
    assert abs(of_selection - of_held_out) > 0.1
    assert evaluate(target, model)["nll"] == pytest.approx(of_selection, rel=1e-5)
    values, (row,) = report(target, model)
    assert values["nll"] == pytest.approx(of_held_out, rel=1e-5)
    assert values["nll_half_width"] == pytest.approx((row.high - row.low) / 2)
    assert (
        row.value == pytest.approx(values["nll"]) and row.low < row.value < row.high and row.lower_is_better
    )
    # Every text is one window with padding behind it; all tokens of the batch have the same weight
    assert batch_losses(target, model, 0, range(6))["loss"].item() == pytest.approx(of_held_out, rel=1e-5)


def test_intervals_of_a_language_model_are_over_whole_groups():
    """Every text four times, as one group and as four."""
    copies = [row for row in RAGGED * 3 for _ in range(4)]
    together, apart = (
        report(next_token(held_out=copies, groups=g), Bigrams())[1][0]
        for g in (np.repeat(np.arange(18), 4), np.arange(72))
    )
    assert together.value == pytest.approx(apart.value)
    assert together.high - together.low > 1.5 * (apart.high - apart.low)


def test_the_id_and_the_width_of_padding_change_nothing():
    model = Bigrams()
    results = []
    for width, pad in ((12, PAD), (12, 3), (20, PAD)):
        windows = Windows(documents([r[:6] for r in RAGGED]), width, pad)
        target = next_token(train=RAGGED)
        target.splits = replace(target.splits, train=windows, selection=windows)
        target.evaluated = np.arange(windows.count)
        loss = batch_losses(target, model, 0, range(6))
        results.append((loss["loss"].item(), evaluate(target, model)["nll"]))
        gradient = torch.autograd.grad(loss["loss"], model.table)[0]
        assert gradient[PAD].abs().sum() == 0
    assert results[0] == pytest.approx(results[1]) and results[0] == pytest.approx(results[2])


# --- masked diffusion ----------------------------------------------------------------------------------------------------


class Says(nn.Module):
    """Token 5 has probability exp(-cost) at every position; the others share the rest.

    Args:
        cost: number of masks of a row -> nats of token 5.
        other: nats of token 6 in place of its share, for text of another split.
    """

    def __init__(self, cost, other: float | None = None, size: int = V):
        super().__init__()
        self.cost, self.other, self.size, self.read = cost, other, size, []

    def forward(self, input_ids, attention_mask=None, logits_at=None, **_):
        self.read.append((input_ids.numpy().copy(), attention_mask))
        masks = (input_ids == MASK).sum(1)
        nats = torch.tensor([float(self.cost(int(k))) for k in masks]).repeat_interleave(input_ids.shape[1])
        if logits_at is not None:
            nats = nats[logits_at]
        known: dict[int, Any] = {5: torch.exp(-nats)}
        if self.other is not None:
            known[6] = torch.full_like(nats, np.exp(-self.other))
        rest: Any = (1 - sum(known.values())) / (self.size - len(known))
        shares = rest[:, None].repeat(1, self.size)
        for token, share in known.items():
            shares[:, token] = share
        return SimpleNamespace(logits=shares.log())


def diffusion(train, selection, held_out, width: int = 16, **changes) -> MaskedDiffusion:
    config = load_config(quick_test=True).diffusion.model_copy(update=changes.pop("config", {}))
    parts = three_splits(train, selection, held_out, width, **changes)
    return MaskedDiffusion(
        context("md", batch_size=8, evaluation_examples=100), parts, config, MaskingTokens(MASK)
    )


FIVES, SHORT = [np.full(16, 5)] * 24, [np.full(n, 5) for n in (16, 9, 4, 1)] * 6


@pytest.mark.parametrize("text", [FIVES, SHORT], ids=["even", "ragged"])
def test_every_token_weighs_the_same_however_much_of_its_row_is_masked(text):
    """The cost depends on the number of masks k. The bound is the mean of cost(k) over rows, weighted by length."""
    target, model = diffusion(text, text, text), Says(lambda k: 0.2 + 0.1 * k)

    def by_hand() -> tuple[float, int]:
        counts = np.concatenate([(ids == MASK).sum(1) for ids, _ in model.read])
        lengths = np.concatenate([(ids != PAD).sum(1) for ids, _ in model.read])
        assert all(set(np.unique(ids)) <= {MASK, 5, PAD} for ids, _ in model.read) and len(set(counts)) > 4
        model.read.clear()
        return float(np.average(0.2 + 0.1 * counts, weights=lengths)), len(counts)

    loss = batch_losses(target, model, 0, range(8))["loss"].item()
    assert loss == pytest.approx(by_hand()[0], rel=1e-5)
    found = evaluate(target, model)
    wanted, rows = by_hand()
    assert rows == 24 and found["nelbo"] == pytest.approx(wanted, rel=1e-5)


def test_masked_accuracy_is_over_masked_tokens_only():
    """The model predicts token 5 if few tokens are masked, and another token otherwise."""
    target, model = diffusion(FIVES, FIVES, FIVES), Says(lambda k: 0.1 if k <= 8 else 4.0)
    found = evaluate(target, model)
    counts = np.concatenate([(ids == MASK).sum(1) for ids, _ in model.read])
    assert found["masked_accuracy"] == pytest.approx(counts[counts <= 8].sum() / counts.sum())
    assert 0 < found["masked_accuracy"] < 1


def test_the_bound_by_masked_share_is_that_of_windows_with_this_share():
    """Of 16 tokens, 3 are at most 20 %, 6 at most 40 %, 9 at most 60 %, 12 at most 80 %."""
    nats = {20: 0.1, 40: 0.3, 60: 0.6, 80: 1.1, 100: 2.0}
    target = diffusion(FIVES, FIVES, FIVES)
    found = report(
        target,
        Says(lambda k: next(nats[s] for s, most in zip(nats, (3, 6, 9, 12, 16), strict=True) if k <= most)),
    )[0]
    assert {share: found[f"nelbo_masked_{share}"] for share in nats} == pytest.approx(nats, rel=1e-5)


def test_padding_changes_no_loss_and_is_never_read_as_text():
    target, model = diffusion(SHORT, SHORT, SHORT), Says(lambda k: 0.7)
    for rows in (range(8), range(8, 16)):
        assert batch_losses(target, model, 0, rows)["loss"].item() == pytest.approx(0.7, rel=1e-5)
    assert evaluate(target, model)["nelbo"] == pytest.approx(0.7, rel=1e-5)
    assert report(target, model)[0]["nelbo"] == pytest.approx(0.7, rel=1e-5)
    for ids, mask in model.read:
        assert mask is not None
        np.testing.assert_array_equal(ids == PAD, ~mask.numpy())


def test_training_text_is_trained_on_selection_text_evaluated_and_held_out_text_reported():
    sixes, sevens = [np.full(16, 6)] * 12, [np.full(16, 7)] * 6
    target, model = diffusion(FIVES, sevens, sixes), Says(lambda k: 1.0, other=2.0)
    rest = -np.log((1 - np.exp(-1) - np.exp(-2)) / (V - 2))
    assert batch_losses(target, model, 0, range(8))["loss"].item() == pytest.approx(1, rel=1e-5)
    assert evaluate(target, model)["nelbo"] == pytest.approx(rest, rel=1e-5)
    assert {len(ids) for ids, _ in model.read[-1:]} == {6}
    values, rows = report(target, model)
    assert values["nelbo"] == pytest.approx(2, rel=1e-5)
    assert values["train_nelbo"] == pytest.approx(1, rel=1e-5)
    assert all(row.lower_is_better for row in rows)


def test_a_report_draws_other_masks_for_every_held_out_window_several_times():
    """Windows differ in length: each is read equally often, with other masks each time."""
    target, model = diffusion(FIVES, FIVES, [np.full(n, 5) for n in range(9, 17)]), Says(lambda k: 0.5)
    report(target, model)
    reads = [row[row != PAD] for ids, _ in model.read[: 1 if len(model.read) > 1 else None] for row in ids]
    masks: dict[int, list] = {}
    for row in reads[:32]:
        masks.setdefault(len(row), []).append(tuple(row == MASK))
    assert sorted(masks) == list(range(9, 17)) and {len(m) for m in masks.values()} == {4}
    assert sum(len(set(m)) for m in masks.values()) > 24


def test_evaluation_draws_the_bound_s_masks_whatever_training_draws():
    hard = {"min_masked_ratio": 0.6, "weight": "inverse_t", "masking": RandomMasking(type="random")}
    counts = []
    for changes in ({}, hard):
        target, model = diffusion(FIVES, FIVES, FIVES, config=changes), Says(lambda k: 0.5)
        evaluate(target, model)
        counts.append(np.concatenate([(ids == MASK).sum(1) for ids, _ in model.read]).tolist())
    assert counts[0] == counts[1] and min(counts[0]) < 8


def test_windows_of_training_begin_anywhere_in_a_text_and_every_label_has_its_own_order():
    text = np.arange(4, 400)
    target = next_token([text])
    starts = {int(row[0]) for r in range(0, 192, 6) for row in target.windows(range(r, r + 6))[1]}
    assert len(starts) > 100
    orders = [next_token(label=label)._order.samples(np.arange(6)).tolist() for label in ("a", "b", "a")]
    assert orders[0] == orders[2] and sorted(orders[0]) == sorted(orders[1]) == list(range(6))
    far = [Rows(0, label, 1000).samples(np.arange(1000)) for label in ("a", "b")]
    assert (far[0] != far[1]).mean() > 0.9


# --- constants that language models are compared with ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_the_unigram_baseline_knows_the_training_split_alone(kind):
    rng = np.random.default_rng(0)
    train, held_out = [rng.integers(4, 8, 16) for _ in range(9)], [rng.integers(6, V, 16) for _ in range(5)]
    counts = np.bincount(np.concatenate(train), minlength=V) + 1.0
    wanted = -np.log(counts / counts.sum())[np.concatenate(held_out)].mean()
    if kind == "masked":
        values, (row,) = report(diffusion(train, held_out, held_out), Says(lambda k: 1.0))
    else:
        values, (row,) = report(next_token(train, held_out, held_out), Bigrams())
    assert values["unigram_nll"] == pytest.approx(wanted) == row.baseline_value and row.baseline == "unigram"


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_bits_per_character_are_nats_per_token_by_its_characters(kind):
    if kind == "masked":
        target, model, name = (
            diffusion(FIVES, FIVES, FIVES, characters_per_token=2.5),
            Says(lambda k: 1.5),
            "nelbo",
        )
    else:
        target, model, name = next_token(characters_per_token=2.5), Bigrams(), "nll"
    values, rows = report(target, model)
    assert values["bits_per_character"] == pytest.approx(values[name] / 2.5 / np.log(2))
    nats, bits = rows
    for column in ("value", "low", "high", "baseline_value"):
        assert getattr(bits, column) == pytest.approx(getattr(nats, column) / 2.5 / np.log(2))
    plain, one = report(next_token() if kind == "causal" else diffusion(FIVES, FIVES, FIVES), model)
    assert plain["bits_per_character"] == pytest.approx(plain[name] / np.log(2)) and len(one) == 1


# --- token classifier ----------------------------------------------------------------------------------------------------

C = 3
TABLE = np.random.default_rng(1).normal(size=(V, C)) * 2


class ClassOf(nn.Module):
    """Logits depend on the token itself; at padding they are extreme and wrong."""

    def __init__(self):
        super().__init__()
        table = torch.from_numpy(TABLE).float()
        table[PAD] = torch.tensor([-90.0, 0.0, 90.0])
        self.table = nn.Parameter(table)

    def forward(self, input_ids, attention_mask=None, **_):
        return SimpleNamespace(logits=self.table[input_ids])


def classified(seed: int, count: int, shares) -> tuple[list, list]:
    """(sequences, their token classes)."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 9, count)
    return [rng.integers(4, V, n) for n in sizes], [rng.choice(C, n, p=shares) for n in sizes]


def classes_of(
    weighting: str = "none", groups=None, confidence=None, train=None, held_out=None
) -> TokenClasses:
    ids, labels = train or classified(0, 12, [0.7, 0.2, 0.1])
    other, other_labels = held_out or classified(1, 20, [0.4, 0.4, 0.2])
    pairs = ((ids, labels), classified(2, 16, [0.2, 0.3, 0.5]), (other, other_labels))
    parts = [LabelledTokens(*(Sequences(lists(rows), 8, PAD) for rows in pair)) for pair in pairs]
    train_part, selection, held_out_part = parts
    groups = np.arange(len(other)) if groups is None else groups
    splits = CandidateSplits(train_part, selection, held_out_part, groups, confidence)
    return TokenClasses(context("inspector", evaluation_examples=1000), splits, C, weighting)


@pytest.mark.parametrize("weighting", ["none", "inverse_frequency", "dynamic"])
def test_classes_weigh_as_configured_and_padding_nothing(weighting):
    ids, labels = classified(0, 12, [0.7, 0.2, 0.1])
    target, model = classes_of(weighting), ClassOf()
    which = target._order.samples(np.arange(5))
    tokens, classes = (np.concatenate([x[i] for i in which]) for x in (ids, labels))
    costs = -log_softmax(TABLE)[tokens, classes]
    of_all, of_batch = (np.bincount(c, minlength=C) / len(c) for c in (np.concatenate(labels), classes))
    weights = {"none": np.ones(C), "inverse_frequency": 1 / of_all, "dynamic": 1 / np.maximum(of_batch, 1e-9)}
    weight = weights[weighting][classes]
    loss = batch_losses(target, model, 0, range(5))["loss"]
    assert loss.item() == pytest.approx((costs * weight).sum() / weight.sum(), rel=1e-5)
    assert torch.autograd.grad(loss, model.table)[0][PAD].abs().sum() == 0
    assert len(set(np.round(of_all, 3))) == C and np.abs(of_all - of_batch).max() > 0.02


def test_a_rare_class_weighs_more_than_a_frequent_one():
    target = classes_of("inverse_frequency")
    weights = target._class_weights(np.zeros(1, int))
    assert (np.argsort(weights) == [0, 1, 2]).all()


def test_classifications_are_counted_over_real_tokens_of_selection_and_of_held_out_text():
    target, model = classes_of(), ClassOf()
    values = report(target, model)[0]
    of_selection, of_held_out = classified(2, 16, [0.2, 0.3, 0.5]), classified(1, 20, [0.4, 0.4, 0.2])
    for result, rows in ((evaluate(target, model), of_selection), (values, of_held_out)):
        ids, labels = (np.concatenate(x) for x in rows)
        predicted = TABLE[ids].argmax(1)
        assert result["cross_entropy"] == pytest.approx(-log_softmax(TABLE)[ids, labels].mean(), rel=1e-5)
        assert result["accuracy"] == pytest.approx((predicted == labels).mean())
        for c in range(C):
            hits = ((predicted == c) & (labels == c)).sum()
            assert result[f"precision_{c}"] == pytest.approx(hits / (predicted == c).sum())
            assert result[f"recall_{c}"] == pytest.approx(hits / (labels == c).sum())
    assert np.sum(values["confusion"]) == sum(map(len, of_held_out[0]))


def test_suspicion_of_changed_tokens_is_compared_with_the_generator_s_confidence():
    ids, labels = classified(1, 20, [0.4, 0.4, 0.2])
    rng = np.random.default_rng(2)
    confidence = [
        rng.normal(size=len(row)) - 2 * (row > 0) for row in labels
    ]  # low where a token was changed
    values, rows = report(classes_of(confidence=confidence), ClassOf())
    flat, changed = np.concatenate(ids), np.concatenate(labels) > 0
    chance = np.exp(log_softmax(TABLE))[flat]
    assert values["auroc_changed"] == pytest.approx(roc_auc_score(changed, 1 - chance[:, 0]))
    doubt = roc_auc_score(changed, -np.concatenate(confidence))
    assert rows[1].baseline_value == pytest.approx(doubt) and doubt > 0.8 and not rows[1].lower_is_better
    assert rows[0].lower_is_better
    groups = np.repeat(np.arange(20), [len(row) for row in labels])
    paired = auroc_estimate(1 - chance[:, 0], changed, groups, -np.concatenate(confidence))
    assert (rows[1].difference_low, rows[1].difference_high) == pytest.approx((paired.low, paired.high))
    assert rows[1].difference_low < rows[1].value - doubt < rows[1].difference_high
    assert rows[0].difference_low < rows[0].value - rows[0].baseline_value < rows[0].difference_high
    assert report(classes_of(), ClassOf())[1][1].difference_low is None  # chance is a number
    prior = np.bincount(np.concatenate(classified(0, 12, [0.7, 0.2, 0.1])[1]), minlength=C)
    constant = -np.log(prior / prior.sum())[np.concatenate(labels)].mean()
    assert values["constant_cross_entropy"] == pytest.approx(constant) == rows[0].baseline_value


def test_intervals_of_a_classifier_are_over_whole_groups():
    """Every sequence four times, as one group and as four."""
    ids, labels = classified(1, 20, [0.4, 0.4, 0.2])
    copies = [x for x in ids for _ in range(4)], [x for x in labels for _ in range(4)]
    together, apart = (
        report(classes_of(held_out=copies, groups=g), ClassOf())[1]
        for g in (np.repeat(np.arange(20), 4), np.arange(80))
    )
    for one, other in zip(together, apart, strict=True):
        assert one.value == pytest.approx(other.value)
        assert one.high - one.low > 1.5 * (other.high - other.low), one.metric


# --- sequence scorer -----------------------------------------------------------------------------------------------------


class MeanToken(nn.Module):
    """The mean of the valid tokens after [CLS], divided by V. It requires [CLS] in front."""

    def forward(self, input_ids, attention_mask=None, **_):
        assert (input_ids[:, 0] == CLS).all()
        valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        valid = valid.clone()
        valid[:, 0] = 0
        return SimpleNamespace(logits=((input_ids * valid).sum(1) / valid.sum(1))[:, None] / V)


def texts_and_means(seed: int, count: int) -> tuple[list, np.ndarray]:
    ids, _ = classified(seed, count, [1, 0, 0])
    return ids, np.array([row.mean() / V for row in ids])


def score_of(
    train_targets=None, selection_targets=None, held_out_targets=None, changed=(None,) * 3, confidence=None
) -> SequenceScore:
    parts: list = []
    given = (train_targets, selection_targets, held_out_targets)
    for seed, count, targets, fraction in zip((0, 2, 1), (12, 15, 20), given, changed, strict=True):
        ids, means = texts_and_means(seed, count)
        sequences = Sequences(lists(ids), 8, PAD)
        parts.append(ScoredSequences(sequences, means if targets is None else targets, fraction))
    train, selection, held_out = parts
    splits = CandidateSplits(train, selection, held_out, np.arange(20), confidence)
    return SequenceScore(context("judge", evaluation_examples=1000), splits, CLS)


def test_a_scorer_reads_cls_in_front_and_each_target_belongs_to_its_own_text():
    target, model = score_of(), MeanToken()
    for rows in (range(5), range(7, 12), range(10, 15)):
        assert batch_losses(target, model, 0, rows)["loss"].item() < 1e-12
    assert evaluate(target, model)["mse"] < 1e-12 and report(target, model)[0]["mse"] < 1e-12
    means = texts_and_means(0, 12)[1]
    shifted = score_of(means + 0.3, texts_and_means(2, 15)[1] + 0.2, texts_and_means(1, 20)[1] + 0.1)
    assert batch_losses(shifted, model, 0, range(5))["loss"].item() == pytest.approx(0.09, rel=1e-4)
    assert evaluate(shifted, model)["mse"] == pytest.approx(0.04, rel=1e-4)
    assert report(shifted, model)[0]["mse"] == pytest.approx(0.01, rel=1e-4)


def test_a_scorer_is_compared_with_the_mean_of_the_training_targets():
    rng = np.random.default_rng(0)
    means = texts_and_means(1, 20)[1]
    held_out = means + rng.normal(0, 0.1, 20)
    target = score_of(held_out_targets=held_out)
    values, (mse, r2) = report(target, MeanToken())
    constant = texts_and_means(0, 12)[1].mean()
    assert values["constant_mse"] == pytest.approx(((held_out - constant) ** 2).mean()) == mse.baseline_value
    constant_mse, error = mse.baseline_value, ((means - held_out) ** 2).mean()
    assert mse.value == pytest.approx(error, rel=1e-4) and mse.low < mse.value < mse.high
    # R2 is relative to the best constant, the mean of the held-out targets, not of the training ones
    assert r2.value == pytest.approx(1 - error / held_out.var(), rel=1e-4) == values["r2"]
    assert r2.low < r2.value < r2.high and mse.lower_is_better and not r2.lower_is_better
    assert r2.difference_low is None and mse.difference_low < mse.value - constant_mse < mse.difference_high
    informed = score_of(held_out_targets=held_out, confidence=[np.array([mean]) for mean in held_out])
    values, (_, r2) = report(informed, MeanToken())
    assert r2.difference_low < r2.value - values["confidence"]["r2"] < r2.difference_high


def test_intervals_of_a_scorer_are_over_whole_groups():
    rng = np.random.default_rng(0)
    ids, means = texts_and_means(1, 20)
    targets = means + rng.normal(0, 0.1, 20)
    rows = []
    for groups in (np.repeat(np.arange(20), 4), np.arange(80)):
        target = score_of()
        copies = Sequences(lists([x for x in ids for _ in range(4)]), 8, PAD)
        held_out = ScoredSequences(copies, np.repeat(targets, 4))
        target.splits = replace(target.splits, held_out=held_out, groups=groups)
        rows.append(report(target, MeanToken())[1])
    for one, other in zip(*rows, strict=True):
        assert one.value == pytest.approx(other.value) and one.high - one.low > 1.5 * (other.high - other.low)


def test_confidence_is_judged_on_other_texts_than_its_curve_was_fitted_on():
    """The confidence is noise. Fitted and measured on the same few texts, it would seem informative."""
    found = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        noise = [np.full(3, x) for x in rng.normal(size=20)]
        found.append(
            score_of(held_out_targets=rng.random(20), confidence=noise).report(MeanToken())[0]["confidence"][
                "r2"
            ]
        )
    assert np.mean(found) < 0


def test_the_oracle_s_error_is_fitted_on_training_texts_whether_reward_falls_or_rises_with_change():
    train, held_out = np.linspace(0, 1, 12), np.linspace(0, 1, 20)
    for sign in (1, -1):
        falls = [0.5 + sign * 0.4 * (x - 0.5) for x in (train, held_out)]
        values, _ = score_of(falls[0], None, falls[1], changed=(train, None, held_out)).report(MeanToken())
        assert values["irreducible_mse"] < 1e-3 and values["best_r2"] > 0.97
    other = score_of(0.5 + 0.2 * train, None, 0.1 + 0.2 * held_out, changed=(train, None, held_out))
    assert other.report(MeanToken())[0]["irreducible_mse"] == pytest.approx(0.16, rel=0.05)


class LengthClass(nn.Module):
    """Predicts the class from the length of the text (short, middle, long) with probability 0.8."""

    def forward(self, input_ids, attention_mask=None, **_):
        valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        number = ((valid.sum(1) - 1) // 3).clamp(max=2)
        logits = torch.full((len(input_ids), C), np.log(0.1)).scatter(1, number[:, None], np.log(0.8))
        return SimpleNamespace(logits=logits)


def test_classes_of_sequences_are_compared_with_the_training_shares():
    ids, chosen, other = (classified(seed, n, [1, 0, 0])[0] for seed, n in ((0, 12), (2, 15), (1, 20)))
    truth = [np.minimum(np.array([len(r) for r in rows]) // 3, 2) for rows in (ids, other)]
    selected = np.zeros(15, int)
    held_out = np.where(np.arange(20) % 4 == 0, 0, truth[1])  # some classes do not follow from the length
    pairs = ((ids, truth[0]), (chosen, selected), (other, held_out))
    parts = [ScoredSequences(Sequences(lists(rows), 8, PAD), targets) for rows, targets in pairs]
    splits = CandidateSplits(parts[0], parts[1], parts[2], np.arange(20))
    made = context("judge", evaluation_examples=1000)
    target = SequenceClasses(made, splits, CLS, num_classes=C)
    model = LengthClass()
    short = np.mean([len(r) < 3 for r in chosen])
    assert 0 < short < 0.5 and evaluate(target, model)["accuracy"] == pytest.approx(short)
    assert batch_losses(target, model, 0, range(12))["loss"].item() == pytest.approx(-np.log(0.8), rel=1e-5)
    values, (row,) = report(target, model)
    hit = truth[1] == held_out
    assert 0 < hit.mean() < 1 and values["accuracy"] == pytest.approx(hit.mean())
    costs = np.where(hit, -np.log(0.8), -np.log(0.1))
    assert values["cross_entropy"] == pytest.approx(costs.mean(), rel=1e-5) == row.value
    shares = np.bincount(truth[0], minlength=C) / 12
    assert row.baseline_value == pytest.approx(-np.log(np.maximum(shares, 1e-9))[held_out].mean())
    assert row.difference_low < row.value - row.baseline_value < row.difference_high
    hits = ((truth[1] == 0) & (held_out == 0)).sum()
    assert values["recall_0"] == pytest.approx(hits / (held_out == 0).sum())
    assert values["precision_0"] == pytest.approx(hits / (truth[1] == 0).sum())


# --- ranker without prompts ----------------------------------------------------------------------------------------------


class FirstToken(nn.Module):
    """(N, K) scores: the token after [CLS]; a high one for an empty row."""

    def forward(self, ids, valid):
        assert (ids[..., 0] == CLS).all() and valid[..., 0].all()
        return torch.where(valid[..., 1], ids[..., 1].float(), 99.0)


def token_pools(rewards: np.ndarray, rows: np.ndarray) -> TokenPools:
    return TokenPools(rows, rewards, {"half": rewards / 2}, np.arange(len(rows)))


def test_the_best_candidate_of_a_pool_is_learned_and_reported_where_there_is_one():
    sequences = Sequences(lists([[4 + i % 10, 5] for i in range(36)]), 8, PAD)
    train_rows, *others = (np.arange(12 * i, 12 * i + 12).reshape(4, 3).copy() for i in range(3))
    others[0][2, 1] = others[1][1, 2] = -1
    rng = np.random.default_rng(0)
    rewards = [np.round(rng.random((4, 3)), 2) for _ in range(3)]
    pools = [token_pools(*pair) for pair in zip(rewards, (train_rows, *others), strict=True)]
    target = BestCandidate(context("ranker", evaluation_examples=1000), sequences, Splits(*pools), cls_id=CLS)
    values, (row,) = report(target, FirstToken())
    results = (evaluate(target, FirstToken()), values)
    assert results[0]["loss"] != pytest.approx(results[1]["loss"], abs=0.01)
    for found, rows, worth in zip(results, others, rewards[1:], strict=True):
        present = rows >= 0
        scores = np.where(present, 4.0 + rows % 10, -np.inf)
        best, chosen = np.where(present, worth, -1).argmax(1), scores.argmax(1)
        np.testing.assert_allclose(target.scores(FirstToken(), rows), scores)
        assert found["loss"] == pytest.approx(-log_softmax(scores)[np.arange(4), best].mean(), rel=1e-4)
        accuracy, earned = (
            x["value"] if isinstance(x, dict) else x for x in (found["accuracy"], found["average_reward"])
        )
        assert accuracy == pytest.approx((chosen == best).mean())
        assert earned == pytest.approx(worth[np.arange(4), chosen].mean())
    assert row.value == values["accuracy"]["value"] and not row.lower_is_better
    assert row.baseline_value == pytest.approx((1 / present.sum(1)).mean()) and row.baseline == "chance"
    assert values["terms"]["half"]["winner"] == pytest.approx(earned / 2)
    which = target._order.samples(np.arange(4))
    own = -log_softmax(4.0 + train_rows % 10)[np.arange(4), rewards[0].argmax(1)]
    assert batch_losses(target, FirstToken(), 0, range(4))["loss"].item() == pytest.approx(
        own[which].mean(), rel=1e-4
    )


@pytest.mark.parametrize("informative", [True, False])
def test_a_ranker_is_compared_with_the_generator_s_mean_confidence_where_that_beats_chance(informative):
    sequences = Sequences(lists([[4 + i % 10, 5] for i in range(60)]), 8, PAD)
    rows = np.arange(60).reshape(20, 3)
    rewards = np.random.default_rng(0).permuted(np.tile([0.0, 0.5, 1.0], (20, 1)), axis=1)
    confidence = np.where(np.arange(20)[:, None] < 16, rewards, -rewards) * (1 if informative else -1)
    plain = TokenPools(rows, rewards, {}, np.arange(20))
    pools = Splits(plain, plain, replace(plain, confidence=confidence))
    target = BestCandidate(context("ranker", evaluation_examples=1000), sequences, pools, cls_id=CLS)
    values, (row,) = report(target, FirstToken())
    assert values["confidence"]["accuracy"]["value"] == pytest.approx(0.8 if informative else 0.2)
    assert row.baseline == ("mean confidence" if informative else "chance")
    assert row.baseline_value == pytest.approx(0.8 if informative else 1 / 3)
    assert row.difference_low < row.value - row.baseline_value < row.difference_high
    part = pools.held_out.subset(np.array([3]))
    assert part.confidence is not None and part.confidence.tolist() == confidence[[3]].tolist()


def test_a_row_of_no_sequence_is_empty_and_others_are_whole_or_refused():
    sequences = Sequences(lists([[4, 5], [7], [8, 9]]), 2, PAD)
    ids, valid = sequences.batch(np.array([[0, -1], [2, 1]]))
    assert ids.tolist() == [[[4, 5], [PAD, PAD]], [[8, 9], [7, PAD]]]
    assert valid.tolist() == [[[True, True], [False, False]], [[True, True], [True, False]]]
    with pytest.raises(BadData, match="sequence 1 has 3 tokens, but the model reads 2"):
        Sequences(lists([[7, 8], [4, 5, 6]]), 2, PAD)


# --- what a result claims ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lower_is_better", "baseline", "beats"),
    [(True, 1.3, True), (True, 1.1, False), (True, 0.5, False),
     (False, 0.7, True), (False, 0.9, False), (False, 1.5, False)],
)  # fmt: skip
def test_a_baseline_is_beaten_by_the_whole_interval_alone(lower_is_better, baseline, beats):
    from lib.metrics import Estimate

    row = result_row("m", "x", Estimate(1.0, 0.8, 1.2), "b", baseline, lower_is_better=lower_is_better)
    assert row.beats_baseline == beats and row.as_dict()["beats_baseline"] == beats
    assert row.as_dict()["difference_low"] is row.as_dict()["difference_high"] is None


@pytest.mark.parametrize(
    ("lower_is_better", "difference", "beats"),
    [(True, (-0.3, -0.1), True), (True, (-0.3, 0.1), False), (True, (0.1, 0.3), False),
     (False, (0.1, 0.3), True), (False, (-0.1, 0.3), False), (False, (-0.3, -0.1), False)],
)  # fmt: skip
def test_a_paired_difference_decides_whatever_the_interval_of_the_value_says(
    lower_is_better, difference, beats
):
    from lib.metrics import Estimate

    for baseline in (0.5, 1.0, 1.5):
        paired = Estimate(1.0 - baseline, *difference)
        row = result_row("m", "x", Estimate(1.0, 0.8, 1.2), "b", baseline, lower_is_better=lower_is_better)  # fmt: skip
        row = row.with_difference(paired)
        assert row.beats_baseline == beats and row.as_dict()["difference_low"] == difference[0]


# --- from tables to objectives -------------------------------------------------------------------------------------------


LETTERS = {"train": "abcdef", "selection": "dcbaji", "held_out": "ghijab"}
REWARDS = {
    "train": [0.0, 0.24, 0.26, 0.49, 0.51, 1.0],
    "selection": [0.3, 0.8, 0.6, 0.0, 0.4, 0.7],
    "held_out": [1.0, 0.5, 0.2, 0.1, 0.9, 0.3],
}


@pytest.fixture(scope="module")
def stage_inputs():
    """Three splits of candidates and examples with known numbers."""
    from lib.tokenization import encode_batch, train_tokenizer
    from lib.training.stage_inputs import StageInputs

    tokenizer = train_tokenizer("character", ["abcdefghij é"], 0)
    config = load_config(quick_test=True)

    def examples(split: str) -> pa.Table:
        texts = {"train": ["abcé"] * 4, "selection": ["abab", "cdcdcd"], "held_out": ["éé", "abéé"]}[split]
        ids = [i[::2].tolist() for i in encode_batch(tokenizer, texts)]  # as if a token were two characters
        return pa.table({
            "target": texts, "token_ids": ids, "continues": [False] * len(ids), "prompt": [""] * len(ids),
            "group": [f"{split}{i}" for i in range(len(ids))],
        })  # fmt: skip

    def candidates(split: str) -> pa.Table:
        ids = [i.tolist() for i in encode_batch(tokenizer, [x * 3 for x in LETTERS[split]])]
        return pa.table({
            "example_id": [f"{split}{i // 3}" for i in range(6)], "group": [f"{split}{i // 3}" for i in range(6)],
            "token_ids": pa.chunked_array([pa.array(ids, pa.list_(pa.int32()))]),
            "token_labels": pa.chunked_array([pa.array([[0, 1, 2]] * 6, pa.list_(pa.int8()))]),
            "token_confidence": pa.chunked_array([pa.array([[0.0, -i, -i] for i in range(6)], pa.list_(pa.float32()))]),
            "changed_fraction": [0.5, 0.1, 0.2, 0.3, 0.4, 0.6], "reward": REWARDS[split],
        })  # fmt: skip

    return StageInputs(config, tokenizer, CPU, examples, candidates)


def objective_of(stage_inputs, name: str, **changes) -> Any:
    spec = stage_inputs.config.models[name].model_copy(update=changes)
    return make_objective(context_of(name, spec, stage_inputs), spec, stage_inputs, 16)


def test_a_ranker_s_pools_hold_the_candidates_of_their_own_split(stage_inputs):
    target = objective_of(stage_inputs, "ranker")
    for split, pools in (
        ("train", target.splits.train),
        ("selection", target.evaluated),
        ("held_out", target.splits.held_out),
    ):
        ids, valid = target.sequences.batch(pools.rows)
        read = [
            stage_inputs.tokenizer.decode(row[ok])
            for row, ok in zip(ids.reshape(6, -1), valid.reshape(6, -1), strict=True)
        ]
        assert [text[0] for text in read] == list(LETTERS[split])
        assert pools.rewards.reshape(-1).tolist() == REWARDS[split]
    means = target.splits.held_out.confidence
    assert means.reshape(-1) == pytest.approx(-np.arange(6) * 2 / 3)


def test_rewards_become_equal_bands_of_classes(stage_inputs):
    target = objective_of(
        stage_inputs, "judge", mode="sequence_scorer", target_type="classification", num_classes=4
    )
    assert target.splits.train.targets.tolist() == [0, 0, 1, 1, 2, 3]
    assert target.splits.selection.targets.tolist() == [1, 3, 2, 0, 1, 2]
    assert target.splits.held_out.targets.tolist() == [3, 2, 0, 0, 3, 1]


def test_characters_are_counted_as_characters(stage_inputs):
    """Two characters a token, some of two bytes."""
    values, rows = report(
        objective_of(stage_inputs, "generator"), Says(lambda k: 1.0, size=len(stage_inputs.tokenizer))
    )
    assert values["bits_per_character"] == pytest.approx(values["nelbo"] / 2 / np.log(2)) and len(rows) == 2
