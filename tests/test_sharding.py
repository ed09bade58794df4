"""Frozen weights divided among processes: the same bits as with whole weights, and a share of their memory."""

import itertools
import json
from pathlib import Path

import pytest

from lib.config import load_config
from lib.errors import BadConfig
from lib.models import ranker_placement
from lib.models.ranker_placement import on_device
from tests.process_runs import run_jobs
from tests.sharded_ranker import wide_ranker
from tests.trainings import CPU

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="needs the peak memory that Linux records"
    ),
]

SIZE = 2
LAYER = 4 * (4 * 1024**2 + 3 * 1024 * 2560) / 2**20  # megabytes of one layer of the wide ranker
WHOLE = 8 * LAYER + 4 * 512 * 1024 / 2**20
SPARE = 40  # megabytes for modules that are imported later, and for a forward and backward pass


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    """What each process saw (`tests/sharded_ranker.py`)."""
    folder = tmp_path_factory.mktemp("sharded")
    job = {"size": SIZE, "module": "tests.sharded_ranker", "argv": ["-", str(folder)]}
    (done,) = run_jobs([job])
    assert done["codes"] == [0] * SIZE, done["errors"]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(SIZE)]


def test_scores_gradients_and_hash_have_the_bits_of_the_whole_ranker(seen):
    for one in seen:
        assert one["sharded"] and one["equal_scores"] and one["equal_gradients"] and one["equal_digest"]


def test_a_process_keeps_its_share_and_gathers_few_layers_at_a_time(seen):
    for one in seen:
        assert one["own"] == pytest.approx(1 / len(seen), rel=0.01)
        kept, used = one["after_load"] - one["before"], one["peak"] - one["after_load"]
        assert kept < WHOLE / len(seen) + SPARE, one
        # One layer computes; the next is gathered: what is sent, what arrives, and its copy by tensors
        assert used < 4 * LAYER + SPARE, one


def test_processes_of_a_machine_load_one_after_another(seen):
    assert [one["times"] for one in seen] == sorted(one["times"] for one in seen)
    for earlier, later in itertools.pairwise(seen):
        assert earlier["times"][1] <= later["times"][0]


def test_all_processes_make_the_same_number_of_passes(seen):
    assert {one["passes"] for one in seen} == {sum(-(-n // len(seen)) for n in (1, 3, 4))}


def test_one_process_divides_nothing(monkeypatch):
    monkeypatch.setattr(ranker_placement, "shard_mesh", lambda *_: pytest.fail("divided in one process"))
    (model,) = on_device(wide_ranker, True, CPU)
    assert not any(hasattr(p, "to_local") for p in model.parameters())


def test_a_backbone_without_layers_is_refused(monkeypatch):
    monkeypatch.setattr(ranker_placement, "transformer_layers", lambda backbone: [])
    with pytest.raises(BadConfig, match=r"LlamaModel has no layers .* set it to false"):
        ranker_placement.divide(wide_ranker()[0], None)


def test_only_frozen_encoders_are_divided():
    with pytest.raises(BadConfig, match=r"shard divides .* set adapter to lora, or shard to false"):
        load_config(overrides=["ranker.shard=true", "ranker.adapter=none"])
