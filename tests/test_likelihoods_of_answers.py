"""Log-likelihoods of answers against full enumeration, and lm-eval on a task file of our own."""

import argparse
import itertools
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lib.errors import BadConfig, BadData
from lib.evaluation.likelihoods import LikelihoodEstimator, Request
from lib.evaluation.lm_eval import Harness, as_lm, run
from tests.pretrained_folders import masked_lm_folder
from tests.trainings import CPU

SIZE, MASK, PAD = 5, 0, 4
DRAWS = 500


class Toy(torch.nn.Module):
    """A masked LM on five ids whose prediction depends on every visible token and its distance."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.table = torch.randn(SIZE, 9, SIZE, generator=generator)

    def forward(self, input_ids, attention_mask=None, logits_at=None, **_):
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        length = input_ids.shape[1]
        distance = torch.arange(length)[None] - torch.arange(length)[:, None]
        seen = self.table[input_ids[:, None, :], distance.clamp(-4, 4) + 4]  # (B, T, S, V)
        seen = seen * ((input_ids != MASK) & (real > 0))[:, None, :, None]
        return SimpleNamespace(logits=seen.sum(2).flatten(0, 1)[logits_at])


def estimator(**choices: Any) -> LikelihoodEstimator:
    return LikelihoodEstimator(Toy(), MASK, PAD, 32, CPU, **choices)


def exact(prompt: np.ndarray, answer: np.ndarray) -> float:
    """The bound by all masks of the answer."""
    length, total = len(answer), 0.0
    for k in range(1, length + 1):
        sets = list(itertools.combinations(range(length), k))
        for positions in sets:
            text = np.concatenate([prompt, answer])
            where = len(prompt) + np.array(positions)
            masked = text.copy()
            masked[where] = MASK
            logits = Toy()(torch.from_numpy(masked)[None], logits_at=torch.from_numpy(where)).logits
            chosen = torch.log_softmax(logits, -1)[torch.arange(k), torch.from_numpy(text[where])]
            total += float(chosen.sum()) * length / k / len(sets) / length
    return total


PROMPT, ANSWER = np.array([1, 3, 2]), np.array([2, 1, 3, 3, 1, 2])
OTHER = np.array([2, 1, 3, 1, 1, 2])


def test_estimates_agree_with_full_enumeration():
    wanted = exact(PROMPT, ANSWER)
    found = list(estimator(draws=16).estimate([Request(PROMPT, ANSWER, n) for n in range(DRAWS)]))
    values, errors = np.array([f.value for f in found]), np.array([f.standard_error for f in found])
    assert abs(values.mean() - wanted) < 4 * values.std() / np.sqrt(DRAWS)  # no bias
    assert (np.abs(values - wanted) <= 2 * errors).mean() >= 0.93
    assert 0.9 < errors.mean() / values.std() < 2.5  # neither too small, nor useless
    many = np.concatenate([list(estimator(draws=16).masks(6, n)) for n in range(200)])
    np.testing.assert_allclose(many.mean(0), 3.5 / 6, atol=0.03)  # every position, every count


def test_common_random_numbers_lower_the_noise_of_differences():
    pairs = [Request(PROMPT, a, n) for n in range(300) for a in (ANSWER, OTHER)]
    variance = {}
    for common in (True, False):
        values = np.array([f.value for f in estimator(draws=8, common=common).estimate(pairs)]).reshape(-1, 2)
        variance[common] = (values[:, 0] - values[:, 1]).var()
        assert (
            abs((values[:, 0] - values[:, 1]).mean() - (exact(PROMPT, ANSWER) - exact(PROMPT, OTHER))) < 0.3
        )
    assert variance[True] * 2 <= variance[False]


def test_a_request_depends_on_no_other():
    requests = [
        Request(PROMPT, ANSWER, 7),
        Request(PROMPT[:1], ANSWER[:2], 8),
        Request(PROMPT, ANSWER[:1], 9),
    ]
    together = list(estimator(draws=4).estimate(requests))
    for one, request in zip(together, requests, strict=True):
        (alone,) = estimator(draws=4).estimate([request])
        assert one.value == pytest.approx(alone.value, abs=1e-5) and one.is_greedy == alone.is_greedy
    assert together[2].standard_error < 1e-6  # one token: every mask is the same
    with pytest.raises(ValueError, match="at least two draws"):
        list(estimator(draws=1).estimate(requests))


def test_an_answer_that_the_model_cannot_read_is_refused():
    with pytest.raises(BadData, match="an answer has 40 tokens, but the model reads 32 at most"):
        list(estimator(draws=2).estimate([Request(PROMPT, np.ones(40, np.int64), 0)]))


def test_a_document_is_the_sum_of_its_windows(tmp_path):
    """No token is left out: lm-eval divides by all words of a document."""
    harness = Harness.open(str(masked_lm_folder("bert", tmp_path)), draws=4)
    harness.context = 5
    words = ["the", "quick", "fox", "jumps", "over", "the", "lazy", "dog"]
    (whole,) = harness.of_documents([" ".join(words)])
    assert len(harness._encode("", " ".join(words))[1]) == len(words)  # one token each
    harness.context = 50
    alone = harness.of_documents([" ".join(words[:5]), " ".join(words[5:])])
    assert whole == pytest.approx(sum(alone), rel=1e-5)
    assert len(harness.standard_errors) == 4


@pytest.mark.slow
def test_lm_eval_runs_a_task_file(tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm-eval")
    folder = masked_lm_folder("bert", tmp_path / "lm")
    rows = [
        {"q": f"the {a} fox", "options": ["jumps over", "brew"], "gold": 0}
        for a in ("quick", "lazy", "old", "brown")
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    files = f"dataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path}/data.jsonl}}\ntest_split: test\n"
    (tmp_path / "choices.yaml").write_text(
        f"task: choices\n{files}output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: options\ndoc_to_target: gold\n"
        "metric_list:\n  - metric: acc\n"
    )
    (tmp_path / "writes.yaml").write_text(
        f"task: writes\n{files}output_type: generate_until\ndoc_to_text: q\ndoc_to_target: q\n"
        "generation_kwargs: {until: [' '], max_gen_toks: 6}\nmetric_list:\n  - metric: exact_match\n"
    )
    options = argparse.Namespace(model=str(folder), settings=['pretrained.mask_token="[MASK]"'], tasks=["choices", "writes"], include_path=tmp_path, limit=None, num_fewshot=0,
                                 draws=4, seed=0, policy="confidence_order", block_tokens=4)  # fmt: skip
    found = run(options)
    assert found["likelihoods"]["likelihoods"] == 8 and 0 <= found["results"]["choices"]["acc,none"] <= 1
    assert "exact_match,none" in found["results"]["writes"]
    harness = Harness.open(str(folder), draws=4)
    text = "the quick fox"
    values = [value for value, _ in harness.loglikelihood([0, 0], [(text, " jumps"), (text + " ", "jumps")])]
    assert values[0] == values[1] < 0  # the space belongs to the answer
    rolling: Any = as_lm(harness).loglikelihood_rolling([SimpleNamespace(args=(text,))])
    assert rolling == pytest.approx(harness.of_documents([text]))
    (made,) = harness.generate([text], [{"until": [], "max_gen_toks": 6}])
    assert made and "[MASK]" not in made


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.api.model", None)
    with pytest.raises(BadConfig, match=r"pip install -r requirements-benchmarks\.txt"):
        as_lm(Harness(None, None, 8, CPU))
