"""Drawing tokens, schedules, policies and the sampler, on fakes whose answers are known."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lib.config import load_config
from lib.diffusion.blocks import blocks_of
from lib.diffusion.calibration import Calibration, Observed
from lib.diffusion.categorical import draw
from lib.diffusion.policies import POLICIES, rounds_for
from lib.diffusion.sampler import Sampler
from lib.diffusion.samples import REMASKED, STILL_MASKED, UNMASKED, MaskedTexts
from lib.diffusion.schedule import masked_counts_by_round, masked_shares, temperatures
from lib.errors import BadConfig
from lib.evaluation.infilling import Start
from lib.models.build import make_model, model_config
from lib.runtime import Runtime
from lib.sections.sampler import WITH_ERROR_VIEW

CPU = Runtime(torch.device("cpu"), "fp32")
MASK, SPECIAL, WORDS = 1, [0, 1, 2, 3], 12
NONE = torch.empty(0, dtype=torch.long)


def settings(**changes):
    base = load_config().sampler
    plain = {
        "corrector_share": 0.0,
        "corrector_temperature": 1.0,
        "end_ratio": 0.05,
        "remask_share": 0.3,
        "batch_size": 64,
    }
    return base.model_copy(update=plain | changes)


# ------------------------------------------------------------------------------------------- drawing


def test_draw_follows_the_distribution():
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4])
    noise = (torch.arange(100_000) + 0.5) / 100_000
    ids, sure = draw(shares.log().expand(100_000, 4), noise, NONE)
    assert torch.bincount(ids, minlength=4).div(100_000).sub(shares).abs().max() < 1e-4
    torch.testing.assert_close(sure, shares[ids])


def test_draw_never_gives_forbidden_or_impossible_tokens():
    logits = torch.full((1000, 6), 5.0)
    logits[:, 4] = -torch.inf
    noise = torch.linspace(0, 1 - 1e-7, 1000)
    ids, _ = draw(logits, noise, torch.tensor([0, 5]))
    assert set(ids.tolist()) == {1, 2, 3}


def test_top_k_top_p_and_temperature():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(5000, 4)
    noise = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    assert set(draw(logits, noise, NONE, top_k=2)[0].tolist()) == {0, 1}
    assert set(draw(logits, noise, NONE, top_p=0.6)[0].tolist()) == {0}  # the first alone holds 0.64
    assert set(draw(logits, noise, NONE, top_p=0.7)[0].tolist()) == {0, 1}
    cold = (draw(logits, noise, NONE, temperature=0.2)[0] == 0).float().mean()
    hot = (draw(logits, noise, NONE, temperature=5.0)[0] == 0).float().mean()
    assert cold > 0.98 and hot < 0.4


# ----------------------------------------------------------------------------------------- schedules


def test_schedules():
    linear = masked_shares(settings(start_ratio=0.9, end_ratio=0.1), 5)
    np.testing.assert_allclose(linear, [0.9, 0.6333, 0.3667, 0.1, 0], atol=1e-3)
    corrected = masked_shares(settings(start_ratio=0.9, end_ratio=0.1, corrector_share=0.5), 9)
    np.testing.assert_allclose(corrected, [0.9, 0.6333, 0.3667, 0.1, 0.1, 0.1, 0.1, 0.1, 0], atol=1e-3)
    few = {"start_ratio": 0.9, "end_ratio": 0.1}
    np.testing.assert_allclose(masked_shares(settings(**few), 3), [0.9, 0.1, 0])
    # Neither of two rounds draws nearly all tokens
    np.testing.assert_allclose(masked_shares(settings(**few), 2), [0.5, 0])
    np.testing.assert_allclose(masked_shares(settings(**few, schedule="threshold"), 2), [0.5, 0])
    assert masked_shares(settings(**few), 1).tolist() == [0]
    np.testing.assert_allclose(masked_shares(settings(**few, schedule="cosine"), 2), [0.5**0.5, 0])
    # Six of eight rounds are corrector steps
    corrected = masked_shares(settings(**few, corrector_share=0.9, corrector_resampling=0.6), 8)
    np.testing.assert_allclose(corrected, [0.5, *[0.1] * 6, 0])
    assert (
        masked_shares(settings(**few, corrector_share=0.5), 7).tolist()
        == masked_shares(settings(**few), 7).tolist()
    )
    assert temperatures(settings(**few, corrector_share=0.5, corrector_temperature=0.3), 7).std() == 0
    many = masked_shares(settings(end_ratio=0.1, corrector_share=0.5, corrector_resampling=1.5), 101)
    np.testing.assert_allclose(many[50:100], 1.5 / 50)  # a token is resampled 1.5 times on average
    for rounds in (
        5,
        32,
        128,
    ):  # a policy that never re-masks draws as few tokens at once as it can, and has no corrector steps
        once = masked_shares(
            settings(start_ratio=0.9, end_ratio=0.1, corrector_share=0.5), rounds, remasks=False
        )
        counts = masked_counts_by_round(once, np.array([128, 60]))
        drawn = -np.diff(counts, axis=0, prepend=[[128, 60]])
        for row, free in enumerate((128, 60)):
            assert drawn[:, row].sum() == free and drawn[:, row].max() == -(-free // rounds)
    cosine = masked_shares(settings(schedule="cosine"), 4)
    np.testing.assert_allclose(cosine, [np.cos(np.pi / 8), np.cos(np.pi / 4), np.cos(3 * np.pi / 8), 0])
    assert masked_shares(settings(schedule="custom", masking_ratios=(0.5, 0.2)), 3).tolist() == [0.5, 0.2, 0]
    own = settings(schedule="custom", masking_ratios=(0.6, 0.2))  # interpolated for any number of rounds
    np.testing.assert_allclose(masked_shares(own, 4), [0.6, 0.4, 0.2, 0])
    np.testing.assert_allclose(masked_shares(own, 2), [0.6, 0])
    assert masked_shares(own, 1).tolist() == [0]
    left = masked_counts_by_round(linear, np.array([100, 3, 0]))
    assert left[-1].tolist() == [0, 0, 0] and left[0].tolist() == [90, 2, 0] and (left[:-1, 0] >= 1).all()


def test_only_corrector_steps_are_colder():
    cold = settings(temperature=0.8, corrector_share=0.5, corrector_temperature=0.25)
    shares, by_round = masked_shares(cold, 9), temperatures(cold, 9)
    np.testing.assert_allclose(by_round, [0.8] * 5 + [0.2] * 4)
    assert shares[2] > shares[3] == shares[4] == cold.end_ratio  # round 4 still unmasks new tokens
    for other in (temperatures(cold, 9, remasks=False), temperatures(settings(temperature=0.8), 9)):
        np.testing.assert_allclose(other, 0.8)


def test_rounds_pay_for_the_extra_pass():
    assert rounds_for(POLICIES["random_remask"], 32) == 32
    assert rounds_for(POLICIES["critic"], 32) == 16  # 16 drafts and 15 judgements are 31 forward passes


# ------------------------------------------------------------------------------------------- sampler


class Oracle(nn.Module):
    """A model that predicts each masked token right with probability `skill`; its critic finds every error."""

    def __init__(self, truth: np.ndarray, skill: float = 0.5):
        super().__init__()
        self.truth, self.skill, self.passes = torch.from_numpy(truth), skill, 0
        self.conditioning: list[np.ndarray] = []  # the critic's conditioning masks

    def forward(self, input_ids, attention_mask=None, logits_at=None, head="lm", conditioning_mask=None):
        self.passes += 1
        if conditioning_mask is not None:
            self.conditioning.append(conditioning_mask.numpy())
        truth = self.truth[: input_ids.shape[1]].expand(input_ids.shape)
        error = torch.where(input_ids == truth, -9.0, 9.0)
        if head == "critic":
            return SimpleNamespace(logits=error)
        shares = torch.full((*input_ids.shape, WORDS), (1 - self.skill) / (WORDS - 5))
        shares.scatter_(-1, truth[..., None], self.skill)
        logits = shares.log().flatten(0, 1)
        logits = logits.view(*input_ids.shape, WORDS) if logits_at is None else logits[logits_at]
        views = {"critic_logits": error, "origin_logits": error} if head == "both" else {}
        return SimpleNamespace(logits=logits, **views)


TRUTH = np.random.default_rng(0).integers(4, WORDS, 40)


def oracle_sampler(**changes) -> Any:
    return Sampler(Oracle(TRUTH), MASK, SPECIAL, CPU, settings(**changes), seed=5)


def run(sampler: Sampler, name: str, nfe: int, count: int = 16, trace: bool = False, free=None):
    ids = np.full((count, 40), MASK)
    free = np.ones(ids.shape, bool) if free is None else free
    texts = MaskedTexts(ids, free, np.arange(count), np.tile(TRUTH, (count, 1)))
    return sampler.sample(texts, POLICIES[name], nfe, trace)


@pytest.mark.parametrize("name", list(POLICIES))
def test_every_pass_is_counted_and_the_budget_is_kept(name):
    for nfe in (2, 7, 8):
        sampler = oracle_sampler()
        result = run(sampler, name, nfe)
        assert result.passes.max() == sampler.model.passes <= nfe
        assert name == "oracle" or result.nfe == sampler.model.passes  # the others finish no sample early
        assert not np.isin(result.ids, SPECIAL).any()


@pytest.mark.parametrize("name", ["random_remask", "critic_origin", "ancestral"])
def test_corrector_steps_sample_at_their_temperature(name):
    """A generator that slightly prefers one word: at a low temperature it samples no other."""

    class Level(Oracle):
        def forward(self, input_ids, attention_mask=None, logits_at=None, head="lm", conditioning_mask=None):
            output = super().forward(input_ids, attention_mask, logits_at, head)
            output.logits = torch.zeros_like(output.logits)
            output.logits[:, -1] = 0.5
            return output

    changes = settings(corrector_share=0.5, corrector_temperature=0.01, end_ratio=0.2, remask_share=1.0)
    rounds = run(Sampler(Level(TRUTH), MASK, SPECIAL, CPU, changes, seed=5), name, 20, 8, trace=True).rounds

    def words(part) -> int:
        return len(set(np.concatenate([r.ids[r.events == UNMASKED] for r in part]).tolist()))

    assert words(rounds[:11]) > 5  # 9 of 20 are corrector steps, for a policy that re-masks
    assert words(rounds[11:]) == 1 or name == "ancestral"
    assert words(rounds[11:]) > 1 or name != "ancestral"


@pytest.mark.parametrize(
    "name", ["remdm_cap", "remdm_rescale", "remdm_conf", "critic_partial", "critic_origin"]
)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_corrector_steps_resample_each_token_as_often_as_asked(name, share):
    """Whatever share a policy re-masks before: a corrector step re-masks all that the schedule has masked."""
    sampler = oracle_sampler(
        corrector_share=0.5,
        corrector_resampling=1.5,
        start_ratio=0.95,
        end_ratio=0.2,
        remask_share=share,
        remdm_share=share,
    )
    steps = run(sampler, name, 21, 8, trace=True).rounds[11:]
    resampled = np.mean([(r.events == UNMASKED).sum(1) for r in steps]) * len(steps) / 40
    assert resampled == pytest.approx(1.5, abs=0.01)


def test_a_critic_that_finds_every_error_beats_random_remasking():
    sampler = oracle_sampler(randomness_strength=0.0)
    names = ("critic", "random_remask", "ancestral")
    right = {name: (run(sampler, name, 15, 64).ids == TRUTH).mean() for name in names}
    assert right["critic"] > right["random_remask"] + 0.2
    assert right["critic"] > right["ancestral"] + 0.2
    assert abs(right["ancestral"] - 0.5) < 0.05  # without re-masking, the accuracy is the model's skill


def test_policies_rank_by_what_they_know_of_errors():
    """The more a policy knows of the truth, the more tokens are right; critic_partial needs no extra forward passes."""
    sampler = oracle_sampler(randomness_strength=0.0, remask_share=1.0, remdm_share=1.0)
    names = ("oracle", "critic", "critic_partial", "critic_origin", "remdm_rescale", "ancestral")
    right = {name: (run(sampler, name, 15, 64).ids == TRUTH).mean() for name in names}
    assert right["oracle"] >= right["critic"] - 0.02  # twice as many rounds
    assert right["critic_partial"] > right["remdm_rescale"] + 0.1
    assert right["critic_origin"] == right["critic_partial"]  # here both see every error
    assert abs(right["remdm_rescale"] - right["ancestral"]) < 0.06  # random re-masking corrects nothing here


def test_gumbel_selection_draws_by_the_odds():
    sampler = oracle_sampler(selection_temperature=1.0)
    noise = np.random.default_rng(0).random((20_000, 2))
    scores = np.tile([0.8, 0.5], (20_000, 1))  # odds 4 and 1
    chosen = sampler._select(scores, np.ones((20_000, 2), bool), np.ones(20_000, np.int64), noise)
    assert chosen.sum(1).tolist() == [1] * 20_000
    assert chosen[:, 0].mean() == pytest.approx(0.8, abs=0.01)
    cold = oracle_sampler(selection_temperature=0.05)
    assert (
        cold._select(scores, np.ones((20_000, 2), bool), np.ones(20_000, np.int64), noise)[:, 0].mean() > 0.99
    )


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "oracle"])
@pytest.mark.parametrize(
    ("remask_share", "strength"), [(0.0, 0.6), (0.3, 0.6), (1.0, 0.6), (0.3, 0.0), (1.0, 0.0)]
)
def test_every_policy_keeps_to_the_schedule(name, remask_share, strength):
    """After each round, exactly the schedule's number of positions is masked, whatever is re-masked, also of equal scores."""
    sampler = oracle_sampler(
        remask_share=remask_share, remdm_share=remask_share, randomness_strength=strength
    )
    result = run(sampler, name, 9, 5, trace=True)
    rounds = rounds_for(POLICIES[name], 9)
    shares = masked_shares(sampler.settings, rounds, POLICIES[name].remasks)
    expected = masked_counts_by_round(shares, np.full(5, 40))
    for number, round_ in enumerate(result.rounds):
        assert ((round_.ids == MASK).sum(1) == expected[number]).all()


