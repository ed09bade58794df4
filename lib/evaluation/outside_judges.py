"""Judge the samples of a finished run by models that are no part of it, beside the run's own reference model.

python -m lib.evaluation.outside_judges outputs/run_001 --causal_lm FOLDER --mauve_encoder FOLDER --trigram

    causal LM   nats per character under any causal LM of transformers, in a folder
    trigram     nats per word under the English trigram model in the package pocketsphinx (pip install pocketsphinx). A word that
                it does not know counts UNKNOWN_NATS
    MAUVE       how close samples and held-out text lie in the space of any encoder (Pillutla et al., 2021); 1: the same. It
                depends on the number of texts, which the table states, and falls with it

Real text is judged, too: as many pieces as there are samples, from one half of the held-out documents. The other half is the
reference of MAUVE. The autoregressive baseline is not judged, because stage 06 does not store its samples.

Legend: N texts, T tokens, D hidden size, K clusters.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib import durable, metrics, randomness, schema
from lib.errors import BadConfig, BadData, MissingInput, RemaskError
from lib.evaluation.quality import words_of
from lib.log import Progress
from lib.report.table import has_interval, interval_text, value_text
from lib.runs import load_manifest

UNKNOWN_NATS = math.log(1e7)  # of a word outside the vocabulary of the trigram model
BATCH = 32
MAUVE_SCALE = 5.0  # of the divergences, as in the paper
MIN_TEXTS = 20  # fewer make MAUVE meaningless
REAL_TEXT = "real text"  # the row of held-out text


@dataclass(frozen=True)
class CausalJudge:
    """A causal LM of transformers from a folder."""

    model: Any
    tokenizer: Any

    @classmethod
    def open(cls, folder: Path) -> "CausalJudge":
        """Raises MissingInput or BadData."""
        from transformers import AutoModelForCausalLM

        from lib.models.backbones import is_causal_backbone, require_model_files
        from lib.models.encoders import open_tokenizer

        require_model_files(folder)
        tokenizer = open_tokenizer(folder)
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
            )
            model, report = loaded
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise BadData(f"--causal_lm {folder} is no causal LM: {str(error).splitlines()[0]}") from None
        if missing := sorted(report["missing_keys"]):
            raise BadData(
                f"--causal_lm {folder} lacks {len(missing)} tensors of {type(model).__name__}, such as {missing[0]}; give a language "
                "model with its head, not a classifier or a reward model"
            )
        if not is_causal_backbone(model):
            raise BadData(
                f"--causal_lm {folder}: {type(model).__name__} is bidirectional and sees the token that it scores"
            )
        return cls(model.eval(), tokenizer)

    @torch.no_grad()
    def nats(self, texts: Sequence[str]) -> np.ndarray:
        """(N,) nats of each text. The first token is read behind the token that begins or ends texts, if there is one.

        Raises BadData for a text that is longer than the model can read.
        """
        from lib.models.backbones import longest_input

        front = (
            self.tokenizer.bos_token_id
            if self.tokenizer.bos_token_id is not None
            else self.tokenizer.eos_token_id
        )
        found = np.zeros(len(texts))
        for start in range(0, len(texts), BATCH):
            rows = self.tokenizer(list(texts[start : start + BATCH]), add_special_tokens=False)["input_ids"]
            rows = [([] if front is None else [front]) + list(row) for row in rows]
            width = max(2, *(len(row) for row in rows))
            if (longest := longest_input(self.model)) is not None and width > longest:
                raise BadData(
                    f"--causal_lm reads {longest:,} tokens at most, but a text has {width:,} of its tokens; give a model with a longer "
                    "context"
                )
            pad = self.tokenizer.pad_token_id
            ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
            valid = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
            logits = self.model(input_ids=ids, attention_mask=valid.long()).logits[:, :-1].float()
            each = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            )
            found[start : start + len(rows)] = (
                (each.view(len(rows), -1) * valid[:, 1:]).sum(1).double().numpy()
            )
        return found


def trigram_nats(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """((N,) nats, (N,) words, (N,) unknown words) under the English trigram model of pocketsphinx.

    Raises BadConfig if the package is not installed.
    """
    try:
        from pocketsphinx import LogMath, NGramModel, get_model_path  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise BadConfig("--trigram needs the package pocketsphinx; run pip install pocketsphinx") from None
    model = NGramModel.readfile(os.path.join(get_model_path("en-us"), "en-us.lm.bin"))
    unit = math.log(LogMath().get_base()) if hasattr(LogMath(), "get_base") else math.log(1.0001)
    result = np.zeros((3, len(texts)))
    for n, text in enumerate(texts):
        words = words_of(text)
        for i, word in enumerate(words):
            history = words[max(0, i - 2) : i][::-1]  # the latest word first
            value = model.prob([word, *history]) * unit
            unknown = model.prob([word]) * unit < -UNKNOWN_NATS
            result[:, n] += UNKNOWN_NATS if unknown else min(-value, UNKNOWN_NATS), 1, unknown
    return result[0], result[1], result[2]


# ------------------------------------------------------------------------------------------------------ MAUVE


@torch.no_grad()
def embed(folder: Path, texts: Sequence[str]) -> np.ndarray:
    """(N, D) mean hidden state of each text under an encoder. Raises MissingInput or BadData."""
    from lib.models.backbones import longest_input
    from lib.models.encoders import open_encoder

    encoder, tokenizer = open_encoder(folder)
    encoder.eval()
    longest, found = longest_input(encoder) or 512, []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(
            list(texts[start : start + BATCH]),
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        states = encoder(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
        weights = batch["attention_mask"][..., None].float()
        found.append(((states * weights).sum(1) / weights.sum(1)).double().numpy())
    return np.concatenate(found)


def mauve(one: np.ndarray, other: np.ndarray, seed: int = 0) -> float:
    """MAUVE of two sets of vectors (N, D) and (M, D): the area under the frontier of their divergences, in (0, 1].

    The vectors are divided into K clusters together, K a tenth of their number, and the shares of the clusters compared.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import normalize

    vectors: Any = normalize(np.concatenate([one, other]))
    components = min(50, *vectors.shape)
    vectors = PCA(components, random_state=seed).fit_transform(vectors)
    clusters = max(2, min(500, min(len(one), len(other)) // 10))
    starts: Any = 5
    labels = KMeans(clusters, n_init=starts, random_state=seed).fit_predict(vectors)
    p, q = (np.bincount(part, minlength=clusters) / len(part) for part in np.split(labels, [len(one)]))
    return frontier_area(p, q)


def frontier_area(p: np.ndarray, q: np.ndarray, points: int = 25) -> float:
    """Area under the divergence frontier of two distributions (K,)."""
    weights = np.linspace(1e-6, 1 - 1e-6, points)
    mixtures = [w * p + (1 - w) * q for w in weights]
    curve = [(0.0, 1.0), *((_similarity(q, r), _similarity(p, r)) for r in mixtures), (1.0, 0.0)]
    x, y = np.array(sorted(curve, key=lambda point: (point[0], -point[1]))).T
    return float(np.trapezoid(y, x))


def _similarity(p: np.ndarray, r: np.ndarray) -> float:
    """exp(-c KL(p || r))."""
    some = p > 0
    return float(np.exp(-MAUVE_SCALE * (p[some] * np.log(p[some] / r[some])).sum()))


# ------------------------------------------------------------------------------------------------- a finished run


def texts_of_run(
    run: Path,
) -> tuple[dict[str, list[str]], dict[str, dict | None], list[tuple[str, str]]]:
    """(name -> samples, name -> NLL under the run's own reference model, held-out texts with their groups).

    A name is a policy with its number of forward passes, or `REAL_TEXT`. Raises MissingInput if stage 06 is not complete.
    """
    import pyarrow.parquet as pq

    manifest = load_manifest(run / "06_sample")
    if manifest is not None and "report" in manifest["outputs"] and "samples" not in manifest["outputs"]:
        raise BadData(
            f"{run}: stage 06 made no samples there; runs with critic.method token_critic make some"
        )
    if manifest is None or "samples" not in manifest["outputs"]:
        raise MissingInput(f"{run} has no complete stage 06; run 06_sample.py --run_dir {run}")
    table = pq.read_table(
        run / "06_sample" / manifest["outputs"]["samples"]["path"], columns=["policy", "nfe", "text"]
    )
    samples: dict[str, list[str]] = {}
    for row in table.to_pylist():
        samples.setdefault(f"{row['policy']}, {row['nfe']}", []).append(row["text"])
    own = {
        row["policy"] if row["policy"] == REAL_TEXT else f"{row['policy']}, {row['nfe']}": row.get(
            "reference_nll"
        )
        for row in manifest["stats"]["policies"]
    }
    prepared = load_manifest(run / "01_prepare_dataset")
    assert prepared is not None
    examples = pq.read_table(
        run / "01_prepare_dataset" / prepared["outputs"]["examples"]["path"], schema=schema.EXAMPLES.arrow,
        columns=["target", "split", "group"],
    )  # fmt: skip
    real = [(row["target"], row["group"]) for row in examples.to_pylist() if row["split"] == "held_out"]
    return samples, own, real


def halves(texts: Sequence[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The (text, group) pairs in two halves, every other group. Halves that share a document would be alike."""
    number = {group: i for i, group in enumerate(dict.fromkeys(group for _, group in texts))}
    even, odd = ([pair for pair in texts if number[pair[1]] % 2 == half] for half in (0, 1))
    return even, odd


def pieces(texts: Sequence[tuple[str, str]], length: int) -> tuple[list[str], np.ndarray]:
    """((text, group) pairs, joined and cut into pieces of `length` characters; the group in which each piece begins)."""
    joined = " ".join(text for text, _ in texts)
    starts = np.arange(0, len(joined) - length + 1, length)
    first = np.cumsum([0, *(len(text) + 1 for text, _ in texts)])[:-1]
    owner = np.searchsorted(first, starts, side="right") - 1
    return [joined[start : start + length] for start in starts], np.array([g for _, g in texts])[owner]


def judge(run: Path, causal_lm: Path | None, trigram: bool, encoder: Path | None) -> list[dict[str, Any]]:
    """A row for each policy and budget of a run, and one for real text, with what every judge says."""
    samples, own, real = texts_of_run(run)
    lengths = [len(text) for texts in samples.values() for text in texts]
    length, count = max(1, int(np.median(lengths))), max(map(len, samples.values()))
    judged, others = halves(real)
    (first, documents), (reference, _) = pieces(judged, length), pieces(others, length)
    # As many texts as samples, since MAUVE depends on their number
    some = randomness.sample(0, "real text beside samples", len(first), count)
    sets = {name: (texts, np.arange(len(texts))) for name, texts in samples.items()}
    sets[REAL_TEXT] = [first[i] for i in some], documents[some]
    scorer = None if causal_lm is None else CausalJudge.open(causal_lm)
    vectors = None if encoder is None or len(reference) < MIN_TEXTS else embed(encoder, reference)
    rows = []
    with Progress("judging", len(sets)) as progress:
        for number, (name, (texts, groups)) in enumerate(sets.items(), start=1):
            row: dict[str, Any] = {"name": name, "samples": len(texts), "reference_nll": own.get(name)}
            if scorer is not None:
                total, size = metrics.sum_by(groups, scorer.nats(texts), _sizes(texts, len))
                row["causal_nll"] = metrics.ratio(total, size)._asdict()
            if trigram:
                nats, words, unknown = trigram_nats(texts)
                total, size = metrics.sum_by(groups, nats, words)
                row["trigram_nll"] = metrics.ratio(total, size)._asdict() if words.sum() else None
                row["unknown_words"] = float(unknown.sum() / max(words.sum(), 1))
            if encoder is not None:
                row["mauve"] = None
                if vectors is not None and len(texts) >= MIN_TEXTS:
                    row["mauve"] = mauve(embed(encoder, texts), vectors)
                row["mauve_references"] = len(reference)
            rows.append(row)
            progress.update(number)
    return rows


def _sizes(texts: Sequence[str], size: Callable[[str], int]) -> np.ndarray:
    return np.array([size(text) for text in texts], float)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    names = {"reference_nll": "run's reference, nats/char", "causal_nll": "causal LM, nats/char", "trigram_nll": "trigram, nats/word",
             "unknown_words": "unknown words", "mauve": "MAUVE", "mauve_references": "its references"}  # fmt: skip
    used = {key: name for key, name in names.items() if any(key in row for row in rows)}

    def cell(value: Any) -> str:
        if isinstance(value, dict):
            ends = f" ({interval_text(value)})" if has_interval(value) else ""
            return value_text(value["value"]) + ends
        return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [["samples of", "number", *used.values()]]
    lines += [[row["name"], str(row["samples"]), *(cell(row.get(key)) for key in used)] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.evaluation.outside_judges", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("run_dir", type=Path, help="a finished run, such as outputs/run_001")
    parser.add_argument("--causal_lm", type=Path, help="folder of a causal LM")
    parser.add_argument("--trigram", action="store_true", help="judge by the trigram model of pocketsphinx")
    parser.add_argument("--mauve_encoder", type=Path, help="folder of an encoder, such as all-MiniLM-L6-v2")
    parser.add_argument("--out", type=Path, help="file for the rows as JSON")
    options = parser.parse_args()
    try:
        if options.causal_lm is None and options.mauve_encoder is None and not options.trigram:
            raise BadConfig("give at least one of --causal_lm, --trigram and --mauve_encoder")
        rows = judge(options.run_dir, options.causal_lm, options.trigram, options.mauve_encoder)
    except RemaskError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.out is not None:
        durable.write_text(options.out, json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
