"""Pools of candidates as tables: which rows make one, several draws of one example, and figures over seeds."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from benchmarks import over_seeds
from lib.errors import BadData, MissingInput
from lib.training.pool_table import PoolTable, decided_pools, terms_of
from lib.training.train_model import learns_from_equal

K = 4


def candidates(rewards: dict[str, list[float]]) -> pa.Table:
    rows = [
        {"example_id": name, "candidate_id": i, "text": f"{name}{i}", "kind": "x", "value": str(i), "control": f"c{i}",
         "reward": reward, "term_a": 1 - reward, "group": name}
        for name, values in rewards.items()
        for i, reward in enumerate(values)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows)


def examples(*names: str) -> pa.Table:
    return pa.Table.from_pylist(
        [{"example_id": n, "prompt": f"ask {n}", "tags": ["t"], "group": n} for n in names]
    )


def table(**rewards: list[float]) -> PoolTable:
    return PoolTable.of(candidates(rewards), examples(*rewards))


def test_draws_are_the_same_examples_with_other_candidates():
    whole = table(a=[1, 0, 0, 0, 0, 1, 0, 0], b=[0, 1, 0, 0, 0, 0, 0, 1])
    first, second = whole.draws(K)
    for part, columns in ((first, slice(0, 4)), (second, slice(4, 8))):
        assert part.prompts == ["ask a", "ask b"] and part.present.all() and part.present.shape == (2, K)
        assert np.array_equal(part.rewards, whole.rewards[:, columns])
        assert np.array_equal(part.terms["a"], whole.terms["a"][:, columns])
        assert part.controls is not None and whole.controls is not None
        assert np.array_equal(part.controls, whole.controls[:, columns])
        assert part.texts.tolist() == whole.texts[:, columns].tolist()
    assert second.candidate_ids.tolist() == [[4, 5, 6, 7]] * 2
    assert len(whole.draws(8)) == 1 and whole.draws(9) == [whole]


def test_candidates_that_make_no_whole_pools_are_refused():
    with pytest.raises(BadData, match=r"a has 8 candidates.*candidates\.per_example \(3\)"):
        table(a=[1, 0, 0, 0, 0, 1, 0, 0]).draws(3)
    with pytest.raises(BadData, match=r"b has 6 candidates, another example 8"):
        table(a=[1, 0, 0, 0, 0, 1, 0, 0], b=[1, 0, 0, 0, 0, 1]).draws(4)
    ragged = table(a=[1, 0, 0], b=[1, 0])  # one pool each, of any size
    assert ragged.draws(4) == [ragged]


def scored(*keys: tuple[str, int]) -> pa.Table:
    return pa.table(
        {
            "example_id": [name for name, _ in keys],
            "candidate_id": pa.array([number for _, number in keys], pa.int32()),
            "score_trees": [10.0 * i + 1 for i in range(len(keys))],
        }
    )


def test_baselines_come_with_all_pools_or_with_none_of_the_split():
    rows, asked = candidates({"a": [1, 0], "b": [0, 1, 0]}), examples("a", "b")
    keys = [("b", 2), ("b", 0), ("b", 1), ("a", 1), ("x", 0), ("a", 0)]
    found = PoolTable.of(rows, asked, scored(*keys)).baselines
    assert found["trees"].tolist() == [[51, 31, 0], [11, 21, 1]]
    assert PoolTable.of(rows, asked, scored(("x", 0))).baselines == {}
    assert PoolTable.of(rows, asked, None).baselines == {}
    for missing in ([("a", 0), ("a", 1)], [k for k in keys if k != ("b", 1)]):
        with pytest.raises(BadData, match=r"no score for \d of 5 candidates, the first is b, candidate"):
            PoolTable.of(rows, asked, scored(*missing))


def test_a_mismatched_prompt_is_of_another_group_and_every_pool_is_used_once():
    pools = table(**{name: [1.0, 0.0] for name in "abcdef"})
    grouped = replace(pools, groups=np.array(list("xxyyzz"), dtype=object))
    for seed in range(20):
        order = pools.mismatched(seed)
        assert sorted(order) == list(range(6)) and (order != np.arange(6)).all()
        assert (grouped.groups[grouped.mismatched(seed)] != grouped.groups).all()
    assert not np.array_equal(pools.mismatched(3), pools.mismatched(4))


def baselines(scores: dict[str, list[float]]) -> pa.Table:
    """A score for every candidate, in random order."""
    rows = [
        {"example_id": n, "candidate_id": i, "score_trees": s}
        for n, v in scores.items()
        for i, s in enumerate(v)
    ]
    return pa.Table.from_pylist(rows[::-1])


def test_every_pool_has_the_prompt_group_and_baseline_of_its_own_example():
    """Whatever order the tables are in: an example's row, and a candidate's score, are found by their keys."""
    rewards = {"a": [0, 1, 0.5], "b": [1.0, 0], "c": [0.25, 0.75, 0.5]}
    scores = {"c": [7.0, 8, 9], "a": [1.0, 2, 3], "x": [0.0], "b": [4.0, 5]}
    made = candidates(rewards).filter(pa.array([True, True, True, False, True, True, True, True]))
    found = PoolTable.of(candidates(rewards), examples("c", "x", "b", "a"), baselines(scores))
    assert found.prompts == ["ask a", "ask b", "ask c"] and found.groups.tolist() == ["a", "b", "c"]
    assert found.baselines["trees"].tolist() == [[1, 2, 3], [4, 5, 0], [7, 8, 9]]
    assert found.present.tolist() == [[True] * 3, [True, True, False], [True] * 3]
    for values in (found.rewards, found.terms["a"], found.candidate_ids):
        assert values[1, 2] == 0
    assert found.texts[1].tolist() == ["b0", "b1", ""] and found.kinds[1, 2] == "" == found.values[1, 2]
    assert found.terms["a"][0].tolist() == [1, 0, 0.5]
    skipped = PoolTable.of(
        made, examples("b", "c", "a"), baselines(scores)
    )  # b's one candidate is its second
    assert skipped.skipped == 1 and skipped.baselines["trees"].tolist() == [[1, 2, 3], [7, 8, 9]]
    numbered = made.set_column(1, "candidate_id", pa.array([2, 1, 0, 1, 0, 2, 1]))
    swapped = PoolTable.of(numbered, examples("a", "b", "c"), baselines(scores))
    assert swapped.baselines["trees"].tolist() == [[3, 2, 1], [7, 9, 8]]


def test_draws_cut_everything_that_belongs_to_candidates():
    scores = {"a": [float(i) for i in range(8)]}
    whole = PoolTable.of(candidates({"a": [1, 0, 0, 0, 0, 1, 0, 0]}), examples("a"), baselines(scores))
    for number, part in enumerate(whole.draws(K)):
        own = slice(number * K, number * K + K)
        assert part.baselines["trees"].tolist() == [scores["a"][own]]
        assert part.terms["a"].shape == part.kinds.shape == part.values.shape == (1, K)


def test_pools_of_equal_rewards_are_skipped_and_counted():
    rows, skipped = decided_pools(candidates({"a": [1, 1], "b": [0, 1, 0], "c": [0.5]}))
    assert rows.tolist() == [[2, 3, 4]] and skipped == 2
    with pytest.raises(BadData, match="no pool has candidates of different reward"):
        decided_pools(candidates({"a": [1, 1]}))


def test_a_term_counts_where_all_candidates_have_it_and_a_teacher_teaches_pools_of_equal_rewards():
    taught = candidates({"a": [1.0, 0.0], "b": [0.5, 0.5]})
    taught = taught.append_column("term_teacher", pa.array([3.0, 1.0, 2.0, 0.0]))
    unknown = taught.set_column(taught.num_columns - 1, "term_teacher", pa.array([3.0, 1.0, np.nan, 0.0]))
    assert "teacher" in terms_of(taught) and "teacher" not in terms_of(unknown)
    wanted = {"margin_mse": (True, False), "mse": (True, True), "pairwise": (False, False)}
    for loss, expected in wanted.items():
        config: Any = SimpleNamespace(ranker=SimpleNamespace(loss=loss))
        inputs: list[Any] = [SimpleNamespace(candidates=lambda split, t=t: t) for t in (taught, unknown)]
        spec: Any = SimpleNamespace(split="train")
        assert tuple(learns_from_equal(config, spec, i) for i in inputs) == expected


def run_folder(path, seed: int, value: float):
    folder = path / f"run_{seed}" / "04_train" / "judge"
    folder.mkdir(parents=True)
    row = {"model": "judge", "metric": "R2", "baseline": "constant", "value": value, "baseline_value": 0.1}
    (folder / "training_manifest.json").write_text(json.dumps({"table": [row]}))
    manifest = {"stage": "04_train", "config": {"seed": seed}, "inputs": {}, "outputs": {}, "stats": {}}
    (folder.parent / "manifest.json").write_text(json.dumps(manifest))
    return path / f"run_{seed}"


@pytest.mark.slow
def test_figures_over_seeds(tmp_path, capsys, monkeypatch):
    runs = [run_folder(tmp_path, seed, value) for seed, value in ((1, 0.5), (2, 0.6), (3, 0.7))]
    text = over_seeds.table(over_seeds.compare(runs))
    assert "0.500 0.600 0.700" in text and "0.600 +- 0.248" in text and "0.500 +- 0.248" in text
    assert over_seeds.differing_settings(runs) == [] and over_seeds.left_out(runs) == {}
    manifest = runs[2] / "04_train" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 3', '"seed": 3, "steps": 9'))
    file = next(runs[2].glob("04_train/*/training_manifest.json"))
    file.write_text(file.read_text().replace("R2", "map"))
    assert over_seeds.differing_settings(runs) == ["steps: (none) -> 9"]
    names = {metric: lacking for (_, metric), lacking in over_seeds.left_out(runs).items()}
    first, second, third = map(str, runs)
    assert names == {"R2": [third], "map": [first, second]}
    with pytest.raises(MissingInput, match="no model of stage 04"):
        over_seeds.rows_of(tmp_path)
    for given, said in (([runs[0]], "two runs"), ([runs[0], runs[0]], "different seeds")):
        monkeypatch.setattr("sys.argv", ["over_seeds", *map(str, given)])
        assert over_seeds.main() == 2 and said in capsys.readouterr().err
