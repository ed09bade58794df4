"""Every likelihood is nats per token: the cut into windows changes nothing, padding never counts, and intervals resample
groups."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from lib import metrics
from lib.config import load_config
from lib.evaluation.best_of import CHANCE, _Pool, best_of
from lib.evaluation.text_scores import documents_of
from lib.sections.masking import DiffusionConfig
from lib.training.data import Windows
from lib.training.objectives.base import batch_losses
from lib.training.objectives.language_model import MaskedDiffusion, MaskingTokens, WindowSplits
from lib.training.objectives.next_token import NextToken
from lib.training.objectives.staged import StagedUnmasking
from tests.trainings import context

MASK, PAD, VOCABULARY = 1, 0, 12
# Nats of each token in every context; padding would cost a hundred
NATS = np.array([100.0, 50.0, *np.linspace(1.0, 4.0, VOCABULARY - 2)])


class PerToken(torch.nn.Module):
    """Each token costs NATS, in every context: logits need not be normalised for the stub's cross-entropies."""

    def forward(self, input_ids, attention_mask=None, logits_at=None, **_):
        shape = (len(logits_at),) if logits_at is not None else tuple(input_ids.shape)
        return SimpleNamespace(logits=torch.zeros(*shape, VOCABULARY))


@pytest.fixture(autouse=True)
def known_costs(monkeypatch):
    """Cross-entropies of `PerToken` are NATS of the targets."""
    from lib.training.objectives import language_model, next_token

    real = language_model.cross_entropies

    def costs(logits, targets):
        if logits.shape[1] == VOCABULARY and not logits.any():
            return torch.from_numpy(NATS).float()[targets]
        return real(logits, targets)

    for module in (language_model, next_token):
        monkeypatch.setattr(module, "cross_entropies", costs)


def text(tokens: list[int], lengths: list[int], width: int) -> Windows:
    """Documents that repeat one token each."""
    lists = [[token] * length for token, length in zip(tokens, lengths, strict=True)]
    table = pa.table(
        {
            "token_ids": pa.chunked_array([pa.array(lists, pa.list_(pa.int32()))]),
            "continues": [False] * len(lists),
        }
    )
    return Windows(table, width, PAD)


TOKENS = [2, 5, 11, 7, 3, 9, 11, 4, 6, 8, 10, 2]
LENGTHS = [40, 1, 9, 17, 64, 3, 5, 33, 2, 12, 26, 7]
PER_TOKEN = float(NATS[TOKENS] @ LENGTHS / np.sum(LENGTHS))


def objective(
    kind: Any = MaskedDiffusion, width: int = 16, tokens=TOKENS, lengths=LENGTHS, evaluated=10_000, **changes
):
    windows = text(tokens, lengths, width)
    tiles = windows.tiled()
    common = (
        context("stub", batch_size=4, evaluation_examples=evaluated),
        WindowSplits(windows, tiles, tiles, tiles.owner),
    )
    if kind is NextToken:
        return NextToken(*common, cls_id=2)
    config: DiffusionConfig = load_config(quick_test=True).diffusion.model_copy(update=changes)
    return kind(*common, config, MaskingTokens(MASK))


@pytest.mark.parametrize("kind", [MaskedDiffusion, NextToken])
@pytest.mark.parametrize("width", [1, 3, 7, 16, 64])
def test_no_likelihood_changes_when_the_same_text_is_cut_into_other_tiles(kind, width):
    made, name = objective(kind, width), "nll" if kind is NextToken else "nelbo"
    values, rows = made.report(PerToken())
    assert values[name] == pytest.approx(PER_TOKEN, rel=1e-6)
    assert made.evaluate(PerToken())[name] == pytest.approx(PER_TOKEN, rel=1e-6)
    assert values.get("train_nelbo", PER_TOKEN) == pytest.approx(PER_TOKEN, rel=1e-6)
    counts = np.bincount(TOKENS, LENGTHS, VOCABULARY)
    share = (counts + 1) / (counts[: max(TOKENS) + 1] + 1).sum()
    assert values["unigram_nll"] == pytest.approx(-(counts @ np.log(share)) / counts.sum())
    assert values["bits_per_character"] == pytest.approx(PER_TOKEN / math.log(2), rel=1e-6)
    # The interval resamples whole documents, however many windows they have
    expected = metrics.ratio(NATS[TOKENS] * LENGTHS, np.array(LENGTHS))
    assert (rows[0].value, rows[0].low, rows[0].high) == pytest.approx(tuple(expected), rel=1e-5)
    assert values[f"{name}_half_width"] == pytest.approx(expected.half_width, rel=1e-5)


def test_the_unigram_is_learned_on_train_and_measured_on_held_out_text():
    train, held_out = text([2, 3], [30, 10], 8), text([3, 4], [6, 2], 8).tiled()
    splits = WindowSplits(train, train, held_out, held_out.owner)
    made = NextToken(context("stub", batch_size=4, evaluation_examples=4), splits, cls_id=2)
    # Counts plus one of ids 0 to 4: 1, 1, 31, 11, 1
    assert made.unigram_nll() == pytest.approx(-(6 * math.log(11 / 45) + 2 * math.log(1 / 45)) / 8)


@pytest.mark.parametrize("kind", [MaskedDiffusion, NextToken])
def test_an_evaluation_takes_a_part_of_the_selection_windows_token_by_token(kind):
    made = objective(kind, 16, evaluated=9)
    assert len(made.evaluated) == 9
    ids, valid = made.splits.selection.batch(made.evaluated, np.zeros(9))
    found = made.evaluate(PerToken())["nll" if kind is NextToken else "nelbo"]
    assert found == pytest.approx(NATS[ids][valid].mean(), rel=1e-6)
    assert valid.sum(1).min() < valid.sum(1).max()


