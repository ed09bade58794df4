"""
Throughput of the executors: the same parts of candidates, made in processes and by actors of Ray.

A masked language model with random weights rewrites passages. The clock of an executor starts when each of its workers has made
one part, so that loading is not counted. Ray is left out where it is not installed.

    python -m benchmarks.executors                                   # 5,000 passages, 2 workers of one thread
    python -m benchmarks.executors --passages 500 --workers 1
"""

import argparse
import importlib.util
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.result_files import add_out, write

SETTINGS = (
    "candidates.rows_per_group=512",
    "generator.architecture.context=128",
    "data.passage_characters=127",
    "device=cpu",
)


def make_run(root: Path, passages: int, settings: list[str]) -> tuple[Any, Path]:
    """(config, run) with stages 00 and 01 complete, and a folder of random weights as `generator.checkpoint`."""
    import importlib

    from benchmarks.memory import make_text
    from lib.config import load_config
    from lib.models.build import make_model, model_config, save_model
    from lib.runs import RunArgs
    from lib.tokenization import load_tokenizer

    make_text(root / "text", passages * 127 * 1.6 / 1e6)
    settings = [*SETTINGS, f"data.path={root / 'text'}", *settings]
    config, run = load_config(overrides=settings), root / "run"
    for name in ("00_check_data", "01_prepare_dataset"):
        importlib.import_module(name).main(config, RunArgs(run_dir=run))
    tokenizer = load_tokenizer(run / "01_prepare_dataset" / "tokenizer")
    shape = model_config(config.generator.architecture, "bidirectional", len(tokenizer))
    save_model(make_model("language_model", shape, 0, "generator"), root / "generator", tokenizer)
    return load_config(overrides=[*settings, f"generator.checkpoint={root / 'generator'}"]), run


def passages_per_second(
    config: Any, run: Path, folder: Path, passages: int, executor: Any, workers: int
) -> float:
    """Make the parts of that many passages. The first parts, one for each worker, are not counted."""
    from lib import schema
    from lib.candidates.table import CandidateWork, ExampleGroups
    from lib.executors import open_executor
    from lib.runs import load_manifest
    from lib.sections.executor import ExecutorConfig
    from lib.stage.inputs import UpstreamReader
    from lib.stage.parts import Parts

    reader = UpstreamReader()
    reader.run_dir, reader._verified = run, set()
    reader._upstream = {"01_prepare_dataset": load_manifest(run / "01_prepare_dataset") or {}}
    number = config.candidates.rows_per_group // config.candidates.per_example
    groups = ExampleGroups(reader.table("01_prepare_dataset", "examples"), number)
    folder.mkdir()
    parts = Parts(folder, "benchmark", {"candidates": schema.CANDIDATES, "dropped": schema.DROPPED})
    tokenizer = reader.folder_of("01_prepare_dataset", "tokenizer")
    work = CandidateWork(config, parts, groups, tokenizer, [Path(config.generator.checkpoint)])
    count = min(len(groups), workers + passages // number)
    with open_executor(ExecutorConfig(type=executor, workers=workers), work) as opened:
        list(opened.make(range(workers)))
        begin = time.perf_counter()
        list(opened.make(range(workers, count)))
        seconds = time.perf_counter() - begin
    return (count - workers) * number / seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passages", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="the executors run in turns; the median counts")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    add_out(parser)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.workers))  # one thread for each worker
    executors = ["processes", *(["ray"] if importlib.util.find_spec("ray") else [])]
    found: dict[str, list[float]] = {name: [] for name in executors}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        config, run = make_run(root, args.passages, args.settings)
        for turn in range(args.rounds):
            for name in executors:
                folder = root / f"{name}_{turn}"
                speed = passages_per_second(config, run, folder, args.passages, name, args.workers)
                found[name].append(speed)
                print(f"{name}: {speed:.1f} passages/s", flush=True)
    median = {name: sorted(speeds)[len(speeds) // 2] for name, speeds in found.items()}
    if "ray" in median:
        print(f"Ray against processes: {median['ray'] / median['processes']:.2f}")
    write(
        args.out,
        "executors",
        {"passages": args.passages, "workers": args.workers, "passages_per_second": found},
    )


if __name__ == "__main__":
    main()
