"""
WikiQA: the ranker of task pools beside the CrossEncoder of sentence-transformers, with the same rows, encoder and epochs.

Both train on the same part of the train file. Both choose their best epoch by the MAP of another part. Results are those of
the dev file.

Both train in the precision of `precision: auto`, unless --peer_precision names another one for sentence-transformers.

sentence-transformers has three losses, and the one with the highest MAP of that other part is reported. The time is that of
training steps, without evaluations, on the same machine. Differences are paired by question; intervals resample questions.

The ranker with `full` attention is also exported: CrossEncoder reads the folder and scores the questions of the dev file.

The folder has train.jsonl and dev.jsonl, or the same as .jsonl.xz.

With --work FOLDER, every finished training is kept there, and the same command goes on after the last one. Other settings of the
ranker need another folder for its results alone: those of sentence-transformers are kept in `results/peers` and may be copied.

python -m benchmarks.pools_wikiqa /path/to/wikiqa --encoder /path/to/all-MiniLM-L6-v2           # about an hour on two cores
python -m benchmarks.pools_wikiqa /path/to/wikiqa --encoder /path/to/all-MiniLM-L6-v2 --short   # one seed, one epoch, 120 questions
"""

import argparse
import importlib
import importlib.metadata
import json
import lzma
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.provenance import provenance, say_provenance
from benchmarks.result_files import add_out, write
from lib.config import ROOT, Config, load_config
from lib.durable import sha256, write_json
from lib.evaluation.rank import Ranker
from lib.log import say
from lib.metrics import ratio
from lib.ranking.metrics import paired_difference, ranking_metrics
from lib.report.table import aligned
from lib.runs import RunArgs
from lib.runtime import Runtime
from lib.training.objectives.pool_choice import PoolChoice

FIRST_STAGES = ("00_check_data", "01_prepare_dataset", "02_generate_candidates", "03_build_rewards")
PEER_LOSSES = ("BinaryCrossEntropyLoss", "ListNetLoss", "LambdaLoss")
POOLS_PER_STEP, PAIRS_PER_STEP = 8, 32
LEARNING_RATE = 5e-5
METRICS = ("map", "mrr_at_10", "ndcg_at_10", "accuracy")


class Trained(NamedTuple):
    """What is kept of one training.

    Attributes:
        selection: MAP of the selection part, which chooses among models and epochs.
        seconds: of training steps.
        dev: metrics of each question of dev that has answers and others.
        exported: how far CrossEncoder's scores are from those of the ranker; `pairs` is 0 where it was not compared.
    """

    selection: float
    seconds: float
    dev: dict[str, np.ndarray]
    pairs: int = 0
    largest_difference: float = 0.0


class Kept:
    """Results of finished trainings in a folder, for the same key alone."""

    def __init__(self, folder: Path, key: dict[str, Any]):
        self.folder, path = folder, folder / "key.json"
        folder.mkdir(parents=True, exist_ok=True)
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else key
        if differ := [name for name, value in key.items() if value != before.get(name)]:
            raise SystemExit(f"{folder} holds results of other {', '.join(differ)}; choose another --work")
        write_json(path, key)

    @classmethod
    def both(cls, folder: Path, options: argparse.Namespace) -> "tuple[Kept, Kept | None]":
        """(those of the ranker, those of sentence-transformers; None without its losses).

        The ranker's own settings do not change the latter.
        """
        files = [
            *(ROOT / "configs").glob("*.yaml"),
            *Path(options.encoder).glob("*.*"),
            *options.data.glob("*.jsonl*"),
        ]
        measured_by = provenance()
        common = {
            "files": {path.name: sha256(path) for path in sorted(files) if path.is_file()},
            **{name: measured_by[name] for name in ("code", "versions", "machine")},
            **{name: getattr(options, name) for name in ("epochs", "questions")},
        }
        ours: dict[str, Any] = {
            "loss": options.loss,
            "learning_rate": options.learning_rate,
            "settings": options.set,
        }
        peers: dict[str, Any] = {
            "learning_rate": options.peer_learning_rate,
            "precision": options.peer_precision,
            "settings": [s for s in options.set if not s.startswith(("ranker.", "models.ranker."))],
            "versions of peers": {name: version_of(name) for name in ("sentence-transformers", "datasets")},
        }
        if not options.losses:
            return cls(folder / "ranker", common | ours), None
        ours["exported"] = peers["versions of peers"]  # CrossEncoder also reads the exported ranker
        return cls(folder / "ranker", common | ours), cls(folder / "peers", common | peers)

    def result(self, name: str, train: Callable[[], Trained]) -> Trained:
        """The kept result of this name, or a new one."""
        path = self.folder / f"{name}.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            return Trained(**found | {"dev": {k: np.array(v, float) for k, v in found["dev"].items()}})
        found = train()
        dev = {key: found.dev[key].tolist() for key in METRICS}
        write_json(path, found._asdict() | {"dev": dev})
        return found