class Sharpening(Oracle):
    """Surer of the truth the more of the text is visible."""

    def forward(self, input_ids, attention_mask=None, logits_at=None, head="lm", conditioning_mask=None):
        self.skill = 0.3 + 0.6 * float((input_ids != MASK).float().mean())
        return super().forward(input_ids, attention_mask, logits_at, head, conditioning_mask)


@pytest.mark.parametrize("name", ["present_confidence", "temporal_difference"])
def test_policies_that_read_visible_tokens_find_the_improbable_ones(name):
    """Right tokens gain probability as the text grows and wrong ones lose it, so these policies find as much as a critic."""
    changes = settings(randomness_strength=0.0, remask_share=1.0, remdm_share=1.0)
    right = {
        policy: (
            run(Sampler(Sharpening(TRUTH), MASK, SPECIAL, CPU, changes, seed=5), policy, 15, 64).ids == TRUTH
        ).mean()
        for policy in (name, "remdm_rescale", "critic_partial")
    }
    assert right[name] > right["remdm_rescale"] + 0.1
    assert right[name] == pytest.approx(right["critic_partial"], abs=0.05)


class Counting(Oracle):
    """Counts the rows that it reads."""

    read = 0

    def forward(self, input_ids, attention_mask=None, logits_at=None, head="lm", conditioning_mask=None):
        self.read += len(input_ids)
        return super().forward(input_ids, attention_mask, logits_at, head, conditioning_mask)


