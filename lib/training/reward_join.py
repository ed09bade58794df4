"""Candidates joined with their rewards and groups, by key and never by row position."""

import pandas as pd
import pyarrow as pa

from lib.errors import BadData


def with_rewards(candidates: pa.Table, rewards: pa.Table, examples: pa.Table) -> pa.Table:
    """Candidates with their `reward`, its `term_...` columns and the `group` of their example, in the same order.

    Token labels that the user provided replace the candidates' `token_labels`.

    Raises BadData that names the first candidates without a reward or an example.
    """
    key = ["example_id", "candidate_id"]
    left = candidates.select(key).to_pandas()
    values = ["reward", *(name for name in rewards.column_names if name.startswith("term_"))]
    right = rewards.select([*key, *values]).to_pandas()
    right["row"] = range(len(right))
    joined = left.merge(right, on=key, how="left", validate="one_to_one")
    missing = joined["reward"].isna()
    if missing.any():
        first = joined.loc[missing, key].head(3).to_dict("records")
        raise BadData(
            f"{int(missing.sum())} candidates have no reward, such as {first}; run 03_build_rewards again"
        )
    groups = examples.select(["example_id", "group"]).to_pandas()
    joined = joined.merge(groups, on="example_id", how="left", validate="many_to_one")
    if joined["group"].isna().any():
        first = joined.loc[joined["group"].isna(), "example_id"].iloc[0]
        raise BadData(
            f"candidates refer to example {first}, which is not in the table examples; run 02_generate_candidates again"
        )
    assert isinstance(joined, pd.DataFrame)
    table = candidates
    for name in values:
        table = table.append_column(name, pa.array(joined[name].to_numpy()))
    if "token_labels" in rewards.column_names and rewards["token_labels"].null_count < rewards.num_rows:
        column = table.column_names.index("token_labels")
        labels = rewards["token_labels"].take(pa.array(joined["row"].to_numpy()))
        table = table.set_column(column, table.schema.field("token_labels"), labels)
    return table.append_column("group", pa.array(joined["group"].to_numpy(), pa.string()))
