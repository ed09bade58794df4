"""Tables of several stages joined by their keys, never by the place of a row."""

import pandas as pd
import pyarrow as pa

from lib.errors import BadData


def with_rewards(candidates: pa.Table, rewards: pa.Table, examples: pa.Table) -> pa.Table:
    """Candidates with `reward`, its `term_...` columns and their example's `group`, in the candidates' order.

    Where the user gave token classes of their own, these are the candidates' `token_labels`.

    Raises BadData naming the first candidates that have no reward.
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
        raise BadData(f"candidates of example {first} belong to no example; run 02_generate_candidates again")
    assert isinstance(joined, pd.DataFrame)
    table = candidates
    for name in values:
        table = table.append_column(name, pa.array(joined[name].to_numpy()))
    if "token_labels" in rewards.column_names and rewards["token_labels"].null_count < rewards.num_rows:
        place = table.column_names.index("token_labels")
        own = rewards["token_labels"].take(pa.array(joined["row"].to_numpy()))
        table = table.set_column(place, table.schema.field("token_labels"), own)
    return table.append_column("group", pa.array(joined["group"].to_numpy(), pa.string()))
