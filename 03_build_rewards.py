"""
03: give every candidate a reward in [0, 1].

Each row has the reward, the terms that it is made of, and the candidate's rank among those of the same example. Equal
rewards are marked as ties. For text the reward is authenticity: 1 for untouched text, less the more tokens are synthetic.
With labels.path, your own labels take the place of these rewards.

reads   02_generate_candidates: candidates; labels.path, if it is set
writes  rewards.parquet, one row per (example_id, candidate_id)

python 03_build_rewards.py --quick_test --run_dir outputs/demo
"""

from lib.artifacts import Stage
from lib.cli import run_stage
from lib.config import Config
from lib.label_files import files_of, read_labels
from lib.labels import LabelledExamples
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
        labels = user_labels(stage, config.labels.path) if config.labels.path else None

        # Compute the rewards pool by pool: stage 02 writes the candidates of one example together
        columns: dict[str, list] = {"reward": [], "tied": [], "best": []}
        terms: dict[str, list] = {}
        with stage.writer("rewards", schema.REWARDS) as writer:
            for batch in whole_pools(stage.tables("02_generate_candidates", "candidates", schema.CANDIDATES)):
                if labels is not None:
                    reward, batch_terms, classes = labels.rewards(batch.to_pylist())
                else:
                    (reward, batch_terms), classes = task.rewards(config, batch), None
                table = reward_table(batch, np.asarray(reward, np.float64), batch_terms)
                if classes is not None:
                    table = table.append_column("token_labels", pa.array(classes, pa.list_(pa.int8())))
                writer.write(table)
                for name, values in columns.items():
                    values.append(table[name].to_numpy(zero_copy_only=False))
                for name, value in batch_terms.items():
                    terms.setdefault(name, []).append(value)

        # Summarise them for the manifest and the screen
        reward = np.concatenate(columns["reward"])
        stage.stats |= {
            "rewards": len(reward),
            "mean": reward.mean(),
            "standard_deviation": reward.std(),
            "best": int(np.concatenate(columns["best"]).sum()),
            "tied": int(np.concatenate(columns["tied"]).sum()),
            "histogram": np.histogram(reward, bins=20, range=(0, 1))[0],
            "terms": {name: float(np.concatenate(values).mean()) for name, values in terms.items()},
        }
        if labels is not None:
            stage.stats["labels"] = labels.summary()
            say(labels.line())
        tied = f"{stage.stats['tied']:,} of them tied with another candidate of the same example"
        say(f"{len(reward):,} rewards, mean {reward.mean():.3f}, {tied}")


def user_labels(stage: Stage, path: str) -> LabelledExamples:
    """The user's labels of the run's examples. Raises BadData for invalid labels and for examples without a label."""
    from lib import schema
    from lib.tokenization import load_tokenizer

    labels = read_labels(path)
    labels.refuse_faults()
    columns = ["example_id", "split"]
    table = stage.read("02_generate_candidates", "candidates", schema.CANDIDATES, columns)
    tokenizer = load_tokenizer(stage.folder_of("01_prepare_dataset", "tokenizer"))
    return LabelledExamples(labels, table["example_id"].to_pylist(), table["split"].to_pylist(), tokenizer)


def whole_pools(batches):
    """The same rows in other batches: all candidates of one example are in the same batch."""
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
