"""
03: give every candidate a reward in [0, 1], with its named terms, its rank among its example's, and ties marked.

For text the reward is authenticity: 1 for untouched text, falling with the share of synthetic tokens.

reads   02_generate_candidates: candidates; your own labels, if labels.path is set
writes  rewards.parquet, a row per (example_id, candidate_id)

python 03_build_rewards.py --quick_test --run_dir outputs/demo
"""

from lib.artifacts import Stage
from lib.cli import run_stage
from lib.config import Config
from lib.errors import BadData
from lib.labels import classes_of, files_of, read_labels
from lib.log import say
from lib.runs import RunArgs


def main(config: Config, args: RunArgs) -> None:
    import numpy as np

    from lib import schema
    from lib.tasks import get_task

    uses = ("seed", "task", "rewards", "labels")
    reads = (
        ("01_prepare_dataset", "02_generate_candidates")
        if config.labels.path
        else ("02_generate_candidates",)
    )
    files = files_of(config.labels.path) if config.labels.path else []
    with Stage(__file__, config, args, uses=uses, reads=reads, files=files) as stage:
        if stage.finished:
            return
        task = get_task(config.task)
        own = OwnLabels(stage, config.labels.path) if config.labels.path else None

        # Reward group by group; stage 02 wrote the candidates of one example together
        kept: dict[str, list] = {"reward": [], "tied": [], "best": []}
        terms: dict[str, list] = {}
        with stage.writer("rewards", schema.REWARDS) as writer:
            for batch in whole_pools(stage.tables("02_generate_candidates", "candidates", schema.CANDIDATES)):
                if own is not None:
                    reward, named, classes = own.rewards(batch)
                else:
                    (reward, named), classes = task.rewards(config, batch), None
                table = reward_table(batch, np.asarray(reward, np.float64), named)
                if classes is not None:
                    table = table.append_column("token_labels", classes)
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
        if own is not None:
            stage.stats["labels"] = own.summary()
            say(own.line())
        say(
            f"{len(reward)} rewards, mean {reward.mean():.3f}, {stage.stats['tied']} of them tied with another of their example"
        )


class OwnLabels:
    """The user's labels, joined with the run's examples by id.

    Scores are rewards as they are. Where there are only token classes, the reward is the share of tokens of class 0.
    """

    def __init__(self, stage: Stage, path: str):
        from lib import schema
        from lib.tokenization import load_tokenizer

        labels = read_labels(path)
        if labels.faults:
            first = "; ".join(f"{f.example or f.source}: {f.kind}, {f.found}" for f in labels.faults[:5])
            raise BadData(
                f"{len(labels.faults)} labels are wrong ({first}); 00_check_data.py --overwrite lists them all"
            )
        columns = ["example_id", "split"]
        table = stage.read("02_generate_candidates", "candidates", schema.CANDIDATES, columns)
        ids = table["example_id"].to_pylist()
        self.by_id = dict(zip(ids, labels.of(ids, table["split"].to_pylist()), strict=True))
        self.unused = len(labels.by_key) - len(self.by_id)
        self.tokenizer = load_tokenizer(stage.folder_of("01_prepare_dataset", "tokenizer"))
        self.counts: dict[int, int] = {}  # class -> tokens

    def rewards(self, batch):
        """((rows,) rewards, named terms, column of token classes or None) of some candidates."""
        import numpy as np
        import pyarrow as pa

        labels = [self.by_id[name] for name in batch["example_id"].to_pylist()]
        classes = None
        if labels[0].spans is not None:
            classes = [
                self._classes(row, label) for row, label in zip(batch.to_pylist(), labels, strict=True)
            ]
            for row in classes:
                for kind, count in zip(*np.unique(row, return_counts=True), strict=True):
                    self.counts[int(kind)] = self.counts.get(int(kind), 0) + int(count)
        if labels[0].score is not None:
            reward = np.array([label.score for label in labels])
        else:
            reward = np.array([float((row == 0).mean()) if len(row) else 1.0 for row in classes or ()])
        column = None if classes is None else pa.array(classes, pa.list_(pa.int8()))
        return reward, {"label": reward}, column

    def _classes(self, row: dict, label):
        encoded = self.tokenizer(row["text"], add_special_tokens=False, return_offsets_mapping=True)
        if list(encoded["input_ids"]) != list(row["token_ids"]):
            raise BadData(f"{row['example_id']} is tokenised in another way than before; run stage 01 again")
        return classes_of(row["text"], encoded["offset_mapping"], label, row["example_id"])

    def summary(self) -> dict:
        return {"examples": len(self.by_id), "unused": self.unused, "tokens_by_class": self.counts}

    def line(self) -> str:
        parts = [f"{len(self.by_id):,} examples have labels of yours"]
        if self.unused:
            parts.append(f"{self.unused:,} labels belong to no example and are not used")
        if self.counts:
            parts.append(
                "tokens by class: " + ", ".join(f"{k}: {n:,}" for k, n in sorted(self.counts.items()))
            )
        return "; ".join(parts)


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
