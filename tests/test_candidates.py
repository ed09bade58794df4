"""Stage 02: the training data of each generator, and the statistics of the candidates."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lib.candidates import generators
from lib.candidates.counters import CandidateCounters
from lib.candidates.generators import train_generators, without_fold
from lib.config import load_config
from lib.tasks import cross_fit_fold


def counted(*rows: tuple, labels_tell_origin: bool = True) -> dict[str, Any]:
    """The summary over rows of (example, split, kind, ids, labels, number of changed tokens)."""
    names = ("example_id", "split", "kind", "token_ids", "token_labels", "changed_fraction")
    table = pa.Table.from_pylist(
        [dict(zip(names, (*row[:5], row[5] / len(row[3])), strict=True)) for row in rows]
    )
    fractions = [float(np.mean(np.array(row[4]) > 0)) for row in rows]
    counters = CandidateCounters(labels_tell_origin)
    counters.add(table.append_column("synthetic_fraction", pa.array(fractions)))
    return counters.summary()


def test_generator_accuracy_counts_generated_tokens_that_equal_the_original():
    """The accuracy of a split is over all its generated tokens, without tokens that were not masked and random ones.

    The changed ones are counted when they are generated: the original may not be in the table, or may have other tokens.
    """
    found = counted(
        ("a", "train", "original", [1, 2, 3, 4], [0, 0, 0, 0], 0),
        ("a", "train", "masked_lm", [1, 2, 9, 4], [0, 2, 2, 0], 1),  # one of two
        ("a", "train", "masked_lm", [1, 2, 3, 4], [2, 2, 2, 0], 0),  # three of three: unchanged
        ("b", "held_out", "masked_lm", [8, 6], [2, 0], 1),  # none of one
        ("b", "held_out", "original", [5, 6], [0, 0], 0),
        (
            "c",
            "held_out",
            "masked_lm",
            [7] * 49,
            [2] * 49,
            1,
        ),  # 49 / 49 is a little less than 1 in floating point
        ("d", "test", "original", [5], [0], 0),
        ("d", "test", "random_tokens", [5], [1], 0),  # random, and as it was
    )
    assert found["generator_accuracy"] == {"train": 4 / 5, "held_out": 48 / 50}
    assert found["unchanged"] == 2 and found["rewritten"] == 5 and found["candidates"] == 8
    assert found["kinds"] == {"original": 3, "masked_lm": 4, "random_tokens": 1}


def test_labels_that_tell_only_what_changed_give_no_accuracy():
    """Class 2 is then wrong by definition: 0 % would be printed of any generator."""
    row = ("a", "train", "masked_lm", [1, 2, 9, 4], [0, 0, 2, 0], 1)
    assert counted(row, ("a", "train", "original", [1, 2, 3, 4], [0] * 4, 0))["generator_accuracy"] == {
        "train": 0
    }
    found = counted(row, ("a", "train", "original", [1, 2, 3, 4], [0] * 4, 0), labels_tell_origin=False)
    assert found["generator_accuracy"] == {} and found["rewritten"] == 1


def test_the_synthetic_share_is_that_of_rewritten_text():
    """Originals, of which nothing is synthetic, are not in it."""
    found = counted(
        ("a", "train", "original", [1, 2, 3, 4], [0, 0, 0, 0], 0),
        ("a", "train", "masked_lm", [1, 2, 9, 4], [0, 2, 2, 0], 1),
        ("b", "train", "original", [1, 2], [0, 0], 0),
        ("b", "train", "masked_lm", [1, 3], [2, 2], 1),
    )
    assert sum(found["synthetic_fraction_histogram"]) == 2
    assert found["mean_synthetic_fraction"] == pytest.approx(0.75, abs=0.026)  # the middles of bins of 0.05


def runs(continues: list[bool]) -> pa.Table:
    return pa.table({"number": list(range(len(continues))), "continues": continues})


def test_what_follows_a_gap_no_longer_continues_what_stood_before_it():
    table = runs([False, True, True, True, False, True])
    left = without_fold(table, [False, False, True, False, False, False])
    assert left["number"].to_pylist() == [0, 1, 3, 4, 5]
    assert left["continues"].to_pylist() == [False, True, False, False, True]
    assert without_fold(table, [False] * 6).equals(table)
    first = without_fold(table, [True, False, False, False, False, False])
    assert first["continues"].to_pylist() == [False, True, True, False, True]


@pytest.mark.parametrize("folds", [1, 3])
def test_a_fold_s_generator_learns_from_all_groups_but_its_own(tmp_path, monkeypatch, folds):
    config = load_config(quick_test=True, overrides=[f"candidates.cross_fit_folds={folds}"])
    groups = {"train": [f"g{i // 2}" for i in range(40)], "selection": ["s"] * 4, "held_out": ["h"] * 5}
    tables = {
        split: pa.table({"group": names, "continues": [False] * len(names)})
        for split, names in groups.items()
    }
    monkeypatch.setattr(generators, "select_split", lambda batches, split: tables[split])
    learned: dict[str, list[list]] = {}

    def train_model(name, spec, stage_inputs, folder, start):
        learned[name] = [stage_inputs.examples(split)["group"].to_pylist() for split in groups]
        assert start is None and spec.mode == "language_model"
        return {"parameters": 1, "best_step": 1, "held_out": {}}

    monkeypatch.setattr(generators, "train_model", train_model)
    stage: Any = SimpleNamespace(
        folder=tmp_path, stats={}, batches=lambda *_: [], add_folder=lambda *_: None, add_file=lambda *_: None
    )
    folders = train_generators(stage, config, None, None)
    assert len(learned) == len(folders) == folds
    fold_of = {g: cross_fit_fold(config.seed, g, folds) for g in groups["train"]}
    for fold, (name, (train, *others)) in enumerate(learned.items()):
        wanted = [g for g in groups["train"] if folds == 1 or fold_of[g] != fold]
        assert train == wanted and others == [groups["selection"], groups["held_out"]], name
        assert folds == 1 or 0 < len(train) < 40
        assert folders[fold] == tmp_path / name / "best_model"
