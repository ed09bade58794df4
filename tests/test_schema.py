"""Tables are held to their columns, types, limits and keys; what is wrong is named with its row."""

import numpy as np
import pyarrow as pa
import pytest

from lib import schema
from lib.errors import BadData
from lib.schema import TableSchema

ALL = [s for s in vars(schema).values() if isinstance(s, TableSchema)]


def rewards(count: int = 3) -> pa.Table:
    return pa.table(
        {"example_id": [f"e{i}" for i in range(count)], "candidate_id": pa.array([0] * count, pa.int32()),
         "reward": [0.5] * count, "rank": pa.array([1] * count, pa.int32()), "best": [True] * count, "tied": [False] * count}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": [0.1, None, 0.2]}, "column reward: null in row 1"),
        ({"reward": [0.1, 1.5, 0.2]}, r"row 1: 1\.5 is outside"),
        ({"reward": [0.1, float("nan"), 0.2]}, "row 1: nan is outside"),
        ({"example_id": ["a", "a", "b"]}, "is in 2 rows"),
        ({"reward": ["x", "y", "z"]}, "expected double"),
        ({"other": [1, 2, 3]}, r"unknown columns \['other'\]"),
    ],
)
def test_tables_are_held_to_their_schema(change, message):
    columns = rewards().to_pydict() | change
    with pytest.raises(BadData, match=message):
        schema.conform(pa.table(columns), schema.REWARDS)
    kept = schema.conform(rewards().append_column("term_x", pa.array([1, 2, 3])), schema.REWARDS)
    assert str(kept.schema.field("term_x").type) == "double"


@pytest.mark.parametrize("table_schema", ALL, ids=lambda s: s.name)
def test_schemas_agree_with_themselves(table_schema):
    names = table_schema.arrow.names
    assert set(table_schema.key) <= set(names) and set(table_schema.ranges) <= set(names)
    assert not any(table_schema.arrow.field(k).nullable for k in table_schema.key)
    empty = table_schema.arrow.empty_table()
    assert schema.conform(empty, table_schema).schema.equals(table_schema.arrow)


def test_columns_come_in_the_order_of_the_schema_and_numbers_are_cast():
    shuffled = rewards().select(rewards().column_names[::-1]).set_column(0, "tied", pa.array([True] * 3))
    table = schema.conform(shuffled, schema.REWARDS)
    assert table.column_names == schema.REWARDS.arrow.names
    wide = rewards().set_column(1, "candidate_id", pa.array([0, 1, 2], pa.int64()))
    assert schema.conform(wide, schema.REWARDS).schema.field("candidate_id").type == pa.int32()
    with pytest.raises(BadData, match="candidate_id"):
        schema.conform(wide.set_column(1, "candidate_id", pa.array([0, 1, 2**40])), schema.REWARDS)


def test_a_missing_column_is_named():
    with pytest.raises(BadData, match=r"rewards: missing columns \['best'\]"):
        schema.conform(rewards().drop_columns(["best"]), schema.REWARDS)


def test_a_null_inside_a_list_is_refused_where_ids_are_required():
    table = pa.table(
        {"example_id": ["a"], "prompt": [""], "target": ["x"], "split": ["train"], "group": ["g"],
         "continues": [False], "token_ids": pa.array([[1, None]], pa.list_(pa.int32()))}
    )  # fmt: skip
    with pytest.raises(BadData, match="token_ids"):
        schema.conform(table, schema.EXAMPLES)


def test_hashes_of_keys_depend_on_every_part_of_the_key_and_nothing_else():
    first = schema.key_hashes(rewards(), schema.REWARDS)
    assert len(np.unique(first)) == 3
    other = rewards().set_column(2, "reward", pa.array([0.1, 0.2, 0.3]))
    np.testing.assert_array_equal(schema.key_hashes(other, schema.REWARDS), first)
    second = rewards().set_column(1, "candidate_id", pa.array([1, 1, 1], pa.int32()))
    assert not set(schema.key_hashes(second, schema.REWARDS)) & set(first)
