"""
03: give every candidate a reward in [0, 1].

Each row has the reward, the terms that it is made of, and the candidate's rank among those of the same example. Equal
rewards are marked as ties. For text the reward is authenticity: 1 for untouched text, less the more tokens are synthetic.
With labels.path or data.label_key, your own labels take the place of these rewards.

reads   02_generate_candidates: candidates; labels.path, if it is set
writes  rewards/, a table in parts, one row per (example_id, candidate_id)

python 03_build_rewards.py --quick_test --run_dir outputs/demo
"""

from lib.artifacts import Stage
from lib.cli import run_stage
from lib.config import Config
from lib.label_files import files_of
from lib.log import say
from lib.runs import RunArgs

BYTES_OF_A_REWARD = 128  # a row of the table, at most


def main(config: Config, args: RunArgs) -> None:
    from lib import schema
    from lib.candidates.reward_parts import RewardWork, merged_statistics, user_labels

    own = ("pools",) if config.task == "pools" else ()
    uses = ("seed", "task", "rewards", "labels", "data.label_key", "data.label_classes", *own)
    reads = (
        ("01_prepare_dataset", "02_generate_candidates")
        if config.labels.path
        else ("02_generate_candidates",)
    )
    files = files_of(config.labels.path) if config.labels.path else []
    with Stage(__file__, config, args, uses=uses, reads=reads, files=files) as stage:
        if stage.finished:
            return

        # 1. Compute the rewards: a part for each part of the candidates
        candidates = stage.table("02_generate_candidates", "candidates")
        tokenizer = stage.folder_of("01_prepare_dataset", "tokenizer") if config.labels.path else stage.folder
        parts = stage.parts({"rewards": schema.REWARDS})
        work = RewardWork(config, parts, candidates, tokenizer)
        room = BYTES_OF_A_REWARD * candidates.rows
        made = stage.make_parts(parts, work, len(candidates.files), "rewards", room)
        if made is None:
            return
        stage.add_parts(made)

        # 2. Summarise them for the manifest and the screen
        statistics, classes = merged_statistics(made.counters)
        stage.stats |= statistics.summary()
        if (labels := user_labels(config, candidates, tokenizer)) is not None:
            labels.counts = classes
            stage.stats["labels"] = labels.summary()
            say(labels.line())
        tied = f"{statistics.tied:,} of them tied with another candidate of the same example"
        say(f"{statistics.count:,} rewards, mean {statistics.mean:.3f}, {tied}")


if __name__ == "__main__":
    run_stage(main, __doc__, with_parts=True)
