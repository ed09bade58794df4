"""The training loop against a reference in plain torch: after ten steps both have the same weights.

The reference below takes nothing from `lib.training`. It works in float64, so that what differs is a wrong formula and
not rounding. Its constants are those of the documentation.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib import randomness
from lib.errors import BadConfig, NonFiniteLoss
from lib.runtime import Runtime
from lib.training import checkpoint, loop
from tests.trainings import CPU, Killed, MeanOfRows, context

SEED, LABEL, CLS, BATCH, STEPS = 3, "tiny", 2, 4, 10
BETAS, EPS = (0.9, 0.95), 1e-8
# Rise over 20 % of ten steps, stay, fall over the last 40 % to 0, which step 10 would have
FACTORS = (0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25)
MATRICES = ("backbone.up.weight", "backbone.down.weight")
HEAD = ("head.weight", "head.bias")
EMBEDDING = "backbone.embedding.weight"


class Tiny(nn.Module):
    """Embedding, a block with a norm and two matrices, dropout, a linear head."""

    backbone_names = ("backbone.",)

    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict(
            {"embedding": nn.Embedding(9, 6), "norm": nn.LayerNorm(6), "up": nn.Linear(6, 10), "down": nn.Linear(10, 6)}
        )  # fmt: skip
        self.dropout, self.head = nn.Dropout(0.25), nn.Linear(6, 1)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.4 * torch.randn(p.shape, generator=generator))
        self.double()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone["embedding"]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.backbone["embedding"](ids)
        x = x + self.backbone["down"](F.gelu(self.backbone["up"](self.backbone["norm"](x))))
        return self.head(self.dropout(x.mean(1))).squeeze(-1)


def loss_of(model: nn.Module, rows: range) -> dict[str, Tensor]:
    """Squared error on fixed rows, the same in the loop and in the reference."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 9, (BATCH * STEPS, 5), generator=generator)
    wanted = torch.randn(BATCH * STEPS, generator=generator, dtype=torch.float64)
    ids[:, 0] = CLS
    error = (model(ids[rows.start : rows.stop]) - wanted[rows.start : rows.stop]).square().mean()
    return {"loss": error, "twice": 2 * error}


def orthogonal(matrix: Tensor) -> Tensor:
    """Five Newton-Schulz iterations with Muon's coefficients."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


@pytest.fixture(autouse=True)
def in_double_precision(monkeypatch):
    """Like the tiny model's weights, so that the loop and the reference agree to many digits."""
    monkeypatch.setattr(Runtime, "matrix_dtype", torch.float64)


# --- the reference ---------------------------------------------------------------------------------------------------


def reference(
    optimizer: str = "adamw",
    rate: float = 0.1,
    muon_rate: float = 0.2,
    head_rate: float | None = None,
    weight_decay: float = 0.2,
    clip: float = 1e9,
    ema_decay: float = 0.0,
    frozen_until: int = 0,
) -> list[dict[str, Any]]:
    """After each step: weights, averaged weights, loss, norm of the gradient."""
    model, history = Tiny().train(), []
    weights = dict(model.named_parameters())
    ema = {n: w.detach().clone() for n, w in weights.items()}
    first = {n: torch.zeros_like(w) for n, w in weights.items()}
    second, updates = copy.deepcopy(first), dict.fromkeys(weights, 0)
    momentum = copy.deepcopy(first)
    for step, factor in enumerate(FACTORS):
        torch.manual_seed(randomness.key(SEED, f"{LABEL} dropout", step) % 2**63)
        loss = loss_of(model, range(step * BATCH, (step + 1) * BATCH))["loss"]
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        if step < frozen_until:  # the head learns, and of the backbone the embedding of [CLS]
            only_cls = torch.zeros_like(gradients[EMBEDDING])
            only_cls[CLS] = gradients[EMBEDDING][CLS]
            gradients = {n: gradients[n] for n in HEAD} | {EMBEDDING: only_cls}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        with torch.no_grad():
            for name, gradient in gradients.items():
                g, w = gradient * min(1.0, clip / (norm + 1e-6)), weights[name]
                if optimizer == "muon" and name in MATRICES:
                    momentum[name].mul_(0.85).add_(0.15 * g)
                    rate_of_matrix = factor * muon_rate
                    w.mul_(1 - rate_of_matrix * weight_decay)
                    w.sub_(
                        rate_of_matrix
                        * 0.2
                        * max(w.shape) ** 0.5
                        * orthogonal(0.15 * g + 0.85 * momentum[name])
                    )
                    continue
                updates[name] += 1
                lr = factor * (head_rate if head_rate is not None and name in HEAD else rate)
                if name in MATRICES:
                    w.mul_(1 - lr * weight_decay)
                first[name].mul_(BETAS[0]).add_((1 - BETAS[0]) * g)
                second[name].mul_(BETAS[1]).add_((1 - BETAS[1]) * g * g)
                mean = first[name] / (1 - BETAS[0] ** updates[name])
                square = second[name] / (1 - BETAS[1] ** updates[name])
                w.sub_(lr * mean / (square.sqrt() + EPS))
            kept = min(ema_decay, (1 + step) / (10 + step))
            for name, w in weights.items():
                ema[name] = kept * ema[name] + (1 - kept) * w
        copied = {n: w.detach().clone() for n, w in weights.items()}
        history.append({"weights": copied, "ema": dict(ema), "loss": loss.item(), "norm": norm})
    return history


