"""docs/results.md and README's results table are what the stored result files give; figures of runs are stored as measured."""

import dataclasses
import errno
import json
import shlex

import numpy as np
import pytest

import benchmarks
from benchmarks import benchmark_rows, results_page, results_tables, run_figures, staging
from benchmarks.benchmark_rows import BENCHMARKS
from benchmarks.result_files import (
    FOLDER,
    ResultFile,
    full,
    interval,
    markdown,
    number,
    read,
    read_all,
    without_machine,
    write,
)
from lib.config import ROOT
from lib.errors import BadConfig


@pytest.fixture(scope="module")
def files():
    return read_all()


def test_the_pages_are_current(files):
    """It fails when a figure is typed into a page, and when a stored file changes without `make docs`."""
    for path, text in results_page.pages(files).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python -m benchmarks.results_page"


def test_the_leaderboard_has_a_row_per_file(files):
    rows = [name for name in files if name.startswith("leaderboard_")]
    table = results_tables.leaderboard_table(files).splitlines()
    assert len(table) == (len(rows) + 2 if rows else 1)
    for name in rows:
        figures = files[name].figures
        line = next(line for line in table if line.startswith(f"| {name.removeprefix('leaderboard_')} |"))
        column = 2 if figures["kind"] == "NLL" else 3  # likelihood and bound are not mixed up
        assert number(figures["value"]["value"]) in line.split("|")[column]
        assert figures["budget"] == 300 and figures["seconds"] <= 306 and figures["threads"] <= 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"budget": 3000.0}, "budget was 3000"),
        ({"seconds": 2900.0}, "took 2900"),
        ({"threads": 16}, "16 threads"),
    ],
)
def test_a_row_that_breaks_the_rules_is_no_row(files, changed, said):
    name = "leaderboard_remask_causal"
    stored = dataclasses.replace(files[name], figures=files[name].figures | changed)
    with pytest.raises(ValueError, match=f"{name}.json is no row.*{said}"):
        results_tables.leaderboard_table(files | {name: stored})


def test_cells_and_commands_may_hold_any_character():
    assert markdown(["a"], [["b|c"]]).splitlines()[2] == "| b\\|c |"
    words = [
        "python",
        "-m",
        "benchmarks.nelbo",
        "--set",
        "diffusion.ratios={type: uniform}",
        "--out",
        "x.json",
    ]
    assert shlex.split(ResultFile("nelbo", {"command": words}, {}).command) == words[:-2]


def test_the_goal_of_the_speedrun_is_said():
    recipes = {
        "ours": {"nll": {"value": 1.9}, "seconds": 1.0},
        "plain": {"nll": {"value": 1.9}, "seconds": 4.0},
    }
    assert benchmark_rows._speedrun({"goal": 1.88, "recipes": recipes}).endswith(
        "the goal of 1.88 nats is not reached"
    )
    assert benchmark_rows._speedrun({"goal": 1.95, "recipes": recipes}).endswith(
        "the goal of 1.95 nats is reached"
    )


def test_one_seed_gives_no_verdict():
    gain = staging.paired(np.array([0.1]))
    assert gain == {"value": 0.1, "half_width": None}
    figures = {"masks": {"staged": {"gain": gain, "mean": 1.9}, "continuous": {"mean": 2.0}}}
    assert benchmark_rows._staging(figures).startswith("one seed: ") and "±" not in benchmark_rows._staging(
        figures
    )
    several = figures["masks"]["staged"] | {"gain": staging.paired(np.array([0.1, 0.11, 0.12]))}
    assert benchmark_rows._staging({"masks": figures["masks"] | {"staged": several}}).startswith("yes: ")


def test_a_figure_that_was_typed_into_readme_is_seen(files):
    table = results_tables.models_table(files["default_run"])
    readme = f"# A\n\n{results_page.MARKS[0]}\n\n{table}\n\n{results_page.MARKS[1]}\n\nmore\n"
    assert results_page.with_table(readme, table) == readme
    assert results_page.with_table(readme.replace("0.", "9.", 1), table) == readme
    with pytest.raises(ValueError, match="one pair of lines"):
        results_page.with_table("# A", table)


def test_every_file_is_on_the_page(files):
    text = results_page.PAGE.read_text(encoding="utf-8")
    for name, file in files.items():
        assert f"[{name}.json](results/{name}.json)" in text
        assert file.source in text and (file.command in text or name == "default_run")
    assert {row.name for row in BENCHMARKS} <= set(files), "a benchmark of the page has no stored file"


