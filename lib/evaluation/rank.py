"""Rank candidates with a trained ranker, from Python or for `06_sample.py --rank`.

from lib.evaluation.rank import Ranker
ranker = Ranker.load("outputs/run_001")
result = ranker.rank("how big is bmc software ?", ["it has 6,000 employees .", "bmc is in houston ."])
print(result.best, result.order, result.scores, result.probabilities)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib import durable
from lib.config import load_config
from lib.errors import BadData, MissingInput
from lib.log import say
from lib.models.collation import collate, too_long
from lib.models.ranker import CandidateRanker
from lib.models.ranker_files import RANKER_FILE, load_ranker
from lib.runtime import Runtime

TOKENS_PER_BATCH = 16_384  # about, of the pools that are read together
CHARACTERS_PER_TOKEN = 3  # about, to divide pools into batches before they are tokenized
DEFAULT_TOKENS = 256  # of a prompt or a candidate, for rankers that do not say


@dataclass(frozen=True)
class Ranking:
    """The ranking of one pool of K candidates.

    Attributes:
        candidates: as given.
        scores: (K,) unbounded; higher is better.
    """

    candidates: Sequence[str]
    scores: np.ndarray

    @property
    def order(self) -> list[int]:
        """The numbers of the candidates from 0, the best first. Equal scores stay in the given order."""
        return np.argsort(-self.scores, kind="stable").tolist()

    @property
    def probabilities(self) -> np.ndarray:
        """(K,) softmax of the scores. With `ranker.loss: cross_entropy`: how likely each candidate is the best one of its pool."""
        return softmax(self.scores)

    @property
    def best(self) -> str:
        """The candidate with the highest score."""
        return self.candidates[self.order[0]]


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


@dataclass(frozen=True)
class Ranker:
    """A trained ranker with its tokenizer.

    Attributes:
        prompt_tokens, candidate_tokens: longer texts are truncated.
    """

    model: CandidateRanker
    tokenizer: Any
    runtime: Runtime
    prompt_tokens: int
    candidate_tokens: int

    @classmethod
    def load(cls, folder: str | Path, model: str = "ranker", runtime: Runtime | None = None) -> "Ranker":
        """The ranker of a run, or of a folder that has a `ranker.json`.

        Args:
            model: name of the ranker in the run's stage 04.
            runtime: device and precision; by default as in training: the best that this machine has.

        Raises:
            MissingInput: there is no trained ranker.
        """
        folder = Path(folder)
        own = folder if (folder / RANKER_FILE).exists() else folder / "04_train" / model / "best_model"
        if not (own / RANKER_FILE).exists():
            raise MissingInput(
                f"{folder} is neither the folder of a ranker nor a run with a trained ranker '{model}'; "
                "run 04_train.py, or give another folder"
            )
        runtime = runtime or Runtime.detect(load_config())
        ranker, tokenizer = load_ranker(own)
        ranker.to(runtime.device).eval()
        record = durable.read_json(own / RANKER_FILE)
        lengths = (record.get(f"{name}_tokens") or DEFAULT_TOKENS for name in ("prompt", "candidate"))
        return cls(ranker, tokenizer, runtime, *lengths)

    def rank(self, prompt: str, candidates: Sequence[str]) -> Ranking:
        """The ranking of one pool. Raises BadData for an empty candidate, or for none."""
        return self.rank_all([prompt], [candidates])[0]

    def rank_all(self, prompts: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[Ranking]:
        """The rankings of N pools, read in batches of similar cost."""
        if len(prompts) != len(candidates):
            raise BadData(
                f"{len(prompts)} prompts for {len(candidates)} pools; give one prompt for each pool"
            )
        result: list[Ranking | None] = [None] * len(prompts)
        for batch in self._batches(prompts, candidates):
            scores = self._scores([prompts[i] for i in batch], [candidates[i] for i in batch])
            for i, row in zip(batch, scores, strict=True):
                result[i] = Ranking(candidates[i], row[: len(candidates[i])])
        return [ranking for ranking in result if ranking is not None]

    def shortened(self, prompts: Sequence[str], candidates: Sequence[Sequence[str]]) -> tuple[int, int]:
        """(prompts, candidates) that are longer than the ranker reads."""
        flat = [text for texts in candidates for text in texts]
        lengths = self.prompt_tokens, self.candidate_tokens
        prompts = [] if self.model.blind else prompts
        return too_long(self.tokenizer, prompts, flat, *lengths, self.model.suffix)

    @torch.inference_mode()
    def _scores(self, prompts: list[str], candidates: list[Sequence[str]]) -> np.ndarray:
        """(B, K) scores; -inf beyond the candidates of a pool."""
        lengths = self.prompt_tokens, self.candidate_tokens
        if self.model.blind:
            prompts = [""] * len(prompts)
        pools = collate(self.tokenizer, prompts, candidates, *lengths, self.model.suffix)
        with self.runtime.autocast():
            return self.model(pools.tensors()).float().cpu().numpy()

    def _batches(self, prompts: Sequence[str], candidates: Sequence[Sequence[str]]) -> Iterator[list[int]]:
        """Numbers of pools of similar size, whose texts have about `TOKENS_PER_BATCH` tokens together."""
        copies = [1 if self.model.packs else len(texts) for texts in candidates]
        cost = [
            (n * min(len(prompt), CHARACTERS_PER_TOKEN * self.prompt_tokens) + sum(map(len, texts))) // CHARACTERS_PER_TOKEN
            for n, prompt, texts in zip(copies, prompts, candidates, strict=True)
        ]  # fmt: skip
        batch: list[int] = []
        total = 0
        for i in np.argsort(cost, kind="stable").tolist():
            if batch and total + cost[i] > TOKENS_PER_BATCH:
                yield batch
                batch, total = [], 0
            batch.append(i)
            total += cost[i]
        if batch:
            yield batch


def say_shortened(found: tuple[int, int], ranker: Ranker) -> None:
    """Log how many texts the ranker reads only in part."""
    for count, what, most in zip(
        found, ("prompts", "candidates"), (ranker.prompt_tokens, ranker.candidate_tokens), strict=True
    ):
        if count:
            say(
                f"WARNING: {count:,} {what} are longer than the {most} tokens that the ranker reads; their ends are not read"
            )
