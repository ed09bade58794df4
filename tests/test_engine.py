"""The parts of a batch, the tree in which they are added, and what one process does of it."""

import ctypes
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.engine.allocator import release_free_memory
from lib.engine.gradients import GradientSum, PairwiseSum, pairwise_sum
from lib.engine.parts import Parts, check_parts, good_sizes
from lib.engine.processes import Processes, _join, _pack, _unpack, exchange
from lib.errors import BadConfig, ProcessLost
from lib.training import loop
from lib.training.objectives.base import TrainingContext
from tests.live_bytes import resident_bytes
from tests.trainings import CPU, MeanOfRows, settings

# --- the tree --------------------------------------------------------------------------------------------------------


def written(a: str, b: str) -> str:
    return f"({a}+{b})"


def level_by_level(nodes: list[str]) -> str:
    """The definition: neighbours are added, then neighbouring pairs; a last node without neighbour waits."""
    while len(nodes) > 1:
        pairs = [nodes[n : n + 2] for n in range(0, len(nodes), 2)]
        nodes = [written(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    return nodes[0]


@pytest.mark.parametrize("count", range(1, 34))
def test_nodes_are_added_level_by_level(count):
    names = [str(n) for n in range(count)]
    assert pairwise_sum(names, written) == level_by_level(names)


@pytest.mark.parametrize("parts", range(1, 65))
def test_processes_add_their_parts_in_the_tree_of_one_process(parts):
    names = [str(n) for n in range(parts)]
    wanted = pairwise_sum(names, written)
    for size in range(1, parts + 1):
        runs = [Processes(rank, size).run_of(parts) for rank in range(size)]
        of_processes = [pairwise_sum([names[n] for n in run], written) for run in runs if run]
        same = parts % size == 0 and pairwise_sum(of_processes, written) == wanted
        assert (size in good_sizes(parts)) <= same, "a size that is called good gives another tree"
        if parts % size == 0 and size not in good_sizes(parts):
            assert not same, "a size that is refused would give the same tree"


def test_the_memory_of_the_sum_is_logarithmic():
    held = PairwiseSum(written)
    for n in range(1000):
        held.push(str(n))
        assert len(held._subtrees) <= 10


@given(st.integers(1, 64), st.integers(1, 8))
def test_items_are_divided_without_gap_or_overlap(count, size):
    runs = [Processes(rank, size).run_of(count) for rank in range(size)]
    assert [n for run in runs for n in run] == list(range(count))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


# --- rows of parts, and refusals -------------------------------------------------------------------------------------


def test_the_parts_of_a_step_are_its_rows_in_order():
    parts = Parts(4, 12, Processes(), "training")
    assert [list(parts.rows(5, n)) for n in range(4)] == np.arange(60, 72).reshape(4, 3).tolist()


@pytest.mark.parametrize(
    ("parts", "batch", "size", "message"),
    [
        (3, 32, 1, "set parts to 2 or 4"),
        (4, 32, 3, "start 2 processes (possible: 1, 2, 4), or set parts to 3 or 6 for 3 processes"),
        (1, 32, 2, "start 1 processes (possible: 1), or set parts to 2 or 4"),
        (6, 12, 2, "possible: 1, 3, 6"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_next_good_numbers(parts, batch, size, message):
    with pytest.raises(BadConfig) as caught:
        check_parts(parts, batch, Processes(0, size), "judge.training")
    assert message in str(caught.value) and "judge.training" in str(caught.value)


def test_sums_over_parts_are_those_of_all_parts():
    parts = Parts(3, 12, Processes(), "training")
    assert parts.sum([{"tokens": 2, "rows": 4}, {"tokens": 3, "rows": 4}, {"tokens": 0.5, "rows": 4}]) == {
        "tokens": 5.5,
        "rows": 12,
    }


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK=''"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "no number below another"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE='two' is no number of processes.*torchrun"),
        ({"WORLD_SIZE": "", "RANK": "0"}, "WORLD_SIZE='' is no number of processes"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE='0' is no number of processes"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR, MASTER_PORT must be set for 2 processes"),
    ],
)
def test_a_launcher_that_sets_too_little_is_named(variables, message):
    with pytest.raises(BadConfig, match=message):
        _join(variables)


LOSSES = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9",
    "NCCL error in: ProcessGroupNCCL.cpp:94, remote process exited or there was a network error\nncclRemoteError",
    "wait timeout after 1800000ms, keys: /default_pg/0//cuda//0",
    "The client socket has timed out after 600000ms while trying to connect to (127.0.0.1, 9)",
    "failed to recv, got 0 bytes. Connection was likely closed",
)
FAULTS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    "NCCL error in: x.cpp:94, unhandled cuda error\nncclUnhandledCudaError: Call to CUDA function failed",
    "NCCL error in: x.cpp:94, invalid usage\nncclInvalidUsage: This usually reflects invalid usage of NCCL library",
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4",
    "output tensor size must be equal to world_size times input tensor size",
)


