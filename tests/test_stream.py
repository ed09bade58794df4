"""Shards of new candidates: each is a function of its number, also when the producer or the trainer is killed."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.candidates.producer import Producer, ShardWork, at_epoch
from lib.config import Config, load_config
from lib.errors import BadConfig, BadData, Interrupted, MissingInput, UsageError
from lib.shards import Cut, ShardStore
from lib.synthetic import MaskedLMEngine
from lib.tasks import CandidateContext
from lib.tokenization import load_tokenizer
from lib.training import streaming_dataset
from lib.training.data import Sequences
from lib.training.preemption import StopRequest
from lib.training.streaming_dataset import StreamingDataset
from tests.conftest import run_stages
from tests.live_bytes import resident_bytes
from tests.process_runs import run_jobs
from tests.trainings import Killed, MeanOfRows, settings, train_tiny

SETTINGS = ["candidates.source=random_tokens", "stream.enabled=true", "stream.shard_examples=5",
            "stream.max_backlog=3"]  # fmt: skip
EXAMPLES = 18  # three shards of five and one of three in an epoch
WIDTH = 64  # tokens of the longest example


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(quick_test=True, overrides=SETTINGS)


@pytest.fixture(scope="module")
def make_producer(quick_run, config):
    """folder -> its producer, over a few training examples."""
    table = pq.read_table(quick_run / "01_prepare_dataset" / "examples")
    examples = table.filter(pa.compute.equal(table["split"], "train")).slice(0, EXAMPLES)
    tokenizer = load_tokenizer(quick_run / "01_prepare_dataset" / "tokenizer")

    def make(folder: Path, backlog: int = 3) -> Producer:
        folder.mkdir(parents=True, exist_ok=True)
        store = ShardStore(folder, "key", backlog)
        return Producer(
            store, config, examples, lambda at, draw: CandidateContext(at, tokenizer, [], draw=draw)
        )

    return make


def reader(producer: Producer, folder: Path, timeout: float = 5.0, label: str = "judge") -> StreamingDataset:
    return StreamingDataset(producer.store, producer.cut, 3, label, folder, timeout)


def names(table: pa.Table) -> list[str]:
    pairs = zip(table["example_id"].to_pylist(), table["candidate_id"].to_pylist(), strict=True)
    return [f"{example}/{candidate}" for example, candidate in pairs]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5))
def test_every_row_is_in_one_shard(examples, per_shard, per_example):
    cut = Cut(examples, per_shard, per_example)
    shards, within = cut.find(np.arange(3 * examples * per_example))
    assert (np.diff(shards) >= 0).all()
    for number in range(3 * cut.per_epoch):
        epoch, places = cut.of_shard(number)
        assert epoch == number // cut.per_epoch
        assert np.array_equal(within[shards == number], np.arange(len(places) * per_example))
    assert len(np.unique(shards)) == 3 * cut.per_epoch


def test_a_shard_is_a_function_of_its_number(make_producer, tmp_path):
    one, other = make_producer(tmp_path / "one"), make_producer(tmp_path / "other")
    for number in (0, 6, 1):
        one.make(number)
    for number in (6, 0, 1):
        other.make(number)
    for number in (0, 1, 6):
        files = sorted(path.name for path in one.store.path(number).iterdir())
        assert files == ["candidates.parquet", "manifest.json", "rewards.parquet"]
        for name in files:
            assert (one.store.path(number) / name).read_bytes() == (
                other.store.path(number) / name
            ).read_bytes()
    assert (one.store.path(0) / files[0]).read_bytes() != (one.store.path(1) / files[0]).read_bytes()


def test_an_epoch_has_every_example_with_new_candidates(make_producer, tmp_path):
    producer = make_producer(tmp_path, backlog=8)
    while producer.step() is not None:
        pass
    tables = [producer.store.read(number)[0] for number in range(8)]
    epochs = [pa.concat_tables(tables[:4]), pa.concat_tables(tables[4:])]
    first, second = (sorted(set(e["example_id"].to_pylist())) for e in epochs)
    assert first == second and len(first) == EXAMPLES
    orders = [list(dict.fromkeys(e["example_id"].to_pylist())) for e in epochs]
    assert orders[0] != orders[1] and orders[0] != first  # each in an order of its own
    texts = [dict(zip(names(e), e["text"].to_pylist(), strict=True)) for e in epochs]
    kinds = dict(zip(names(epochs[0]), epochs[0]["kind"].to_pylist(), strict=True))
    changed = [
        name for name, kind in kinds.items() if kind != "original" and texts[0][name] != texts[1][name]
    ]
    assert len(changed) > 0.9 * sum(kind != "original" for kind in kinds.values())
    assert all(0 <= reward <= 1 for reward in pa.concat_tables(tables)["reward"].to_pylist())


def test_corruption_may_rise_from_epoch_to_epoch(make_producer, tmp_path, config):
    producer = make_producer(tmp_path, backlog=16)
    producer.config = load_config(
        quick_test=True, overrides=[*SETTINGS, "stream.initial_mask_ratio=[0.0, 0.1]", "stream.ramp_epochs=2"]
    )
    while producer.step() is not None:
        pass
    means = []
    for epoch in range(4):
        tables = [producer.store.read(number)[0] for number in range(4 * epoch, 4 * epoch + 4)]
        ratio = pa.concat_tables(tables)["mask_ratio"].drop_null().to_numpy()
        low, high = at_epoch(producer.config, epoch).candidates.mask_ratio
        assert low <= ratio.min() and ratio.max() <= high
        means.append(ratio.mean())
    assert means[0] < 0.1 < means[1] < means[2] and at_epoch(producer.config, 9) == config.model_copy(
        update={"stream": producer.config.stream}
    )


def test_only_what_is_wanted_is_kept(make_producer, tmp_path):
    producer = make_producer(tmp_path)
    for cursor in (0, 7, 8, 2):  # a second model begins again from the front
        producer.store.move_cursor(cursor)
        while producer.step() is not None:
            pass
        wanted = {cursor, cursor + 1, cursor + 2}
        assert producer.store.numbers() == sorted({0, 1, 2} | wanted)


def test_the_producer_makes_all_shards_of_a_request(make_producer, tmp_path, monkeypatch):
    """Also if they are more than the backlog, and beyond the end of an epoch, whose last shard is short."""
    producer = make_producer(tmp_path / "02_stream", backlog=1)
    per_epoch = EXAMPLES * producer.cut.per_example
    turns = iter(range(50))

    def turn(_seconds: float) -> None:
        assert next(turns, None) is not None, "the trainer waits for ever"
        producer.step()

    monkeypatch.setattr(streaming_dataset.time, "sleep", turn)
    rows = reader(producer, tmp_path)
    with producer.store.alive("producer"):
        for request in (range(3), range(5 * producer.cut.per_example, per_epoch + 1)):
            assert rows.rows(request).num_rows == len(request)
    assert producer.store.cursor == 1 and producer.store.numbers() == [0, 1, 2, 3, 4]
    producer.store.move_cursor(4)
    assert producer.store.missing() == [] and producer.store.numbers() == [0, 4]  # the backlog again


def test_a_cursor_of_an_earlier_version_is_read(make_producer, tmp_path):
    store = make_producer(tmp_path).store
    (tmp_path / "cursor.json").write_text('{"shard": 7}')
    assert store.cursor == 7 and store.missing() == [7, 8, 9]


def test_a_damaged_or_foreign_shard_is_made_again(make_producer, tmp_path, capsys):
    producer = make_producer(tmp_path)
    producer.make(0)
    file = producer.store.path(0) / "rewards.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9] + b"?" + whole[-8:])
    assert (
        producer.store.read(0) is None and "shard 0 is damaged (rewards.parquet)" in capsys.readouterr().err
    )
    assert producer.step() == 0 and file.read_bytes() == whole
    foreign = ShardStore(tmp_path, "another key", 3)
    assert foreign.manifest(0) is None and foreign.read(0) is None


class Consumer(MeanOfRows):
    """An objective that learns from fresh rows, and notes what each step saw."""

    selection, tokens_per_row = "loss", WIDTH

    def __init__(self, rows: StreamingDataset, seen: dict[int, list[str]]):
        self.fresh, self.seen = rows, seen

    def loss(self, model, step, rows):
        table = self.fresh.rows(rows)
        self.seen[step] = names(table)
        ids, valid = Sequences(table["token_ids"], WIDTH, 0).batch(np.arange(table.num_rows))
        scores = model(torch.from_numpy(np.where(valid, ids, 0)).float())[:, 0]
        return {"loss": (scores - torch.tensor(table["reward"].to_pylist())).square().mean()}

    def evaluate(self, model):
        return {"loss": 1.0}


class TinyModel(torch.nn.Linear):
    def save_pretrained(self, folder) -> None:
        torch.save(self.state_dict(), Path(folder) / "weights")


def train_on_shards(
    producer: Producer, folder: Path, seen: dict, monkeypatch, kill=lambda side: None
) -> None:
    """Training in which the producer gets its turn whenever the trainer waits; `kill(side)` may raise in either."""

    def turn(_seconds: float) -> None:
        kill("producer")
        producer.step()

    monkeypatch.setattr(streaming_dataset.time, "sleep", turn)
    torch.manual_seed(0)
    chosen = settings(steps=60, checkpoint_every=7, evaluate_every=60, batch_size=7, optimizer="adamw")
    train_tiny(torch.nn.Linear(WIDTH, 1), Consumer(reader(producer, folder), seen), chosen, folder,
               fault=lambda step: kill("trainer"))  # fmt: skip


def test_twenty_deaths_on_each_side_change_nothing(make_producer, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tests.trainings.save_model", lambda model, path, _: torch.save(model.state_dict(), path / "w")
    )
    monkeypatch.setattr("tests.trainings.fingerprint", lambda folder: {})
    whole: dict[int, list[str]] = {}
    train_on_shards(make_producer(tmp_path / "a" / "02_stream"), tmp_path / "a", whole, monkeypatch)
    used = json.loads((tmp_path / "a" / "shards.json").read_text())
    assert len(used) == 23 and len(whole) == 60  # five epochs of four shards, and three of the sixth

    chance, deaths, seen = random.Random(5), {"trainer": 0, "producer": 0}, {}
    folder = tmp_path / "b"

    def kill(side: str) -> None:
        if deaths[side] < 20 and chance.random() < 0.5:
            deaths[side] += 1
            raise Killed(side)

    while True:
        producer = make_producer(folder / "02_stream")
        try:
            train_on_shards(producer, folder, seen, monkeypatch, kill)
            break
        except Killed as killed:
            if killed.args == ("producer",):  # it leaves halves behind, and shards of its own are lost
                half = producer.store.folder / "shard_000009.tmp"
                half.mkdir(exist_ok=True)
                (half / "candidates.parquet").write_bytes(b"PAR1")
                for number in producer.store.numbers()[:2]:
                    producer.store.remove(number)
    assert deaths == {"trainer": 20, "producer": 20}
    assert seen == whole
    assert json.loads((folder / "shards.json").read_text()) == used
    final = [torch.load(tmp_path / name / "final_model" / "w") for name in "ab"]
    assert torch.equal(final[0]["weight"], final[1]["weight"])


TRAINER = """
import hashlib, json, os, sys
from pathlib import Path
from lib import durable
from lib.shards import Cut, ShardStore
from lib.training.streaming_dataset import StreamingDataset
folder, steps = Path(sys.argv[1]), int(sys.argv[2])
rows = StreamingDataset(ShardStore(folder / "02_stream", "key", 3), Cut(*json.loads(sys.argv[3])), 3, "judge", folder, 60.0)
log = folder / "seen.json"
seen = json.loads(log.read_text()) if log.exists() else []
print("ready", flush=True)
for step in range(len(seen), steps):
    table = rows.rows(range(step * 7, step * 7 + 7))
    seen.append(hashlib.sha256(str(table.select(["example_id", "candidate_id", "text", "reward"]).to_pylist()).encode()).hexdigest())
    if step % 3 == 2 or step == steps - 1:
        durable.write_json(log, seen)
