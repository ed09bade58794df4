"""The token critic: labels come from the clean text, joint training ramps, frozen backbones stay frozen."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from lib.config import load_config
from lib.models.build import Checkpoint, heads_of, read_folder, save_model, start_model
from lib.training.data import Windows
from lib.training.objectives.base import batch_losses
from lib.training.objectives.error_detection import (
    ScoredTokens,
    bands,
    detection,
    fit_calibration,
)
from lib.training.objectives.language_model import MaskedDiffusion, WindowSplits
from lib.training.objectives.token_critic import TokenCritic, without_gradient
from tests.trainings import (
    TOKENIZER,
    TOKENS,
    Killed,
    context,
    critic_losses,
    fingerprint,
    settings,
    train_tiny,
)


def objective(coupling: str = "decoupled", **changes) -> TokenCritic:
    config = load_config(quick_test=True)
    ids = np.tile(np.arange(4, 14), 64).astype(np.int32)
    lists = pa.chunked_array([pa.array(ids.reshape(-1, 32).tolist(), pa.list_(pa.int32()))])
    data = Windows(pa.table({"token_ids": lists, "continues": [False] * 20}), 40, 0)  # windows with padding
    splits = WindowSplits(data, data, data, np.arange(20).astype(str))
    made = context("critic", batch_size=8, evaluation_examples=16)
    diffusion = MaskedDiffusion(made, splits, config.diffusion, TOKENS)
    critic = config.critic.model_copy(update={"coupling": coupling, **changes})
    return TokenCritic(critic, diffusion, [0, 1, 2, 3])


def model(critic_layers: int = 1, **changes):
    architecture = load_config(quick_test=True).architecture.model_copy(update=changes)
    return start_model(
        "language_model", architecture, "bidirectional", 14, 0, "t", critic_layers=critic_layers
    )[0]


def test_written_tokens_are_compared_with_the_clean_text_and_nothing_else_is_an_error():
    target = objective(clean_fraction=1.0, labels="sampled")
    index, ids, valid = target.diffusion.windows(range(8))
    filled = target.filler.fill(model(), ids, valid, index, "critic", 8)
    assert (filled.generated <= valid).all() and filled.generated.any()
    np.testing.assert_array_equal(filled.ids[~filled.generated], ids[~filled.generated])
    assert not np.isin(filled.ids[filled.generated], [0, 1, 2, 3]).any()
    seen = {}

    class Spy(torch.nn.Module):
        def forward(self, input_ids, attention_mask=None, head="lm", **_):
            wrong = torch.from_numpy(filled.ids != ids)
            seen["head"] = head
            written = torch.from_numpy(filled.generated)
            return SimpleNamespace(
                logits=torch.where(wrong, 20.0, -20.0), origin_logits=torch.where(written, 20.0, -20.0)
            )

    losses = critic_losses(target, Spy(), filled, index)
    assert seen["head"] == "critic"
    assert max(loss.item() for loss in losses) < 1e-6  # an oracle of the clean text has no loss
    assert (filled.ids != ids)[filled.generated].any()


class Oracle(torch.nn.Module):
    """A generator with the same probabilities at every position, independent of its input."""

    def __init__(self, size: int):
        super().__init__()
        self.logits = torch.randn(size, generator=torch.Generator().manual_seed(1))

    def forward(self, input_ids, attention_mask=None, logits_at=None, **_):
        count = input_ids.numel() if logits_at is None else len(logits_at)
        return SimpleNamespace(logits=self.logits.expand(count, -1).clone())

    def error(self, ids, forbidden) -> np.ndarray:
        """Exact probability that a token of `ids` is wrong."""
        return (
            1 - torch.softmax(self.logits.index_fill(0, torch.tensor(forbidden), -torch.inf), -1).numpy()[ids]
        )


class TwoMinds(torch.nn.Module):
    """A generator that is sure of token 4 in its first forward pass, and of token 5 in all later ones."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, input_ids, attention_mask=None, logits_at=None, **_):
        logits = torch.full((input_ids.numel() if logits_at is None else len(logits_at), 14), -30.0)
        logits[:, 4 if self.calls == 0 else 5] = 30.0
        self.calls += 1
        return SimpleNamespace(logits=logits)


