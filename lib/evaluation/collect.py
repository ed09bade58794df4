"""From a run's stages to what the report and the sampling table show."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lib import metrics
from lib.artifacts import Stage
from lib.config import Config
from lib.diffusion.blocks import blocks_of
from lib.errors import BadConfig
from lib.evaluation.infilling import UNKNOWN
from lib.evaluation.quality import from_first_gap, reference_nll, sequence_scores
from lib.report.data import ReportData
from lib.runs import STAGES, load_manifest
from lib.sections.sampler import SamplerConfig
from lib.tasks import get_task
from lib.tokenization import UNK, decode_batch, describe_unknown, encode_with_masks
from lib.training.objectives.base import chunks
from lib.user_files.decoding import clean_text


def starting_ids(settings: SamplerConfig, tokenizer: Any, context: int) -> np.ndarray:
    """(T,) ids to start from: all masks, a prompt followed by masks, or a text with its [MASK]s."""
    length = settings.length or context
    blocks_of(length, settings.block_tokens, context)  # refuses what cannot be written
    if settings.infill:
        row = _given(tokenizer, "infill", settings.infill)
        if not (row == tokenizer.mask_token_id).any():
            raise BadConfig(
                "sampler.infill has no [MASK] to fill; write [MASK] once for each token to be written"
            )
        if len(row) > context:
            raise BadConfig(
                f"sampler.infill has {len(row)} tokens, but the generator reads at most {context}"
            )
        return row
    row = np.full(length, tokenizer.mask_token_id, np.int64)
    if settings.prompt:
        given = _given(tokenizer, "prompt", settings.prompt)
        if len(given) >= length:
            raise BadConfig(
                f"sampler.prompt has {len(given)} tokens; with {length} in all nothing is left to write"
            )
        row[: len(given)] = given
    return row


def _given(tokenizer: Any, name: str, text: str) -> np.ndarray:
    """(T,) ids of what a user gave as sampler.<name>, masks where it has [MASK]; line ends are converted as in the data."""
    text, _ = clean_text(text)
    (ids,) = encode_with_masks(tokenizer, [text], "unk")
    if (ids == UNK).any():
        strange = describe_unknown(tokenizer, text.split("[MASK]"))
        raise BadConfig(f"sampler.{name}: {strange}; the generator never saw them: write it without")
    return ids.astype(np.int64)


@dataclass
class Measured:
    """Samples with what the judges say of them, of one length or several."""

    texts: list[str]
    written: list[str]  # the same from the first written character on
    nll: np.ndarray | None  # (B,) nats of those under the reference model
    errors: list[np.ndarray]  # (T,) each: calibrated chance of error
    judged: np.ndarray | None  # (B,) the judge's score
    free: list[np.ndarray]  # (T,) each
    hits: np.ndarray | None  # (B,) written tokens that are the target's
    known: np.ndarray | None  # (B,) written tokens that have a target

    @classmethod
    def of(
        cls, ids: np.ndarray, free: np.ndarray, evaluator: Any, truth: np.ndarray | None = None
    ) -> "Measured":
        tokenizer, runtime = evaluator.tokenizer, evaluator.runtime
        texts, cls_id = decode_batch(tokenizer, ids), tokenizer.cls_token_id
        counted = from_first_gap(free)
        written = decode_batch(tokenizer, [row[c] for row, c in zip(ids, counted, strict=True)])
        nll = None
        if evaluator.reference is not None:
            nll = reference_nll(evaluator.reference, runtime, ids, counted, cls_id)
        errors = [row for p in chunks(len(ids), 64) for row in evaluator.sampler.critic_error(ids[p])]
        judged = None if evaluator.judge is None else sequence_scores(evaluator.judge, runtime, ids, cls_id)
        hits = known = None
        if truth is not None:
            hits, known = (free & (ids == truth)).sum(1), (free & (truth != UNKNOWN)).sum(1)
        return cls(texts, written, nll, errors, judged, list(free), hits, known)

    @classmethod
    def joined(cls, parts: list["Measured"]) -> "Measured":
        """Those of several lengths as one."""

        def together(name: str) -> Any:
            values = [getattr(p, name) for p in parts]
            if isinstance(values[0], list):
                return [v for value in values for v in value]
            return None if values[0] is None else np.concatenate(values)

        return cls(*(together(f.name) for f in fields(cls)))

    def means(self) -> dict[str, Any]:
        accuracy = None
        if self.hits is not None and self.known is not None and self.known.any():
            accuracy = metrics.ratio(self.hits, self.known, limits=metrics.SHARE)._asdict()
        written = [e[f] for e, f in zip(self.errors, self.free, strict=True)]
        return {
            "judge_score": None if self.judged is None else float(self.judged.mean()),
            "critic_error": float(np.concatenate(written).mean()),
            "infill_accuracy": accuracy,
        }


def collect(stage: Stage, config: Config, samples: pa.Table, trace: pa.Table, policies: list[dict],
           best_of: list[dict], evaluator: Any) -> ReportData:  # fmt: skip
    """Everything that the report shows, from this stage and the manifests before it."""
    before = [name for name in STAGES if name != stage.name]  # this one's is of what --overwrite replaces
    manifests = {name: m for name in before if (m := load_manifest(stage.run_dir / name)) is not None}
    curves = {name: _lines(stage.run_dir / "04_train" / name / "metrics.jsonl") for name in config.models}
    curves["critic"] = _lines(stage.run_dir / "05_train_critic" / "metrics.jsonl")
    generator_alone = _lines(stage.run_dir / "02_generate_candidates" / "generator" / "metrics.jsonl")
    if generator_alone:
        curves = {"generator (stage 02)": generator_alone} | curves
    architecture = config.models[config.critic.generator].architecture
    settings = (
        f"data: {config.data.path}, {config.tokenizer.kind} tokens; backbone: {architecture.num_hidden_layers} layers x "
        f"{architecture.hidden_size}, context {architecture.context}; seed {config.seed}"
    )
    return ReportData(
        stage.run_dir.name, settings, manifests, curves, evaluator.results, policies, best_of, samples, trace,
        evaluator.token_text, evaluator.tokenizer.mask_token_id, getattr(get_task(config.task), "explain", None),
    )  # fmt: skip


def _lines(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
