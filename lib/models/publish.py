"""Publish a model of a finished run: a folder with weights, code, tokenizer and a model card, ready for a model hub.

python -m lib.models.publish outputs/run_001 generator OUT_DIR
python -m lib.models.publish outputs/run_001 critic OUT_DIR

A ranker with prompts becomes a stock classifier with one label, which sentence-transformers' CrossEncoder loads.
`lib.models.ranker_export` lists the rankers for which this is possible.

All facts of the card come from the manifests: data, settings, held-out metrics with their baselines, versions.
"""

import argparse
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lib import durable, own_code
from lib.errors import BadData, CannotCreate, MissingInput, RemaskError, did_you_mean
from lib.labels import class_names
from lib.models.cards import usage
from lib.runs import load_manifest

RANKER_FILE = "ranker.json"  # only in the folder of a ranker with prompts
POLICIES = ("ppo", "exact", "cross_entropy")  # methods by which stage 05 trains a ranker

CALIBRATION = "calibration.json"
CODE_LICENCE = """These Python files are part of Remask, licensed under Apache-2.0
(https://www.apache.org/licenses/LICENSE-2.0), copyright of the Remask authors: {files}.
"""
FOREIGN_CODE = """These Python files belong to the authors of the pretrained model, whose licence applies: {files}.
"""