@pytest.mark.parametrize("name", ["ancestral", "confidence_order", "margin_order"])
def test_a_sample_with_few_free_tokens_is_read_only_when_it_needs_a_pass(name):
    """Row b has b + 1 free tokens and 20 rounds: the model reads it b + 1 times, and gives what it gives alone."""
    free = np.arange(40)[None] <= np.arange(8)[:, None]
    ids = np.where(free, MASK, TRUTH)
    sampler = Sampler(Counting(TRUTH), MASK, SPECIAL, CPU, settings(), seed=5)
    result = sampler.sample(MaskedTexts(ids, free, np.arange(8)), POLICIES[name], 20)
    assert result.passes.tolist() == list(range(1, 9)) and sampler.model.read == result.passes.sum()
    for row in range(8):
        alone = sampler.sample(
            MaskedTexts(ids[row : row + 1], free[row : row + 1], np.array([row])), POLICIES[name], 20
        )
        np.testing.assert_array_equal(alone.ids[0], result.ids[row])


@pytest.mark.parametrize("name", ["random_remask", "critic_origin", "confidence_remask"])
def test_stable_samples_are_finished_early(name):
    """Of two generators, the sure one resamples the same tokens in its corrector steps, and the unsure one does not."""
    changes = {"corrector_share": 0.5, "end_ratio": 0.3, "corrector_temperature": 1.0}
    for skill, early in ((1 - 1e-6, True), (0.1, False)):
        passes, ids = [], []
        for rounds in (None, 3):
            model = Counting(TRUTH, skill)
            kept = settings(**changes, stable_rounds=rounds)
            result = run(Sampler(model, MASK, SPECIAL, CPU, kept, seed=5), name, 20, 8)
            assert not (result.ids == MASK).any() and model.read == result.passes.sum()
            passes.append(result.passes)
            ids.append(result.ids)
        assert (passes[0] == 20).all()
        if early:  # 9 of 20 rounds are corrector steps; the first three change nothing
            assert (passes[1] == 14).all() and (ids[0] == ids[1]).all()
        else:
            assert (passes[1] == 20).all() and (ids[0] == ids[1]).all()


