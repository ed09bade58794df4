"""
05: train the critic, which says for every token how likely it is an error.

It learns from the generator's own samples of clean text: a token is an error if it differs from the one that stood
there. Decoupled, the generator stays as it is; joint, both learn on one trunk. On held-out text it is compared with
the generator's own confidence and calibrated.

reads   01_prepare_dataset: examples, tokenizer; 04_train: the generator
writes  best_model (generator and critic in one), calibration.json, metrics.jsonl

python 05_train_critic.py --quick_test --run_dir outputs/demo
"""

from lib.artifacts import RunArgs, Stage
from lib.cli import run_stage
from lib.config import Config
from lib.errors import BadConfig, did_you_mean
from lib.log import say


def main(config: Config, args: RunArgs) -> None:
    import torch

    from lib.models.build import load_model, save_model, start_model
    from lib.report.table import detection_table, results_table
    from lib.runtime import Runtime
    from lib.tokenization import load_tokenizer
    from lib.training.loop import train

    check_generator(config)
    reads = ("01_prepare_dataset", "04_train")
    uses = ("seed", "device", "precision", "diffusion", "critic")
    with Stage(__file__, config, args, uses=uses, reads=reads) as stage:
        if stage.finished:
            return
        runtime = Runtime.detect(config)
        stage.environment |= runtime.fence()
        tokenizer = load_tokenizer(stage.folder_of("01_prepare_dataset", "tokenizer"))

        # The critic sits on the generator's trunk; decoupled, nothing but the critic learns
        source = stage.folder_of("04_train", f"{config.critic.generator}/best_model")
        spec = config.models[config.critic.generator]
        model, transfer = start_model(
            "language_model", spec.architecture, "bidirectional", len(tokenizer), config.seed, "critic", source,
            critic_layers=config.critic.layers,
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
            "generator_nelbo": nelbo["nelbo"],
            "generator_nelbo_standard_error": nelbo["nelbo_standard_error"],
            "table": [row.as_dict() for row in rows],
        }
        say(results_table(stage.stats["table"]))
        say(detection_table(values["detection"]))


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

    tables = {
        split: select_split(stage.batches("01_prepare_dataset", "examples", schema.EXAMPLES), split)
        for split in (config.models[config.critic.generator].split, "held_out")
    }
    train, held_out = tables[config.models[config.critic.generator].split], tables["held_out"]
    training = config.critic.training
    diffusion = MaskedDiffusion(
        config.diffusion,
        tokenizer.mask_token_id,
        label="critic",
        train=Windows(train, context, tokenizer.pad_token_id),
        held_out=(tiles := Windows(held_out, context, tokenizer.pad_token_id).tiled()),
        runtime=runtime,
        seed=config.seed,
        batch_size=training.batch_size,
        num_evaluated=training.evaluation_examples,
        newline_ids=newline_ids(tokenizer),
    )
    groups = np.asarray(held_out["group"].to_pylist())[tiles.owner]
    return TokenCritic(config.critic, diffusion, sorted(set(tokenizer.all_special_ids)), groups)


if __name__ == "__main__":
    run_stage(main, __doc__)