def version_of(package: str) -> str | None:
    """The installed version; None if the package is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def unpacked(source: Path, folder: Path, questions: int | None) -> Path:
    """train.jsonl and dev.jsonl of `source` in a folder; with `questions`, only this many of train."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "dev"):
        plain = source / f"{name}.jsonl"
        data = (
            plain.read_bytes()
            if plain.exists()
            else lzma.decompress((source / f"{name}.jsonl.xz").read_bytes())
        )
        lines = data.decode().splitlines()
        kept = lines[: questions if name == "train" and questions else None]
        (folder / f"{name}.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    return folder


def config_of(options: argparse.Namespace, data: Path, seed: int, attention: str, steps: int) -> Config:
    settings = [
        f"data.path={data}", f"seed={seed}", f"ranker.encoder={options.encoder}", f"ranker.attention={attention}",
        f"ranker.pooling={'mean' if attention == 'prefix' else 'cls'}", f"ranker.loss={options.loss}", "ranker.best_by=map",
        "ranker.head=linear", "ranker.prompt_tokens=64", "ranker.candidate_tokens=192",
        f"models.ranker.training.steps={steps}", f"models.ranker.training.batch_size={POOLS_PER_STEP}",
        f"models.ranker.training.learning_rate={options.learning_rate}",
        f"models.ranker.training.evaluate_every={max(1, steps // options.epochs)}",
        f"models.ranker.training.checkpoint_every={steps}", "models.ranker.training.compile=off",
    ]  # fmt: skip
    return load_config([ROOT / "configs" / "pools.yaml"], overrides=[*settings, *options.set])


class Stopwatch:
    """Seconds of a function of a class, summed over its calls while the block runs."""

    def __init__(self, owner: Any, name: str):
        self.owner, self.name, self.seconds = owner, name, 0.0

    def __enter__(self) -> "Stopwatch":
        self._plain = getattr(self.owner, self.name)

        def timed(*arguments: Any, **others: Any) -> Any:
            begin = time.perf_counter()
            try:
                return self._plain(*arguments, **others)
            finally:
                self.seconds += time.perf_counter() - begin

        setattr(self.owner, self.name, timed)
        return self

    def __exit__(self, *_: Any) -> None:
        setattr(self.owner, self.name, self._plain)


def train_ours(options: argparse.Namespace, work: Path, seed: int, attention: str) -> tuple[Path, float]:
    """(run, seconds of training steps)."""
    import lib.training.train_model as training

    data = unpacked(options.data, work / "data", options.questions)
    run = work / f"{attention}_{seed}"
    for name in FIRST_STAGES:
        importlib.import_module(name).main(config_of(options, data, seed, attention, 1), RunArgs(run_dir=run))
    stats = json.loads((run / "01_prepare_dataset" / "manifest.json").read_text())["stats"]
    steps = math.ceil(options.epochs * stats["examples"]["train"] / POOLS_PER_STEP)
    config = config_of(options, data, seed, attention, steps)
    with Stopwatch(training, "train") as whole, Stopwatch(PoolChoice, "evaluate") as evaluation:
        importlib.import_module("04_train").main(config, RunArgs(run_dir=run, overwrite=True))  # all is timed
    return run, whole.seconds - evaluation.seconds


def pools_of(run: Path, split: str) -> list[dict[str, Any]]:
    """Prompt, candidates and rewards of the pools of a split, as stage 01 keeps them."""
    import pyarrow.parquet as pq

    table = pq.read_table(run / "01_prepare_dataset" / "examples", columns=["split", "record"])
    rows = zip(table["split"].to_pylist(), table["record"].to_pylist(), strict=True)
    return [json.loads(record) for found, record in rows if found == split]


def measured(pools: list[dict[str, Any]], scores: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Metrics of the pools that have candidates of different reward."""
    kept = [n for n, pool in enumerate(pools) if len(set(pool["rewards"])) > 1]
    width = max(len(pools[n]["rewards"]) for n in kept)
    score, reward = np.zeros((len(kept), width)), np.zeros((len(kept), width))
    present = np.zeros((len(kept), width), bool)
    for row, n in enumerate(kept):
        size = len(pools[n]["rewards"])
        score[row, :size], reward[row, :size], present[row, :size] = scores[n], pools[n]["rewards"], True
    return ranking_metrics(score, reward, present)


def scores_of_ours(run: Path, pools: list[dict[str, Any]], runtime: Runtime) -> list[np.ndarray]:
    ranker = Ranker.load(run, runtime=runtime)
    found = ranker.rank_all([p["prompt"] for p in pools], [p["candidates"] for p in pools])
    return [ranking.scores for ranking in found]


def export_difference(
    run: Path, folder: Path, pools: list[dict[str, Any]], device: torch.device
) -> dict[str, float]:
    """How far CrossEncoder's scores are from ours when it reads the exported ranker, in float32.

    Texts that one of them would truncate are left out: the two truncate in different ways.

    Returns:
        pairs: how many were compared.
        largest_difference: of two scores of a pair, relative to 1 + the largest score.
    """
    from sentence_transformers.cross_encoder import CrossEncoder  # pyright: ignore[reportMissingImports]

    from lib.models.ranker_export import export_classifier

    ranker = Ranker.load(run, runtime=Runtime(device, "fp32"))
    whole = [p for p in pools if not any(ranker.shortened([p["prompt"]], [p["candidates"]]))]
    export_classifier(ranker.model, folder, ranker.tokenizer)
    ours = ranker.rank_all([p["prompt"] for p in whole], [p["candidates"] for p in whole])
    expected = np.concatenate([ranking.scores for ranking in ours])
    pairs = [(p["prompt"], c) for p in whole for c in p["candidates"]]
    stock = CrossEncoder(str(folder), local_files_only=True, device=str(device))
    found = np.asarray(stock.predict(pairs, batch_size=32, show_progress_bar=False))
    largest = float(np.abs(found - expected).max() / (1 + np.abs(expected).max()))
    return {"pairs": len(pairs), "largest_difference": largest}


def train_peer(options: argparse.Namespace, run: Path, seed: int, loss_name: str) -> Trained:
    """Train CrossEncoder; metrics are those of the epoch with the best MAP of the selection part."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from sentence_transformers.cross_encoder import (  # pyright: ignore[reportMissingImports]
        CrossEncoder,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
        losses,
    )
    from transformers import TrainerCallback, set_seed

    train, selection, dev = (pools_of(run, split) for split in ("train", "selection", "held_out"))
    set_seed(seed)  # the head's weights are drawn before the trainer has a seed
    model = CrossEncoder(options.encoder, num_labels=1, local_files_only=True, max_length=256)
    if loss_name == "BinaryCrossEntropyLoss":
        rows = [
            (p["prompt"], c, float(r))
            for p in train
            for c, r in zip(p["candidates"], p["rewards"], strict=True)
        ]
        columns = dict(zip(("query", "answer", "label"), zip(*rows, strict=True), strict=True))
        data, loss = (
            Dataset.from_dict({k: list(v) for k, v in columns.items()}),
            losses.BinaryCrossEntropyLoss(model),
        )
        batch = PAIRS_PER_STEP
    else:
        names = (("query", "prompt"), ("docs", "candidates"), ("labels", "rewards"))
        data = Dataset.from_dict({name: [p[key] for p in train] for name, key in names})
        loss, batch = getattr(losses, loss_name)(model, mini_batch_size=-1), POOLS_PER_STEP

    def scores(pools: list[dict[str, Any]]) -> list[np.ndarray]:
        pairs = [(p["prompt"], c) for p in pools for c in p["candidates"]]
        flat = model.predict(pairs, batch_size=32, show_progress_bar=False)
        return np.split(flat, np.cumsum([len(p["candidates"]) for p in pools])[:-1])

    class Epochs(TrainerCallback):
        """Measures after each epoch, and the time of the steps."""

        def __init__(self) -> None:
            self.seconds, self.begin, self.best = 0.0, 0.0, (-1.0, {})

        def on_step_begin(self, *arguments: Any, **others: Any) -> None:
            self.begin = self.begin or time.perf_counter()

        def on_epoch_end(self, *arguments: Any, **others: Any) -> None:
            self.seconds, self.begin = self.seconds + time.perf_counter() - self.begin, 0.0
            model.eval()
            chosen_by = float(np.nanmean(measured(selection, scores(selection))["map"]))
            if chosen_by > self.best[0]:
                self.best = (chosen_by, measured(dev, scores(dev)))
            model.train()

    epochs = Epochs()
    with tempfile.TemporaryDirectory() as folder:
        arguments = CrossEncoderTrainingArguments(
            output_dir=folder, num_train_epochs=options.epochs, per_device_train_batch_size=batch, warmup_ratio=0.1,
            learning_rate=options.peer_learning_rate, seed=seed, bf16=options.peer_precision == "bf16", use_cpu=not torch.cuda.is_available(),
            save_strategy="no", logging_strategy="no", disable_tqdm=True, report_to=[], dataloader_num_workers=0,
        )  # fmt: skip
        CrossEncoderTrainer(
            model=model, args=arguments, train_dataset=data, loss=loss, callbacks=[epochs]
        ).train()
    return Trained(epochs.best[0], epochs.seconds, epochs.best[1])


def our_result(
    options: argparse.Namespace, work: Path, seed: int, attention: str, runtime: Runtime
) -> Trained:
    """Train the ranker, measure it, and compare the exported one, which has to be of `full` attention."""
    run, seconds = train_ours(options, work, seed, attention)
    selection, dev = (pools_of(run, split) for split in ("selection", "held_out"))
    chosen_by = float(np.nanmean(measured(selection, scores_of_ours(run, selection, runtime))["map"]))
    found = Trained(chosen_by, seconds, measured(dev, scores_of_ours(run, dev, runtime)))
    if attention == "full" and options.losses:
        return found._replace(**export_difference(run, work / f"exported_{seed}", dev, runtime.device))
    return found


def say_result(name: str, found: Trained) -> None:
    exported = f"; exported: scores of {found.pairs:,} pairs differ by at most {found.largest_difference:.1e}"
    say(f"{name}: MAP {np.nanmean(found.dev['map']):.4f}, selection {found.selection:.4f}, {found.seconds:.1f} s"
        + (exported if found.pairs else ""))  # fmt: skip


def summary(name: str, per_seed: list[Trained]) -> dict[str, Any]:
    """Means over seeds, with intervals over questions."""
    row: dict[str, Any] = {"name": name}
    for key in ("seconds", "selection"):
        row[key] = float(np.mean([getattr(found, key) for found in per_seed]))
    for metric in METRICS:
        values = np.nanmean([found.dev[metric] for found in per_seed], 0)
        row[metric] = ratio(values, limits=(0, 1))._asdict()
        row[f"{metric}_by_seed"] = [float(np.nanmean(found.dev[metric])) for found in per_seed]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data", type=Path, help="folder with train.jsonl and dev.jsonl, or the same as .jsonl.xz"
    )
    parser.add_argument("--encoder", required=True, help="folder of MiniLM or another BERT-like encoder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--loss", default="cross_entropy", help="ranker.loss of this project's ranker")
    parser.add_argument("--learning_rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--peer_learning_rate", type=float, default=LEARNING_RATE)
    parser.add_argument(
        "--peer_precision",
        choices=["fp32", "bf16"],
        default=Runtime.detect(load_config()).precision,
        help="of sentence-transformers; default: that of the ranker",
    )
    parser.add_argument("--attention", nargs="+", default=["prefix", "full"])
    parser.add_argument(
        "--losses", nargs="*", default=list(PEER_LOSSES), help="of sentence-transformers; none: leave it out"
    )
    parser.add_argument("--questions", type=int, help="use only this many questions of train")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--work", type=Path, help="folder of runs and results, which are kept; default: a temporary one"
    )
    parser.add_argument("--short", action="store_true", help="one seed, one epoch, 120 questions, two losses")
    add_out(parser)
    options = parser.parse_args()
    if options.short:
        options.seeds, options.epochs, options.questions = 1, 1, options.questions or 120
        options.losses = options.losses[:2]
    say_provenance()
    with tempfile.TemporaryDirectory() as temporary:
        figures = compare(options, options.work or Path(temporary))
    write(options.out, "pools_wikiqa", figures)


