"""A user's own labels: every fault listed, joined by id, learned by inspector and judge."""

import gzip
import importlib
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.config import load_config
from lib.errors import BadConfig, BadData, MissingInput
from lib.label_files import read_labels
from lib.labels import Label, LabelledExamples, Labels, classes_of
from lib.runs import RunArgs, load_manifest
from lib.tokenization import decode_batch, encode_batch, train_tokenizer
from tests.conftest import run_stages


def write(path: Path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_the_three_forms_of_a_map(tmp_path):
    labels = read_labels(write(tmp_path / "a.json", {"x:0": {"score": 0.5, "spans": [[4, 6, 2], [0, 2, 1]]}}))
    assert labels.by_key == {"x:0": Label(0.5, ((0, 2, 1), (4, 6, 2)))} and not labels.faults
    assert read_labels(write(tmp_path / "b.json", {"x": 1, "y": 0.25})).by_key == {
        "x": Label(1.0),
        "y": Label(0.25),
    }
    assert read_labels(write(tmp_path / "c.json", {"x": [[0, 1, 1]], "y": []})).by_key == {
        "x": Label(None, ((0, 1, 1),)),
        "y": Label(None, ()),
    }


def test_parquet(tmp_path):
    spans = [[{"start": 0, "end": 2, "class": 1}], []]
    pq.write_table(pa.table({"example_id": ["a", "b"], "score": [0.1, 1.0]}), tmp_path / "scores.parquet")
    pq.write_table(pa.table({"example_id": ["a", "b"], "spans": spans}), tmp_path / "spans.parquet")
    assert read_labels(str(tmp_path / "scores.parquet")).by_key == {"a": Label(0.1), "b": Label(1.0)}
    assert read_labels(str(tmp_path / "spans.parquet")).by_key == {
        "a": Label(None, ((0, 2, 1),)),
        "b": Label(None, ()),
    }


def test_maps_by_number_are_joined_in_the_order_of_the_split(tmp_path):
    write(tmp_path / "train_labels.json", {"0": 0.1, "1": 0.2})
    write(tmp_path / "held_out_labels.json", {"0": 0.9})
    labels = read_labels(str(tmp_path))
    found = labels.of(["a", "b", "c"], ["train", "held_out", "train"])
    assert [label.score for label in found] == [0.1, 0.9, 0.2]


@pytest.mark.parametrize(
    "text, kind",
    [
        ('{"a": 1.5}', "label out of range"),
        ('{"a": -0.1}', "label out of range"),
        ('{"a": NaN}', "label not finite"),
        ('{"a": Infinity}', "label not finite"),
        ('{"a": true}', "label not a number"),
        ('{"a": null}', "malformed label"),
        ('{"a": {}}', "malformed label"),
        ('{"a": {"score": null, "spans": null}}', "malformed label"),
        ('{"a": {"score": null}}', "malformed label"),
        ('{"a": {"score": 0.5, "score": 0.6}}', "malformed label"),
        ('{"a": ""}', "label not a number"),
        ('{"a": 1' + "0" * 400 + "}", "label out of range"),
        ('{"a": [[]]}', "malformed span"),
        ('{"a": [{}]}', "malformed span"),
        ('{"a": {"spans": {}}}', "malformed span"),
        ('{"a": {"spans": ""}}', "malformed span"),
        ('{"a": {"spans": [[3, 1, 1]]}}', "malformed span"),
        ('{"a": [[0, 1, true]]}', "malformed span"),
        ('{"a": "0.5"}', "label not a number"),
        ('{"a": 0.5, "a": 0.5}', "repeated label"),
        ('{"a": {"scor": 0.5}}', "malformed label"),
        ('{"a": [[0, 1]]}', "malformed span"),
        ('{"a": [[3, 3, 1]]}', "malformed span"),
        ('{"a": [[0, 3, 0]]}', "malformed span"),
        ('{"a": [[0, 3, 128]]}', "malformed span"),
        ('{"a": [[0, 3, 1], [2, 4, 1]]}', "malformed span"),
        ('{"a": [[0, 1.5, 1]]}', "malformed span"),
        ('{"a": 0.5, "b": [[0, 1, 1]]}', "mixed labels"),
        ("{}", "no labels"),
    ],
)
def test_faults_are_named(tmp_path, text, kind):
    faults = read_labels(write(tmp_path / "labels.json", text)).faults
    assert [fault.kind for fault in faults] == [kind] and faults[0].expected


FORMS = {
    "map.json": json.dumps({"a:0": {"score": 0.5, "spans": [[0, 2, 1], [3, 4, 2]]}, "a:1": {"score": 1, "spans": []}}),
    "list.json": json.dumps([
        {"example_id": "a:0", "score": 0.5, "spans": [[0, 2, 1], {"start": 3, "end": 4, "class": 2}]},
        {"example_id": "a:1", "score": 1, "spans": [], "note": "not read"},
    ]),
    "lines.jsonl": '{"example_id": "a:0", "score": 0.5, "spans": [[0, 2, 1], [3, 4, 2]]}\n\n'
    '{"example_id": "a:1", "score": 1.0, "spans": []}\n',
    "table.csv": 'example_id,score,spans\na:0,0.5,"[[0, 2, 1], [3, 4, 2]]"\r\na:1,1,[]\n',
    "semicolons.csv": "score;example_id;spans;note\n.5;a:0;[[0, 2, 1], [3, 4, 2]];x\n1.0;a:1;[];\n",
    "table.tsv": 'example_id\tspans\tscore\na:0\t"[[0, 2, 1], [3, 4, 2]]"\t5e-1\na:1\t[]\t1\n',
}  # fmt: skip


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_labels_of_every_form_are_the_same(tmp_path, name, packed, mark):
    data = (mark + FORMS[name]).encode()
    path = tmp_path / (name + ".gz" if packed else name)
    path.write_bytes(gzip.compress(data) if packed else data)
    labels = read_labels(str(path))
    assert labels.by_key == {"a:0": Label(0.5, ((0, 2, 1), (3, 4, 2))), "a:1": Label(1.0, ())}
    assert not labels.faults


@pytest.mark.parametrize(
    ("name", "text", "kind", "where"),
    [
        ("a.csv", "example_id,score\nx,\n", "malformed label", "x (row 0, line 2)"),
        ("a.csv", "example_id,spans\nx,[]\ny,\n", "malformed label", "y (row 1, line 3)"),
        ("a.csv", 'example_id,score\nx,"0,5"\n', "label not a number", "x (row 0, line 2)"),
        ("a.csv", "example_id,score\nx,1_0\n", "label not a number", "x (row 0, line 2)"),
        ("a.csv", "example_id,score\nx,nan\n", "label not finite", "x (row 0, line 2)"),
        ("a.csv", "example_id,score\n,0.5\n", "malformed label", "row 0, line 2"),
        ("a.csv", "example_id,score\nx,0.5\nx,0.5\n", "repeated label", "x (row 1, line 3)"),
        ("a.csv", "example_id,spans\nx,[[0 1 1]]\n", "malformed span", "x (row 0, line 2)"),
        ("a.csv", "example_id,score\nx,0.5,7\n", "malformed row", "row 0, line 2"),
        ("a.csv", "example_id,score\n", "no labels", ""),
        ("a.jsonl", '{"example_id": "x", "score": 0.5}\n{oops\n', "not JSON", "line 2"),
        ("a.jsonl", '{"example_id": "x"}\n', "malformed label", "line 1"),
        ("a.jsonl", '{"example_id": "x", "score": 0.5, "span": []}\n', "malformed label", "line 1"),
        ("a.jsonl", '{"example_id": null, "score": 0.5}\n', "malformed label", "line 1"),
        ("a.jsonl", '{"example_id": "x", "score": null}\n', "malformed label", "x (line 1)"),
        ("a.jsonl", "[0.5]\n", "malformed label", "line 1"),
        ("a.json", '[{"example_id": "x", "spans": {}}]', "malformed span", "x (record 0)"),
        ("a.json", "[]", "no labels", ""),
    ],
)
def test_faults_of_rows_say_where_they_are(tmp_path, name, text, kind, where):
    labels = read_labels(write(tmp_path / name, text))
    assert [(f.kind, f.example) for f in labels.faults] == [(kind, where)], labels.faults
    assert labels.faults[0].source == str(tmp_path / name)


def test_nulls_in_parquet_are_no_label(tmp_path):
    table = pa.table({
        "example_id": ["a", "b", "c", None],
        "score": pa.array([None] * 4, pa.float64()),
        "spans": pa.array([[], None, [[0, 1, 1]], []], pa.list_(pa.list_(pa.int64()))),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    labels = read_labels(str(tmp_path / "a.parquet"))
    assert labels.by_key == {"a": Label(None, ()), "c": Label(None, ((0, 1, 1),))}
    assert [(f.kind, f.example) for f in labels.faults] == [
        ("malformed label", "b (row 1)"), ("malformed label", "row 3")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"example,score\nx,1\n", "columns .*expected example_id and score or spans"),
        ("a.csv", b"example_id,scores\nx,1\n", "did you mean 'score'"),
        ("a.csv", b"example_id,score,spans,score\nx,1,[],1\n", "repeated column|score more than once"),
        ("a.json", '{"a": 1}'.encode("utf-16-be"), "iconv -f utf-16be"),
        ("a.json", b'{"caf\xe9": 1}', "iconv -f latin1"),
        ("a.json.gz", b"{}", "damaged"),
        ("a.xlsx", b"PK", r"ending '\.xlsx'; expected \.json, \.jsonl, \.csv"),
        ("a.json", b"[" * 100_000, "not JSON"),
    ],
)
def test_files_that_are_no_labels_say_what_they_are(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    try:
        labels = read_labels(str(tmp_path / name))
    except BadData as error:
        assert re.search(words, str(error)) and str(tmp_path / name) in str(error)
    else:
        (fault,) = labels.faults
        assert re.search(words, f"{fault.kind}: {fault.found}")


def test_a_folder_of_packed_maps(tmp_path):
    (tmp_path / "train_labels.json.gz").write_bytes(gzip.compress(b'{"0": 0.25}'))
    write(tmp_path / "held_out_labels.json", {"0": 1})
    assert read_labels(str(tmp_path)).by_key == {("train", 0): Label(0.25), ("held_out", 0): Label(1.0)}


@pytest.mark.parametrize("kind", ["character", "bpe"])
def test_a_text_that_holds_the_names_of_special_tokens_can_be_labelled(kind):
    text = "In BERT the token [MASK] hides word 7, [CLS] leads, [PAD] fills, [UNK] is strange."
    tokenizer = train_tokenizer(kind, [text] * 3, 300)
    (ids,) = encode_batch(tokenizer, [text])
    assert ids.min() > 3  # ordinary tokens
    start = text.index("[MASK]")
    labels = Labels({"a": Label(0.5, ((start, start + 6, 1),))})
    joined = LabelledExamples(labels, ["a"], ["train"], tokenizer)
    _, _, classes = joined.rewards([{"example_id": "a", "text": text, "token_ids": ids.tolist()}])
    assert classes is not None
    marked = [i for i, c in zip(ids, classes[0], strict=True) if c]
    assert "[MASK]" in decode_batch(tokenizer, [marked])[0] and len(marked) > 1
    with pytest.raises(BadData, match="now gives other tokens for"):
        joined.rewards([{"example_id": "a", "text": text, "token_ids": ids.tolist()[1:]}])


def test_all_faults_come_together(tmp_path):
    faults = read_labels(write(tmp_path / "labels.json", '{"a": 2, "b": NaN, "c": 0.5, "c": 1}')).faults
    assert [(f.kind, f.example) for f in faults] == [
        ("label out of range", "a"),
        ("label not finite", "b"),
        ("repeated label", "c"),
    ]


@pytest.mark.parametrize("text", ["[1, 2]", "{", "3"])
def test_a_file_without_a_map_is_refused(tmp_path, text):
    with pytest.raises(BadData, match=r"labels\.path"):
        read_labels(write(tmp_path / "labels.json", text))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(MissingInput, match="does not exist"):
        read_labels(str(tmp_path / "none.json"))
    with pytest.raises(MissingInput, match=r"lacks train_labels\.json, held_out_labels\.json"):
        read_labels(str(tmp_path))


def test_examples_without_a_label_are_named_together(tmp_path):
    labels = read_labels(write(tmp_path / "labels.json", {"a": 0.5}))
    with pytest.raises(BadData, match="no label for 2 of 3 examples: b, c"):
        labels.of(["a", "b", "c"], ["train"] * 3)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.data())
def test_a_token_has_the_class_of_its_first_labelled_character(lengths, data):
    ends = np.cumsum(lengths)
    offsets = [(int(e - n), int(e)) for e, n in zip(ends, lengths, strict=True)]
    size = int(ends[-1])
    cuts = sorted(data.draw(st.sets(st.integers(0, size), max_size=6)))
    spans = tuple((s, e, i % 3 + 1) for i, (s, e) in enumerate(zip(cuts[::2], cuts[1::2], strict=False)))
    kinds = [next((k for s, e, k in spans if s <= c < e), 0) for c in range(size)]
    wanted = [next((kinds[c] for c in range(s, e) if kinds[c]), 0) for s, e in offsets]
    assert classes_of("x" * size, offsets, Label(None, spans), "a").tolist() == wanted


def test_a_span_beyond_its_text_is_refused():
    with pytest.raises(BadData, match="ends beyond its 3 characters"):
        classes_of("abc", [(0, 3)], Label(None, ((1, 4, 1),)), "a")


def test_labels_are_for_texts_as_they_are():
    with pytest.raises(BadConfig, match=r"set candidates\.source to original_only"):
        load_config(overrides=["labels.path=x.json"])


# --- in the pipeline -------------------------------------------------------------------------------------------------

OWN = [
    "candidates.source=original_only", "candidates.per_example=1", "models.generator=null", "models.reference_lm=null",
    "models.ar_baseline=null", "models.ranker=null", "models.inspector.start=scratch", "models.inspector.num_classes=2",
    "models.judge.start=scratch", "models.inspector.training.steps=60", "models.judge.training.steps=30",
]  # fmt: skip


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A run whose judge learns the share of vowels and whose inspector learns which characters are vowels."""
    folder = tmp_path_factory.mktemp("own")
    config = load_config(quick_test=True, overrides=[*OWN, f"labels.path={folder / 'labels.json'}"])
    write(folder / "labels.json", {"placeholder": {"score": 0.5, "spans": []}})
    run = folder / "run_001"
    run_stages(run, config, ("00_check_data", "01_prepare_dataset"))
    labels = {}
    for row in pq.read_table(run / "01_prepare_dataset" / "examples").to_pylist():
        spans = [[i, i + 1, 1] for i, c in enumerate(row["target"]) if c in "aeiou"]
        labels[row["example_id"]] = {"score": len(spans) / len(row["target"]), "spans": spans}
    write(folder / "labels.json", labels)
    run_stages(run, config, ("00_check_data",), overwrite=True)
    run_stages(run, config, ("01_prepare_dataset",), overwrite=True)
    run_stages(run, config, ("02_generate_candidates", "03_build_rewards", "04_train"))
    return run, labels, config


def test_own_labels_are_rewards_and_token_classes(labelled):
    run, labels, _ = labelled
    texts = {r["example_id"]: r["text"] for r in pq.read_table(run / "02_generate_candidates" / "candidates").to_pylist()}  # fmt: skip
    rows = pq.read_table(run / "03_build_rewards" / "rewards").to_pylist()
    assert {r["example_id"] for r in rows} == set(texts) and len(rows) == len(texts)
    for row in rows:
        assert row["reward"] == row["term_label"] == labels[row["example_id"]]["score"]
        assert row["token_labels"] == [int(c in "aeiou") for c in texts[row["example_id"]]]
    stats = load_manifest(run / "03_build_rewards")["stats"]  # type: ignore[index]
    vowels = sum(sum(r["token_labels"]) for r in rows)
    assert stats["labels"]["tokens_by_class"]["1"] == vowels and stats["labels"]["examples"] == len(rows)
    assert sum(stats["histogram"]) == len(rows) and 0 < stats["mean"] < 1


def test_inspector_and_judge_learn_them(labelled):
    run, _, _ = labelled
    stats = load_manifest(run / "04_train")["stats"]  # type: ignore[index]
    assert stats["inspector"]["held_out"]["auroc_changed"] > 0.95
    assert stats["judge"]["held_out"]["mse"] < 0.02


def test_a_label_that_went_missing_ends_stage_03(labelled, tmp_path):
    run, labels, config = labelled
    some = dict(list(labels.items())[3:])
    for name in ("00_check_data", "01_prepare_dataset", "02_generate_candidates"):
        (tmp_path / "run_001").mkdir(exist_ok=True)
        (tmp_path / "run_001" / name).symlink_to(run / name)
    (tmp_path / "run_001" / "config.json").write_bytes((run / "config.json").read_bytes())
    other = config.model_copy(
        update={"labels": config.labels.model_copy(update={"path": write(tmp_path / "l.json", some)})}
    )
    with pytest.raises(BadData, match="no label for"):
        importlib.import_module("03_build_rewards").main(
            other, RunArgs(run_dir=tmp_path / "run_001", quick_test=True, command=("03",))
        )
    assert not (tmp_path / "run_001" / "03_build_rewards" / "manifest.json").exists()


def test_stage_00_lists_wrong_labels_and_ends(tmp_path):
    path = write(tmp_path / "labels.json", '{"a": 2, "b": NaN}')
    config = load_config(quick_test=True, overrides=[*OWN, f"labels.path={path}"])
    with pytest.raises(BadData, match="2 errors"):
        run_stages(tmp_path / "run_001", config, ("00_check_data",))
    kinds = pq.read_table(tmp_path / "run_001" / "00_check_data" / "problems.parquet")["kind"].to_pylist()
    assert {"label out of range", "label not finite"} <= set(kinds)
