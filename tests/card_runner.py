"""Runs the examples of model cards where this project is not: a script for a process of its own, never imported.

python card_runner.py JOBS RESULTS

JOBS: {name: {"folder": ..., "texts": [...]}}. RESULTS: {name: {"error": traceback or null, "made": what the examples left
in their variables, "piped": what the pipeline of the examples says of each text}}.
"""

import json
import re
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers

MADE = ("scores", "shares", "loss", "errors", "logits", "inputs")
PIPELINES = {
    "classify": {"truncation": True},
    "fill": {"top_k": 1},
    "write": {"do_sample": False, "max_new_tokens": 4},
}


def plain(value):
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "items"):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def run(folder: Path, texts: list[str]) -> dict:
    blocks = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.M | re.S)
    assert len(blocks) == 2, f"{len(blocks)} examples in the card"
    made: dict = {}
    for block in blocks:
        if "sentence_transformers" not in block or find_spec("sentence_transformers"):
            exec(compile(block.replace("THIS_FOLDER", str(folder)), str(folder), "exec"), made)
    piped = []
    for name in PIPELINES.keys() & made.keys():
        pipe, settings = made[name], PIPELINES[name]
        if pipe.task == "token-classification":
            settings = {"aggregation_strategy": "none"}
        if pipe.task == "text-classification" and pipe.model.config.num_labels > 1:
            settings = settings | {"top_k": None}
        for text in texts:
            torch.manual_seed(0)
            try:
                piped.append(pipe(text, **settings))
            except Exception as error:
                piped.append(f"{type(error).__name__}: {error}")
    return {"made": {key: plain(made[key]) for key in MADE if key in made}, "piped": plain(piped)}


jobs, results = json.loads(Path(sys.argv[1]).read_text()), {}
for name, job in jobs.items():
    try:
        results[name] = {"error": None, **run(Path(job["folder"]), job["texts"])}
    except Exception:
        results[name] = {"error": traceback.format_exc()}
assert not any(module.split(".")[0] == "lib" for module in sys.modules), "the project is in reach"
Path(sys.argv[2]).write_text(json.dumps({"transformers": transformers.__version__, "models": results}))