def compare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    runtime = Runtime(Runtime.detect(load_config()).device, "fp32")
    kept, kept_of_peers = Kept.both(work / "results", options)
    ours: dict[str, list[Trained]] = {attention: [] for attention in options.attention}
    peers: dict[str, list[Trained]] = {loss: [] for loss in options.losses}
    for seed in range(1, options.seeds + 1):
        for attention in options.attention:
            found = kept.result(
                f"{attention}_{seed}", lambda a=attention, s=seed: our_result(options, work, s, a, runtime)
            )
            ours[attention].append(found)
            say_result(f"seed {seed}, {attention}", found)
        run = work / f"{options.attention[-1]}_{seed}"  # every run has the same pools
        for loss in options.losses:
            assert kept_of_peers is not None
            found = kept_of_peers.result(
                f"{loss}_{seed}", lambda n=loss, s=seed, r=run: train_peer(options, r, s, n)
            )
            peers[loss].append(found)
            say_result(f"seed {seed}, {loss}", found)
    named = {f"ours, {name}": found for name, found in ours.items()}
    named |= {f"CrossEncoder, {name}": found for name, found in peers.items()}
    rows = [summary(name, found) for name, found in named.items()]
    figures: dict[str, Any] = {
        "rows": rows,
        "seeds": options.seeds,
        "epochs": options.epochs,
        "precision": {"ours": Runtime.detect(load_config()).precision, "peer": options.peer_precision},
        "questions": options.questions,
        "exported": [
            {"pairs": f.pairs, "largest_difference": f.largest_difference}
            for f in ours.get("full", [])
            if f.pairs
        ],
    }
    head = ("model", "seconds", "MAP", "95 % interval", "MRR@10", "NDCG@10", "accuracy", "selection MAP")
    lines = [
        (r["name"], f"{r['seconds']:.1f}", f"{r['map']['value']:.4f}", f"{r['map']['low']:.3f} .. {r['map']['high']:.3f}",
         *(f"{r[m]['value']:.4f}" for m in METRICS[1:]), f"{r['selection']:.4f}")
        for r in rows
    ]  # fmt: skip
    print(aligned([head, *lines]))
    if peers:
        best_ours, best_peer = (
            max(group, key=lambda name: np.mean([f.selection for f in group[name]]))
            for group in (ours, peers)
        )
        figures["chosen"] = {"ours": best_ours, "peer": best_peer}
        for metric in ("map", "mrr_at_10"):
            own, other = (
                np.nanmean([f.dev[metric] for f in found], 0) for found in (ours[best_ours], peers[best_peer])
            )
            figures[f"difference_{metric}"] = gain = paired_difference(own, other, np.arange(len(own)), 0)
            print(
                f"{metric}: {best_ours} less {best_peer}: {gain['value']:+.4f} ({gain['low']:+.4f} .. {gain['high']:+.4f})"
            )
        times = [np.mean([f.seconds for f in found]) for found in (ours[best_ours], peers[best_peer])]
        figures["time_ratio"] = float(times[0] / times[1])
        print(f"training time: {figures['time_ratio']:.2f} of that of {best_peer}")
    return figures


if __name__ == "__main__":
    main()
