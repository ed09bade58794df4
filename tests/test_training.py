"""The training loop learns, and ends with the same bits however often it is killed."""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from lib.config import load_config
from lib.errors import BadConfig, BadData, Interrupted, NonFiniteLoss
from lib.models.build import load_model, start_model
from lib.runtime import Runtime
from lib.training import loop, muon
from lib.training.data import Rows, Windows, first_lengths, pools
from lib.training.objectives.base import batch_losses
from lib.training.objectives.language_model import MaskedDiffusion, MaskingTokens
from lib.training.objectives.next_token import NextToken
from lib.training.optimizer import Optimizer, learning_rate_factor
from tests import trainings
from tests.process_runs import run_jobs
from tests.trainings import TOKENS, Killed, context, fingerprint, settings, splits, train_tiny, windows


def start(folder: Path, attention: str = "bidirectional", dropout: float = 0.1, fault=None, **changes):
    """Train the tiny language from the folder's checkpoint or its start. `fault(step)` may raise before a step."""
    config = load_config(quick_test=True)
    architecture = config.architecture.model_copy(
        update={"dropout": dropout, "hidden_size": 32, "context": 16}
    )
    common = context(evaluation_examples=16), splits()
    objective = (
        NextToken(*common, cls_id=2)
        if attention == "causal"
        else MaskedDiffusion(*common, config.diffusion, TOKENS)
    )
    model, _ = start_model("language_model", architecture, attention, 14, 3, "tiny")
    return train_tiny(model, objective, settings(**changes), folder, fault)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    start(folder)
    return fingerprint(folder)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_it_learns(tmp_path, attention):
    result = start(tmp_path, attention, dropout=0.0, steps=120, evaluate_every=40)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    name = "nll" if attention == "causal" else "nelbo"
    assert lines[-1]["selection"][name] < 0.75 * np.log(10)
    assert result.metrics[name] == min(line["selection"][name] for line in lines)
    assert isinstance(load_model(tmp_path / "best_model"), torch.nn.Module)


@pytest.mark.slow
def test_killed_before_every_step_in_turn_it_ends_with_the_same_bits(tmp_path, undisturbed):
    for kill_at in range(12):
        folder = tmp_path / str(kill_at)

        def fault(step, kill_at=kill_at):
            if step == kill_at:
                raise Killed

        with pytest.raises(Killed):
            start(folder, fault=fault)
        start(folder)
        assert fingerprint(folder) == undisturbed, f"killed before step {kill_at}"


def test_killed_again_and_again_it_ends_with_the_same_bits(tmp_path, undisturbed):
    calls = []

    def fault(step):
        calls.append(step)
        if len(calls) % 5 == 0:
            raise Killed

    for _ in range(20):
        try:
            start(tmp_path, fault=fault)
            break
        except Killed:
            continue
    assert len(calls) > 13
    assert fingerprint(tmp_path) == undisturbed


