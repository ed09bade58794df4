"""Shards of new candidates: stage 02 makes them while stage 04 trains on them.

Each epoch puts the training examples in another order, divides them into shards, and gives each example new candidates. A
shard is a function of the seed, its number and the outputs of stages 01 and 02. A shard that is lost can be made again,
the same to the bit. So shards that the trainer has used are deleted.

    02_stream/shard_000012/     candidates.parquet, rewards.parquet, manifest.json; the folder appears when it is complete
    02_stream/cursor.json       the shards that the trainer reads: the first and the last one of its request
    02_stream/producer.alive    contains the key of the shards, and is touched while a producer runs; trainer.alive likewise

lib/candidates/producer.py makes the shards.
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
PRODUCER = "lib/candidates/producer.py"
STREAM_SETTINGS = ("stream.shard_examples", "stream.initial_mask_ratio", "stream.ramp_epochs")
HEARTBEAT_SECONDS = 1.0
MAX_SILENCE_SECONDS = 15.0  # after this time without a heartbeat, a process counts as ended


@dataclass(frozen=True)
class Cut:
    """How an endless sequence of epochs is divided into shards. No shard has examples of two epochs.

    Attributes:
        examples: number of training examples; an epoch has all of them.
        per_shard: examples per shard; the last shard of an epoch may have fewer.
        per_example: candidates per example.
    """

    examples: int
    per_shard: int
    per_example: int

    @property
    def per_epoch(self) -> int:
        """Number of shards in an epoch."""
        return -(-self.examples // self.per_shard)

    def of_shard(self, number: int) -> tuple[int, np.ndarray]:
        """(epoch, positions in the epoch) of the examples of a shard."""
        epoch, within = divmod(number, self.per_epoch)
        return epoch, np.arange(within * self.per_shard, min((within + 1) * self.per_shard, self.examples))

    def find(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, row in the shard) of rows in the endless sequence of candidates."""
        epoch, within = np.divmod(rows, self.examples * self.per_example)
        shard, row = np.divmod(within, self.per_shard * self.per_example)
        return epoch * self.per_epoch + shard, row


@dataclass(frozen=True)
class ShardStore:
    """The folder of shards, for the producer and the trainer.

    Attributes:
        key: digest of everything that a shard depends on except its number. Shards with another key count as missing.
        backlog: number of shards that are kept ready, from the cursor on. A request of the trainer may need more.
    """

    folder: Path
    key: str
    backlog: int

    def path(self, number: int) -> Path:
        return self.folder / f"shard_{number:06d}"

    def numbers(self) -> list[int]:
        """The numbers of all shards in the folder, with any key."""
        found = (re.fullmatch(r"shard_(\d{6,})", path.name) for path in self.folder.glob("shard_*"))
        return sorted(int(match[1]) for match in found if match)

    def manifest(self, number: int) -> dict[str, Any] | None:
        """The manifest of a shard; None if the shard is missing or has another key."""
        try:
            found = durable.read_json(self.path(number) / "manifest.json")
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and found.get("key") == self.key else None

    def missing(self) -> list[int]:
        """The wanted shards that are absent: from the cursor on, as many as `backlog`, or all that the trainer waits for.

        Shards outside of this window are deleted. The first shards stay, since the next model starts with them.
        """
        request = self.request
        wanted = range(request.start, request.start + max(self.backlog, len(request)))
        for number in self.numbers():
            if number not in wanted and number >= self.backlog:
                self.remove(number)
        return [number for number in wanted if self.manifest(number) is None]

    def read(self, number: int) -> tuple[pa.Table, dict[str, Any]] | None:
        """(candidates with a column `reward`, manifest) of a shard; None if it is missing. A damaged shard is removed."""
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
        except OSError:  # the producer removes it at this moment
            return None
        for column in ("example_id", "candidate_id"):
            assert candidates[column].equals(rewards[column]), f"{self.path(number)}: keys in another order"
        return candidates.append_column("reward", rewards["reward"]), manifest

    def write(self, number: int, candidates: pa.Table, rewards: pa.Table, facts: dict[str, Any]) -> None:
        """Write a shard. It appears only when it is complete."""
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
        """Remove a shard. The manifest is removed first, so that a partly removed shard never looks complete."""
        with contextlib.suppress(OSError):
            (self.path(number) / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(self.path(number), ignore_errors=True)

    @property
    def cursor(self) -> int:
        """The first shard that the trainer reads."""
        return self.request.start

    @property
    def request(self) -> range:
        """The shards that the trainer reads together."""
        try:
            found = durable.read_json(self.folder / "cursor.json")
            first = int(found["shard"])
            return range(first, max(first, int(found.get("last", first))) + 1)
        except (OSError, ValueError, KeyError, TypeError):
            return range(1)

    def move_cursor(self, first: int, last: int | None = None) -> None:
        """Ask the producer for the shards from `first` to `last`, by default for one, and for those behind it."""
        self.folder.mkdir(exist_ok=True)
        durable.write_json(
            self.folder / "cursor.json", {"shard": first, "last": first if last is None else last}
        )

    # --- heartbeats --------------------------------------------------------------------------------------------------

    def is_alive(self, role: str) -> bool:
        """Whether a `producer` or a `trainer` of these shards had a heartbeat recently."""
        file = self.folder / f"{role}.alive"
        try:
            # A clock that was put back must not keep a dead process alive
            return (
                file.read_text() == self.key and abs(time.time() - file.stat().st_mtime) < MAX_SILENCE_SECONDS
            )
        except OSError:
            return False

    @contextlib.contextmanager
    def alive(self, role: str) -> Iterator[None]:
        """Send heartbeats from a thread while the block runs."""
        self.folder.mkdir(exist_ok=True)
        file, stop = self.folder / f"{role}.alive", threading.Event()

        file.write_text(self.key)

        def beat() -> None:
            while not stop.is_set():
                with contextlib.suppress(OSError):  # a disk that fails once must not end the heartbeats
                    file.touch()
                stop.wait(HEARTBEAT_SECONDS)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def open_store(stage: Stage, config: Config) -> ShardStore:
    """The shards of a stage's run. The stage must read stages 01 and 02."""
    dependencies = {
        "code": code_version.digest(code_version.code_files(PRODUCER, config.task)),
        "generators": _generators(stage, config),
        "candidates": stage.sha256_of("02_generate_candidates", "candidates"),
        "examples": stage.sha256_of("01_prepare_dataset", "examples"),
        "config": config.slice(("seed", "task", "candidates", "rewards", *STREAM_SETTINGS)),
    }
    digest = hashlib.sha256(json.dumps(dependencies, sort_keys=True).encode()).hexdigest()
    return ShardStore(stage.run_dir / FOLDER, digest, config.stream.max_backlog)


def generator_names(config: Config) -> list[str]:
    """The names of the masked LMs that stage 02 trains; its outputs have the same names."""
    folds = config.candidates.cross_fit_folds
    return ["generator"] if folds == 1 else [f"generator_fold_{fold}" for fold in range(folds)]


def _generators(stage: Stage, config: Config) -> list[str]:
    """Hashes of the masked LMs that generate the candidates of the shards."""
    if config.candidates.source != "masked_lm":
        return []
    if config.generator.checkpoint:
        return [durable.sha256_folder(Path(config.generator.checkpoint))]
    return [stage.sha256_of("02_generate_candidates", name) for name in generator_names(config)]


def cut_of(config: Config, examples: int) -> Cut:
    return Cut(examples, config.stream.shard_examples, config.candidates.per_example)
