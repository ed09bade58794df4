"""The bytes that each model of a config needs in training, item by item.

python -m lib.training.memory --config configs/finqa.yaml --config configs/models/llama-3-8b.yaml
python -m lib.training.memory --set architecture.hidden_size=768 --processes 8
"""

import argparse
import sys
from pathlib import Path

from lib.config import load_config
from lib.errors import RemaskError
from lib.training.memory.formula import CONTEXT_BYTES, FRAGMENTATION, GB, Account
from lib.training.memory.of_config import Device, accounts


def table(name: str, found: Account) -> str:
    """The account of a model as lines of text, in GB."""
    lines = [f"{name}: {found.total / GB:.2f} GB"]
    items = found.always | {f"in a {found.worst}: {k}": v for k, v in found.moments[found.worst].items()}
    items |= {"lost between blocks": FRAGMENTATION * found.peak, "CUDA itself": CONTEXT_BYTES}
    lines += [f"  {value / GB:8.3f}  {item}" for item, value in items.items()]
    others = [
        f"{other} {(sum(found.always.values()) + sum(v.values())) / GB:.2f}"
        for other, v in found.moments.items()
        if other != found.worst
    ]
    return "\n".join([*lines, f"  tensors in other moments: {', '.join(others)}"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="as for the scripts")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for the scripts")
    parser.add_argument("--quick_test", action="store_true")
    parser.add_argument("--processes", type=int, default=1, help="number of processes (GPUs)")
    parser.add_argument("--shape", type=Path, metavar="FILE", help="config.json of ranker.encoder")
    args = parser.parse_args()
    try:
        config = load_config(args.config, quick_test=args.quick_test, overrides=args.set)
        precision = "fp32" if config.precision == "fp32" else "bf16"
        for name, found in accounts(config, Device(precision, args.processes), args.shape):
            print(table(name, found))
    except RemaskError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
