"""Training rows from shards of candidates, which stage 02 makes while the model trains (`stream.enabled`).

Every row of a training belongs to one shard, and the rows of a shard are shuffled by a keyed draw. So the rows of a
step are a function of (seed, step), as they are with tables. A resumed training reads the shards of its last
checkpoint again.
"""

import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from lib import durable, randomness
from lib.errors import BadData, Interrupted, MissingInput
from lib.log import say
from lib.shards import SCRIPT, Cut, ShardStore
from lib.training.preemption import StopRequest

POLL_SECONDS = 0.05
RECORD = "shards.json"


class StreamingDataset:
    """Candidates with rewards, by global row number.

    Args:
        folder: of the model. Its shards.json lists the shards that the training used, with their hashes.
        timeout: seconds to wait for a shard while no producer is running.

    Attributes:
        seconds_waited: time spent waiting for shards.
        shards_read: number of shards that this process has read.
    """

    def __init__(self, store: ShardStore, cut: Cut, seed: int, label: str, folder: Path, timeout: float):
        self.store, self.cut, self.seed, self.label = store, cut, seed, label
        self.record_file, self.timeout = folder / RECORD, timeout
        self.seconds_waited, self.shards_read = 0.0, 0
        self._first_request = self._last_request = 0.0  # seconds of the monotonic clock
        self._tables: dict[int, pa.Table] = {}
        self._requested: tuple[int, int] | None = None  # the first and the last shard
        self._warned = False  # that no producer is running

    @property
    def seconds(self) -> float:
        """Time between the first and the last request for rows."""
        return self._last_request - self._first_request

    def rows(self, rows: range) -> pa.Table:
        """The candidates of global training rows, with `reward`.

        Raises:
            MissingInput: a shard is missing, and no producer has been running for `timeout` seconds.
            BadData: a shard that was used before now has other content.
            Interrupted: a stop signal arrived while waiting.
        """
        self._last_request = time.monotonic()
        self._first_request = self._first_request or self._last_request
        shards, within = self.cut.find(np.arange(rows.start, rows.stop))
        self._tables = {number: table for number, table in self._tables.items() if number >= shards[0]}
        request = int(shards[0]), int(shards[-1])
        if self._requested != request:
            self._requested = request
            self.store.move_cursor(*request)
        parts = []
        for number in np.unique(shards):
            table = self._table(int(number))
            parts.append(table.take(pa.array(within[shards == number])))
        return pa.concat_tables(parts)

    def _table(self, number: int) -> pa.Table:
        """The rows of a shard in the order of this training."""
        if number not in self._tables:
            table, manifest = self._wait(number)
            self._record(number, manifest["files"]["candidates.parquet"])
            order = randomness.permutation(self.seed, f"{self.label} stream", number, table.num_rows)
            self._tables[number] = table.take(pa.array(order)).combine_chunks()
            self.shards_read += 1
        return self._tables[number]

    def _wait(self, number: int):
        """(table, manifest) of a shard, as soon as it exists."""
        begin = time.monotonic()
        last_alive = begin  # when a producer was last seen running
        while (found := self.store.read(number)) is None:
            now = time.monotonic()
            if self.store.is_alive("producer"):
                last_alive, self._warned = now, False
            elif not self._warned:
                say(f"{self.label}: shard {number} is missing and no producer is running; start one at the same time: "
                    f"`python {SCRIPT} --run_dir {self.store.folder.parent}` with the same settings")  # fmt: skip
                self._warned = True
            if now - last_alive > self.timeout:
                raise MissingInput(
                    f"{self.label} has waited {self.timeout:.0f} s for shard {number}, and no producer is running. Run "
                    f"`python {SCRIPT} --run_dir {self.store.folder.parent}` and, at the same time, this command again"
                )
            if stop := StopRequest.noted():
                raise Interrupted(
                    f"{self.label}: stopped while waiting for shard {number}; run the same command again to continue",
                    128 + stop,
                )
            time.sleep(POLL_SECONDS)
        self.seconds_waited += time.monotonic() - begin
        return found

    def _record(self, number: int, digest: str) -> None:
        """Add a shard and its hash to shards.json. Raises BadData if the shard was used before with another hash."""
        try:
            used = durable.read_json(self.record_file)
        except FileNotFoundError:
            used = {}
        except ValueError:
            raise BadData(
                f"{self.record_file} is damaged: the shards that {self.label} used are no longer known. Run "
                "04_train.py --overwrite to start again"
            ) from None
        if used.get(str(number), digest) != digest:
            raise BadData(
                f"shard {number} has changed since {self.label} used it before the interruption: it was made with other "
                "code, with compiled layers on one side only, or with another torch, thread count or precision. Run 04_train.py --overwrite to start again"
            )
        if str(number) not in used:
            used[str(number)] = digest
            self.record_file.parent.mkdir(parents=True, exist_ok=True)
            durable.write_json(self.record_file, used)
