"""Splits of task pools: those that files give, and prompts that must not be divided."""

import itertools
import json
import tracemalloc

import numpy as np
import pytest

from lib.ranking.bm25 import bm25_scores
from lib.tasks import Document
from lib.tasks.pools.check import check
from lib.tasks.pools.examples import prepare, split_of
from lib.tasks.pools.near_duplicates import SAME_PROMPT, SIMILAR_PROMPT, PromptGroups, minima, similarity
from lib.tasks.pools.shortcuts import overlap, pools_of
from tests.pool_files import checked, config_of, kinds, pool, write

# --- splits that the files give -------------------------------------------------------------------------------------------


def test_a_prompt_in_two_given_splits_is_an_error_and_a_similar_one_a_warning(tmp_path):
    asked = "how many people live in the city of houston in texas today"
    rows = [
        pool(0, prompt=asked, split="train"), pool(1, prompt=asked.upper(), split="dev"),
        pool(2, prompt=asked + " please", split="test"), pool(3, split="train"),
    ]  # fmt: skip
    found, problems = checked(write(tmp_path / "splits.jsonl", rows))
    assert kinds(problems) == {"prompt in two splits"}
    assert "similar prompts in two splits" in kinds(problems, "warning")
    assert [d["split"] for d in found] == ["train", "test", "train"]


def test_a_pool_without_a_split_takes_that_of_its_group(tmp_path):
    asked = "how many people live in the city of houston in texas today"
    rows = [
        pool(0, prompt=asked + " please"), pool(1, prompt=asked, split="test"), pool(2, prompt=asked.upper()),
        pool(3, group="g"), pool(4, group="g", split="dev"), pool(5, group="g"), pool(6), pool(7, split="train"),
    ]  # fmt: skip
    path = write(tmp_path / "splits.jsonl", rows)
    found, problems = checked(path)
    assert [d.get("split") for d in found] == [*["test"] * 3, *["held_out"] * 3, None, "train"]
    assert not problems
    write(tmp_path / "data.jsonl", [pool(0, prompt=asked), pool(1)])
    write(tmp_path / "test.jsonl", [pool(2, prompt=asked + " please")])
    path.unlink()
    assert [d.get("split") for d in checked(tmp_path)[0]] == ["test", None, "test"]


def test_a_group_in_two_given_splits_is_an_error(tmp_path):
    rows = [
        pool(0, group="g"),
        pool(1, group="g", split="train"),
        pool(2, group="g", split="test"),
        pool(3, group="h"),
    ]
    path = write(tmp_path / "groups.jsonl", rows)
    errors = [p for p in checked(path)[1] if p.severity == "error"]
    assert [(p.kind, p.location) for p in errors] == [("group in two splits", "line 3 (p2)")]
    found, problems = checked(path, "data.drop=[group in two splits]")
    assert [d["id"] for d in found] == ["p0", "p1", "p3"] and not kinds(problems)


def linked(number: int, prompt: str, **other: str) -> dict:
    return pool(number, prompt=prompt) | other


LONG = " ".join(f"word{n}" for n in range(40))


DROP = "data.drop=[group in two splits, prompt in two splits]"


def test_a_group_is_not_divided_by_a_pool_without_a_split_in_between(tmp_path):
    """p1 is of group g, which is of train, and has the prompt of p2, which is of test: no pair of splits in one place."""
    rows = [
        linked(0, "one", group="g"),
        linked(1, "two", group="g"),
        linked(2, "two", split="test"),
        linked(3, "three", group="g", split="train"),
    ]
    for order in itertools.permutations(range(4)):
        path = write(tmp_path / "linked.jsonl", [rows[n] for n in order])
        (error,) = (p for p in checked(path, "pools.near_duplicates=null")[1] if p.severity == "error")
        assert error.kind == "group in two splits" and "link them" in error.found, order
        assert "of train" in error.found and "of test" in error.found
        found, _ = checked(path, "pools.near_duplicates=null", DROP)
        later = "p2" if order.index(3) < order.index(2) else "p3"  # the first split holds for all
        split = "train" if later == "p2" else "test"
        assert {d["id"]: d["split"] for d in found} == {f"p{n}": split for n in range(4) if f"p{n}" != later}


def test_a_pool_that_is_left_out_takes_no_others_with_it(tmp_path):
    rows = [
        linked(0, "a", group="g", split="train"),
        linked(1, "b", group="g", split="test"),
        linked(2, "b", split="train"),
        linked(3, "b"),
    ]
    found, problems = checked(write(tmp_path / "left_out.jsonl", rows), "pools.near_duplicates=null", DROP)
    assert {d["id"]: d["split"] for d in found} == {"p0": "train", "p2": "train", "p3": "train"}
    assert [p.location for p in problems] == ["line 2 (p1)"]