# --- the loop --------------------------------------------------------------------------------------------------------


class Objective(MeanOfRows):
    """`loss_of`, with given values at evaluations; records its arguments."""

    selection, tokens_per_row, cls_id = "error", 5, CLS

    def __init__(self, values: tuple[float, ...] = (), kill_at: int | None = None):
        self.values, self.kill_at = list(values), kill_at
        self.rows: list[tuple[int, range]] = []
        self.evaluated: list[dict[str, Tensor]] = []

    def loss(self, model: nn.Module, step: int, rows: range) -> dict[str, Tensor]:
        if step == self.kill_at:
            raise Killed
        assert model.training and torch.is_grad_enabled()
        self.rows.append((step, rows))
        return loss_of(model, rows)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3)  # random draws of an evaluation must not affect the training
        self.evaluated.append({n: p.detach().clone() for n, p in model.named_parameters()})
        number = len(self.evaluated)
        return {"error": self.values[number - 1] if self.values else 1.0 / number, "number": number}


def save(model: nn.Module, folder: Path) -> None:
    save_file({n: p.detach().clone() for n, p in model.named_parameters()}, str(folder / "model.safetensors"))


def read(folder: Path) -> dict[str, Tensor]:
    return load_file(str(folder / "model.safetensors"))


def run(folder: Path, objective: Any, model: nn.Module | None = None, **changes) -> loop.Result:
    base: dict[str, Any] = {
        "steps": STEPS, "batch_size": BATCH, "warmup_fraction": 0.2, "decay_fraction": 0.4, "optimizer": "adamw",
        "learning_rate": 0.1, "muon_learning_rate": 0.2, "muon_momentum": 0.85, "weight_decay": 0.2, "ema_decay": 0.0,
        "gradient_clip": 1e9, "evaluate_every": 4, "checkpoint_every": 3,
    }  # fmt: skip
    return loop.train(model or Tiny(), objective, context(LABEL, SEED, **base | changes), folder, save)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


