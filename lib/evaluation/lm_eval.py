"""Run tasks of lm-eval (the Language Model Evaluation Harness) on a masked LM: pip install -r requirements-benchmarks.txt

python -m lib.evaluation.lm_eval --model outputs/run_001/04_train/generator/best_model --tasks arc_easy --limit 100
python -m lib.evaluation.lm_eval --model FOLDER --tasks my_task --include_path FOLDER_OF_TASK_FILES --out results.json

The model is a generator of this project, or any masked LM that `pretrained.model` could name; --set gives it the other settings of
that section. Likelihoods are estimates with
standard errors (lib/evaluation/likelihoods.py); the options of a question share their random numbers. The results say how often the
two best options of a question are closer than two standard errors. Text is generated block by block.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import BadConfig, BadData, MissingInput, RemaskError
from lib.log import Progress

DEFAULT_TOKENS = 64  # of a generated answer, if the task does not say
INSTALL = "pip install -r requirements-benchmarks.txt"


@dataclass
class Harness:
    """What lm-eval asks of a model, on one masked LM.

    Attributes:
        standard_errors: of all likelihoods that were asked for.
        close: for each question of several options, whether its two best are closer than two standard errors.
    """

    model: Any
    tokenizer: Any
    context: int
    runtime: Any
    draws: int = 32
    seed: int = 0
    policy: str = "confidence_order"
    block_tokens: int = 16
    standard_errors: list[float] = field(default_factory=list)
    close: list[bool] = field(default_factory=list)

    @classmethod
    def open(cls, folder: str, settings: Sequence[str] = (), **choices: Any) -> "Harness":
        """The masked LM of a folder. Raises MissingInput, BadData or BadConfig.

        Args:
            settings: `KEY=VALUE` as for --set, such as `pretrained.mask_token=<mask>`.
        """
        from lib.config import load_config
        from lib.models.build import PretrainedStart, is_ours, load_model, start_model
        from lib.models.pretrained import open_pretrained
        from lib.runtime import Runtime
        from lib.tokenization import load_tokenizer, num_ids

        config = load_config(overrides=[f"pretrained.model={folder}", *settings])
        runtime = Runtime.detect(config)
        path = Path(folder)
        if path.is_dir() and not (path / "config.json").exists():
            raise MissingInput(f"--model {folder} has no config.json; give the folder of a model")
        if path.is_dir() and is_ours(path):
            model, tokenizer = load_model(path), load_tokenizer(path)
            if not hasattr(model, "critic"):
                raise BadData(f"--model {folder} is a {type(model).__name__}; give a masked language model")
            context = model.config.max_position_embeddings - 1
        else:
            opened = open_pretrained(config.pretrained)
            tokenizer, context = opened.tokenizer, min(opened.longest, 2048)
            start = PretrainedStart(opened, context, dropout=0.0)
            model, _ = start_model("language_model", start, "bidirectional", num_ids(tokenizer), 0, "lm-eval")
        return cls(model.to(runtime.device).eval(), tokenizer, context, runtime, **choices)

    def loglikelihood(
        self, questions: Sequence[int], pairs: Sequence[tuple[str, str]]
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is the greedy answer) of each (context, continuation).

        `questions`: pairs of the same number are options of one question.
        """
        from lib.evaluation.likelihoods import Request

        requests = [Request(*self._encode(*pair), q) for pair, q in zip(pairs, questions, strict=True)]
        found = self._estimate(requests)
        self._count_close(questions, found)
        return [(one.value, one.is_greedy) for one in found]

    def of_documents(self, texts: Sequence[str]) -> list[float]:
        """The log-likelihood of each text: the sum over consecutive windows of at most `context` tokens."""
        from lib.evaluation.likelihoods import Request

        windows, owners = [], []
        for number, text in enumerate(texts):
            _, ids = self._encode("", text)
            for start in range(0, len(ids), self.context):
                windows.append(Request(ids[:0], ids[start : start + self.context], len(windows)))
                owners.append(number)
        values = [one.value for one in self._estimate(windows)]
        return np.bincount(owners, values, minlength=len(texts)).tolist()

    def _estimate(self, requests: Sequence[Any]) -> list[Any]:
        from lib.evaluation.likelihoods import LikelihoodEstimator

        estimator = LikelihoodEstimator(
            self.model, self.tokenizer.mask_token_id, self.tokenizer.pad_token_id, self.context, self.runtime, self.seed,
            self.draws,
        )  # fmt: skip
        found = []
        with Progress("likelihoods", len(requests)) as progress:
            for likelihood in estimator.estimate(requests):
                found.append(likelihood)
                progress.update(len(found))
        self.standard_errors += [one.standard_error for one in found]
        return found

    def _encode(self, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of both. They are encoded together, and the continuation has the tokens that the context alone has not."""
        from lib.tokenization import encode_batch

        space = len(context) - len(context.rstrip())  # belongs to the continuation, as in lm-eval
        if space:
            context, continuation = context[:-space], context[-space:] + continuation
        whole, alone = encode_batch(self.tokenizer, [context + continuation, context], "unk") if context else (
            encode_batch(self.tokenizer, [continuation], "unk")[0], np.empty(0, np.int32)
        )  # fmt: skip
        cut = min(len(alone), max(len(whole) - 1, 0))
        if not len(whole):
            raise BadData(f"the tokenizer has no token for the answer {continuation!r}")
        return whole[:cut], whole[cut:]

    def _count_close(self, questions: Sequence[int], found: list[Any]) -> None:
        from lib.evaluation.likelihoods import standard_error

        by_question: dict[int, list[Any]] = {}
        for question, one in zip(questions, found, strict=True):
            by_question.setdefault(question, []).append(one)
        for options in by_question.values():
            if len(options) < 2:
                continue
            best, second = sorted(options, key=lambda one: -one.value)[:2]
            gaps = best.draws - second.draws
            self.close.append(bool(gaps.mean() < 2 * standard_error(gaps)))

    def generate(self, prompts: Sequence[str], settings: Sequence[dict[str, Any]]) -> list[str]:
        """A text behind each prompt, up to the first stop string of its settings `until`, of `max_gen_toks` tokens at most."""
        from lib.config import load_config
        from lib.diffusion.policies import POLICIES
        from lib.diffusion.sampler import Sampler
        from lib.diffusion.samples import MaskedTexts
        from lib.tokenization import decode_batch, encode_batch, forbidden_ids

        config = load_config(overrides=[f"sampler.block_tokens={self.block_tokens}"])
        mask_id, texts = self.tokenizer.mask_token_id, []
        with Progress("texts", len(prompts)) as progress:
            for number, (prompt, given) in enumerate(zip(prompts, settings, strict=True)):
                count = int(given.get("max_gen_toks") or DEFAULT_TOKENS)
                (ids,) = encode_batch(self.tokenizer, [prompt], "unk")
                ids = ids[max(0, len(ids) + self.block_tokens - self.context) :]
                row = np.concatenate([ids.astype(np.int64), np.full(count, mask_id)])[None]
                temperature = float(given.get("temperature") or 0.0)
                sampler = Sampler(
                    self.model, mask_id, forbidden_ids(self.tokenizer), self.runtime,
                    config.sampler.model_copy(update={"temperature": max(temperature, 1e-3)}), self.seed, context=self.context,
                )  # fmt: skip
                made = sampler.sample(
                    MaskedTexts(row, row == mask_id, np.array([number])),
                    POLICIES[self.policy],
                    self.block_tokens,
                )
                (text,) = decode_batch(self.tokenizer, [made.ids[0, len(ids) :]])
                stops = given.get("until") or []
                for stop in [stops] if isinstance(stops, str) else stops:
                    text = text.split(stop)[0] if stop else text
                texts.append(text)
                progress.update(number + 1)
        return texts

    def summary(self) -> dict[str, float | int]:
        """How exact the likelihoods are."""
        return {
            "likelihoods": len(self.standard_errors),
            "draws": self.draws,
            "mean_standard_error": float(np.mean(self.standard_errors)) if self.standard_errors else 0.0,
            "questions_within_two_standard_errors": float(np.mean(self.close)) if self.close else 0.0,
        }


def as_lm(harness: Harness) -> Any:
    """The model as lm-eval's own class. Raises BadConfig if the package is not installed."""
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise BadConfig(f"lm-eval is not installed; run {INSTALL}") from None

    class MaskedLanguageModel(LM):
        def loglikelihood(self, requests) -> list[tuple[float, bool]]:
            pairs: Any = [request.args for request in requests]
            return harness.loglikelihood(_questions(requests), pairs)

        def loglikelihood_rolling(self, requests) -> list[float]:
            return harness.of_documents([request.args[0] for request in requests])

        def generate_until(self, requests) -> list[str]:
            return harness.generate(*zip(*(request.args for request in requests), strict=True))

    return MaskedLanguageModel()


def _questions(requests: Sequence[Any]) -> list[int]:
    """A number for each document of each task."""
    known: dict[tuple, int] = {}
    return [known.setdefault((r.task_name, r.doc_id), len(known)) for r in requests]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate the model on the tasks. Returns lm-eval's results, with the exactness of the likelihoods."""
    lm = as_lm(
        harness := Harness.open(
            options.model,
            options.settings,
            draws=options.draws,
            seed=options.seed,
            policy=options.policy,
            block_tokens=options.block_tokens,
        )
    )
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager(include_path=None if options.include_path is None else str(options.include_path))
    evaluate: Any = lm_eval.simple_evaluate
    found = evaluate(
        lm,
        tasks=options.tasks,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        task_manager=manager,
        bootstrap_iters=1000,
    )
    assert found is not None
    return {"results": found["results"], "likelihoods": harness.summary(), "model": options.model}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.evaluation.lm_eval", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", required=True, help="folder of a masked LM, or its name on the hub")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE",
                        help="a setting of the section pretrained, such as pretrained.shift_logits=true")  # fmt: skip
    parser.add_argument("--tasks", nargs="+", required=True, help="names of tasks")
    parser.add_argument("--include_path", type=Path, help="folder with task files of your own")
    parser.add_argument("--limit", type=int, help="questions per task")
    parser.add_argument("--num_fewshot", type=int, help="examples in front of each question")
    parser.add_argument("--draws", type=int, default=32, help="masks for each answer")
    parser.add_argument("--policy", default="confidence_order", help="re-masking policy of generated text")
    parser.add_argument("--block_tokens", type=int, default=16, help="tokens of a block of generated text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the results as JSON")
    options = parser.parse_args()
    try:
        found = run(options)
    except RemaskError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    text = json.dumps(found, indent=1, default=str)
    if options.out is not None:
        from lib import durable

        durable.write_text(options.out, text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
