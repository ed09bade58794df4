"""The ranker's training and report, tested with stubs that read only the prompt, the candidate or the position.

A stub that reads one input finds the best candidate only where this input determines it. So the exact figures of a blind
model, a control or a draw are known.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from lib.config import load_config
from lib.models.packing import Pools
from lib.ranking.losses import LOSSES
from lib.ranking.metrics import ranking_metrics
from lib.training.objectives.base import batch_losses
from lib.training.objectives.pool_choice import (
    CONTROLS,
    FIRST,
    MISMATCHED,
    NO_QUESTION,
    OFF_PAGE,
    RANDOM,
    PoolChoice,
    PoolReader,
    PoolSplits,
    decided,
    measure,
    simple_scores,
)
from lib.training.pool_table import PoolRows, PoolTable
from tests.trainings import CPU, context

N, K, WORDS = 24, 4, 40
PAD, MASK = 0, 2


@pytest.fixture(scope="module")
def tokenizer():
    """A token for each word w0 ... w39, and none around a text."""
    vocabulary = {"[PAD]": PAD, "[UNK]": 1, "[MASK]": MASK, "a": 3} | {f"w{i}": 4 + i for i in range(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    )


def made_table(seed: int = 0, count: int = N, missing: bool = True, draw: int = 0) -> PoolTable:
    """Prompts that name the word of the best candidate; some pools lack their last candidate.

    Elsewhere every candidate reads as the word of the next one. In another draw the wrong ones are others.
    """
    rng = np.random.default_rng(seed)
    best = rng.integers(0, K - 1, count)
    words = np.array([rng.permutation(WORDS)[: K * 8].reshape(8, K)[draw] for _ in range(count)])
    own = np.array([rng.integers(WORDS) for _ in range(count)])
    words = np.where(words == own[:, None], (words + 7) % WORDS, words)
    words[np.arange(count), best] = own
    present = np.ones((count, K), bool)
    if missing:
        present[::3, K - 1] = False
    rewards = np.round(rng.uniform(0, 0.8, (count, K)), 2)
    rewards[np.arange(count), best] = 1.0
    texts = np.where(present, np.char.add("w", words.astype(str)).astype(object), "")
    controls = np.where(present, np.roll(texts, 1, 1), "")
    controls[present & (controls == "")] = "w0"
    return PoolTable(
        example_ids=[f"e{i}" for i in range(count)],
        prompts=[f"w{word}" for word in own],
        tags=[["odd" if i % 2 else "even"] for i in range(count)],
        groups=np.array([f"g{i // 2}" for i in range(count)], object),
        candidate_ids=np.tile(np.arange(K), (count, 1)),
        texts=texts,
        controls=controls,
        kinds=np.where(present, np.where(rewards == 1, "gold", "other"), ""),
        values=np.where(present, "1", ""),
        rewards=np.where(present, rewards, 0),
        terms={"half": rewards / 2},
        present=present,
        baselines={"trees": rng.random((count, K))},
    )


class Stub(nn.Module):
    """Scores (B, K) by `rule(prompt words of a pool, candidate's words, its position)`; keeps what it read."""

    packs = False

    def __init__(self, rule):
        super().__init__()
        self.rule, self.read = rule, []
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pools: Pools) -> torch.Tensor:
        self.read.append(pools)
        scores = torch.full(pools.candidate_mask.shape[:2], -torch.inf)
        for b, k in pools.candidate_mask.any(-1).nonzero().tolist():
            prompt = set(pools.prompt_ids[b][pools.prompt_mask[b]].tolist())
            candidate = pools.candidate_ids[b, k][pools.candidate_mask[b, k]].tolist()
            scores[b, k] = self.rule(prompt, candidate, k)
        return scores * self.scale


def reads_prompt(prompt: set[int], candidate: list[int], position: int) -> float:
    return float(candidate[0] in prompt)


def reads_candidate(prompt: set[int], candidate: list[int], position: int) -> float:
    return candidate[0] / 7


def reads_position(prompt: set[int], candidate: list[int], position: int) -> float:
    return -position / 2


def reader_of(tokenizer, blind: bool = False, **changes) -> PoolReader:
    settings = load_config(quick_test=True).ranker.model_copy(update={"word_dropout": 0.0, **changes})
    return PoolReader(tokenizer, settings, CPU, 0, blind)


def choice_of(tokenizer, train=None, selection=None, held_out=None, blind=False, **changes) -> PoolChoice:
    table = made_table()
    splits = PoolSplits(train or [table], selection or table, held_out or table)
    made = context("r", seed=0, evaluation_examples=1000)
    return PoolChoice(made, splits, reader_of(tokenizer, blind, **changes))


def test_the_logged_speed_counts_the_tokens_that_the_model_reads(tokenizer):
    """A copy of the prompt for every candidate without packing, and only the candidates that a step samples."""
    table = made_table(missing=False)  # a prompt of one token, and four candidates of one token
    for attention, most, tokens in (("prefix", None, 1 + 4), ("full", None, 4 * 2), ("full", 2, 2 * 2)):
        choice = choice_of(tokenizer, [table], attention=attention, sampled_candidates=most)
        assert choice.tokens_per_row == tokens


def accuracy_of(table: PoolTable, scores: np.ndarray) -> float:
    return float(ranking_metrics(scores, table.rewards, table.present)["accuracy"].mean())


# --- losses --------------------------------------------------------------------------------------------------------------

CONFIGURED = [
    ("cross_entropy", {}, {}),
    ("list_mle", {}, {}),
    ("regression", {}, {}),
    ("listwise", {"temperature": 0.7}, {"temperature": 0.7}),
    ("pairwise", {"margin": 0.6}, {"margin": 0.6}),
    ("bradley_terry", {"margin": 0.6}, {"margin": 0.6}),
]


@pytest.mark.parametrize(("loss", "settings", "arguments"), CONFIGURED)
def test_the_configured_loss_with_its_settings_is_what_is_trained_and_evaluated(
    tokenizer, loss, settings, arguments
):
    """By hand, from the stub's scores of the pools that a step asks for."""
    target, table = choice_of(tokenizer, loss=loss, **settings), made_table()
    model = Stub(reads_candidate)
    which = np.concatenate([target._order.samples(np.arange(8, 16))])
    scores = torch.full((N, K), -torch.inf)
    for n, k in zip(*np.nonzero(table.present), strict=True):
        scores[n, k] = (int(table.texts[n, k][1:]) + 4) / 7
    wanted = LOSSES[loss](
        scores, torch.from_numpy(table.rewards).float(), torch.from_numpy(table.present), **arguments
    )
    assert batch_losses(target, model, 1, range(8, 16))["loss"].item() == pytest.approx(
        wanted[which].mean().item(), rel=1e-5
    )
    assert target.evaluate(model)["loss"] == pytest.approx(wanted.mean().item(), rel=1e-5)
    others = [name for name in LOSSES if name != loss]
    plain = [
        LOSSES[n](scores, torch.from_numpy(table.rewards).float(), torch.from_numpy(table.present))
        for n in others
    ]
    assert all(
        abs(wanted.mean() - other.mean()) > 1e-3 for other in plain
    )  # otherwise equality would show little


