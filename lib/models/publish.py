"""A model of a finished run as a folder that can be pushed to a model hub: weights, code, tokenizer and a model card.

python -m lib.models.publish outputs/run_001 generator OUT_DIR
python -m lib.models.publish outputs/run_001 critic OUT_DIR

A ranker with prompts becomes a stock classifier with one label, which sentence-transformers' CrossEncoder loads, where
there is one with the same scores (`lib.models.ranker_export` says when).

The card says nothing that is not in the manifests: data, settings, held-out figures with their baselines, versions.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from lib import durable
from lib.errors import BadData, CannotCreate, MissingInput, RemaskError, did_you_mean
from lib.runs import load_manifest

RANKER_FILE = "ranker.json"  # marks the folder of a ranker with prompts
POLICIES = ("ppo", "exact", "cross_entropy")  # what stage 05 makes of a ranker

_AUTO = {
    "MaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "CausalLM": ("AutoModelForCausalLM", "text-generation"),
    "TokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "SequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
}


USE = """```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("THIS_FOLDER", trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

The folder carries its own modelling code; nothing else has to be installed but transformers and torch."""

USE_OF_RANKER = """```python
from sentence_transformers import CrossEncoder

scores = CrossEncoder("THIS_FOLDER").predict([(question, candidate) for candidate in candidates])
```

The candidate of the highest score is the answer."""


def publish(run: Path, name: str, out: Path) -> Path:
    """Copy the best model `name` of a run to the new folder `out`, with a card as README.md.

    Raises:
        MissingInput: the run, its stage or the model is not there.
        BadData: the model's files are not those of the manifest.
        CannotCreate: `out` is not empty.
    """
    stage = "05_train_critic" if name in ("critic", *POLICIES) else "04_train"
    manifest, data = (load_manifest(run / s) for s in (stage, "01_prepare_dataset"))
    if manifest is None or data is None:
        raise MissingInput(f"{run / stage} is not complete; run {stage}.py --run_dir {run}")
    output = "best_model" if name == "critic" else f"{name}/best_model"
    if output not in manifest["outputs"]:
        known = [n.removesuffix("/best_model") for n in manifest["outputs"] if n.endswith("/best_model")]
        raise MissingInput(f"{run} has no model '{name}'{did_you_mean(name, [*known, 'critic', *POLICIES])}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CannotCreate(f"{out} is not empty; give a new folder")
    entry = manifest["outputs"][output]
    source = run / stage / entry["path"]
    if durable.sha256_folder(source) != entry["sha256"]:
        raise BadData(f"{source} is not what {run / stage / 'manifest.json'} says; run {stage}.py again")
    with durable.replacing_folder(out) as folder:
        with_prompts = (source / RANKER_FILE).exists()
        if with_prompts:
            _export_ranker(source, folder)
        else:
            shutil.copytree(source, folder, dirs_exist_ok=True)
        text = card(name, manifest, data, folder, with_prompts)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return out


def _export_ranker(source: Path, folder: Path) -> None:
    from lib.models.ranker_export import export_classifier
    from lib.models.ranker_files import load_ranker

    model, tokenizer = load_ranker(source)
    export_classifier(model, folder, tokenizer)


def _interval(row: dict) -> str:
    """The ends of a row's interval; one group of held-out text alone gives none."""
    return "–" if row["low"] is None else f"{row['low']:.4g} to {row['high']:.4g}"


def card(
    name: str, manifest: dict[str, Any], data: dict[str, Any], folder: Path, with_prompts: bool = False
) -> str:
    """The model card as Markdown with its YAML header. `with_prompts`: it scores pairs of prompt and candidate."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = config["architectures"][0]
    auto, task = next(
        (v for k, v in _AUTO.items() if architecture.endswith(k)), ("AutoModel", "feature-extraction")
    )
    rows = [row for row in manifest["stats"]["table"] if row["model"] == name]
    if name in POLICIES:
        settings = manifest["config"]["critic"]
        what = f"a ranker, trained further as a policy by {name}"
    elif name == "critic":
        settings, rows = manifest["config"]["critic"], manifest["stats"]["table"]
        what = "a masked-diffusion generator with a critic head that says for every token how likely it is an error"
    else:
        settings = manifest["config"]["models"][name]
        what = f"mode {settings['mode']}, attention {settings['attention']}"
    training, prepared = settings["training"], data["stats"]
    split = settings.get("split", "train")
    path = data["config"]["data"]["path"]
    source = (
        "the language reference that every CPython carries" if path == "builtin" else f"`{Path(path).name}`"
    )
    table = "\n".join(
        f"| {r['metric']} | {r['value']:.4g} | {_interval(r)} | {r['baseline']}: "
        f"{r['baseline_value']:.4g} | {'yes' if r['beats_baseline'] else 'NO'} |"
        for r in rows
    )
    use = USE_OF_RANKER if with_prompts else USE.format(auto=auto)
    versions = manifest["environment"]
    commit = manifest["code"].get("commit") or "unknown"
    return f"""---
library_name: transformers
pipeline_tag: {task}
tags:
- {config["model_type"]}
- masked-diffusion
---

# {name}

`{architecture}`: {what}. Trained by Remask from {source}; add a licence before
you publish it.

## Use

{use}

## Data

Split `{split}` of {source}: {prepared["tokens"].get(split, 0):,} tokens in {prepared["examples"].get(split, 0):,}
passages, vocabulary {prepared["vocabulary"]:,}. Held out: {prepared["tokens"]["held_out"]:,} tokens.

## Held-out quality

| metric | value | 95 % interval | baseline | better than the baseline |
|---|---|---|---|---|
{table}

## Training

{training["steps"]:,} steps of {training["batch_size"]} rows, {training["optimizer"]} (learning rates
{training["muon_learning_rate"]} for hidden matrices, {training["learning_rate"]} for the rest), seed
{manifest["config"]["seed"]}. Python {versions["python"]}, torch {versions["torch"]}, transformers
{versions["transformers"]}, {versions.get("device", "cpu")}, {versions.get("precision", "fp32")}; code at commit {commit}.
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.models.publish", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("run_dir", type=Path, help="a finished run, such as outputs/run_001")
    parser.add_argument("model", help="a model of stage 04, or critic")
    parser.add_argument("out_dir", type=Path, help="a new folder")
    options = parser.parse_args()
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
