"""A text that is too long for a model that must read it as a whole is refused by name, before any training."""

import json

import numpy as np
import pyarrow as pa
import pytest

from lib.config import Config, load_config
from lib.errors import BadData
from lib.examples import ExampleCounters
from lib.tokenization import train_tokenizer
from lib.training.data import Sequences
from lib.training.lengths import WholeTexts, contexts_of
from lib.training.objectives.base import batch_losses
from lib.training.stage_inputs import StageInputs, refuse_longer_candidates
from lib.training.train_model import context_of, make_objective
from tests.conftest import run_stages
from tests.trainings import CPU

LONGEST = 9


def config_of(*overrides: str) -> Config:
    return load_config(quick_test=True, overrides=overrides)


def candidates(longest: int = LONGEST, split: str = "train") -> pa.Table:
    """Two candidates of each of four examples; the first of the last example is the longest."""
    lengths = [3, 4, 3, 4, 5, 3, longest, 4]
    return pa.table(
        {
            "example_id": [f"{split}:{i // 2}" for i in range(8)],
            "group": [f"g{i // 2}" for i in range(8)],
            "token_ids": pa.array([[5] * n for n in lengths], pa.list_(pa.int32())),
            "token_labels": pa.array(
                [[0, 1] * (n // 2) + [0] * (n % 2) for n in lengths], pa.list_(pa.int8())
            ),
            "token_confidence": pa.array([[-1.0] * n for n in lengths], pa.list_(pa.float32())),
            "reward": [0.25, 1.0] * 4,
            "changed_fraction": [0.75, 0.0] * 4,
            "term_x": [0.5, 0.5] * 4,
        }
    )


def stage_inputs(config: Config, tables: dict[str, pa.Table], fresh=None, prompt: str = "") -> StageInputs:
    tokenizer = train_tokenizer("character", ["abcdefgh"], 0)
    prompts = pa.table({"prompt": ["", prompt]})
    return StageInputs(
        config, tokenizer, CPU, lambda split: prompts, tables.__getitem__, open_stream=lambda name: fresh
    )


def objective_of(name: str, given: StageInputs, context_length: int):
    spec = given.config.models[name]
    return make_objective(context_of(name, spec, given), spec, given, context_length)


MODELS = ["inspector", "judge", "ranker"]
SPLITS = ["train", "selection", "held_out"]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_reads_less_than_a_candidate_is_refused(name, split):
    config = config_of()
    tables = {s: candidates(LONGEST if s == split else 5, s) for s in SPLITS}
    with pytest.raises(BadData) as caught:
        objective_of(name, stage_inputs(config, tables), LONGEST - 1)
    for said in (f"1 of 8 texts are longer than models.{name} reads", f"{split}:3 has 9 tokens", "the context is 8",
                 "architecture.context=9", "data.passage_characters=56 or less"):  # fmt: skip
        assert said in str(caught.value)
    assert objective_of(name, stage_inputs(config, tables), LONGEST) is not None


@pytest.mark.parametrize("name", ["inspector", "judge"])
def test_so_is_one_that_learns_from_fresh_candidates(name):
    config = config_of()

    class Fresh:
        def rows(self, rows):
            return candidates(LONGEST)

    fine = {s: candidates(5, s) for s in SPLITS}
    objective = objective_of(name, stage_inputs(config, fine, Fresh()), LONGEST - 1)
    with pytest.raises(BadData, match=rf"models\.{name} reads.*train:3 has 9 tokens"):
        batch_losses(objective, None, 0, range(4))  # type: ignore[arg-type]


@pytest.mark.parametrize("split", SPLITS)
def test_all_models_are_looked_at_before_the_first_is_trained(split):
    config = config_of("architecture.context=8", "architecture.num_attention_heads=2", "models.judge.start=scratch",
                       "models.judge.architecture.context=12")  # fmt: skip
    tables = {s: candidates(LONGEST if s == split else 5, s) for s in SPLITS}
    given = stage_inputs(config, tables)
    for names in (["generator", "inspector"], ["ranker"]):
        with pytest.raises(BadData, match=rf"models\.{names[-1]} reads.*{split}:3"):
            refuse_longer_candidates(config, names, given)
    refuse_longer_candidates(config, ["generator", "reference_lm", "judge"], given)  # windows; 12 tokens
    # With prompts it reads texts, within its budgets
    refuse_longer_candidates(config, ["ranker"], stage_inputs(config, tables, prompt="what?"))


def test_sequences_are_never_cut():
    column = candidates()["token_ids"]
    with pytest.raises(BadData, match=f"sequence 6 has {LONGEST} tokens, but the model reads {LONGEST - 1}"):
        Sequences(column, LONGEST - 1, 0)
    ids, valid = Sequences(column, LONGEST + 1, 0).batch(np.array([6, -1, 0]))
    assert valid.sum(1).tolist() == [LONGEST, 0, 3] and (ids[0, :LONGEST] == 5).all()


def test_a_model_reads_what_its_start_reads(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 33}))
    config = config_of("generator.architecture.context=40", "models.judge.start=scratch",
                       "models.judge.architecture.context=20", "models.ranker.start=judge",
                       f"models.ar_baseline.start={tmp_path}", "models.reference_lm.start=nowhere")  # fmt: skip
    assert contexts_of(config) == {"generator": 40, "reference_lm": None, "ar_baseline": 32, "inspector": 40,
                                   "judge": 20, "ranker": 20}  # fmt: skip
    least = WholeTexts.of(config)
    assert least is not None and (least.model, least.context) == (
        "judge",
        20,
    )  # never a language model
    for model, advice in (("ranker", "models.judge.architecture.context alone"), ("inspector", "")):
        problem = WholeTexts(model, 8, config).add(candidates()).problem() or ""
        assert "architecture.context=9 or more" in problem and ("alone" in problem) == bool(advice)
        assert advice in problem
    no_limit = WholeTexts.of(load_config(["configs/nelbo.yaml"]))
    assert no_limit is not None and no_limit.add(candidates()).problem() is None
    assert WholeTexts.of(load_config(["configs/finqa.yaml"])) is None


