"""`06_sample.py --score`: texts of the user, token by token, from files of any kind and name."""

import gzip
import importlib
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lib.artifacts import Stage
from lib.config import load_config
from lib.errors import BadConfig, BadData, MissingInput
from lib.runs import RunArgs, check_stage_name, inspect, load_manifest, score_stage
from tests.report_page import Page


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
