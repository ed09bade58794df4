"""Text that a pretrained tokenizer reads, and all stages with a pretrained model."""

import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from lib.errors import BadData
from lib.evaluation.text_scores import windows_for
from lib.examples import as_written, spans_as_written, without_unknown
from lib.models.build import (
    load_model,
)
from lib.models.pretrained_tokenizer import open_tokenizer
from lib.models.publish import publish
from lib.tokenization import (
    decode_batch,
    encode_batch,
    encode_with_masks,
    forbidden_ids,
    load_tokenizer,
)
from tests.conftest import manifest_of, run_stages
from tests.pretrained_folders import KINDS, small_config
from tests.test_foreign import TOKENIZERS, make

HARD = ("the fox jumps", "Caf\u00e9 na\u00efve fox", "fox \U0001f98a dog \U0001f469\u200d\U0001f52c", "\u05e9\u05dc\u05d5\u05dd the fox",
        "the\tlazy\n\n  dog ", "(fox), don't: dog.", "cafe\u0301 the", "[MASK] the <mask> fox [UNK]")  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_decode_to_the_passage_or_the_tokenizer_is_refused(name, tmp_path):
    make(name).save_pretrained(tmp_path)
    tokenizer, framing = open_tokenizer(tmp_path)
    assert (framing.prefix, framing.suffix) == ([2], [3])
    kept = 0
    for text in HARD:
        try:
            ids = encode_batch(tokenizer, [text], "error")
            as_written(tokenizer, [text], ids, "exact")
            kept += 1
        except BadData as error:
            assert "outside the vocabulary" in str(error) or "loses characters" in str(error)
        else:
            assert decode_batch(tokenizer, ids) == [text]
        ids = encode_batch(tokenizer, [text], "unk")
        assert not set(np.concatenate(ids).tolist()) & (
            set(forbidden_ids(tokenizer)) - {tokenizer.unk_token_id}
        )
        (written,) = as_written(tokenizer, [text], ids, "normalise")
        assert decode_batch(tokenizer, ids) == [written]
    assert (kept == len(HARD)) == (name in ("byte_level", "bpe_metaspace"))


def test_spans_move_with_a_text_that_is_normalised(tmp_path):
    """Spans are in characters of the passage as the user wrote it; the stored text is shorter."""
    make("word_piece_uncased").save_pretrained(tmp_path)
    tokenizer, _ = open_tokenizer(tmp_path)
    text = "the \n\n Quick  fox\tjumps over"
    (written,) = as_written(tokenizer, [text], encode_batch(tokenizer, [text], "unk"), "normalise")
    marked = [[text.index("Quick"), text.index("  fox"), 1], [text.index("\tjumps"), len(text), 2]]
    record = json.dumps({"label": None, "spans": marked})
    (found, other) = spans_as_written(tokenizer, [record, None], [text, "x"], [written, "x"])
    assert found is not None and other is None and written == "the quick fox jumps over"
    assert [(written[a:b], kind) for a, b, kind in json.loads(found)["spans"]] == [
        ("quick", 1),
        ("jumps over", 2),
    ]
    with pytest.raises(BadData, match="has other tokens, so its spans"):
        spans_as_written(tokenizer, [record], [text], ["the fox"])


def test_what_a_tokenizer_does_not_know_leaves_spans_in_place(tmp_path):
    """A stored [UNK] would be other tokens when it is read again. Such words become spaces, and no position changes."""
    make("word_piece_uncased").save_pretrained(tmp_path)
    tokenizer, _ = open_tokenizer(tmp_path)
    text = "The \U0001f600 quick \u4e00fox\u4e00 jumps \U0001f600"
    ids = encode_batch(tokenizer, [text, "the dog"], "unk")
    assert tokenizer.unk_token_id in ids[0]
    (plain, other), found, words = without_unknown(tokenizer, [text, "the dog"], ids)
    assert words == (ids[0] == tokenizer.unk_token_id).sum()
    assert len(plain) == len(text) and other == "the dog" and np.array_equal(found[1], ids[1])
    assert tokenizer.unk_token_id not in found[0] and plain.index("jumps") == text.index("jumps")
    (written,) = as_written(tokenizer, [plain], found[:1], "normalise")
    assert np.array_equal(encode_batch(tokenizer, [written], "unk")[0], found[0])
    record = json.dumps(
        {"spans": [[text.index("quick"), text.index(" jumps"), 1], [text.index("jumps"), len(text), 2]]}
    )
    (moved,) = spans_as_written(tokenizer, [record], [plain], [written])
    assert moved is not None
    assert [written[a:b] for a, b, _ in json.loads(moved)["spans"]] == ["quick fox", "jumps"]
    only = without_unknown(tokenizer, ["\U0001f600"], [[tokenizer.unk_token_id]])
    with pytest.raises(BadData, match="has no token for 1 passages"):
        as_written(tokenizer, *only[:2], "normalise")
    section = SimpleNamespace(spans_key="spans", passage_characters=64, has_labels=True)
    pretrained = SimpleNamespace(model="a folder", text="normalise")
    config = SimpleNamespace(data=section, pretrained=pretrained, tokenizer=SimpleNamespace(unknown="unk"))
    evaluator = SimpleNamespace(config=config, tokenizer=tokenizer, min_context=16)
    parts, left_out = windows_for([("fox", text), ("smile", "\U0001f600")], evaluator)
    assert left_out == words + 1 and [part.document_id for part in parts] == ["fox", "smile"]
    assert parts[0].ids.tolist() == found[0].tolist()
    assert parts[1].ids.tolist() == [tokenizer.unk_token_id], (
        "a text of unknown words alone still has a score"
    )