def test_absent_candidates_have_no_part_in_a_loss(tokenizer):
    """The reward of an absent candidate may be anything."""
    table = made_table()
    assert not table.present.all()
    wild = replace(table, rewards=np.where(table.present, table.rewards, 9.0))
    for loss in LOSSES:
        losses = [
            batch_losses(choice_of(tokenizer, [t], t, loss=loss), Stub(reads_candidate), 0, range(N))[
                "loss"
            ].item()
            for t in (table, wild)
        ]
        assert losses[0] == losses[1] and np.isfinite(losses[0])


def test_a_pool_narrower_than_the_widest_lacks_its_last_candidates(tokenizer):
    """Scores of a batch without a full pool are padded with -inf."""
    table = made_table()
    narrow = np.flatnonzero(~table.present[:, -1])
    scores = reader_of(tokenizer).scores(Stub(lambda *_: -5.0), PoolRows.of(table, narrow))
    assert scores.shape == (len(narrow), K)
    assert torch.equal(torch.isfinite(scores), torch.from_numpy(table.present[narrow]))


# --- what is read --------------------------------------------------------------------------------------------------------


def test_who_reads_the_prompt_is_right_and_blind_at_chance(tokenizer):
    table = made_table()
    chance = np.mean(1 / table.present.sum(1))
    for blind, accuracy in ((False, 1.0), (True, chance)):
        target, model = choice_of(tokenizer, blind=blind), Stub(reads_prompt)
        assert target.evaluate(model)["accuracy"] == pytest.approx(accuracy)
        assert target.report(model)[0]["accuracy"]["value"] == pytest.approx(accuracy)
        batch_losses(target, model, 0, range(8))
        assert any(pools.prompt_mask.any() for pools in model.read) != blind


