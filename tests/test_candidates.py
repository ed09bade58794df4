"""Stage 02: the training data of each generator, and the statistics of the candidates."""

import json
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
from lib.token_store import TokenStore, of_table


def counted(*rows: tuple, labels_tell_origin: bool = True) -> dict[str, Any]:
    """The summary over rows of (example, split, kind, ids, labels, number of changed tokens)."""
    names = ("example_id", "split", "kind", "token_ids", "token_labels", "changed_fraction")
    table = pa.Table.from_pylist(
        [dict(zip(names, (*row[:5], row[5] / len(row[3])), strict=True)) for row in rows]
    )
    fractions = [float(np.mean(np.array(row[4]) > 0)) for row in rows]
    table = table.append_column("synthetic_fraction", pa.array(fractions))
    counters = CandidateCounters(labels_tell_origin)
    counters.add(table)
    _check_parts(table, counters)
    return counters.summary()


def _check_parts(table: pa.Table, whole: CandidateCounters) -> None:
    """The counters of parts, joined, are those of the whole table. A part has all candidates of its examples."""
    ids = table["example_id"].to_pylist()
    cut = next((i for i in range(1, len(ids)) if ids[i] != ids[0]), len(ids))
    merged = CandidateCounters(whole.labels_tell_origin)
    for part in (table.slice(0, cut), table.slice(cut)):
        if part.num_rows:
            counters = CandidateCounters(whole.labels_tell_origin)
            counters.add(part)
            merged.merge(json.loads(json.dumps(counters.state())))
    assert merged.state() == whole.state()


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
        ("b", "train", "masked_lm", [3, 3], [2, 2], 2),
    )
    assert sum(found["synthetic_fraction_histogram"]) == 3
    assert found["mean_synthetic_fraction"] == pytest.approx(2.5 / 3, abs=1e-9)


def text_of(groups: list[str]) -> TokenStore:
    """One token per example, its number; every example continues the one before it."""
    ids = pa.array([[i] for i in range(len(groups))], pa.list_(pa.int32()))
    continues = [i > 0 for i in range(len(groups))]
    return of_table(pa.table({"token_ids": ids, "group": groups, "continues": continues}))


def documents_of(text: TokenStore) -> list[list[int]]:
    spans = zip(text.document_starts, text.document_ends, strict=True)
    return [text.read(start, end).tolist() for start, end in spans]


def test_what_follows_a_left_out_group_is_another_document():
    seed, names = 3, [f"g{i // 2}" for i in range(40)]
    text = text_of(names)
    for fold in range(3):
        kept = [cross_fit_fold(seed, name, 3) != fold for name in names]
        expected: list[list[int]] = []
        for i, wanted in enumerate(kept):
            if wanted:
                expected = [*expected[:-1], [*expected[-1], i]] if i and kept[i - 1] else [*expected, [i]]
        found = without_fold(text, seed, fold, 3)
        assert documents_of(found) == expected and 1 < len(expected) < 20
        assert found.num_tokens == sum(kept) and set(np.flatnonzero(found.counts)) == set(
            np.flatnonzero(kept)
        )


@pytest.mark.parametrize("folds", [1, 3])
def test_a_fold_s_generator_learns_from_all_groups_but_its_own(tmp_path, monkeypatch, folds):
    config = load_config(quick_test=True, overrides=[f"candidates.cross_fit_folds={folds}"])
    groups = {"train": [f"g{i // 2}" for i in range(40)], "selection": ["s"] * 4, "held_out": ["h"] * 5}
    texts = {split: text_of(names) for split, names in groups.items()}
    monkeypatch.setattr(generators, "open_text", lambda stage, split: texts[split])
    learned: dict[str, list[list]] = {}

    def train_model(name, spec, stage_inputs, folder, start):
        documents = {split: documents_of(stage_inputs.text(split)) for split in groups}
        learned[name] = [[groups[s][i] for ids in found for i in ids] for s, found in documents.items()]
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


def test_a_generator_that_is_not_loaded_is_said(capsys):
    for source, is_said in (("random_tokens", True), ("masked_lm", False)):
        config = load_config(overrides=[f"candidates.source={source}", "generator.checkpoint=folder"])
        generators.masked_language_models(None, config, None, None)  # type: ignore[arg-type] - nothing is trained
        assert ("generator.checkpoint has no effect" in capsys.readouterr().err) == is_said
