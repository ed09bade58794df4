"""Files of pools for tests, and what stage 00 makes of them."""

import gzip
import json
from pathlib import Path
from typing import Any

from lib.config import ROOT, Config, load_config
from lib.tasks import Document, Problem
from lib.tasks.pools.check import check

POOLS = ROOT / "configs" / "pools.yaml"
FIRST_STAGES = ("00_check_data", "01_prepare_dataset", "02_generate_candidates", "03_build_rewards")


def config_of(path: Path, *overrides: str) -> Config:
    return load_config([POOLS], quick_test=True, overrides=[f"data.path={path}", *overrides])


def checked(path: Path, *overrides: str) -> tuple[list[dict], list[Problem]]:
    """(records of the valid pools, problems)."""
    items = list(check(config_of(path, *overrides)))
    documents = [json.loads(item.content) for item in items if isinstance(item, Document)]
    return documents, [item for item in items if isinstance(item, Problem)]


def write(path: Path, rows: list[Any]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def kinds(problems: list[Problem], severity: str = "error") -> set[str]:
    return {p.kind for p in problems if p.severity == severity}


def pool(n: int, candidates: Any = ("yes", "no"), rewards: Any = (1, 0), **others: Any) -> dict:
    return {"id": f"p{n}", "prompt": f"{'abcdefghijklmnopqrstuvwxyz'[n]} is a letter, is it?", "candidates": list(candidates),
            "rewards": list(rewards)} | others  # fmt: skip
