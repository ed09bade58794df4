"""Stage 01 for FinQA: the split of each question, and that a page or report is always in one split."""

from dataclasses import replace

import pytest

from lib.config import Config, load_config
from lib.tasks import Document, Dropped, Example
from lib.tasks.finqa.builtin import builtin_records
from lib.tasks.finqa.examples import NEW_REPORT, SEEN_REPORT, prepare
from lib.tasks.finqa.record import Record

RECORDS = list(builtin_records("builtin_small", 0))


def config_of(*overrides: str) -> Config:
    return load_config(["configs/finqa.yaml"], quick_test=True, overrides=overrides)


def prepared(records: list[Record], *overrides: str) -> dict[str, Example]:
    documents = [Document(r.id, r.to_json(), "x") for r in records]
    found = {e.example_id: e for e in prepare(config_of(*overrides), documents) if isinstance(e, Example)}
    assert len(found) > 0.9 * len(records)
    return found


def splits_of(examples: dict[str, Example], key) -> dict[str, set[str]]:
    """Value of `key` for a record -> the splits of its examples."""
    found: dict[str, set[str]] = {}
    for record in RECORDS:
        if record.id in examples:
            found.setdefault(key(record), set()).add(examples[record.id].split)
    return found


def test_finqas_own_splits_are_kept_and_selection_comes_out_of_train():
    examples = prepared(RECORDS, "finqa.selection_share=0.3")
    allowed = {"train": {"train", "selection"}, "dev": {"held_out"}, "test": {"test"}}
    for record in RECORDS:
        if record.id in examples:
            assert examples[record.id].split in allowed[record.split]
    train = [e.split for e in examples.values() if e.split in ("train", "selection")]
    assert 0.15 < train.count("selection") / len(train) < 0.45
    chosen, fewer, none = (
        {
            e.example_id
            for e in prepared(RECORDS, f"finqa.selection_share={share}").values()
            if e.split == "selection"
        }
        for share in (0.3, 0.1, 1e-6)
    )
    assert fewer < chosen and not none


@pytest.mark.parametrize("group", ["page", "report"])
@pytest.mark.parametrize("with_dev", [True, False])
def test_no_group_is_in_two_splits(group, with_dev):
    """This includes the case without dev.json, where a share of train is held out."""
    records = RECORDS if with_dev else [r for r in RECORDS if r.split == "train"]
    examples = prepared(
        records, f"finqa.group={group}", "finqa.selection_share=0.3", "data.fractions={train: 0.7, held_out: 0.3}",
        "models.reference_lm=null",
    )  # fmt: skip
    named = {r.id: r.filename if group == "page" else r.report for r in records}
    assert all(e.group == named[name] for name, e in examples.items())
    found = splits_of(examples, lambda r: (r.split, named[r.id]))
    assert all(len(splits) == 1 for splits in found.values()) and len(found) > 10
    assert {"train", "held_out", "selection"} <= {e.split for e in examples.values()}


@pytest.mark.parametrize("group", ["page", "report"])
def test_a_page_under_two_file_names_is_in_one_split(group):
    records = [r for r in RECORDS if r.split == "train"]
    copies = [replace(r, id=f"{r.id} copy", filename=f"copy of {r.filename}") for r in records]
    examples = prepared(
        [*records, *copies], f"finqa.group={group}", "finqa.selection_share=0.3",
        "data.fractions={train: 0.7, held_out: 0.3}", "models.reference_lm=null",
    )  # fmt: skip
    pairs = [(e, examples[f"{name} copy"]) for name, e in examples.items() if not name.endswith(" copy")]
    assert all((one.split, one.group) == (copy.split, copy.group) for one, copy in pairs)
    assert {one.split for one, _ in pairs} == {"train", "held_out", "selection"}


def test_held_out_questions_say_whether_their_report_was_seen_in_training():
    """One of them moves to a new page of a report that is in the train split."""
    examples = prepared(RECORDS)
    moved = next(r for r in RECORDS if r.split == "dev" and r.id in examples)
    teacher = next(r for r in RECORDS if r.id in examples and examples[r.id].split == "train")
    records = [replace(r, filename=f"{teacher.report}/other.pdf") if r is moved else r for r in RECORDS]
    found = prepared(records)
    train_reports = {r.report for r in records if r.id in found and found[r.id].split == "train"}
    for record in records:
        if record.id not in found:
            continue
        tags = found[record.id].tags or []
        found_tags = [tag for tag in (SEEN_REPORT, NEW_REPORT) if tag in tags]
        reported = found[record.id].split in ("held_out", "test")
        assert found_tags == (
            [SEEN_REPORT if record.report in train_reports else NEW_REPORT] if reported else []
        )
    assert SEEN_REPORT in (found[moved.id].tags or [])


def test_empty_questions_and_programs_that_cannot_run_are_dropped_with_a_reason():
    first, second, third = RECORDS[:3]
    documents = [
        Document(r.id, r.to_json(), "x")
        for r in (replace(first, program="divide(1, 0)"), replace(second, question=" "), third, *RECORDS[3:])
    ]
    dropped = {d.example_id: d.reason for d in prepare(config_of(), documents) if isinstance(d, Dropped)}
    assert (
        "cannot run" in dropped[first.id]
        and dropped[second.id] == "the question is empty"
        and third.id not in dropped
    )