@pytest.mark.parametrize("kind", [MaskedDiffusion, NextToken, StagedUnmasking])
def test_the_training_loss_is_nats_over_all_tokens_of_the_batch(kind):
    """Rows are weighted by their number of tokens, as in the report, and padding does not count."""
    changes = {}
    if kind is StagedUnmasking:
        stage = "{type: random, max_masked_ratio: 0.6, val_loss_stale_count: 2}"
        changes["stages"] = load_config(overrides=[f"diffusion.stages=[{stage}]"]).diffusion.stages
    made = objective(kind, 16, **changes)
    for rows in (range(0, 4), range(4, 12)):
        _, ids, valid = made.windows(rows)
        found = batch_losses(made, PerToken(), 0, rows)["loss"].item()
        assert found == pytest.approx(NATS[ids][valid].mean(), rel=1e-6)
        assert found != pytest.approx(
            np.mean([NATS[i][v].mean() for i, v in zip(ids, valid, strict=True)]), rel=1e-3
        )


class ByMasks(torch.nn.Module):
    """A token 4 costs 0.3 nats and 0.5 more for every mask in its window."""

    def forward(self, input_ids, attention_mask=None, logits_at=None, **_):
        masks = (input_ids == MASK).sum(1)[logits_at // input_ids.shape[1]]
        nats = 0.3 + 0.5 * masks.double()
        rest = torch.log((1 - torch.exp(-nats)) / (VOCABULARY - 1))
        logits = rest[:, None].repeat(1, VOCABULARY)
        logits[:, 4] = -nats
        return SimpleNamespace(logits=logits)


def test_the_nelbo_is_the_sum_over_all_masks_of_windows_of_two_lengths():
    """With k of n masked, k uniform, a token costs 0.3 + 0.5 k: the mean over k, and over tokens of both lengths."""
    lengths = [2] * 900 + [5] * 300
    made = objective(MaskedDiffusion, 5, [4] * len(lengths), lengths)
    exact = {n: np.mean([0.3 + 0.5 * k for k in range(1, n + 1)]) for n in (2, 5)}
    expected = (900 * 2 * exact[2] + 300 * 5 * exact[5]) / (900 * 2 + 300 * 5)
    values, rows = made.report(ByMasks())
    assert values["nelbo"] == pytest.approx(expected, abs=0.02)
    assert abs(expected - np.mean([exact[n] for n in lengths])) > 0.1  # the mean over windows differs
    assert rows[0].low < values["nelbo"] < rows[0].high
    # Four draws per window: the spread of k = 1..n is a quarter of one draw's variance
    spread = {n: np.var([0.3 + 0.5 * k for k in range(1, n + 1)]) / 4 for n in (2, 5)}
    error = math.sqrt(900 * 4 * spread[2] + 300 * 25 * spread[5] + 1200 * np.var(np.array(lengths)[None] * (
        np.array([exact[n] for n in lengths]) - expected))) / (900 * 2 + 300 * 5)  # fmt: skip
    assert values["nelbo_half_width"] == pytest.approx(1.96 * error, rel=0.15)


def test_groups_must_be_of_the_held_out_windows():
    windows = text(TOKENS, LENGTHS, 16)
    splits = WindowSplits(windows, windows, windows.tiled(), np.arange(12))
    with pytest.raises(ValueError, match="12 groups for"):
        NextToken(context("stub"), splits, cls_id=2)


def test_a_documents_scores_are_means_over_its_tokens():
    def row(tokens: int, value: float) -> dict:
        numbers = (
            "critic_error_mean", "inspector_changed_mean", "reference_nll_mean", "judge_score", "judge_suspicion",
        )  # fmt: skip
        return {"document_id": "a", "token_ids": [5] * tokens} | dict.fromkeys(numbers, value)

    (line,) = documents_of([row(9, 1.0), row(1, 3.0)])
    assert line["tokens"] == 10 and line["reference_nll_mean"] == pytest.approx(1.2)
    assert line["critic_error_mean"] == line["judge_score"] == pytest.approx(1.2)


def test_the_best_of_n_is_measured_over_the_tokens_of_all_samples(monkeypatch):
    """Two starts, one with a single gap: its nats are few, and count by their tokens."""
    from lib.evaluation import best_of as module

    long, short = np.ones((3, 4), bool), np.zeros((2, 4), bool)
    short[:, -1] = True
    pools = iter(
        _Pool(np.zeros((2, len(c), 4), int), c, nats, {CHANCE: np.zeros((2, len(c))), "critic": -nats})
        for c, nats in (
            (long, np.array([[8.0, 6.0, 9.0], [4.0, 7.0, 5.0]])),
            (short, np.array([[3.0, 1.0], [2.0, 4.0]])),
        )
    )
    monkeypatch.setattr(module, "_generate", lambda *_: next(pools))
    monkeypatch.setattr(module, "decode_batch", lambda tokenizer, rows: ["x"] * len(rows))
    starts: Any = [SimpleNamespace(ids=np.zeros((n, 4))) for n in (3, 2)]
    rows, _ = best_of(SimpleNamespace(tokenizer=None), starts, "ancestral", 4, 2)
    found = {row["scorer"]: row for row in rows}
    assert found[CHANCE]["nll"]["value"] == pytest.approx((23 + 4) / 14)
    assert found["critic"]["nll"]["value"] == pytest.approx((15 + 3) / 14)
    assert found["critic"]["gain"]["value"] == pytest.approx((8 + 1) / 14)
