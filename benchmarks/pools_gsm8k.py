"""
GSM8K: choose the right one of the solutions that several language models wrote, over five folds of the problems.

The file has rows with prompt, candidates, rewards and writers. Each fold is held out once. Recognising the writer is a shortcut,
since the models differ in strength; its rows show how far it leads. The majority is over the final answers of the solutions. An
epoch is a pass over the problems with right and wrong solutions that are not kept apart to choose the best step.

python -m benchmarks.pools_gsm8k /path/to/solutions.jsonl --encoder /path/to/all-MiniLM-L6-v2
python -m benchmarks.pools_gsm8k /path/to/solutions.jsonl --encoder /path/to/all-MiniLM-L6-v2 --short   # two folds, few problems
"""

import argparse
import importlib
import json
import lzma
import re
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pools_wikiqa import FIRST_STAGES
from benchmarks.pools_wikiqa import pools_of as stored_pools
from benchmarks.provenance import say_provenance
from benchmarks.result_files import add_out, write
from lib import randomness
from lib.config import ROOT, Config, load_config
from lib.evaluation.rank import Ranker
from lib.log import say
from lib.metrics import ratio
from lib.ranking.metrics import paired_difference
from lib.report.table import aligned
from lib.runs import RunArgs
from lib.tasks.pools.shortcuts import SimpleScorers, SomePools, pools_of

_ANSWER = re.compile(r"-?[\d,]*\.?\d+")


def read(path: Path) -> list[dict[str, Any]]:
    data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    return [json.loads(line) for line in data.decode().splitlines() if line.strip()]


def final_answer(solution: str) -> str:
    """The last number of a solution, as text; "" if it has none."""
    found = _ANSWER.findall(solution)
    return f"{float(found[-1].replace(',', '') or 0):.15g}" if found else ""


def chosen_reward(scores: np.ndarray, rewards: np.ndarray) -> float:
    """The expected reward of the candidate with the highest score; ties are drawn at random."""
    return float(rewards[scores == scores.max()].mean())


def simple_choices(
    records: list[dict[str, Any]], train: list[dict[str, Any]], seed: int
) -> dict[str, list[float]]:
    """Rows without a ranker: name -> the reward of the choice for each held-out problem."""
    strength: dict[str, list[float]] = defaultdict(list)
    for record in train:
        for writer, reward in zip(record["writers"], record["rewards"], strict=True):
            strength[writer].append(reward)
    best = max(strength, key=lambda writer: np.mean(strength[writer]))
    rows: dict[str, list[float]] = defaultdict(list)
    for record in records:
        rewards = np.array(record["rewards"])
        answers = [final_answer(text) for text in record["candidates"]]
        votes = Counter(answers)
        rows["random"].append(float(rewards.mean()))
        rows["majority of answers"].append(chosen_reward(np.array([votes[a] for a in answers]), rewards))
        own = np.array([float(writer == best) for writer in record["writers"]])
        rows["best single writer"].append(chosen_reward(own, rewards))
        rows["oracle"].append(float(rewards.max()))
    scorers = SimpleScorers(as_pools(train), seed)
    names = {"kind": "stated writer", "recognised_kind": "recognised writer", "length": "length",
             "candidate_linear": "candidate alone, linear", "candidate_trees": "candidate alone, trees", "bm25": "BM25"}  # fmt: skip
    pools = as_pools(records)
    scores = scorers.scores(pools)
    for key, name in names.items():
        if key in scores:
            for n, record in enumerate(records):
                size = len(record["rewards"])
                rows[name].append(chosen_reward(scores[key][n, :size], np.array(record["rewards"])))
    return rows


def as_pools(records: list[dict[str, Any]]) -> SomePools:
    renamed = [record | {"kinds": record["writers"], "group": record["id"]} for record in records]
    return pools_of(renamed, [np.array(record["rewards"]) for record in records])


