"""The report of stage 06: no network needed, correct numbers, hostile text, missing parts."""

import itertools
import json
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lib import schema
from lib.evaluation import sampling
from lib.evaluation.infilling import UNKNOWN, Start
from lib.evaluation.quality import SamplingCost, describe, from_first_gap, lexicon, valid_words
from lib.evaluation.sample_parts import SampleWork
from lib.report import plots
from lib.report.data import ReportData
from lib.report.html import build_report
from lib.report.html_table import interval, table
from lib.report.results import results_html, verdict
from lib.report.table import aligned, results_table, sampling_table
from tests.report_page import HOSTILE, Page


@pytest.fixture(scope="module")
def page(quick_run) -> tuple[str, Page]:
    html = (quick_run / "06_sample" / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


def test_classifiers_and_scorers_are_shown_with_their_baselines(page, quick_run):
    text = page[1].text
    held_out = {
        name: json.loads((quick_run / "04_train" / name / "training_manifest.json").read_text())["held_out"]
        for name in ("inspector", "judge")
    }
    classes, scores = text.split("Classes of inspector")[1], text.split("Scores of judge")[1]
    assert all(f"{count:,}" in classes for row in held_out["inspector"]["confusion"] for count in row)
    assert f"{held_out['inspector']['f1_0']:.3f}" in classes
    judge = held_out["judge"]
    values = (judge["mse"], judge["confidence"]["spearman"], judge["constant_mse"], judge["best_r2"])
    assert all(f"{value:.3f}" in scores for value in values)


def test_the_page_is_well_formed_and_needs_no_network(page):
    html, parsed = page
    assert not parsed.problems and not parsed.open
    assert not parsed.outside
    assert "@import" not in html and not re.search(r"url\(\s*['\"]?(?!#)", html)


def test_the_page_shows_the_numbers_of_metrics_json(quick_run, page):
    metrics = json.loads((quick_run / "06_sample" / "metrics.json").read_text())
    _, parsed = page
    assert metrics["results"] and metrics["policies"]
    for row in metrics["results"]:
        assert row["model"] in parsed.text and f"{row['value']:.3f}" in parsed.text
    for row in metrics["policies"]:
        assert row["policy"] in parsed.text and f"{row['fourgram_entropy']:.3f}" in parsed.text


def test_the_page_has_styles_for_dark_mode_paper_and_phones(page):
    html, _ = page
    for needed in ("prefers-color-scheme: dark", "@media print", "width=device-width"):
        assert needed in html, needed
    assert html.count("<svg") >= 5


def made_data(**changes) -> ReportData:
    """The data of a report whose every text is hostile."""
    ids = list(range(4))
    sample = {
        "policy": HOSTILE, "nfe": 4, "sample_id": 0, "text": HOSTILE, "token_ids": ids,
        "given": [True, False, False, False], "reference_nll": 1.0, "critic_error": 0.5, "token_error": [0.1] * 4,
        "judge_score": None,
    }  # fmt: skip
    step = {
        "policy": HOSTILE,
        "nfe": 4,
        "sample_id": 0,
        "iteration": 0,
        "token_ids": ids,
        "events": [0, 1, 2, 3],
    }
    estimate = {"value": 1.0, "low": 0.5, "high": 1.5}
    policy = {
        "policy": HOSTILE, "nfe": 4, "passes": 4, "samples": 1, "seconds": 1.0, "reference_nll": estimate,
        "character_entropy": 1.0, "fourgram_entropy": 2.0, "valid_words": None, "judge_score": None, "critic_error": 0.5,
    }  # fmt: skip
    result = {
        "model": HOSTILE, "metric": HOSTILE, "baseline": HOSTILE, "baseline_value": 2.0, "lower_is_better": True,
        "beats_baseline": True, **estimate,
    }  # fmt: skip
    chosen = {
        "policy": HOSTILE,
        "nfe": 4,
        "n": 2,
        "scorer": HOSTILE,
        "nll": estimate,
        "gain": estimate,
        "fourgram_entropy": 1.0,
    }
    line = {"step": 1, "train": {"loss": 1.0}, "selection": {"nll": 1.0}}
    values = {
        "run": HOSTILE, "settings": HOSTILE, "manifests": {}, "curves": {"m": [line]}, "results": [result],
        "policies": [policy], "best_of": [chosen], "samples": pa.Table.from_pylist([sample], schema.SAMPLES.arrow),
        "trace": pa.Table.from_pylist([step], schema.TRACE.arrow), "token_text": lambda i: HOSTILE, "mask_id": 1,
        "explain": lambda row: HOSTILE,
    }  # fmt: skip
    return ReportData(**(values | changes))


def test_hostile_text_stays_text():
    html = build_report(made_data())
    parsed = Page(html)
    assert parsed.scripts == 1 and not parsed.problems  # the only script is the page's own
    assert HOSTILE not in html and HOSTILE in parsed.text


def test_the_same_data_gives_the_same_bytes():
    assert build_report(made_data()) == build_report(made_data())


def test_sections_follow_a_readers_questions_and_have_links():
    html = build_report(made_data())
    titles = ["Results", "Samples", "Sampling", "Critic and other scorers", "Training", "Data and synthetic text", "Settings and provenance"]  # fmt: skip
    assert re.findall(r"<h2>\d+\. ([^<]*)</h2>", html) == titles
    links, anchors = re.findall(r'<a href="#([^"]*)"', html), re.findall(r'<section id="([^"]*)"', html)
    assert links == anchors == [f"section-{i}" for i in range(1, 8)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"low": 0.1, "high": 0.4, "beats_baseline": True}, "better"),
        ({"low": 0.4, "high": 0.6}, "not significant"),
        ({"low": 0.6, "high": 0.8}, "worse"),
        ({"low": 0.6, "high": 0.8, "lower_is_better": False, "beats_baseline": True}, "better"),
        ({"low": 0.1, "high": 0.4, "lower_is_better": False}, "worse"),
        ({"low": None, "high": None}, "not significant"),
    ],
)
def test_the_verdict_is_that_of_the_interval(changes, expected):
    row = {"baseline_value": 0.5, "lower_is_better": True, "beats_baseline": False}
    assert verdict(row | changes) == expected


