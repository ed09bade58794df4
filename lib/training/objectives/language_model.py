"""`language_model`: masked diffusion for bidirectional models, next-token prediction for causal ones.

Both train on and report nats per token, sum over tokens by number of tokens, so that how a text is cut into windows
changes nothing: the diffusion model its NELBO, the causal one its exact NLL, which reads [CLS] as the beginning so that
the first token counts too. The best step is chosen on the selection windows, the report is on the held-out ones; its
intervals resample whole groups (documents or blocks).
"""

import numpy as np
import torch
from torch import Tensor, nn

from lib import randomness
from lib.diffusion.masking import BatchDraw, corrupt_80_10_10, line_numbers
from lib.diffusion.nelbo import MaskedBatch, mask_batch, weights_per_token
from lib.metrics import Estimate, ratio, sum_by
from lib.runtime import Runtime
from lib.sections.masking import DiffusionConfig, RandomMasking
from lib.training.cross_entropy import cross_entropies
from lib.training.data import Rows, Windows
from lib.training.objectives.base import ResultRow, chunks, forward, result_row, tensor
from lib.training.objectives.modifiers import Masked, Modifiers

EVALUATION_BATCH = 64


class _Language:
    """Windows of the train split by keyed order, and fixed windows to choose the best step by and to report on.

    Args:
        selection: windows of the selection split; an evaluation takes `num_evaluated` of them, the same ones each time.
        held_out: windows side by side, each token of the held-out split in exactly one.
        groups: (held_out.count,) the group of each, any type: what is resampled together for intervals.
        characters_per_token: of held-out text; bits per character compare models of different tokenizers.
    """

    def __init__(
        self, label, train: Windows, selection: Windows, held_out: Windows, groups: np.ndarray, runtime: Runtime, seed,
        batch_size, num_evaluated, characters_per_token: float = 1.0,
    ):  # fmt: skip
        if len(groups) != held_out.count:
            raise ValueError(f"{label}: {len(groups)} groups for {held_out.count} held-out windows")
        self.label, self.train, self.held_out, self.runtime, self.seed = label, train, held_out, runtime, seed
        self.selection_windows, self.groups = selection, np.asarray(groups)
        self.batch_size = batch_size
        self.tokens_per_row = train.width
        self._nats_per_bit = characters_per_token * np.log(2)  # per token and per character
        self._order = Rows(seed, f"{label} order", train.count)
        spread = randomness.permutation(seed, "selection windows", 0, selection.count)
        self._evaluated = np.sort(spread[:num_evaluated])

    def windows(self, rows: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows (B,), ids (B, T), valid (B, T)) of global training rows."""
        index = np.arange(rows.start, rows.stop)
        which, epochs = self._order.samples(index), self._order.epochs(index)
        return index, *self.train.batch(
            which, self.train.places(self.seed, f"{self.label} window", which, epochs)
        )

    def rows(self, metric: str, nats: Estimate, unigram: float) -> tuple[float, list[ResultRow]]:
        """(bits per character, rows of the results table) of nats per token; in both units if tokens are no characters."""
        found = [
            result_row(self.label, f"{metric}, nats/token", nats, "unigram", unigram, lower_is_better=True)
        ]
        bits = Estimate(*(value / self._nats_per_bit for value in nats))
        if self._nats_per_bit != np.log(2):
            constant = unigram / self._nats_per_bit
            found.append(
                result_row(
                    self.label, f"{metric}, bits/character", bits, "unigram", constant, lower_is_better=True
                )
            )
        return bits.value, found

    def estimate(self, nats: np.ndarray, tokens: np.ndarray) -> Estimate:
        """Nats per token of all held-out windows from the (W,) nats and tokens of each; groups are resampled."""
        nats, tokens = sum_by(self.groups, nats, tokens)  # (G,) each
        return ratio(nats, tokens)

    def unigram_nll(self) -> float:
        """Nats per token of held-out text under the train split's token frequencies: the constant baseline."""
        size = int(max(self.train.ids.max(), self.held_out.ids.max())) + 1
        counts = np.bincount(self.train.ids, minlength=size) + 1.0
        share = np.bincount(self.held_out.ids, minlength=size) / len(self.held_out.ids)
        return float(-(share * np.log(counts / counts.sum())).sum())