@pytest.mark.parametrize(
    "without", ["sampler.corrector_share=0", "sampler.schedule=custom sampler.masking_ratios=[0.5]"]
)
def test_stable_rounds_need_corrector_steps(without):
    with pytest.raises(BadConfig, match="stable_rounds ends a sample during its corrector steps, but"):
        load_config(overrides=["sampler.stable_rounds=2", *without.split()])


def test_sure_drafts_come_first():
    class Graded(Oracle):
        """Sure of low positions, unsure of high ones."""

        def forward(self, input_ids, attention_mask=None, logits_at=None, head="lm"):
            sharp = torch.linspace(6, 0, 40)[None, :, None].expand(*input_ids.shape, 1)
            logits = torch.zeros(*input_ids.shape, WORDS).scatter(
                -1, self.truth.expand(input_ids.shape)[..., None], sharp
            )
            logits = logits.flatten(0, 1)
            return SimpleNamespace(logits=logits if logits_at is None else logits[logits_at])

    for name in ("confidence_order", "margin_order"):
        sampler = Sampler(Graded(TRUTH), MASK, SPECIAL, CPU, settings(), seed=5)
        first = run(sampler, name, 4, 8, trace=True).rounds[0]
        written = np.nonzero(first.events == UNMASKED)[1]
        assert written.mean() < 12 and len(written)


