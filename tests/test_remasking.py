"""The benchmark of re-masking policies: its judges are right, its tables honest, its runs continue where they were."""

import dataclasses
import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from benchmarks import remasking
from benchmarks.languages import MOST_BRACKETS, NgramJudge, Sums
from benchmarks.remasking_experiments import next_temperature
from benchmarks.remasking_numbers import at_entropy, over_seeds, shared_seeds
from benchmarks.remasking_summary import format_estimate, matched_table, valid_strings
from benchmarks.remasking_tables import format_half_width
from benchmarks.text_quality import divergence, longest_copy, repeated
from lib.config import ROOT

# ------------------------------------------------------------------------------------------- languages


@pytest.mark.parametrize("digits", [1, 2])
def test_every_sentence_is_right_and_no_change_of_one_character_leaves_it_so(digits):
    language = Sums(digits)
    text = language.text(60, seed=4)
    sentences = text.split(";")[:-1]
    assert len(sentences) == 60 and all(map(language.right, sentences)) and len(set(sentences)) > 40
    assert {len(s) - len(s.strip("([{)]}")) for s in sentences} == {2 * d for d in range(MOST_BRACKETS + 1)}
    for sentence in sentences[:20]:
        for place, new in itertools.product(range(len(sentence)), "0123456789+=()[]{}x"):
            changed = sentence[:place] + new + sentence[place + 1 :]
            assert language.right(changed) == (changed == sentence), changed


def test_cut_sentences_do_not_count():
    right, total = Sums(1).judge(["9=12;1+1=02;[2+2=04);3+", "1+1=02", ";;"])
    assert right.tolist() == [1, 0, 0] and total.tolist() == [2, 0, 1]


# --------------------------------------------------------------------------------------- n-gram judge


def kneser_ney(train: list[int], size: int, order: int):
    """The textbook's recursion over dictionaries."""
    grams = {n: Counter(zip(*(train[i:] for i in range(n)), strict=False)) for n in range(1, order + 1)}
    counts = {order: dict(grams[order])}
    for n in range(1, order):
        counts[n] = Counter(gram[1:] for gram in grams[n + 1])
    ones = {n: sum(c == 1 for c in counts[n].values()) for n in counts}
    twos = {n: sum(c == 2 for c in counts[n].values()) for n in counts}
    discount = {n: ones[n] / (ones[n] + 2 * twos[n]) if ones[n] else 0.5 for n in counts}

    def probability(context: tuple, word: int) -> float:
        n = len(context) + 1
        lower = probability(context[1:], word) if context else 1 / size
        following = {gram[-1]: c for gram, c in counts[n].items() if gram[:-1] == context}
        if not following:
            return lower
        total = sum(following.values())
        taken = discount[n] * len(following) / total
        return max(following.get(word, 0) - discount[n], 0) / total + taken * lower

    return probability


def test_the_ngram_judge_is_kneser_ney():
    rng = np.random.default_rng(0)
    train = rng.choice(6, 300, p=[0.4, 0.25, 0.15, 0.1, 0.07, 0.03])
    judge, probability = NgramJudge(train, 7, order=3), kneser_ney(train.tolist(), 7, 3)
    texts = rng.integers(0, 7, (4, 12))
    expected = [
        [-np.log(probability(tuple(t[max(0, i - 2) : i]), t[i])) for i in range(12)] for t in texts.tolist()
    ]
    np.testing.assert_allclose(judge.nll(texts), expected, rtol=1e-9)
    for context in itertools.product(range(7), repeat=2):
        every = np.array([[*context, word] for word in range(7)])
        assert np.exp(-judge.nll(every)[:, -1]).sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="63 bits"):
        NgramJudge(train, 3000, order=6)


# ------------------------------------------------------------------------------------------ text quality


def test_the_longest_copy_is_the_longest_common_stretch():
    rng = np.random.default_rng(1)
    train = rng.integers(0, 5, 400)
    for length in (0, 1, 7, 16, 23, 24):
        texts = rng.integers(5, 9, (3, 24))
        texts[1, 24 - length :] = train[100 : 100 + length]
        assert longest_copy(texts, train) == length
    texts = rng.integers(0, 5, (4, 20))
    common = max(
        n for n in range(21)
        if {t[i : i + n].tobytes() for t in texts for i in range(21 - n)} & {train[i : i + n].tobytes() for i in range(401 - n)}
    )  # fmt: skip
    assert longest_copy(texts, train) == common


