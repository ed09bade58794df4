"""The benchmark on WikiQA keeps finished trainings, and uses them only where they would come out the same."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import pools_wikiqa
from benchmarks.pools_wikiqa import METRICS, Kept, Trained

SOURCE = {"code": "1", "versions": {"torch": "2"}, "machine": {"cores": 2}}


def kept(folder: Path, monkeypatch, source=SOURCE, **changes) -> tuple[Kept, Any]:
    monkeypatch.setattr(pools_wikiqa, "provenance", lambda: source)
    options = argparse.Namespace(
        data=folder, encoder=str(folder), epochs=3, questions=None, loss="cross_entropy", learning_rate=1e-5, set=[],
        peer_learning_rate=1e-5, peer_precision="fp32", losses=["ListNetLoss"],
    )  # fmt: skip
    return Kept.both(folder / "results", argparse.Namespace(**vars(options) | changes))


def found(value: float) -> Trained:
    return Trained(value, 2.0, {name: np.array([value, 1.0]) for name in METRICS})


def test_a_finished_training_is_not_repeated(tmp_path, monkeypatch):
    ranker, peers = kept(tmp_path, monkeypatch)
    ranker.result("full_1", lambda: found(0.5))
    peers.result("ListNetLoss_1", lambda: found(0.25))
    again, other = kept(tmp_path, monkeypatch)
    first = again.result("full_1", pytest.fail)
    assert first.selection == 0.5 and first.seconds == 2.0
    np.testing.assert_array_equal(first.dev["map"], [0.5, 1.0])
    assert other.result("ListNetLoss_1", pytest.fail).selection == 0.25


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"set": ["ranker.sampled_candidates=6"]}, "ranker holds results of other settings"),
        ({"loss": "lambda_loss"}, "ranker holds results of other loss"),
        ({"epochs": 1}, "ranker holds results of other epochs"),
        ({"source": SOURCE | {"code": "2"}}, "ranker holds results of other code"),
    ],
)
def test_results_of_other_settings_are_refused(tmp_path, monkeypatch, changes, said):
    kept(tmp_path, monkeypatch)
    with pytest.raises(SystemExit, match=said):
        kept(tmp_path, monkeypatch, **changes)


@pytest.mark.parametrize(
    ("changes", "stay"),
    [
        ({"set": ["ranker.sampled_candidates=6"], "loss": "lambda_loss", "learning_rate": 1e-4}, True),
        ({"set": ["pools.near_duplicates=null"]}, False),  # another split
        ({"peer_learning_rate": 1e-4}, False),
    ],
)
def test_results_of_peers_do_not_depend_on_the_rankers_settings(tmp_path, monkeypatch, changes, stay):
    """They may be copied to a folder for other settings of the ranker."""
    _, peers = kept(tmp_path / "first", monkeypatch)
    (tmp_path / "second" / "results").mkdir(parents=True)
    peers.folder.rename(tmp_path / "second" / "results" / "peers")
    if stay:
        kept(tmp_path / "second", monkeypatch, **changes)
    else:
        with pytest.raises(SystemExit, match="peers holds results of other"):
            kept(tmp_path / "second", monkeypatch, **changes)