def test_the_oracle_remasks_exactly_the_wrong_tokens_and_stops_when_there_are_none():
    result = run(oracle_sampler(), "oracle", 9, 16, trace=True)
    for number, round_ in enumerate(result.rounds[:-1]):
        written = round_.ids != MASK
        assert (round_.ids[written] == np.tile(TRUTH, (16, 1))[written]).all()
        going = result.passes > number + 1
        np.testing.assert_array_equal((~written).any(1), going)
    assert len(set(result.passes.tolist())) > 1
    right = run(oracle_sampler(), "oracle", 30, 16)
    assert (right.ids == TRUTH).all() and right.nfe < 12


def test_the_oracle_needs_the_truth():
    with pytest.raises(BadConfig, match="original text"):
        oracle_sampler().sample(
            MaskedTexts(np.full((1, 40), MASK), np.ones((1, 40), bool), np.arange(1)), POLICIES["oracle"], 4
        )


@pytest.mark.parametrize("name", ["critic", "critic_blend"])
def test_the_critic_is_conditioned_on_tokens_that_are_not_free(name):
    sampler = oracle_sampler()
    free = np.arange(40) >= 10
    ids = np.tile(TRUTH, (2, 1))
    texts = MaskedTexts(ids, np.tile(free, (2, 1)), np.arange(2))
    sampler.sample(texts, POLICIES[name], 9)
    masks = sampler.model.conditioning
    assert len(masks) >= 3 and all((mask == ~free).all() for mask in masks)
    sampler.critic_error(ids)  # nothing is known of an external text
    assert len(sampler.model.conditioning) == len(masks)
    several = oracle_sampler(block_tokens=20)  # tokens of an earlier block are not known to be right
    several.sample(texts, POLICIES[name], 9)
    masks = several.model.conditioning
    assert {mask.shape[1] for mask in masks} == {20, 40}
    assert all((mask == ~free[: mask.shape[1]]).all() for mask in masks)


def test_randomness_strength_one_ignores_the_critic():
    blind = (run(oracle_sampler(randomness_strength=1.0), "critic", 15, 64).ids == TRUTH).mean()
    seeing = (run(oracle_sampler(randomness_strength=0.0), "critic", 15, 64).ids == TRUTH).mean()
    assert seeing > blind + 0.2


def test_tokens_that_are_not_free_are_never_changed_and_never_counted():
    ids = np.full((4, 40), MASK)
    ids[:, :30] = TRUTH[:30]
    ids[0, 0] = (
        4 if TRUTH[0] != 4 else 5
    )  # an "error" that the critic finds, but that is not free: it must stay
    free = ids == MASK
    for name in POLICIES:
        result = oracle_sampler(start_ratio=0.9, end_ratio=0.5).sample(
            MaskedTexts(ids, free, np.arange(4), np.tile(TRUTH, (4, 1))), POLICIES[name], 9, trace=True
        )
        np.testing.assert_array_equal(result.ids[~free], ids[~free])
        for round_ in result.rounds[:-1]:
            assert (round_.events[~free] == 0).all()
            assert ((round_.ids == MASK).sum(1) <= 9).all()  # at most 0.9 of the ten free ones


def test_the_trace_has_the_events_of_each_round():
    rounds = run(oracle_sampler(), "confidence_remask", 6, 4, trace=True).rounds
    assert (rounds[0].events != STILL_MASKED).all()
    for before, after in itertools.pairwise(rounds):
        masked_before = before.ids == MASK
        np.testing.assert_array_equal(before.events == REMASKED, masked_before)
        kept = ~masked_before & (after.ids != MASK)
        np.testing.assert_array_equal(after.ids[kept], before.ids[kept])
        assert (after.events[masked_before & (after.ids != MASK)] == UNMASKED).all()
    assert (rounds[-1].ids != MASK).all()