def test_divergence_and_repetition():
    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 4, (20, 50)), rng.integers(4, 8, (20, 50))
    assert divergence(a, a) == pytest.approx(0)
    assert divergence(a, b) == pytest.approx(np.log(2)) == divergence(b, a)
    assert 0 < divergence(a, rng.integers(0, 4, (20, 50))) < 0.2
    assert repeated(np.array([1, 2, 3] * 4), 3) == pytest.approx(1 - 3 / 10)
    assert repeated(np.arange(20), 8) == repeated(np.arange(3), 8) == 0


# -------------------------------------------------------------------------------------------- summary


def test_intervals_over_seeds_are_students():
    values = [0.5, 0.6, 0.9]
    found = over_seeds([{"value": v, "low": 0, "high": 1} for v in values])
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert found is not None and (found["low"], found["high"]) == pytest.approx((low, high))
    assert over_seeds([{"value": 0.5, "low": 0.4, "high": 0.7}]) == {"value": 0.5, "low": 0.4, "high": 0.7}
    assert over_seeds([0.5]) == {"value": 0.5, "low": None, "high": None}  # one seed shows no spread
    assert format_half_width(over_seeds([0.5])) == "0.500" and format_half_width(
        over_seeds([0.4, 0.6])
    ).startswith("0.500 ± 1.27")
    assert over_seeds([0.5, None]) is None and over_seeds([0.5, float("nan")]) is None
    assert (
        format_estimate({"value": 0.1, "low": 0.05, "high": 0.2}, signed=True)
        == "**+0.100 [+0.050, +0.200]**"
    )
    assert format_estimate({"value": 0.1, "low": -0.05, "high": 0.2}, percent=True) == "10.0 [-5.0, 20.0]"
    only = over_seeds(
        [{"value": 0.1, "low": None, "high": None}]
    )  # as a line says that there are too few samples
    assert (
        format_estimate(only, signed=True) == "+0.100"
        and over_seeds([{"value": None, "low": None, "high": None}]) is None
    )


def test_likelihood_is_read_off_between_temperatures_and_not_beyond():
    points = [(x, 0.2 * (x - 4) ** 2) for x in (8.0, 6.0, 7.0, 8.6)]
    assert at_entropy(points, 6.0) == pytest.approx(0.8) and at_entropy(points, 8.6) == pytest.approx(
        0.2 * 4.6**2
    )
    for entropy in (6.4, 7.5, 8.3):
        assert at_entropy(points, entropy) == pytest.approx(0.2 * (entropy - 4) ** 2, abs=0.02)
    assert np.isnan(at_entropy(points, 8.7)) and np.isnan(at_entropy(points, 5.9))
    assert np.isnan(at_entropy([], 7.0))
    assert at_entropy(points[:2], 7.0) == pytest.approx((3.2 + 0.8) / 2) and np.isnan(
        at_entropy(points[:1], 7.0)
    )


def test_policies_are_compared_within_a_seed():
    """Seeds far apart, a policy 0.1 below the other in each: no interval of its own is narrow, that of the difference is."""

    def record(seed: int, policy: str, temperature: float, likelihood: float) -> dict:
        result = {"fourgram_entropy": 8 + temperature, "reference_nll": {"value": likelihood}}
        return {
            "seed": seed,
            "setting": {"policy": policy, "nfe": 4, "temperature": temperature},
            "result": result,
        }

    records = []
    for seed, level in enumerate((2.0, 2.5, 3.1)):
        records.append(record(seed, "real text", 0.5, 0.0))
        for temperature in (0.0, 1.0):
            records.append(record(seed, "ancestral", temperature, level + temperature))
            records.append(record(seed, "critic", temperature, level + temperature - 0.1 - 0.001 * seed))
    rows = [
        line.split(" | ")
        for line in matched_table(records, "reference_nll", "x").splitlines()
        if "| 4 |" in line
    ]
    none, critic = ({"own": row[3], "over ancestral": row[5], "over random_remask": row[6]} for row in rows)
    assert none["own"].startswith("3.033 [") and none["over ancestral"] == "–" == critic["over random_remask"]
    assert critic["over ancestral"].startswith("**-0.101 [-0.103")

    larger = records + [r | {"setting": r["setting"] | {"nfe": 8}} for r in records if r["seed"] < 2]
    means = matched_table(larger, "reference_nll", "x").split("\n\n")[2].splitlines()
    assert means[0].startswith("| policy | NFE 4 | NFE 8") and all(" | – |" in row for row in means[2:])

    more = records + [
        r | {"seed": 3} for r in records if r["seed"] == 2 and r["setting"]["policy"] != "critic"
    ]
    table = matched_table(
        more, "reference_nll", "x"
    )  # one more seed of `ancestral`, far above: the means stay
    assert (
        "over seeds 0, 1, 2," in table
        and "| ancestral | 3.033 |" in table
        and "| ancestral | 4 | 4 | 3.175 [" in table
    )
    assert shared_seeds(more) == {0, 1, 2}