def main() -> None:
    """In another process: `- FOLDER THREADS` trains."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(int(sys.argv[2]))
    start(folder)


@pytest.mark.slow
def test_a_real_sigkill_at_random_moments(tmp_path, undisturbed):
    """A process is killed with SIGKILL while it trains and saves, after its first checkpoint, then runs to the end."""
    argv = ["-", str(tmp_path), str(torch.get_num_threads())]
    job = {"size": 1, "module": "tests.test_training", "argv": argv}
    kill = {"rank": 0, "when": str(tmp_path / "checkpoint" / "state.json"), "after": 0.01}
    killed, done = run_jobs([job | {"kill": kill}, job])
    assert killed["codes"][0] in (-9, 0) and done["codes"] == [0], (killed, done)
    assert fingerprint(tmp_path) == undisturbed


def test_sigterm_finishes_the_step_commits_and_says_143(tmp_path, undisturbed):
    def fault(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        start(tmp_path, fault=fault)
    assert caught.value.exit_code == 143
    state = json.loads((tmp_path / "checkpoint" / "state.json").read_text())
    assert state["step"] == 5
    start(tmp_path)
    assert fingerprint(tmp_path) == undisturbed


def test_a_stop_while_a_step_waits_for_its_data_loses_no_step(tmp_path, undisturbed):
    """As with a shard that no producer has made yet."""

    def fault(step):
        if step == 5:
            raise Interrupted("stopped while waiting", 143)

    with pytest.raises(Interrupted, match="while waiting"):
        start(tmp_path, fault=fault, checkpoint_every=100)
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["step"] == 5
    start(tmp_path)
    assert fingerprint(tmp_path) == undisturbed


def test_the_last_metrics_are_synced_before_the_training_counts_as_complete(tmp_path, monkeypatch):
    """A replayed loss of power found a training that was complete and had lost its last lines."""
    synced: dict[int, int] = {}

    def note(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size

    monkeypatch.setattr(os, "fsync", note)
    start(tmp_path, steps=3, evaluate_every=1, checkpoint_every=2)
    status = (tmp_path / "metrics.jsonl").stat()
    assert synced[status.st_ino] == status.st_size > 0


def test_an_evaluation_more_or_less_changes_no_weight(tmp_path, undisturbed):
    start(tmp_path, evaluate_every=12)
    assert (
        fingerprint(tmp_path)["final_model/model.safetensors"] == undisturbed["final_model/model.safetensors"]
    )


def test_a_damaged_checkpoint_is_named(tmp_path):
    with pytest.raises(Killed):
        start(tmp_path, fault=_kill_at_seven)
    file = tmp_path / "checkpoint" / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(BadData, match=r"weights\.safetensors is damaged"):
        start(tmp_path)


def _kill_at_seven(step: int) -> None:
    if step == 7:
        raise Killed


def test_resuming_under_another_precision_is_refused_unless_allowed(tmp_path):
    with pytest.raises(Killed):
        start(tmp_path, fault=_kill_at_seven)
    state = tmp_path / "checkpoint" / "state.json"
    changed = json.loads(state.read_text())
    changed["fingerprint"]["precision"] = "bf16"
    state.write_text(json.dumps(changed))
    hashes = json.loads((tmp_path / "checkpoint" / "hashes.json").read_text())
    hashes["state.json"] = hashlib.sha256(state.read_bytes()).hexdigest()
    (tmp_path / "checkpoint" / "hashes.json").write_text(json.dumps(hashes))
    with pytest.raises(BadConfig, match="precision: bf16 -> fp32"):
        start(tmp_path)
    assert start(tmp_path, allow_inexact_resume=True).steps == 12


def test_a_non_finite_loss_stops_before_the_update(tmp_path):
    with pytest.raises(NonFiniteLoss) as caught:
        start(tmp_path, learning_rate=1e30, muon_learning_rate=1e30, steps=12)
    assert caught.value.exit_code == 76
    assert json.loads((tmp_path / "non_finite.json").read_text())["seed"] == 3


# --------------------------------------------------------------------------------------------- parts


def test_learning_rate_rises_stays_and_falls_to_zero():
    s = settings(steps=100, warmup_fraction=0.1, decay_fraction=0.5)
    values = [learning_rate_factor(step, s) for step in range(101)]
    assert values[0] == pytest.approx(0.1) and values[9] == 1 and values[50] == 1 and values[100] == 0
    assert (np.diff(values[50:]) < 0).all()


@pytest.mark.parametrize("optimizer", ["muon", "normuon"])
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_muon_computes_in_bfloat16_only_if_the_training_does(
    tmp_path, monkeypatch, optimizer, precision, dtype
):
    """Where the hardware lacks bfloat16, its products take five times as long as those of float32."""
    used = set()

    def noted(matrices, coefficients, steps, eps, dtype):
        used.add(dtype)
        return matrices

    monkeypatch.setattr(muon, "orthogonalised", noted)
    monkeypatch.setattr(loop, "matmul_peak", lambda *_: 1e9)
    monkeypatch.setattr(trainings, "CPU", Runtime(torch.device("cpu"), precision))
    start(tmp_path, steps=1, evaluate_every=1, optimizer=optimizer)
    assert used == {dtype}


def test_muon_takes_the_hidden_matrices_and_adam_the_rest():
    model, _ = start_model(
        "language_model", load_config(quick_test=True).architecture, "bidirectional", 14, 0, "m"
    )
    parts = Optimizer(model, settings()).optimizers
    names = {id(p): n for n, p in model.named_parameters()}
    muon, adam = ({names[id(p)] for p in part.param_groups[0]["params"]} for part in parts)
    assert isinstance(parts[0], torch.optim.Muon) and all(".layers." in n for n in muon)
    assert adam == {"model.embed_tokens.weight"}


WIDTH = 8
SIZES = [1, 5, WIDTH, WIDTH + 1, 2 * WIDTH, 3 * WIDTH + 7, 4 * WIDTH + 1, 512, 513, 519]


def documents(sizes, width: int = WIDTH, passage: int = 6) -> Windows:
    """Documents of these sizes, in passages. Token i of the text is i, so a window reveals its position."""
    lists, continues, first = [], [], 0
    for size in sizes:
        for start in range(0, size, passage):
            lists.append(list(range(first + start, first + min(start + passage, size))))
            continues.append(start > 0)
        first += size
    column = pa.chunked_array([pa.array(lists, pa.list_(pa.int32()))])
    return Windows(pa.table({"token_ids": column, "continues": continues}), width, -1)


def epoch_of(data: Windows, epoch: int) -> list[np.ndarray]:
    index = np.arange(data.count)
    ids, valid = data.batch(index, data.cut_positions(3, "m window", index, np.full(data.count, epoch)))
    assert (ids[~valid] == -1).all() and (np.diff(valid.astype(int), axis=1) <= 0).all()
    return [row[here] for row, here in zip(ids, valid, strict=True)]


def test_every_token_is_visited_once_per_epoch_and_no_window_leaves_its_document():
    data = documents(SIZES)
    document_of = np.repeat(np.arange(len(SIZES)), SIZES)
    for epoch in range(40):
        parts = epoch_of(data, epoch)
        visits = np.bincount(np.concatenate(parts), minlength=sum(SIZES))
        assert (visits == 1).all()  # also the first and the last token of every document
        for part in parts:
            assert len(part) and (np.diff(part) == 1).all() and len(np.unique(document_of[part])) == 1
        assert [len(p) for p in parts[:3]] == [1, 5, WIDTH]  # short documents are read whole


def test_documents_without_a_token_have_no_window():
    lists = pa.array([[], [0, 1, 2], [], [3], []], pa.list_(pa.int32()))
    continues = [False, False, True, True, False]
    data = Windows(pa.table({"token_ids": pa.chunked_array([lists]), "continues": continues}), 4, -1)
    assert [part.tolist() for part in epoch_of(data, 0)] == [[0, 1, 2, 3]]
    assert data.tiled().owner.tolist() == [1]


def test_cuts_of_a_document_move_from_epoch_to_epoch_over_all_they_can():
    data = documents(SIZES)
    of = np.cumsum(SIZES) - SIZES
    starts = [np.array([part[0] for part in epoch_of(data, epoch)]) for epoch in range(200)]
    for number, size in enumerate(SIZES):
        here = data.document == number
        cuts = {int(s[here][1] - of[number]) for s in starts} if here.sum() > 1 else set()
        shortest, longest = {
            9: (1, 8),
            16: (8, 8),
            31: (7, 8),
            33: (1, 8),
            512: (1, 7),
            513: (1, 8),
            519: (1, 6),
        }.get(size, (0, -1))
        assert cuts == set(range(shortest, longest + 1)), size
    # two documents of the same size are cut at different positions
    twins = documents([513, 513])
    half = twins.count // 2
    apart = [
        int(e[half][-1] - 513 - e[0][-1]) for e in (epoch_of(twins, epoch) for epoch in range(20))
    ]  # difference of the first windows' lengths
    assert len(set(apart)) > 3


def test_few_windows_are_short():
    """Short documents need padding; of a long one, less than a window and a half is padding."""
    sizes = np.array([40 * WIDTH + rest for rest in range(WIDTH)])
    windows, shortest, longest = first_lengths(sizes, WIDTH)
    assert (windows * WIDTH - sizes < 1.5 * WIDTH + 1).all() and (longest - shortest + 1 >= WIDTH // 2).all()
    sizes = np.arange(1, 31 * WIDTH)
    assert (
        first_lengths(sizes, WIDTH)[0] == -(-sizes // WIDTH)
    ).all()  # below that, no more windows than needed
    assert 4096 / documents([4096], 128).count / 128 > 0.95


def test_windows_are_a_function_of_the_row_alone():
    def objective(batch_size: int) -> MaskedDiffusion:
        config = load_config(quick_test=True).diffusion
        made = context("m", batch_size=batch_size, evaluation_examples=4)
        return MaskedDiffusion(made, splits(documents(SIZES)), config, TOKENS)

    one, other = objective(8), objective(3)
    count = one.splits.train.count
    rows = range(2 * count - 5, 2 * count + 7)  # across the end of an epoch
    _, ids, valid = one.windows(rows)
    for index, row in enumerate(rows):
        _, alone, alone_valid = other.windows(range(row, row + 1))
        assert np.array_equal(alone[0], ids[index]) and np.array_equal(alone_valid[0], valid[index])
    epochs = [one.windows(range(e * count, (e + 1) * count)) for e in (0, 1)]
    for _, ids, valid in epochs:  # in training, an epoch visits every token once
        assert sorted(ids[valid]) == list(range(sum(SIZES)))
    assert sorted(epochs[0][1][:, 0]) != sorted(epochs[1][1][:, 0])  # other cuts, not only another order


def test_the_training_loss_counts_every_token_alike():
    """The cross-entropy of a token is its number in nats, so the mean over an epoch is the mean over the text."""
    data = documents([1, 3, 8, 20])
    for weight in ("exact_count", "inverse_t"):
        diffusion = load_config(overrides=[f"diffusion.weight={weight}"]).diffusion
        made = context("m", batch_size=data.count, evaluation_examples=4)
        objective = MaskedDiffusion(made, splits(data), diffusion, MaskingTokens(mask_id=99))

        def predict(model, inputs, ids, valid, masked):
            flat_idx = np.flatnonzero(masked)
            target = torch.from_numpy(ids.reshape(-1)[flat_idx])
            # cross-entropy of two classes is log(1 + exp(x)): about x if the logits differ much
            wrong = torch.stack([torch.zeros(len(flat_idx)), 50.0 + target.float()], 1)
            return wrong, torch.zeros(len(flat_idx), dtype=torch.long), flat_idx

        objective.predict = predict
        model = torch.nn.Linear(1, 1)
        steps = [float(batch_losses(objective, model, s, range(s * data.count, (s + 1) * data.count))["loss"]) for s in range(300)]  # fmt: skip
        expected = 50 + np.arange(32).mean()
        tolerance = 1e-3 if weight == "exact_count" else 0.05
        assert np.mean(steps) == pytest.approx(expected, rel=tolerance), weight


def test_tiles_hold_every_token_exactly_once():
    data = windows(16)
    tiles = data.tiled()
    ids, valid = tiles.batch(np.arange(tiles.count), np.full(tiles.count, 0.7))
    np.testing.assert_array_equal(ids[valid], data.ids)
    start, end = tiles.spans(np.arange(tiles.count), np.zeros(tiles.count))
    assert valid.sum(1).max() == 16 and (tiles.owner == np.repeat(np.arange(40), 50)[start]).all()
    assert (start % 200 % 16 == 0).all() and ((end - start == 16) | (end % 200 == 0)).all()


def test_rows_visit_every_sample_once_per_epoch_in_another_order():
    rows = Rows(1, "order", 10)
    first, second = rows.samples(np.arange(10)), rows.samples(np.arange(10, 20))
    assert sorted(first) == sorted(second) == list(range(10)) and list(first) != list(second)
    np.testing.assert_array_equal(rows.samples(np.arange(7, 13)), np.concatenate([first[7:], second[:3]]))


def test_pools_gather_the_rows_of_each_example():
    table = pools(np.array(["a", "a", "b", "b", "b", "c"]))
    assert table.tolist() == [[0, 1, -1], [2, 3, 4], [5, -1, -1]]
    with pytest.raises(BadData, match="are not consecutive"):
        pools(np.array(["a", "b", "a"]))


def test_the_held_out_bound_is_the_same_whatever_masks_training_draws():
    """Sticky, span or line masks change the training loss, never what is reported as NELBO."""
    model, _ = start_model(
        "language_model",
        load_config(quick_test=True).architecture.model_copy(update={"hidden_size": 32, "context": 16}),
        "bidirectional", 14, 3, "tiny",
    )  # fmt: skip
    found = []
    for masking in (
        "{type: random}",
        "{type: sticky, p1: 0.05, p2: 0.9}",
        "{type: line, min_ratio: 0.1, max_ratio: 0.9}",
    ):
        diffusion = load_config(overrides=[f"diffusion.masking={masking}"]).diffusion
        tokens = MaskingTokens(mask_id=1, newline_ids=np.array([4]))
        objective = MaskedDiffusion(context(evaluation_examples=16), splits(), diffusion, tokens)
        with torch.no_grad():
            found.append(objective.evaluate(model.eval())["nelbo"])
        assert batch_losses(objective, model, 0, range(8))["loss"].isfinite()
    assert found[0] == found[1] == found[2]
