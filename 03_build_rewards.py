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
from lib.labels import LabelledExamples, files_of, read_labels
from lib.log import say
from lib.runs import RunArgs


def main(config: Config, args: RunArgs) -> None:
    import numpy as np
    import pyarrow as pa

    from lib import schema
    from lib.candidates.rewards import reward_table
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
        own = own_labels(stage, config.labels.path) if config.labels.path else None

        # Reward group by group; stage 02 wrote the candidates of one example together
        kept: dict[str, list] = {"reward": [], "tied": [], "best": []}
        terms: dict[str, list] = {}
        with stage.writer("rewards", schema.REWARDS) as writer:
            for batch in whole_pools(stage.tables("02_generate_candidates", "candidates", schema.CANDIDATES)):
                if own is not None:
                    reward, named, classes = own.rewards(batch.to_pylist())
                else:
                    (reward, named), classes = task.rewards(config, batch), None
                table = reward_table(batch, np.asarray(reward, np.float64), named)
                if classes is not None:
                    table = table.append_column("token_labels", pa.array(classes, pa.list_(pa.int8())))
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
        tied = f"{stage.stats['tied']:,} of them tied with another of their example"
        say(f"{len(reward):,} rewards, mean {reward.mean():.3f}, {tied}")


def own_labels(stage: Stage, path: str) -> LabelledExamples:
    """The user's labels of the run's examples. Raises BadData for wrong ones and for examples without any."""
    from lib import schema
    from lib.tokenization import load_tokenizer

    labels = read_labels(path)
    labels.refuse_faults()
    columns = ["example_id", "split"]
    table = stage.read("02_generate_candidates", "candidates", schema.CANDIDATES, columns)
    tokenizer = load_tokenizer(stage.folder_of("01_prepare_dataset", "tokenizer"))
    return LabelledExamples(labels, table["example_id"].to_pylist(), table["split"].to_pylist(), tokenizer)


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


if __name__ == "__main__":
    run_stage(main, __doc__)
