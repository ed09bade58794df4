"""The report of stage 06: no network needed, correct numbers, hostile text, missing parts; scores of a user's text."""

import functools
import gzip
import importlib
import itertools
import json
import math
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lib import durable, schema
from lib.artifacts import Stage
from lib.config import load_config
from lib.diffusion.sampler import Sampler
from lib.errors import BadConfig, BadData, MissingInput
from lib.evaluation import sampling
from lib.evaluation.infilling import UNKNOWN, Start
from lib.evaluation.quality import SamplingCost, describe, from_first_gap, lexicon, valid_words
from lib.evaluation.run_models import roles
from lib.evaluation.sample_parts import SampleWork
from lib.metrics import ngram_entropy
from lib.report import plots
from lib.report.data import ReportData
from lib.report.html import build_report
from lib.report.html_table import interval, table
from lib.report.results import results_html, verdict
from lib.report.table import aligned, results_table, sampling_table
from lib.runs import RunArgs, check_stage_name, inspect, load_manifest, score_stage
from lib.runtime import Runtime
from tests.test_sampling import Oracle

VOID = {"meta", "input", "br", "hr", "img", "path", "rect", "use", "line", "circle"}
HOSTILE = '<script>alert("x")</script>&"\''


class Page(HTMLParser):
    """A parsed page: tags left open, links to other addresses, and the text."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.problems: list[str] = []
        self.outside: list[str] = []
        self.scripts = 0
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset") and not (value or "").startswith("#"):
                self.outside.append(f"{tag} {name}={value}")
            if name.startswith("on"):
                self.problems.append(f"{tag} {name}")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing")

    def handle_data(self, data):
        self.text += data


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


# --- scores of a user's text ------------------------------------------------------------------------------------------------


def scores_of(file: Path) -> Path:
    """The table of scores of a text, in the run beside it."""
    return file.parent / "run_001" / score_stage(file) / "scores.parquet"


@pytest.fixture(scope="module")
def scored(quick_run, quick_config, tmp_path_factory):
    """A user's text scored by the quick run: (folder of the outputs, the text)."""
    folder = tmp_path_factory.mktemp("scored")
    shutil.copytree(quick_run, folder / "run_001")
    text = "The value of <b>an</b> object. " * 9
    (folder / "mine.txt").write_text(text)
    args = RunArgs(run_dir=folder / "run_001", quick_test=True, score=folder / "mine.txt")
    importlib.import_module("06_sample").main(quick_config, args)
    return folder / "run_001" / score_stage(folder / "mine.txt"), text


def test_a_users_text_is_scored_token_by_token(scored):
    folder, text = scored
    rows = pq.read_table(folder / "scores.parquet").to_pylist()
    assert "".join(row["text"] for row in rows).strip() == text.strip()
    for row in rows:
        for name in ("critic_error", "inspector_changed"):
            assert len(row[name]) == len(row["token_ids"]) and all(0 <= p <= 1 for p in row[name])
            assert row[f"{name}_mean"] == pytest.approx(np.mean(row[name]), abs=1e-6)
        assert len(row["reference_nll"]) == len(row["token_ids"]) and 0 <= row["judge_score"] <= 1
    manifest = load_manifest(folder)
    assert manifest is not None
    assert manifest["stats"]["documents"][0]["tokens"] == sum(len(r["token_ids"]) for r in rows)
    held_out, rewritten = manifest["stats"]["known"]
    assert "held-out" in held_out["document_id"] and rewritten["tokens"] == held_out["tokens"] > 0
    assert (
        rewritten["reference_nll_mean"] > held_out["reference_nll_mean"] + 0.1
    )  # the generator is hardly trained


def test_the_scores_page_is_whole_and_safe(scored):
    html = (scored[0] / "scores.html").read_text()
    parsed = Page(html)
    assert not parsed.problems and not parsed.open and not parsed.outside
    assert html.count('class="tint"') >= 2 * len(scored[1].strip()) and "<b>an" not in html


