"""Which tokens each policy masks, with scores that all order the tokens differently; and drawing from logits."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lib.diffusion.calibration import Calibration
from lib.diffusion.categorical import draw, probability_of
from lib.diffusion.policies import POLICIES, View, _rounded, chooser, rounds_for
from lib.diffusion.sampler import Sampler
from lib.diffusion.samples import REMASKED, MaskedTexts
from lib.diffusion.schedule import corrector_steps, masked_shares, temperatures
from lib.diffusion.top_k import lowest_k
from tests.test_sampling import CPU, MASK, NONE, SPECIAL, TRUTH, Oracle, settings

T, TARGET = 20, 4
SCORES = ("noise", "confidence", "margin", "fresh", "critic", "partial", "origin", "blend", "present")


def view_of(
    masked: np.ndarray, target: int = TARGET, is_corrector: bool = False, **changes
) -> tuple[View, dict[str, np.ndarray]]:
    """A round of one row. Each score orders the tokens differently."""
    rng = np.random.default_rng(0)
    orders = {name: rng.permutation(T)[None] / T for name in SCORES}
    orders["difference"] = orders["confidence"] - orders["present"]
    wrong = np.isin(np.arange(T), [3, 11])[None]
    arguments: dict[str, Any] = {
        "masked": masked[None], "free": np.ones((1, T), bool), "target": np.array([target]),
        "is_corrector": is_corrector,
        "noise": orders["noise"], "rounding_noise": np.array([0.5]), "confidence": orders["confidence"],
        "margin": lambda: orders["margin"], "remask_share": 0.5, "remdm_share": 0.25,
        "fresh_confidence": lambda: orders["fresh"], "critic_error": lambda: orders["critic"],
        "partial_error": lambda: orders["partial"], "partial_origin": lambda: orders["origin"],
        "present_confidence": lambda: orders["present"],
        "blend_error": lambda: orders["blend"], "wrong": lambda: wrong,
        "select": lambda scores, eligible, counts: lowest_k(-scores, eligible, counts),
    }  # fmt: skip
    return View(**arguments | changes), orders


def first(order: np.ndarray, among: np.ndarray, count: int) -> set[int]:
    """The `count` lowest of an order (1, T) among some positions."""
    return set(np.flatnonzero(lowest_k(order, among[None], np.array([count]))[0]).tolist())


ALL = np.ones(T, bool)
HALF = np.arange(T) < T // 2


@pytest.mark.parametrize(
    ("name", "score", "sign"),
    [("random_remask", "noise", -1), ("confidence_remask", "confidence", 1), ("fresh_confidence_remask", "fresh", 1),
     ("critic", "critic", -1), ("critic_blend", "blend", -1)],
)  # fmt: skip
def test_policies_on_whole_drafts_mask_the_highest_scores(name, score, sign):
    view, orders = view_of(HALF)
    assert set(np.flatnonzero(POLICIES[name].choose(view)[0])) == first(sign * orders[score], ALL, TARGET)


@pytest.mark.parametrize(
    ("name", "score"),
    [("ancestral", "noise"), ("confidence_order", "confidence"), ("margin_order", "margin")],
)
def test_policies_that_never_remask_keep_the_lowest_scores_masked(name, score):
    view, orders = view_of(HALF)
    assert set(np.flatnonzero(POLICIES[name].choose(view)[0])) == first(orders[score], HALF, TARGET)


@pytest.mark.parametrize(
    ("name", "score", "sign", "count"),
    [("remdm_rescale", "noise", -1, 1), ("remdm_conf", "confidence", 1, 1), ("critic_partial", "partial", -1, 2),
     ("critic_origin", "origin", -1, 2), ("remdm_cap", "noise", -1, 2), ("present_confidence", "present", 1, 2),
     ("temporal_difference", "difference", -1, 2)],
)  # fmt: skip
def test_some_unmasked_tokens_are_remasked_by_the_score_of_the_policy(name, score, sign, count):
    """Of 10 unmasked tokens with 4 to be masked: a share of the 4, or, capped, of the 10. The rest is random."""
    view, orders = view_of(HALF, rounding_noise=np.array([0.99]))
    chosen = set(np.flatnonzero(POLICIES[name].choose(view)[0]))
    remasked = first(sign * orders[score], ~HALF, count)
    assert chosen == remasked | first(orders["noise"], HALF, TARGET - count)
    corrector, _ = view_of(np.zeros(T, bool), is_corrector=True)
    assert set(np.flatnonzero(POLICIES[name].choose(corrector)[0])) == first(
        sign * orders[score], ALL, TARGET
    )


def test_the_oracle_masks_the_wrong_ones():
    view, _ = view_of(HALF)
    assert set(np.flatnonzero(POLICIES["oracle"].choose(view)[0])) == {3, 11}


def test_a_threshold_masks_tokens_not_below_it_up_to_the_schedule_s_count():
    view, orders = view_of(HALF, target=T)
    for limit in (0.5, 0.9):
        chosen = set(np.flatnonzero(chooser(POLICIES["critic"], limit)(view)[0]))
        assert chosen == set(np.flatnonzero(orders["critic"][0] >= limit)) and limit in orders["critic"]
    few, _ = view_of(HALF)
    assert set(np.flatnonzero(chooser(POLICIES["critic"], 0.1)(few)[0])) == first(
        -orders["critic"], ALL, TARGET
    )


def test_rounded_counts_have_the_right_mean():
    chance = (np.arange(1000) + 0.5) / 1000
    for wanted in (0.3, 2.75, 1.0):
        counts = _rounded(np.full(1000, wanted), chance)
        assert counts.mean() == pytest.approx(wanted, abs=1e-3) and set(counts) <= {
            int(wanted),
            int(wanted) + 1,
        }


def test_rounds_fit_into_the_budget():
    assert [rounds_for(POLICIES["critic"], nfe) for nfe in (1, 2, 3, 7, 8, 33)] == [1, 1, 2, 4, 4, 17]
    assert rounds_for(POLICIES["critic_partial"], 7) == 7


def test_a_custom_schedule_has_no_corrector_steps():
    own = settings(
        schedule="custom",
        masking_ratios=(0.8, 0.2),
        corrector_share=0.5,
        corrector_temperature=0.2,
        temperature=0.9,
    )
    np.testing.assert_allclose(temperatures(own, 12), 0.9)
    assert masked_shares(own, 12)[-2] == 0.2 and corrector_steps(own, 12, True) == 0


def test_partial_critics_remask_by_their_own_head():
    """A model whose two critic heads contradict each other: each policy follows its own."""

    class Two(Oracle):
        def forward(self, input_ids, attention_mask=None, logits_at=None, head="lm", conditioning_mask=None):
            output = super().forward(input_ids, attention_mask, logits_at, head, conditioning_mask)
            if head == "both":
                left = torch.arange(input_ids.shape[1]) < 20
                output.critic_logits = torch.where(left, 9.0, -9.0).expand(input_ids.shape)
                output.origin_logits = -output.critic_logits
            return output

    for name, low, high in (("critic_partial", 0, 20), ("critic_origin", 20, 40)):
        sampler = Sampler(
            Two(TRUTH), MASK, SPECIAL, CPU, settings(randomness_strength=0.0, remask_share=0.3), seed=5
        )
        rounds = sampler.sample(
            MaskedTexts(np.full((8, 40), MASK), np.ones((8, 40), bool), np.arange(8)), POLICIES[name], 12, trace=True
        ).rounds[3:]  # fmt: skip
        index = np.concatenate([np.nonzero(r.events == REMASKED)[1] for r in rounds])
        assert len(index) > 20 and ((index >= low) & (index < high)).mean() > 0.8


def test_the_blend_remasks_tokens_of_low_confidence():
    """A blend of the confidence alone, and a generator that is confident in the first half."""

    class Half(Oracle):
        def forward(self, input_ids, attention_mask=None, logits_at=None, head="lm", conditioning_mask=None):
            output = super().forward(input_ids, attention_mask, logits_at, head, conditioning_mask)
            if head == "lm":
                sharp = torch.where(torch.arange(input_ids.shape[1]) < 20, 8.0, 0.0).repeat(len(input_ids))
                output.logits = torch.zeros_like(output.logits)
                output.logits[:, 6] = sharp[logits_at]
            return output

    calibration = Calibration({}, (0.0, 1.0, 0.0))
    chosen = settings(randomness_strength=0.0)
    sampler = Sampler(Half(TRUTH), MASK, SPECIAL, CPU, chosen, seed=5, calibration=calibration)
    texts = MaskedTexts(np.full((8, 40), MASK), np.ones((8, 40), bool), np.arange(8))
    rounds = sampler.sample(texts, POLICIES["critic_blend"], 12, trace=True).rounds[:-1]
    index = np.concatenate([np.nonzero(r.events == REMASKED)[1] for r in rounds[-3:]])
    assert len(index) > 10 and (index >= 20).mean() > 0.9


def test_noise_depends_on_purpose_round_and_sample():
    sampler = Sampler(Oracle(TRUTH), MASK, SPECIAL, CPU, settings(), seed=5)
    rows = np.array([4, 9])
    plain = sampler._noise("token", 0, rows, 30)
    for other in (
        sampler._noise(purpose="take back", number=0, rows=rows, columns=30),
        sampler._noise("token", 1, rows, 30),
        sampler._noise("token", 0, rows + 1, 30),
    ):
        assert (plain != other).all()
    np.testing.assert_array_equal(sampler._noise("token", 0, rows[::-1], 30), plain[::-1])


def test_the_sampler_applies_top_p():
    class Slight(Oracle):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = torch.zeros_like(output.logits)
            output.logits[..., 7] = 0.1
            return output

    sampled = {}
    for top_p in (1.0, 0.01):
        sampler = Sampler(Slight(TRUTH), MASK, SPECIAL, CPU, settings(top_p=top_p), seed=5)
        found: Any = sampler.sample(
            MaskedTexts(np.full((4, 40), MASK), np.ones((4, 40), bool), np.arange(4)),
            POLICIES["ancestral"],
            4,
        )
        sampled[top_p] = set(found.ids.flatten().tolist())
    assert sampled[0.01] == {7} and len(sampled[1.0]) > 5


# --- drawing -----------------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]])


def drawn(**choices) -> set[int]:
    noise = torch.linspace(0, 1 - 1e-6, 5000)
    return set(draw(LOGITS.expand(5000, 5), noise, NONE, **choices)[0].tolist())


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_top_k_keeps_the_k_most_likely(k):
    assert drawn(top_k=k) == set(range(k))


def test_temperature_is_applied_before_top_p():
    """Three tokens have 0.9 of the probability; one at a low temperature, four at a high one."""
    assert drawn(top_p=0.9) == {0, 1, 2}
    assert drawn(top_p=0.9, temperature=0.3) == {0}
    assert drawn(top_p=0.9, temperature=5.0) == {0, 1, 2, 3, 4}
    assert drawn(top_p=0.75, temperature=5.0) == {0, 1, 2, 3}


def test_confidence_is_the_probability_at_temperature_1():
    plain = torch.softmax(LOGITS.index_fill(1, torch.tensor([1]), -torch.inf), -1)[0]
    kept: list[dict[str, Any]] = [{"temperature": 0.3}, {"top_k": 2}, {"top_p": 0.8, "temperature": 3.0}]
    for choices in kept:
        ids, confidence = draw(
            LOGITS.expand(50, 5), torch.linspace(0, 0.99, 50), torch.tensor([1]), **choices
        )
        torch.testing.assert_close(confidence, plain[ids])
    found = probability_of(torch.tensor([[0, 2]]), LOGITS.expand(1, 2, 5), torch.tensor([1]))
    torch.testing.assert_close(found, plain[[0, 2]][None])


def test_fresh_confidence_excludes_forbidden_tokens():
    class Level(Oracle):
        def forward(self, input_ids, **_):
            logits = torch.zeros(*input_ids.shape, 12)
            logits[..., 0] = 9.0  # a special token
            return SimpleNamespace(logits=logits)

    sampler = Sampler(Level(TRUTH), MASK, SPECIAL, CPU, settings(), seed=5)
    np.testing.assert_allclose(sampler.fresh_confidence(np.full((2, 6), 5)), 1 / 8, rtol=1e-5)
