"""
05: train the critic that the config names: token_critic, or ppo.

The token critic says for every token how likely it is an error, that is, how likely it differs from the one that stood there.
It learns from the generator's own fills of clean text. Decoupled, the generator stays as it is; joint, both learn on one
backbone. On held-out text it is compared with the generator's own confidence and calibrated.

ppo takes a ranker as policy over its candidates and trains it further by the rewards of what it chooses, with a value
critic as baseline; beside it, from the same start, the exact gradient of the expected reward and cross-entropy.

reads   01_prepare_dataset: examples, tokenizer; 04_train: the generator or the ranker; for ppo also 02 and 03
writes  best_model (generator and critic in one), calibration.json, metrics.jsonl; or ppo/, exact/, cross_entropy/, each
        with best_model, final_model, metrics.jsonl

python 05_train_critic.py --quick_test --run_dir outputs/demo
"""

from lib.artifacts import Stage
from lib.cli import run_stage
from lib.config import Config
from lib.errors import BadConfig, did_you_mean
from lib.log import say
from lib.runs import RunArgs


def main(config: Config, args: RunArgs) -> None:
    (train_policy if config.critic.method == "ppo" else train_token_critic)(config, args)


def train_token_critic(config: Config, args: RunArgs) -> None:
    import torch

    from lib.models.build import load_model, save_model, start_model
    from lib.report.table import bands_table, detection_table, results_table
    from lib.runtime import Runtime
    from lib.tokenization import load_tokenizer
    from lib.training.loop import train
    from lib.training.objectives.base import TrainingContext

    check_generator(config)
    reads = ("01_prepare_dataset", "04_train")
    uses = ("seed", "device", "precision", "diffusion", "critic")
    with Stage(__file__, config, args, uses=uses, reads=reads) as stage:
        if stage.finished:
            return
        runtime = Runtime.detect(config, stage.code)
        stage.environment |= runtime.fingerprint()
        tokenizer = load_tokenizer(stage.folder_of("01_prepare_dataset", "tokenizer"))

        # The critic sits on the generator's backbone; decoupled, nothing but the critic learns
        source = stage.folder_of("04_train", f"{config.critic.generator}/best_model")
        spec = config.models[config.critic.generator]
        model, transfer = start_model(
            "language_model", spec.architecture, "bidirectional", len(tokenizer), config.seed, "critic", source,
            critic_layers=config.critic.num_layers,
        )  # fmt: skip
        if config.critic.coupling == "decoupled":
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith("critic."))
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        say(f"critic ({config.critic.coupling}): {learning:,} weights learn; new: {transfer.created}")

        # Train, then judge the best one on held-out fills
        context = TrainingContext("critic", config.seed, config.critic.training, runtime)
        objective = critic_objective(
            stage, config, context, tokenizer, model.config.max_position_embeddings - 1
        )
        result = train(
            model, objective, context, stage.folder, save=lambda m, path: save_model(m, path, tokenizer)
        )
        best = load_model(stage.folder / "best_model").to(runtime.device)
        with torch.no_grad():
            values, rows, calibration = objective.report(best)
            nelbo, _ = objective.diffusion.report(best)
        calibration.save(stage.folder / "calibration.json")

        # Record
        for name in ("best_model", "final_model"):
            stage.add_folder(name, stage.folder / name)
        for name in ("metrics.jsonl", "calibration.json"):
            stage.add_file(name, stage.folder / name)
        stage.stats |= values | {
            "best_step": result.best_step,
            "learning_parameters": learning,
            "optimizer": result.optimizer,
            "generator_nelbo": nelbo["nelbo"],
            "generator_nelbo_half_width": nelbo["nelbo_half_width"],
            "table": [row.as_dict() for row in rows],
        }
        say(results_table(stage.stats["table"]))
        say(detection_table(values["detection"]))
        say(bands_table(values["bands"]))


