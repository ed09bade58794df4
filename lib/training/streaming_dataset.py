"""Training rows out of shards of fresh candidates, as stage 02 makes them beside the training.

Row r of a training belongs to one shard, and each shard's rows are shuffled: what a step learns from is a function of
(seed, step), as it is for tables. A training that was cut off asks for the shards of its last checkpoint again.

Knows shards and tables; no models.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from lib import durable, randomness
from lib.artifacts import Stage
from lib.config import Config
from lib.errors import BadData, Interrupted, MissingInput
from lib.log import say
from lib.shards import SCRIPT, Cut, ShardStore, cut_of, open_store
from lib.training.preemption import StopRequest

if TYPE_CHECKING:
    from lib.training.stage_inputs import StageInputs

LOOK_EVERY = 0.05  # seconds between looks for a shard
RECORD = "shards.json"


class StreamingDataset:
    """Rows of candidates with rewards, by their number in the training.

    Args:
        record: folder of the model; its shards.json says which shards were used, with their hashes.
        patience: seconds to wait for a shard while nobody makes any.

    Attributes:
        waited: seconds spent waiting for shards; first and last: when rows were asked for, on the same clock.
        used: number of shards that this process has read.
    """

    def __init__(self, store: ShardStore, cut: Cut, seed: int, label: str, record: Path, patience: float):
        self.store, self.cut, self.seed, self.label = store, cut, seed, label
        self.record_file, self.patience = record / RECORD, patience
        self.waited, self.used = 0.0, 0
        self.first = self.last = 0.0
        self._kept: dict[int, pa.Table] = {}
        self._cursor = -1
        self._warned = False  # that nobody makes shards

    def rows(self, rows: range) -> pa.Table:
        """The candidates of these rows of the training, with `reward`.

        Raises:
            MissingInput: a shard is not there and nobody has been making any for `patience` seconds.
            BadData: a shard that was used before came back with other content.
            Interrupted: the process is to stop, and was waiting.
        """
        self.last = time.monotonic()
        self.first = self.first or self.last
        shards, within = self.cut.find(np.arange(rows.start, rows.stop))
        self._kept = {number: table for number, table in self._kept.items() if number >= shards[0]}
        if self._cursor != shards[0]:
            self._cursor = int(shards[0])
            self.store.move_cursor(self._cursor)
        parts = []
        for number in np.unique(shards):
            table = self._table(int(number))
            parts.append(table.take(pa.array(within[shards == number])))
        return pa.concat_tables(parts)

    def _table(self, number: int) -> pa.Table:
        """A shard's rows in the order of this training."""
        if number not in self._kept:
            table, manifest = self._wait(number)
            self._note(number, manifest["files"]["candidates.parquet"])
            order = randomness.permutation(self.seed, f"{self.label} stream", number, table.num_rows)
            self._kept[number] = table.take(pa.array(order)).combine_chunks()
            self.used += 1
        return self._kept[number]

    def _wait(self, number: int):
        begin = time.monotonic()
        seen = begin  # when the producer last gave a sign of life
        while (found := self.store.read(number)) is None:
            now = time.monotonic()
            if self.store.is_alive("producer"):
                seen, self._warned = now, False
            elif not self._warned:
                say(f"{self.label}: shard {number} is not there, and nobody makes shards; start, beside this one, "
                    f"`python {SCRIPT} --run_dir {self.store.folder.parent}` with the same settings")  # fmt: skip
                self._warned = True
            if now - seen > self.patience:
                raise MissingInput(
                    f"{self.label} has waited {self.patience:.0f} s for shard {number}, and nobody makes shards. Run "
                    f"`python {SCRIPT} --run_dir {self.store.folder.parent}` beside this command, and this command again"
                )
            if stop := StopRequest.noted():
                raise Interrupted(
                    f"{self.label}: stopped while waiting for shard {number}; run the same command again to continue",
                    128 + stop,
                )
            time.sleep(LOOK_EVERY)
        self.waited += time.monotonic() - begin
        return found

    def _note(self, number: int, digest: str) -> None:
        """Keep which shard was used, and that it is the same if it was used before."""
        try:
            used = json.loads(self.record_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            used = {}
        except ValueError:
            raise BadData(
                f"{self.record_file} is damaged: it no longer says which shards {self.label} has used. Run "
                "04_train.py --overwrite to begin again"
            ) from None
        if used.get(str(number), digest) != digest:
            raise BadData(
                f"shard {number} is not what it was when {self.label} used it before the interruption: it was made with "
                "other code, another torch, thread count or precision. Run 04_train.py --overwrite to begin again"
            )
        if str(number) not in used:
            used[str(number)] = digest
            self.record_file.parent.mkdir(parents=True, exist_ok=True)
            durable.write_json(self.record_file, used)


@contextlib.contextmanager
def streaming(stage: Stage, config: Config, stage_inputs: "StageInputs") -> Iterator[None]:
    """While the block runs, models learn from shards if the config says so; the stage's statistics tell how that went."""
    if not config.stream.enabled:
        yield
        return
    store, all_rows = open_store(stage, config), []
    cut = cut_of(config, stage_inputs.examples("train").num_rows)

    def rows_of(name: str) -> StreamingDataset:
        all_rows.append(
            StreamingDataset(
                store, cut, config.seed, name, stage.folder / name, config.stream.timeout_seconds
            )
        )
        return all_rows[-1]

    stage_inputs.fresh_rows = rows_of
    with store.alive("trainer"):
        yield
    stage.stats["stream"] = {
        rows.label: {
            "shards_read": rows.used,
            "seconds": rows.last - rows.first,
            "seconds_waited": rows.waited,
        }
        for rows in all_rows
    }
    for rows in all_rows:
        share = rows.waited / max(rows.last - rows.first, 1e-9)
        say(
            f"{rows.label}: read {rows.used} shards and waited for them {rows.waited:.1f} s, {share:.1%} of its time"
        )
