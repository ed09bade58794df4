"""Training data and report of a critic, tested with generators and critics whose every probability is known."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from lib.config import load_config
from lib.diffusion.calibration import Calibration
from lib.training.data import Windows
from lib.training.objectives.base import batch_losses
from lib.training.objectives.error_detection import ScoredTokens, brier, detection
from lib.training.objectives.fills import Filled
from lib.training.objectives.language_model import MaskedDiffusion, MaskingTokens, WindowSplits
from lib.training.objectives.token_critic import TokenCritic
from tests.trainings import context, critic_losses

SPECIAL, MASK, COMMON, V = [0, 1, 2, 3], 1, 5, 14
GENERATOR = np.array([0.0] * 4 + [0.05, 0.6] + [0.35 / 8] * 8)  # mostly the common token


class Known(torch.nn.Module):
    """A generator with the same probabilities at every masked position, and an uninformative critic."""

    def forward(self, input_ids, attention_mask=None, logits_at=None, head="lm", conditioning_mask=None):
        blank = torch.zeros(input_ids.shape)
        if head == "critic":
            return SimpleNamespace(logits=blank, origin_logits=blank)
        shape = input_ids.shape if logits_at is None else (len(logits_at),)
        return SimpleNamespace(
            logits=torch.from_numpy(np.log(np.maximum(GENERATOR, 1e-9))).float().expand(*shape, V)
        )


FIRST = {
    "train": 6,
    "selection": 7,
    "held_out": 8,
}  # the first token of every window identifies its split


def text_of(split: str, windows: int) -> Windows:
    rng = np.random.default_rng(FIRST[split])
    rows = [[FIRST[split], *rng.choice(V, 31, p=GENERATOR).tolist()] for _ in range(windows)]
    column = pa.chunked_array([pa.array(rows, pa.list_(pa.int32()))])
    return Windows(pa.table({"token_ids": column, "continues": [False] * windows}), 40, 0).tiled()


def objective(groups=None, windows: int = 24, **changes) -> TokenCritic:
    """Text in which 60 % of the tokens are the common one, as the generator predicts; windows end in padding."""
    config = load_config(quick_test=True)
    names = np.arange(windows).astype(str) if groups is None else groups
    parts: dict[str, Any] = {split: text_of(split, windows) for split in FIRST}
    made = context("critic", batch_size=8, evaluation_examples=windows)
    diffusion = MaskedDiffusion(
        made, WindowSplits(**parts, groups=names), config.diffusion, MaskingTokens(MASK)
    )
    return TokenCritic(config.critic.model_copy(update=changes), diffusion, SPECIAL)


def filled_by(target: TokenCritic, rows: int = 8, model: Any = None) -> tuple[Filled, np.ndarray]:
    index, ids, valid = target.diffusion.windows(range(rows))
    return target.filler.fill(model or Known(), ids, valid, index, "critic", rows), index


# --- fills ---------------------------------------------------------------------------------------------------


def test_each_row_is_written_at_a_temperature_of_its_own_between_the_two():
    filled, _ = filled_by(objective(temperature=(0.02, 8.0)), 64)
    share = [
        (row[w] == COMMON).mean() for row, w in zip(filled.ids, filled.generated, strict=True) if w.sum() > 8
    ]
    assert min(share) < 0.25 < 0.9 < max(share)
    cold, _ = filled_by(objective(temperature=(0.02, 0.02)), 8)
    assert (cold.ids[cold.generated] == COMMON).all()
    even, _ = filled_by(objective(temperature=(1.0, 1.0)), 64)
    assert (even.ids[even.generated] == COMMON).mean() == pytest.approx(0.6, abs=0.07)


def test_numbers_of_passes_are_even_on_a_logarithmic_scale():
    passes = objective(rollout_passes=(1, 8)).filler.passes(np.arange(20_000), "x")
    share = np.bincount(passes, minlength=9)[1:] / 20_000
    wanted = np.log((np.arange(8) + 2) / (np.arange(8) + 1)) / np.log(9)
    np.testing.assert_allclose(share, wanted, atol=0.01)


def test_filling_leaves_a_model_in_the_mode_in_which_it_was():
    for training in (True, False):
        model = Known().train(training)
        filled_by(objective(), model=model)
        assert model.training == training


# --- what counts in training -----------------------------------------------------------------------------------------------


class Wild(torch.nn.Module):
    """Log-odds of 0 where they count and extreme ones elsewhere; keeps its inputs."""

    def __init__(self, wild: np.ndarray):
        super().__init__()
        self.wild, self.read = torch.from_numpy(wild), []

    def forward(self, input_ids, attention_mask=None, head="lm", conditioning_mask=None):
        self.read.append(input_ids.numpy())
        logits = torch.where(self.wild, 1e4, 0.0)
        return SimpleNamespace(logits=logits, origin_logits=logits)


def test_what_was_masked_again_carries_no_label_and_is_not_called_written():
    target = objective(clean_fraction=1.0)
    filled, index = filled_by(target)
    hidden = filled.generated & (np.arange(40) % 2 == 0)
    partly = filled.remask(hidden, MASK)
    assert hidden.any() and (partly.ids[hidden] == MASK).all() and not partly.generated[hidden].any()
    np.testing.assert_array_equal(partly.generated, filled.generated & ~hidden)
    np.testing.assert_array_equal(partly.ids[~hidden], filled.ids[~hidden])
    for loss in critic_losses(target, Wild(hidden), partly, index):
        assert loss.item() == pytest.approx(np.log(2), rel=1e-5)


def test_a_share_of_the_rows_is_read_with_masks():
    for share, least, most in ((0.0, 0, 0), (1.0, 50, 64), (0.5, 20, 44)):
        target = objective()
        filled, index = filled_by(target, 64)
        masked = (target.filler.remask_some(filled, index, "critic", share).ids == MASK).any(1).sum()
        assert least <= masked <= most
    whole = objective(partial_fraction=0.0, coupling="decoupled")
    reads: list[np.ndarray] = []

    class Reader(Known):
        def forward(self, input_ids, attention_mask=None, logits_at=None, head="lm", conditioning_mask=None):
            if head == "critic":
                reads.append(input_ids.numpy())
            return super().forward(input_ids, attention_mask, logits_at, head, conditioning_mask)

    batch_losses(whole, Reader(), 0, range(8))
    assert not (reads.pop() == MASK).any()
    batch_losses(objective(partial_fraction=1.0, coupling="decoupled"), Reader(), 0, range(8))
    assert (reads.pop() == MASK).any()


def test_given_tokens_count_as_often_as_asked_and_their_clean_label_is_right():
    """A critic predicts errors among conditioning tokens with high confidence. Only the configured share of them adds to the loss."""
    paid = {}
    for share in (0.0, 0.3, 1.0):
        target = objective(clean_fraction=share, origin_weight=0.0, labels="sampled")
        filled, index = filled_by(target, 8)
        given = filled.valid & ~filled.generated
        logits = np.where(given, 10.0, np.where(filled.ids != filled.clean, 40.0, -40.0))

        class Sure(torch.nn.Module):
            def forward(self, input_ids, logits=logits, **_):
                return SimpleNamespace(
                    logits=torch.from_numpy(logits), origin_logits=torch.from_numpy(logits)
                )

        loss = critic_losses(target, Sure(), filled, index)[0].item()
        paid[share] = loss / 10 * filled.generated.sum() / (1 - loss / 10) / given.sum()
    assert paid[0.0] == pytest.approx(0, abs=1e-6) and paid[1.0] == pytest.approx(1, rel=1e-3)
    assert paid[0.3] == pytest.approx(0.3, abs=0.1)


# --- evaluation --------------------------------------------------------------------------------------------------------------


def test_an_evaluation_is_of_written_tokens_against_what_stood_there():
    """Probabilities are extreme for conditioning tokens and moderate for generated ones: only the latter count."""
    target: Any = objective(coupling="decoupled")
    wrong, origin = [], []

    def raw(model, filled, conditioned):
        assert (filled.clean[:, 0] == FIRST["selection"]).all()
        differs = filled.ids != filled.clean
        if conditioned:
            wrong.append(differs[filled.generated])
        else:
            origin.append((filled.generated[filled.valid], filled.valid.sum()))
        error = np.where(filled.generated, np.where(differs, 0.6, 0.2), 0.9)
        return error, np.where(filled.valid, np.where(filled.generated, 0.7, 0.1), 0.99)

    target._probabilities = raw
    found = target.evaluate(Known())
    rate = np.concatenate(wrong).mean()
    assert found["error_rate"] == pytest.approx(rate) and 0.3 < rate < 0.9
    assert found["auroc"] == 1 and found["auroc_origin"] == 1
    assert found["critic_loss"] == pytest.approx(-(rate * np.log(0.6) + (1 - rate) * np.log(0.8)))
    assert set(found) == {"critic_loss", "auroc", "error_rate", "auroc_origin"}
    joint: Any = objective(coupling="joint")
    joint._probabilities = raw
    values = joint.evaluate(Known())
    assert values["nelbo_and_auroc"] == values["nelbo"]  # an AUROC of 1 adds nothing
    assert values["nelbo"] == joint.diffusion.evaluate(Known())["nelbo"]


def test_confidence_counts_as_certainty_of_being_right():
    """The generator's probabilities are the true ones: where its confidence is high, it is seldom wrong, in every view."""
    values, rows, _ = objective(temperature=(1.0, 1.0)).report(Known())
    found = {name: score["auroc"]["value"] for name, score in values["detection"].items()}
    for name in ("confidence", "fresh_confidence", "confidence_first_pass", "confidence_visible"):
        assert found[name] > 0.75, name
    assert found["critic"] == 0.5 and found["whole_text_fresh_confidence"] > 0.6
    assert [(r.baseline, r.baseline_value) for r in rows] == [
        ("chance", 0.5), ("confidence", found["confidence"]), ("confidence", found["confidence"]),
        ("fresh confidence", found["whole_text_fresh_confidence"]),
    ]  # fmt: skip
    assert rows[0].difference_low is None
    for row in rows[1:]:
        low, high = row.difference_low, row.difference_high
        assert low is not None and high is not None and low <= row.value - row.baseline_value <= high
    assert (rows[1].difference_high or 0) < 0  # 0.5 against a confidence that is right
    assert found["confidence"] != found["whole_text_fresh_confidence"]
    assert values["auroc"] == found["critic"] and values["auroc_confidence"] == found["confidence"]
    assert found["critic_blend"] == pytest.approx(
        found["confidence"], abs=0.02
    )  # the blend weighs the informative score