# Settings of the reference, and the same for the loop
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "no decay": ({"weight_decay": 0.0}, {"weight_decay": 0.0}),
    "clipping": ({"clip": 3.0}, {"gradient_clip": 3.0}),
    "averaging": ({"ema_decay": 0.3}, {"ema_decay": 0.3}),  # the warmup of the decay applies until step 2
    "slow averaging": ({"ema_decay": 0.98}, {"ema_decay": 0.98}),  # it applies throughout
    "head": ({"head_rate": 0.02}, {"head_learning_rate": 0.02}),
    "frozen": ({"frozen_until": STEPS}, {"freeze_backbone": True}),
    "unfrozen": ({"frozen_until": 4}, {"freeze_backbone": True, "unfreeze_at_step": 4}),
    "all": (
        {"clip": 3.0, "ema_decay": 0.3, "head_rate": 0.02, "frozen_until": 4},
        {"gradient_clip": 3.0, "ema_decay": 0.3, "head_learning_rate": 0.02, "freeze_backbone": True,
         "unfreeze_at_step": 4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("case", CASES)
def test_the_loop_ends_with_the_weights_of_the_reference(case, optimizer, tmp_path):
    ours, theirs = CASES[case]
    expected = reference(optimizer, **ours)
    if "clip" in ours:  # some gradients are clipped, others are not
        assert min(e["norm"] for e in expected) < ours["clip"] < max(e["norm"] for e in expected)
    model, objective = Tiny(), Objective()
    result = run(tmp_path, objective, model, optimizer=optimizer, **theirs)
    assert_same({n: p.detach() for n, p in model.named_parameters()}, expected[-1]["weights"])
    kept = "ema" if ours.get("ema_decay") else "weights"
    assert_same(read(tmp_path / "final_model"), expected[-1][kept])
    # The record has the full rates, not those that the schedule ended with
    rates = {group["group"]: group["learning_rate"] for group in result.optimizer["groups"]}
    assert rates["hidden matrices"] == (0.2 if optimizer == "muon" else 0.1)
    assert rates.get("head") == ours.get("head_rate")
    frozen = result.optimizer["frozen"]
    assert (frozen and (frozen["until_step"], frozen["only_cls_learns"])) == (
        (ours["frozen_until"], [EMBEDDING]) if "frozen_until" in ours else None
    )
    assert frozen is None or set(frozen["names"]) == expected[0]["weights"].keys() - {*HEAD, EMBEDDING}
    # Every evaluation sees the averaged weights; the last one has the best value
    assert len(objective.evaluated) == 3
    for step, seen in zip((4, 8, 10), objective.evaluated, strict=True):
        assert_same(seen, expected[step - 1][kept])
    assert_same(read(tmp_path / "best_model"), expected[-1][kept])
    # metrics.jsonl has the means over the steps since the last evaluation, of the norm before clipping too
    found = lines(tmp_path)
    for line, (begin, end) in zip(found, ((0, 4), (4, 8), (8, 10)), strict=True):
        mean = {what: sum(e[what] for e in expected[begin:end]) / (end - begin) for what in ("loss", "norm")}
        wanted = {"loss": mean["loss"], "twice": 2 * mean["loss"], "gradient_norm": mean["norm"]}
        assert line["train"] == pytest.approx(wanted, rel=1e-9) and line["step"] == end


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kill_at", [2, 4, 7])
def test_a_run_that_was_killed_ends_with_them_too(kill_at, optimizer, tmp_path):
    ours, theirs = CASES["all"]
    with pytest.raises(Killed):
        run(tmp_path, Objective(kill_at=kill_at), optimizer=optimizer, **theirs)
    model, objective = Tiny(), Objective()
    run(tmp_path, objective, model, optimizer=optimizer, **theirs)
    assert objective.rows[0][0] == kill_at // 3 * 3
    expected = reference(optimizer, **ours)
    assert_same({n: p.detach() for n, p in model.named_parameters()}, expected[-1]["weights"])
    assert_same(read(tmp_path / "final_model"), expected[-1]["ema"])
    assert [line["train"]["gradient_norm"] for line in lines(tmp_path)] == pytest.approx(
        [sum(e["norm"] for e in expected[a:b]) / (b - a) for a, b in ((0, 4), (4, 8), (8, 10))]
    )


# --- what is asked for, and when -------------------------------------------------------------------------------------


def test_every_step_gets_its_own_rows_and_evaluations_and_checkpoints_come_when_they_are_due(
    tmp_path, monkeypatch
):
    saved, real = [], checkpoint.save

    def spy(folder, tensors, state, *rest):
        saved.append(state["step"])
        real(folder, tensors, state, *rest)

    monkeypatch.setattr(checkpoint, "save", spy)
    objective = Objective()
    result = run(tmp_path, objective, evaluate_every=4, checkpoint_every=5)
    assert objective.rows == [(step, range(4 * step, 4 * step + 4)) for step in range(STEPS)]
    assert [line["step"] for line in lines(tmp_path)] == [4, 8, 10]  # every fourth, and the last
    assert saved == [5]  # every fifth, except the last: a finished run needs no checkpoint
    assert result.steps == STEPS


@pytest.mark.parametrize(
    "values, best", [((3.0, 1.0, 1.0, 2.0), 6), ((1.0, 2.0, 3.0, 0.5), 10), ((-1.0, 2.0, -1.0, 0.0), 3)]
)
def test_the_best_step_is_the_first_of_the_lowest_selection(values, best, tmp_path):
    objective = Objective(values)
    result = run(tmp_path, objective, evaluate_every=3, ema_decay=0.3)
    expected = reference(ema_decay=0.3)
    number = (3, 6, 9, 10).index(best)
    assert (result.best_step, result.metrics) == (best, {"error": values[number], "number": number + 1})
    assert_same(read(tmp_path / "best_model"), expected[best - 1]["ema"])
    assert_same(read(tmp_path / "final_model"), expected[-1]["ema"])
    assert [line["selection"]["error"] for line in lines(tmp_path)] == list(values)


def test_a_best_step_from_before_a_kill_is_still_the_best(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, Objective((1.0, 2.0), kill_at=7), evaluate_every=3)
    result = run(tmp_path, Objective((3.0, 4.0)), evaluate_every=3)
    assert (result.best_step, result.metrics["error"]) == (3, 1.0)
    assert_same(read(tmp_path / "best_model"), reference()[2]["weights"])


def test_a_run_without_a_checkpoint_begins_its_metrics_anew(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, Objective(kill_at=2), evaluate_every=1, checkpoint_every=5)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    run(tmp_path, Objective(), evaluate_every=1, checkpoint_every=5)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 11))


