"""A critic on any masked LM from Python: the example of the documentation, as a script and as a notebook."""

import contextlib
import io
import json

import numpy as np
import pytest

from lib.config import ROOT, load_config
from lib.errors import BadConfig, BadData
from lib.evaluation import masked_lm
from lib.evaluation.masked_lm import MaskedLM
from tests.pretrained_folders import masked_lm_folder
from tests.test_foreign import WORDS

EXAMPLE = ROOT / "docs" / "examples" / "critic_on_any_mlm.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return masked_lm_folder("roberta", tmp_path_factory.mktemp("lm"))


def cells() -> list[str]:
    notebook = json.loads(EXAMPLE.with_suffix(".ipynb").read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_the_script():
    lines = [line for line in EXAMPLE.read_text().splitlines()[2:] if line and not line.startswith("#")]
    found = [line for cell in cells() for line in cell.splitlines() if line]
    swapped = {"import os": "import sys", 'os.environ["MASKED_LM"]': "sys.argv[1]"}
    for new, old in swapped.items():
        found = [line.replace(new, old) for line in found]
    assert sorted(found) == sorted(lines)  # imports have an order of their own
    assert len(EXAMPLE.read_text().splitlines()) < 30


@pytest.mark.slow
def test_the_notebook_runs(folder, monkeypatch):
    monkeypatch.setenv("MASKED_LM", str(folder))
    shorter = ["critic.training.steps=8", "critic.training.evaluate_every=8", "critic.rollout_passes=[1, 3]"]
    monkeypatch.setattr(
        masked_lm, "load_config", lambda overrides: load_config(overrides=[*overrides, *shorter])
    )
    said, names = io.StringIO(), {}
    with contextlib.redirect_stdout(said):
        for cell in cells():
            exec(compile(cell, "notebook", "exec"), names)
    text = said.getvalue()
    assert "'critic':" in text and "was re-masked, finally" in text
    lm, filled = names["lm"], names["lm"].fill(names["gaps"])
    assert [f.text for f in filled] == [
        line for line in text.splitlines() if line.startswith(("The ", "If "))
    ]
    assert all("[MASK]" not in f.text and f.passes == 16 for f in filled)
    # The masked LM did not change, and a text does not depend on its batch
    before = {n: p for n, p in lm.opened.model.named_parameters()}
    for name, weight in lm.model.backbone.named_parameters():
        assert (weight == before[name]).all(), name
    alone = lm.fill(["a [MASK] b", names["gaps"][1]])[1]
    assert alone.text == filled[1].text


def test_what_cannot_be_filled_is_refused(folder):
    lm = MaskedLM.open(folder, context=16)
    with pytest.raises(BadConfig, match="needs a critic: call train_critic"):
        lm.fill(["the [MASK]"])
    with pytest.raises(BadConfig, match="did you mean 'critic_origin'"):
        lm.fill(["the [MASK]"], policy="critic_orign")
    with pytest.raises(BadData, match="0 masks"):
        lm.fill(["the fox"], policy="ancestral")
    with pytest.raises(BadData, match="at most 16 tokens"):
        lm.fill(["the [MASK]" + " fox" * 40], policy="ancestral")
    with pytest.raises(BadData, match="at least 30 texts"):
        lm.train_critic(["the fox"])
    rng = np.random.default_rng(0)
    (made,) = lm.fill([" ".join(rng.choice(WORDS, 3)) + " [MASK][MASK]"], policy="random_remask", nfe=6)
    assert made.remasked and all(token.before != "" for token in made.remasked)