def test_what_a_tokenizer_loses_is_named(tmp_path):
    make("word_piece_uncased").save_pretrained(tmp_path)
    tokenizer, _ = open_tokenizer(tmp_path)
    texts = ["Caf\u00e9 fox", "the\tdog"]
    with pytest.raises(BadData, match=r"2 of 2 passages.*'C' \(U\+0043\).*pretrained.text=normalise"):
        as_written(tokenizer, texts, encode_batch(tokenizer, texts, "unk"), "exact")


@pytest.mark.parametrize("with_spans", [False, True])
def test_passages_without_tokens_are_dropped_by_name(pretrained_folder, tmp_path, with_spans):
    """White space alone has no token. With spans, words that the tokenizer does not know become white space."""
    text = "the quick brown fox jumps over the lazy dog " * 2
    rows = [{"id": f"d{n}", "text": text + str(n), "label": n % 2, "spans": []} for n in range(40)]
    rows[3]["text"] = text + " " * 300 + text
    rows[5] |= {"text": "\U0001f642" * 60}
    rows[7] |= {"text": text + "\U0001f642 dog", "spans": [[0, 3, 1], [len(text), len(text) + 1, 1]]}
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = ["data.label_key=label", "data.id_key=id", "data.deduplicate=document", "data.split_unit=document", "data.whitespace=keep",
              "candidates.source=original_only", "candidates.per_example=1", "models.ranker=null", "models.judge.target_type=score",
              "pretrained.text=normalise"]  # fmt: skip
    spans = (
        ["data.spans_key=spans", "models.inspector.num_classes=2"]
        if with_spans
        else ["models.inspector=null", "models.judge.start=scratch"]
    )
    config = small_config(pretrained_folder("bert"), data, *labels, *spans)
    run_stages(tmp_path / "run", config, ["00_check_data", "01_prepare_dataset"])
    stage = tmp_path / "run" / "01_prepare_dataset"
    dropped = pq.read_table(stage / "dropped").to_pylist()
    gone = {row["example_id"].split(":")[0] for row in dropped if "has no token for it" in row["reason"]}
    assert gone == ({"d3", "d5"} if with_spans else {"d3"})
    examples = pq.read_table(stage / "examples").to_pylist()
    assert all(row["token_ids"] for row in examples) and not gone & {"d0", "d1"}
    assert manifest_of(stage)["stats"]["spans_left_out"] == int(with_spans), "that of the unknown word alone"
    assert {"d0", "d3"} <= {row["example_id"].split(":")[0] for row in examples}


@pytest.mark.parametrize("name", ["word_piece", "byte_level", "unigram_always", "characters"])
def test_masks_in_a_users_text(name, tmp_path):
    make(name).save_pretrained(tmp_path)
    tokenizer, _ = open_tokenizer(tmp_path)
    (row,) = encode_with_masks(tokenizer, ["the [MASK] fox [MASK][MASK]"], "unk")
    assert (row == tokenizer.mask_token_id).sum() == 3
    (again,) = encode_with_masks(
        tokenizer, [f"the {tokenizer.mask_token} fox {tokenizer.mask_token}[MASK]"], "unk"
    )
    assert np.array_equal(row, again)


CORE = ("bert", "modernbert", "deberta_v2", "esm", "own_code")  # every kind of tokenizer and of head


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k if k in CORE else pytest.param(k, marks=pytest.mark.long) for k in KINDS])
def test_every_stage_runs(kind, pretrained_folder, small_text, tmp_path):
    """Stages 00 to 06. The text is what its tokens say, and special tokens are neither masked nor generated."""
    run_dir = tmp_path / "run_001"
    run_stages(run_dir, small_config(pretrained_folder(kind), small_text))
    tokenizer = load_tokenizer(run_dir / "01_prepare_dataset" / "tokenizer")
    stage = run_dir / "01_prepare_dataset"
    examples = pq.read_table(stage / "examples")
    assert examples["target"].to_pylist() == decode_batch(tokenizer, examples["token_ids"].to_pylist())
    candidates = pq.read_table(run_dir / "02_generate_candidates" / "candidates")
    assert candidates["text"].to_pylist() == decode_batch(tokenizer, candidates["token_ids"].to_pylist())
    never = set(forbidden_ids(tokenizer)) - {tokenizer.unk_token_id}
    for table in (candidates, pq.read_table(run_dir / "06_sample" / "samples")):
        assert not {i for row in table["token_ids"].to_pylist() for i in row} & never
    policies = {row["policy"] for row in manifest_of(run_dir / "06_sample")["stats"]["policies"]}
    assert {"ancestral", "critic", "critic_origin"} <= policies
    generator = load_model(run_dir / "04_train" / "generator" / "best_model")
    assert generator.config.model_type == "remask_adapted" and generator.adapter is None
    for name in ("generator", "critic"):
        card = (publish(run_dir, name, tmp_path / name) / "README.md").read_text()
        (block, *_) = re.findall(r"^```python\n(.*?)^```$", card, re.M | re.S)
        made: dict[str, Any] = {}
        exec(block.replace("THIS_FOLDER", str(tmp_path / name)), made)
        assert made["logits"].isfinite().all() if name == "generator" else np.isfinite(made["errors"]).all()
        assert tokenizer.mask_token in card
        assert ("belong to the authors of the pretrained model" in card) == (kind == "own_code")
