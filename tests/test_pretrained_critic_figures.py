"""The figures of benchmarks/pretrained_critic.py: means over seeds, paired differences, measurements that are kept."""

import dataclasses
import json

import pytest

from benchmarks import pretrained_critic
from benchmarks.pretrained_critic import SIZES, Runs, means, policies_of


def measured(auroc: float, nll: dict[str, float | None]) -> dict:
    """What is stored of a critic, with one NFE."""
    views = {
        "critic": {"value": auroc},
        "confidence": {"value": 0.6},
        "critic_over_confidence": {"value": auroc - 0.6},
    }
    points = {policy: {"16": {"at_entropy": {"value": value}}} for policy, value in nll.items()}
    return {
        "detection": {passes: views for passes in ("1", "16")},
        "samples": {"real": {}} | points,
        "infilling": {"16": {policy: {"accuracy": {"value": 0.3}} for policy in nll}},
    }  # fmt: skip


def test_differences_are_paired_by_seed():
    """Seeds differ by 1.0, and policies by 0.2 in each seed: the interval of the difference has no width."""
    found = {
        str(seed): {
            "head": measured(0.7 + seed / 10, {"ancestral": seed + 0.5, "critic_origin": seed + 0.3}),
            "lora": measured(0.75 + seed / 10, {"critic_origin": seed + 0.2}),
            "joint": measured(0.6, {"ancestral": seed + 2.0, "critic_origin": seed + 1.0}),
        }
        for seed in (0, 1, 2)
    }
    result = means(found, "head")

    def over_ancestral(critic: str) -> float:
        row = result[critic]["samples"]["16"]["critic_origin"]["over_ancestral"]
        assert row["high"] - row["low"] < 1e-9
        return row["value"]

    assert over_ancestral("head") == pytest.approx(-0.2)
    # lora: against `ancestral` of the head, whose generator it shares. joint: against that of its own generator
    assert over_ancestral("lora") == pytest.approx(-0.3)
    assert over_ancestral("joint") == pytest.approx(-1.0)
    lead = result["lora"]["detection"]["16"]["over_head"]
    assert lead["value"] == pytest.approx(0.05) and lead["high"] - lead["low"] < 1e-9
    nll = result["head"]["samples"]["16"]["ancestral"]["nll"]
    assert nll["value"] == pytest.approx(1.5) and nll["low"] < 0 < nll["high"]


@pytest.mark.parametrize("entropies, found", [((5.0, 7.0), 2.0), ((3.0, 5.0), None)])
def test_samples_less_diverse_than_real_text_have_no_value(entropies, found):
    points = [
        {"fourgram_entropy": e, "reference_nll": {"value": nll}}
        for e, nll in zip(entropies, (1.0, 3.0), strict=True)
    ]
    assert pretrained_critic._at_entropy(points, "value", 6.0) == found


def test_a_seed_without_diverse_samples_leaves_no_mean():
    seeds = {"1": {"head": measured(0.7, {"ancestral": 1.0, "critic": 0.9})},
             "2": {"head": measured(0.7, {"ancestral": 1.0, "critic": None})}}  # fmt: skip
    row = means(seeds, "head")["head"]["samples"]["16"]["critic"]
    assert row == {"nll": None, "over_ancestral": None}
    assert "critic at NFE" not in pretrained_critic._line(2, "head", with_intervals(seeds["2"]["head"]))


def with_intervals(figures: dict) -> dict:
    for views in figures["detection"].values():
        for view in views.values():
            view |= {"low": 0.0, "high": 1.0}
    return figures


def test_critics_with_one_generator_measure_its_own_policies_once():
    """`ancestral` once per generator, the other policies without a critic once, and two policies with every critic."""
    critics = SIZES[False].critics
    assert [name for name in critics if "ancestral" in policies_of(name, "head")] == [
        "head",
        "joint",
        "joint+look_back",
    ]
    assert [name for name in critics if "confidence_order" in policies_of(name, "head")] == ["head"]
    assert all({"critic", "critic_origin"} <= set(policies_of(name, "head")) for name in critics)


def test_critics_that_the_quick_size_leaves_out_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pretrained_critic", str(tmp_path), "--quick", "--critics", "joint"])
    with pytest.raises(SystemExit):
        pretrained_critic.main()
    assert "--quick measures head, head+look_back, lora only" in capsys.readouterr().err


def test_a_critic_without_a_policy_is_refused_before_it_is_trained(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(
        "sys.argv", ["pretrained_critic", str(out), "--critics", "head", "lora", "--policies", "ancestral"]
    )
    with pytest.raises(SystemExit):
        pretrained_critic.main()
    assert (
        "lora is measured with critic, critic_origin; choose" in capsys.readouterr().err and not out.exists()
    )


def test_what_was_measured_is_kept_until_the_size_or_the_masked_lm_changes(tmp_path, monkeypatch):
    runs = Runs(tmp_path, tmp_path / "model", SIZES[True])
    trained = []
    monkeypatch.setattr(Runs, "trained", lambda self, seed, name: trained.append((seed, name)))
    for name in ("detection", "samples", "gaps", "cost"):
        monkeypatch.setattr(pretrained_critic, name, lambda *arguments, name=name: {"of": name})
    first = runs.measured(1, "head+look_back")
    assert runs.measured(1, "head+look_back") == first and trained == [(1, "head+look_back")]
    assert json.loads((tmp_path / "seed_1" / "head_look_back_24.json").read_text())["figures"] == first
    more = dataclasses.replace(SIZES[True], samples=25)
    Runs(tmp_path, tmp_path / "model", more).measured(1, "head+look_back")
    assert len(trained) == 2
    runs.measured(1, "head+look_back")  # more samples do not replace it
    assert len(trained) == 2
    Runs(tmp_path, tmp_path / "other", more).measured(1, "head+look_back")
    assert len(trained) == 3


def test_chosen_policies_are_measured_alone_and_again_when_the_choice_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(Runs, "trained", lambda self, seed, name: None)
    for name in ("detection", "cost"):
        monkeypatch.setattr(pretrained_critic, name, lambda trained, *others: {})
    for name in ("samples", "gaps"):
        monkeypatch.setattr(pretrained_critic, name, lambda trained, policies, size: list(policies))

    def policies(critic: str, *only: str) -> list[str]:
        return Runs(tmp_path, tmp_path / "model", SIZES[True], only).measured(1, critic)["samples"]

    assert policies("head", "critic_origin", "ancestral") == ["ancestral", "critic_origin"]
    assert policies("lora", "critic_origin", "ancestral") == [
        "critic_origin"
    ]  # its generator is that of the first critic
    assert policies("head") == list(pretrained_critic.POLICIES)


def test_more_samples_have_a_result_of_their_own(tmp_path, monkeypatch):
    """A table of 96 samples never replaces that of 48."""
    made = []
    monkeypatch.setattr(pretrained_critic, "make", lambda folder, training: folder)
    monkeypatch.setattr(
        pretrained_critic, "measure", lambda runs, seeds, critics: made.append(runs.size.samples) or {}
    )
    monkeypatch.setattr(pretrained_critic.result_files, "write", lambda out, name, figures: made.append(name))
    for options in ([], ["--samples", "48"], ["--samples", "96"], ["--quick", "--samples", "96"]):
        monkeypatch.setattr("sys.argv", ["pretrained_critic", str(tmp_path), *options])
        pretrained_critic.main()
    assert made == [
        48,
        "pretrained_critic",
        48,
        "pretrained_critic",
        96,
        "pretrained_critic_96",
        96,
        "pretrained_critic_quick_96",
    ]
