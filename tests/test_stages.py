"""Staged unmasking: masks of each stage, progress by stale validation losses, and a resume in the middle."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.config import load_config
from lib.diffusion.masking import BatchDraw
from lib.diffusion.stages import Progress, mask_in_stages
from lib.errors import BadConfig
from lib.models.build import start_model
from lib.training.objectives.base import batch_losses
from lib.training.objectives.language_model import MaskedDiffusion
from lib.training.objectives.staged import StagedUnmasking
from tests.trainings import TOKENS, Killed, context, fingerprint, settings, splits, train_tiny

STAGES = [
    "{type: random, max_masked_ratio: 0.3, val_loss_stale_count: 1}",
    "{type: sticky, target_masked_ratio: 0.5, p1: 0.02, p2: 0.9, val_loss_stale_count: 2}",
    "{type: span, num_spans: 2, max_masked_ratio: 0.6, val_loss_stale_count: 1}",
    "{type: line, min_ratio: 0.2, max_ratio: 0.9, val_loss_stale_count: 3}",
]


def diffusion_of(*changes: str, stages=STAGES):
    return load_config(overrides=[f"diffusion.stages=[{', '.join(stages)}]", *changes]).diffusion


def test_rows_get_the_masks_of_their_stage():
    stages = diffusion_of().stages
    valid = np.ones((400, 200), bool)
    valid[::3, 150:] = False
    rows = np.arange(400)
    of_row = rows % 4
    lines = np.tile(np.arange(200) // 10, (400, 1))
    batch = mask_in_stages(stages, of_row, valid, BatchDraw(0, "x", rows, 400), lines)
    assert not (batch.masked & ~valid).any()
    ratios = batch.masked.sum(1) / valid.sum(1)
    assert ratios[of_row == 0].max() <= 0.3 + 1 / 150 and ratios[of_row == 0].mean() == pytest.approx(
        0.15, abs=0.01
    )
    assert (batch.masked.sum(1) == np.rint(0.5 * valid.sum(1)))[of_row == 1].all()
    runs = (np.diff(np.pad(batch.masked, ((0, 0), (1, 0))).astype(int), axis=1) == 1).sum(1)
    assert runs[of_row == 2].max() <= 2
    whole = batch.masked.reshape(400, 20, 10)
    assert np.isin(whole.sum(2), (0, 10))[of_row == 3].all()
    assert ((ratios >= 0.2 - 1e-9) & (ratios <= 0.9 + 1e-9))[of_row == 3].all()
    assert np.allclose(batch.weights.sum(1), 1) and np.array_equal(batch.ratios, ratios)


def test_a_row_does_not_depend_on_its_batch():
    stages = diffusion_of(stages=STAGES[:3]).stages
    valid = np.ones((12, 50), bool)
    rows = np.arange(12)
    whole = mask_in_stages(stages, rows % 3, valid, BatchDraw(0, "x", rows, 12))
    part = mask_in_stages(stages, rows[5:7] % 3, valid[5:7], BatchDraw(0, "x", rows[5:7], 12))
    assert np.array_equal(whole.masked[5:7], part.masked)


def slow_progress(patience, min_improvement, losses):
    """The rule, written out step by step."""
    current, best, stale, seen = 0, math.inf, 0, []
    for loss in losses:
        if best == math.inf or loss < best - min_improvement * best:
            best, stale = loss, 0
        else:
            stale += 1
            if stale >= patience[current] and current + 1 < len(patience):
                current, best, stale = current + 1, math.inf, 0
        seen.append(current)
    return seen


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.25, 0.5]),  # powers of two, so that products are exact
    st.lists(st.integers(0, 8), max_size=30),
)
def test_progress_follows_the_rule(patience, min_improvement, losses):
    progress, seen = Progress(tuple(patience), (min_improvement,) * len(patience)), []
    for loss in losses:
        before = progress.current
        moved = progress.note(float(loss))
        assert moved == (progress.current == before + 1)
        seen.append(progress.current)
    assert seen == slow_progress(patience, min_improvement, losses)


def objective_of(stages=STAGES, *changes: str) -> StagedUnmasking:
    tokens = replace(TOKENS, newline_ids=np.array([13]))
    return StagedUnmasking(
        context(evaluation_examples=16), splits(), diffusion_of(*changes, stages=stages), tokens
    )


def model_of():
    architecture = load_config(quick_test=True).architecture.model_copy(
        update={"hidden_size": 32, "context": 16}
    )
    return start_model("language_model", architecture, "bidirectional", 14, 3, "tiny")[0]


def test_batches_are_split_evenly_over_the_stages_so_far():
    objective = objective_of()
    rows = np.arange(8, 16)
    _, ids, valid = objective.windows(range(8, 16))
    seen = []
    for current in range(4):
        objective.progress.current = current
        masks = objective.mask(ids, valid, "x", rows, 8).masked
        expected = mask_in_stages(
            objective.stages, rows % (current + 1), valid, BatchDraw(3, "x", rows, 8), objective.lines_of(ids)
        )
        assert np.array_equal(masks, expected.masked)
        seen.append(objective.active)
    assert seen == [1, 2, 3, 4]
    assert objective_of(STAGES, "diffusion.use_all_stages=true").active == 4


def test_every_stage_has_its_own_loss_on_fixed_masks():
    objective, model = objective_of(), model_of().eval()
    first, second = objective.stage_losses(model), objective.stage_losses(model)
    assert first == second and len(first) == 4 and all(loss > 0 for loss in first)
    assert len(set(first)) == 4


def test_a_stage_ends_by_its_own_loss_and_the_best_model_is_chosen_by_the_bound(monkeypatch):
    """Only the loss of the current stage decides when the next one begins."""
    objective, model = objective_of(), model_of().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    plain = MaskedDiffusion.evaluate(objective, model)
    seen = []
    for losses in (
        [5.0, 1, 1, 1],
        [4.0, 9, 1, 1],
        [4.0, 2, 1, 1],
        [3.0, 9, 1, 1],
        [2.0, 3, 1, 1],
        [1.0, 3, 1, 1],
    ):
        monkeypatch.setattr(objective, "stage_losses", lambda model, losses=losses: losses)
        values = objective.evaluate(model)
        assert values["nelbo"] == plain["nelbo"] and objective.selection == "nelbo"
        seen.append((values["stage"], objective.progress.current))
    # Stage 0 (1 stale check) ends at the third; stage 1 (2 of them) at the sixth, not before
    assert seen == [(0, 0), (0, 0), (0, 1), (1, 1), (1, 1), (1, 1)]
    monkeypatch.setattr(objective, "stage_losses", lambda model: [0.5, 3, 9, 9])
    objective.evaluate(model)
    objective.evaluate(model)
    assert objective.progress.current == 2


def run(folder: Path, fault: int | None = None):
    chosen = settings(steps=18, evaluate_every=1, checkpoint_every=4, learning_rate=0.03)
    return train_tiny(model_of(), objective_of(), chosen, folder, fault)


@pytest.mark.slow
def test_killed_around_a_change_of_stage_it_ends_with_the_same_bits(tmp_path):
    run(tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    stages = [int(line["selection"]["stage"]) for line in lines]
    assert stages == sorted(stages) and stages[-1] >= 1, "the test needs a change of stage"
    assert {f"stage_{n}_loss" for n in range(4)} <= set(lines[0]["selection"])
    change = next(i for i, stage in enumerate(stages) if stage)
    for step in range(change - 1, change + 3):
        with pytest.raises(Killed):
            run(tmp_path / str(step), fault=step)
        run(tmp_path / str(step))
        assert fingerprint(tmp_path / str(step)) == fingerprint(tmp_path / "whole"), f"killed before {step}"


def test_bert_corruption_is_what_the_model_reads():
    diffusion = diffusion_of("diffusion.corruption=bert", stages=[])
    objective = MaskedDiffusion(context(evaluation_examples=16), splits(), diffusion, TOKENS)
    read = []

    class Spy(torch.nn.Module):
        def forward(self, input_ids, logits_at, **_):
            read.append(input_ids.numpy())
            logits = torch.zeros(len(logits_at), 14, requires_grad=True)
            return type("Output", (), {"logits": logits})

    for step in range(40):
        batch_losses(objective, Spy(), step, range(step * 8, step * 8 + 8))
    ids = np.concatenate([objective.windows(range(s * 8, s * 8 + 8))[1] for s in range(40)])
    masks = np.concatenate(
        [
            objective.mask(*objective.windows(r)[1:], "tiny diffusion", np.array(r), 8).masked
            for r in (range(s * 8, s * 8 + 8) for s in range(40))
        ]
    )  # fmt: skip
    seen = np.concatenate(read)
    assert np.array_equal(seen[~masks], ids[~masks])
    assert (seen[masks] == 1).mean() == pytest.approx(0.8, abs=0.03)
    assert (seen[masks] == ids[masks]).mean() == pytest.approx(
        0.11, abs=0.03
    )  # a tenth of the random ones too
    assert np.isin(seen[masks], [1, *range(4, 14)]).all()


@pytest.mark.parametrize(
    "stage, named",
    [
        ("{type: sticky, target_masked_ratio: 0.5, p1: 0, p2: 0, val_loss_stale_count: 1}", "both 0"),
        ("{type: line, min_ratio: 0.9, max_ratio: 0.2, val_loss_stale_count: 1}", "must not exceed"),
        ("{type: random, max_masked_ratio: 0.5}", "val_loss_stale_count"),
        ("{type: random, max_masked_ratio: 0, val_loss_stale_count: 1}", "greater than 0"),
        (
            "{type: span, num_spans: 2, max_maskd_ratio: 1, val_loss_stale_count: 1}",
            "did you mean 'max_masked_ratio'",
        ),
    ],
)
def test_a_stage_that_cannot_be_is_refused(stage, named):
    with pytest.raises(BadConfig, match=named):
        diffusion_of(stages=[stage])