def test_the_best_critic_is_set_beside_the_best_of_the_others():
    """At the better temperature of each line, seed by seed; a line that a seed is missing from does not count."""

    def record(seed: int, policy: str, right: float, **setting) -> dict:
        setting = {"policy": policy, "nfe": 4, "temperature": 1.0} | setting
        result = {
            "valid": dict.fromkeys(("value", "low", "high"), right),
            "passes": 4,
            "sentences": 5.0,
            "different": 1.0,
        }
        return {"seed": seed, "setting": setting, "result": result}

    records = []
    for seed, wrong in enumerate((0.2, 0.4)):
        records += [record(seed, "ancestral", 0.1), record(seed, "ancestral", 1 - wrong, temperature=0.5)]
        records += [record(seed, "random_remask", 0.3), record(seed, "critic", 1 - wrong / 2)]
        records.append(record(seed, "confidence_remask", 0.99, threshold=0.1))
    records.append(record(0, "critic_origin", 0.99))
    table = valid_strings(records).split("\n\n")[2].splitlines()
    assert [row.split(" | ")[0] for row in table[2:]] == [
        "| ancestral",
        "| random_remask",
        "| critic",
        "| **best with a critic / best without**",
    ]
    assert table[2].startswith("| ancestral | 30.0 [") and table[4].startswith("| critic | 15.0 [")
    assert table[5].endswith("| 0.500: critic / ancestral |")


@pytest.mark.parametrize(
    ("hottest_below", "tried"),
    [(3, [3, 4, 2]), (5, [3, 4, 5, 6]), (0, [3, 2, 1, 0]), (6, [3, 4, 5, 6]), (-1, [3, 2, 1, 0])],
)
def test_temperatures_are_tried_until_real_text_lies_between_them(hottest_below, tried):
    found: dict[int, float] = {3: 3.0}
    while (place := next_temperature(found, goal=hottest_below + 0.5, size=7)) is not None:
        found[place] = float(place)
    assert list(found) == tried


# ----------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The smallest whole benchmark: (folder, text file)."""
    folder = tmp_path_factory.mktemp("remasking")
    text = folder / "text.txt"
    text.write_text(Sums(1).text(2400, seed=9).replace("+", " plus ").replace("=", " is "))
    remasking.run(folder / "out", "tiny", str(text))
    return folder / "out", text


def lines_of(out) -> list[dict]:
    return remasking.Results(out / "results.jsonl").records


TIMES = ("seconds", "seconds_per_sample", "bare_share", "provenance")


def timeless(value):
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES}
    return value


def test_every_setting_has_one_line_and_every_experiment_a_table(finished):
    out, _ = finished
    planned = [(t.experiment, t.setting) for t in remasking.tasks(remasking.PLANS["tiny"])]
    assert [(r["experiment"], r["setting"]) for r in lines_of(out)] == planned
    assert {name for name, _ in planned} == {"E1", "E2", "E3", "E4", "E5", "E6"}
    summary = (out / "summary.md").read_text()
    assert (
        all(f"## {name}:" in summary for name in remasking.SECTIONS) and "same at batch 1 and 64" in summary
    )
    assert "**NO**" not in summary  # the same samples at any batch size
    assert all("<svg" in (out / name).read_text() for name in ("pareto.svg", "passes.svg"))
    tables = [block for block in summary.split("\n\n") if block.startswith("|")]
    assert len(tables) >= 7
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_started_again_it_does_only_what_is_missing_and_finds_the_same(finished):
    out, text = finished
    before = lines_of(out)
    kept = [r for r in before if r["experiment"] not in ("E1", "E4")]
    whole = "".join(json.dumps(r) + "\n" for r in kept)
    (out / "results.jsonl").write_text(whole + '{"seed": 0, "experiment": "E1", "se')  # as a kill leaves it
    remasking.run(out, "tiny", str(text))
    after = lines_of(out)
    assert after[: len(kept)] == kept and len(after) == len(before)

    def by_name(records):
        return sorted(json.dumps(timeless(r), sort_keys=True) for r in records)

    assert by_name(after) == by_name(before)
    content = (out / "results.jsonl").read_bytes()
    remasking.run(out, "tiny", str(text), only=("E2",))
    assert (out / "results.jsonl").read_bytes() == content
    with pytest.raises(SystemExit, match="results of other settings"):
        remasking.run(out, "quick", str(text))


