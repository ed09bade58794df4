"""No model, step or calibration is chosen on reported data: only the selection split chooses."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from lib.config import load_config
from lib.errors import BadConfig, BadData
from lib.models.build import start_model
from lib.sections.models import ModelSpec
from lib.tasks import Document, Example
from lib.tasks.text import prepare
from lib.tokenization import train_tokenizer
from lib.training import train_model
from lib.training.data import Splits
from lib.training.loop import train
from lib.training.objectives import token_critic
from lib.training.objectives.base import TrainingContext
from lib.training.objectives.language_model import MaskedDiffusion
from lib.training.objectives.token_critic import TokenCritic, nelbo_and_auroc
from lib.training.pool_table import PoolTable
from lib.training.stage_inputs import StageInputs
from tests.trainings import CPU, TOKENS, MeanOfRows, context, fingerprint, settings, splits, windows

LETTERS = "abcdefghij"
SPLITS = ("train", "selection", "held_out")
K = 2


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("character", [LETTERS], 0)


def examples(split: str, seed: int, count: int = 12) -> pa.Table:
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list(LETTERS), 12)) for _ in range(count)]
    return pa.table(
        {
            "example_id": [f"{split}{i}" for i in range(count)],
            "target": pa.array(texts, pa.large_string()),
            "prompt": [""] * count,
            "group": [f"{split}{i // 2}" for i in range(count)],
            "continues": [False] * count,
            "token_ids": pa.array([[4 + LETTERS.index(c) for c in t] for t in texts], pa.list_(pa.int32())),
        }
    )


def candidates(split: str, seed: int) -> pa.Table:
    """Two candidates of each example; some tokens of the second are replaced."""
    table, rng = examples(split, seed), np.random.default_rng(seed + 100)
    rows = []
    for row in table.to_pylist():
        for number in range(K):
            labels = (rng.random(12) < 0.5 * number).astype(int)
            ids = np.where(labels, rng.integers(4, 14, 12), row["token_ids"])
            rows.append({"example_id": row["example_id"], "candidate_id": number, "group": row["group"], "text": "x",
                         "token_ids": ids.tolist(), "token_labels": labels.tolist(), "token_confidence": None,
                         "changed_fraction": None, "reward": 1 - float(labels.mean()), "term_a": 0.5})  # fmt: skip
    fields = {"token_ids": pa.list_(pa.int32()), "token_labels": pa.list_(pa.int8()), "reward": pa.float64(),
              "token_confidence": pa.list_(pa.float32()), "changed_fraction": pa.float64(), "term_a": pa.float64()}  # fmt: skip
    return pa.table({n: pa.array([r[n] for r in rows], fields.get(n)) for n in rows[0]})


def stage_inputs(tokenizer: Any, tampered: str | None = None, **changes: Any) -> StageInputs:
    """Small tables of the three splits; the texts of the split `tampered` are different ones."""
    config = load_config(quick_test=True, overrides=["candidates.per_example=2"])
    seeds = {split: number + 50 * (split == tampered) for number, split in enumerate(SPLITS)}
    given: dict[str, Any] = {
        "read_examples": lambda split: examples(split, seeds[split]),
        "read_candidates": lambda split: candidates(split, seeds[split]),
    } | changes
    return StageInputs(config, tokenizer, CPU, **given)


def spec_of(mode: Any, **changes: Any) -> ModelSpec:
    config = load_config(quick_test=True)
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "context": 16}
    training = settings(steps=2, evaluate_every=1, batch_size=4, evaluation_examples=8)
    return ModelSpec(mode=mode, architecture=config.architecture.model_copy(update=shape), training=training,
                     **changes)  # fmt: skip


MODES = {
    "generator": spec_of("language_model"),
    "causal": spec_of("language_model", attention="causal"),
    "inspector": spec_of("token_classifier"),
    "judge": spec_of("sequence_scorer"),
    "classes": spec_of("sequence_scorer", target_type="classification", num_classes=3),
    "ranker": spec_of("ranker"),
}


def objective_of(name: str, given: StageInputs):
    return train_model.make_objective(
        train_model.context_of(name, MODES[name], given), MODES[name], given, 16
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MODES)
def test_what_is_reported_chooses_nothing(tokenizer, tmp_path, name):
    """Other held-out text changes the report but neither metrics.jsonl nor the best model; other selection text changes the metrics."""

    def run(tampered: str | None) -> tuple[dict[str, str], dict]:
        folder = tmp_path / str(tampered)
        record = train_model.train_model(name, MODES[name], stage_inputs(tokenizer, tampered), folder, None)
        return fingerprint(folder), record["held_out"]

    (bits, report), (same, other), (chosen, _) = run(None), run("held_out"), run("selection")
    assert bits == same and report != other
    assert chosen["metrics.jsonl"] != bits["metrics.jsonl"]
    assert chosen["final_model/model.safetensors"] == bits["final_model/model.safetensors"]


def test_stages_of_unmasking_move_on_by_the_selection_split(tokenizer):
    stage = "{type: random, max_masked_ratio: 0.6, val_loss_stale_count: 2}"
    staged = load_config(quick_test=True, overrides=[f"diffusion.stages=[{stage}, {stage}]"])

    def losses(tampered: str | None) -> list[float]:
        given = replace(stage_inputs(tokenizer, tampered), config=staged)
        model, _ = start_model(
            "language_model", MODES["generator"].architecture, "bidirectional", len(tokenizer), 0, "g"
        )
        with torch.no_grad():
            for number, p in enumerate(model.parameters()):
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
        made: Any = objective_of("generator", given)
        return made.stage_losses(model.eval())

    assert losses(None) == losses("held_out") != losses("selection")


def critic_of(tampered: str | None) -> TokenCritic:
    config = load_config(quick_test=True)
    parts = splits()
    if tampered is not None:
        other = windows().tiled()
        other.text = replace(other.text, tokens=np.roll(other.ids, 7)[::-1].copy())
        parts = replace(parts, **{tampered: other})
    made = context("critic", batch_size=8, evaluation_examples=8)
    diffusion = MaskedDiffusion(made, parts, config.diffusion, TOKENS)
    return TokenCritic(config.critic, diffusion, [0, 1, 2, 3])


@pytest.mark.slow
@torch.no_grad()
def test_the_critics_calibration_is_fitted_on_the_selection_split_alone(monkeypatch):
    monkeypatch.setattr(token_critic, "REPORT_DRAWS", 1)
    model, _ = start_model("language_model", load_config(quick_test=True).architecture, "bidirectional", 14, 0, "t",
                           critic_layers=1)  # fmt: skip
    for number, p in enumerate(model.parameters()):
        p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
    model.eval()
    found = {tampered: critic_of(tampered).report(model) for tampered in (None, "held_out", "selection")}
    assert found[None][2] == found["held_out"][2] and found[None][2] != found["selection"][2]
    values = [found[t][0]["detection"]["critic"] for t in (None, "held_out", "selection")]
    assert values[0] == values[2] != values[1]  # and measured on the held-out split alone
    assert (
        critic_of(None).evaluate(model)
        == critic_of("held_out").evaluate(model)
        != critic_of("selection").evaluate(model)
    )


# ------------------------------------------------------------------------------------ generator and critic


class Planted(MeanOfRows):
    """An objective whose evaluations are given; its weights count the steps."""

    selection, tokens_per_row = "nelbo_and_auroc", 1

    def __init__(self, found: list[tuple[float, float]], weight: float):
        self.found, self.weight = iter(found), weight

    def loss(self, model, step, rows):
        return {"loss": model.weight.sum() * 1.0}

    def evaluate(self, model):
        nelbo, auroc = next(self.found)
        return {"nelbo_and_auroc": nelbo_and_auroc(nelbo, auroc, self.weight), "nelbo": nelbo, "auroc": auroc}


SEEN = [
    (2.40, 0.55),
    (2.20, 0.69),
    (2.19, 0.62),
    (2.31, 0.75),
]  # NELBO alone: the third, AUROC alone: the fourth


@pytest.mark.parametrize(
    ("found", "weight", "best"),
    [
        (SEEN, 1.0, 2),
        (SEEN, 0.0, 3),
        (SEEN, 10.0, 4),
        ([(2.5, float("nan")), (2.4, 0.6), (2.4, 0.5), (2.4, float("nan"))], 1.0, 2),
        ([(2.0, 0.70), (2.02, 0.71), (1.99, 0.69), (2.005, 0.71)], 1.0, 4),
    ],
)
def test_the_best_step_weighs_the_generator_and_the_critic(tmp_path, found, weight, best):
    steps = settings(steps=4, evaluate_every=1, optimizer="adamw")
    result = train(torch.nn.Linear(2, 2), Planted(found, weight), TrainingContext("planted", 0, steps, CPU), tmp_path,
                   lambda m, path: (path / "weights").write_text("w"))  # fmt: skip
    assert result.best_step == best
    assert result.metrics["nelbo"] == found[best - 1][0]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"step", "train", "selection"}] * 4


@pytest.mark.parametrize("weight", [0.0, 0.5])
@torch.no_grad()
def test_joint_critics_are_evaluated_by_the_formula_that_the_config_documents(weight):
    target = critic_of(None)
    target.config = target.config.model_copy(update={"selection_weight": weight})
    model, _ = start_model("language_model", load_config(quick_test=True).architecture, "bidirectional", 14, 0, "t",
                           critic_layers=1)  # fmt: skip
    values = target.evaluate(model.eval())
    assert target.joint and target.selection == "nelbo_and_auroc"
    assert values["nelbo_and_auroc"] == pytest.approx(values["nelbo"] + weight * (1 - values["auroc"]))


# ------------------------------------------------------------------------------------ pools


def pools(rewards: Mapping[str, Sequence[float]]) -> StageInputs:
    """A StageInputs whose splits hold one pool each of the given rewards."""

    def read(split: str) -> pa.Table:
        rows = [{"example_id": split, "candidate_id": i, "text": "t", "kind": "x", "value": "", "control": "c",
                 "reward": reward} for i, reward in enumerate(rewards.get(split, []))]  # fmt: skip
        return pa.Table.from_pylist(rows) if rows else pa.table({"example_id": pa.array([], pa.string())})

    def asked(split: str) -> pa.Table:
        return pa.Table.from_pylist([{"example_id": split, "prompt": "p", "tags": [], "group": split}])

    config = load_config(quick_test=True, overrides=["candidates.per_example=2"])
    return StageInputs(config, None, CPU, asked, read)


def test_pools_for_selection_come_from_the_selection_split_or_not_at_all():
    both = pools({"selection": [1, 0], "held_out": [0, 1]})
    assert both.pools_for_selection().example_ids == ["selection"]
    for found in ({"held_out": [1, 0]}, {"held_out": [1, 0], "selection": [1, 1]}):
        with pytest.raises(
            BadData, match=r"selection.*data\.selection_fraction.*01_prepare_dataset\.py --overwrite"
        ):
            pools(found).pools_for_selection()


def test_an_error_of_another_kind_is_not_taken_for_a_missing_split():
    def read(split: str) -> pa.Table:
        raise BadData("the table candidates was written with another tokenizer")

    with pytest.raises(BadData, match="another tokenizer"):
        replace(pools({}), read_candidates=read).pools_for_selection()


def test_rankers_without_prompts_say_which_split_is_undecided(tokenizer):
    def read(split: str) -> pa.Table:
        table = candidates(split, SPLITS.index(split))
        same = pa.array(np.ones(table.num_rows))
        return (
            table.set_column(table.column_names.index("reward"), "reward", same)
            if split == "selection"
            else table
        )

    with pytest.raises(BadData, match=r"split 'selection': no pool .*data\.selection_fraction"):
        objective_of("ranker", stage_inputs(tokenizer, read_candidates=read))


def choosing(name: str) -> PoolTable:
    """Two pools; with the scores of `ByTable` the choice is right in one of them, or in both."""
    right = np.array([[1.0, 0.0], [1.0, 0.0] if name == "selection" else [0.0, 1.0]])
    text = np.array([["a", "b"]] * 2, dtype=object)
    return PoolTable([name, name + "2"], ["p", "p"], [[], []], np.array([name, name + "2"]), np.zeros((2, 2), int), text,
                     None, text, text, right, {}, np.ones((2, 2), bool), {})  # fmt: skip


class ByTable:
    """A reader that always scores the first candidate higher."""

    settings, runtime = (
        SimpleNamespace(
            loss="cross_entropy",
            word_dropout=0.0,
            best_by="reward",
            sampled_candidates=None,
            attention="full",
        ),
        CPU,
    )

    def tokens_per_pool(self, table, packs=True, most=None):
        return 1

    def scores(self, model, rows, **_):
        return torch.tensor([[2.0, 0.0]]).repeat(len(rows.prompts), 1)

    def evaluation_pools(self, model, table):
        return 4

    def all_scores(self, model, table, **_):
        return np.tile([2.0, 0.0], (len(table), 1))


def test_rankers_with_prompts_and_policies_are_chosen_on_the_selection_pools():
    from lib.ranking.actor_critic import ActorCritic
    from lib.training.objectives.pool_choice import PoolChoice, PoolSplits
    from lib.training.policy import PolicyTraining, evaluate_policy

    train_pools, selection, held_out = (choosing(split) for split in SPLITS)
    reader: Any = ByTable()
    pools = PoolSplits([train_pools], selection, held_out)
    made = context("r", seed=0, evaluation_examples=8)
    chosen = PoolChoice(made, pools, reader).evaluate(torch.nn.Identity())
    assert chosen["accuracy"] == 1 and chosen["regret"] == 0
    config = load_config(quick_test=True)
    splits: Any = Splits(train_pools, selection, held_out)
    policy: Any = PolicyTraining(config, CPU, None, None, splits)  # type: ignore[arg-type]
    nothing: Any = torch.nn.Identity()
    found = evaluate_policy(ActorCritic(nothing, nothing), policy._choice("ppo", reader))
    assert found["accuracy"] == 1 and found["regret"] == 0


# ------------------------------------------------------------------------------------ the split


def prepared(contents: dict[str, str], *overrides: str) -> list[Example]:
    small = ["data.deduplicate=none", "data.passage_characters=64", "data.block_characters=256", *overrides]
    config = load_config(overrides=small)
    documents = [Document(name, content, "") for name, content in contents.items()]
    return [item for item in prepare(config, documents) if isinstance(item, Example)]


def prose(characters: int, seed: int = 0) -> str:
    return "".join(np.random.default_rng(seed).choice(list(LETTERS + " "), characters))


@pytest.mark.parametrize("unit", ["document", "block"])
def test_whole_groups_are_selected_by_their_own_hash(unit):
    contents = {f"d{i}": prose(1000, i) for i in range(120)}
    found = prepared(contents, f"data.split_unit={unit}", "data.selection_fraction=0.2")
    split_of: dict[str, set[str]] = {}
    for e in found:
        split_of.setdefault(e.group, set()).add(e.split)
    assert all(len(s) == 1 for s in split_of.values())
    train, chosen = (sum(s == {name} for s in split_of.values()) for name in ("train", "selection"))
    assert chosen / (train + chosen) == pytest.approx(0.2, abs=0.08)
    # Held-out and reference are as they were, whatever the share; what more documents bring changes no other's split
    other = prepared(contents, f"data.split_unit={unit}", "data.selection_fraction=0.4")
    kept = {"train": "mine", "selection": "mine"}
    assert [kept.get(e.split, e.split) for e in found] == [kept.get(e.split, e.split) for e in other]
    assert {e.group for e in found if e.split == "selection"} < {
        e.group for e in other if e.split == "selection"
    }
    more = prepared(
        contents | {"e": prose(1000, 999)}, f"data.split_unit={unit}", "data.selection_fraction=0.2"
    )
    assert [e.split for e in found] == [e.split for e in more if not e.example_id.startswith("e:")]
    first = [e.continues for e in found]
    assert not any(
        c and a.split != b.split for (a, b), c in zip(itertools.pairwise(found), first[1:], strict=True)
    )


@pytest.mark.parametrize("seed", range(6))
def test_small_data_has_one_group_to_choose_by(seed):
    found = prepared({"d": prose(3000)}, "data.selection_fraction=0.001", f"seed={seed}")
    chosen = {e.group for e in found if e.split == "selection"}
    assert len(chosen) == 1 and any(e.split == "train" for e in found)


def test_contiguous_text_is_selected_from_the_end_of_train():
    shares = "data.fractions={train: 0.8, held_out: 0.2}"
    usual = ["data.split=contiguous", shares, "models.reference_lm=null"]
    text = prose(20_000)
    found = {
        share: prepared({"d": text}, *usual, f"data.selection_fraction={share}")
        for share in (0.1, 0.3, 0.0001)
    }
    for share, these in found.items():
        parts = {split: "".join(e.target for e in these if e.split == split) for split in SPLITS}
        assert parts["train"] + parts["selection"] + parts["held_out"] == text
        assert len(parts["held_out"]) == pytest.approx(4000, abs=64)
        assert (
            len(parts["selection"]) == pytest.approx(max(share * 16_000, 64), abs=64) and parts["selection"]
        )
        assert not {e.group for e in these if e.split == "selection"} & {
            e.group for e in these if e.split != "selection"
        }
        held_out = [(e.example_id, e.target, e.group) for e in these if e.split == "held_out"]
        assert held_out == [(e.example_id, e.target, e.group) for e in found[0.1] if e.split == "held_out"]


def test_the_same_passage_is_not_in_train_and_selection():
    block = prose(200)
    found = prepared(
        {f"d{i}": block for i in range(40)}, "data.deduplicate=paragraph", "data.selection_fraction=0.5"
    )
    where: dict[str, set[str]] = {}
    for e in found:
        where.setdefault(e.target, set()).add(e.split)
    assert all(len(splits) == 1 for splits in where.values())


@pytest.mark.parametrize(
    "override", ["data.selection_fraction=0", "data.selection_fraction=0.6", "finqa.selection_share=0"]
)
def test_a_run_without_a_selection_split_is_no_config(override):
    with pytest.raises(BadConfig, match=override.partition("=")[0].replace(".", r"\.")):
        load_config(overrides=[override])


def test_labels_by_number_count_selection_as_a_part_of_train():
    from lib.labels import Label, Labels

    labels = Labels({("train", 0): Label(0.1), ("train", 1): Label(0.2), ("held_out", 0): Label(0.9)})
    found = labels.of(["a", "b", "c"], ["selection", "held_out", "train"])
    assert [label.score for label in found] == [0.1, 0.9, 0.2]
    alone = labels.of(["a", "b"], ["held_out", "selection"])
    assert [label.score for label in alone] == [0.9, 0.1], "also without an example of train"
