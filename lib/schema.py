"""Schemas of the tables that the stages exchange.

Columns are required unless marked `nullable`. Arrow does not check nulls and duplicate keys; `conform` checks both. With
`open_prefix`, a schema admits further columns whose names begin with this prefix.
"""

from dataclasses import dataclass, field

import pyarrow as pa

from lib.errors import BadData


@dataclass(frozen=True)
class TableSchema:
    name: str
    arrow: pa.Schema
    key: tuple[str, ...]  # columns that identify a row
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)  # inclusive limits per column
    open_prefix: str | None = None  # further columns with this prefix are kept, as float64


def _columns(*columns: tuple) -> pa.Schema:
    return pa.schema([pa.field(c[0], c[1], nullable=len(c) > 2) for c in columns])


_IDS = pa.list_(pa.field("item", pa.int32(), nullable=False))
_LABELS = pa.list_(pa.field("item", pa.int8(), nullable=False))
_TEXTS = pa.list_(pa.field("item", pa.string(), nullable=False))
_SPAN = [("start", pa.int64()), ("end", pa.int64()), ("class", pa.int8())]
_SPANS = pa.list_(
    pa.field("item", pa.struct([pa.field(n, t, nullable=False) for n, t in _SPAN]), nullable=False)
)
_NULLABLE = "nullable"

DOCUMENTS = TableSchema(
    "documents",
    _columns(
        ("document_id", pa.string()),
        ("content", pa.large_string()),
        ("source", pa.string()),
        ("piece", pa.int32()),  # a long text has several rows, in order
        ("group", pa.string(), _NULLABLE),  # documents of one group are never divided between splits
        ("label", pa.float64(), _NULLABLE),  # the user's: a score, or the number of a class
        ("spans", _SPANS, _NULLABLE),  # the user's: characters of the document, and their class
    ),
    key=("document_id", "piece"),
)

PROBLEMS = TableSchema(
    "problems",
    _columns(
        ("severity", pa.string()),  # error: training would be wrong | warning: left out or corrected
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
        ("split", pa.string()),  # train | selection (to choose the best step) | held_out | reference | test
        ("group", pa.string()),  # a group is never divided between splits or folds
        ("continues", pa.bool_()),  # this target begins where the target of the previous row ended
        ("token_ids", _IDS),  # of the target
        ("record", pa.large_string(), _NULLABLE),  # private data of the task
        ("tags", _TEXTS, _NULLABLE),  # results are also reported per tag
    ),
    key=("example_id",),
)

CUT_EXAMPLES = TableSchema(  # before they are tokenized
    "cut examples",
    pa.schema([f for f in EXAMPLES.arrow if f.name != "token_ids"]),
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
        ("kind", pa.string()),  # original | masked_lm | random_tokens | a kind of the task
        ("text", pa.large_string()),  # what a model reads
        ("program", pa.string(), _NULLABLE),  # for tasks whose candidates are programs
        ("value", pa.string(), _NULLABLE),  # the result of the program
        ("given_reward", pa.float64(), _NULLABLE),  # the reward in the user's file
        ("teacher_score", pa.float64(), _NULLABLE),  # the score of another model in the user's file
        (
            "control",
            pa.large_string(),
            _NULLABLE,
        ),  # the text with off-page content, as a control
        ("mask_ratio", pa.float64(), _NULLABLE),  # as drawn; null for the original
        ("synthetic_fraction", pa.float64(), _NULLABLE),  # of tokens whose label is above 0
        ("changed_fraction", pa.float64(), _NULLABLE),  # of tokens that differ from the original
        (
            "token_confidence",
            _NUMBERS,
            _NULLABLE,
        ),  # held_out: log-probability of each token under the masked LM, with the token masked
        ("token_ids", _IDS, _NULLABLE),
        ("token_labels", _LABELS, _NULLABLE),  # 0 original, 1 random replacement, 2 predicted
        (
            "label",
            pa.float64(),
            _NULLABLE,
        ),  # the user's, of the whole document: a score, or the number of a class
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
    open_prefix="score_",  # scores of simple baselines that do not read the words
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
        ("token_labels", _LABELS, _NULLABLE),  # the user's labels, in place of the candidate's
    ),
    key=("example_id", "candidate_id"),
    ranges={"reward": (0, 1)},
    open_prefix="term_",
)