def test_similar_prompts_in_two_splits_are_a_warning_in_every_order(tmp_path):
    """p1 is similar to p0 and has the split of p2 by its group."""
    rows = [
        linked(0, LONG, split="train"),
        linked(1, LONG + " a b c d e f g h", group="h"),
        linked(2, "another one", split="test", group="h"),
    ]
    for order in itertools.permutations(range(3)):
        path = write(tmp_path / "similar.jsonl", [rows[n] for n in order])
        found, problems = checked(path, "pools.near_duplicates=0.8")
        assert [(p.kind, p.severity) for p in problems] == [("similar prompts in two splits", "warning")]
        assert {d["id"]: d["split"] for d in found} == {"p0": "train", "p1": "test", "p2": "test"}


def test_a_pool_takes_the_split_of_the_similar_prompt_and_not_that_of_a_chain(tmp_path):
    near = LONG + " a b c d e f g h"
    rows = [
        linked(0, LONG, split="train"),
        linked(1, near, split="test"),
        linked(2, near + " i j k l m n o p q r"),  # similar to p1 alone
    ]
    for order in itertools.permutations(range(3)):
        found, _ = checked(
            write(tmp_path / "chain.jsonl", [rows[n] for n in order]), "pools.near_duplicates=0.8"
        )
        assert {d["id"]: d["split"] for d in found} == {"p0": "train", "p1": "test", "p2": "test"}


def test_the_split_of_a_taught_pool_is_that_of_its_group(tmp_path):
    """Both pools of dev have a teacher, one by its group; train has none."""
    rows = [
        pool(0, split="train"), pool(1, split="dev", group="g", teacher=[2, -3]), pool(2, group="g", teacher=[1, 0]),
    ]  # fmt: skip
    found, problems = checked(write(tmp_path / "a.jsonl", rows), "pools.near_duplicates=null")
    assert len(found) == 3 and not kinds(problems)


def test_names_of_several_files_give_the_split_unless_a_row_does(tmp_path):
    """The name of a single file says nothing about its rows."""
    apart = "pools.near_duplicates=null"
    for name in ("dev.jsonl", "test.jsonl"):
        path = write(tmp_path / name, [pool(0), pool(1, split="train")])
        for source in (path, tmp_path):
            assert [d.get("split") for d in checked(source, apart)[0]] == [None, "train"]
        path.unlink()
    write(tmp_path / "dev.jsonl", [pool(0), pool(1, split="train")])
    write(tmp_path / "test.jsonl", [pool(2), pool(3, split="dev")])
    found, problems = checked(tmp_path, apart)
    assert [d["split"] for d in found] == ["held_out", "train", "test", "held_out"] and not problems


def test_splits_that_the_files_give_are_kept(tmp_path):
    def splits(split, *given):
        return {split_of(split, f"g{n}", set(given), config_of(tmp_path)) for n in range(200)}

    assert splits("train", "train", "selection", "held_out") == {"train"}
    assert splits(None, "", "train", "held_out") == {"train", "selection"}
    assert splits("train", "train") == {"train", "selection", "held_out"}


# --- similar prompts -------------------------------------------------------------------------------------------------------


def test_similar_prompts_are_in_one_split(tmp_path):
    """80 questions, each in four wordings: no question is divided, and all splits exist."""
    rows = []
    for n in range(80):
        words = " ".join(f"w{(n * 7 + k * 13) % 97}x{n}" for k in range(14))
        rows += [
            pool(0, id=f"{n}-{k}", prompt=f"{words}{' or so' * (k % 2)}{'?' * (k // 2)}") for k in range(4)
        ]
    path = write(tmp_path / "similar.jsonl", rows)
    documents = [d for d in check(config_of(path)) if isinstance(d, Document)]
    splits: dict[str, set[str]] = {}
    for example in prepare(config_of(path), documents):
        splits.setdefault(example.example_id.split("-")[0], set()).add(example.split)
    assert all(len(found) == 1 for found in splits.values())
    assert set().union(*splits.values()) == {"train", "selection", "held_out"}


@pytest.mark.parametrize(("pools", "largest", "said"), [(10, 6, True), (10, 5, False), (9, 9, False)])
def test_most_pools_in_one_group_are_a_warning(tmp_path, pools, largest, said):
    """More than half of ten or more. The splits of few pools are small anyway."""
    rows = [pool(n, group=f"g{max(n - largest + 1, 0)}") for n in range(pools)]
    found, problems = checked(write(tmp_path / "groups.jsonl", rows), "pools.near_duplicates=null")
    assert len(found) == pools and not kinds(problems)
    assert [(p.kind, p.found.split(" prompts")[0]) for p in problems] == [("few groups", "6 of 10")] * said