@pytest.mark.parametrize(
    ("low", "high", "beats", "expected"),
    [(0.01, 0.03, True, "better"), (-0.01, 0.02, False, "not significant"), (-0.03, -0.01, False, "worse")],
)
def test_the_verdict_is_that_of_the_paired_difference_where_there_is_one(low, high, beats, expected):
    """Intervals of two detectors on the same text overlap, or lie apart, whatever their difference is."""
    row = made_data().results[0] | {"baseline_value": 0.5, "lower_is_better": False, "beats_baseline": beats}
    for ends in ({"low": 0.4, "high": 0.6}, {"low": 0.6, "high": 0.8}, {"low": 0.1, "high": 0.4}):
        found = row | ends | {"difference_low": low, "difference_high": high}
        assert verdict(found) == expected
        assert f"{low:.3f} – {high:.3f}" in results_html([found])
        assert f"{low:.3f} .. {high:.3f}" in results_table([found])


def test_columns_of_numbers_are_aligned_to_the_right():
    html = table(["name", "share", "interval", "bands"], [["a", "12.5%", interval("0 – 1"), "0.25 to 0.50"], ["b", "–", "", "–"]])  # fmt: skip
    assert re.findall(r'<th class="(\w+)">', html) == ["text", "number", "text", "text"]


@pytest.mark.parametrize(
    "changes",
    [
        {"results": []},
        {"policies": [], "samples": schema.SAMPLES.arrow.empty_table(), "trace": schema.TRACE.arrow.empty_table()},
        {"curves": {"m": []}},
        {"explain": None},
    ],
    ids=["no results", "no samples", "no curves", "no explanation"],
)  # fmt: skip
def test_missing_parts_leave_a_page_that_says_so(changes):
    parsed = Page(build_report(made_data(**changes)))
    assert not parsed.problems
    if "explain" not in changes:
        assert re.search(r"No model was|Nothing was sampled|No trace", parsed.text)


def test_a_policy_without_a_reference_model_has_no_likelihood():
    data = made_data()
    data.policies[0]["reference_nll"] = None
    assert "No causal model was trained on the reference split" in Page(build_report(data)).text
    assert " - " in sampling_table(data.policies)