def test_look_back_injection_puts_earlier_predictions_into_later_text():
    target = objective(rollout_passes=(2, 2), look_back=1.0)
    index, ids, valid = target.diffusion.windows(range(8))
    plain = target.filler.fill(TwoMinds(), ids, valid, index, "critic", 8)
    found = target.filler.fill_to_learn_from(TwoMinds(), ids, valid, index, "critic", 8)
    later = plain.generated & (plain.ids == 5)
    injected = later & (found.ids == 4)  # predicted in the first pass, kept by none
    assert later.any() and 0.1 < injected.sum() / later.sum() < 0.9
    np.testing.assert_array_equal(found.ids[~later], plain.ids[~later])
    np.testing.assert_array_equal(found.generated, plain.generated)
    np.testing.assert_allclose(found.expected[injected], 1)  # the first pass was sure of what is injected
    assert (found.expected[later & ~injected] < 1e-6).all()
    # A row does not depend on the others
    alone = target.filler.fill_to_learn_from(TwoMinds(), ids[3:4], valid[3:4], index[3:4], "critic", 8)
    np.testing.assert_array_equal(alone.ids, found.ids[3:4])


def test_look_back_injection_reaches_its_share_of_the_rows():
    target = objective(rollout_passes=(2, 2), look_back=0.5)
    rows = np.arange(400)
    ids, valid = (np.resize(x, (400, x.shape[1])) for x in target.diffusion.windows(range(8))[1:])
    plain = target.filler.fill(TwoMinds(), ids, valid, rows, "critic", 8)
    found = target.filler.fill_to_learn_from(TwoMinds(), ids, valid, rows, "critic", 8)
    assert 0.3 < (plain.ids != found.ids).any(1).mean() < 0.5


def test_expected_labels_are_what_the_generator_said_before_anything_was_written():
    target = objective(rollout_passes=(4, 4), labels="expected", clean_fraction=1.0, origin_weight=0.0)
    index, ids, valid = target.diffusion.windows(range(8))
    oracle = Oracle(14)
    filled = target.filler.fill(oracle, ids, valid, index, "critic", 8)
    chance = oracle.error(filled.ids, [0, 1, 2, 3])
    written = filled.generated
    np.testing.assert_allclose(1 - filled.expected[written], chance[written], atol=1e-6)
    assert (filled.expected[~written] == 1).all()

    class Says(torch.nn.Module):
        def forward(self, input_ids, attention_mask=None, **_):
            error = np.where(written, chance, 1e-7).clip(1e-7, 1 - 1e-7)
            logits = torch.from_numpy(np.log(error / (1 - error)))
            return SimpleNamespace(logits=logits, origin_logits=logits)

    best = critic_losses(target, Says(), filled, index)[0].item()
    share, count = chance[written], (written | valid).sum()
    entropy = -(share * np.log(share) + (1 - share) * np.log(1 - share)).sum() / count
    assert best == pytest.approx(entropy, rel=1e-3)  # the entropy of the labels is the minimum


def test_given_the_given_text_nothing_says_more_of_an_error_than_the_first_pass():
    """In a later pass a token may have high confidence because of a wrong one; its label does not depend on that."""
    target = objective(rollout_passes=(6, 6))
    index, ids, valid = target.diffusion.windows(range(8))
    net = model()
    with torch.no_grad():  # an untrained output is the same for every token
        for number, p in enumerate(net.parameters()):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
    filled = target.filler.fill(net, ids, valid, index, "critic", 8)
    start = np.where(filled.generated, target.diffusion.mask_id, ids)
    with torch.no_grad():
        logits = net.eval()(torch.from_numpy(start), attention_mask=torch.from_numpy(valid)).logits.float()
    logits[..., [0, 1, 2, 3]] = -torch.inf
    tokens = torch.from_numpy(filled.ids.astype(np.int64))[..., None]
    first = torch.softmax(logits, -1).gather(-1, tokens).squeeze(-1).numpy()
    written = filled.generated
    np.testing.assert_allclose(filled.expected[written], first[written], atol=1e-5)
    assert np.abs(filled.expected - filled.confidence)[written].max() > 1e-3


