"""Task pools, stages 00 to 03: layouts, faults, rewards, shortcuts.

Content is planted: each test knows what a row, a fault or a shortcut must become.
"""

import importlib
import json
import os
import re
import tracemalloc
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertConfig, BertModel

from lib.errors import BadConfig, BadData, MissingInput
from lib.models.encoders import open_encoder
from lib.runs import RunArgs
from lib.tasks import CandidateContext
from lib.tasks.pools import bi_encoder, review
from lib.tasks.pools.bi_encoder import BiEncoder
from lib.tasks.pools.candidates import candidates, mapped
from lib.tasks.pools.reading import split_in_name
from lib.tasks.pools.review import _report, _train_pools
from lib.tasks.pools.shortcuts import Shortcuts, SimpleScorers, frequent, pools_of
from lib.tokenization import train_tokenizer
from tests.conftest import table_of
from tests.pool_files import FIRST_STAGES, POOLS, checked, config_of, kinds, pool, write
from tests.test_ranker import HEADS, make_backbone
from tests.trainings import CPU

# --- layouts ---------------------------------------------------------------------------------------------------------------


def content(count: int = 60) -> list[dict]:
    """Pools with one right candidate, then wrong ones: content that every layout can state."""
    words = ("amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heron")
    return [
        {
            "prompt": f"which tree number {n} grows near {words[n % 8]} {words[n // 8]}?",
            "right": f"tree {n} is a {words[n % 8]}",
            "wrong": [f"tree {n} is no {words[(n + k) % 8]}" for k in range(1, 2 + n % 3)],
        }
        for n in range(count)
    ]


def texts(row: dict) -> list[str]:
    return [row["right"], *row["wrong"]]


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


LAYOUTS: dict[str, Any] = {
    "pools": lambda row: [
        {"prompt": row["prompt"], "candidates": texts(row), "rewards": [1, *[0] * len(row["wrong"])]}
    ],
    "lists": lambda row: [
        {"query": row["prompt"], "docs": texts(row), "labels": [True, *[False] * len(row["wrong"])]}
    ],
    "rows": lambda row: [
        {"prompt": row["prompt"], "candidate": text, "reward": float(text == row["right"])} for text in texts(row)
    ],
    "pairs": lambda row: [
        {"prompt": row["prompt"], "chosen": row["right"], "rejected": text} for text in row["wrong"]
    ],
    "chat": lambda row: [
        {"prompt": user(row["prompt"]), "chosen": answer(row["right"]), "rejected": answer(text)} for text in row["wrong"]
    ],
    "implicit": lambda row: [
        {"chosen": user(row["prompt"]) + answer(row["right"]), "rejected": user(row["prompt"]) + answer(text)}
        for text in row["wrong"]
    ],
    "prompt_and_chats": lambda row: [
        {"prompt": row["prompt"], "chosen": user(row["prompt"]) + answer(row["right"]),
         "rejected": user(row["prompt"]) + answer(text)}
        for text in row["wrong"]
    ],
    "chats_as_text": lambda row: [
        {side: f"\n\nHuman: {row['prompt']}\n\nAssistant: {said}" for side, said in (("chosen", row["right"]), ("rejected", text))}
        for text in row["wrong"]
    ],
    "tuples": lambda row: [
        {"anchor": row["prompt"], "positive": row["right"]}
        | {f"negative_{k}": row["wrong"][k - 1] if k <= len(row["wrong"]) else None for k in range(1, 4)}
    ],
    "lists_of_negatives": lambda row: [{"query": row["prompt"], "pos": [row["right"]], "neg": row["wrong"]}],
    "rewardbench": lambda row: [
        {"prompt": row["prompt"], "chosen": [row["right"]], "rejected": row["wrong"], "num_correct": 1}
    ],
}  # fmt: skip