def test_controls_are_followed_to_the_number(tokenizer):
    """Without the question, with a mismatched one, and with off-page candidates, the scores are those of the changed inputs."""
    table, model = made_table(), Stub(reads_prompt)
    others = choice_of(tokenizer).report(model)[0]["others"]
    mismatched = [table.prompts[i] for i in table.mismatched(0)]

    def by_hand(prompts: list[str], texts: Any) -> float:
        scores = np.where(texts == np.array(prompts, object)[:, None], 1.0, 0.0)
        return accuracy_of(table, scores)

    wanted = {
        NO_QUESTION: by_hand([""] * N, np.where(table.present, table.texts, "none")),
        MISMATCHED: by_hand(mismatched, table.texts),
        OFF_PAGE: by_hand(table.prompts, table.controls),
    }
    for name, value in wanted.items():
        assert others[name]["accuracy"]["value"] == pytest.approx(value), name
    assert max(wanted.values()) < 0.6 and set(CONTROLS) == set(wanted)


def test_who_reads_the_candidate_alone_does_not_mind_the_question(tokenizer):
    values = choice_of(tokenizer).report(Stub(reads_candidate))[0]
    for name in (NO_QUESTION, MISMATCHED):
        assert values["others"][name]["accuracy"] == values["accuracy"]
        assert values["others"][name]["lead"] == {"value": 0, "low": 0, "high": 0}
    moved = values["others"][OFF_PAGE]["accuracy"]["value"]
    table = made_table()
    numbers = np.array([[float(t[1:] or 0) if t else -1 for t in row] for row in np.asarray(table.controls)])
    assert moved == pytest.approx(accuracy_of(table, numbers)) != values["accuracy"]["value"]


def test_who_reads_the_position_alone_is_the_first_candidate(tokenizer):
    values = choice_of(tokenizer).report(Stub(reads_position))[0]
    for name in (FIRST, *CONTROLS):
        assert values["others"][name]["accuracy"] == values["accuracy"]
    table = made_table()
    assert values["accuracy"]["value"] == pytest.approx((table.rewards[:, 0] == 1).mean())
    scores = simple_scores(table)
    assert accuracy_of(table, scores[RANDOM]) == pytest.approx(np.mean(1 / table.present.sum(1)))


def test_a_mismatched_prompt_is_of_another_group_and_differs_from_pool_to_pool(tokenizer):
    table = made_table()
    found = table.mismatched(3)
    assert (table.groups[found] != table.groups).all() and len(set(found.tolist())) > N / 2
    assert (found != table.mismatched(4)).any()
    odd = replace(table, groups=np.array(["big"] * 16 + [f"g{i}" for i in range(8)], object))
    assert (odd.groups[odd.mismatched(0)] != odd.groups).all()


def test_all_scores_are_those_of_each_pool_by_itself(tokenizer):
    """More pools than one batch holds, also with other prompts and texts."""
    table = made_table(2, 70)
    reader, model = reader_of(tokenizer), Stub(reads_prompt)
    whole = reader.all_scores(model, table)
    prompts = table.prompts[::-1]
    swapped = reader.all_scores(model, table, prompts=prompts, texts=table.controls)
    assert table.controls is not None
    for n in range(70):
        alone = PoolRows.of(table, np.array([n]))
        np.testing.assert_array_equal(reader.scores(model, alone)[0].detach().numpy(), whole[n])
        other = replace(alone, prompts=[prompts[n]], texts=table.controls[[n]])
        np.testing.assert_array_equal(reader.scores(model, other)[0].detach().numpy(), swapped[n])


def test_words_are_hidden_in_training_and_never_when_measuring(tokenizer):
    target = choice_of(tokenizer, word_dropout=0.5)
    model = Stub(reads_candidate)
    batch_losses(target, model, 0, range(N))
    hidden = [(p.candidate_ids == MASK).any() and (p.prompt_ids == MASK).any() for p in model.read]
    assert all(hidden)
    one = made_table(count=1, missing=False)  # a pool that comes again has other words hidden
    again, reader = choice_of(tokenizer, [one], word_dropout=0.5), Stub(reads_candidate)
    for row in range(12):
        batch_losses(again, reader, row, range(row, row + 1))
    assert len({tuple((p.candidate_ids == MASK).flatten().tolist()) for p in reader.read}) > 4
    model.read.clear()
    target.evaluate(model)
    target.report(model)
    assert len(model.read) > 4
    assert not any((p.candidate_ids == MASK).any() or (p.prompt_ids == MASK).any() for p in model.read)