def test_figures_without_a_result_file_are_marked(files):
    for file in files.values():
        assert file.transcribed == file.source.startswith("transcribed")
        assert file.transcribed or file.provenance["machine"]
    assert "Figures marked *transcribed*" in results_page.OPENING


def test_stored_files_name_no_folder_of_a_machine():
    for path in FOLDER.glob("*.json"):
        for word in json.loads(path.read_text())["provenance"]["command"]:
            assert without_machine(word) == word, path


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--set", "--set"), ("outputs/run_001", "outputs/run_001"), ("data.path=/home/me/finqa", "data.path=/path/to/finqa"),
        ("/srv/a b/c", "/path/to/a b/c"), ("/path/to/x", "/path/to/x"), ("https://a.b/c/d", "https://a.b/c/d"),
        ("ranker.encoder=owner/name", "ranker.encoder=owner/name"),
    ],
)  # fmt: skip
def test_commands_are_shown_without_the_folders_of_a_machine(word, expected):
    assert without_machine(word) == expected


def test_figures_in_words():
    both = {"value": 0.5, "low": 0.25, "high": 0.75}
    assert (number(0.5), number(0.5, 1, percent=True)) == ("0.500", "50.0 %")
    assert (interval(both), interval(both, 0, percent=True)) == ("0.250 – 0.750", "25 – 75")
    assert full({"value": 0.5, "half_width": 0.125}) == "0.500 ± 0.125"
    assert full({"value": 0.5, "low": None, "high": None}) == "0.500"


def test_a_file_with_an_incomplete_provenance_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lacks dirty, machine"):
        write(tmp_path / "x.json", "x", {}, {"commit": "a", "date": "b", "command": [], "versions": {}})
    with pytest.raises(ValueError, match="version 1"):
        (tmp_path / "y.json").write_text("{}")
        read(tmp_path / "y.json")


def test_a_benchmark_writes_a_file_with_the_provenance_of_its_process(tmp_path):
    path = tmp_path / "new" / "x.json"
    write(path, "x", {"nelbo": {"value": 1.5}})
    file = read(path)
    assert file.figures == {"nelbo": {"value": 1.5}} and not file.transcribed
    assert file.provenance["versions"]["torch"] and file.provenance["machine"]["cores"]


def test_a_run_on_text_is_stored_as_it_was_measured(quick_run):
    """Each figure of the table is the one that the stage stored, found here by another way: metrics.json."""
    figures, source = run_figures.figures_of(quick_run, "default_run")
    metrics = json.loads((quick_run / "06_sample" / "metrics.json").read_text())
    measured = {(row["model"], row["value"]) for row in metrics["results"]}
    assert len(figures["models"]) == len(run_figures.MODEL_ROWS)
    for row in figures["models"]:
        assert (row["model"], row["value"]) in measured
    aurocs = {row["value"] for row in metrics["results"] if row["model"] == "critic"}
    critic = figures["critic"]
    assert {critic["fills"]["critic"]["value"], critic["whole_text"]["critic"]["value"]} <= aurocs
    baselines = {row["baseline_value"] for row in metrics["results"] if row["model"] == "critic"}
    assert {
        critic["fills"]["confidence"]["value"],
        critic["whole_text"]["fresh_confidence"]["value"],
    } <= baselines
    assert [row["policy"] for row in figures["policies"]] == [row["policy"] for row in metrics["policies"]]
    assert [stage["stage"] for stage in source["stages"]][-1] == "06_sample"
    assert source["machine"]["threads"] and source["versions"]["torch"]


def test_a_quick_test_is_not_stored(quick_run, capsys):
    assert results_page.store(quick_run, "default_run") == 2
    assert "quick test" in capsys.readouterr().err
    assert results_page.store(quick_run, "judge") == 2


def test_an_unfinished_run_is_not_stored(tmp_path, capsys):
    (tmp_path / "04_train").mkdir()
    assert results_page.store(tmp_path, "default_run") == 66
    assert "is not complete" in capsys.readouterr().err


def test_every_result_is_stored_below_docs():
    assert FOLDER == ROOT / "docs" / "results" and read_all()


def test_a_benchmark_ends_with_the_message_of_an_error_for_users_and_with_the_traceback_of_a_bug(capsys):
    benchmarks._say(BadConfig, BadConfig("the config is wrong"), None)
    assert capsys.readouterr().err == "error: the config is wrong\n"
    full = OSError(errno.ENOSPC, "No space left on device", "there")
    benchmarks._say(OSError, full, None)
    assert "error: the disk is full, while writing there" in capsys.readouterr().err
    benchmarks._say(ZeroDivisionError, ZeroDivisionError("a bug"), None)
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err
