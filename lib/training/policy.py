"""Stage 05 `ppo`: a trained ranker as policy over its K candidates, trained further by what its choices earn.

Three ways from the same start, over the same pools in as many steps: PPO (actions are drawn, as if the reward of
the others were not known), the exact gradient of the expected reward (which all K rewards make possible, so PPO's
noise is its only difference) and plain cross-entropy. Whoever says that PPO helped must beat the other two.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lib import durable
from lib.config import Config
from lib.errors import BadConfig, did_you_mean
from lib.metrics import Estimate
from lib.models.ranker import CandidateRanker, width_of
from lib.models.ranker_files import load_ranker, save_ranker
from lib.ranking.metrics import paired_difference, ranking_metrics
from lib.ranking.ppo import ActorCritic, PolicyGradient, PpoSettings, ValueHead
from lib.runs import plain
from lib.runtime import Runtime
from lib.training.loop import train
from lib.training.objectives.base import ResultRow, result_row
from lib.training.objectives.pool_choice import PoolChoice, PoolReader, measure
from lib.training.pool_table import PoolTable

WAYS = ("ppo", "exact", "cross_entropy")
START = "ranker before"


@dataclass
class PolicyTraining:
    """What the three ways share.

    Attributes:
        start: folder of the trained ranker.
        folder: of the stage; every way gets a folder in it.
    """

    config: Config
    runtime: Runtime
    start: Path
    folder: Path
    train: PoolTable
    selection: PoolTable
    held_out: PoolTable

    def run(self, way: str) -> dict[str, Any]:
        """Train one way and measure its best model on the held-out pools."""
        ranker, tokenizer = load_ranker(self.start, learning=True)
        ranker.to(self.runtime.device)
        reader = PoolReader(tokenizer, self.config.ranker, self.runtime, self.config.seed)
        settings, folder = self.config.critic.training, self.folder / way
        if way == "cross_entropy":
            model: nn.Module = ranker
            settings = settings.model_copy(
                update={"head_learning_rate": None}
            )  # the ranker's head is trained already
            plain = reader.settings.model_copy(update={"loss": "cross_entropy", "word_dropout": 0.0})
            reader_of_loss = PoolReader(tokenizer, plain, self.runtime, self.config.seed)
            evaluated = settings.evaluation_examples
            objective: Any = PoolChoice(
                way, [self.train], self.selection, self.held_out, reader_of_loss, self.config.seed, evaluated
            )
        else:
            value = ValueHead(width_of(ranker.base), seed=self.config.seed).to(self.runtime.device)
            model = ActorCritic(ranker, value)
            objective = self._policy_gradient(way, ranker, reader)
        result = train(
            model, objective, settings, self.runtime, folder, seed=self.config.seed, label=way,
            save=lambda m, path: save_policy(m, path, tokenizer),
        )  # fmt: skip
        best, _ = load_ranker(folder / "best_model")
        scores = reader.all_scores(best.to(self.runtime.device).eval(), self.held_out)
        return {"best_step": result.best_step, "optimizer": result.optimizer, **self._measured(scores)}

    def before(self) -> dict[str, Any]:
        """The ranker as it came, measured in the same way."""
        ranker, tokenizer = load_ranker(self.start)
        reader = PoolReader(tokenizer, self.config.ranker, self.runtime, self.config.seed)
        scores = reader.all_scores(ranker.to(self.runtime.device), self.held_out)
        return self._measured(scores)

    def _measured(self, scores: np.ndarray) -> dict[str, Any]:
        """Metrics of (N, K) scores on the held-out pools, and the accuracy of each of these."""
        table = self.held_out
        accuracy = ranking_metrics(scores, table.rewards, table.present)["accuracy"]
        return {"held_out": measure(table, scores, self.config.seed), "accuracy": accuracy}

    def _policy_gradient(self, way: str, ranker: CandidateRanker, reader: PoolReader) -> PolicyGradient:
        ppo = self.config.critic.ppo
        names = ("clip", "value_weight", "entropy_weight", "kl_weight", "rollout_pools", "epochs",
                 "samples_per_pool", "normalise_advantages")  # fmt: skip
        start_scores = reader.all_scores(ranker.eval(), self.train)
        log_start = torch.log_softmax(torch.from_numpy(start_scores), -1).numpy()
        table = self.train

        def scores_and_features(policy: nn.Module, which: np.ndarray) -> tuple[Tensor, Tensor]:
            assert isinstance(policy, CandidateRanker)
            pools = reader.read([table.prompts[i] for i in which], table.texts[which], table.present[which])
            with self.runtime.autocast():
                features = policy.features(pools)
            missing = table.present.shape[1] - features.shape[1]
            features = nn.functional.pad(features, (0, 0, 0, missing))  # (B, K, D)
            return policy.head(features).float(), features.float()

        return PolicyGradient(
            scores_and_features,
            table.rewards,
            table.present,
            log_start,
            lambda model: self._regret(model, reader),
            PpoSettings(**{name: getattr(ppo, name) for name in names}),
            "sampled" if way == "ppo" else "exact",
            self.config.seed,
            self.config.critic.training.batch_size,
            selection="regret",
            tokens_per_row=reader.tokens_per_pool(table),
            label=way,
        )

    def _regret(self, model: nn.Module, reader: PoolReader) -> dict[str, float]:
        """What the policy's choices earn on the selection pools; `regret`: how much less than the best, on average."""
        assert isinstance(model, ActorCritic)
        table = self.selection
        scores = reader.all_scores(model.policy, table)
        per_pool = ranking_metrics(scores, table.rewards, table.present)
        chance = torch.softmax(torch.from_numpy(scores), -1).numpy()
        expected = (chance * np.where(table.present, table.rewards, 0)).sum(1)
        return {
            "regret": float((per_pool["best_reward"] - expected).mean()),
            "expected_reward": float(expected.mean()),
            "average_reward": float(per_pool["average_reward"].mean()),
            "accuracy": float(per_pool["accuracy"].mean()),
        }