def test_every_line_says_where_it_comes_from(finished):
    lines = lines_of(finished[0])
    for line in lines:
        source = line["provenance"]
        assert source.keys() == {"commit", "dirty", "code", "date", "command", "versions", "machine"}
        assert {"python", "torch", "transformers", "tokenizers", "numpy"} <= source["versions"].keys()
        assert source["machine"]["threads"] >= 1 and source["machine"]["processor"] and source["command"]
    assert len({line["provenance"]["code"] for line in lines}) == 1
    summary = (finished[0] / "summary.md").read_text(encoding="utf-8")
    assert f"{remasking.commit_of(lines[0])}: {len(lines):,} lines, 20" in summary


def test_published_lines_say_what_is_known_of_them():
    lines = [json.loads(line) for line in (ROOT / "docs/remasking/results.jsonl").read_text().splitlines()]
    known = [line["provenance"] for line in lines]
    assert all("commit" in source or source["published_commit"] for source in known)
    table = (ROOT / "docs/remasking/README.md").read_text(encoding="utf-8")
    for commit, count in Counter(source.get("published_commit") for source in known).items():
        assert commit is None or re.search(rf"^\| {commit[:8]} \| .* \| {count} \|$", table, re.MULTILINE)


def test_lines_of_other_code_are_not_mixed_in_silence(tmp_path, capsys, monkeypatch):
    source = {"commit": "c" * 40, "dirty": True, "code": "older"}
    head = {"seed": 0, "experiment": "E1", "result": {}}
    records = [head | {"setting": {"n": 1}}, head | {"setting": {"n": 2}, "provenance": source}]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    remasking.Results(path).say_other_code()
    said = capsys.readouterr().err
    assert "holds 2 lines of other code (1 of not recorded, 1 of cccccccc with changes)" in said
    monkeypatch.setattr("lib.code_version.digest", lambda files: "older")
    remasking.Results(path).say_other_code()
    assert "holds 1 lines of other code (1 of not recorded)" in capsys.readouterr().err


def test_a_plan_with_more_policies_goes_on_with_what_is_there(finished, monkeypatch):
    out, text = finished
    before = lines_of(out)
    plan = remasking.PLANS["tiny"]
    more = dataclasses.replace(plan, sample_policies=(*plan.sample_policies, "random_remask"))
    monkeypatch.setitem(remasking.PLANS, "tiny", more)
    remasking.run(out, "tiny", str(text), only=("E3",))
    (new,) = lines_of(out)[len(before) :]
    assert new["setting"] == {"policy": "random_remask"}


def test_the_oracle_is_the_ceiling_and_differences_are_to_the_first_policy(finished):
    result = next(r["result"] for r in lines_of(finished[0]) if r["experiment"] == "E2")
    found = {name: p["accuracy"]["value"] for name, p in result["policies"].items()}
    assert found["oracle"] == max(found.values()) and result["against"] == "ancestral"
    for name, policy in result["policies"].items():
        assert policy["over_ancestral"]["value"] == pytest.approx(found[name] - found["ancestral"])
        assert policy["passes"] <= 3


def test_every_plan_is_a_set_of_different_settings():
    for name, plan in remasking.PLANS.items():
        keys = [task.name for task in remasking.tasks(plan)]
        assert len(keys) == len(set(keys)) > 10, name
    full = remasking.PLANS["full"]
    assert full.seeds == 3 and set(full.policies) | {"oracle"} == set(remasking.POLICIES)
    contested = [task.setting["policy"] for task in remasking.tasks(full) if task.contested]
    assert sorted(contested) == sorted(remasking.CONTESTED)
