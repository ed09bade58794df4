"""Shards of fresh candidates: made by stage 02 for as long as stage 04 learns from them.

The training examples are cut into shards, in another order in every epoch, and in every epoch each example is rewritten
anew. So a shard is a function of the seed, its number and what stages 01 and 02 made, and one that is lost comes back the
same: nothing needs to be kept that the trainer has left behind.

    02_stream/shard_000012/     candidates.parquet, rewards.parquet, manifest.json; appears whole
    02_stream/cursor.json       the shard that the trainer is at
    02_stream/producer.alive    touched while somebody makes shards, holds their key; trainer.alive likewise

Knows tables and files; who fills them is `lib.candidates.producer`.
"""

import contextlib
import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib import code_version, durable, schema
from lib.artifacts import Stage
from lib.config import Config
from lib.log import say
from lib.table_writer import TableWriter

FOLDER, SCRIPT = "02_stream", "02_generate_candidates.py --stream"
MAKER = "lib/candidates/producer.py"
SHAPED_BY = ("stream.shard_examples", "stream.initial_mask_ratio", "stream.ramp_epochs")
PULSE, SILENCE = 1.0, 15.0  # seconds between signs of life, and without one until somebody counts as gone


@dataclass(frozen=True)
class Cut:
    """How an endless row of epochs is cut into shards. No shard has examples of two epochs.

    Attributes:
        examples: training examples, all of which an epoch has.
        per_shard: examples of a shard; the last one of an epoch may have fewer.
        per_example: candidates of an example.
    """

    examples: int
    per_shard: int
    per_example: int

    @property
    def per_epoch(self) -> int:
        """Shards of an epoch."""
        return -(-self.examples // self.per_shard)

    def of_shard(self, number: int) -> tuple[int, np.ndarray]:
        """(epoch, places within it) of a shard's examples."""
        epoch, within = divmod(number, self.per_epoch)
        return epoch, np.arange(within * self.per_shard, min((within + 1) * self.per_shard, self.examples))

    def find(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, row within it) of rows of the endless row of candidates."""
        epoch, within = np.divmod(rows, self.examples * self.per_example)
        shard, row = np.divmod(within, self.per_shard * self.per_example)
        return epoch * self.per_epoch + shard, row


@dataclass(frozen=True)
class ShardStore:
    """The folder of shards, for either side.

    Attributes:
        key: digest of all that a shard depends on but its number; shards of another key are as good as absent.
        backlog: shards that are kept ready from the cursor on.
    """

    folder: Path
    key: str
    backlog: int

    def path(self, number: int) -> Path:
        return self.folder / f"shard_{number:06d}"

    def numbers(self) -> list[int]:
        """The shards that are there, of any key."""
        found = (re.fullmatch(r"shard_(\d{6,})", path.name) for path in self.folder.glob("shard_*"))
        return sorted(int(match[1]) for match in found if match)

    def manifest(self, number: int) -> dict[str, Any] | None:
        """What a shard says of itself; None if it is not there, or not ours."""
        try:
            found = json.loads((self.path(number) / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if found.get("key") == self.key else None

    def read(self, number: int) -> tuple[pa.Table, dict[str, Any]] | None:
        """(candidates with `reward`, manifest) of a shard; None if it is not there. A damaged one is cleared away."""
        manifest = self.manifest(number)
        if manifest is None:
            return None
        try:
            damaged = [
                name for name, digest in manifest["files"].items()
                if durable.sha256_file(self.path(number) / name) != digest
            ]  # fmt: skip
            if damaged:
                say(f"shard {number} is damaged ({', '.join(damaged)}); it is made again")
                self.remove(number)
                return None
            candidates, rewards = (
                pq.read_table(self.path(number) / name) for name in ("candidates.parquet", "rewards.parquet")
            )
        except OSError:  # being cleared away at this moment
            return None
        for column in ("example_id", "candidate_id"):
            assert candidates[column].equals(rewards[column]), f"{self.path(number)}: keys in another order"
        return candidates.append_column("reward", rewards["reward"]), manifest

    def write(self, number: int, candidates: pa.Table, rewards: pa.Table, facts: dict[str, Any]) -> None:
        """Put a shard there, whole."""
        with durable.replacing_folder(self.path(number)) as folder:
            files = {}
            for name, table, kind in (
                ("candidates", candidates, schema.CANDIDATES), ("rewards", rewards, schema.REWARDS),
            ):  # fmt: skip
                writer = TableWriter(folder / f"{name}.parquet", kind)
                writer.write(table)
                writer.close()
                files[f"{name}.parquet"] = durable.sha256_file(folder / f"{name}.parquet")
            manifest = {"shard": number, "key": self.key, "rows": candidates.num_rows, "files": files} | facts
            durable.write_json(folder / "manifest.json", manifest)

    def remove(self, number: int) -> None:
        """Clear a shard away: the manifest first, so that no half of it looks like a whole."""
        with contextlib.suppress(OSError):
            (self.path(number) / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(self.path(number), ignore_errors=True)

    @property
    def cursor(self) -> int:
        try:
            return int(json.loads((self.folder / "cursor.json").read_text(encoding="utf-8"))["shard"])
        except (OSError, ValueError, KeyError):
            return 0

    def move_cursor(self, number: int) -> None:
        self.folder.mkdir(exist_ok=True)
        durable.write_json(self.folder / "cursor.json", {"shard": number})

    # --- signs of life -----------------------------------------------------------------------------------------------

    def is_alive(self, who: str) -> bool:
        """Whether a `producer` or a `trainer` of such shards gave a sign of life of late."""
        file = self.folder / f"{who}.alive"
        try:
            return file.read_text() == self.key and time.time() - file.stat().st_mtime < SILENCE
        except OSError:
            return False

    @contextlib.contextmanager
    def alive(self, who: str) -> Iterator[None]:
        """Give signs of life while the block runs, whatever else it is busy with."""
        self.folder.mkdir(exist_ok=True)
        file, over = self.folder / f"{who}.alive", threading.Event()

        file.write_text(self.key)

        def beat() -> None:
            while not over.is_set():
                file.touch()
                over.wait(PULSE)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def open_store(stage: Stage, config: Config) -> ShardStore:
    """The shards of a stage's run. The stage must read stages 01 and 02."""
    made_of = {
        "code": code_version.digest(code_version.code_files(MAKER, config.task)),
        "generators": _generators(stage, config),
        "candidates": stage.sha256_of("02_generate_candidates", "candidates"),
        "examples": stage.sha256_of("01_prepare_dataset", "examples"),
        "config": config.slice(("seed", "task", "candidates", "rewards", *SHAPED_BY)),
    }
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return ShardStore(stage.run_dir / FOLDER, digest, config.stream.max_backlog)


def generator_names(config: Config) -> list[str]:
    """The masked LMs that stage 02 trains, as its outputs are called."""
    folds = config.candidates.cross_fit_folds
    return ["generator"] if folds == 1 else [f"generator_fold_{fold}" for fold in range(folds)]


def _generators(stage: Stage, config: Config) -> list[str]:
    """Hashes of the masked LMs that write the shards."""
    if config.candidates.source != "masked_lm":
        return []
    if config.generator.checkpoint:
        return [durable.sha256_folder(Path(config.generator.checkpoint))]
    return [stage.sha256_of("02_generate_candidates", name) for name in generator_names(config)]


def cut_of(config: Config, examples: int) -> Cut:
    return Cut(examples, config.stream.shard_examples, config.candidates.per_example)
