"""Stage 03: ranks, ties, whole pools, the authenticity curve."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib import schema
from lib.candidates.reward_parts import RewardStatistics, merged_statistics, whole_pools
from lib.candidates.rewards import reward_table
from lib.config import load_config
from lib.errors import BadConfig, BadData
from lib.tasks.text.rewriting import rewards
from lib.training.reward_join import with_rewards


def pool_table(ids: list[str]) -> pa.Table:
    numbers = [ids[:i].count(e) for i, e in enumerate(ids)]
    return pa.table({"example_id": ids, "candidate_id": pa.array(numbers, pa.int32())})


def test_ranks_and_ties():
    table = reward_table(
        pool_table(["a", "a", "a", "b", "b"]), np.array([0.5, 1.0, 0.5, 0.2, 0.2]), {"x": np.arange(5)}
    )
    table = schema.conform(table, schema.REWARDS)
    assert table["rank"].to_pylist() == [2, 1, 2, 1, 1]
    assert table["tied"].to_pylist() == [True, False, True, True, True]
    assert table["best"].to_pylist() == [False, True, False, True, True]
    assert table["term_x"].to_pylist() == [0, 1, 2, 3, 4]


def test_sums_that_differ_in_the_last_bit_are_ties():
    table = reward_table(pool_table(["a", "a"]), np.array([0.1 + 0.2, 0.3]), {})
    assert table["tied"].to_pylist() == [True, True]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_no_pool_is_cut_in_two(size):
    ids = ["a"] * 4 + ["b"] * 1 + ["c"] * 7 + ["d"] * 3
    whole = pool_table(ids)
    pieces = list(whole_pools(whole.slice(i, size) for i in range(0, len(ids), size)))
    assert pa.concat_tables(pieces).to_pylist() == whole.to_pylist()
    owners = [set(p["example_id"].to_pylist()) for p in pieces]
    assert sum(len(o) for o in owners) == 4


def test_statistics_of_parts_are_those_of_the_whole_table():
    chance = np.random.default_rng(3)
    parts, rewards, terms = [], [], []
    for count in (1, 50, 7, 300):
        reward, term = chance.random(count), chance.random(count) * 5
        statistics = RewardStatistics()
        for part in np.array_split(np.arange(count), 2) if count > 1 else [np.arange(1)]:
            table = reward_table(pool_table(["a"] * len(part)), reward[part], {})
            statistics.add(table, {"term": term[part]})
        parts.append({"rewards": json.loads(json.dumps(statistics.state()))})
        rewards.append(reward)
        terms.append(term)
    found = merged_statistics(parts)[0].summary()
    whole = np.concatenate(rewards)
    assert found["rewards"] == len(whole) and found["best"] == 7
    assert found["mean"] == pytest.approx(whole.mean(), rel=1e-12)
    assert found["standard_deviation"] == pytest.approx(whole.std(), rel=1e-12)
    assert found["terms"] == {"term": pytest.approx(np.concatenate(terms).mean(), rel=1e-12)}
    assert np.array_equal(found["histogram"], np.histogram(whole, bins=20, range=(0, 1))[0])


def test_authenticity_follows_the_curve():
    table = pa.table({"synthetic_fraction": [0.0, 0.25, 0.5, 1.0]})
    value, terms = rewards(load_config(), table)
    assert value.tolist() == [1, 0.75, 0.5, 0]
    assert terms["untouched"].tolist() == [1, 0, 0, 0]
    bent = load_config(overrides=["rewards.curve=[[0, 1], [0.5, 0.2], [1, 0]]"])
    assert rewards(bent, table)[0].tolist() == pytest.approx([1, 0.6, 0.2, 0])
    with pytest.raises(BadConfig, match="must not increase"):
        load_config(overrides=["rewards.curve=[[0, 0], [1, 1]]"])


def test_joins_go_by_key_and_name_what_is_missing():
    left = pool_table(["a", "a", "b"]).append_column("x", pa.array([1, 2, 3]))
    right = reward_table(pool_table(["b", "a", "a"]), np.array([0.3, 0.1, 0.2]), {})
    examples = pa.table({"example_id": ["b", "a"], "group": ["gb", "ga"]})
    joined = with_rewards(left, right, examples)
    assert joined["reward"].to_pylist() == [0.1, 0.2, 0.3] and joined["group"].to_pylist() == [
        "ga",
        "ga",
        "gb",
    ]
    with pytest.raises(BadData, match="1 candidates have no reward"):
        with_rewards(left, right.slice(0, 2), examples)


def test_the_winners_terms_are_means_over_the_chosen_candidates(quick_run):
    metrics = json.loads((quick_run / "06_sample" / "metrics.json").read_text())
    (terms,) = metrics["winners"].values()
    rewards = pq.read_table(quick_run / "03_build_rewards" / "rewards").to_pandas()
    assert set(terms) == {"reward", *(c.removeprefix("term_") for c in rewards if c.startswith("term_"))}
    candidates = pq.read_table(quick_run / "02_generate_candidates" / "candidates").to_pandas()
    held_out = candidates.loc[candidates["split"] == "held_out", "example_id"].unique()
    pools = rewards[rewards["example_id"].isin(held_out)].groupby("example_id")["reward"]
    decided = pools.max() > pools.min()
    assert terms["reward"]["best"] == pytest.approx(pools.max()[decided].mean())
    assert terms["reward"]["random"] == pytest.approx(pools.mean()[decided].mean())
    assert pools.min()[decided].mean() <= terms["reward"]["winner"] <= terms["reward"]["best"]


def test_candidates_carry_the_hash_of_their_tokenizer(quick_run):
    written = pq.read_schema(
        quick_run / "02_generate_candidates" / "candidates" / "part_00000.parquet"
    ).metadata
    manifest = json.loads((quick_run / "01_prepare_dataset" / "manifest.json").read_text())
    assert written[b"tokenizer_sha256"].decode() == manifest["outputs"]["tokenizer"]["sha256"]