class MaskedDiffusion(_Language):
    selection = "nelbo"

    """
    Args:
        newline_ids: tokens that end a line, for masking by lines.
        text_ids: tokens that are no special ones, for corruption as BERT's.
    """

    def __init__(
        self, config: DiffusionConfig, mask_id: int, *args, newline_ids: np.ndarray | None = None,
        text_ids: np.ndarray | None = None, modifiers: Modifiers | None = None, **kwargs,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        self.config, self.mask_id = config, mask_id
        by_lines = "line" in {config.masking.type, *(stage.type for stage in config.stages)}
        self.newline_ids = newline_ids if by_lines else None
        self.text_ids = text_ids if text_ids is not None else np.empty(0, int)
        self.modifiers = modifiers
        # Evaluation is the true bound whatever the training draws.
        plain = {"weight": "exact_count", "min_masked_ratio": 0.0, "masking": RandomMasking(type="random")}
        self._bound = config.model_copy(update=plain)

    def mask(
        self, ids: np.ndarray, valid: np.ndarray, purpose: str, rows: np.ndarray, period: int
    ) -> MaskedBatch:
        """Masks for (B, T) ids as training draws them."""
        return mask_batch(self.config, valid, BatchDraw(self.seed, purpose, rows, period), self.lines_of(ids))

    def lines_of(self, ids: np.ndarray) -> np.ndarray | None:
        """(B, T) the line of each token, None where nothing masks by lines."""
        return None if self.newline_ids is None else line_numbers(np.isin(ids, self.newline_ids))

    def loss(self, model: nn.Module, step: int, rows: range) -> dict[str, Tensor]:
        """The NELBO estimate of the batch, nats per token, if masks are drawn for it: every token counts the same."""
        index, ids, valid = self.windows(rows)
        purpose = f"{self.label} diffusion"
        batch = self.mask(ids, valid, purpose, index, self.batch_size)
        inputs = None
        if self.config.corruption == "bert":
            inputs = corrupt_80_10_10(
                ids, batch.masked, self.mask_id, self.text_ids, BatchDraw(self.seed, purpose, index)
            )
        logits, targets, at = self._logits(model, ids, valid, batch, inputs)
        ce = cross_entropies(logits, targets)
        weights = tensor(weights_per_token(batch, valid).reshape(-1)[at], self.runtime)
        if self.modifiers is None:
            return {"loss": (ce * weights).sum()}
        row = tensor(at // ids.shape[1], self.runtime)
        masked = Masked(logits, targets, row, ids, valid, at, batch.ratios, index)
        modified, row_weights, terms = self.modifiers.apply(ce, masked, step)
        loss = (modified * weights * row_weights[row]).sum()
        return {"loss": loss, "plain_loss": (ce.detach() * weights).sum(), **terms}

    def cross_entropies(self, model, ids, valid, batch: MaskedBatch) -> tuple[Tensor, np.ndarray]:
        """((N,) cross-entropies at the masked positions, (N,) flat indices of those)."""
        logits, targets, at = self._logits(model, ids, valid, batch)
        return cross_entropies(logits, targets), at

    def _logits(
        self, model, ids, valid, batch: MaskedBatch, inputs: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor, np.ndarray]:
        """((N, V) logits at the masked positions and nowhere else, (N,) targets, (N,) flat indices).

        `inputs`: what the model reads, if that is not [MASK] at all of them.
        """
        at = np.flatnonzero(batch.masked)
        inputs = np.where(batch.masked, self.mask_id, ids) if inputs is None else inputs
        logits = forward(
            model, self.runtime, inputs, valid, logits_at=tensor(at, self.runtime)
        ).logits  # (N, V)
        return logits, tensor(ids.reshape(-1)[at], self.runtime), at

    def window_nelbos(
        self, model: nn.Module, windows: Windows, examples: np.ndarray, draws: int = 1
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """((R,) NELBO of each window in nats, (R,) its tokens, (R,) right guesses, (R,) masked tokens), R = draws x
        examples, the examples running faster."""
        nats, tokens, hits, masked = [], [], [], []
        total = np.tile(examples, draws)
        for part in chunks(len(total), EVALUATION_BATCH):
            ids, valid = windows.batch(total[part], np.zeros(len(part)))
            batch = mask_batch(
                self._bound,
                valid,
                BatchDraw(self.seed, purpose="evaluation", rows=part, period=EVALUATION_BATCH),
            )
            logits, targets, at = self._logits(model, ids, valid, batch)
            ce = cross_entropies(logits, targets).cpu().numpy()
            hit = (logits.argmax(-1) == targets).cpu().numpy()
            row = at // ids.shape[1]
            size, lengths = len(part), valid.sum(1)
            nats.append(lengths * np.bincount(row, ce * batch.weights.reshape(-1)[at], size))
            tokens.append(lengths)
            hits.append(np.bincount(row, hit, size))
            masked.append(batch.masked.sum(1))
        nats, tokens, hits, masked = (np.concatenate(x) for x in (nats, tokens, hits, masked))
        return nats, tokens, hits, masked

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        nats, tokens, hits, masked = self.window_nelbos(model, self.selection_windows, self._evaluated)
        return {
            "nelbo": float(nats.sum() / tokens.sum()),
            "masked_accuracy": float(hits.sum() / masked.sum()),
        }

    def report(self, model: nn.Module) -> tuple[dict[str, float], list[ResultRow]]:
        """Held-out NELBO with four mask draws per window, accuracy on masked tokens, and the same on train text.

        `nelbo_half_width` is that of the 95 % interval.
        """
        examples = np.arange(self.held_out.count)
        nats, tokens, hits, masked = self.window_nelbos(model, self.held_out, examples, draws=4)
        train = self.train.tiled()
        seen = np.sort(randomness.permutation(self.seed, "train windows", 0, train.count)[: len(examples)])
        train_nats, train_tokens, train_hits, train_masked = self.window_nelbos(model, train, seen)
        nelbo = self.estimate(nats.reshape(4, -1).mean(0), tokens.reshape(4, -1)[0])
        unigram = self.unigram_nll()
        metrics = {
            "nelbo": nelbo.value,
            "nelbo_half_width": nelbo.half_width,
            "masked_accuracy": float(hits.sum() / masked.sum()),
            "train_nelbo": float(train_nats.sum() / train_tokens.sum()),
            "train_masked_accuracy": float(train_hits.sum() / train_masked.sum()),
            "unigram_nll": unigram,
        }
        metrics["bits_per_character"], rows = self.rows("NELBO", nelbo, unigram)
        return metrics, rows


class NextToken(_Language):
    """The ordinary causal language model."""

    selection = "nll"

    def __init__(self, cls_id: int, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.cls_id = cls_id

    def loss(self, model: nn.Module, step: int, rows: range) -> dict[str, Tensor]:
        _, ids, valid = self.windows(rows)
        nll, mask = self.token_nll(model, ids, valid)
        return {"loss": (nll * mask).sum() / mask.sum()}

    def token_nll(self, model: nn.Module, ids: np.ndarray, valid: np.ndarray) -> tuple[Tensor, Tensor]:
        """((B, T) nats of every token given [CLS] and those before it, (B, T) float validity)."""
        return causal_nll(model, self.runtime, ids, valid, self.cls_id)

    def window_nlls(
        self, model: nn.Module, windows: Windows, examples: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """((R,) nats of each window, (R,) its tokens)."""
        sums, counts = [], []
        for part in chunks(len(examples), EVALUATION_BATCH):
            ids, valid = windows.batch(examples[part], np.zeros(len(part)))
            nll, mask = self.token_nll(model, ids, valid)
            sums.append((nll * mask).sum(1).cpu().numpy())
            counts.append(valid.sum(1))
        return np.concatenate(sums), np.concatenate(counts)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        sums, counts = self.window_nlls(model, self.selection_windows, self._evaluated)
        return {"nll": float(sums.sum() / counts.sum())}

    def report(self, model: nn.Module) -> tuple[dict[str, float], list[ResultRow]]:
        """Held-out NLL; `nll_half_width` is that of the 95 % interval."""
        nll = self.estimate(*self.window_nlls(model, self.held_out, np.arange(self.held_out.count)))
        unigram = self.unigram_nll()
        metrics = {"nll": nll.value, "nll_half_width": nll.half_width, "unigram_nll": unigram}
        metrics["bits_per_character"], rows = self.rows("NLL", nll, unigram)
        return metrics, rows


def causal_nll(
    model, runtime: Runtime, ids: np.ndarray, valid: np.ndarray, cls_id: int
) -> tuple[Tensor, Tensor]:
    """((B, T) nats per token of a causal model, (B, T) validity): every token counts, the first given [CLS]."""
    inputs = np.concatenate([np.full_like(ids[:, :1], cls_id), ids[:, :-1]], 1)
    seen = np.concatenate([np.ones_like(valid[:, :1]), valid[:, :-1]], 1)
    # Without use_cache=False an evaluating model would keep keys and values that nobody asks for
    logits = forward(model, runtime, inputs, seen, use_cache=False).logits  # (B, T, V)
    nll = cross_entropies(logits.flatten(0, 1), tensor(ids, runtime).flatten())
    return nll.view(ids.shape), tensor(valid, runtime).to(torch.float32)
