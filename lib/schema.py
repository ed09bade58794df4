"""The tables that stages hand to each other: their columns, and the row rules that Arrow does not check.

Knows tables only. Columns are required unless marked `nullable`; arrow lets nulls and duplicate keys through,
so `conform` checks both. A schema marked `open_prefix` admits further columns whose names start so.
"""

from dataclasses import dataclass, field

import pyarrow as pa

from lib.errors import BadData


@dataclass(frozen=True)
class TableSchema:
    name: str
    arrow: pa.Schema
    key: tuple[str, ...]  # these columns together name a row
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)  # inclusive limits per column
    open_prefix: str | None = None  # further columns named like this are kept, as float64


def _columns(*columns: tuple) -> pa.Schema:
    return pa.schema([pa.field(c[0], c[1], nullable=len(c) > 2) for c in columns])


_IDS = pa.list_(pa.field("item", pa.int32(), nullable=False))
_LABELS = pa.list_(pa.field("item", pa.int8(), nullable=False))
_TEXTS = pa.list_(pa.field("item", pa.string(), nullable=False))
_NULLABLE = "nullable"

DOCUMENTS = TableSchema(
    "documents",
    _columns(("document_id", pa.string()), ("content", pa.large_string()), ("source", pa.string())),
    key=("document_id",),
)

PROBLEMS = TableSchema(
    "problems",
    _columns(
        ("severity", pa.string()),  # error: training would be wrong | warning: left out or mended
        ("kind", pa.string()),
        ("source", pa.string()),  # the file
        ("location", pa.string()),  # line, row or record in it
        ("found", pa.string()),
        ("expected", pa.string()),
        ("advice", pa.string()),
    ),
    key=(),
)

EXAMPLES = TableSchema(
    "examples",
    _columns(
        ("example_id", pa.string()),
        ("prompt", pa.large_string()),
        ("target", pa.large_string()),
        ("split", pa.string()),  # train | selection (chooses the best step) | held_out | reference | test
        ("group", pa.string()),  # examples of one group are never in two splits or two folds
        ("continues", pa.bool_()),  # this target goes on exactly where the row before ended
        ("token_ids", _IDS),  # of the target
        ("record", pa.large_string(), _NULLABLE),  # what the task itself needs later, as it likes
        ("tags", _TEXTS, _NULLABLE),  # results are also shown for the examples of each tag
    ),
    key=("example_id",),
)

DROPPED = TableSchema(
    "dropped",
    _columns(("example_id", pa.string()), ("reason", pa.string()), ("text", pa.large_string())),
    key=(),
)

_NUMBERS = pa.list_(pa.field("item", pa.float32(), nullable=False))

CANDIDATES = TableSchema(
    "candidates",
    _columns(
        ("example_id", pa.string()),
        ("candidate_id", pa.int32()),
        ("split", pa.string()),
        ("kind", pa.string()),  # original | masked_lm | random_tokens | what the task calls its own
        ("text", pa.large_string()),  # what a model reads
        ("program", pa.string(), _NULLABLE),  # of tasks whose candidates compute something
        ("value", pa.string(), _NULLABLE),  # what it comes to
        (
            "control",
            pa.large_string(),
            _NULLABLE,
        ),  # the text as it would be elsewhere: nobody can judge by it
        ("mask_ratio", pa.float64(), _NULLABLE),  # as drawn; null for the original
        ("synthetic_fraction", pa.float64(), _NULLABLE),  # as counted
        ("changed_fraction", pa.float64(), _NULLABLE),  # of tokens that are not the original's
        (
            "token_confidence",
            _NUMBERS,
            _NULLABLE,
        ),  # held-out: log-probability of each token, hidden, under the masked LM
        ("token_ids", _IDS, _NULLABLE),
        ("token_labels", _LABELS, _NULLABLE),  # 0 original, 1 random replacement, 2 predicted
    ),
    key=("example_id", "candidate_id"),
    ranges={
        "mask_ratio": (0, 1),
        "synthetic_fraction": (0, 1),
        "changed_fraction": (0, 1),
        "candidate_id": (0, 2**31 - 1),
    },
)