"""


def test_processes_killed_for_real_lose_nothing(make_producer, tmp_path):
    """Producer and trainer as processes of their own; SIGKILL at random moments, by turns. REMASK_KILLS=40 for 20 each."""
    kills = int(os.environ.get("REMASK_KILLS", 6))
    cut = json.dumps([EXAMPLES, 5, make_producer(tmp_path / "x").cut.per_example])

    def trainer(folder: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", TRAINER, str(folder), str(15 * kills), cut]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    def producer(folder: Path) -> int:
        """A forked process that makes shards for ever; without torch's threads, so that a fork is safe."""
        made = make_producer(folder / "02_stream")
        child = os.fork()
        if child == 0:
            try:
                while True:
                    if made.step() is None:
                        time.sleep(0.002)
            finally:
                os._exit(1)
        return child

    def end(child: int) -> None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    quiet, folder = tmp_path / "quiet", tmp_path / "killed"
    child = producer(quiet)
    assert trainer(quiet).wait(timeout=120) == 0
    end(child)
    chance = random.Random(1)
    child, process = producer(folder), trainer(folder)
    deaths = {"trainer": 0, "producer": 0}
    for turn in range(kills):
        time.sleep(chance.random() * 0.1)
        deaths["trainer" if turn % 2 else "producer"] += process.poll() is None
        if turn % 2:
            process.kill()
            process.wait()
            process = trainer(folder)
        else:
            end(child)
            time.sleep(chance.random() * 0.05)
            child = producer(folder)
    # Each died while the other side was at work.
    assert deaths == {"trainer": kills // 2, "producer": kills - kills // 2}
    assert process.wait(timeout=120) == 0
    end(child)
    assert (folder / "seen.json").read_text() == (quiet / "seen.json").read_text()
    assert (folder / "shards.json").read_text() == (quiet / "shards.json").read_text()


def test_a_shard_that_comes_back_different_is_refused(make_producer, tmp_path):
    producer = make_producer(tmp_path / "02_stream")
    producer.make(0)
    rows = reader(producer, tmp_path)
    rows.rows(range(7))
    (tmp_path / "shards.json").write_text(json.dumps({"0": hashlib.sha256(b"other").hexdigest()}))
    with pytest.raises(BadData, match="shard 0 has changed since judge used it"):
        reader(producer, tmp_path).rows(range(7))


def test_the_producers_masked_lm_is_loaded_as_the_candidates_section_says(tmp_path, quick_run, monkeypatch):
    """Shards need most of all forward passes, so `candidates.compile` holds for them too."""
    changed = load_config(quick_test=True, overrides=["stream.enabled=true", "candidates.compile=on"])
    given: list[dict] = []
    monkeypatch.setattr(MaskedLMEngine, "load", lambda folder, runtime, **options: given.append(options))
    table = pq.read_table(quick_run / "01_prepare_dataset" / "examples")
    examples: Any = SimpleNamespace(batches=lambda schema: iter(table.to_batches()))
    tokenizer = quick_run / "01_prepare_dataset" / "tokenizer"
    store = ShardStore(tmp_path, "key", 3)
    ShardWork(changed, store, examples, tokenizer, [tmp_path / "generator"]).open(None)
    assert [(options["compiles"], options["int8"]) for options in given] == [("on", False)]


def test_a_damaged_record_of_shards_is_not_taken_for_none(make_producer, tmp_path):
    producer = make_producer(tmp_path / "02_stream")
    producer.make(0)
    (tmp_path / "shards.json").write_text('{"0": "ab')
    with pytest.raises(BadData, match=r"shards\.json is damaged"):
        reader(producer, tmp_path).rows(range(3))


def test_a_missing_producer_is_noticed(make_producer, tmp_path, capsys):
    rows = reader(make_producer(tmp_path / "02_stream"), tmp_path, timeout=0.2)
    with pytest.raises(MissingInput, match=r"has waited 0 s for shard 0.*02_generate_candidates.py --stream"):
        rows.rows(range(7))
    assert "no producer is running" in capsys.readouterr().err
    with StopRequest() as stop:
        stop.signal = signal.SIGTERM
        with pytest.raises(Interrupted, match="stopped while waiting for shard 0"):
            reader(make_producer(tmp_path / "02_stream"), tmp_path).rows(range(7))
    assert StopRequest.noted() == 0


def test_signs_of_life(make_producer, tmp_path, monkeypatch):
    store = make_producer(tmp_path).store
    assert not store.is_alive("producer")
    with store.alive("producer"):
        time.sleep(0.05)
        assert store.is_alive("producer") and not store.is_alive("trainer")
    monkeypatch.setattr("lib.shards.MAX_SILENCE_SECONDS", 0.0)
    assert not store.is_alive("producer")


def test_heartbeats_go_on_after_an_error_of_the_disk(make_producer, tmp_path, monkeypatch):
    store, beats, real = make_producer(tmp_path).store, [], Path.touch

    def touch(path: Path) -> None:
        beats.append(path)
        if len(beats) == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        real(path)

    monkeypatch.setattr(Path, "touch", touch)
    monkeypatch.setattr("lib.shards.HEARTBEAT_SECONDS", 0.001)
    with store.alive("producer"):
        end = time.monotonic() + 5
        while len(beats) < 3 and time.monotonic() < end:
            time.sleep(0.002)
    assert len(beats) >= 3


def test_memory_and_disk_stay_flat(make_producer, tmp_path):
    producer = make_producer(tmp_path / "02_stream")
    rows, at = reader(producer, tmp_path), 0
    sizes = []
    for number in range(120):
        producer.store.move_cursor(number)
        while producer.step() is not None:
            pass
        rows.rows(range(at, at + len(producer.cut.of_shard(number)[1]) * producer.cut.per_example))
        at += len(producer.cut.of_shard(number)[1]) * producer.cut.per_example
        assert len(producer.store.numbers()) <= 6 and len(rows._tables) <= 1
        sizes.append(resident_bytes())
    assert np.median(sizes[100:]) - np.median(sizes[40:60]) < 10e6, "bytes grown over 60 shards"


def test_stages_stream_beside_each_other(quick_run, tmp_path):
    """02 --stream and 04 as processes of their own, 04 killed twice on its way; the judge comes out as undisturbed."""
    given = ["stream.enabled=true", "stream.shard_examples=24", "stream.max_backlog=2"]
    given += [
        f"models.{name}=null" for name in ("generator", "reference_lm", "ar_baseline", "inspector", "ranker")
    ]
    given += ["models.judge.start=scratch"]
    results = []
    for name, kills in (("quiet", 0), ("killed", 2)):
        run = tmp_path / name
        for stage in ("00_check_data", "01_prepare_dataset", "02_generate_candidates", "03_build_rewards"):
            shutil.copytree(quick_run / stage, run / stage)
        flags = [
            "--quick_test",
            "--run_dir",
            str(run),
            *(word for value in given for word in ("--set", value)),
        ]
        train = {"size": 1, "argv": ["04_train.py", *flags]}
        # Before the first checkpoint, and after it
        moments = ("shards.json", "checkpoint/state.json")[:kills]
        killed = [
            train | {"kill": {"rank": 0, "when": str(run / "04_train" / "judge" / file)}} for file in moments
        ]
        maker = {"size": 1, "argv": ["02_generate_candidates.py", "--stream", *flags], "beside": "maker"}
        _, *lost, done, made = run_jobs([maker, *killed, train, {"wait": "maker"}])
        assert [job["codes"] for job in lost] == [[-9]] * kills and done["codes"] == [0], (lost, done)
        said = made["errors"]
        assert made["codes"] == [0] and "all models that learn from shards are trained" in said, said
        judge = run / "04_train" / "judge"
        files = [judge / file for file in ("shards.json", "metrics.jsonl", "final_model/model.safetensors")]
        results.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
        manifest = json.loads((run / "04_train" / "manifest.json").read_text())
        assert (
            "judge/shards.json" in manifest["outputs"]
            and manifest["stats"]["stream"]["judge"]["shards_read"] > 0
        )
    assert results[0] == results[1]


def test_what_cannot_stream_is_refused(tmp_path):
    with pytest.raises(BadConfig, match=r"stream\.enabled needs new candidates"):
        load_config(
            overrides=["stream.enabled=true", "candidates.source=original_only", "candidates.per_example=1"]
        )
    with pytest.raises(UsageError, match="--stream makes shards for stage 04"):
        run_stages(tmp_path, load_config(quick_test=True), ("02_generate_candidates",), stream=True)