def test_calibration_is_fitted_on_the_selection_text_and_judged_on_held_out_text():
    """On one split the critic's probabilities are reversed, so a curve fitted on the other split is wrong there.

    A curve learned on the same text, or on both, would say how often each of its two numbers is wrong, or the mean.
    """
    found = {}
    for turned in ("none", "selection", "held_out"):
        target: Any = objective()

        def raw(model, filled, conditioned, turned=turned):
            error = np.where(
                (filled.ids != filled.clean) ^ (filled.clean[:, :1] == FIRST.get(turned)), 0.8, 0.2
            )
            return error, error

        target._probabilities = raw
        found[turned] = target.report(Known())[0]["detection"]
    ece = {turned: scores["critic_calibrated"]["ece"] for turned, scores in found.items()}
    assert ece["none"] < 0.01 and ece["held_out"] > 0.95
    assert (
        0.4 < ece["selection"] < 0.6
    )  # of a critic that is the wrong way round nothing but the mean is learned
    assert [found[turned]["critic"]["auroc"]["value"] for turned in ("none", "selection", "held_out")] == [
        1,
        1,
        0,
    ]


def test_intervals_are_over_groups_of_windows():
    """The same figures, with a wider interval for windows of common groups."""
    low = {}
    for count in (24, 6):
        target: Any = objective(groups=np.char.add("g", (np.arange(24) % count).astype(str)))
        low[count] = target.report(Known())[0]["detection"]["confidence"]["auroc"]
    assert low[24] != low[6]