def rows_of(layout: str, count: int = 60) -> list[dict]:
    return [row for pool in content(count) for row in LAYOUTS[layout](pool)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_documents(tmp_path, layout):
    expected, none = checked(write(tmp_path / "pools.jsonl", rows_of("pools")))
    found, problems = checked(write(tmp_path / f"{layout}.jsonl.gz", rows_of(layout)))
    assert found == expected and len(found) == 60 and not none and not problems
    assert found[7]["rewards"] == [1.0, 0.0, 0.0] and found[7]["candidates"] == texts(content()[7])


def test_negatives_of_any_name_are_numbered(tmp_path):
    rows = [
        {"ask": row["prompt"], "good": row["right"]} | {f"bad_{k}": t for k, t in enumerate(row["wrong"], 1)}
        for row in content()
    ]
    keys = "pools.keys={prompt: ask, positive: good, negative: bad_1}"
    found, problems = checked(write(tmp_path / "mine.jsonl", rows), keys)
    assert found == checked(write(tmp_path / "pools.jsonl", rows_of("pools")))[0] and not problems


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("rewards: qualty", "the rewards of pools.keys.*did you mean 'quality'"),
        ("group: pagee", "the group of pools.keys.*did you mean 'page'"),
    ],
)
def test_a_column_that_is_named_and_absent_is_an_error_and_no_other_one_is_read(tmp_path, keys, said):
    row = {"candidates": ["a", "b"], "scores": [0.1, 0.9], "quality": [1, 0], "page": "P"}
    path = write(tmp_path / "mine.jsonl", [{"prompt": f"number {n}", **row} for n in range(3)])
    found, problems = checked(path, f"pools.keys={{{keys}}}")
    (absent,) = [p for p in problems if p.kind == "no such column"]
    assert absent.severity == "error" and re.search(said, f"{absent.expected} {absent.advice}")
    assert all(document["rewards"] != [0.1, 0.9] for document in found) == keys.startswith("rewards")


def test_a_chat_behind_another_prompt_keeps_its_question(tmp_path):
    row = {
        "prompt": "Answer politely.",
        "chosen": user("capital of Peru?") + answer("Lima"),
        "rejected": user("capital of Peru?") + answer("Quito"),
    }
    (found,), _ = checked(write(tmp_path / "mine.jsonl", [row]))
    assert found["prompt"] == "Answer politely.\ncapital of Peru?", "the question is part of it"
    assert found["candidates"] == [
        "Lima",
        "Quito",
    ]


def test_what_later_rows_say_about_a_pool_counts(tmp_path):
    rows = [
        {"prompt": "one", "candidate": "a", "reward": 1, "split": "dev"},
        {"prompt": "one", "candidate": "b", "reward": 0, "split": "validation", "group": "G", "tag": "hard"},
        {"prompt": "two", "candidate": "a", "reward": 1, "group": "G"},
        {"prompt": "two", "candidate": "b", "reward": 0, "tag": ["x", "y"]},
    ]
    found, problems = checked(write(tmp_path / "rows.jsonl", rows))
    assert not kinds(problems)
    assert [f["tags"] for f in found] == [["hard"], ["x", "y"]] and len({f["group"] for f in found}) == 1
    assert [f["split"] for f in found] == ["held_out", "held_out"], "pools of one group have one split"
    rows[1]["group"] = "H"
    rows[0]["group"] = "G"
    assert kinds(checked(write(tmp_path / "two.jsonl", rows))[1]) == {"contradicting groups"}


def test_two_splits_of_one_prompt_are_named_by_file_and_line(tmp_path):
    row = {"prompt": "the same", "candidates": ["a", "b"], "rewards": [1, 0]}
    write(tmp_path / "train.jsonl", [{"id": "t", **row}])
    write(tmp_path / "dev.jsonl", [{"id": "other", **row, "prompt": "x"}, {"id": "d", **row}])
    (fault,) = [p for p in checked(tmp_path)[1] if p.kind == "prompt in two splits"]
    both = f"{fault.source} {fault.location} {fault.found}"
    assert "train.jsonl" in both and "dev.jsonl" in both and "line 2" in both and "line 1" in both


def test_a_pool_is_as_large_as_its_different_candidates(tmp_path):
    answers = [f"answer {k}" for k in range(15)]
    pairs = [
        {"prompt": "which", "chosen": a, "rejected": b}
        for n, a in enumerate(answers)
        for b in answers[n + 1 :]
    ]
    path = write(tmp_path / "pairs.jsonl", pairs)
    (found,), problems = checked(path, "pools.max_candidates=15")
    assert len(found["candidates"]) == 15 and not kinds(problems)
    assert kinds(checked(path, "pools.max_candidates=14")[1]) == {"too many candidates"}


def test_a_folder_says_what_it_does_not_read(tmp_path, monkeypatch):
    write(tmp_path / "train.jsonl", rows_of("pools", 3))
    (tmp_path / "more.txt").write_text("text")
    (tmp_path / "info.json").write_text('{"name": "no rows"}')
    closed = write(tmp_path / "closed.jsonl", rows_of("pools", 3))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and access(path, mode))
    found, problems = checked(tmp_path)
    assert len(found) == 3
    assert {(Path(p.source).name, p.kind, p.severity) for p in problems} == {
        ("more.txt", "other file", "warning"),
        ("info.json", "other file", "warning"),
        ("closed.jsonl", "unreadable", "error"),
    }
    with pytest.raises(MissingInput, match=r"closed\.jsonl cannot be read; check its permissions"):
        checked(closed)