def test_stage_01_refuses_before_any_model_is_made(tmp_path):
    config = config_of("data.passage_characters=256")
    with pytest.raises(
        BadData, match=r"models\.inspector reads.*has 256 tokens.*passage_characters=64 or less"
    ):
        run_stages(tmp_path / "run_001", config, ("00_check_data", "01_prepare_dataset"))
    assert not (tmp_path / "run_001" / "01_prepare_dataset" / "manifest.json").exists()


def test_stage_01_does_not_mind_long_texts_that_get_no_candidates():
    counters = ExampleCounters(WholeTexts("judge", 8, config_of()))
    table = pa.table(
        {
            "example_id": ["a", "b"],
            "split": ["train", "reference"],
            "target": ["x" * 8, "y" * 9],
            "tags": pa.array([None, None], pa.list_(pa.string())),
            "token_ids": pa.array([[4] * 8, [4] * 9], pa.list_(pa.int32())),
        }
    )
    counters.add(table)
    assert counters.whole is not None
    assert counters.whole.problem() is None and counters.whole.total == 1
    counters.add(table.set_column(1, "split", pa.array(["reference", "selection"])))
    assert "1 of 2 texts" in (counters.whole.problem() or "") and "b has 9 tokens" in (
        counters.whole.problem() or ""
    )


def test_parts_that_were_counted_under_another_context_are_judged_by_the_present_one():
    """Stage 01 refuses, the user raises the context, and the parts are already complete."""
    counted = json.loads(json.dumps(WholeTexts("judge", 4, config_of()).add(candidates()).state()))
    for context, longer in ((LONGEST, 0), (LONGEST - 1, 1), (4, 2)):
        texts = WholeTexts("judge", context, config_of())
        texts.merge(counted)
        assert (texts.longer, texts.total, texts.longest) == (longer, 8, LONGEST)
        assert (texts.problem() is None) == (longer == 0)


def test_parts_that_were_made_before_a_model_reads_whole_texts_are_counted():
    """Stage 01 is stopped, then a judge is added to the config, and the stage goes on."""
    none = config_of("models.inspector=null", "models.judge=null", "models.ranker=null")
    table = pa.table({"example_id": ["a"], "split": ["train"], "target": ["x" * 9], "tags": pa.array([None], pa.list_(pa.string())),
                      "token_ids": pa.array([[4] * 99], pa.list_(pa.int32()))})  # fmt: skip
    counters = ExampleCounters(WholeTexts.of(none))
    counters.add(table)
    assert counters.whole is not None and counters.whole.problem() is None
    later = ExampleCounters(WholeTexts.of(config_of()))
    later.merge(json.loads(json.dumps(counters.state())))
    assert later.whole is not None and "1 of 1 texts" in (later.whole.problem() or "")