SCORES = TableSchema(
    "scores",
    _columns(
        ("document_id", pa.string()),
        ("window", pa.int32()),  # consecutive pieces of the document, at most the models' context long
        ("text", pa.large_string()),
        ("token_ids", _IDS),
        ("critic_error", _NUMBERS, _NULLABLE),  # per token: calibrated probability that it is an error
        ("critic_error_mean", pa.float64(), _NULLABLE),
        ("inspector_changed", _NUMBERS, _NULLABLE),  # per token: probability that it is not the original
        ("inspector_changed_mean", pa.float64(), _NULLABLE),
        ("reference_nll", _NUMBERS, _NULLABLE),  # per token: nats under the reference model
        ("reference_nll_mean", pa.float64(), _NULLABLE),
        ("judge_score", pa.float64(), _NULLABLE),  # of the window
        (
            "judge_suspicion",
            pa.float64(),
            _NULLABLE,
        ),  # of the window: 1 - score, or 1 - the probability of the first class
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

RANKING = TableSchema(  # of a file of the user's own
    "ranking",
    _columns(
        ("pool_id", pa.string()),
        ("candidate_id", pa.int32()),  # its position in the file's pool
        ("prompt", pa.large_string()),
        ("text", pa.large_string()),
        ("score", pa.float64()),
        ("probability", pa.float64()),  # softmax of the scores in the pool
        ("rank", pa.int32()),  # by the score; 1 is the choice, and equal scores share the better rank
        ("reward", pa.float64(), _NULLABLE),  # as the file states it
    ),
    key=("pool_id", "candidate_id"),
)

ANSWERS = TableSchema(
    "answers",
    _columns(
        ("model", pa.string()),
        ("split", pa.string()),
        ("example_id", pa.string()),
        ("prompt", pa.large_string()),
        ("chosen", pa.large_string()),  # the candidate with the highest score
        ("value", pa.string(), _NULLABLE),  # the result of its program: the answer
        ("best_value", pa.string(), _NULLABLE),
        ("probability", pa.float64()),  # of the chosen candidate: softmax of the scores in its pool
        ("lead", pa.float64()),  # difference between the highest and the second score
        ("reward", pa.float64()),
        ("best_reward", pa.float64()),
        ("note", pa.string()),  # an explanation by the task
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
        (
            "given",
            pa.list_(pa.field("item", pa.bool_(), nullable=False)),
        ),  # positions with text of the user; never masked
        # nats per token under reference_lm, from the first generated token on
        ("reference_nll", pa.float64(), _NULLABLE),
        (
            "critic_error",
            pa.float64(),
            _NULLABLE,
        ),  # mean calibrated probability that a generated token is an error
        (
            "token_error",
            pa.list_(pa.field("item", pa.float32(), nullable=False)),
            _NULLABLE,
        ),  # the same, per token
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
        ("token_ids", _IDS),  # after the step; the mask id where a token is still masked
        (
            "events",
            _LABELS,
        ),  # 0 unchanged, 1 unmasked in this step, 2 re-masked in this step, 3 still masked
    ),
    key=("policy", "nfe", "sample_id", "iteration"),
)


def conform(table: pa.Table, schema: TableSchema) -> pa.Table:
    """The table with exactly the columns and types of `schema`. Raises BadData that names column and row.

    Missing nullable columns are added with nulls. Keys must be unique in this table; TableWriter checks them over several
    tables.
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
        raise BadData(f"table {table}, column {f.name}: null in row {row}; every row needs a value")
    if pa.types.is_list(f.type) and not f.type.value_field.nullable and pa.types.is_list(column.type):
        inside = pc.list_flatten(column)
        if inside.null_count:
            row = pc.list_parent_indices(column).filter(inside.is_null())[0]
            raise BadData(f"table {table}, column {f.name}, row {row}: the list contains a null")


def _cast(column: pa.ChunkedArray, f: pa.Field, table: str) -> pa.ChunkedArray:
    if column.type == f.type:
        return column
    try:
        return column.cast(f.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, ValueError) as error:
        raise BadData(
            f"table {table}, column {f.name} has type {column.type}; expected {f.type} ({error})"
        ) from None


def _check_ranges(table: pa.Table, schema: TableSchema) -> None:
    import pyarrow.compute as pc

    for name, (low, high) in schema.ranges.items():
        column = table[name]
        inside = pc.and_(pc.greater_equal(column, low), pc.less_equal(column, high))
        outside = pc.fill_null(pc.invert(inside), False)  # NaN compares false, and counts as outside
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
        key = counts.sort_by([("count_all", "descending")]).slice(0, 1).to_pylist()[0]
        count = key.pop("count_all")
        raise BadData(f"table {schema.name}: {key} is in {count} rows; its key {schema.key} must be unique")


def key_hashes(table: pa.Table, schema: TableSchema):
    """(rows,) uint64 hashes of the keys. They need 8 bytes per row to check uniqueness over several tables."""
    import numpy as np
    import pandas as pd

    if not schema.key:
        return np.empty(0, np.uint64)
    frame = table.select(list(schema.key)).to_pandas()
    return pd.util.hash_pandas_object(frame, index=False).to_numpy()
