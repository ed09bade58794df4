"""Samples of stage 06: infilling of files, long texts, the best of several, prompts, continuing."""

import functools
import importlib
import json
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lib import durable
from lib.config import load_config
from lib.diffusion.sampler import Sampler
from lib.errors import BadConfig, BadData
from lib.evaluation.infilling import Start
from lib.evaluation.run_models import roles
from lib.evaluation.sample_parts import SampleWork
from lib.metrics import ngram_entropy
from lib.runs import RunArgs, load_manifest
from lib.runtime import Runtime
from tests.report_page import Page
from tests.test_sampling import Oracle


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