def test_less_real_text_than_samples_is_said_beside_the_number_of_texts():
    one, few = made_data().policies[0] | {"samples": 64}, {"policy": "real text", "nfe": 0, "passes": 0}
    for count, is_said in ((10, True), (64, False)):
        rows = [one, one | few | {"samples": count}]
        text = Page(build_report(made_data(policies=rows))).text
        for output in (text, sampling_table(rows)):
            assert f"only {count} texts of this length, beside 64 samples" in output or not is_said
            assert ("too low here" in output) == is_said
        assert (
            " 64 " in sampling_table(rows).splitlines()[2]
            and f" {count} " in sampling_table(rows).splitlines()[3]
        )


def test_dropped_real_text_is_said(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(sampling, "say", said.append)
    ids = np.zeros((2, 3), int)
    without = Start(ids, ids == 0, np.arange(2), ["a", "b"])
    known, partly = (
        replace(without, truth=ids + 5),
        replace(without, truth=np.array([[5] * 3, [UNKNOWN] * 3])),
    )
    nobody: Any = None
    real = sampling._real_starts(nobody, [known])
    assert (real[0].ids == 5).all() and not said
    assert not sampling._real_starts(nobody, [without]) and not said  # nobody gave a target
    for starts in ([known, without], [partly]):
        assert not sampling._real_starts(nobody, starts)
        assert "have no target" in said.pop()


def test_the_size_of_samples_counts_every_sample():
    starts = [
        Start(np.zeros(shape, int), np.ones(shape, bool), np.arange(shape[0])) for shape in ((64, 8), (3, 20))
    ]
    nobody: Any = None
    work = SampleWork(nobody, starts, [("critic", 4), ("critic", 8)], nobody)
    assert work.num_bytes == 16 * 3 * (64 * 8 + 3 * 20) + 3_000_000


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_valid_words_leave_out_cut_ones():
    known = lexicon(["The cat can't sit."])
    assert known == {"the", "cat", "can't", "sit"}
    found = valid_words(["xx the cat zz yy", "qq sit qq"], known)
    assert found is not None and found.value == pytest.approx(3 / 4)
    assert valid_words(["one two"], known) is None


def test_a_row_of_the_sampling_table_is_computed_from_its_texts():
    row = describe(SamplingCost("p", 8, 8, 1.0), ["abab", "bbbb"], set(), np.array([2.0, 6.0]))
    assert row["reference_nll"]["value"] == pytest.approx(1.0)
    share = np.array([2 / 8, 6 / 8])
    assert row["character_entropy"] == pytest.approx(-(share * np.log(share)).sum())
    assert row["fourgram_entropy"] == pytest.approx(np.log(2))


def test_a_policys_budgets_are_one_line_and_no_two_policies_look_alike(monkeypatch):
    from matplotlib.axes import Axes

    drawn, plain, axes = [], Axes.errorbar, []

    def spy(self, x, y, **style):
        drawn.append((len(x), style["color"], style["marker"], style["linestyle"]))
        axes.append((self, y))
        return plain(self, x, y, **style)

    monkeypatch.setattr(Axes, "errorbar", spy)
    (one,) = made_data().policies
    rows = [
        one | {"policy": f"p{i}", "nfe": nfe, "passes": nfe, "fourgram_entropy": 2.0 + (i == 0) * nfe}
        for nfe in (8, 4)
        for i in range(9)
    ]
    html = build_report(made_data(policies=[*rows, one | {"policy": "real text", "nfe": 0, "passes": 0}]))
    picture, panels = drawn[:10], drawn[10:]
    assert [d[0] for d in picture] == [2] * 9 + [1] and len({d[1:] for d in picture}) == 10
    assert [d[0] for d in panels] == [2] * 18  # both panels, without real text
    assert all(a.get_ylim()[0] < min(y) and max(y) < a.get_ylim()[1] for a, y in axes)  # nothing is cut off
    drawn.clear()
    assert build_report(made_data(policies=rows[:9])) != html and len(drawn) == 9  # one budget: no panels


def test_quality_is_drawn_at_the_forward_passes_that_samples_took(monkeypatch):
    """Not at the budget, which is per block, and which samples may not spend."""
    drawn, plain = [], plots.over_passes
    monkeypatch.setattr(
        plots, "over_passes", lambda panels, label: drawn.append(panels) or plain(panels, label)
    )
    (one,) = made_data().policies
    build_report(made_data(policies=[one | {"nfe": 8, "passes": 32.0}, one | {"nfe": 16, "passes": 40.5}]))
    (panels,) = drawn
    assert [list(line) for lines in panels.values() for line in lines.values()] == [[32.0, 40.5]] * 2
    assert plots._ticks({32, 31.5, 64, 8, 63}) == [8, 31.5, 63]


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_a_figure_draws_a_value_without_an_interval(nothing):
    assert plots._ends({"value": 1.5, "low": nothing, "high": nothing}) == (1.5, 1.5)
    assert plots._ends({"value": 1.5, "low": 1.0, "high": 2.0}) == (1.0, 2.0)


def test_text_from_right_to_left_has_its_own_direction():
    """Arabic in a page in English: the browser takes the direction of each text from its letters."""
    html = build_report(made_data())
    (rule,) = (line for line in html.splitlines() if "unicode-bidi:plaintext" in line)
    assert {"pre", "td", ".asked", "h3", "h4"} <= set(rule.split(" {")[0].split(", "))


def test_tables_on_the_screen_are_aligned():
    text = results_table(made_data().results)
    assert len({len(line.split("1.000")[0]) for line in text.splitlines() if "1.000" in line}) == 1
    lines = aligned([("a", "n"), ("x", "1.5"), ("yyy", "10.25")]).splitlines()
    assert lines[2].endswith("  1.5") and lines[3].endswith("10.25")


def test_a_fill_is_measured_with_the_text_after_it():
    free = np.array([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]], bool)
    assert from_first_gap(free).tolist() == [[False] + [True] * 4, [False] * 5, [True] * 5]


