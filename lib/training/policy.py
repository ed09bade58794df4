"""Stage 05 `ppo`: train a ranker further, as a policy over the K candidates of a pool, by the rewards of its choices.

Three methods start from the same ranker and learn from the same training pools, for the same number of steps of equal size:

    ppo            actions are sampled, as if the rewards of the other candidates were unknown
    exact          the exact gradient of the expected reward, which all K rewards make possible; no sampling noise
    cross_entropy  the plain ranking loss

`ppo` and `exact` take the same pools in each step, and use every pool of a rollout `epochs` times in a row.
`cross_entropy` takes the pools in an order of its own, each once per epoch. PPO has helped only if it beats the other two.
The best step of each method has the lowest regret of the chosen candidates, on the same selection pools.

Legend: B pools of a batch, N pools, K candidates, D features.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lib.config import Config
from lib.errors import BadConfig, did_you_mean
from lib.log import say
from lib.metrics import Estimate
from lib.models.block_attention import on_a_gpu
from lib.models.ranker import CandidateRanker, width_of
from lib.models.ranker_files import load_ranker, save_ranker
from lib.models.ranker_placement import on_device
from lib.ranking.actor_critic import ActorCritic, ValueHead
from lib.ranking.metrics import paired_difference, ranking_metrics
from lib.ranking.policy_gradient import LoopSettings, PolicyGradient, TrainingPools
from lib.ranking.ppo import PpoSettings
from lib.runtime import Runtime, release_memory
from lib.training.data import Splits
from lib.training.loop import Result, train
from lib.training.objectives.base import ResultRow, TrainingContext, result_row
from lib.training.objectives.pool_choice import PoolChoice, PoolReader, PoolSplits, measure
from lib.training.pool_table import PoolTable

METHODS = ("ppo", "exact", "cross_entropy")
START = "ranker before"


@dataclass
class PolicyTraining:
    """What the three methods share.

    Attributes:
        start: folder of the trained ranker.
        folder: of the stage; every method gets a folder in it.
        pools: the three splits.
    """

    config: Config
    runtime: Runtime
    start: Path
    folder: Path
    pools: Splits[PoolTable]

    def run(self, method: str) -> dict[str, Any]:
        """Train with one method, and measure its best model on the held-out pools."""
        result = self._learn(method)
        release_memory()  # of the trained ranker, before its best state is loaded
        scores = self._held_out_scores(self.folder / method / "best_model")
        return {
            "best_step": result.best_step,
            "optimizer": result.optimizer,
            "compiled": result.compiled,
            **self._measure(scores),
        }

    def _learn(self, method: str) -> Result:
        """Train with one method. The models are in the folder, and no longer in memory."""
        config, folder = self.config, self.folder / method
        ranker, tokenizer = self._load(self.start, learning=True)
        on_a_gpu(config.ranker.mask, ranker, self.runtime.device)
        # The same for all methods, whatever the ranker was trained with
        plain = {"loss": "cross_entropy", "word_dropout": 0.0, "sampled_candidates": None, "hard_negatives": 0.0,
                 "best_by": "reward"}  # fmt: skip
        settings = config.ranker.model_copy(update=plain)
        reader = PoolReader(tokenizer, settings, self.runtime, config.seed)
        context = TrainingContext(method, config.seed, config.critic.training, self.runtime)
        if method == "cross_entropy":
            model: nn.Module = ranker
            # The ranker's head is already trained, so it gets no learning rate of its own
            context = replace(
                context, settings=context.settings.model_copy(update={"head_learning_rate": None})
            )
            objective: Any = self._choice(method, reader)
        else:
            # Rollouts are scored without gradients, by plain layers. Compiled ones round differently, and ratios would not begin at 1
            if context.settings.compile == "on":
                say(f"{method}: layers are not compiled: plain ones give the scores that it compares with")
            plainly = context.settings.model_copy(update={"compile": "off"})
            context = replace(context, settings=plainly)
            value = ValueHead(width_of(ranker.base), seed=config.seed).to(self.runtime.device)
            model = ActorCritic(ranker, value)
            objective = self._policy_gradient(method, ranker, reader)
        return train(model, objective, context, folder, lambda m, path: save_policy(m, path, tokenizer))

    def before(self) -> dict[str, Any]:
        """The ranker before this training, measured in the same way."""
        found = self._measure(self._held_out_scores(self.start))
        release_memory()
        return found

    def _held_out_scores(self, folder: Path) -> np.ndarray:
        """(N, K) scores of a saved ranker on the held-out pools."""
        ranker, tokenizer = self._load(folder)
        reader = PoolReader(tokenizer, self.config.ranker, self.runtime, self.config.seed)
        return reader.all_scores(ranker, self.pools.held_out)

    def _load(self, folder: Path, learning: bool = False) -> tuple[CandidateRanker, Any]:
        """(ranker on the device, tokenizer)."""
        return on_device(lambda: load_ranker(folder, learning), self.config.ranker.shard, self.runtime)

    def _measure(self, scores: np.ndarray) -> dict[str, Any]:
        """Metrics of (N, K) scores on the held-out pools, and the (N,) accuracy of each pool."""
        table = self.pools.held_out
        accuracy = ranking_metrics(scores, table.rewards, table.present)["accuracy"]
        return {"held_out": measure(table, scores, self.config.seed), "accuracy": accuracy}

    def _policy_gradient(self, method: str, ranker: CandidateRanker, reader: PoolReader) -> PolicyGradient:
        """The objective of `ppo` and `exact`."""
        ppo = self.config.critic.ppo
        names = ("clip", "value_weight", "entropy_weight", "kl_weight", "rollout_pools", "epochs",
                 "samples_per_pool", "normalise_advantages")  # fmt: skip
        table, choice = self.pools.train, self._choice(method, reader)
        start_scores = reader.all_scores(ranker.eval(), table)
        log_start = torch.log_softmax(torch.from_numpy(start_scores), -1).numpy()

        def scores_and_features(policy: nn.Module, index: np.ndarray) -> tuple[Tensor, Tensor]:
            """((B, K), (B, K, D)) of the pools `index`."""
            assert isinstance(policy, CandidateRanker)
            pools = reader.read([table.prompts[i] for i in index], table.texts[index], table.present[index])
            with self.runtime.autocast():
                features = policy.features(pools)
            missing = table.present.shape[1] - features.shape[1]
            features = nn.functional.pad(features, (0, 0, 0, missing))  # (B, K, D)
            return policy.head(features).float(), features.float()

        return PolicyGradient(
            scores_and_features,
            lambda model: evaluate_policy(model, choice),
            TrainingPools(table.rewards, table.present, log_start),
            PpoSettings(**{name: getattr(ppo, name) for name in names}),
            "sampled" if method == "ppo" else "exact",
            LoopSettings(
                seed=self.config.seed,
                batch_size=self.config.critic.training.batch_size,
                selection=choice.selection,
                tokens_per_row=reader.tokens_per_pool(table, ranker.packs),
                label=method,
                parts=self.config.critic.training.parts,
                processes=self.runtime.processes,
            ),
        )

    def _choice(self, method: str, reader: PoolReader) -> PoolChoice:
        """The plain ranking loss. Its regret on the selection pools chooses the best step of all three methods."""
        context = TrainingContext(method, self.config.seed, self.config.critic.training, self.runtime)
        splits = PoolSplits([self.pools.train], self.pools.selection, self.pools.held_out)
        return PoolChoice(context, splits, reader)


def evaluate_policy(model: nn.Module, choice: PoolChoice) -> dict[str, float]:
    """The numbers of `choice` for the policy. Its loss is left out, because a policy does not minimise it."""
    assert isinstance(model, ActorCritic)
    return {name: value for name, value in choice.evaluate(model.policy).items() if name != "loss"}


def save_policy(model: nn.Module, folder: Path, tokenizer: Any) -> None:
    """Save a ranker, together with its value critic if it has one."""
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
    """Every method against the start: paired differences of accuracy, and rows of the results table."""
    before = np.asarray(found[START]["accuracy"])
    gains = {
        method: paired_difference(np.asarray(values["accuracy"]), before, groups, seed)
        for method, values in found.items()
        if method != START
    }
    rows = [
        result_row(
            method, "accuracy", Estimate(**values["held_out"]["accuracy"]), START,
            found[START]["held_out"]["accuracy"]["value"], lower_is_better=False,
        ).with_difference(Estimate(**gains[method]))
        for method, values in found.items()
        if method != START
    ]  # fmt: skip
    return gains, rows


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