def train_policy(config: Config, args: RunArgs) -> None:
    import json

    from lib import outside
    from lib.report.table import results_table
    from lib.runtime import Runtime
    from lib.training.data import Splits
    from lib.training.policy import METHODS, START, PolicyTraining, compare, remember
    from lib.training.stage_inputs import read_stage_inputs

    name = config.critic.ppo.ranker
    rankers = [n for n, s in config.models.items() if s.mode == "ranker" and not s.blind]
    if name not in rankers:
        raise BadConfig(
            f"critic.ppo.ranker is '{name}', which is no ranker of `models`{did_you_mean(name, rankers)}"
        )
    if config.critic.training.freeze_backbone:
        raise BadConfig(
            "critic.training.freeze_backbone: a policy's backbone must learn; leave it out for method ppo"
        )
    reads = ("01_prepare_dataset", "02_generate_candidates", "03_build_rewards", "04_train")
    uses = ("seed", "device", "precision", "ranker", "critic")
    files = outside.of_policies(config)
    with Stage(__file__, config, args, uses=uses, reads=reads, files=files) as stage:
        if stage.finished:
            return
        runtime = Runtime.detect(config, stage.code)
        stage.environment |= runtime.fingerprint()
        stage_inputs = read_stage_inputs(stage, config, runtime)
        if not stage_inputs.have_prompts:
            raise BadConfig(f"critic.method ppo needs examples with prompts; task {config.task} has none")
        start = stage.folder_of("04_train", f"{name}/best_model")
        split = config.models[name].split
        pools = Splits(
            stage_inputs.pools(split), stage_inputs.pools_for_selection(), stage_inputs.pools("held_out")
        )
        training = PolicyTraining(config, runtime, start, stage.folder, pools)

        # The same start, pools and number of steps for each method; a method that is complete is not trained again
        found = {START: training.before()}
        for method in METHODS:
            record = stage.folder / method / "training_manifest.json"
            if not record.exists():
                remember(stage.folder / method, training.run(method))
            found[method] = json.loads(record.read_text(encoding="utf-8"))

        # Record
        gains, rows = compare(found, pools.held_out.groups, config.seed)
        for method in METHODS:
            for part in ("best_model", "final_model"):
                stage.add_folder(f"{method}/{part}", stage.folder / method / part)
            for part in ("metrics.jsonl", "training_manifest.json"):
                stage.add_file(f"{method}/{part}", stage.folder / method / part)
        stage.stats["held_out"] = {method: values["held_out"] for method, values in found.items()}
        stage.stats |= {"gain_over_start": gains, "table": [row.as_dict() for row in rows]}
        say(results_table(stage.stats["table"]))


def check_generator(config: Config) -> None:
    """The critic's generator must be a bidirectional language model of stage 04."""
    fitting = [
        n for n, s in config.models.items() if s.mode == "language_model" and s.attention == "bidirectional"
    ]
    name = config.critic.generator
    if name not in fitting:
        raise BadConfig(
            f"critic.generator is '{name}', which is no bidirectional language model of `models`"
            f"{did_you_mean(name, fitting)}"
        )


def critic_objective(stage: Stage, config: Config, context, tokenizer, width: int):
    """The critic's objective over windows of `width` tokens, of the split that its generator learned from."""
    from lib import schema
    from lib.training.data import Splits, select_split
    from lib.training.objectives.language_model import MaskedDiffusion, MaskingTokens, WindowSplits
    from lib.training.objectives.token_critic import TokenCritic
    from lib.training.stage_inputs import SELECTION

    tables = [
        select_split(stage.batches("01_prepare_dataset", "examples", schema.EXAMPLES), split)
        for split in (config.models[config.critic.generator].split, SELECTION, "held_out")
    ]
    splits = WindowSplits.of(Splits(*tables), width, tokenizer.pad_token_id)
    diffusion = config.diffusion.model_copy(update={"stages": ()})  # a critic follows the last stage
    generator = MaskedDiffusion(context, splits, diffusion, MaskingTokens.of(tokenizer))
    return TokenCritic(config.critic, generator, sorted(set(tokenizer.all_special_ids)))


if __name__ == "__main__":
    run_stage(main, __doc__)
