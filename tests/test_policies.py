"""What each policy masks again, by views of which every one would choose other tokens; and what drawing keeps."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lib.diffusion.calibration import Calibration
from lib.diffusion.categorical import draw, probability_of
from lib.diffusion.policies import POLICIES, View, _rounded, rounds_for, rule
from lib.diffusion.sampler import Sampler
from lib.diffusion.schedule import held_rounds, masked_shares, temperatures
from lib.diffusion.top_k import lowest_k
from tests.test_sampling import CPU, MASK, NONE, SPECIAL, TRUTH, Oracle, settings

T, LEFT = 20, 4
VIEWS = ("noise", "confidence", "margin", "fresh", "critic", "partial", "origin", "blend")


def view_of(
    masked: np.ndarray, left: int = LEFT, held: bool = False, **changes
) -> tuple[View, dict[str, np.ndarray]]:
    """A round of one row; every view of it is an order of its own."""
    rng = np.random.default_rng(0)
    orders = {name: rng.permutation(T)[None] / T for name in VIEWS}
    wrong = np.isin(np.arange(T), [3, 11])[None]
    arguments: dict[str, Any] = {
        "masked": masked[None], "free": np.ones((1, T), bool), "left": np.array([left]), "held": held,
        "noise": orders["noise"], "chance": np.array([0.5]), "confidence": orders["confidence"],
        "margin": lambda: orders["margin"], "remask_share": 0.5, "remdm_share": 0.25,
        "fresh_confidence": lambda: orders["fresh"], "critic_error": lambda: orders["critic"],
        "partial_error": lambda: orders["partial"], "partial_origin": lambda: orders["origin"],
        "blend_error": lambda: orders["blend"], "wrong": lambda: wrong,
        "most": lambda suspicion, where, count: lowest_k(-suspicion, where, count),
    }  # fmt: skip
    return View(**arguments | changes), orders


def first(order: np.ndarray, among: np.ndarray, count: int) -> set[int]:
    """The `count` lowest of an order (1, T) among some positions."""
    return set(np.flatnonzero(lowest_k(order, among[None], np.array([count]))[0]).tolist())


ALL = np.ones(T, bool)
HALF = np.arange(T) < T // 2


@pytest.mark.parametrize(
    ("name", "seen", "sign"),
    [("random_remask", "noise", -1), ("confidence_remask", "confidence", 1), ("fresh_confidence_remask", "fresh", 1),
     ("critic", "critic", -1), ("critic_blend", "blend", -1)],
)  # fmt: skip
def test_of_a_whole_draft_the_most_suspicious_are_masked(name, seen, sign):
    view, orders = view_of(HALF)
    assert set(np.flatnonzero(POLICIES[name].choose(view)[0])) == first(sign * orders[seen], ALL, LEFT)


@pytest.mark.parametrize(
    ("name", "seen"), [("ancestral", "noise"), ("confidence_order", "confidence"), ("margin_order", "margin")]
)
def test_what_takes_nothing_back_leaves_the_least_sure_of_the_masked(name, seen):
    view, orders = view_of(HALF)
    assert set(np.flatnonzero(POLICIES[name].choose(view)[0])) == first(orders[seen], HALF, LEFT)


@pytest.mark.parametrize(
    ("name", "seen", "sign", "count"),
    [("remdm_rescale", "noise", -1, 1), ("remdm_conf", "confidence", 1, 1), ("critic_partial", "partial", -1, 2),
     ("critic_origin", "origin", -1, 2), ("remdm_cap", "noise", -1, 2)],
)  # fmt: skip
def test_some_written_tokens_are_taken_back_by_each_ones_own_view(name, seen, sign, count):
    """Of 10 written tokens, where 4 may stay masked: a share of the 4, or, capped, of the 10; the rest by chance."""
    view, orders = view_of(HALF, chance=np.array([0.99]))
    chosen = set(np.flatnonzero(POLICIES[name].choose(view)[0]))
    back = first(sign * orders[seen], ~HALF, count)
    assert chosen == back | first(orders["noise"], HALF, LEFT - count)
    held, _ = view_of(np.zeros(T, bool), held=True)
    assert set(np.flatnonzero(POLICIES[name].choose(held)[0])) == first(sign * orders[seen], ALL, LEFT)


def test_the_oracle_masks_the_wrong_ones():
    view, _ = view_of(HALF)
    assert set(np.flatnonzero(POLICIES["oracle"].choose(view)[0])) == {3, 11}


def test_a_threshold_masks_who_is_not_below_it_and_at_most_as_many_as_the_schedule():
    view, orders = view_of(HALF, left=T)
    for limit in (0.5, 0.9):
        chosen = set(np.flatnonzero(rule(POLICIES["critic"], limit)(view)[0]))
        assert chosen == set(np.flatnonzero(orders["critic"][0] >= limit)) and limit in orders["critic"]
    few, _ = view_of(HALF)
    assert set(np.flatnonzero(rule(POLICIES["critic"], 0.1)(few)[0])) == first(-orders["critic"], ALL, LEFT)


def test_shares_of_tokens_are_kept_in_the_mean():
    chance = (np.arange(1000) + 0.5) / 1000
    for wanted in (0.3, 2.75, 1.0):
        counts = _rounded(np.full(1000, wanted), chance)
        assert counts.mean() == pytest.approx(wanted, abs=1e-3) and set(counts) <= {
            int(wanted),
            int(wanted) + 1,
        }


def test_rounds_are_as_many_as_the_budget_pays():
    assert [rounds_for(POLICIES["critic"], nfe) for nfe in (1, 2, 3, 7, 8, 33)] == [1, 1, 2, 4, 4, 17]
    assert rounds_for(POLICIES["critic_partial"], 7) == 7


def test_a_schedule_of_one_s_own_has_no_held_rounds():
    own = settings(
        schedule="custom",
        masking_ratios=(0.8, 0.2),
        corrector_share=0.5,
        corrector_temperature=0.2,
        temperature=0.9,
    )
    np.testing.assert_allclose(temperatures(own, 12), 0.9)
    assert masked_shares(own, 12)[-2] == 0.2 and held_rounds(own, 12, True) == 0


def test_takes_back_by_the_right_one_of_two_views():
    """A model whose critic doubts what its origin view does not: each policy follows its own."""

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
            np.full((8, 40), MASK), np.ones((8, 40), bool), np.arange(8), POLICIES[name], 12, trace=True
        ).rounds[3:]  # fmt: skip
        back = np.concatenate([np.nonzero(r.events == 2)[1] for r in rounds])
        assert len(back) > 20 and ((back >= low) & (back < high)).mean() > 0.8


def test_the_blend_doubts_what_was_written_without_confidence():
    """A blend that looks at confidence alone, and a generator that is sure of the first half."""

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
    whole = np.full((8, 40), MASK), np.ones((8, 40), bool), np.arange(8)
    rounds = sampler.sample(*whole, POLICIES["critic_blend"], 12, trace=True).rounds[:-1]
    back = np.concatenate([np.nonzero(r.events == 2)[1] for r in rounds[-3:]])
    assert len(back) > 10 and (back >= 20).mean() > 0.9


def test_noise_is_of_its_purpose_round_and_sample():
    sampler = Sampler(Oracle(TRUTH), MASK, SPECIAL, CPU, settings(), seed=5)
    rows = np.array([4, 9])
    plain = sampler._noise("token", 0, rows, 30)
    for other in (
        sampler._noise("take back", 0, rows, 30),
        sampler._noise("token", 1, rows, 30),
        sampler._noise("token", 0, rows + 1, 30),
    ):
        assert (plain != other).all()
    np.testing.assert_array_equal(sampler._noise("token", 0, rows[::-1], 30), plain[::-1])


def test_the_sampler_draws_from_the_likeliest_that_it_is_told_to():
    class Slight(Oracle):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = torch.zeros_like(output.logits)
            output.logits[..., 7] = 0.1
            return output

    written = {}
    for top_p in (1.0, 0.01):
        sampler = Sampler(Slight(TRUTH), MASK, SPECIAL, CPU, settings(top_p=top_p), seed=5)
        found: Any = sampler.sample(
            np.full((4, 40), MASK), np.ones((4, 40), bool), np.arange(4), POLICIES["ancestral"], 4
        )
        written[top_p] = set(found.ids.flatten().tolist())
    assert written[0.01] == {7} and len(written[1.0]) > 5


# --- drawing -----------------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]])


def drawn(**choices) -> set[int]:
    noise = torch.linspace(0, 1 - 1e-6, 5000)
    return set(draw(LOGITS.expand(5000, 5), noise, NONE, **choices)[0].tolist())


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_k_likeliest_are_kept_and_no_more(k):
    assert drawn(top_k=k) == set(range(k))


def test_temperature_comes_before_what_is_kept():
    """0.9 of the probability is held by three tokens; by the first alone in the cold, by four in the heat."""
    assert drawn(top_p=0.9) == {0, 1, 2}
    assert drawn(top_p=0.9, temperature=0.3) == {0}
    assert drawn(top_p=0.9, temperature=5.0) == {0, 1, 2, 3, 4}
    assert drawn(top_p=0.75, temperature=5.0) == {0, 1, 2, 3}


def test_certainty_is_the_plain_probability_whatever_is_drawn_from():
    plain = torch.softmax(LOGITS.index_fill(1, torch.tensor([1]), -torch.inf), -1)[0]
    kept: list[dict[str, Any]] = [{"temperature": 0.3}, {"top_k": 2}, {"top_p": 0.8, "temperature": 3.0}]
    for choices in kept:
        ids, sure = draw(LOGITS.expand(50, 5), torch.linspace(0, 0.99, 50), torch.tensor([1]), **choices)
        torch.testing.assert_close(sure, plain[ids])
    told = probability_of(torch.tensor([[0, 2]]), LOGITS.expand(1, 2, 5), torch.tensor([1]))
    torch.testing.assert_close(told, plain[[0, 2]][None])


def test_a_whole_text_s_certainty_leaves_out_what_is_never_written():
    class Level(Oracle):
        def forward(self, input_ids, **_):
            logits = torch.zeros(*input_ids.shape, 12)
            logits[..., 0] = 9.0  # a special token
            return SimpleNamespace(logits=logits)

    sampler = Sampler(Level(TRUTH), MASK, SPECIAL, CPU, settings(), seed=5)
    np.testing.assert_allclose(sampler.fresh_confidence(np.full((2, 6), 5)), 1 / 8, rtol=1e-5)