# --- which pools ---------------------------------------------------------------------------------------------------------


def test_every_pass_takes_the_next_draw_and_begins_again_after_the_last(tokenizer):
    draws = [made_table(draw=d, missing=False) for d in range(3)]
    target, model = choice_of(tokenizer, draws), Stub(reads_candidate)
    for number in range(5 * N // 8):
        model.read.clear()
        rows = range(number * 8, number * 8 + 8)
        batch_losses(target, model, number, rows)
        words = [p.candidate_ids[..., 0] - 4 for p in model.read]
        seen = [tuple(row.tolist()) for row in torch.cat(words)]
        which = target._order.samples(np.arange(rows.start, rows.stop))
        wanted = [
            tuple(int(t[1:]) for t in draws[r // N % 3].texts[n]) for r, n in zip(rows, which, strict=True)
        ]
        assert seen == wanted and len(words) == 1
    passes = [sorted(target._order.samples(np.arange(p * N, p * N + N)).tolist()) for p in range(3)]
    assert passes == [list(range(N))] * 3


def test_a_batch_over_the_end_of_a_pass_takes_pools_of_two_draws(tokenizer):
    draws = [made_table(draw=d, missing=False) for d in range(2)]
    target, model = choice_of(tokenizer, draws, loss="cross_entropy"), Stub(reads_candidate)
    loss = batch_losses(target, model, 2, range(20, 28))["loss"].item()
    which = target._order.samples(np.arange(20, 28))
    each = []
    for row, n in zip(range(20, 28), which, strict=True):
        table = draws[row // N]
        scores = torch.tensor([(int(t[1:]) + 4) / 7 for t in table.texts[n]])
        each.append(-torch.log_softmax(scores, 0)[int(table.rewards[n].argmax())].item())
    assert loss == pytest.approx(np.mean(each), rel=1e-5)
    assert [len(p.prompt_ids) for p in model.read] == [8]


def test_hard_negatives_are_those_of_the_draw_that_is_read(tokenizer):
    own = np.arange(N) % WORDS
    draws = []
    for hard in range(2):  # the only wrong candidate that has the word of the prompt
        words = np.repeat((own[:, None] + 1) % WORDS, K, 1)
        words[:, hard] = own
        rewards = np.zeros((N, K))
        rewards[:, K - 1] = 1
        texts = np.char.add("w", words.astype(str)).astype(object)
        prompts = [f"w{word}" for word in own]
        draws.append(replace(made_table(missing=False), prompts=prompts, texts=texts, rewards=rewards))
    target = choice_of(tokenizer, draws, sampled_candidates=2, hard_negatives=100.0)
    for epoch in range(2):
        model = Stub(reads_prompt)
        batch_losses(target, model, epoch, range(epoch * N, epoch * N + N))
        for pools in model.read:
            assert pools.candidate_ids.shape[1] == 2
            assert (pools.candidate_ids[..., 0] == pools.prompt_ids[:, :1]).any(1).all()


def test_rows_of_draws_keep_their_order(tokenizer):
    """Also where the last draw is followed by the first."""
    draws = [made_table(draw=d, missing=False) for d in range(3)]
    draw, index = np.array([1, 1, 2, 2, 0, 0]), np.array([3, 9, 4, 0, 7, 4])
    rows = PoolRows.of_draws(draws, draw, index)
    for i, (d, n) in enumerate(zip(draw, index, strict=True)):
        assert rows.prompts[i] == draws[d].prompts[n]
        assert rows.texts[i].tolist() == draws[d].texts[n].tolist()
        assert rows.rewards[i].tolist() == draws[d].rewards[n].tolist()


def test_the_best_step_is_chosen_on_selection_pools_and_reported_on_others(tokenizer):
    """A stub that is right on one table only shows which table is read."""
    selection, held_out = made_table(5), made_table(6, 30)
    target = choice_of(tokenizer, [made_table(7)], selection, held_out)
    known = {(p, t) for p, row in zip(selection.prompts, selection.texts, strict=True) for t in row}

    def only_of_selection(prompt: set[int], candidate: list[int], position: int) -> float:
        pair = next((f"w{w - 4}" for w in prompt), ""), f"w{candidate[0] - 4}"
        return float(candidate[0] in prompt) if pair in known else -float(position == 0)

    model = Stub(only_of_selection)
    found = target.evaluate(model)
    assert found["accuracy"] == 1 and found["regret"] == pytest.approx(0, abs=1e-7)
    values, _ = target.report(model)
    scores = target.reader.all_scores(model, held_out)
    assert values["pools"] == 30 and values["accuracy"]["value"] == pytest.approx(
        accuracy_of(held_out, scores)
    )


def test_regret_is_what_the_choices_earn_less_than_the_best_and_chooses_the_best_step(tokenizer):
    table, target = made_table(), choice_of(tokenizer)
    found = target.evaluate(Stub(reads_candidate))
    numbers = np.where(table.present, [[float(t[1:] or 0) for t in row] for row in table.texts], -1)
    earned = table.rewards[np.arange(N), numbers.argmax(1)]
    assert found["regret"] == pytest.approx(1 - earned.mean()) and found["average_reward"] == pytest.approx(
        earned.mean()
    )
    assert found["regret"] > target.evaluate(Stub(reads_prompt))["regret"] == pytest.approx(0, abs=1e-7)
    assert (
        set(found) == {"loss", "regret", "accuracy", "average_reward", "mrr"}
        and found["mrr"] > found["accuracy"]
    )
    assert target.selection == "regret"  # the loop minimises it


@pytest.mark.parametrize(
    ("relevant", "count", "selection"),
    [(2.0, 0, "regret"), (0.0, 0, "regret"), (0.9, N, "map_regret"), (0.5, None, "map_regret")],
)
def test_pools_without_an_average_precision_do_not_choose_the_best_step(
    tokenizer, capsys, relevant, count, selection
):
    """All rewards are below or above pools.relevant: average precision is the same for every order."""
    table = replace(made_table(), relevant=relevant)
    right = (table.rewards >= relevant) & table.present
    known = right.any(1) & (~right & table.present).any(1)
    target = choice_of(tokenizer, selection=table, best_by="map")
    said = capsys.readouterr().err
    assert target.selection == selection and (count is None or known.sum() == count)
    assert (f"{known.sum()} of {N} selection pools have rewards on both sides" in said) == (not known.all())
    found = target.evaluate(Stub(reads_candidate))
    if selection == "map_regret":
        scores = target.reader.all_scores(Stub(reads_candidate), table)
        per_pool = ranking_metrics(scores, table.rewards, table.present, relevant=relevant)["map"]
        assert found["map_regret"] == pytest.approx(1 - per_pool[known].mean())
    else:
        assert "map_regret" not in found and found["regret"] > 0


def test_a_candidate_of_the_reward_that_is_relevant_is_relevant():
    """A pool is decided by such candidates and others. Absent ones do not count."""
    rewards = np.array(
        [[0.6, 0.2, 0, 0], [0.6, 0.9, 1, 0.6], [0.5, 0.2, 0, 0], [0.6, 0.6, 1, 0], [0.2, 0, 0, 0.6]]
    )
    present = np.arange(4) < np.array([4, 4, 4, 3, 3])[:, None]
    table = replace(made_table(count=5), rewards=rewards, present=present, relevant=0.6)
    assert decided(table).tolist() == [True, False, False, False, False]


def test_the_report_counts_as_relevant_what_the_table_says():
    """The best candidate is third: of those that are relevant from 0.9, it is the only one."""
    table = made_table(count=2, missing=False)
    rewards, scores = np.array([[0.6, 0.2, 0.9, 0.1]] * 2), np.array([[4.0, 3, 2, 1]] * 2)
    found = [
        measure(replace(table, rewards=rewards, relevant=relevant), scores, 0, short=True)["map"]["value"]
        for relevant in (0.5, 0.9)
    ]
    assert found == pytest.approx([(1 + 2 / 3) / 2, 1 / 3])


def test_an_evaluation_takes_the_same_pools_each_time_and_as_many_as_asked(tokenizer):
    splits = PoolSplits([made_table()], made_table(), made_table())
    target = PoolChoice(context("r", seed=0, evaluation_examples=10), splits, reader_of(tokenizer))
    model = Stub(reads_candidate)
    seen = []
    for _ in range(2):
        model.read.clear()
        target.evaluate(model)
        seen.append(torch.cat([p.prompt_ids for p in model.read]).flatten().tolist())
    assert seen[0] == seen[1] and len(seen[0]) == 10


# --- the report ----------------------------------------------------------------------------------------------------------


def test_the_rival_is_the_best_that_is_no_control(tokenizer):
    """A strong simple method is the baseline; a control never is, even if it is better."""
    table = made_table()
    strong = replace(table, baselines={"trees": table.rewards * 1.0, "weak": -table.rewards})
    values, (row,) = choice_of(tokenizer, held_out=strong).report(Stub(reads_candidate))
    assert row.baseline == "trees" and row.baseline_value == 1.0
    assert row.metric == "accuracy" and not row.lower_is_better
    assert row.value == values["accuracy"]["value"] and (row.low, row.high) != (row.value, row.value)
    lead = values["others"]["trees"]["lead"]
    assert (row.difference_low, row.difference_high) == (lead["low"], lead["high"])
    weak = replace(table, baselines={"weak": -table.rewards}, controls=table.texts)
    _, (row,) = choice_of(tokenizer, held_out=weak).report(Stub(reads_prompt))
    assert row.baseline in (RANDOM, FIRST) and row.beats_baseline


def test_leads_are_over_the_control_and_over_whole_groups(tokenizer):
    """The lead is the ranker's accuracy less the control's; pools of one group that agree count once."""
    values = choice_of(tokenizer).report(Stub(reads_prompt))[0]
    for name, other in values["others"].items():
        lead = other["lead"]["value"]
        assert lead == pytest.approx(values["accuracy"]["value"] - other["accuracy"]["value"]), name
    assert values["others"][NO_QUESTION]["lead"]["value"] > 0.5
    table = made_table(1, 40, missing=False)
    twice = np.repeat(np.arange(20), 2)
    copies = replace(
        table, prompts=[table.prompts[i] for i in twice], texts=table.texts[twice], rewards=table.rewards[twice],
        groups=np.array([f"g{i}" for i in twice], object),
    )  # fmt: skip
    scores = np.where(copies.texts > "w2", 1.0, 0.0)
    grouped, loose = (measure(t, scores, 0) for t in (copies, replace(copies, groups=np.arange(40))))
    widths: list[Any] = [m["accuracy"]["high"] - m["accuracy"]["low"] for m in (grouped, loose)]
    assert widths[0] > 1.2 * widths[1]


def test_errors_and_terms_are_those_of_the_winners():
    table = made_table(missing=False)
    scores = np.where(np.arange(K) == 1, 1.0, 0.0) * np.ones((N, 1))
    values = measure(table, scores, 0)
    wrong = table.rewards[:, 1] < 1
    assert values["wrong_choices"]["other"]["chosen"] == wrong.sum() and "gold" not in values["wrong_choices"]
    terms = values["terms"]
    assert terms["reward"]["winner"] == pytest.approx(table.rewards[:, 1].mean())
    assert terms["half"]["winner"] == pytest.approx(table.terms["half"][:, 1].mean())
    assert terms["reward"]["best"] == 1 and terms["reward"]["random"] == pytest.approx(table.rewards.mean())
    odd = values["tags"]["odd"]
    assert odd["count"] == N / 2 and odd["accuracy"] == pytest.approx((~wrong)[1::2].mean())
    sparse = made_table()
    means = [row[there].mean() for row, there in zip(sparse.rewards, sparse.present, strict=True)]
    assert measure(sparse, scores, 0)["terms"]["reward"]["random"] == pytest.approx(np.mean(means))


def test_a_ranker_that_the_config_calls_blind_reads_no_prompts(tokenizer, monkeypatch):
    """From the config's `blind` to what the ranker reads, and from its draws to what it trains on."""
    from lib.training import train_model

    table = made_table()
    stage_inputs: Any = SimpleNamespace(
        config=load_config(quick_test=True), tokenizer=tokenizer, runtime=CPU,
        draws=lambda split, with_equal: [table, made_table(1)], pools=lambda split: table, pools_for_selection=lambda: made_table(2),
    )  # fmt: skip
    monkeypatch.setattr(train_model, "start_ranker", lambda *_: (Stub(reads_prompt), tokenizer, "nowhere"))
    spec = stage_inputs.config.models["judge"]
    for blind in (False, True):
        setup: Any = train_model.set_up_prompt_ranker(
            context("r", seed=0),
            spec.model_copy(update={"mode": "ranker", "blind": blind}),
            stage_inputs,
            Path("nowhere"),
            None,
        )
        accuracy = setup.objective.evaluate(setup.model)["accuracy"]
        assert (accuracy == 1) != blind and len(setup.objective.splits.train) == 2
        assert setup.objective.splits.selection.prompts == made_table(2).prompts
        assert setup.model.blind == blind, "what the saved ranker records"
        assert setup.facts["blind"] == blind and setup.facts["packs"] is False