def test_labels_of_close_marks_stand_apart():
    """Two neighbouring marks, then four labels of one mark: no two labels overlap."""
    figure = plots.new_figure(6, 4)
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    places = [(0.5, 0.5), (0.52, 0.51)]
    for close in (places, [(0.5, 0.5)] * 4):
        labels = [
            axes.annotate("a policy, 32", at, xytext=plots.CORNERS[0], textcoords="offset points")
            for at in close
        ]
        figure.draw_without_rendering()
        before = [label.get_window_extent() for label in labels]
        plots._apart(labels, [axes.transData.transform([at]) for at in close])
        after = [label.get_window_extent() for label in labels]
        assert any(a.overlaps(b) for a, b in itertools.combinations(before, 2))
        assert not any(a.overlaps(b) for a, b in itertools.combinations(after, 2))


def test_one_group_alone_has_no_interval_and_the_tables_say_so():
    row = {"model": "m", "metric": "NLL", "value": 1.0, "low": None, "high": None, "baseline": "b", "baseline_value": 2.0,
           "lower_is_better": True, "beats_baseline": False}  # fmt: skip
    assert results_table([row]).splitlines()[-1].split() == [
        "m",
        "NLL",
        "1.000",
        "-",
        "b",
        "2.000",
        "-",
        "NO",
    ]
    known = row | {"low": 0.5, "high": 1.25}
    assert "0.500 .. 1.250" in results_table([known])
    data = made_data(results=[row])
    data.policies[0]["reference_nll"] = {"value": 1.0, "low": math.nan, "high": math.nan}
    parsed = Page(build_report(data))
    assert not parsed.problems and "± is half the width of one" in parsed.text


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_a_metric_without_a_value_is_shown_as_a_dash(nothing):
    """AUROC of the critic where all fills are wrong: NaN while it is measured, None in a manifest."""
    row = {
        "model": "critic", "metric": "AUROC", "value": nothing, "low": nothing, "high": nothing, "baseline": "confidence",
        "baseline_value": nothing, "lower_is_better": False, "beats_baseline": False,
    }  # fmt: skip
    assert "not significant" in results_html([row]) and "<td" in results_html([row])
    assert results_table([row]).splitlines()[-1].split() == [
        "critic",
        "AUROC",
        "-",
        "-",
        "confidence",
        "-",
        "-",
        "NO",
    ]
