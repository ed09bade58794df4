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

    from lib.models.build import Checkpoint, load_model, save_model, start_model
    from lib.report.table import bands_table, detection_table, results_table
    from lib.runtime import Runtime
    from lib.tokenization import load_tokenizer
    from lib.training.loop import train

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
            "language_model", Checkpoint(source, spec.architecture.dropout), "bidirectional", len(tokenizer), config.seed,
            "critic", critic_layers=config.critic.num_layers,
        )  # fmt: skip
        if config.critic.coupling == "decoupled":
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith("critic."))
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        say(f"critic ({config.critic.coupling}): {learning:,} weights learn; new: {transfer.created}")

        # Train, then judge the best one on held-out fills
        objective = critic_objective(
            stage, config, runtime, tokenizer, model.config.max_position_embeddings - 1
        )
        result = train(
            model, objective, config.critic.training, runtime, stage.folder, seed=config.seed, label="critic",
            save=lambda m, path: save_model(m, path, tokenizer),
        )  # fmt: skip
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
    from lib.training.policy import START, WAYS, PolicyTraining, compare, remember
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
        held_out = stage_inputs.pools("held_out")
        training = PolicyTraining(
            config, runtime, start, stage.folder,
            stage_inputs.pools(config.models[name].split), stage_inputs.pools_for_selection(), held_out,
        )  # fmt: skip

        # The same start, pools and steps for each way; a way that is complete is not trained again
        found = {START: training.before()}
        for way in WAYS:
            record = stage.folder / way / "training_manifest.json"
            if not record.exists():
                remember(stage.folder / way, training.run(way))
            found[way] = json.loads(record.read_text(encoding="utf-8"))

        # Record
        gains, rows = compare(found, held_out.groups, config.seed)
        for way in WAYS:
            for part in ("best_model", "final_model"):
                stage.add_folder(f"{way}/{part}", stage.folder / way / part)
            for part in ("metrics.jsonl", "training_manifest.json"):
                stage.add_file(f"{way}/{part}", stage.folder / way / part)
        stage.stats["held_out"] = {way: values["held_out"] for way, values in found.items()}
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


def critic_objective(stage: Stage, config: Config, runtime, tokenizer, context: int):
    """The critic's objective over windows of the split that its generator learned from."""
    import numpy as np

    from lib import schema
    from lib.tokenization import newline_ids
    from lib.training.data import Windows, select_split
    from lib.training.objectives.language_model import MaskedDiffusion
    from lib.training.objectives.token_critic import TokenCritic
    from lib.training.stage_inputs import SELECTION

    tables = [
        select_split(stage.batches("01_prepare_dataset", "examples", schema.EXAMPLES), split)
        for split in (config.models[config.critic.generator].split, SELECTION, "held_out")
    ]
    train, selection, held_out = (Windows(t, context, tokenizer.pad_token_id) for t in tables)
    tiles = held_out.tiled()
    training = config.critic.training
    diffusion = MaskedDiffusion(
        config.diffusion.model_copy(update={"stages": ()}),  # over, when a critic joins
        tokenizer.mask_token_id,
        text_ids=np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids),
        label="critic",
        train=train,
        selection=selection.tiled(),
        held_out=tiles,
        groups=np.asarray(tables[2]["group"].to_pylist())[tiles.owner],
        runtime=runtime,
        seed=config.seed,
        batch_size=training.batch_size,
        num_evaluated=training.evaluation_examples,
        newline_ids=newline_ids(tokenizer),
    )
    return TokenCritic(config.critic, diffusion, sorted(set(tokenizer.all_special_ids)))


if __name__ == "__main__":
    run_stage(main, __doc__)