def views_of(count: int, copies: int = 1, conditioning: int = 0, grouped: bool = True) -> ScoredTokens:
    """`count` generated and `conditioning` other tokens, `copies` times each, as one group or each by itself."""
    rng = np.random.default_rng(1)
    total = count + conditioning
    critic = rng.random(total)
    generated = np.arange(total) < count
    wrong = (rng.random(total) < critic) & generated
    columns = [np.repeat(x, copies) for x in (wrong, generated, critic)]
    group = np.repeat(np.arange(total), copies) if grouped else np.arange(total * copies)
    return ScoredTokens(columns[0], columns[1], group, *[columns[2]] * 8)


def test_copies_of_a_group_tell_nothing_new():
    found = [detection(views_of(60, 4, grouped=g), Calibration())["critic"]["auroc"] for g in (True, False)]
    widths = [f["high"] - f["low"] for f in found]
    assert widths[0] > 1.6 * widths[1] and found[0]["value"] == found[1]["value"]


def test_a_reading_without_tokens_has_no_value():
    """All generated tokens of a short text may be masked again: then the text in the middle of sampling shows none."""
    seen = views_of(6)
    hidden = replace(seen, partial=np.full(6, np.nan), partial_share=np.ones(6))
    found = detection(hidden, Calibration())
    for name in ("critic_partial", "confidence_visible"):
        assert np.isnan([found[name]["auroc"]["value"], found[name]["ece"], found[name]["brier"]]).all()
    assert np.isfinite(found["critic"]["auroc"]["value"])