def test_a_lost_process_is_told_from_a_fault_of_this_one(monkeypatch):
    """A fault keeps its traceback; a launcher that starts lost trainings again must not repeat it for ever."""

    def failing(text: str) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr("torch.distributed.broadcast", failing)
    for text in LOSSES:
        with pytest.raises(ProcessLost, match="another process of this training has ended"):
            exchange("broadcast", text)
    for text in FAULTS:
        with pytest.raises(RuntimeError, match=re.escape(text)):
            exchange("broadcast", text)


def test_without_a_launcher_there_is_one_process():
    for variables in ({}, {"WORLD_SIZE": "1", "RANK": "0"}):
        alone = _join(variables)
        assert (alone.rank, alone.size, alone.is_main) == (0, 1, True)


def test_results_of_an_evaluation_survive_the_exchange():
    results = [
        (np.arange(6.0).reshape(2, 3), np.array([True, False])),
        (np.empty((0, 4), np.float32), np.array(["ab", "c"])),
        (),
    ]
    found = _unpack(_pack(results))
    assert [len(arrays) for arrays in found] == [2, 2, 0]
    for arrays, wanted in zip(found, results, strict=True):
        for array, expected in zip(arrays, wanted, strict=True):
            assert array.dtype == expected.dtype and np.array_equal(array, expected)


# --- gradients -------------------------------------------------------------------------------------------------------


def test_a_parameter_without_gradient_in_some_parts_gets_those_of_the_others():
    used, sometimes, never = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    total = GradientSum([used, sometimes, never], 3, Processes())
    for n in range(3):
        (used * n + (sometimes if n == 1 else 0)).sum().backward()
        total.push()
    total.reduce(0.5)
    assert used.grad is not None and used.grad.tolist() == [1.5, 1.5]
    assert sometimes.grad is not None and sometimes.grad.tolist() == [0.5, 0.5]
    assert never.grad is None


class Squares(MeanOfRows):
    """Mean squared error of a two-layer network on rows that are a function of their numbers."""

    selection, tokens_per_row = "error", 1

    def loss(self, model, step, rows):
        x = torch.stack([torch.randn(64, generator=torch.Generator().manual_seed(n)) for n in rows])
        return {"loss": (model(x) - x.sum(1, keepdim=True)).square().mean()}

    def evaluate(self, model):
        return {"error": 1.0}


def network() -> Any:
    torch.manual_seed(1)
    model: Any = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1))
    model.config = SimpleNamespace(model_type="none")
    return model


def gradients_of(parts: int, folder, monkeypatch) -> tuple[list[torch.Tensor], int]:
    """The gradients of a step of 64 rows, and the bytes that autograd keeps at most for the backward pass."""
    found: list[torch.Tensor] = []
    held = most = 0

    def pack(tensor):
        nonlocal held, most
        if tensor.requires_grad or not tensor.is_leaf:  # activations, not the weights
            held += tensor.nbytes
            most = max(most, held)
        return tensor

    real = loop._Run._backward

    def backward(self, *arguments):
        nonlocal held
        held = 0  # those of the part before are released
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return real(self, *arguments)

    def step(self, number):
        found.extend(p.grad.clone() for p in self.parameters.values())

    monkeypatch.setattr(loop._Run, "_backward", backward)
    monkeypatch.setattr("lib.training.optimizer.Optimizer.step", step)
    changed = settings(steps=1, batch_size=64, parts=parts, gradient_clip=1e9)
    context = TrainingContext("tiny", 3, changed, CPU)
    loop.train(network(), Squares(), context, folder, lambda model, path: None)
    monkeypatch.undo()
    return found, most


def test_parts_have_the_gradients_of_the_whole_batch_in_less_memory(tmp_path, monkeypatch):
    whole, memory = gradients_of(1, tmp_path / "1", monkeypatch)
    parted, less = gradients_of(8, tmp_path / "8", monkeypatch)
    for a, b in zip(whole, parted, strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-6 and float(a.norm()) > 0
    assert 0 < less <= memory / 6


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_memory_between_kept_results_goes_back_to_the_system():
    """Blocks are freed between blocks that stay, so that the heap cannot shrink from its end."""

    blocks = [
        bytearray(b"x" * 100_000) for _ in range(2000)
    ]  # below the size from which glibc maps each block alone
    kept = blocks[::20]
    before = resident_bytes()
    del blocks
    release_free_memory()
    assert before - resident_bytes() > 0.8 * 1900 * 100_000 and len(kept) == 100