def test_rewards_of_databases_and_names_that_are_no_text(tmp_path):
    rewards = pa.array([[Decimal("1.00"), Decimal("0.25")]], pa.list_(pa.decimal128(5, 2)))
    path = tmp_path / os.fsdecode(b"caf\xe9.parquet")
    with path.open("wb") as file:  # pyarrow opens no such name
        pq.write_table(pa.table({"prompt": ["p"], "candidates": [["a", "b"]], "rewards": rewards}), file)
    (found,), problems = checked(tmp_path)
    assert found["rewards"] == [1.0, 0.25] and not kinds(problems)


@pytest.mark.parametrize("ending", ["parquet", "csv", "json"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path, ending):
    rows, path = rows_of("rows"), tmp_path / f"rows.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ending == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text(
            "prompt,candidate,reward\n"
            + "".join(f"{r['prompt']},{r['candidate']},{r['reward']}\n" for r in rows)
        )
    assert checked(path)[0] == checked(write(tmp_path / "pools.jsonl", rows_of("pools")))[0]


def test_rewards_have_the_term_of_a_teacher_in_every_part_or_in_none(tmp_path):
    """The train pools have a teacher and the others have none: stages 02 and 03 write several tables, each with the term."""
    rows = [
        row | {"split": split, "teacher": [3.0 - k for k in range(len(row["candidates"]))]}
        for split, count in (("train", 30), ("selection", 10), ("dev", 10))
        for row in rows_of("pools", 60)[:count]
    ]
    for n, row in enumerate(rows):
        row["prompt"] += f" {n * n} {'abcdefgh'[n % 8]}"
        if row["split"] == "dev":
            del row["teacher"]
    config = config_of(
        write(tmp_path / "taught.jsonl", rows), "candidates.rows_per_group=16", "pools.near_duplicates=null"
    )
    run = tmp_path / "run"
    for name in FIRST_STAGES:
        importlib.import_module(name).main(config, RunArgs(run_dir=run, quick_test=True, command=(name,)))
    folder = table_of(run, "03_build_rewards/rewards")
    parts = [pq.read_schema(file).names for file in folder.glob("*.parquet")]
    assert len(parts) > 3 and all("term_teacher" in names for names in parts)
    table = pq.read_table(folder)
    split = pq.read_table(table_of(run, "02_generate_candidates/candidates"))["split"].to_pylist()
    unknown = np.isnan(table["term_teacher"].to_numpy())
    np.testing.assert_array_equal(unknown, np.array(split) == "held_out")
    manifest = json.loads((run / "03_build_rewards" / "manifest.json").read_text())
    assert manifest["stats"]["terms"]["teacher"] == pytest.approx(
        table["term_teacher"].to_numpy()[~unknown].mean()
    )


@pytest.mark.slow
def test_every_layout_gives_byte_equal_tables(tmp_path):
    found = {}
    for layout in ("pools", "lists", "rows", "pairs", "tuples", "rewardbench"):
        path = write(tmp_path / f"{layout}.jsonl", rows_of(layout))
        run = tmp_path / layout
        for name in FIRST_STAGES:
            importlib.import_module(name).main(
                config_of(path), RunArgs(run_dir=run, quick_test=True, command=(name,))
            )
        tables = (
            "01_prepare_dataset/examples",
            "02_generate_candidates/candidates",
            "03_build_rewards/rewards",
        )
        files = [f for table in tables for f in sorted(table_of(run, table).glob("*.parquet"))]
        files.append(run / "02_generate_candidates" / "baselines.parquet")
        found[layout] = [f.read_bytes() for f in files]
    assert len(found["pools"]) == 4
    assert all(data == found["pools"] for data in found.values())


def test_a_blank_cell_is_no_value(tmp_path):
    """Prompts, tags, kinds and further negatives may be blank in a table of texts. Candidates may not."""
    ragged, rows = tmp_path / "ragged.csv", tmp_path / "rows.csv"
    ragged.write_text(
        "anchor,positive,negative_1,negative_2,tag\nq one?,a,b,,\nq two?,a,b,c,t\nq three?,,b,c,t\n"
    )
    found, problems = checked(ragged)
    assert [d["candidates"] for d in found] == [["a", "b"], ["a", "b", "c"]]
    assert "tags" not in found[0] and found[1]["tags"] == ["t"]
    assert [(p.kind, p.location) for p in problems] == [("null text", "row 2, line 4")]
    rows.write_text(
        "id,prompt,candidate,reward,kind\n1,which?,this,1,\n1,,that,0, \n2,who?,,1,\n2,,me,0,\n,,you,0,\n"
    )
    found, problems = checked(rows)
    assert [(d["prompt"], d["candidates"], "kinds" in d) for d in found] == [
        ("which?", ["this", "that"], False)
    ]
    assert [p.kind for p in problems] == ["no prompt", "empty candidate", "one candidate"]


