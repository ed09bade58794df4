"""The ranking report: the choice of pools, correct numbers, hostile text, missing parts."""

import random
import re

import pytest

from lib.report.data import RankedPool, RankingReportData
from lib.report.page import page
from lib.report.pools import HEADINGS, choose_pools, softmax
from lib.report.ranking import ranking_page, ranking_table
from tests.report_page import HOSTILE, Page


def made_pool(name: str, margin: float, group: str = "", **changes) -> RankedPool:
    """Four candidates. The third is correct and scores `margin` more than the best wrong one."""
    values = {
        "example_id": name, "group": group or name, "prompt": f"what of {name}?\nthe page of {name}",
        "candidates": [f"{name} candidate {i}" for i in range(4)], "kinds": ["page_gold", "chain", "gold", "template"],
        "scores": [0.5, 1.0, 1.0 + margin, -2.0], "rewards": [0.1, 0.2, 1.0, 0.0], "note": f"note on {name}",
    }  # fmt: skip
    return RankedPool(**(values | changes))


def made_model(name: str = "ranker", accuracy: float = 0.6, **changes) -> dict:
    row = {
        "name": name,
        "accuracy": accuracy,
        "low": accuracy - 0.05,
        "high": accuracy + 0.05,
        "mrr": 0.7,
        "ndcg": 0.8,
    }
    return row | {"average_reward": 0.65, "reward_ratio": 0.66, "normalised_reward_ratio": 0.55} | changes


def made_page(**changes) -> str:
    estimate = {"value": 0.6, "low": 0.55, "high": 0.65}
    result = {
        "model": "ranker",
        "metric": "accuracy",
        "baseline": "trees",
        "baseline_value": 0.5,
        "beats_baseline": True,
        "lower_is_better": False,
    }
    line = {"step": 1, "train": {"loss": 2.0}, "selection": {"loss": 1.0, "accuracy": 0.3}}
    values = {
        "run": "a run", "settings": "8 questions", "results": [result | estimate],
        "models": [made_model(), made_model("trees", 0.5), {"name": "random choice", "accuracy": 0.25}],
        "breakdowns": {"steps": [{"name": "1 step", "accuracy": 0.7, "low": 0.6, "high": 0.8, "count": 1234}]},
        "curves": {"ranker": [line, line | {"step": 2}]}, "pools": [made_pool("a", 1.0), made_pool("b", -1.0)],
    }  # fmt: skip
    return ranking_page(RankingReportData(**(values | changes)))


# --- the choice of pools


def chosen(pools: list[RankedPool], count: int) -> dict[str, list[str]]:
    found = choose_pools(pools, count)
    return {heading: [pool.example_id for h, pool in found if h == heading] for heading in HEADINGS}


def test_wide_and_narrow_margins_on_both_sides_are_chosen():
    margins = {"a": 5.0, "b": 3.0, "c": 1.0, "d": 0.1, "e": -0.1, "f": -1.0, "g": -3.0, "h": -5.0}
    pools = [made_pool(name, margin) for name, margin in margins.items()]
    random.Random(0).shuffle(pools)
    wide, narrow, missed, lost = HEADINGS
    assert chosen(pools, 1) == {wide: ["a"], narrow: ["d"], missed: ["e"], lost: ["h"]}
    assert chosen(pools, 2) == {wide: ["a", "b"], narrow: ["d", "c"], missed: ["e", "f"], lost: ["h", "g"]}
    assert chosen(pools, 9) == chosen(pools, 2)
    assert [heading for heading, _ in choose_pools(pools, 1)] == list(HEADINGS)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("size", [0, 1, 2, 5, 30])
def test_no_pool_is_shown_twice_and_its_heading_is_true(count, size):
    draw = random.Random(size)
    pools = [made_pool(f"p{i}", draw.gauss(0, 2), group=f"g{i % 4}") for i in range(size)]
    found = choose_pools(pools, count)
    assert len({id(pool) for _, pool in found}) == len(found) <= 4 * count
    for heading, pool in found:
        assert (pool.scores.index(max(pool.scores)) == 2) == heading.startswith("Correct")
    if size:
        assert found


def test_pools_of_one_page_give_way_to_others():
    pools = [
        made_pool("a", 9.0, "page"),
        made_pool("b", 8.0, "page"),
        made_pool("c", 7.0),
        made_pool("d", 6.0, "page"),
    ]
    assert chosen([*pools, *[made_pool(f"z{i}", 0.5) for i in range(4)]], 2)[HEADINGS[0]] == ["a", "c"]
    assert chosen(pools, 2)[HEADINGS[0]] == ["a", "c"] and chosen(pools, 2)[HEADINGS[1]] == ["d", "b"]


def test_pools_without_a_wrong_or_with_tied_candidates():
    all_right = made_pool("a", 1.0, rewards=[1.0] * 4)
    tied = made_pool("b", 0.0)  # a wrong one scores as much: no right choice
    two_right = made_pool("c", -1.0, rewards=[0.0, 1.0, 1.0, 0.0])
    assert [(h, p.example_id) for h, p in choose_pools([all_right, tied, two_right], 2)] == [
        (HEADINGS[0], "c"),
        (HEADINGS[3], "b"),
    ]
    first = made_pool("d", 0.0, scores=[1.0, 1.0, 0.0, 0.0], rewards=[1.0, 0.0, 0.0, 0.0])
    assert '<tr class="chosen"><td class="text">▶</td>' in made_page(pools=[first])
    html = made_page(pools=[tied])
    assert (
        re.search(r'<tr class="chosen"><td class="text">▶</td>', html)
        and '<tr class="best"><td class="text">★' in html
    )