def ranker_choices(
    options: argparse.Namespace, work: Path, train: list[dict[str, Any]], held_out: list[dict[str, Any]]
) -> list[list[float]]:
    """Train on one side of a fold, and rank the other: scores of each held-out problem."""
    data = work / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("dev", held_out)):
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    config = config_of(options, data, 1)
    for stage in FIRST_STAGES:
        importlib.import_module(stage).main(config, RunArgs(run_dir=work / "run"))
    learned = sum(len(set(pool["rewards"])) > 1 for pool in stored_pools(work / "run", "train"))
    config = config_of(options, data, max(1, options.epochs * learned // options.pools_per_step))
    importlib.import_module("04_train").main(config, RunArgs(run_dir=work / "run"))
    ranker = Ranker.load(work / "run")
    found = ranker.rank_all([r["prompt"] for r in held_out], [r["candidates"] for r in held_out])
    return [ranking.scores.tolist() for ranking in found]


def config_of(options: argparse.Namespace, data: Path, steps: int) -> Config:
    settings = [
        f"data.path={data}", f"seed={options.seed}", f"ranker.encoder={options.encoder}", "ranker.prompt_tokens=192", "ranker.candidate_tokens=256",
        f"ranker.loss={options.loss}", "ranker.best_by=reward", f"models.ranker.training.steps={steps}",
        f"models.ranker.training.batch_size={options.pools_per_step}",
        f"models.ranker.training.evaluate_every={max(1, steps // options.epochs)}",
        f"models.ranker.training.checkpoint_every={steps}",
    ]  # fmt: skip
    return load_config([ROOT / "configs" / "pools.yaml"], overrides=[*settings, *options.set])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("solutions", type=Path, help="file of solutions: .jsonl, or .jsonl.xz")
    parser.add_argument("--encoder", required=True, help="folder of an encoder")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--loss", default="cross_entropy")
    parser.add_argument("--pools_per_step", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--work", type=Path, help="folder of the runs, which are kept; default: a temporary one"
    )
    parser.add_argument("--short", action="store_true", help="60 problems in two folds, one epoch")
    add_out(parser)
    options = parser.parse_args()
    records = read(options.solutions)
    if options.short:
        records, options.folds, options.epochs = records[:60], 2, 1
    say_provenance()
    with tempfile.TemporaryDirectory() as temporary:
        figures = measure(options, records, options.work or Path(temporary))
    write(options.out, "pools_gsm8k", figures)


def measure(options: argparse.Namespace, records: list[dict[str, Any]], work: Path) -> dict[str, Any]:
    fold = (randomness.permutation(options.seed, "folds", 0, len(records)) * options.folds) // len(records)
    rows: dict[str, np.ndarray] = {}
    for number in range(options.folds):
        held_out = [r for r, f in zip(records, fold, strict=True) if f == number]
        train = [r for r, f in zip(records, fold, strict=True) if f != number]
        found: dict[str, list[float]] = simple_choices(held_out, train, options.seed)
        scores = ranker_choices(options, work / f"fold_{number}", train, held_out)
        pairs = list(zip(scores, held_out, strict=True))
        found["ranker"] = [chosen_reward(np.array(s), np.array(r["rewards"])) for s, r in pairs]
        found["ranker among the majority"] = [among_majority(s, r) for s, r in pairs]
        for name, values in found.items():
            rows.setdefault(name, np.zeros(len(records)))[fold == number] = values
        say(f"fold {number}: " + ", ".join(f"{name} {np.mean(values):.3f}" for name, values in found.items()))
    figures: dict[str, Any] = {
        "problems": len(records),
        "folds": options.folds,
        "epochs": options.epochs,
        "rows": {},
    }
    lines: list[tuple[str, ...]] = [
        ("chosen by", "right", "95 % interval", "ranker is better by", "95 % interval")
    ]
    for name, values in rows.items():
        right = ratio(values, limits=(0, 1))
        lead = paired_difference(rows["ranker"], values, np.arange(len(values)), 0)
        figures["rows"][name] = {"right": right._asdict(), "lead_of_ranker": lead}
        lines.append((name, f"{right.value:.1%}", f"{right.low:.1%} .. {right.high:.1%}", f"{lead['value']:+.1%}",
                      f"{lead['low']:+.1%} .. {lead['high']:+.1%}"))  # fmt: skip
    print(aligned(lines))
    return figures


def among_majority(scores: list[float], record: dict[str, Any]) -> float:
    """The reward of the highest score among the solutions with the most frequent answers."""
    answers = [final_answer(text) for text in record["candidates"]]
    votes = Counter(answers)
    kept = np.array([votes[a] == max(votes.values()) for a in answers])
    return chosen_reward(np.where(kept, scores, -np.inf), np.array(record["rewards"]))


if __name__ == "__main__":
    main()