@pytest.mark.parametrize("side", ["chosen", "rejected", "positive"])
def test_a_side_without_a_text_is_a_fault(tmp_path, side):
    layout = "tuples" if side == "positive" else "pairs"
    rows = rows_of(layout, 2)
    rows[0][side] = None
    assert kinds(checked(write(tmp_path / "null.jsonl", rows))[1]) == {"null text"}


def test_rows_of_a_pool_may_be_anywhere_and_own_names_are_read(tmp_path):
    rows = [
        {"qid": n % 5, "ask": f"question {n % 5} of five", "say": f"reply {n}", "mark": n // 15}
        for n in range(20)
    ]
    names = "pools.keys={id: qid, prompt: ask, candidate: say, reward: mark}"
    found, problems = checked(write(tmp_path / "own.jsonl", rows), names)
    assert [d["id"] for d in found] == list("01234") and not problems
    assert found[2]["candidates"] == ["reply 2", "reply 7", "reply 12", "reply 17"]
    assert found[2]["rewards"] == [0, 0, 0, 1]
    with pytest.raises(BadConfig, match=r"'promt' is not a role .*did you mean 'prompt'"):
        config_of(tmp_path, "pools.keys={promt: ask}")


@pytest.mark.parametrize("name", ["reward", "label", "score", "relevance", "labels"])
def test_every_name_of_a_reward_is_read_in_rows(tmp_path, name):
    rows = [{"query": "which?", "doc": text, name: float(text == "this")} for text in ("that", "this")]
    found, problems = checked(write(tmp_path / "rows.jsonl", rows))
    assert found[0]["rewards"] == [0, 1] and not problems


def test_pairs_of_one_prompt_are_one_pool_with_the_share_of_wins(tmp_path):
    better = [("a", "b"), ("b", "c"), ("a", "c")]
    rows = [{"prompt": "order?", "chosen": x, "rejected": y} for x, y in better]
    found, problems = checked(write(tmp_path / "pairs.jsonl", rows))
    assert dict(zip(found[0]["candidates"], found[0]["rewards"], strict=True)) == {"a": 1, "b": 0.5, "c": 0}
    assert not problems
    both = [
        {"prompt": "order?", "chosen": "a", "rejected": "b"},
        {"prompt": "order?", "chosen": "b", "rejected": "a"},
    ]
    assert kinds(checked(write(tmp_path / "both.jsonl", both))[1]) == {"contradicting rewards"}


def test_several_shared_turns_are_the_prompt_and_none_is_a_fault(tmp_path):
    turns = [{"role": "system", "content": "be brief"}, *user("how big is it?")]
    pairs = {"chosen": [*turns, *answer("big")], "rejected": [*turns, *answer("small")]}
    text = "Human: hello\n\nAssistant: hi\n\nHuman: is it big?\n\nAssistant: "
    apart = {"chosen": user("yes?") + answer("yes"), "rejected": user("no?") + answer("no")}
    rows = [
        pairs, pairs | {"prompt": "how big is it?"}, pairs | {"prompt": "be brief: how big is it?"},
        {"chosen": text + "yes", "rejected": text + "no"}, apart, apart | {"id": "apart"},
        {"prompt": "go on", "chosen": answer("so") + answer("yes"), "rejected": answer("so") + answer("no")},
    ]  # fmt: skip
    found, problems = checked(write(tmp_path / "turns.jsonl", rows))
    assert [d["prompt"] for d in found] == [
        "system: be brief\nuser: how big is it?", "be brief: how big is it?", "user: hello\nassistant: hi\nuser: is it big?", "",
        "go on",
    ]  # fmt: skip
    assert [d["candidates"][0] for d in found] == [
        "big", "big", "yes", "user: yes?\nassistant: yes", "assistant: so\nassistant: yes",
    ]  # fmt: skip
    assert [(p.kind, p.location) for p in problems if p.severity == "error"] == [("no prompt", "line 5")]
    assert kinds(problems, "warning") == {"empty prompt"}


# --- faults ---------------------------------------------------------------------------------------------------------------


def chat_pool(chosen: Any) -> dict:
    return {"id": "p1", "prompt": "is a chat a candidate?", "candidates": [chosen, "no"], "rewards": [1, 0]}


FAULTS: dict[str, tuple[Any, str]] = {
    "empty candidate": (pool(1, ("yes", "  ")), "line 2 (p1)"),
    "wrong length": (pool(1, rewards=(1, 0, 0)), "line 2"),
    "null text": (chat_pool([{"role": "assistant", "content": None, "tool_calls": []}]), "line 2"),
    "not finite": (pool(1, rewards=(1, float("nan"))), "line 2"),
    "reward out of range": (pool(1, rewards=(7, 0)), "line 2 (p1)"),
    "not a number": (pool(1, rewards=("good", 0)), "line 2"),
    "not text": (pool(1, candidates=("yes", 7)), "line 2"),
    "no candidates": (pool(1, (), ()), "line 2"),
    "not a list": ({"id": "p1", "prompt": "x", "candidates": "yes", "rewards": [1]}, "line 2"),
    "contradicting rewards": (pool(1, ("yes", "yes ", "no"), (1, 0, 0)), "line 2 (p1)"),
    "contradicting prompts": (pool(0, prompt="another prompt"), "line 2"),
    "too many candidates": (pool(1, map(str, range(250)), (1, *[0] * 249)), "line 2 (p1)"),
    "unknown split": (pool(1, split="practice"), "line 2 (p1)"),
    "no rewards": ({"id": "p1", "prompt": "x", "candidates": ["yes", "no"]}, "line 2 (p1)"),
    "not JSON": ("{oops", "line 2"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_named_with_its_row_and_may_be_left_out(tmp_path, kind):
    row, location = FAULTS[kind]
    lines = [json.dumps(pool(0)), row if isinstance(row, str) else json.dumps(row), json.dumps(pool(2))]
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    found, problems = checked(path)
    wrong = [p for p in problems if p.severity == "error"]
    assert [(p.kind, p.location) for p in wrong] == [(kind, location)]
    assert wrong[0].expected and wrong[0].advice and str(path) == wrong[0].source
    assert [d["id"] for d in found][-1] == "p2"
    kept, problems = checked(path, f"data.drop=[{kind}]")
    assert not kinds(problems) and [d["id"] for d in kept] == ["p0", "p2"]


@pytest.mark.parametrize(
    ("kind", "row"),
    {
        "empty candidate": pool(1, ("yes", "\u200b\u00ad\ufe0f \u2060")),
        "not finite": pool(1, rewards=(int("9" * 400), 0)),
        "not text": chat_pool([{"role": "assistant", "content": [{"type": "image", "image": "x"}]}]),
        "null text": chat_pool([{"role": "assistant", "content": [{"type": "text", "text": None}]}]),
    }.items(),
)
def test_a_row_that_no_ranker_can_read_is_a_fault(tmp_path, kind, row):
    found, problems = checked(write(tmp_path / "bad.jsonl", [pool(0), row]))
    assert kinds(problems) == {kind} and len(found) == 1


def test_parts_of_a_message_are_one_text_and_halves_of_characters_are_replaced(tmp_path):
    parts = [{"type": "text", "text": "first, "}, {"type": "text", "text": "then"}]
    names = {"id": "p\ud800", "group": "\ud800", "tag": "t\udc00", "kind": ["\udfff", "b"]}
    row = chat_pool([{"role": "assistant", "content": parts}]) | names
    found, problems = checked(write(tmp_path / "odd.jsonl", [row]))
    assert found[0]["candidates"] == ["first, then", "no"] and kinds(problems, "warning") == {
        "lone surrogates"
    }
    names = found[0]["id"], found[0]["tags"], found[0]["kinds"]
    assert names == ("p\ufffd", ["t\ufffd"], ["\ufffd", "b"]) and not kinds(problems)


def test_the_untrained_encoder_reads_no_more_tokens_than_it_has_positions(tmp_path):
    shape: dict[str, Any] = HEADS | {"max_position_embeddings": 16}
    BertModel(BertConfig(**shape)).save_pretrained(tmp_path)
    train_tokenizer("character", ["abc"], 0).save_pretrained(tmp_path)
    encoder = BiEncoder(str(tmp_path), 96, CPU)
    texts = np.array([["abc" * 30, "a"]], object)
    scores = encoder.scores(["cab" * 30], texts, np.ones((1, 2), bool))
    assert encoder.max_tokens == 16 and np.isfinite(scores).all()


def test_the_untrained_encoder_gives_cosines_of_mean_states(tmp_path, monkeypatch):
    """Texts of different lengths are read together, in several passes, as each would be read alone."""
    make_backbone("bert", torch.float32).save_pretrained(tmp_path)
    train_tokenizer("character", ["abc"], 0).save_pretrained(tmp_path)
    model, tokenizer = open_encoder(tmp_path, torch.float32)

    @torch.no_grad()
    def vector(text: str) -> np.ndarray:
        mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
        return mean / np.linalg.norm(mean)

    prompts, present = ["abcab", "c" * 12], np.array([[True, True], [False, True]])
    texts = np.array([["ab", "cabcabcab"], ["absent", "bbac"]], object)
    monkeypatch.setattr(bi_encoder, "TOKENS_PER_PASS", 24)
    found = BiEncoder(str(tmp_path), 96, CPU).scores(prompts, texts, present)
    wanted = [[vector(p) @ vector(t) for t in row] for p, row in zip(prompts, texts, strict=True)]
    assert found == pytest.approx(np.where(present, wanted, 0), abs=1e-5)
    assert np.ptp(found[present]) > 0.01


def test_pools_that_teach_little_are_warnings_and_stay(tmp_path):
    rows = [
        pool(0, rewards=(1, 1)), pool(1, rewards=(0, 0)), pool(2, ("yes",), (1,)), pool(3, ("yes", "no", "yes"), (1, 0, 1)),
        pool(4, prompt=""), pool(5),
    ]  # fmt: skip
    found, problems = checked(write(tmp_path / "odd.jsonl", rows))
    names = {
        "no wrong candidate",
        "no right candidate",
        "one candidate",
        "repeated candidate",
        "empty prompt",
    }
    assert kinds(problems, "warning") == names and not kinds(problems) and len(found) == 6
    assert found[3]["candidates"] == ["yes", "no"]


def test_the_indentation_of_code_makes_another_candidate(tmp_path):
    code = "if a:\n    b()\nc()", "if a:\n    b()\n    c()", "if a: \n    b()\nc()\n"
    found, problems = checked(write(tmp_path / "code.jsonl", [pool(0, code[:2]), pool(1, code, (1, 0, 1))]))
    assert [d["candidates"] for d in found] == [list(code[:2])] * 2
    assert kinds(problems, "warning") == {"repeated candidate"} and not kinds(problems)
    rows = [
        {"prompt": "which?", "chosen": code[0], "rejected": code[2]},
        {"prompt": "what?", "chosen": "a\tb", "rejected": "a b"},
    ]
    found, problems = checked(write(tmp_path / "pairs.jsonl", rows))
    assert kinds(problems) == {"contradicting rewards"} and [d["rewards"] for d in found] == [[1, 0]]


def test_an_unknown_kind_in_drop_is_refused(tmp_path):
    with pytest.raises(BadConfig, match="not a kind of problem that can be dropped"):
        checked(write(tmp_path / "a.jsonl", [pool(0)]), "data.drop=[bad luck]")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("validation-00000-of-1.parquet", "held_out"), ("training.jsonl", "train"), ("val.csv", "held_out"),
        ("selection.json", "selection"), ("evaluation.jsonl", None), ("testimonials.jsonl", None),
    ],
)  # fmt: skip
def test_a_split_is_a_whole_word_at_the_beginning_of_a_file_name(name, split):
    assert split_in_name(Path(name)) == split


def test_a_teacher_scores_all_candidates_of_a_split_or_none(tmp_path):
    rows = [
        pool(0, split="train", teacher=[2, -3]), pool(1, split="train", teacher=[1, None]), pool(2), pool(3, split="dev"),
    ]  # fmt: skip
    path = write(tmp_path / "taught.jsonl", rows)
    wrong = [(p.kind, p.location) for p in checked(path)[1] if p.severity == "error"]
    assert wrong == [("no teacher", "line 2 (p1)"), *[("no teacher", "line 3 (p2)")] * 2]
    found, problems = checked(path, "data.drop=[no teacher]")
    assert not kinds(problems) and [d["teacher"] for d in found] == [[2, -3], [None, None]]
    assert "teacher" not in checked(write(tmp_path / "plain.jsonl", [pool(0)]))[0][0]


@pytest.mark.parametrize("layout", ["pairs", "tuples", "rewardbench"])
def test_a_column_that_the_layout_does_not_read_is_a_warning(tmp_path, layout):
    rows = [row | {"teacher": 0.5, "models": "m"} for row in rows_of(layout, 2)]
    found, problems = checked(write(tmp_path / "rows.jsonl", rows))
    assert {p.found.split("'")[1] for p in problems} == {"teacher", "models"} and len(problems) == 2
    assert kinds(problems, "warning") == {"unread column"} and len(found) == 2


# --- rewards and shortcuts ------------------------------------------------------------------------------------------------


def test_rewards_are_mapped_by_rule():
    given, pools = np.array([-2.0, 8.0, 3.0, 0.0, 0.0, 4.0]), np.array(list("aaabbb"))
    linear = config_of(POOLS, "pools.reward_range=[-2,8]").pools
    np.testing.assert_allclose(mapped(given, pools, linear), [0, 1, 0.5, 0.2, 0.2, 0.6])
    ranked = config_of(POOLS, "pools.reward_range=[-2,8]", "pools.reward_rule=rank").pools
    np.testing.assert_allclose(mapped(given, pools, ranked), [0, 1, 0.5, 0.25, 0.25, 1])


def examples_of(records: list[dict], splits: list[str] | None = None) -> pa.Table:
    """The columns of stage 01 that stage 02 reads."""
    columns = {"example_id": [r["id"] for r in records], "split": splits or ["train"] * len(records)}
    return pa.table(columns | {"record": [json.dumps(r) for r in records]})


def test_the_order_of_the_candidates_depends_on_their_texts_alone():
    """Otherwise equal scores would favour a place in the file. The number of a candidate is its place."""
    names = [f"answer {k}" for k in range(12)]
    context = CandidateContext(config_of(POOLS), None, [])
    rows = [
        candidates(examples_of([pool(0, listed, range(12))]), context).to_pylist()
        for listed in (names, names[::-1])
    ]
    one, other = ([row["text"] for row in found] for found in rows)
    assert one == other and one not in (names, names[::-1]) and sorted(one) == sorted(names)
    for found, listed in zip(rows, (names, names[::-1]), strict=True):
        assert all(
            listed[r["candidate_id"]] == r["text"] and r["given_reward"] == r["candidate_id"] for r in found
        )


def planted(count: int, seed: int, shortcut: str = "") -> Any:
    """Pools of four candidates; with a shortcut, the right one differs from the others by it in nine of ten pools."""
    rng = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(300)]
    records, rewards = [], []
    for n in range(count):
        right = int(rng.integers(4))
        candidates = [" ".join(rng.choice(words, rng.integers(8, 12))) for _ in range(4)]
        kind = [f"writer {k}" for k in rng.permutation(4)]
        if rng.random() < 0.9:
            if shortcut == "length":
                candidates[right] += " " + " ".join(rng.choice(words, 8))
            if shortcut == "candidate_linear":
                candidates[right] += " therefore"
            if shortcut == "short":
                candidates[right] = " ".join(candidates[right].split()[:6])
            if shortcut == "candidate_trees":
                candidates[right] = candidates[right].title()  # words are compared without case
            if shortcut == "first":
                right = 0
            if shortcut in ("kind", "recognised_kind"):
                other = kind.index("writer 2")
                kind[right], kind[other] = kind[other], kind[right]
        if shortcut == "recognised_kind":
            candidates = [f"{text} style{name[-1]}" for text, name in zip(candidates, kind, strict=True)]
        prompt = " ".join(rng.choice(words, 10))
        if shortcut == "overlap":
            candidates[right] += " " + " ".join(prompt.split()[:4])
        records.append(
            {"id": f"{n}", "prompt": prompt, "group": f"{n}", "candidates": candidates, "kinds": kind}
        )
        rewards.append(np.eye(4)[right])
    return pools_of(records, rewards)