def test_ancestral_sampling_unmasks_each_token_once():
    rounds = run(oracle_sampler(), "ancestral", 8, 4, trace=True).rounds
    assert (sum((r.events == UNMASKED).astype(int) for r in rounds) == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", list(POLICIES))
def test_a_sample_does_not_depend_on_its_batch(name, precision):
    architecture = load_config(quick_test=True).architecture
    config = model_config(architecture, "bidirectional", 40, critic_layers=1)
    model = make_model("language_model", config, 0, "test").eval()
    with torch.no_grad():  # zero-initialised projections would make every layer the identity
        for p in model.parameters():
            p.normal_(0, 0.3)
    runtime = Runtime(torch.device("cpu"), precision)
    ids, rows = np.full((33, 48), MASK), np.arange(33)
    free = np.ones(ids.shape, bool)
    free[:, :5], ids[:, :5] = False, 7
    for changes, context, nfe in (({}, None, 6), ({"block_tokens": 16}, 40, 2)):

        def sampled(chosen, size, changes=changes, context=context, nfe=nfe):
            sampler = Sampler(
                model, MASK, SPECIAL, runtime, settings(batch_size=size, **changes), 3, context=context
            )
            truth = np.full_like(ids, 9)[chosen]
            return sampler.sample(
                MaskedTexts(ids[chosen], free[chosen], rows[chosen], truth), POLICIES[name], nfe
            ).ids

        some = np.array([0, 7, 32])
        np.testing.assert_array_equal(sampled(rows, 33)[some], sampled(some, 1))


# ------------------------------------------------------------------------------------------ threshold


ASKED = [name for name, policy in POLICIES.items() if policy.error is not None]


def test_with_a_threshold_a_sample_is_finished_when_no_token_is_doubtful():
    sampler = oracle_sampler(schedule="threshold", threshold=0.5, randomness_strength=0.0)
    result = run(sampler, "critic", 99, 32, trace=True)
    assert (result.ids == TRUTH).all()  # its critic sees every error, and the budget suffices
    assert result.passes.min() < result.passes.max() == sampler.model.passes < 99
    assert (
        result.nfe == result.passes.mean() and (result.passes % 2 == 0).all()
    )  # a draft and a judgement each
    full = masked_counts_by_round(masked_shares(sampler.settings, 50), np.full(32, 40))
    for number, round_ in enumerate(result.rounds):
        masked = round_.ids == MASK
        np.testing.assert_array_equal(masked.any(1), result.passes > 2 * (number + 1))
        wrong = (~masked & (round_.ids != TRUTH)).any(1)
        assert (
            masked.sum(1)[wrong] == full[number][wrong]
        ).all()  # an error stays only if the schedule is met


@pytest.mark.slow
@pytest.mark.parametrize("name", ASKED)
def test_a_finished_sample_does_not_change_the_others(name):
    def sampled(numbers: np.ndarray):
        sampler = oracle_sampler(schedule="threshold", threshold=0.6, batch_size=5)
        ids = np.full((len(numbers), 40), MASK)
        free, truth = np.ones(ids.shape, bool), np.tile(TRUTH, (len(numbers), 1))
        return sampler.sample(MaskedTexts(ids, free, numbers, truth), POLICIES[name], 14)

    together = sampled(np.arange(12))
    for i in range(12):
        alone = sampled(np.array([i]))
        np.testing.assert_array_equal(alone.ids[0], together.ids[i])
        assert alone.passes[0] == together.passes[i] <= 14


@pytest.mark.parametrize("name", ["critic", "critic_blend", "confidence_remask", "fresh_confidence_remask"])
def test_a_threshold_near_zero_is_the_linear_schedule(name):
    linear = run(oracle_sampler(), name, 9)
    doubting = run(oracle_sampler(schedule="threshold", threshold=1e-12), name, 9)
    np.testing.assert_array_equal(linear.ids, doubting.ids)
    np.testing.assert_array_equal(linear.passes, doubting.passes)


def test_a_policy_without_an_error_estimate_cannot_have_a_threshold():
    for name in set(POLICIES) - set(ASKED):
        with pytest.raises(BadConfig, match=f"estimates errors, and {name} does not"):
            run(oracle_sampler(schedule="threshold"), name, 4)
    assert set(ASKED) == set(WITH_ERROR_VIEW)
    with pytest.raises(
        BadConfig, match=r"ancestral, random_remask cannot\. Policies that can: confidence_order"
    ):
        load_config(
            overrides=["sampler.schedule=threshold", "sampler.policies=[ancestral, critic, random_remask]"]
        )
    load_config(overrides=["sampler.schedule=threshold", "sampler.policies=[critic]"])
    with pytest.raises(BadConfig, match="needs the true text"):
        load_config(overrides=["sampler.policies=[oracle]"])


# --------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize(
    "length,size,context", [(100, 7, 16), (100, None, 16), (16, None, 16), (5, 2, 64), (9, 9, 9)]
)
def test_blocks_cover_the_text_and_see_as_much_as_the_context_holds(length, size, context):
    blocks = blocks_of(length, size, context)
    assert [i for b in blocks for i in range(b.start, b.end)] == list(range(length))
    for b in blocks:
        assert 0 <= b.window <= b.start < b.end and b.end - b.window == min(b.end, context)
    with pytest.raises(BadConfig, match="block_tokens is 17, but the generator reads at most 16"):
        blocks_of(100, 17, 16)


