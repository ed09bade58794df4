"""The table of rewards: ranks, ties and terms from the rewards of a task."""

import numpy as np
import pandas as pd
import pyarrow as pa


def reward_table(candidates: pa.Table, reward: np.ndarray, terms: dict[str, np.ndarray]) -> pa.Table:
    """A table of schema.REWARDS, with ranks and ties within each example.

    Rewards count as equal if nine decimals are equal, since they are sums of floats.

    Args:
        candidates: all candidates of each example; only the keys are read.
        reward: (rows,) in [0, 1].
        terms: name -> (rows,).
    """
    frame = pd.DataFrame({"example": candidates["example_id"].to_pylist(), "reward": np.round(reward, 9)})
    pools = frame.groupby("example", sort=False)["reward"]
    rank = pools.rank(method="min", ascending=False).to_numpy(np.int32)
    tied = frame.groupby(["example", "reward"], sort=False)["reward"].transform("size").to_numpy() > 1
    columns = {
        "example_id": candidates["example_id"],
        "candidate_id": candidates["candidate_id"],
        "reward": reward,
        "rank": rank,
        "best": rank == 1,
        "tied": tied,
    }
    named = {f"term_{name}": np.asarray(value, np.float64) for name, value in terms.items()}
    return pa.table(columns | named)
