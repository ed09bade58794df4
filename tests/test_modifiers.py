"""Loss modifiers: each compared with its formula, in combination, and refused where they do not apply."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lib.config import load_config
from lib.errors import BadConfig
from lib.models.build import heads_of, start_model
from lib.sections.models import EntropyModifier, JudgeModifier, MaskRatioModifier, ModifiersConfig
from lib.training.objectives.base import batch_losses
from lib.training.objectives.language_model import MaskedDiffusion
from lib.training.objectives.modifiers import (
    MaskedPredictions,
    Modifiers,
    check_judge,
    entropy_weights,
    mask_ratio_weights,
    uniform_cross_entropies,
)
from tests.trainings import TOKENS, Killed, context, fingerprint, settings, splits, train_tiny

TEXT = np.arange(4, 14)
V, B, T = 14, 6, 16


def masked_of(seed: int = 0) -> MaskedPredictions:
    rng = np.random.default_rng(seed)
    ids, hidden = rng.integers(4, 14, (B, T)), rng.random((B, T)) < 0.5
    hidden[:, 0] = True
    flat_idx = np.flatnonzero(hidden)
    logits = torch.from_numpy(rng.normal(size=(len(flat_idx), V)) * 2).float().requires_grad_()
    targets, row_idx = (torch.from_numpy(x) for x in (ids.reshape(-1)[flat_idx], flat_idx // T))
    return MaskedPredictions(
        logits, targets, row_idx, ids, np.ones((B, T), bool), flat_idx,
        hidden.mean(1), np.arange(B),
    )  # fmt: skip


def model_of(mode: str = "language_model"):
    architecture = load_config(quick_test=True).architecture.model_copy(
        update={"hidden_size": 32, "context": 16}
    )
    return start_model(mode, architecture, "bidirectional", V, 3, "tiny", **heads_of(mode))[0]


def modifiers_of(judge=None, /, **config) -> Modifiers:
    return Modifiers(ModifiersConfig(**config), TEXT, context(), judge, cls_id=2)


def applied(modifiers: Modifiers, ce: torch.Tensor, masked: MaskedPredictions, step: int):
    """((N,) losses, (B,) weights with mean 1, name -> logged number) of a batch that is one part."""
    found, weights, terms = modifiers.apply(ce, masked, step)
    means = {name: float(values.double().mean()) for name, values in terms.items()}
    logged, factor = modifiers.finish(means | {"loss": 1.0})
    assert logged.pop("loss") == factor
    return found, weights * factor, logged


def test_smoothed_targets_leave_special_tokens_out():
    masked, share = masked_of(), 0.2
    target = torch.zeros(len(masked.flat_idx), V)
    target[:, 4:] = share / len(TEXT)
    target[torch.arange(len(masked.flat_idx)), masked.targets] += 1 - share
    wanted = -(target * torch.log_softmax(masked.logits, -1)).sum(-1)
    ce = torch.nn.functional.cross_entropy(masked.logits, masked.targets, reduction="none")
    found, weights, terms = applied(modifiers_of(label_smoothing=share), ce, masked, 0)
    assert torch.allclose(found, wanted, atol=1e-5) and torch.equal(weights, torch.ones(B))
    spread = uniform_cross_entropies(masked.logits, torch.from_numpy(TEXT))
    by_row = [float(spread[masked.row_idx == b].detach().mean()) for b in range(B)]
    assert terms["modifier_smoothing"] == pytest.approx(np.mean(by_row))


def test_entropy_weights_are_those_of_the_wrong_answers():
    masked, config = masked_of(), EntropyModifier(weight=1.5, threshold=0.6)
    wanted = []
    for b in range(B):
        entropies = []
        for n in np.flatnonzero(masked.row_idx.numpy() == b):
            p = torch.softmax(masked.logits[n].detach().double(), -1).numpy()
            p = np.delete(p, int(masked.targets[n]))
            p /= p.sum()
            entropies.append(-(p * np.log(p)).sum() / np.log(V - 1))
        wanted.append(1.5 / max(np.mean(entropies), 0.6))
    found = entropy_weights(masked, config, B)
    assert np.allclose(found.numpy(), wanted, rtol=1e-5) and not found.requires_grad
    assert len(set(found.tolist())) > 1


def test_mask_ratio_weights():
    found = mask_ratio_weights(
        torch.tensor([0.0, 0.01, 0.25, 1.0]), MaskRatioModifier(power=0.5, min_weight=1.5, max_weight=5)
    )
    assert found.tolist() == pytest.approx([5, 5, 2, 1.5])


def test_weights_multiply_and_have_mean_one():
    masked = masked_of()
    both = modifiers_of(entropy=EntropyModifier(), mask_ratio=MaskRatioModifier())
    ce = torch.ones(len(masked.flat_idx))
    _, weights, terms = applied(both, ce, masked, 0)
    product = entropy_weights(masked, EntropyModifier(), B) * mask_ratio_weights(
        torch.tensor(masked.ratios, dtype=torch.float32), MaskRatioModifier()
    )
    assert torch.allclose(weights, product / product.mean()) and float(weights.mean()) == pytest.approx(1)
    for name, alone in (
        ("entropy", entropy_weights(masked, EntropyModifier(), B)),
        (
            "mask_ratio",
            mask_ratio_weights(torch.tensor(masked.ratios, dtype=torch.float32), MaskRatioModifier()),
        ),
    ):
        variation = float(alone.std(correction=0) / alone.mean())
        assert terms.pop(f"modifier_{name}") == pytest.approx(variation, rel=1e-4)
    assert not terms


@pytest.mark.parametrize("name", ["entropy", "mask_ratio", "judge", "label_smoothing"])
def test_a_row_without_masks_changes_nothing(name):
    """`inverse_t` draws such rows. They have no loss, but would have the largest weight, so others would learn less."""
    whole = masked_of()
    keep = whole.row_idx < B - 2
    ratios = np.where(np.arange(B) < B - 2, whole.ratios, 0.0)
    flat_idx = whole.flat_idx[keep.numpy()]
    masked = replace(
        whole, logits=whole.logits[keep], targets=whole.targets[keep], row_idx=whole.row_idx[keep], flat_idx=flat_idx, ratios=ratios
    )  # fmt: skip
    alone = replace(
        masked, ids=whole.ids[:-2], valid=whole.valid[:-2], ratios=ratios[:-2], rows=whole.rows[:-2]
    )
    config = {
        "entropy": EntropyModifier(), "mask_ratio": MaskRatioModifier(), "label_smoothing": 0.1,
        "judge": JudgeModifier(model="x", min_weight=0.2, max_weight=3, stop_step=9),
    }  # fmt: skip
    ce = torch.ones(len(flat_idx))
    (_, weights, terms), (_, wanted, wanted_terms) = (
        applied(modifiers_of(ConstantJudge(rows.ids), **{name: config[name]}), ce, rows, 0)
        for rows in (masked, alone)
    )
    torch.testing.assert_close(weights, torch.cat([wanted, torch.zeros(2)]))
    assert terms == pytest.approx(wanted_terms)


def test_a_batch_without_masks_has_a_loss_of_zero():
    whole = masked_of()
    none = replace(
        whole, logits=whole.logits[:0], targets=whole.targets[:0], row_idx=whole.row_idx[:0], flat_idx=whole.flat_idx[:0],
        ratios=np.zeros(B),
    )  # fmt: skip
    modifiers = modifiers_of(mask_ratio=MaskRatioModifier(), label_smoothing=0.1)
    _, weights, terms = modifiers.apply(torch.zeros(0), none, 0)
    logged, factor = modifiers.finish({name: float(v.mean()) for name, v in terms.items()} | {"loss": 0.0})
    assert not weights.any() and factor == 1 and not any(logged.values())


class ConstantJudge(torch.nn.Module):
    """Says 1 - (number of tokens that differ from `ids`) / T, so that its weights can be computed by hand."""

    def __init__(self, ids: np.ndarray):
        super().__init__()
        self.ids = torch.from_numpy(ids)

    def forward(self, input_ids, attention_mask=None):
        assert (input_ids[:, 0] == 2).all()
        self.read = input_ids[:, 1:]
        wrong = (self.read != self.ids).float().mean(1, keepdim=True)
        return type("Output", (), {"logits": 1 - wrong})


def test_judge_weights_follow_its_opinion_of_a_sampled_completion():
    masked = masked_of()
    judge = ConstantJudge(masked.ids)
    config = JudgeModifier(model="x", exponent=0.5, min_weight=0.2, max_weight=3, start_step=2, stop_step=4)
    modifiers = modifiers_of(judge, judge=config)
    ce = torch.ones(len(masked.flat_idx))
    assert torch.equal(applied(modifiers, ce, masked, 1)[1], torch.ones(B))
    _, weights, terms = applied(modifiers, ce, masked, 2)
    assert (judge.read >= 4).all() and (judge.read != judge.ids).any()
    outside = np.setdiff1d(np.arange(B * T), masked.flat_idx)
    assert np.array_equal(judge.read.numpy().reshape(-1)[outside], masked.ids.reshape(-1)[outside])
    wrong = (judge.read != judge.ids).float().mean(1).numpy()
    wanted = np.clip((wrong / masked.ratios) ** 0.5, 0.2, 3)
    assert np.allclose(weights.numpy(), wanted / wanted.mean(), rtol=1e-4)
    assert torch.equal(weights, applied(modifiers, ce, masked, 2)[1]) and "modifier_judge" in terms
    assert torch.equal(applied(modifiers, ce, masked, 4)[1], torch.ones(B))


def test_the_judge_reads_the_same_completion_of_a_row_in_any_batch():
    whole = masked_of()
    config = JudgeModifier(model="x", min_weight=0.2, max_weight=3, stop_step=9)
    judge = ConstantJudge(whole.ids)
    modifiers_of(judge, judge=config).apply(torch.ones(len(whole.flat_idx)), whole, 0)
    read = judge.read.numpy()
    for rows in ([4], [5, 1], [0, 2, 3]):
        some = np.concatenate([np.flatnonzero(whole.flat_idx // T == r) for r in rows])
        at = np.concatenate(
            [whole.flat_idx[whole.flat_idx // T == r] % T + n * T for n, r in enumerate(rows)]
        )
        part = MaskedPredictions(
            whole.logits[some], whole.targets[some], torch.from_numpy(at // T), whole.ids[rows],
            whole.valid[rows], at, whole.ratios[rows], whole.rows[rows],
        )  # fmt: skip
        alone = ConstantJudge(whole.ids[rows])
        modifiers_of(alone, judge=config).apply(torch.ones(len(at)), part, 5)
        assert np.array_equal(alone.read.numpy(), read[rows])
    other = masked_of()
    other.rows[:] = np.arange(B) + 50
    modifiers_of(judge, judge=config).apply(torch.ones(len(other.flat_idx)), other, 0)
    assert not np.array_equal(judge.read.numpy(), read)  # other rows of the same text get other completions


def objective_of(modifiers: Modifiers | None) -> MaskedDiffusion:
    diffusion = load_config(quick_test=True).diffusion
    return MaskedDiffusion(context(evaluation_examples=16), splits(), diffusion, TOKENS, modifiers)


def test_modifiers_change_the_training_loss_and_never_the_evaluation():
    model = model_of().eval()
    plain = objective_of(None)
    for config in (
        {"label_smoothing": 0.1}, {"entropy": EntropyModifier(threshold=0.01)}, {"mask_ratio": MaskRatioModifier()}
    ):  # fmt: skip
        changed = objective_of(modifiers_of(**config))
        terms = batch_losses(changed, model, 0, range(8))
        assert float(terms["loss"].detach()) != float(
            batch_losses(plain, model, 0, range(8))["loss"].detach()
        )
        assert float(terms["plain_loss"]) == pytest.approx(
            float(batch_losses(plain, model, 0, range(8))["loss"].detach())
        )
        with torch.no_grad():
            assert changed.evaluate(model) == plain.evaluate(model)


def run(folder: Path, fault: int | None = None) -> dict[str, str]:
    """Twelve steps with judge weighting from step 3 to 8, and hashes of the results."""
    config = JudgeModifier(model="x", start_step=3, stop_step=8)
    objective = objective_of(modifiers_of(model_of("sequence_scorer").eval(), judge=config))
    train_tiny(model_of(), objective, settings(), folder, fault)
    return fingerprint(folder)


@pytest.mark.slow
def test_killed_within_judge_weighting_it_ends_with_the_same_bits(tmp_path):
    whole = run(tmp_path / "whole")
    for step in (3, 5, 8):
        with pytest.raises(Killed):
            run(tmp_path / str(step), fault=step)
        assert run(tmp_path / str(step)) == whole, f"killed before step {step}"


@pytest.mark.parametrize("model", ["judge", "inspector", "reference_lm", "ranker"])
def test_modifiers_are_refused_where_they_do_not_fit(model):
    with pytest.raises(BadConfig, match="modifiers change the loss of masked language models"):
        load_config(overrides=[f"models.{model}.modifiers.label_smoothing=0.1"])


@pytest.mark.parametrize(
    "mode, vocabulary, context, named",
    [
        ("token_classifier", V, 16, "no sequence scorer"),
        ("sequence_scorer", 15, 16, "reads 14 ids"),
        ("sequence_scorer", V, 17, "reads 16 tokens at most"),
    ],
)
def test_only_a_judge_that_can_read_this_text_judges(mode, vocabulary, context, named):
    with pytest.raises(BadConfig, match=named):
        check_judge(model_of(mode), vocabulary, context, "x")
    check_judge(model_of("sequence_scorer"), V, 16, "x")


@pytest.mark.parametrize(
    "given, named", [({"min_weight": 3.0}, "min_weight"), ({"start_step": 5}, "stop_step")]
)
def test_limits_without_effect_are_refused(given, named):
    with pytest.raises(ValidationError, match=named):
        JudgeModifier(model="x", stop_step=5, **given)