def test_characters_that_the_run_never_saw_are_scored_as_unknown(quick_run, quick_config, tmp_path, capsys):
    """Here samples and text are longer than the context."""
    shutil.copytree(quick_run, tmp_path / "run_001")
    (tmp_path / "strange.txt").write_text("A \u2603 is true. " * 9, encoding="utf-8")
    longer = quick_config.sampler.model_copy(update={"length": 150})
    config = quick_config.model_copy(update={"sampler": longer})
    args = RunArgs(run_dir=tmp_path / "run_001", quick_test=True, score=tmp_path / "strange.txt")
    importlib.import_module("06_sample").main(config, args)
    assert "outside the run's vocabulary: 9;" in capsys.readouterr().err
    rows = pq.read_table(scores_of(tmp_path / "strange.txt")).to_pylist()
    assert sum(row["token_ids"].count(3) for row in rows) == 9


def test_a_text_that_cannot_be_scored_is_refused(quick_run, quick_config, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(BadData, match="no text to score"):
        importlib.import_module("06_sample").main(quick_config, RunArgs(run_dir=quick_run, score=empty))
    with pytest.raises(MissingInput, match="no such file"):
        importlib.import_module("06_sample").main(
            quick_config, RunArgs(run_dir=quick_run, score=tmp_path / "nowhere.txt")
        )


def test_a_text_in_a_column_of_another_name_is_scored(quick_run, tmp_path):
    shutil.copytree(quick_run, tmp_path / "run_001")
    (tmp_path / "mine.jsonl").write_text('{"body": "A name is a name."}\n')
    config = load_config(quick_test=True, overrides=["data.text_key=body"])
    args = RunArgs(run_dir=tmp_path / "run_001", quick_test=True, score=tmp_path / "mine.jsonl")
    importlib.import_module("06_sample").main(config, args)
    (row,) = pq.read_table(scores_of(tmp_path / "mine.jsonl")).to_pylist()
    assert row["text"].strip() == "A name is a name."
    other = load_config(quick_test=True, overrides=["data.text_key=title"])
    (tmp_path / "mine.jsonl").write_text('{"body": "A name is a name.", "title": "A value."}\n')
    with pytest.raises(BadConfig, match=r"data\.text_key: body -> title"):
        importlib.import_module("06_sample").main(other, args)


def test_a_text_of_one_character_is_scored_and_not_called_too_little(quick_run, tmp_path, capsys):
    shutil.copytree(quick_run, tmp_path / "run_001")
    (tmp_path / "one.txt").write_text("A")
    args = RunArgs(run_dir=tmp_path / "run_001", quick_test=True, score=tmp_path / "one.txt")
    importlib.import_module("06_sample").main(load_config(quick_test=True), args)
    assert "too little" not in capsys.readouterr().err
    (row,) = pq.read_table(scores_of(tmp_path / "one.txt")).to_pylist()
    assert len(row["critic_error"]) == 1


def test_errors_of_a_file_to_score_name_the_flag(quick_run, quick_config, tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"x")
    with pytest.raises(MissingInput, match=r"^--score: .*a\.png has the ending '\.png'"):
        importlib.import_module("06_sample").main(quick_config, RunArgs(run_dir=quick_run, score=picture))


def test_equal_documents_are_each_scored(quick_run, quick_config, tmp_path):
    shutil.copytree(quick_run, tmp_path / "run_001")
    (tmp_path / "twice.jsonl").write_text('{"text": "A name is a name."}\n' * 2)
    args = RunArgs(run_dir=tmp_path / "run_001", quick_test=True, score=tmp_path / "twice.jsonl")
    importlib.import_module("06_sample").main(quick_config, args)
    rows = pq.read_table(scores_of(tmp_path / "twice.jsonl")).to_pylist()
    assert len({r["document_id"] for r in rows}) == 2 and rows[0]["critic_error"] == rows[1]["critic_error"]


NAMES = [
    "README.txt", "chapter1.txt", "Überblick.txt", "Upper.TXT", "my text (v1).txt", "my_text__v1_.txt", "one1.jsonl", "one1.txt",
    "one1.txt.gz", "v1.2.txt", "-dash.txt", ".hidden.txt", "日本語.txt", "a'b\"c$(d);e&f.txt", "x" * 251 + ".txt", "new\nline.txt",
    os.fsdecode(b"caf\xe9.txt"), ".txt", "readme.txt", "my-notes.txt", "folder", "sub/readme.txt", "06_score_readme.csv",
]  # fmt: skip


def test_every_file_has_a_score_folder_of_its_own_that_a_manifest_may_name(tmp_path, monkeypatch):
    stages = [score_stage(tmp_path / name) for name in NAMES]
    assert len(set(stages)) == len(NAMES)
    for stage in stages:
        check_stage_name(stage)
        assert len(stage) < 64 and stage.startswith("06_score_")
    assert stages[0].startswith("06_score_readme_") and stages[4].startswith("06_score_my_text_v1_")
    assert stages[2].startswith("06_score_uberblick_") and stages[12].startswith("06_score_text_")
    monkeypatch.chdir(tmp_path)
    assert score_stage(Path("README.txt")) == score_stage(Path("./sub/../README.txt")) == stages[0]
    with pytest.raises(ValueError, match="06_score_README"):
        check_stage_name("06_score_README")


def test_a_name_that_no_manifest_may_have_is_refused_before_anything_is_done(tmp_path, quick_config):
    args = RunArgs(run_dir=tmp_path / "run_001")
    with (
        pytest.raises(ValueError, match="06_Score"),
        Stage("06_Score.py", quick_config, args, uses=("seed",)),
    ):
        pass
    assert not (tmp_path / "run_001").exists()


def test_files_of_any_name_are_scored_apart_and_again_for_nothing(quick_run, quick_config, tmp_path, capsys):
    """Includes names that are not UTF-8, compressed files and folders; `make inspect` lists them."""
    shutil.copytree(quick_run, tmp_path / "run_001")
    odd = os.fsdecode(b"My caf\xe9 (v1)")
    (tmp_path / odd).mkdir()
    (tmp_path / odd / "README.jsonl.gz").write_bytes(gzip.compress(b'{"text": "A name is a name."}\n'))
    names = [f"{odd}.txt", odd]
    (tmp_path / names[0]).write_text("The value is an object.")
    main = importlib.import_module("06_sample").main

    def score(name: str) -> None:
        command = ("06_sample.py", "--score", str(tmp_path / name))
        main(quick_config, RunArgs(run_dir=tmp_path / "run_001", quick_test=True, score=tmp_path / name, command=command))  # fmt: skip

    for name in names:
        score(name)
    texts = {name: pq.read_table(scores_of(tmp_path / name))["text"].to_pylist() for name in names}
    assert [rows[0].strip() for rows in texts.values()] == ["The value is an object.", "A name is a name."]
    assert r"My caf\xe9 (v1).txt" in (scores_of(tmp_path / names[0]).parent / "scores.html").read_text()
    manifest = load_manifest(scores_of(tmp_path / names[0]).parent)
    assert manifest is not None and manifest["command"][2].endswith(r"My caf\xe9 (v1).txt")
    lines = [line for line in inspect(tmp_path / "run_001").splitlines() if line.startswith("06_score_")]
    assert len(lines) == 2 and all("scores=1 rows" in line and r"caf\xe9 (v1)" in line for line in lines)
    capsys.readouterr()
    score(names[0])
    assert "is up to date" in capsys.readouterr().err
    (tmp_path / odd / "more.txt").write_text("Another text, added to the folder.")
    with pytest.raises(BadConfig, match=r"(?s)input more\.txt: \(none\) -> .*--overwrite"):
        score(odd)


# --- samples: infill file, long texts, best of N, prompts ----------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled(quick_run, tmp_path_factory):
    """Run stage 06 again on a copy of the quick run: overrides -> the folder of its outputs."""

    def make(*overrides: str):
        folder = tmp_path_factory.mktemp("sampled") / "run_001"
        shutil.copytree(quick_run, folder)
        few = ["sampler.num_samples=3", "sampler.nfe=[4]"]
        config = load_config(quick_test=True, overrides=[*few, *overrides])
        importlib.import_module("06_sample").main(
            config, RunArgs(run_dir=folder, quick_test=True, overwrite=True)
        )
        return folder / "06_sample"

    return make


def infill_file(folder, rows: list[dict]):
    path = folder / "mine.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


WHOLE = {
    "a": "The value of the object is in the text.",
    "b": "A list of names.",
    "c": "The name of the file is.",
}


def test_every_row_of_a_file_is_filled_and_compared_with_its_target(sampled, tmp_path):
    rows = [
        {"id": "a", "text": "The value of the " + "[MASK]" * 6 + " is in the text.", "target": WHOLE["a"]},
        {"id": "b", "text": "A " + "[MASK]" * 4 + " of " + "[MASK]" * 5 + ".", "target": WHOLE["b"]},
        {"id": "c", "text": "[MASK]" * 8 + " of the file is.", "target": WHOLE["c"]},
    ]
    path = infill_file(tmp_path, rows)
    folder = sampled(f"sampler.infill_file={path}", "sampler.policies=[ancestral, critic, oracle]")
    samples = pq.read_table(folder / "samples").to_pylist()
    assert sorted({(r["policy"], r["infill_id"]) for r in samples}) == [
        (p, i) for p in ("ancestral", "critic", "oracle") for i in "abc"
    ]
    hits: dict[str, list[bool]] = {}
    for row in samples:
        whole = WHOLE[row["infill_id"]]
        assert len(row["text"]) == len(whole) and 0 < sum(row["given"]) < len(whole)
        for ours, right, given in zip(row["text"], whole, row["given"], strict=True):
            assert ours == right or not given
            if not given:
                hits.setdefault(row["policy"], []).append(ours == right)
    metrics = {r["policy"]: r for r in json.loads((folder / "metrics.json").read_text())["policies"]}
    assert hits.keys() == {"critic", "ancestral", "oracle"}
    for policy, found in hits.items():
        assert metrics[policy]["infill_accuracy"]["value"] == pytest.approx(np.mean(found))
    assert np.mean(hits["oracle"]) > np.mean(hits["ancestral"])
    assert metrics["real text"]["infill_accuracy"]["value"] == 1
    parsed = Page((folder / "report.html").read_text())
    assert not parsed.problems and "Infilling" in parsed.text
    assert "No trace was kept" not in parsed.text  # the trace is of the first row of the shortest length
    assert f"{metrics['critic']['infill_accuracy']['value']:.1%}" in parsed.text
    manifest = load_manifest(folder)
    assert manifest is not None and "mine.parquet" in manifest["inputs"]


def test_all_rows_that_cannot_be_filled_are_named_at_once(sampled, tmp_path):
    rows = [
        {"id": "fine", "text": "A [MASK].", "target": None},
        {"id": "long", "text": "[MASK]" * 99, "target": None},
        {"id": "full", "text": "nothing", "target": None},
        {"id": "odd", "text": "[MASK] \u4e2d", "target": None},
        {"id": "short", "text": "A [MASK]", "target": "A name"},
        {"id": "other", "text": "A [MASK]", "target": "B c"},
        {"id": "fine", "text": "A [MASK].", "target": None},
        {"id": "never", "text": "A [MASK]", "target": "A \u4e2d"},
    ]
    path = infill_file(tmp_path, rows)
    with pytest.raises(BadData) as error:
        sampled(f"sampler.infill_file={path}")
    message = str(error.value)
    for part in ("row 1 (id 'long'): text has 99 tokens, but the generator reads at most 64", "row 2 (id 'full')",
                 "row 3 (id 'odd'): text has characters outside", "row 4 (id 'short'): target has 6 tokens, text has 3",
                 "row 5 (id 'other'): target differs from text at token 0", "row 6 (id 'fine'): row 0 has this id",
                 "row 7 (id 'never'): target has characters outside"):  # fmt: skip
        assert part in message, message
    assert "row 0" not in message.replace("row 0 has this id", "") and error.value.exit_code == 65
    for bad, word in (
        ([{"name": "a"}], "no column id and text"),
        ([{"id": "a", "text": None}], "row 0 is empty"),
    ):
        path = infill_file(tmp_path, bad)
        with pytest.raises(BadData, match=word):
            sampled(f"sampler.infill_file={path}")
    path = infill_file(tmp_path, rows[:1])
    with pytest.raises(BadData, match=r"1 rows of sampler\.infill_file have no target: fine"):
        sampled(f"sampler.infill_file={path}", "sampler.policies=[ancestral, oracle]")


def test_texts_longer_than_the_context_are_written_in_blocks(sampled):
    overrides = ("sampler.length=150", "sampler.block_tokens=40", "sampler.policies=[ancestral, critic]")
    folder = sampled(*overrides, "sampler.prompt=The value of ")
    samples = pq.read_table(folder / "samples").to_pylist()
    assert all(len(r["token_ids"]) == 150 and r["text"].startswith("The value of ") for r in samples)
    assert all(np.isfinite(r["reference_nll"]) for r in samples)
    rows = {r["policy"]: r for r in json.loads((folder / "metrics.json").read_text())["policies"]}
    assert rows["ancestral"]["passes"] == 4 * 4 and rows["critic"]["passes"] == 3 * 4
    assert rows["autoregressive"]["passes"] == 150 - len("The value of ")


def test_the_best_of_several_fillings_of_every_row_of_a_file(sampled, tmp_path):
    rows = [
        {"id": "a", "text": "The value of the " + "[MASK]" * 6 + " is in the text."},
        {"id": "b", "text": "A " + "[MASK]" * 4 + " of names."},
        {"id": "c", "text": "[MASK]" * 8 + " of the file is."},
    ]
    path = infill_file(tmp_path, rows)
    folder = sampled(
        f"sampler.infill_file={path}",
        "sampler.policies=[ancestral]",
        "sampler.best_of=3",
        "sampler.best_of_policy=ancestral",
    )
    samples = pq.read_table(folder / "samples").to_pylist()
    record = json.loads((folder / "metrics.json").read_text())
    for scorer in ("critic", "generator", "judge"):
        chosen = [r for r in samples if r["policy"] == f"ancestral, best of 3 by {scorer}"]
        assert sorted(r["infill_id"] for r in chosen) == ["a", "b", "c"]
        assert len(chosen[0]["text"]) < len(chosen[2]["text"])  # of different lengths
        (row,) = [r for r in record["best_of"] if r["scorer"] == scorer]
        # Every token from the first gap on has the same weight, in whichever text it is
        counted = [len(r["given"]) - r["given"].index(False) for r in chosen]
        mean = np.average([r["reference_nll"] for r in chosen], weights=counted)
        assert row["nll"]["value"] == pytest.approx(mean)
    by_chance = next(r for r in record["best_of"] if r["scorer"] == "chance")
    assert by_chance["fourgram_entropy"] == pytest.approx(record["policies"][0]["fourgram_entropy"])


def test_a_refused_prompt_leaves_the_samples_that_are_there(sampled):
    folder = sampled("sampler.policies=[ancestral]")
    before = durable.sha256_folder(folder / "samples")
    overrides = ["sampler.num_samples=3", "sampler.nfe=[4]", "sampler.policies=[ancestral]"]
    stage = importlib.import_module("06_sample")
    for prompt in ("A \u2603", "x" * 64):
        config = load_config(quick_test=True, overrides=[*overrides, f"sampler.prompt={prompt}"])
        with pytest.raises(BadConfig, match=r"sampler\.prompt"):
            stage.main(config, RunArgs(run_dir=folder.parent, quick_test=True, overwrite=True))
    config = load_config(quick_test=True, overrides=overrides)
    stage.main(config, RunArgs(run_dir=folder.parent, quick_test=True))  # up to date
    assert durable.sha256_folder(folder / "samples") == before


def test_sampling_that_was_stopped_continues_at_its_part(sampled, capsys):
    """The second policy fails; the first is not sampled again, and tables and figures are the same."""
    overrides = ["sampler.num_samples=3", "sampler.nfe=[4]", "sampler.policies=[ancestral, random_remask]"]
    whole = sampled(*overrides)
    folder = whole.parent.parent / "stopped" / "run_001"
    shutil.copytree(whole.parent, folder)
    module, calls = importlib.import_module("lib.evaluation.sample_parts"), []
    real, config = module.sample_policy, load_config(quick_test=True, overrides=overrides)

    def sampling(*arguments, fails: bool) -> None:
        calls.append(arguments[2])
        if fails and calls[-1] == "random_remask":
            raise RuntimeError("stopped")
        real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        args = RunArgs(run_dir=folder, quick_test=True, overwrite=True)
        patch.setattr(module, "sample_policy", functools.partial(sampling, fails=True))
        with pytest.raises(RuntimeError, match="stopped"):
            importlib.import_module("06_sample").main(config, args)
        patch.setattr(module, "sample_policy", functools.partial(sampling, fails=False))
        importlib.import_module("06_sample").main(config, args)
    assert calls == ["ancestral", "random_remask", "random_remask"]
    assert "policies: 1 of 3 parts are complete already" in capsys.readouterr().err
    for output in ("samples", "trace"):
        assert durable.sha256_folder(folder / "06_sample" / output) == durable.sha256_folder(whole / output)
    found = [json.loads((f / "metrics.json").read_text()) for f in (whole, folder / "06_sample")]
    for metrics in found:
        for row in metrics["policies"]:
            row["seconds"] = 0
    assert found[0] == found[1]


@pytest.mark.parametrize("mode", ["on", "off"])
def test_layers_are_compiled_before_the_time_of_a_policy_begins(mode):
    """With a policy that will be sampled: the schedule `threshold` refuses those that estimate no errors."""
    policies = ["sampler.schedule=threshold", "sampler.policies=[critic]"]
    config = load_config(overrides=[f"sampler.compile={mode}", *policies])
    model = Oracle(np.full(8, 5))
    nobody: Any = None
    sampler = Sampler(model, 1, [0, 1, 2, 3], Runtime(torch.device("cpu"), "fp32"), config.sampler, seed=5)
    evaluator: Any = SimpleNamespace(config=config, sampler=sampler)
    starts = [Start(np.ones((5, 8), int), np.ones((5, 8), bool), np.arange(5))]
    SampleWork(evaluator, starts, [("critic", 4)], nobody).open(None)
    assert (model.passes > 0) == (mode == "on")


def test_the_reference_model_is_causal():
    """A bidirectional model of the same split that comes first in the config is skipped."""
    specs = load_config().models
    seeing = specs["reference_lm"].model_copy(update={"attention": "bidirectional"})
    found = roles({"seeing": seeing, **specs})
    assert found == roles(specs) and found["reference"] == "reference_lm"
    assert roles({"seeing": seeing}) == dict.fromkeys(found)


def test_the_best_of_several_samples_are_written_and_shown(sampled):
    folder = sampled(
        "sampler.policies=[ancestral]", "sampler.best_of=3", "sampler.best_of_policy=random_remask"
    )
    samples = pq.read_table(folder / "samples").to_pylist()
    chosen = [r for r in samples if r["policy"] == "random_remask, best of 3 by judge"]
    assert [r["sample_id"] for r in chosen] == [0, 1, 2]
    rows = json.loads((folder / "metrics.json").read_text())["best_of"]
    judge = next(r for r in rows if r["scorer"] == "judge")
    assert judge["nll"]["value"] == pytest.approx(np.mean([r["reference_nll"] for r in chosen]))
    text = Page((folder / "report.html").read_text()).text
    assert "best of 3 by" in text and f"{judge['fourgram_entropy']:.3f}" in text


def test_a_prompt_outside_the_vocabulary_is_refused_by_name(sampled):
    with pytest.raises(
        BadConfig, match=r"sampler.prompt: 1 characters are outside .*U\+2603.* write it without"
    ):
        sampled("sampler.prompt=A \u2603")


def test_behind_a_prompt_everything_is_measured_from_the_first_gap_on(sampled):
    """A shared prompt would lower the diversity of samples and the NLL of real text."""
    prompt = "The value of the object is the value of the "
    folder = sampled("sampler.policies=[ancestral]", "sampler.num_samples=6", f"sampler.prompt={prompt}")
    rows = {r["policy"]: r for r in json.loads((folder / "metrics.json").read_text())["policies"]}
    samples = pq.read_table(folder / "samples").to_pylist()
    codes = [np.frombuffer(r["text"][len(prompt) :].encode("utf-32-le"), np.uint32) for r in samples]
    assert rows["ancestral"]["fourgram_entropy"] == pytest.approx(ngram_entropy(codes, 4))
    assert rows["real text"]["fourgram_entropy"] <= np.log(6 * (64 - len(prompt) - 3))


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
