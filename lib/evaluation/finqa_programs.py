"""Choose among programs that other systems wrote for FinQA's questions, by the ranker of a finished run and by votes.

python -m lib.evaluation.finqa_programs outputs/run_001 programs.jsonl
python -m lib.evaluation.finqa_programs outputs/run_001 programs.jsonl --out chosen.json

`lib.tasks.finqa.programs_of_systems` describes the file. Each program is checked and executed. The questions are those of the run's
splits held_out and test. For each question these choose one of the programs:

    ranker             the ranker's score alone
    majority vote      the answer that most systems give
    ranker with votes  the score, and the logarithm of an answer's share of the votes. Their weights are fitted on programs that
                       simulated systems write for the split selection (`lib.tasks.finqa.simulated_systems`)
    random answer      each of the different answers is as likely
    oracle             right if any system is right

Each system alone is in the same table, over all questions and over those where the answers differ and one of them is right.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import durable
from lib.errors import BadConfig, BadData, RemaskError
from lib.evaluation.rank import Ranker, say_shortened
from lib.log import say
from lib.models.ranker_files import RANKER_FILE
from lib.report.table import aligned, interval_text
from lib.runs import load_manifest, plain
from lib.tasks import problem_lines
from lib.tasks.finqa.error_kinds import error_kind
from lib.tasks.finqa.grounding import ground
from lib.tasks.finqa.numbers import PageNumbers
from lib.tasks.finqa.programs_of_systems import Written, read_written
from lib.tasks.finqa.record import Record
from lib.tasks.finqa.simulated_systems import SimulatedSystems
from lib.tasks.finqa.votes import Answers, VoteWeights, answers_of, measure_choices

SPLITS = ("held_out", "test")  # whose questions the ranker has not seen
SELECTION = "selection"
DRAWS = 4  # of the programs of simulated systems
POOL = 8  # programs of a question's pool that simulated systems know
MOST_LEARNED = 1000  # questions that the simulated systems learn from


@dataclass(frozen=True)
class FinqaRun:
    """What a finished run has of task finqa.

    Attributes:
        prompts: question id -> the prompt that the ranker reads.
        others: question id -> the other programs of its first pool.
    """

    seed: int
    records: dict[str, dict[str, Record]]  # split -> question id -> record
    prompts: dict[str, str]
    others: dict[str, list[str]]

    @classmethod
    def read(cls, folder: Path) -> "FinqaRun":
        """Raises BadData if stages 01 and 02 of the run are not complete, BadConfig if it has another task."""
        manifest = load_manifest(folder / "01_prepare_dataset")
        if manifest is None or load_manifest(folder / "02_generate_candidates") is None:
            raise BadData(f"{folder}: stages 01 and 02 are not complete; give the folder of a finished run")
        if manifest["config"].get("task") != "finqa":
            raise BadConfig(
                f"{folder} is a run of task {manifest['config'].get('task')}; give one of task finqa"
            )
        columns = ["example_id", "prompt", "split", "record"]
        rows = _read(folder / "01_prepare_dataset" / "examples", columns)
        records: dict[str, dict[str, Record]] = {}
        for row in rows:
            records.setdefault(row["split"], {})[row["example_id"]] = Record.from_json(row["record"])
        others: dict[str, list[str]] = {}
        columns = ["example_id", "candidate_id", "kind", "program"]
        for row in _read(folder / "02_generate_candidates" / "candidates", columns):
            if row["candidate_id"] < POOL and row["kind"] not in ("gold", "near_miss"):
                others.setdefault(row["example_id"], []).append(row["program"])
        prompts = {row["example_id"]: row["prompt"] for row in rows}
        return cls(int(manifest["config"]["seed"]), records, prompts, others)

    def questions(self, *splits: str) -> dict[str, Record]:
        """Question id -> record, of these splits."""
        return {name: record for split in splits for name, record in self.records.get(split, {}).items()}


def _read(table: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return pq.read_table(table, columns=list(columns)).to_pylist()


def choose(run: Path, file: Path, name: str = "ranker") -> dict[str, Any]:
    """The figures of `votes.measure_choices`, the kinds of the systems' errors, and the choice for each question.

    Args:
        name: of the ranker in stage 04, or the folder of a ranker such as `05_train_critic/ppo/best_model`.

    Raises:
        MissingInput: the run has no such ranker, or there is no such file.
        BadData: no row of the file can be used.
    """
    known = FinqaRun.read(run)
    written, problems = read_written(file, known.questions(*SPLITS))
    for line in problem_lines(problems):
        say(line)
    if not any(any(one.systems.values()) for one in written):
        raise BadData(
            f"{file}: there is no program to choose from for a question of the splits {' and '.join(SPLITS)}"
        )
    own = run / name
    ranker = Ranker.load(own) if (own / RANKER_FILE).exists() else Ranker.load(run, name)
    (development,) = simulated(known, SELECTION)
    weights = fitted_weights(development, known.prompts, ranker)
    answers = scored(written, known.prompts, ranker)
    figures = measure_choices(answers, weights, known.seed)
    figures["errors"] = errors_of(answers)
    figures["problems"] = dict(Counter(p.kind for p in problems))
    figures["choices"] = [_choice(a, weights) for a in answers if a.values]
    return figures


def simulated(run: FinqaRun, *splits: str) -> list[list[Written]]:
    """For each of the splits the programs of simulated systems, `DRAWS` times. The systems learn from the train split."""
    train = run.questions("train")
    learned = sorted(train)[:: -(-len(train) // MOST_LEARNED)]
    systems = SimulatedSystems.fit([train[name] for name in learned], run.others, run.seed)
    found = []
    for asked in map(run.questions, splits):
        drawn = systems.write(list(asked.values()), run.others, DRAWS)
        found.append([Written(asked[name], dict(of)) for programs in drawn for name, of in programs.items()])
    return found


def fitted_weights(development: Sequence[Written], prompts: Mapping[str, str], ranker: Ranker) -> VoteWeights:
    """The weights of scores and votes. Only the questions whose answers differ are scored, since the others say nothing."""
    return VoteWeights.fit(scored([one for one in development if one.differ], prompts, ranker))


def scored(written: Sequence[Written], prompts: Mapping[str, str], ranker: Ranker) -> list[Answers]:
    """The answers of each question with the ranker's scores. Questions without a program that runs have no answers."""
    pages: dict[str, PageNumbers] = {}
    texts = []
    able = [one for one in written if one.votes()]
    for one in able:
        page = pages.setdefault(one.record.filename, PageNumbers(one.record))
        programs = zip(one.votes(), one.values(), strict=True)
        texts.append([ground(program, value, page) for program, value in programs])
    asked = [prompts[one.record.id] for one in able]
    say_shortened(ranker.shortened(asked, texts), ranker)
    rankings = iter(ranker.rank_all(asked, texts))
    return [answers_of(one, next(rankings).scores if one.votes() else []) for one in written]