def test_padding_counts_nothing():
    target = objective(clean_fraction=1.0)
    index, ids, valid = target.diffusion.windows(range(8))
    assert not valid.all()
    filled = target.filler.fill(model(), ids, valid, index, "critic", 8)
    logits = torch.zeros(ids.shape)
    logits[torch.from_numpy(~valid)] = 1e4  # extreme logits at padding

    class Wild(torch.nn.Module):
        def forward(self, **_):
            return SimpleNamespace(logits=logits, origin_logits=logits)

    for loss in critic_losses(target, Wild(), filled, index):
        assert loss.item() == pytest.approx(np.log(2), rel=1e-5)


def test_alpha_ramps_between_its_two_shares():
    target = objective("joint", alpha=0.5, ramp=(0.25, 0.75))
    steps = target.config.training.steps
    assert [target.alpha(s) for s in (0, steps // 4)] == [0, 0]
    assert target.alpha(steps // 2) == pytest.approx(0.25) and target.alpha(steps) == 0.5


@pytest.mark.slow
def test_killed_within_the_ramp_it_ends_with_the_same_bits(tmp_path):
    steps = 12
    chosen = settings(steps=steps)

    def run(folder, fault=None) -> dict[str, str]:
        target = objective("joint", alpha=0.5, ramp=(0.25, 0.75), training=chosen)
        assert 0 < target.alpha(5) < target.alpha(7) < 0.5
        train_tiny(model(), target, chosen, folder, fault)
        return fingerprint(folder)

    whole = run(tmp_path / "whole")
    for step in (5, 7):
        with pytest.raises(Killed):
            run(tmp_path / str(step), step)
        assert run(tmp_path / str(step)) == whole, f"killed before step {step}"


def test_joint_loss_is_named_and_selected_on_generator_and_critic():
    target = objective("joint", ramp=(0.0, 0.0))
    terms = batch_losses(target, model(), 5, range(8))
    generator, error, origin = (
        terms[name].item() for name in ("generator_loss", "critic_loss", "origin_loss")
    )
    assert min(error, origin) > 0 and target.config.origin_weight > 0
    critic = error + target.config.origin_weight * origin
    assert terms["loss"].item() == pytest.approx(generator + target.config.alpha * critic, rel=1e-5)
    assert target.selection == "nelbo_and_auroc" and objective().selection == "critic_loss"


@pytest.mark.parametrize("coupling", ["joint", "decoupled", "stop_gradient"])
def test_a_step_moves_what_it_should(coupling):
    target, net = objective(coupling, ramp=(0.0, 0.0)), model()
    if coupling == "decoupled":
        for name, p in net.named_parameters():
            p.requires_grad_(name.startswith("critic."))
    batch_losses(target, net, 5, range(8))["loss"].backward()
    moved = {n for n, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any(n.startswith("critic.") for n in moved)
    assert any(n.startswith("model.") for n in moved) == (coupling != "decoupled")


@pytest.mark.parametrize("family", ["remask_gpt", "ltg_bert"])
def test_of_a_decoupled_critic_only_its_own_blocks_have_dropout(family):
    """A frozen backbone with dropout would give other states than in use."""
    target, net = objective("decoupled"), model(family=family, dropout=0.5)
    with torch.no_grad():  # zero-initialised projections would hide dropout
        for number, p in enumerate(net.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
    exact = batch_losses(target, net.eval(), 5, range(8))["loss"]
    part = target.part(net.train(), 5, range(8))
    assert not torch.equal(part.losses(part.weights)["loss"], exact)
    assert all(module.training for module in net.modules())
    net.critic.eval()
    assert torch.equal(part.losses(part.weights)["loss"], exact)


def test_with_stopped_gradient_the_backbone_learns_from_the_generator_alone():
    """`joint` with alpha 0 and `stop_gradient` with alpha 2 give the backbone the same gradient."""

    def gradients(coupling: str, alpha: float):
        target, net = objective(coupling, ramp=(0.0, 0.0), alpha=alpha), model()
        with torch.no_grad():  # zero-initialised projections would block the gradient
            for number, p in enumerate(net.parameters()):
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
        batch_losses(target, net, 5, range(8))["loss"].backward()
        assert all(p.requires_grad for p in net.parameters())
        return {n: p.grad for n, p in net.named_parameters() if p.grad is not None}

    alone, stopped, joint = gradients("joint", 0.0), gradients("stop_gradient", 2.0), gradients("joint", 2.0)
    backbone = [n for n in alone if not n.startswith("critic.") and alone[n].abs().sum() > 0]
    assert len(backbone) > 5
    for name in backbone:
        torch.testing.assert_close(stopped[name], alone[name])
    assert any((joint[name] - alone[name]).abs().max() > 1e-4 for name in backbone)
    for name in joint:
        if name.startswith("critic."):
            torch.testing.assert_close(stopped[name], joint[name])


def test_gradients_are_on_again_after_a_failure():
    net = model()
    with pytest.raises(ValueError, match="stop"), without_gradient(net):
        assert {n.split(".")[0] for n, p in net.named_parameters() if p.requires_grad} == {"critic"}
        raise ValueError("stop")
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.slow
def test_the_report_beats_chance_only_if_the_critic_knows_something():
    target = objective()
    values, rows, _ = target.report(model())
    views = {
        "critic",
        "critic_calibrated",
        "critic_unknown",
        "critic_blend",
        "critic_partial",
        "critic_partial_calibrated",
        "whole_text_critic",
    }
    assert set(values["detection"]) == views | {
        "confidence", "fresh_confidence", "confidence_first_pass", "confidence_visible", "whole_text_fresh_confidence",
    }  # fmt: skip
    assert 0 < values["error_rate_whole_text"] < values["error_rate"] < 1 and len(rows) == 4
    beaten = {row.metric: row.beats_baseline for row in rows if row.baseline == "chance"}
    knowing = objective()
    knowing._probabilities = lambda model, filled, conditioned: (
        0.1 + 0.8 * (filled.ids != filled.clean),
        filled.generated * 0.5,
    )
    known = knowing.report(model())[1]
    assert not any(beaten.values()) and all(row.beats_baseline for row in known)
    assert {row["reading"] for row in values["bands"]} == {"filled", "partial"}


def test_the_masked_share_is_that_of_the_pass_which_completed_the_text():
    target = objective(rollout_passes=(1, 1))
    index, ids, valid = target.diffusion.windows(range(8))
    once = target.filler.fill(model(), ids, valid, index, "critic", 8)
    np.testing.assert_allclose(once.share, once.generated.sum(1) / valid.sum(1))
    often = objective(rollout_passes=(3, 3)).filler.fill(model(), ids, valid, index, "critic", 8)
    left = often.generated.sum(1)
    np.testing.assert_allclose(often.share * valid.sum(1), left - np.ceil(left * 2 / 3))
    partial, share = target._partial(model(), once, index)
    hidden = np.isnan(partial)
    assert (hidden <= once.generated).all() and 0.1 < hidden[once.generated].mean() < 0.9
    np.testing.assert_allclose(share, hidden.sum(1) / valid.sum(1))


def test_the_critic_gets_a_conditioning_mask_as_often_as_asked_and_never_for_a_text_with_masks():
    masks: list[torch.Tensor | None] = []

    class Spy(torch.nn.Module):
        def forward(self, input_ids, attention_mask=None, head="lm", conditioning_mask=None):
            masks.append(conditioning_mask)
            blank = torch.zeros(input_ids.shape)
            return SimpleNamespace(logits=blank, origin_logits=blank)

    target = objective(conditioning_fraction=0.5)
    index, ids, valid = target.diffusion.windows(range(8))
    filled = target.filler.fill(model(), ids, valid, index, "critic", 8)
    critic_losses(target, Spy(), filled, index)
    flags = masks.pop()
    assert flags is not None
    conditioning = flags.numpy()
    rows = conditioning.any(1)
    assert 0 < rows.sum() < 8
    np.testing.assert_array_equal(conditioning[rows], (valid & ~filled.generated)[rows])
    partly = filled.remask(filled.generated, target.diffusion.mask_id)
    critic_losses(target, Spy(), partly, index)
    assert masks.pop() is None
    critic_losses(objective(conditioning_fraction=0.0), Spy(), filled, index)
    assert masks.pop() is None


def made_views(count: int = 80_000) -> ScoredTokens:
    """A critic that is overconfident where much was masked, and calibrated elsewhere."""
    rng = np.random.default_rng(5)
    critic, share, noise = rng.random((3, count))
    wrong = noise < np.where(share > 0.5, critic**2, critic)
    partial = np.where(rng.random(count) < 0.5, np.nan, critic)
    written = np.ones(count, bool)
    return ScoredTokens(
        wrong, written, np.arange(count) % 50, critic, critic, share, partial, share, rng.random(count), critic,
        critic,
    )  # fmt: skip


def test_who_knows_nothing_of_a_text_is_calibrated_on_all_of_it():
    """Every second token is a conditioning token, and right. So the error rate of all tokens is half that of the generated ones."""
    half = made_views()
    written = np.arange(len(half.wrong)) % 2 == 0
    seen = replace(half, generated=written, wrong=half.wrong & written)
    calibration = fit_calibration(seen)
    raw = np.array([0.4, 0.8])
    np.testing.assert_allclose(calibration(raw), calibration(raw, "filled") / 2, atol=0.04)
    found = detection(seen.subset(np.arange(8000)), calibration)
    assert found["whole_text_critic"]["ece"] < 0.03 and found["critic_calibrated"]["ece"] < 0.03
    assert (
        found["critic"]["auroc"]
        == detection(seen.subset(np.flatnonzero(written[:8000])), calibration)["critic"]["auroc"]
    )


def test_curves_by_band_are_more_honest_than_one_for_all():
    seen = made_views()
    fitting = seen.group % 2 == 0
    measuring = ~fitting
    calibration = fit_calibration(seen.subset(fitting))
    rows = bands(seen.subset(measuring), calibration)
    assert [(r["reading"], r["low"]) for r in rows] == [
        (name, low) for name in ("filled", "partial") for low in (0, 0.25, 0.5, 0.75)
    ]
    for row in rows:
        assert row["own"] and row["ece_by_band"] < 0.045 < row["ece_one_curve"]
        assert row["brier_by_band"] < row["brier_one_curve"]
        assert (row["ece_raw"] > 0.1) == (row["low"] >= 0.5)
    assert sum(r["tokens"] for r in rows if r["reading"] == "filled") == measuring.sum()
    found = detection(seen.subset(np.flatnonzero(measuring)[:8000]), calibration)
    assert found["critic"]["brier"] > found["critic_calibrated"]["brier"]
    assert found["critic_partial_calibrated"]["ece"] < 0.04 < found["critic_partial"]["ece"]
    assert abs(found["confidence"]["auroc"]["value"] - 0.5) < 0.03  # uninformative here


def test_transfer_says_what_it_took_and_refuses_a_backbone_that_does_not_fit(tmp_path):
    from lib.errors import BadData, MissingInput

    architecture = load_config(quick_test=True).architecture
    source = model()
    save_model(source, tmp_path / "a", TOKENIZER)
    for mode in ("token_classifier", "sequence_scorer", "ranker", "language_model"):
        new, report = start_model(
            mode,
            Checkpoint(tmp_path / "a", architecture.dropout),
            "bidirectional",
            14,
            0,
            "n",
            **heads_of(mode),
        )
        inner = getattr(new, "encoder", new)
        torch.testing.assert_close(inner.model.embed_tokens.weight, source.model.embed_tokens.weight)
        assert report.dropped and all(n.startswith("critic.") for n in report.dropped)
        assert (len(report.created) > 0) == (mode != "language_model")
    with pytest.raises(BadData, match="vocabulary of 14 ids"):
        start_model(
            "ranker", Checkpoint(tmp_path / "a", 0.0), "bidirectional", 15, 0, "n", **heads_of("ranker")
        )
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "a" / "model.safetensors")
    name = next(n for n in tensors if n.startswith("model.layers.1"))
    save_file(
        {n: t for n, t in tensors.items() if n != name},
        tmp_path / "a" / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(BadData, match=f"{name} is missing"):
        start_model(
            "ranker", Checkpoint(tmp_path / "a", 0.0), "bidirectional", 14, 0, "n", **heads_of("ranker")
        )
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(MissingInput, match="pickled weights are not read"):
        read_folder(tmp_path / "b")