BASELINES = TableSchema(
    "baselines",
    _columns(("example_id", pa.string()), ("candidate_id", pa.int32())),
    key=("example_id", "candidate_id"),
    open_prefix="score_",  # what simple methods that learn no words give each candidate
)

REWARDS = TableSchema(
    "rewards",
    _columns(
        ("example_id", pa.string()),
        ("candidate_id", pa.int32()),
        ("reward", pa.float64()),
        ("rank", pa.int32()),  # 1 is best; equal rewards share the better rank
        ("best", pa.bool_()),  # has the highest reward of its example
        ("tied", pa.bool_()),  # shares its reward with another candidate of its example
        ("token_labels", _LABELS, _NULLABLE),  # the user's own classes, in place of the candidate's
    ),
    key=("example_id", "candidate_id"),
    ranges={"reward": (0, 1)},
    open_prefix="term_",
)

SCORES = TableSchema(
    "scores",
    _columns(
        ("document_id", pa.string()),
        ("window", pa.int32()),  # consecutive pieces of the document, each at most the models' context
        ("text", pa.large_string()),
        ("token_ids", _IDS),
        ("critic_error", _NUMBERS, _NULLABLE),  # per token: calibrated chance that it is an error
        ("critic_error_mean", pa.float64(), _NULLABLE),
        ("inspector_changed", _NUMBERS, _NULLABLE),  # per token: chance that it is not the original
        ("inspector_changed_mean", pa.float64(), _NULLABLE),
        ("reference_nll", _NUMBERS, _NULLABLE),  # per token: nats under the reference model
        ("reference_nll_mean", pa.float64(), _NULLABLE),
        ("judge_score", pa.float64(), _NULLABLE),  # of the window
    ),
    key=("document_id", "window"),
)

RANKED = TableSchema(
    "ranked",
    _columns(
        ("model", pa.string()),
        ("split", pa.string()),
        ("example_id", pa.string()),
        ("candidate_id", pa.int32()),
        ("text", pa.large_string()),
        ("kind", pa.string()),
        ("score", pa.float64()),
        ("rank", pa.int32()),  # by the score; 1 is the model's choice
        ("reward", pa.float64()),
    ),
    key=("model", "example_id", "candidate_id"),
)

ANSWERS = TableSchema(
    "answers",
    _columns(
        ("model", pa.string()),
        ("split", pa.string()),
        ("example_id", pa.string()),
        ("prompt", pa.large_string()),
        ("chosen", pa.large_string()),  # the candidate of the highest score
        ("value", pa.string(), _NULLABLE),  # what it comes to: the answer
        ("best_value", pa.string(), _NULLABLE),
        ("probability", pa.float64()),  # of the chosen one among its pool: softmax of the scores
        ("lead", pa.float64()),  # of its score over the second
        ("reward", pa.float64()),
        ("best_reward", pa.float64()),
        ("note", pa.string()),  # the task's words
    ),
    key=("model", "example_id"),
)

SAMPLES = TableSchema(
    "samples",
    _columns(
        ("policy", pa.string()),
        ("nfe", pa.int32()),
        ("sample_id", pa.int32()),
        ("infill_id", pa.string(), _NULLABLE),  # of the row of sampler.infill_file
        ("text", pa.large_string()),
        ("token_ids", _IDS),
        ("given", pa.list_(pa.field("item", pa.bool_(), nullable=False))),  # protected positions
        # nats per token under reference_lm, from the first written one on
        ("reference_nll", pa.float64(), _NULLABLE),
        ("critic_error", pa.float64(), _NULLABLE),  # mean calibrated chance that a written token is an error
        (
            "token_error",
            pa.list_(pa.field("item", pa.float32(), nullable=False)),
            _NULLABLE,
        ),  # the same per token
        ("judge_score", pa.float64(), _NULLABLE),
    ),
    key=("policy", "nfe", "sample_id"),
)

