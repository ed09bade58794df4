"""
Masked diffusion on tinyshakespeare characters, contiguous 90/10 split: held-out NELBO after 15 minutes on two cores.

python -m benchmarks.nelbo                   # the shipped recipe: configs/nelbo.yaml
python -m benchmarks.nelbo --set models.generator.training.steps=300   # other settings, for trying out
"""

import argparse
import json
from typing import Any

from benchmarks.prepared import prepare, shakespeare, train_one
from benchmarks.provenance import say_provenance
from benchmarks.result_files import add_out, full, write
from lib.training.objectives.language_model import BANDS


def measure(name: str, overrides: list[str]) -> dict[str, Any]:
    """Train the generator of configs/nelbo.yaml and return its held-out figures."""
    config, folder = prepare(name, ["configs/nelbo.yaml"], overrides)
    spec = config.models["generator"]
    record = train_one("generator", config, folder, again=True)
    lines = (folder / "04_train" / "generator" / "speed.jsonl").read_text().splitlines()
    speed = json.loads(lines[-1])
    held_out, row = record["held_out"], record["table"][0]
    tokens = spec.training.steps * spec.training.batch_size * spec.architecture.context
    seconds = tokens / speed["tokens_per_second"]  # those of speed.jsonl count since the last interruption
    return {
        "parameters": record["parameters"],
        "tokens": tokens,
        "minutes": seconds / 60,
        "tokens_per_second": speed["tokens_per_second"],
        "nelbo": {key: row[key] for key in ("value", "low", "high")},
        "train_nelbo": held_out["train_nelbo"],
        "by_masked_share": {
            name: value for name, value in held_out.items() if name.startswith("nelbo_masked_")
        },
        "masked_accuracy": held_out["masked_accuracy"],
        "unigram_nll": held_out["unigram_nll"],
    }


def _band(name: str) -> str:
    """`nelbo_masked_40` in words: windows of which 20 to 40 % of the tokens are masked."""
    end = int(name.rpartition("_")[2])
    return f"{end - 100 // BANDS} to {end} % masked"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--name", default="nelbo", help="folder in benchmarks/results/")
    add_out(parser)
    options = parser.parse_args()
    say_provenance()
    found = measure(options.name, [f"data.path={shakespeare()}", *options.overrides])
    print(f"parameters           {found['parameters']:,}")
    print(f"training             {found['minutes']:.1f} minutes, {found['tokens_per_second']:,.0f} tokens/s")
    print(f"held-out NELBO       {full(found['nelbo'], 4)} nats/character (95 % interval over blocks)")
    for name, value in found["by_masked_share"].items():
        print(f"  {_band(name):<19}{value:.4f}")
    print(f"train NELBO          {found['train_nelbo']:.4f}")
    print(f"masked accuracy      {found['masked_accuracy']:.4f}")
    print(f"unigram baseline     {found['unigram_nll']:.4f}")
    write(options.out, "nelbo", found)


if __name__ == "__main__":
    main()