@pytest.mark.parametrize("threshold", [0.4, 0.6, 0.8])
def test_pairs_at_the_threshold_are_found_and_others_are_not(threshold):
    """Pairs of prompts with common words at their beginning: their Jaccard index is above, or far below the threshold."""
    found = {}
    for where, wanted in (("above", threshold + 0.02), ("below", threshold - 0.25)):
        found[where] = 0
        with PromptGroups(threshold) as groups:
            for n in range(60):
                words = [f"w{n}x{k}" for k in range(60)]
                common = next(c for c in range(61) if (2 * c - 1) / (2 * 119 - 2 * c + 1) >= wanted)
                groups.add(" ".join(words))
                found[where] += bool(
                    groups.add(" ".join([*words[:common], *(w + "y" for w in words[common:])]))
                )
    assert found["above"] >= 54 and found["below"] <= 3


def test_minhash_estimates_the_jaccard_index():
    rng = np.random.default_rng(0)
    for share in (0.3, 0.6, 0.9):
        common = [f"c{i}" for i in range(int(400 * share))]
        one = " ".join(rng.permutation([*common, *(f"a{i}" for i in range(400 - len(common)))]))
        other = " ".join(rng.permutation([*common, *(f"b{i}" for i in range(400 - len(common)))]))
        sets = [set(t.split()) | set(zip(t.split(), t.split()[1:], strict=False)) for t in (one, other)]
        exact = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        assert similarity(minima(one), minima(other)) == pytest.approx(exact, abs=0.12)
    with PromptGroups(0.8) as groups:
        assert (
            groups.add("one two three four five six") == [] and groups.add("") == [] and groups.add("") == []
        )
        assert groups.add("One two, three four five six!") == [(0, SIMILAR_PROMPT)] and groups.root(3) == 0
        assert groups.add("One two  THREE four five six") == [(0, SAME_PROMPT)] and groups.root(4) == 0


def test_prompts_that_differ_in_signs_alone_are_similar_and_not_the_same(tmp_path):
    rows = [
        pool(0, prompt="What is 7 + 5?", split="train"), pool(1, prompt="What is 7 - 5?", split="test"),
        pool(2, prompt="what is c++", split="train"), pool(3, prompt="What is  C", split="test"),
    ]  # fmt: skip
    found, problems = checked(write(tmp_path / "signs.jsonl", rows))
    assert len(found) == 4 and not kinds(problems)
    assert [p.kind for p in problems] == ["similar prompts in two splits"] * 2


@pytest.mark.parametrize(
    "sentences",
    [
        (
            "北京市有多少人口居住在城市的中心地区和郊区",
            "北京市有多少人口居住在城市的中心地区和郊区呢",
            "这本书的作者是谁写的时候在哪里",
        ),
        (
            "東京の人口は何人ですか、教えてください",
            "東京の人口は何人ですか、教えてくださいね",
            "この本の著者は誰でしょうか",
        ),
        ("กรุงเทพมหานครมีประชากรกี่คนในปีนี้", "กรุงเทพมหานครมีประชากรกี่คนในปีนี้ครับ", "หนังสือเล่มนี้ใครเขียน"),
    ],
    ids=["chinese", "japanese", "thai"],
)
def test_similar_prompts_and_shared_words_are_found_without_spaces(sentences):
    with PromptGroups(0.7) as groups:
        assert [groups.add(text) for text in sentences] == [[], [(0, SIMILAR_PROMPT)], []]
    record = {"id": "a", "prompt": sentences[0], "group": "a", "candidates": list(sentences)}
    pools = pools_of([record], [np.array([1.0, 0.0, 0.0])])
    for scores in (overlap(pools)[0], bm25_scores(pools.prompts, pools.texts, pools.present)[0]):
        assert scores[0] > 0 and scores[1] > 0.8 * scores[0] and scores[2] < 0.3 * scores[0]


def test_memory_does_not_grow_with_the_rows(tmp_path):
    def peak(count: int) -> int:
        rows = ({"id": n // 10, "prompt": f"prompt {n // 10} {'x' * 200}", "candidate": f"text {n} {'y' * 300}", "reward": n % 10 / 10}
                for n in range(count))  # fmt: skip
        path = tmp_path / f"{count}.jsonl"
        with open(path, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        config = config_of(path, "pools.near_duplicates=null")
        tracemalloc.start()
        found = sum(isinstance(item, Document) for item in check(config))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert found == count // 10
        return most

    peak(100)  # what is loaded once
    small, large = peak(2_000), peak(12_000)
    assert large - small < 1_000 * 40  # bytes, for a thousand more prompts of five thousand bytes each