def publish(run: Path, name: str, out: Path) -> Path:
    """Copy the best model `name` of a run to the new folder `out`, with a card as README.md.

    A backbone with code of its own is read only if that code is allowed, see `lib.own_code`.

    Raises:
        MissingInput: the run, its stage or the model is missing.
        BadData: the model's files differ from the manifest.
        CannotCreate: `out` is not empty.
    """
    stage = "05_train_critic" if name in ("critic", *POLICIES) else "04_train"
    manifest, data = manifests_of(run, stage)
    output = "best_model" if name == "critic" else f"{name}/best_model"
    if output not in manifest["outputs"]:
        known = [n.removesuffix("/best_model") for n in manifest["outputs"] if n.endswith("/best_model")]
        raise MissingInput(f"{run} has no model '{name}'{did_you_mean(name, [*known, 'critic', *POLICIES])}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CannotCreate(f"{out} is not empty; give a new folder")
    entry = manifest["outputs"][output]
    source = run / stage / entry["path"]
    if durable.sha256_folder(source) != entry["sha256"]:
        raise BadData(f"{source} differs from {run / stage / 'manifest.json'}; run {stage}.py again")
    with durable.replacing_folder(out) as folder:
        with_prompts = (source / RANKER_FILE).exists()
        if with_prompts:
            _export_ranker(source, folder)
        else:
            publish_model(source, folder, manifest, name)
        if name == "critic":
            shutil.copyfile(run / stage / manifest["outputs"][CALIBRATION]["path"], folder / CALIBRATION)
        # The config names the code files of a backbone with code of its own. A ranker with prompts has none.
        foreign = () if with_prompts else durable.read_json(source / "config.json").get("code_files") or ()
        text = card(name, manifest, data, folder, with_prompts, foreign)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return out


def manifests_of(run: Path, stage: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(manifest of the stage that trained a model, manifest of stage 01).

    A manifest has the settings that its stage reads. The `config` of the first one also gets those of stages 03 and 04.

    Raises:
        MissingInput: a stage is not complete.
    """
    manifest, data = (load_manifest(run / s) for s in (stage, "01_prepare_dataset"))
    if manifest is None or data is None:
        raise MissingInput(f"{run / stage} is not complete; run {stage}.py --run_dir {run}")
    before = [load_manifest(run / s) for s in ("03_build_rewards", "04_train")]
    for earlier in before:
        if earlier is None:
            raise MissingInput(f"{run} lacks a complete stage 03 or 04; run the stages of {run} again")
        manifest["config"] = earlier["config"] | manifest["config"]
    return manifest, data


def _export_ranker(source: Path, folder: Path) -> None:
    from lib.models.ranker_export import export_classifier
    from lib.models.ranker_files import load_ranker

    model, tokenizer = load_ranker(source)
    export_classifier(model, folder, tokenizer)


def publish_model(source: Path, folder: Path, manifest: dict[str, Any], name: str) -> None:
    """Write weights, code, tokenizer and class names of this version, whichever version trained the model.

    A generator with a pretrained backbone becomes a model of the backbone's own class, which loads without this project.
    """
    from lib.models.build import head_of, heads_of, load_model, save_as_pretrained, save_model
    from lib.tokenization import load_tokenizer

    model = load_model(source)
    if name != "critic":
        spec = manifest["config"]["models"][name]
        data, own_labels = manifest["config"].get("data", {}), _has_own_labels(manifest["config"])
        names = class_names(
            spec["mode"], spec["target_type"], data.get("label_classes"), data.get("span_classes")
        )
        heads = heads_of(spec["mode"], spec["target_type"], spec["num_classes"], own_labels, names)
        for key, value in heads.items():
            setattr(model.config, key, value)
    if name != "critic" and head_of(model) == "masked_lm" and hasattr(model, "backbone"):
        save_as_pretrained(model, folder, load_tokenizer(source))
        return
    save_model(model, folder, load_tokenizer(source))


def _has_own_labels(config: dict[str, Any]) -> bool:
    """Whether judge and inspector learned from labels of the user."""
    data = config.get("data", {})
    beside = data.get("label_key") is not None or data.get("spans_key") is not None
    return beside or config["labels"]["path"] is not None


def _facts_of_foreign(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the card says of a masked LM or critic with a backbone of another project; nothing for other models."""
    from lib.models.families import FAMILIES
    from lib.models.pretrained import CODE_CLASSES

    is_critic = config["model_type"] == "remask_adapted"
    classes = [name for name in CODE_CLASSES if name in config.get("auto_map", {})]
    is_masked = config["architectures"][0].endswith("MaskedLM")
    if not is_critic and (config["model_type"] in FAMILIES or not (is_masked or classes)):
        return {}
    words = durable.read_json(folder / "tokenizer_config.json")
    mask = words.get("mask_token")
    facts: dict[str, Any] = {"mask_token": mask["content"] if isinstance(mask, dict) else mask}
    if is_critic:
        return facts
    facts["max_position_embeddings"] = words["model_max_length"] + 1
    return facts if is_masked else facts | {"own_class": classes[0]}


def _interval(low: float | None, high: float | None) -> str:
    """The ends of an interval; there is none for a single group of held-out text."""
    return "–" if low is None else f"{low:.4g} to {high:.4g}"


def card(
    name: str,
    manifest: dict[str, Any],
    data: dict[str, Any],
    folder: Path,
    with_prompts: bool = False,
    foreign_code: Collection[str] = (),
) -> str:
    """The model card as Markdown with a YAML header.

    Args:
        with_prompts: the model scores pairs of prompt and candidate.
        foreign_code: names of the code files that belong to the pretrained model.
    """
    config = durable.read_json(folder / "config.json")
    config |= _facts_of_foreign(config, folder)
    rows = [row for row in manifest["stats"]["table"] if row["model"] == name]
    if name in POLICIES:
        settings, split = manifest["config"]["critic"], "train"
        what = f"a ranker, trained further as a policy with {name}"
    elif name == "critic":
        settings, rows = manifest["config"]["critic"], manifest["stats"]["table"]
        split = manifest["config"]["models"][settings["generator"]]["split"]
        what = "a masked-diffusion generator with a critic head that estimates for every token the probability of an error"
    else:
        settings = manifest["config"]["models"][name]
        split = settings["split"]
        both_ways = settings["mode"] in ("token_classifier", "sequence_scorer")
        what = f"mode {settings['mode']}, attention {'bidirectional' if both_ways else settings['attention']}"
    kind = "critic" if name == "critic" else "pairs" if with_prompts else None
    own_labels = _has_own_labels(manifest["config"])
    use = usage(config, kind, _prompt_of(manifest["config"], settings), own_labels)
    source = _source_of(data["config"])
    table = "\n".join(
        f"| {r['metric']} ({'less' if r['lower_is_better'] else 'more'} is better) | {r['value']:.4g} | {_interval(r['low'], r['high'])} | "
        f"{r['baseline']}: {r['baseline_value']:.4g} | {_interval(r.get('difference_low'), r.get('difference_high'))} | {'yes' if r['beats_baseline'] else 'NO'} |"
        for r in rows
    )
    prepared, versions = data["stats"], manifest["environment"]
    precision = versions.get("precision", "fp32")
    rounded = (
        "\nThe metrics were computed with bf16 products. A model loaded as above computes in float32, so its scores differ by\n"
        "rounding."
        if precision == "bf16"
        else ""
    )
    commit = manifest["code"].get("commit") or "unknown"
    return f"""---
library_name: transformers
license: unknown
pipeline_tag: {use.task}
tags:
- {config["model_type"]}
- masked-diffusion
---

# {name}

`{config["architectures"][0]}`: {what}. Trained by Remask from {source}.

{_about_code(folder, foreign_code)}No licence is chosen for the weights. Set `license` above before you share this folder. The licences of the training
data, and of a model that this one started from, may limit your choice.

## Use

{use.text}

## Data

Split `{split}` of {source}: {prepared["tokens"].get(split, 0):,} tokens in {prepared["examples"].get(split, 0):,}
passages, vocabulary {prepared["vocabulary"]:,}. Held out: {prepared["tokens"]["held_out"]:,} tokens.

## Held-out quality

| metric | value | 95 % interval | baseline | interval of the difference | better than the baseline |
|---|---|---|---|---|---|
{table}

The baseline is computed on the same held-out data. "yes" means that the whole interval of the difference is better than 0.
Where the baseline is a number, such as chance, it means that the whole interval of the value is better than it.{rounded}

## Training

{_training_of(settings["training"])}, seed {manifest["config"]["seed"]}. Python {versions["python"]}, torch
{versions["torch"]}, transformers {versions["transformers"]}, {versions.get("device", "cpu")}, {precision}; code at
commit {commit}.
"""


def _about_code(folder: Path, foreign: Collection[str]) -> str:
    """Who owns the Python files of a folder."""
    names = {file.name for file in folder.glob("*.py")}
    owners = ((CODE_LICENCE, names - set(foreign)), (FOREIGN_CODE, names & set(foreign)))
    return "".join(
        text.format(files=", ".join(f"`{name}`" for name in sorted(owned))) for text, owned in owners if owned
    )


def _prompt_of(config: dict[str, Any], settings: dict[str, Any]) -> str:
    """Content of the prompts of the run's rankers; empty for a blind one, and for a run without rankers."""
    if settings.get("blind") or "ranker" not in config:
        return ""
    if config["ranker"]["prompt"] == "question_page":
        return "the question, a line feed and the text of the page"
    return "the question alone"


def _source_of(config: dict[str, Any]) -> str:
    """A short description of a run's data."""
    path = config["data"]["path"]
    if config["task"] == "finqa":
        return "synthetic questions in the style of FinQA" if path.startswith("builtin") else "FinQA"
    return "the language reference that is part of CPython" if path == "builtin" else f"`{Path(path).name}`"


def _training_of(settings: dict[str, Any]) -> str:
    """Steps, batch size and learning rates."""
    rates = f"learning rate {settings['learning_rate']}"
    if settings["optimizer"] != "adamw":
        rates = f"learning rates {settings['muon_learning_rate']} for hidden matrices, {settings['learning_rate']} for the rest"
    return f"{settings['steps']:,} steps of {settings['batch_size']} rows, {settings['optimizer']} ({rates})"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.models.publish", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("run_dir", type=Path, help="a finished run, such as outputs/run_001")
    parser.add_argument("model", help="a model of stage 04; critic, or ppo, exact, cross_entropy of stage 05")
    parser.add_argument("out_dir", type=Path, help="a new folder")
    parser.add_argument(
        "--allow_code",
        metavar="SHA256",
        help="of a backbone with code of its own: pretrained.code_sha256 of the run",
    )
    options = parser.parse_args()
    if options.allow_code is not None:
        own_code.allow(options.allow_code)
    try:
        print(
            f"{publish(options.run_dir, options.model, options.out_dir)}: ready to push; read its README.md first"
        )
    except RemaskError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