class Reader(nn.Module):
    """A model with equal probabilities that keeps its inputs."""

    def __init__(self):
        super().__init__()
        self.read: list[np.ndarray] = []

    def forward(self, input_ids, attention_mask=None, logits_at=None, head="lm", conditioning_mask=None):
        self.read.append(input_ids.numpy().copy())
        logits = torch.zeros(*input_ids.shape, WORDS).flatten(0, 1)
        blank = torch.zeros(input_ids.shape)
        if head == "critic":
            return SimpleNamespace(logits=blank)
        logits = logits.view(*input_ids.shape, WORDS) if logits_at is None else logits[logits_at]
        return SimpleNamespace(logits=logits, critic_logits=blank, origin_logits=blank)


@pytest.mark.parametrize("name", ["ancestral", "critic", "critic_partial", "fresh_confidence_remask"])
def test_a_long_text_is_generated_block_by_block_after_the_text_before_it(name):
    model = Reader()
    sampler = Sampler(model, MASK, SPECIAL, CPU, settings(block_tokens=8), 5, context=20)
    ids = np.full((3, 50), MASK)
    ids[:, :11], ids[:, 45] = 7, 9
    result = sampler.sample(MaskedTexts(ids, ids == MASK, np.arange(3)), POLICIES[name], 5, trace=True)
    assert (result.ids[:, :11] == 7).all() and (result.ids[:, 45] == 9).all()
    assert not np.isin(result.ids, SPECIAL).any()
    generated = [b for b in blocks_of(50, 8, 20) if b.end > 11]  # nothing of the first one is free
    gaps = [int((ids[0, b.start : b.end] == MASK).sum()) for b in generated]
    again = POLICIES[
        name
    ].remasks  # without re-masking, a block needs no more forward passes than free tokens
    passes = [5 if again else min(5, count) for count in gaps]
    assert len(model.read) == sum(passes) == result.nfe  # each block costs its own
    assert again or passes[-1] == 2
    for read, block in zip(model.read, np.repeat(np.array(generated, object), passes), strict=True):
        before = block.start - block.window
        np.testing.assert_array_equal(read[:, :before], result.ids[:, block.window : block.start])
        assert read.shape[1] == block.end - block.window <= 20
    assert len(result.rounds) == (len(generated) * rounds_for(POLICIES[name], 5) if again else sum(passes))
    np.testing.assert_array_equal(result.rounds[-1].ids, result.ids)
    assert (result.rounds[0].events[:, 24:45] == STILL_MASKED).all()


def test_one_block_is_the_whole_text_at_once():
    plain = run(oracle_sampler(), "critic", 9)
    block = run(oracle_sampler(block_tokens=40), "critic", 9)
    np.testing.assert_array_equal(plain.ids, block.ids)


# ---------------------------------------------------------------------------------------- calibration


def test_calibration_corrects_overconfidence_and_keeps_the_order(tmp_path):
    rng = np.random.default_rng(1)
    said = rng.random(20_000)
    happened = rng.random(20_000) < said**2
    calibration = Calibration.fit({"unknown": Observed(said, happened, said)})
    grid = np.linspace(0.02, 0.98, 50)
    assert np.abs(calibration(grid) - grid**2).max() < 0.06
    assert (np.diff(calibration(np.linspace(0, 1, 200))) > 0).all()
    sure = 1 - np.clip(said + 0.1 * rng.standard_normal(20_000), 0.01, 0.99)
    calibration = Calibration.fit({"filled": Observed(said, happened, said)}, sure)
    calibration.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == calibration


def test_each_band_of_the_masked_share_has_its_own_curve_where_there_is_enough_to_learn_from():
    rng = np.random.default_rng(3)
    said, share = rng.random((2, 40_000))
    share = np.where(share < 0.5, share / 2, 0.5 + share / 2)  # nothing between a quarter and three quarters
    share[:400] = 0.3  # but for too few
    happened = rng.random(40_000) < np.where(share < 0.5, said**2, np.sqrt(said))
    calibration = Calibration.fit({"filled": Observed(said, happened, share)})
    assert [curve is not None for curve in calibration.readings["filled"].bands] == [True, False, False, True]
    grid = np.linspace(0.05, 0.95, 19)
    for where, expected in ((0.1, grid**2), (1.0, np.sqrt(grid))):
        rows = np.tile(grid, (2, 1))
        assert np.abs(calibration(rows, "filled", np.full(2, where)) - expected).max() < 0.08
    np.testing.assert_array_equal(calibration(grid, "filled", np.full(19, 0.3)), calibration(grid, "filled"))
    np.testing.assert_array_equal(calibration(grid, "partial", np.full(19, 0.1)), grid)  # no curve: as it is
    mixed = calibration(np.tile(grid, (2, 1)), "filled", np.array([0.1, 1.0]))
    assert np.abs(mixed - np.stack([grid**2, np.sqrt(grid)])).max() < 0.08