def errors_of(answers: Sequence[Answers]) -> dict[str, float]:
    """Kind of error -> its share among the wrong programs of all systems."""
    counts: Counter[str] = Counter()
    for one in answers:
        record, gold, votes = one.written.record, one.written.gold, one.written.votes()
        for (program, count), value in zip(votes.items(), one.written.values(), strict=True):
            if value != gold:
                counts[error_kind(record.program or "", program, gold, value)] += count
    return {kind: count / counts.total() for kind, count in counts.most_common()}


def _choice(answers: Answers, weights: VoteWeights) -> dict[str, Any]:
    chosen, alone = int(weights.utilities(answers).argmax()), int(answers.scores.argmax())
    return {
        "id": answers.written.record.id,
        "program": answers.programs[chosen],
        "value": answers.values[chosen],
        "right": bool(answers.right[chosen]),
        "score": float(answers.scores[chosen]),
        "votes": int(answers.votes[chosen]),
        "value_by_ranker": answers.values[alone],
    }


def table(figures: Mapping[str, Any]) -> str:
    """The figures as text."""

    def cell(estimate: dict[str, float] | None, sign: str = "") -> str:
        if estimate is None:
            return "-"
        return f"{estimate['value']:{sign}.1%} ({interval_text(estimate, percent=True, between=' to ')})"

    head = (
        "method", f"all {figures['questions']:,} questions", f"{figures['differ']:,} where answers differ, one is right"
    )  # fmt: skip
    lines = [head] + [(row["method"], cell(row["all"]), cell(row["differ"])) for row in figures["rows"]]
    lines += [
        (f"{name} less majority", cell(lead["all"], "+"), cell(lead["differ"], "+"))
        for name, lead in figures["over_majority"].items()
    ]
    errors = ", ".join(f"{kind} {share:.1%}" for kind, share in figures["errors"].items())
    ratio = figures["weights"]["votes"] / figures["weights"]["score"]
    return (
        f"{aligned(lines)}\n\nIntervals are 95 % intervals; pages are resampled. Of the wrong programs: {errors or 'none'}.\n"
        f"The logarithm of the share of the votes counts {ratio:.2f} times as much as the score."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.evaluation.finqa_programs", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("run_dir", type=Path, help="a finished run of task finqa, such as outputs/run_001")
    parser.add_argument("file", type=Path, help="programs of other systems, such as programs.jsonl")
    parser.add_argument(
        "--ranker", default="ranker", help="its name in stage 04, or its folder in the run; default: ranker"
    )
    parser.add_argument("--out", type=Path, help="file for the figures and the choices as JSON")
    options = parser.parse_args(arguments)
    try:
        figures = choose(options.run_dir, options.file, options.ranker)
        if options.out is not None:
            durable.write_json(options.out, plain(figures))
    except RemaskError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