@pytest.mark.parametrize(
    "shortcut",
    [
        "length",
        "short",
        "candidate_linear",
        "candidate_trees",
        "first",
        "kind",
        "recognised_kind",
        "overlap",
        "",
    ],
)
def test_a_planted_shortcut_is_found_and_none_where_there_is_none(shortcut):
    pools = (80, 60) if shortcut else (200, 150)  # what is there is found in few pools
    train, held_out = (planted(count, seed, shortcut) for seed, count in enumerate(pools, 1))
    scorers = SimpleScorers(train, 0)
    shortcuts = Shortcuts()
    shortcuts.add(held_out, scorers.scores(held_out))
    rows = {row["scorer"]: row for row in shortcuts.rows()}
    assert all(row["chance"] == 0.25 for row in rows.values()) and len(rows) == 8
    for name, row in rows.items():
        if name == {"short": "length"}.get(shortcut, shortcut):
            assert row["low"] > 0.7, name
        elif not shortcut:
            assert row["low"] < 0.3 and row["accuracy"] < 0.37, name


def test_shortcuts_are_measured_on_pools_of_different_rewards():
    """In a pool of equal rewards, every choice is right."""
    records = [pool(n) | {"group": f"g{n}"} for n in range(4)]
    decided = pools_of(records, [np.array([1.0, 0.0])] * 2 + [np.array([0.0, 1.0])] + [np.ones(2)])
    equal = pools_of(records, [np.ones(2)] * 4)
    shortcuts = Shortcuts()
    shortcuts.add(equal, {"mine": np.zeros((4, 2))})
    assert not list(shortcuts.rows())
    shortcuts.add(decided, {"mine": np.array([[2.0, 1.0]] * 4)})
    (row,) = shortcuts.rows()
    assert (row["pools"], row["chance"], row["accuracy"]) == (3, 0.5, pytest.approx(2 / 3))