def test_the_sampler_calibrates_by_what_was_masked():
    """A round's masked share picks the band: of the draft for the critic, of what it reads for critic_partial."""
    asked = []

    class Spy(Calibration):
        def __call__(self, probability, reading="unknown", share=None):
            assert share is not None
            asked.append((reading, share.tolist()))
            return super().__call__(probability, reading, share)

    for name, reading in (("critic", "filled"), ("critic_partial", "partial")):
        sampler = oracle_sampler()
        sampler.calibration = Spy()
        result = run(sampler, name, 9, 2, trace=True)
        before = [1.0] + [float((r.ids == MASK).mean(1)[0]) for r in result.rounds[:-1]]
        assert asked == [(reading, [share] * 2) for share in before[: len(asked)]] and len(asked) >= 4
        asked.clear()


def test_the_blend_finds_what_each_of_two_views_knows():
    rng = np.random.default_rng(2)
    first, second = rng.standard_normal((2, 20_000))
    happened = rng.random(20_000) < 1 / (1 + np.exp(-(first + 2 * second)))
    critic, error = 1 / (1 + np.exp(-first)), 1 / (1 + np.exp(-second))
    calibration = Calibration.fit({"filled": Observed(critic, happened, error)}, 1 - error)
    np.testing.assert_allclose(calibration.blend, (1, 2, 0), atol=0.12)
    expected = 1 / (1 + np.exp(-(first + 2 * second)))
    assert np.abs(calibration.blended(critic, 1 - error) - expected).mean() < 0.02


@pytest.mark.parametrize(
    "name", ["ancestral", "random_remask", "remdm_cap", "critic_partial", "critic", "fresh_confidence_remask"]
)
def test_a_single_free_token_costs_a_single_forward_pass(name):
    ids, free = np.tile(TRUTH, (2, 1)), np.zeros((2, 40), bool)
    ids[0, 3], free[0, 3] = MASK, True
    ids[1, 5:9], free[1, 5:9] = MASK, True
    passes = oracle_sampler().sample(MaskedTexts(ids, free, np.arange(2)), POLICIES[name], 8).passes
    assert passes[0] == 1 < passes[1]
    alone = oracle_sampler().sample(MaskedTexts(ids[1:], free[1:], np.arange(1, 2)), POLICIES[name], 8).passes
    assert alone == passes[1:]


def test_best_of_n_gains_what_the_scorer_knows(monkeypatch):
    from lib.evaluation import best_of as module

    sampler = oracle_sampler(randomness_strength=0.0)
    monkeypatch.setattr(
        module, "reference_nll", lambda model, runtime, ids, free, cls: (ids != TRUTH).sum(1) * 1.0
    )
    evaluator = SimpleNamespace(
        sampler=sampler,
        runtime=CPU,
        reference=object(),
        judge=None,
        ranker=None,
        tokenizer=SimpleNamespace(cls_token_id=2),
        pseudo_likelihood=lambda ids, rows: np.full(ids.shape, -0.5),  # likes all texts alike
    )
    monkeypatch.setattr(
        module, "decode_batch", lambda tokenizer, ids: ["".join(map(chr, 97 + row)) for row in ids]
    )
    ids, free = np.full((40, 40), MASK), np.ones((40, 40), bool)
    whole = Start(ids, free, np.arange(40))
    found, (texts,) = module.best_of(evaluator, [whole], "ancestral", 4, 6)
    rows = {r["scorer"]: r for r in found}
    assert rows["critic"]["gain"]["low"] > 0.05  # sees every error
    assert rows["critic"]["nll"]["value"] == pytest.approx(rows[module.CEILING]["nll"]["value"])
    assert rows["generator"]["gain"]["value"] == rows[module.CHANCE]["gain"]["value"] == 0
    assert set(texts) == {"critic", "generator"}
    assert (texts["critic"] != TRUTH).sum(1).mean() == pytest.approx(rows["critic"]["nll"]["value"] * 40)
    # The same samples in two parts: each is written and chosen as before, the row is over both
    parts = [Start(ids[p], free[p], np.arange(40)[p]) for p in (slice(0, 15), slice(15, 40))]
    found, (first, second) = module.best_of(evaluator, parts, "ancestral", 4, 6)
    assert (np.concatenate([first["critic"], second["critic"]]) == texts["critic"]).all()
    assert {r["scorer"]: r for r in found} == rows

    evaluator.reference = None  # chooses all the same
    found, (again,) = module.best_of(evaluator, [whole], "ancestral", 4, 6)
    assert (again["critic"] == texts["critic"]).all() and all(r["gain"] is None for r in found)