TRACE = TableSchema(
    "trace",
    _columns(
        ("policy", pa.string()),
        ("nfe", pa.int32()),
        ("sample_id", pa.int32()),
        ("iteration", pa.int32()),
        ("token_ids", _IDS),  # after the round; the mask id where a token is still to be written
        (
            "events",
            _LABELS,
        ),  # 0 as before, 1 written in this round, 2 taken back in this round, 3 still masked
    ),
    key=("policy", "nfe", "sample_id", "iteration"),
)


def conform(table: pa.Table, schema: TableSchema) -> pa.Table:
    """The table with exactly the columns and types of `schema`, or BadData that names column and row.

    Nullable columns that are not there are made, empty.
    Uniqueness of keys over several batches is the writer's business; within this table it is checked here.
    """
    for f in schema.arrow:
        if f.nullable and f.name not in table.column_names:
            table = table.append_column(f, pa.nulls(table.num_rows, f.type))
    extra = [c for c in table.column_names if c not in schema.arrow.names]
    if schema.open_prefix:
        extra = [c for c in extra if not c.startswith(schema.open_prefix)]
    missing = [f.name for f in schema.arrow if f.name not in table.column_names]
    if extra or missing:
        raise BadData(f"table {schema.name}: missing columns {missing}, unknown columns {extra}")
    fields = list(schema.arrow)
    if schema.open_prefix:
        fields += [
            pa.field(c, pa.float64(), nullable=False)
            for c in table.column_names
            if c.startswith(schema.open_prefix)
        ]
    for f in fields:
        _check_nulls(table[f.name], f, schema.name)
    columns = [_cast(table[f.name], f, schema.name) for f in fields]
    table = pa.Table.from_arrays(columns, schema=pa.schema(fields))
    _check_ranges(table, schema)
    _check_keys(table, schema)
    return table


def _check_nulls(column: pa.ChunkedArray, f: pa.Field, table: str) -> None:
    import pyarrow.compute as pc

    if not f.nullable and column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise BadData(f"table {table}, column {f.name}: empty in row {row}; every row needs a value")
    if pa.types.is_list(f.type) and not f.type.value_field.nullable and pa.types.is_list(column.type):
        inside = pc.list_flatten(column)
        if inside.null_count:
            row = pc.list_parent_indices(column).filter(inside.is_null())[0]
            raise BadData(f"table {table}, column {f.name}, row {row}: the list holds an empty value")


def _cast(column: pa.ChunkedArray, f: pa.Field, table: str) -> pa.ChunkedArray:
    if column.type == f.type:
        return column
    try:
        return column.cast(f.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, ValueError) as error:
        raise BadData(
            f"table {table}, column {f.name} has the wrong type: {column.type} where {f.type} belongs ({error})"
        ) from None


def _check_ranges(table: pa.Table, schema: TableSchema) -> None:
    import pyarrow.compute as pc

    for name, (low, high) in schema.ranges.items():
        column = table[name]
        inside = pc.and_(pc.greater_equal(column, low), pc.less_equal(column, high))
        outside = pc.fill_null(pc.invert(inside), False)  # NaN compares false, so it is outside
        if pc.any(outside).as_py():
            row = outside.to_pylist().index(True)
            raise BadData(
                f"table {schema.name}, column {name}, row {row}: {column[row].as_py()} is outside [{low}, {high}]"
            )


def _check_keys(table: pa.Table, schema: TableSchema) -> None:
    if not schema.key or not table.num_rows:
        return
    counts = table.group_by(list(schema.key)).aggregate([([], "count_all")])
    if counts.num_rows != table.num_rows:
        worst = counts.sort_by([("count_all", "descending")]).slice(0, 1).to_pylist()[0]
        times = worst.pop("count_all")
        raise BadData(
            f"table {schema.name}: {worst} stands in {times} rows; its key {schema.key} must be unique"
        )


def key_hashes(table: pa.Table, schema: TableSchema):
    """(rows,) uint64 hashes of the keys, for uniqueness over batches at 8 bytes a row."""
    import numpy as np
    import pandas as pd

    if not schema.key:
        return np.empty(0, np.uint64)
    frame = table.select(list(schema.key)).to_pandas()
    return pd.util.hash_pandas_object(frame, index=False).to_numpy()