def test_given_tokens_are_in_no_reading_but_that_of_a_text_of_which_nothing_is_known():
    seen = views_of(300, conditioning=200)
    for name in ("filled", "partial"):
        assert len(seen.reading(name).wrong) == 300
    assert len(seen.reading("unknown").wrong) == 500
    found = detection(seen, Calibration())
    clean = views_of(300)
    for name in ("critic", "critic_unknown", "critic_partial", "confidence_visible"):
        assert found[name]["brier"] == pytest.approx(brier(seen.critic[:300], seen.wrong[:300])), name
    assert found["whole_text_critic"]["brier"] == pytest.approx(brier(seen.critic, seen.wrong))
    assert brier(clean.critic, clean.wrong) == pytest.approx(((clean.critic - clean.wrong) ** 2).mean())


class ConditionedOnly(Known):
    """A critic that finds errors only with a conditioning mask."""

    def forward(self, input_ids, attention_mask=None, logits_at=None, head="lm", conditioning_mask=None):
        output = super().forward(input_ids, attention_mask, logits_at, head, conditioning_mask)
        if head == "critic" and conditioning_mask is not None:
            output.logits = torch.where(input_ids == COMMON, -2.0, 2.0)
            output.origin_logits = output.logits
        return output


def test_only_the_view_of_a_whole_draft_has_a_conditioning_mask():
    target = objective(temperature=(1.0, 1.0))
    found = target.report(ConditionedOnly())[0]["detection"]
    assert found["critic"]["auroc"]["value"] > 0.75
    for name in ("critic_unknown", "critic_partial", "whole_text_critic"):
        assert found[name]["auroc"]["value"] == 0.5, name
    values = target.evaluate(ConditionedOnly())
    assert values["auroc"] > 0.75 and values["auroc_origin"] == 0.5


def test_the_loss_weighs_errors_and_origin_as_configured():
    target = objective(coupling="decoupled", origin_weight=0.25)

    class Unsure(Known):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            if hasattr(output, "origin_logits"):
                output.origin_logits = output.origin_logits + 1.5
            return output

    terms = batch_losses(target, Unsure(), 0, range(8))
    assert terms["critic_loss"].item() != pytest.approx(terms["origin_loss"].item(), abs=0.05)
    wanted = terms["critic_loss"] + 0.25 * terms["origin_loss"]
    assert terms["loss"].item() == pytest.approx(wanted.item())