def test_simple_scorers_learn_from_train_pools_alone(monkeypatch):
    """The pools of other splits are not counted either, where those of train are more than scorers learn from."""
    splits = ["held_out", "selection", "train", "test"] * 6
    records = [pool(n) | {"group": f"g{n}"} for n in range(24)]
    of_train = [record["id"] for record, split in zip(records, splits, strict=True) if split == "train"]
    context = CandidateContext(config_of(POOLS), None, [], examples=[examples_of(records, splits)])
    monkeypatch.setattr(review, "MOST_CANDIDATES", 12)  # two of each train pool
    assert _train_pools(context).ids == of_train
    monkeypatch.setattr(review, "MOST_CANDIDATES", 3)
    some = _train_pools(context).ids
    assert set(some) < set(of_train) and 0 < len(some) <= 3


def test_many_writers_need_no_more_memory_than_few():
    """Of 40 writers, the most frequent one wrote the right candidates, and one of their words says so."""
    train, held_out = planted(60, 1), planted(40, 2)
    for pools in (train, held_out):
        pools.kinds[:] = [[f"writer {(n * 3 + k) % 39 + 1}" for k in range(4)] for n in range(len(pools))]
        rows = np.arange(len(pools)), pools.rewards.argmax(1)
        pools.kinds[rows] = "writer 0"
        pools.texts[rows] += " thus"
    assert np.unique(train.kinds).size == 40
    numbers = frequent(train.kinds.ravel())
    assert numbers.max() == 20 and set(numbers[train.kinds.ravel() == "writer 0"]) == {0}
    tracemalloc.start()
    scorers = SimpleScorers(train, 0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (
        most < 100 * 2**20
    )  # bytes; a dense weight for each of 2^19 features and 40 writers would be 168 million
    shortcuts = Shortcuts()
    shortcuts.add(held_out, scorers.scores(held_out))
    rows = {row["scorer"]: row for row in shortcuts.rows()}
    assert rows["recognised_kind"]["low"] > 0.7 and rows["kind"]["low"] > 0.7


def test_the_leak_limit_ends_stage_02(tmp_path):
    rows = [
        {"prompt": f"question {n} {'abcdefgh'[n % 8] * 5} {n * n}?", "candidates": ["no", "a long and right answer", "nay"],
         "rewards": [0, 1, 0]}
        for n in range(80)
    ]  # fmt: skip
    path = write(tmp_path / "leaky.jsonl", rows)
    config = config_of(path, "pools.leak_limit=0.6", "pools.near_duplicates=null")
    args = RunArgs(run_dir=tmp_path / "run", quick_test=True)
    for name in FIRST_STAGES[:2]:
        importlib.import_module(name).main(config, args)
    with pytest.raises(BadData, match=r"scorer '\w+' chooses up to 100.0%.*pools.leak_limit \(60.0%\)"):
        importlib.import_module(FIRST_STAGES[2]).main(config, args)


def row(scorer: str, accuracy: float, reads_prompt: bool) -> dict[str, Any]:
    """What `Shortcuts.rows` says about a scorer."""
    known = {"low": accuracy - 0.05, "high": accuracy + 0.05, "chance": 0.1}
    return {"scorer": scorer, "accuracy": accuracy, "reads_prompt": reads_prompt, **known}


def test_files_that_list_the_best_candidate_first_say_so_and_have_no_shortcut(capsys):
    """Only if every pool does, and only of the place in the file: a model reads everything else."""
    _report([row("first", 1.0, False), row("length", 0.1, False)], 0.6)
    said = capsys.readouterr().err
    assert "list the best candidate first in every pool" in said and "WARNING" not in said
    for scorer, accuracy in (("first", 0.9), ("length", 1.0)):
        with pytest.raises(BadData, match=f"scorer '{scorer}' chooses up to"):
            _report([row(scorer, accuracy, False)], 0.6)
        said = capsys.readouterr().err
        assert "list the best candidate first" not in said and f"WARNING: {scorer} find" in said


def test_a_limit_does_not_silence_the_warning_and_bm25_is_no_shortcut(capsys):
    _report([row("candidate_linear", 0.5, False), row("bm25", 0.9, True)], 0.6)
    assert "WARNING: candidate_linear find more right candidates than chance" in capsys.readouterr().err
    with pytest.raises(BadData, match="scorer 'overlap' chooses up to 75"):
        _report([row("overlap", 0.7, True), row("bm25", 0.9, True)], 0.6)
