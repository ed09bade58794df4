"""
05: train the critic: a token critic of the generator, or a ranker's policy by reinforcement learning (critic.method).

token_critic: for every token, the critic predicts the probability that it is an error, that is, that it differs from
the token of the clean text. It learns from text that the generator filled in. With critic.coupling decoupled, the
generator does not change; joint, the two learn on one backbone. The critic is calibrated on the selection split and
compared with the generator's own confidence on held-out text.

ppo: the ranker of stage 04 becomes a policy that chooses one of K candidates, and learns from the reward of its
choice with PPO and a value network. Two other methods start from the same ranker, for comparison: the exact gradient
of the expected reward, and cross-entropy.

reads   01_prepare_dataset: examples, tokenizer; 04_train: the generator or the ranker; for ppo also 02 and 03
writes  token_critic: best_model (generator and critic in one folder), final_model, calibration.json, metrics.jsonl
        ppo: the folders ppo, exact and cross_entropy, each with best_model, final_model and metrics.jsonl

none: nothing is trained. Rankers of stage 04 are used as they are.

python 05_train_critic.py --quick_test --run_dir outputs/demo
"""

from lib.artifacts import Stage
from lib.cli import run_stage
from lib.config import Config
from lib.log import say
from lib.runs import RunArgs
from lib.training.model_plans import unit_of


def main(config: Config, args: RunArgs) -> None:
    if config.critic.method == "ppo":
        train_policy(config, args)
    elif config.critic.method == "token_critic":
        train_token_critic(config, args)
    else:
        with Stage(__file__, config, args, uses=("critic",), reads=("01_prepare_dataset",)) as stage:
            if not stage.finished:
                say("critic.method is none: nothing is trained")


def train_token_critic(config: Config, args: RunArgs) -> None:
    """Train, calibrate and evaluate the token critic."""
    import torch

    from lib.models.build import load_model, save_model
    from lib.report.table import bands_table, detection_table, results_table
    from lib.runtime import Runtime, release_memory
    from lib.tokenization import load_tokenizer
    from lib.training.critic_setup import check_generator, critic_model, critic_objective
    from lib.training.loop import train
    from lib.training.objectives.base import TrainingContext

    check_generator(config)
    reads = ("01_prepare_dataset", unit_of(config.critic.generator))
    uses = ("seed", "device", "precision", "diffusion", "critic", "pretrained")
    with Stage(__file__, config, args, uses=uses, reads=reads) as stage:
        if stage.finished:
            return

        # 1. Put a critic on the generator's backbone
        runtime = Runtime.detect(config, stage.code)
        stage.environment |= runtime.fingerprint()
        tokenizer = load_tokenizer(stage.folder_of("01_prepare_dataset", "tokenizer"))
        model, transfer = critic_model(stage, config, tokenizer)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        say(
            f"critic ({config.critic.coupling}): {trainable:,} trainable parameters; new: {', '.join(transfer.created)}"
        )

        # 2. Train; the selection split chooses the best step
        width = model.config.max_position_embeddings - 1  # [CLS] takes one position
        context = TrainingContext("critic", config.seed, config.critic.training, runtime)
        objective = critic_objective(stage, config, context, tokenizer, width)
        result = train(
            model, objective, context, stage.folder, save=lambda m, path: save_model(m, path, tokenizer)
        )

        # 3. Calibrate the best model on the selection split, and evaluate it on held-out text. The trained one is not needed
        del model
        release_memory()
        best = load_model(stage.folder / "best_model").to(runtime.device)
        with torch.no_grad():
            values, rows, calibration = objective.report(best)
            nelbo, _ = objective.diffusion.report(best)
        if runtime.processes.is_main:
            calibration.save(stage.folder / "calibration.json")

        # 4. Record the outputs and the figures
        for name in ("best_model", "final_model"):
            stage.add_folder(name, stage.folder / name)
        for name in ("metrics.jsonl", "calibration.json"):
            stage.add_file(name, stage.folder / name)
        stage.stats |= values | {
            "best_step": result.best_step,
            "learning_parameters": trainable,
            "optimizer": result.optimizer,
            "compiled": result.compiled,
            "generator_nelbo": nelbo["nelbo"],
            "generator_nelbo_half_width": nelbo["nelbo_half_width"],
            "table": [row.as_dict() for row in rows],
        }
        say("\n" + results_table(stage.stats["table"]))
        say("\n" + detection_table(values["detection"]))
        say("\n" + bands_table(values["bands"]) + "\n")


def train_policy(config: Config, args: RunArgs) -> None:
    """Train the ranker further by PPO, and by two other methods from the same start."""
    from lib import outside
    from lib.errors import BadConfig
    from lib.report.table import results_table
    from lib.runtime import Runtime
    from lib.training.data import Splits
    from lib.training.policy import METHODS, START, PolicyTraining, check_policy, compare
    from lib.training.stage_inputs import read_stage_inputs
    from lib.training.train_model import recorded

    check_policy(config)
    ranker = config.critic.ppo.ranker
    reads = ("01_prepare_dataset", "02_generate_candidates", "03_build_rewards", unit_of(ranker))
    uses = ("seed", "device", "precision", "ranker", "critic")
    files = outside.of_policies(config)
    with Stage(__file__, config, args, uses=uses, reads=reads, files=files) as stage:
        if stage.finished:
            return

        # 1. Read the pools and find the ranker to start from
        runtime = Runtime.detect(config, stage.code)
        stage.environment |= runtime.fingerprint()
        stage_inputs = read_stage_inputs(stage, config, runtime)
        if not stage_inputs.have_prompts:
            raise BadConfig(
                f"critic.method ppo needs examples with prompts, which task {config.task} does not have; set task: "
                "finqa, or critic.method: token_critic"
            )
        start = stage.folder_of(unit_of(ranker), "best_model")
        split = config.models[ranker].split
        pools = Splits(
            stage_inputs.pools(split), stage_inputs.pools_for_selection(), stage_inputs.pools("held_out")
        )
        training = PolicyTraining(config, runtime, start, stage.folder, pools)

        # 2. Train by each method: the same start, pools and number of steps. Skip a method that is complete
        measured = {START: training.before()}
        for method in METHODS:
            measured[method] = recorded(
                stage.folder / method, lambda method=method: training.run(method), runtime
            )

        # 3. Compare each method with the start on the same held-out pools
        gains, rows = compare(measured, pools.held_out.groups, config.seed)

        # 4. Record the outputs and the figures
        for method in METHODS:
            for part in ("best_model", "final_model"):
                stage.add_folder(f"{method}/{part}", stage.folder / method / part)
            for part in ("metrics.jsonl", "training_manifest.json"):
                stage.add_file(f"{method}/{part}", stage.folder / method / part)
        stage.stats["held_out"] = {method: values["held_out"] for method, values in measured.items()}
        stage.stats |= {"gain_over_start": gains, "table": [row.as_dict() for row in rows]}
        say("\n" + results_table(stage.stats["table"]) + "\n")


if __name__ == "__main__":
    run_stage(main, __doc__, with_processes=True)