def test_shares_sum_to_one_whatever_the_scores():
    assert sum(softmax([1000.0, 999.0, -1000.0])) == pytest.approx(1)
    assert softmax([1000.0, 1000.0 - 0.6931471805599453]) == pytest.approx([2 / 3, 1 / 3])


# --- the page


def test_the_page_is_whole_and_shows_its_data():
    html = made_page()
    parsed = Page(html)
    assert not parsed.problems and not parsed.open and not parsed.outside and parsed.scripts == 1
    assert html.count("<svg") == 2
    for needed in (
        "a run",
        "8 questions",
        "60.0%",
        "55.0% – 65.0%",
        "trees",
        "1 step",
        "1,234",
        "what of a?",
        "note on b",
    ):
        assert needed in parsed.text, needed
    assert "prefers-color-scheme: dark" in html and html.count("@media print") == 2


def test_a_pool_is_a_table_by_score_with_choice_and_best_marked():
    html = made_page(pools=[made_pool("b", -0.5)])
    (body,) = re.findall(r'<article class="pool">.*?<tbody>(.*?)</tbody>', html, re.S)
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr.*?</tr>", body, re.S)]
    assert [row[0] for row in rows] == ["▶", "", "★", ""]
    assert [row[-1] for row in rows] == [f"b candidate {i}" for i in (1, 0, 2, 3)]
    shares = softmax([0.5, 1.0, 0.5, -2.0])
    assert (
        rows[0][2] == f"{shares[1]:.1%}" and f"width:{shares[1]:.2%}" in rows[0][1] and rows[0][3] == "0.200"
    )
    assert "<summary>whole prompt</summary><pre>the page of b</pre>" in html


def test_chance_is_what_the_table_says_or_what_the_pools_give():
    rows = {"steps": [{"name": "x", "accuracy": 0.7, "low": 0.6, "high": 0.8, "count": 3}]}
    assert 'u style="left:25.00%"' in made_page(breakdowns=rows)
    others = [made_pool("a", 1.0, rewards=[1.0, 1.0, 0.0, 0.0]), made_pool("b", 1.0)]
    assert 'u style="left:37.50%"' in made_page(models=[made_model()], pools=others, breakdowns=rows)
    assert "<u style" not in made_page(models=[made_model()], pools=[], breakdowns=rows)


def test_hostile_text_stays_text():
    pool = made_pool(
        HOSTILE,
        1.0,
        prompt=f"{HOSTILE}\n{HOSTILE}",
        candidates=[HOSTILE] * 4,
        kinds=[HOSTILE] * 4,
        note=HOSTILE,
    )
    rows = {HOSTILE: [{"name": HOSTILE, "accuracy": 0.5, "low": 0.4, "high": 0.6, "count": 1}]}
    line = {"step": 1, "train": {"loss": 1.0}, "selection": {"accuracy": 0.5}}
    names = {"run": HOSTILE, "settings": HOSTILE, "models": [made_model(HOSTILE), made_model("$x^{$")]}
    html = made_page(breakdowns=rows, curves={HOSTILE: [line], "$x_$": [line]}, pools=[pool], **names)
    parsed = Page(html)
    assert parsed.scripts == 1 and not parsed.problems and not parsed.open
    assert HOSTILE not in html and parsed.text.count(HOSTILE) >= 4 + 4 + 3


def test_the_same_data_gives_the_same_bytes():
    assert made_page() == made_page()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"results": []}, "No model was evaluated"),
        ({"models": []}, "Nothing was ranked"),
        ({"breakdowns": {}}, "Nothing was broken down"),
        ({"breakdowns": {"steps": []}}, "Nothing was broken down"),
        ({"curves": {}}, "No model was trained"),
        ({"curves": {"ranker": []}}, "No model was trained"),
        ({"pools": []}, "No pool with correct and wrong candidates"),
        ({"curves": {"policy": [{"step": 1, "train": {"reward": 1.0}, "selection": {}}]}}, "Training"),
        ({"models": [{"name": "lonely", "accuracy": 0.5, "low": None, "high": None}]}, "lonely"),
        ({"models": [made_model(mrr=float("nan"))]}, "ranker"),
        ({"manifests": {}}, "Nothing is recorded"),
        ({"breakdowns": {"fooled by": [{"name": "chain", "count": 12, "share_of_errors": 0.25}]}}, "share of errors"),
    ],
)  # fmt: skip
def test_missing_parts_leave_a_page_that_says_so(changes, words):
    parsed = Page(made_page(**changes))
    assert not parsed.problems and not parsed.open and words in parsed.text


def test_other_pages_have_no_style_of_this_one():
    assert ".pool" not in page("x", "") and ".pool" in made_page()


# --- the screen


def test_the_table_on_the_screen_has_a_row_per_model_and_the_known_columns():
    lines = ranking_table([made_model(), {"name": "random choice", "accuracy": 0.125}]).splitlines()
    titles = [
        "chosen by",
        "accuracy",
        "95 % interval",
        "MRR",
        "NDCG",
        "reward",
        "of the best",
        "above random",
    ]
    assert re.split(" {2,}", lines[0]) == titles
    assert lines[2].split() == [
        "ranker",
        "60.0%",
        "55.0%",
        "..",
        "65.0%",
        "0.700",
        "0.800",
        "0.650",
        "66.0%",
        "55.0%",
    ]
    assert lines[3].split() == ["random", "choice", "12.5%", "-", "-", "-", "-", "-", "-"]
    ends = {line.index(cell) + len(cell) for line, cell in zip(lines[2:], ("60.0%", "12.5%"), strict=True)}
    assert ends == {lines[0].index("accuracy") + len("accuracy")}  # numbers are aligned to the right
    assert "MRR" not in ranking_table([{"name": "x", "accuracy": 0.5}])