def test_dropout_is_a_function_of_seed_label_and_step(tmp_path):
    """Draws from torch's generator in the objective or in an evaluation do not affect the next step."""

    class Draws(Objective):
        def loss(self, model, step, rows):
            terms = super().loss(model, step, rows)
            torch.rand(step + 1)
            return terms

    torch.manual_seed(99)
    model = Tiny()
    run(tmp_path, Draws(), model, evaluate_every=1)
    assert_same({n: p.detach() for n, p in model.named_parameters()}, reference()[-1]["weights"])


# --- what stops a run ------------------------------------------------------------------------------------------------


class Breaks(Objective):
    """At step 5 the loss is not finite, or its gradient is not although the loss is."""

    def __init__(self, what: str):
        super().__init__()
        self.what = what

    def loss(self, model, step, rows):
        terms = super().loss(model, step, rows)
        if step == 5 and self.what == "loss":
            terms["loss"] = terms["loss"] * math.inf
        elif step == 5:
            terms["loss"] = (
                terms["loss"] + (dict(model.named_parameters())["head.bias"].sum() * 0).abs().sqrt()
            )  # 0, but its slope is not
        return terms


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_what_is_not_finite_stops_before_the_update(what, tmp_path):
    model = Tiny()
    with pytest.raises(NonFiniteLoss, match=f"the {what} at step 5 is .*precision=fp32") as caught:
        run(tmp_path, Breaks(what), model)
    assert "training.precision" not in str(caught.value)
    assert_same({n: p.detach() for n, p in model.named_parameters()}, reference()[4]["weights"])
    bundle = json.loads((tmp_path / "non_finite.json").read_text())
    assert (bundle["step"], bundle["rows"], bundle["seed"]) == (5, [20, 24], SEED)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_selection_that_is_no_number_chooses_no_model(value, tmp_path):
    with pytest.raises(NonFiniteLoss, match="error on the selection split at step 8 is"):
        run(tmp_path, Objective((1.0, value)))
    assert_same(read(tmp_path / "best_model"), reference()[3]["weights"])


# --- a resume that is not exact ---------------------------------------------------------------------------------------


def test_after_an_inexact_resume_the_best_model_is_still_the_one_of_the_record(tmp_path, monkeypatch):
    """The best step after the checkpoint is worse the second time: neither its value nor its weights are kept."""
    with pytest.raises(Killed):  # the checkpoint is that of step 5, the best model on the disk that of step 6
        run(tmp_path, Objective((2.0, 1.0, 0.1, 0.2), kill_at=9), evaluate_every=2, checkpoint_every=5)
    assert_same(read(tmp_path / "best_model"), reference()[5]["weights"])
    monkeypatch.setattr(type(CPU), "fingerprint", lambda self: {"torch": "another"})
    with pytest.raises(BadConfig, match="allow_inexact_resume"):
        run(tmp_path, Objective(), evaluate_every=2, checkpoint_every=5)
    result = run(
        tmp_path, Objective((5.0, 6.0, 7.0)), evaluate_every=2, checkpoint_every=5, allow_inexact_resume=True
    )
    assert (result.best_step, result.metrics["error"]) == (4, 1.0)
    assert_same(read(tmp_path / "best_model"), reference()[3]["weights"])
    assert [line["selection"]["error"] for line in lines(tmp_path)] == [2.0, 1.0, 5.0, 6.0, 7.0]
