"""
03: give every candidate a reward in [0, 1], with its named terms, its rank among its example's, and ties marked.

For text the reward is authenticity: 1 for untouched text, falling with the share of synthetic tokens.

reads   02_generate_candidates: candidates
writes  rewards.parquet, a row per (example_id, candidate_id)

python 03_build_rewards.py --quick_test --run_dir outputs/demo
"""

from lib.artifacts import RunArgs, Stage
from lib.cli import run_stage
from lib.config import Config
from lib.log import say


def main(config: Config, args: RunArgs) -> None:
    import numpy as np

    from lib import schema
    from lib.tasks import get_task

    uses = ("seed", "task", "rewards")
    with Stage(__file__, config, args, uses=uses, reads=("02_generate_candidates",)) as stage:
        if stage.finished:
            return
        task = get_task(config.task)

        # Reward group by group; stage 02 wrote the candidates of one example together
        kept: dict[str, list] = {"reward": [], "tied": [], "best": []}
        terms: dict[str, list] = {}
        with stage.writer("rewards", schema.REWARDS) as writer:
            for batch in whole_pools(stage.tables("02_generate_candidates", "candidates", schema.CANDIDATES)):
                reward, named = task.rewards(config, batch)
                table = reward_table(batch, np.asarray(reward, np.float64), named)
                writer.write(table)
                for name, values in kept.items():
                    values.append(table[name].to_numpy(zero_copy_only=False))
                for name, value in named.items():
                    terms.setdefault(name, []).append(value)

        # What a person asks of rewards
        reward = np.concatenate(kept["reward"])
        stage.stats |= {
            "rewards": len(reward),
            "mean": reward.mean(),
            "standard_deviation": reward.std(),
            "best": int(np.concatenate(kept["best"]).sum()),
            "tied": int(np.concatenate(kept["tied"]).sum()),
            "histogram": np.histogram(reward, bins=20, range=(0, 1))[0],
            "terms": {name: float(np.concatenate(values).mean()) for name, values in terms.items()},
        }
        say(
            f"{len(reward)} rewards, mean {reward.mean():.3f}, {stage.stats['tied']} of them tied within their pool"
        )


def whole_pools(batches):
    """The same rows, cut so that no example's candidates fall into two batches."""
    import pyarrow as pa
    import pyarrow.compute as pc

    rest = None
    for batch in batches:
        batch = pa.concat_tables([rest, batch]) if rest is not None else batch
        last = pc.equal(batch["example_id"], batch["example_id"][-1]).to_numpy(zero_copy_only=False)
        cut = int(last.argmax())
        rest = batch.slice(cut)
        if cut:
            yield batch.slice(0, cut)
    if rest is not None and rest.num_rows:
        yield rest


def reward_table(candidates, reward, terms):
    """Ranks and ties within each example. Equal means equal to nine decimals: rewards are sums of floats."""
    import numpy as np
    import pandas as pd
    import pyarrow as pa

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
    return pa.table(
        columns | {f"term_{name}": np.asarray(value, np.float64) for name, value in terms.items()}
    )


if __name__ == "__main__":
    run_stage(main, __doc__)