def save_policy(model: nn.Module, folder: Path, tokenizer: Any) -> None:
    """A ranker's folder; with the value critic beside it if the model has one."""
    if isinstance(model, ActorCritic):
        assert isinstance(model.policy, CandidateRanker)
        save_ranker(model.policy, folder, tokenizer)
        tensors = {
            name: value.detach().cpu().contiguous() for name, value in model.value.state_dict().items()
        }
        save_file(tensors, str(folder / "value_head.safetensors"))
    else:
        assert isinstance(model, CandidateRanker)
        save_ranker(model, folder, tokenizer)


def compare(found: dict[str, dict[str, Any]], groups: np.ndarray, seed: int) -> tuple[dict, list[ResultRow]]:
    """Every way beside the start: gains in accuracy over the same pools, and rows for the results table."""
    before = np.asarray(found[START]["accuracy"])
    gains = {
        way: paired_difference(np.asarray(values["accuracy"]), before, groups, seed)
        for way, values in found.items()
        if way != START
    }
    rows = [
        result_row(
            way, "accuracy", Estimate(**values["held_out"]["accuracy"]), START,
            found[START]["held_out"]["accuracy"]["value"], lower_is_better=False,
        )
        for way, values in found.items()
        if way != START
    ]  # fmt: skip
    return gains, rows


def remember(folder: Path, values: dict[str, Any]) -> None:
    """Keep the figures of a finished way, so that a stage that is cut off does not train it again."""
    durable.write_json(folder / "training_manifest.json", plain(values))


def check_policy(config: Config) -> None:
    """Raise BadConfig if the config names no ranker that can become a policy, or freezes its backbone."""
    name = config.critic.ppo.ranker
    rankers = [n for n, s in config.models.items() if s.mode == "ranker" and not s.blind]
    if name not in rankers:
        raise BadConfig(
            f"critic.ppo.ranker is '{name}', which is not a ranker of `models`{did_you_mean(name, rankers)}"
        )
    if config.critic.training.freeze_backbone:
        raise BadConfig(
            "critic.training.freeze_backbone must be false with critic.method ppo: a policy's backbone must learn"
        )
