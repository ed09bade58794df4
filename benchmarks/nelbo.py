"""
Masked diffusion on tinyshakespeare characters, 90/10 contiguous split: held-out NELBO after 15 minutes on two cores.

python -m benchmarks.nelbo                   # the shipped recipe: configs/nelbo.yaml
python -m benchmarks.nelbo --set training.steps=300      # anything else, for trying out
"""

import argparse
import json

from benchmarks.prepared import prepare, shakespeare, train_one
from benchmarks.provenance import say_provenance


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--name", default="nelbo")
    options = parser.parse_args()
    say_provenance()
    overrides = [f"data.path={shakespeare()}", *options.overrides]
    config, stage_inputs, folder = prepare(options.name, ["configs/nelbo.yaml"], overrides)
    record = train_one("generator", config.models["generator"], stage_inputs, folder)
    speed = [json.loads(line) for line in (folder / "generator" / "speed.jsonl").read_text().splitlines()][-1]
    held_out = record["held_out"]
    print(f"parameters           {record['parameters']:,}")
    print(
        f"training             {speed['seconds'] / 60:.1f} minutes, {speed['tokens_per_second']:,.0f} tokens/s"
    )
    print(
        f"held-out NELBO       {held_out['nelbo']:.4f} +- {held_out['nelbo_half_width']:.4f} nats/character "
        "(95 % interval, blocks resampled)"
    )
    print(f"train NELBO          {held_out['train_nelbo']:.4f}")
    print(f"masked accuracy      {held_out['masked_accuracy']:.4f}")
    print(f"unigram baseline     {held_out['unigram_nll']:.4f}")


if __name__ == "__main__":
    main()
