"""
Peak memory of stages 00 to 03 and of training a language model, on texts of several sizes. It must not grow with the text.

The text is generated: paragraphs of random words, of which none is repeated. Half of it is one .txt file, and half are
documents of about 2,000 characters in a .jsonl file. Each stage runs in a process of its own. Its peak is the largest
resident set of that process, memory-mapped files included.

python -m benchmarks.memory                       # 3 MB and 30 MB
python -m benchmarks.memory --megabytes 30 300 --stages 00_check_data 01_prepare_dataset 04_train    # about an hour
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

STAGES = ("00_check_data", "01_prepare_dataset", "02_generate_candidates", "03_build_rewards", "04_train")
LIMIT = 1.10  # largest ratio of two peaks
WORDS = 20_000
SETTINGS = (
    "data.fractions={train: 0.96, held_out: 0.02, reference: 0.02}",
    "data.selection_fraction=0.02",
    "data.passage_characters=256",
)
CANDIDATES = (  # several parts also of the smaller text, so that the largest part is the same
    "tokenizer.examples_per_part=2048",
    "candidates.rows_per_group=2048",
    "candidates.per_example=2",
    "generator.training.steps=20",
)
TRAINING = (  # of the one model, which is small: its memory must not hide that of the data
    "architecture.context=256",
    "architecture.hidden_size=64",
    "architecture.num_hidden_layers=1",
    "architecture.num_attention_heads=2",
    "models.generator.training.steps=20",
    "training.evaluate_every=10",
    "training.checkpoint_every=10",
)


def make_text(folder: Path, megabytes: float) -> None:
    """A folder of text of that size: novel.txt and documents.jsonl. No paragraph is repeated."""
    folder.mkdir(parents=True)
    half = int(megabytes * 5e5)
    with open(folder / "novel.txt", "w") as file:
        for paragraph in paragraphs(0, half):
            file.write(paragraph + "\n\n")
    with open(folder / "documents.jsonl", "w") as file:
        document: list[str] = []
        for paragraph in paragraphs(1, half):
            document.append(paragraph)
            if sum(map(len, document)) > 2000:
                file.write(json.dumps({"text": "\n\n".join(document)}) + "\n")
                document = []


def paragraphs(seed: int, characters: int) -> Iterator[str]:
    """Paragraphs of about 400 characters, that many in all. Each begins with its number."""
    rng = np.random.default_rng(seed)
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in "aeiou"]
    words = np.array(["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(WORDS)])
    written = number = 0
    while written < characters:
        index = (WORDS * rng.random((200, 64)) ** 3).astype(int)  # some words are frequent
        for row in words[index]:
            text = f"{seed} {number} " + " ".join(row)
            yield text
            written, number = written + len(text), number + 1


def run_stage(name: str, run: Path, overrides: list[str]) -> float:
    """Run a stage in this process, which imports nothing else. Returns the peak of its resident memory in MB."""
    import importlib

    from lib.config import load_config
    from lib.runs import RunArgs

    config = load_config(overrides=overrides)
    if name == "04_train":
        train(run, config)
    else:
        importlib.import_module(name).main(config, RunArgs(run_dir=run))
    return peak_memory_mb()


def train(run: Path, config: Any) -> None:
    """Train and report the language model `generator` on the token store of the run."""
    from lib.runtime import Runtime
    from lib.token_store import open_store
    from lib.tokenization import load_tokenizer
    from lib.training.stage_inputs import StageInputs
    from lib.training.train_model import train_model

    folder = run / "01_prepare_dataset"

    def no_table(split: str):
        raise AssertionError(f"a language model asked for a table of split '{split}'")

    inputs = StageInputs(
        config, load_tokenizer(folder / "tokenizer"), Runtime.detect(config), no_table, no_table,
        open_text=lambda split: open_store(folder / "tokens" / split),
    )  # fmt: skip
    train_model("generator", config.models["generator"], inputs, run / "generator", start=None)


def peak_memory_mb() -> float:
    """The largest resident set of this process so far, without what the process that started it had."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def measure(megabytes: float, folder: Path, stages: Sequence[str]) -> dict[str, dict[str, float]]:
    """Stage -> its peak memory in MB and its seconds, on text of that size."""
    make_text(folder / "text", megabytes)
    overrides = [f"data.path={folder / 'text'}", *SETTINGS, *CANDIDATES, *TRAINING]
    found = {}
    for stage in stages:
        begin = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "benchmarks.memory",
            "--stage",
            stage,
            "--run",
            str(folder / "run"),
            *overrides,
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{stage} failed on {megabytes:g} MB, with exit code {done.returncode}")
        found[stage] = {"peak_mb": float(done.stdout.split()[-1]), "seconds": time.monotonic() - begin}
        print(
            f"{megabytes:g} MB, {stage}: {found[stage]['peak_mb']:.0f} MB, {found[stage]['seconds']:.0f} s",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, nargs=2, default=(3, 30), metavar=("SMALL", "LARGE"))
    parser.add_argument(
        "--folder", type=Path, help="where texts and runs are kept; by default a temporary folder"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="result file; by default in outputs/benchmarks/"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)  # in the process of a stage
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(run_stage(args.stage, args.run, args.overrides))
        return
    report(args)


def report(args: argparse.Namespace) -> None:
    """Measure both sizes, print the table and write the result file."""
    from benchmarks.provenance import say_provenance
    from benchmarks.result_files import write
    from lib.report.table import aligned

    say_provenance()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.folder or Path(temporary)
        found = {f"{size:g}": measure(size, root / f"{size:g}", args.stages) for size in args.megabytes}
    small, large = found.values()
    rows = [("stage", *(f"{size} MB of text" for size in found), "ratio")]
    for stage in args.stages:
        peaks = [part[stage]["peak_mb"] for part in (small, large)]
        rows.append((stage, *(f"{peak:.0f} MB" for peak in peaks), f"{peaks[1] / peaks[0]:.3f}"))
    print(aligned(rows))
    name = "memory_candidates" if "02_generate_candidates" in args.stages else "memory"
    write(args.out, name, {"megabytes": found, "limit": LIMIT})


if __name__ == "__main__":
    main()
