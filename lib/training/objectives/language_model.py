"""`language_model` of bidirectional models: masked diffusion.

Training masks a part of each window of text and learns to predict the masked tokens (Sahoo et al., MDLM, 2024; Nie et
al., LLaDA, 2025). The loss estimates the NELBO, a bound on the negative log-likelihood, see `lib/diffusion/nelbo.py`.
It is in nats per token, over all tokens; each token counts once, so short windows weigh less than long ones.

    MaskedDiffusion.part      one training step, in numbered steps
    MaskedDiffusion.evaluate  NELBO on the selection split, which chooses the best step
    MaskedDiffusion.report    NELBO on the held-out split, with an interval over groups (documents or blocks)

`WindowObjective` is what masked diffusion shares with next-token prediction (`next_token.py`).

Legend: B rows, T positions, N masked positions of a batch, V vocabulary, W windows, G groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from lib import randomness
from lib.diffusion.masking import BatchDraw, corrupt_80_10_10, line_numbers
from lib.diffusion.nelbo import MaskedBatch, mask_batch, weights_per_token
from lib.engine.parts import Part
from lib.metrics import Estimate, ratio, sum_by
from lib.sections.masking import DiffusionConfig, RandomMasking, UniformRatios
from lib.token_store import TokenStore
from lib.tokenization import forbidden_ids, newline_ids, num_ids
from lib.training.cross_entropy import cross_entropies
from lib.training.data import Rows, Splits, Windows
from lib.training.objectives.base import (
    ResultRow,
    TrainingContext,
    chunks,
    evaluation_rows,
    forward,
    result_row,
    some_of,
    tensor,
)
from lib.training.objectives.modifiers import MaskedPredictions, Modifiers

EVALUATION_BATCH = 64  # also the number of rows over which evaluation spreads the masking ratios evenly
REPORT_DRAWS = 4  # masks per held-out window
BANDS = 5  # of the masked share, for the report
MAX_REPORTED_WINDOWS = (
    2**16
)  # a report reads at most this number of held-out windows; more hardly narrow its interval


@dataclass(frozen=True)
class WindowSplits(Splits[Windows]):
    """Windows of text to learn from, to choose the best step by, and to report on; the last two are tiled.

    Attributes:
        groups: group of each held-out window, of any type, by `groups[windows]`. Intervals resample whole groups.
        characters_per_token: of the held-out text. Bits per character compare models of different tokenizers.
    """

    groups: "np.ndarray | WindowGroups"
    characters_per_token: float = 1.0

    @classmethod
    def of(cls, texts: Splits[TokenStore], width: int, pad_id: int) -> "WindowSplits":
        """Windows of at most `width` tokens of three token stores."""
        train, selection, held_out = (
            Windows(text, width, pad_id) for text in (texts.train, texts.selection, texts.held_out)
        )
        tiles = held_out.tiled()
        characters = texts.held_out.characters / max(texts.held_out.num_tokens, 1)
        return cls(train, selection.tiled(), tiles, WindowGroups(tiles), characters)


@dataclass(frozen=True)
class WindowGroups:
    """The groups of tiled windows by their indices, as numbers in the order of the groups' names."""

    tiles: Windows

    def __len__(self) -> int:
        return self.tiles.count

    def __getitem__(self, windows: np.ndarray) -> np.ndarray:
        return self.tiles.groups(windows)


@dataclass(frozen=True)
class MaskingTokens:
    """Ids that masking needs.

    Attributes:
        mask_id: [MASK].
        text_ids: ids that are not special tokens, for random replacements (`diffusion.corruption: bert`).
        newline_ids: tokens that end a line, for masking of type `line`; None if the tokenizer has none.
    """

    mask_id: int
    text_ids: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    newline_ids: np.ndarray | None = None

    @classmethod
    def of(cls, tokenizer: Any) -> "MaskingTokens":
        text_ids = np.setdiff1d(np.arange(num_ids(tokenizer)), forbidden_ids(tokenizer))
        return cls(tokenizer.mask_token_id, text_ids, newline_ids(tokenizer))


class WindowObjective:
    """Batches of windows in a keyed order, and the figures that language models report.

    Attributes:
        evaluated: indices of the selection windows that every evaluation reads, the same each time.
        reported: indices of the held-out windows that reports read: all, or `MAX_REPORTED_WINDOWS` of them.
    """

    def __init__(self, context: TrainingContext, splits: WindowSplits):
        label, seed = context.label, context.seed
        if len(splits.groups) != splits.held_out.count:
            raise ValueError(
                f"{label}: {len(splits.groups)} groups for {splits.held_out.count} held-out windows"
            )
        self.label, self.seed, self.runtime, self.splits = label, seed, context.runtime, splits
        self.batch_size = context.settings.batch_size
        self.tokens_per_row = splits.train.width
        self._nats_per_bit = splits.characters_per_token * np.log(2)  # (nats / token) / (bits / character)
        self._order = Rows(seed, f"{label} order", splits.train.count)
        self.evaluated = randomness.sample(
            seed, "selection windows", splits.selection.count, context.settings.evaluation_examples
        )
        self.reported = some_of(seed, label, "held-out windows", splits.held_out.count, MAX_REPORTED_WINDOWS)

    def windows(self, rows: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """((B,) row numbers, (B, T) ids, (B, T) validity) of global training rows."""
        index = np.arange(rows.start, rows.stop)
        samples, epochs = self._order.samples(index), self._order.epochs(index)
        cuts = self.splits.train.cut_positions(self.seed, f"{self.label} window", samples, epochs)
        return index, *self.splits.train.batch(samples, cuts)

    def estimate(self, nats: np.ndarray, tokens: np.ndarray) -> Estimate:
        """Nats per token over the `reported` windows, from (W,) nats and (W,) tokens of each."""
        nats, tokens = sum_by(self.splits.groups[self.reported], nats, tokens)  # (G,) each
        return ratio(nats, tokens)

    def unigram_nll(self) -> float:
        """Nats per token of held-out text under the token frequencies of the train split: the trivial baseline."""
        train, held_out = self.splits.train.text.counts, self.splits.held_out.text.counts
        size = int(max(np.flatnonzero(counts)[-1] for counts in (train, held_out))) + 1
        counts, share = np.ones(size), np.zeros(size)
        counts[: len(train)] += train[:size]
        share[: len(held_out)] += held_out[:size] / held_out.sum()
        return float(-(share * np.log(counts / counts.sum())).sum())

    def result_rows(self, metric: str, nats: Estimate, unigram: float) -> tuple[float, list[ResultRow]]:
        """(bits per character, rows of the results table) of nats per token.

        The table has both units, unless every token is one character.
        """
        rows = [
            result_row(self.label, f"{metric}, nats/token", nats, "unigram", unigram, lower_is_better=True)
        ]
        bits = Estimate(*(value / self._nats_per_bit for value in nats))
        if self._nats_per_bit != np.log(2):
            baseline, name = unigram / self._nats_per_bit, f"{metric}, bits/character"
            rows.append(result_row(self.label, name, bits, "unigram", baseline, lower_is_better=True))
        return bits.value, rows


class MaskedDiffusion(WindowObjective):
    """Masked diffusion over windows of text.

    Args:
        config: how training masks and weights. Evaluation and report always measure the NELBO itself.
        tokens: ids that masking needs.
        modifiers: changes of the training loss, see `modifiers.py`.
    """

    selection = "nelbo"
    draws_ahead = True

    def __init__(
        self,
        context: TrainingContext,
        splits: WindowSplits,
        config: DiffusionConfig,
        tokens: MaskingTokens,
        modifiers: Modifiers | None = None,
    ):
        super().__init__(context, splits)
        self.config, self.modifiers = config, modifiers
        self.mask_id, self.text_ids = tokens.mask_id, tokens.text_ids
        by_lines = "line" in {config.masking.type, *(stage.type for stage in config.stages)}
        self.newline_ids = tokens.newline_ids if by_lines else None
        self._steps = context.settings.steps
        bound = {"weight": "exact_count", "min_masked_ratio": 0.0, "masking": RandomMasking(type="random"),
                 "ratios": UniformRatios(type="uniform")}  # fmt: skip
        self._bound_config = config.model_copy(update=bound)
        self._fill_config = config.model_copy(update={"ratios": UniformRatios(type="uniform")})

    # ------------------------------------------------------------------ training

    def part(self, model: nn.Module, step: int, rows: range) -> Part:
        """The training loss of some rows of the global batch, in nats per token of the batch.

        It estimates the NELBO if masks are of type `random` and no modifier is configured.
        """
        # 1. Take the windows of the rows: B rows of at most T tokens
        index, ids, valid = self.windows(rows)  # (B,), (B, T), (B, T)
        purpose = f"{self.label} diffusion"

        # 2. Draw a masking ratio for each row, spread evenly over the batch (`nelbo.stratified`)
        # 3. Mask that share of the row's tokens (`masking.draw_mask`): masks and weights (B, T), ratios (B,)
        batch = self.mask(ids, valid, purpose, index, self.batch_size)

        # 4. What the model reads: [MASK] at the masked positions, or BERT's mixture of [MASK], random and clean tokens
        if self.config.corruption == "bert":
            inputs = corrupt_80_10_10(
                ids, batch.masked, self.mask_id, self.text_ids, BatchDraw(self.seed, purpose, index)
            )
        else:
            inputs = np.where(batch.masked, self.mask_id, ids)  # (B, T)

        def losses(totals: Mapping[str, float]) -> dict[str, Tensor]:
            # 5. Forward pass, with logits at the masked positions only: (N, V), (N,), (N,)
            logits, targets, flat_idx = self.predict(model, inputs, ids, valid, batch.masked)

            # 6. Cross-entropy of the clean tokens
            ce = cross_entropies(logits, targets)  # (N,) nats

            # 7. Weights of the bound, so that the sum over all parts is in nats per token of the global batch
            per_token = weights_per_token(batch, valid, totals["tokens"])  # (B, T)
            weights = tensor(per_token.reshape(-1)[flat_idx], self.runtime)  # (N,)
            if self.modifiers is None:
                return {"loss": (ce * weights).sum()}

            # 8. Optional modifiers: other targets, and a weight for each row
            row_idx = tensor(flat_idx // ids.shape[1], self.runtime)  # (N,)
            predictions = MaskedPredictions(
                logits, targets, row_idx, ids, valid, flat_idx, batch.ratios, index
            )
            modified, row_weights, terms = self.modifiers.apply(ce, predictions, step)  # (N,), (B,)
            terms = {name: values.sum() / totals["rows"] for name, values in terms.items()}
            loss = (modified * weights * row_weights[row_idx]).sum()
            return {"loss": loss, "plain_loss": (ce.detach() * weights).sum(), **terms}

        return Part({"tokens": int(valid.sum()), "rows": len(index)}, losses)

    @property
    def scales(self) -> bool:
        return self.modifiers is not None

    def finish(self, terms: dict[str, float]) -> tuple[dict[str, float], float]:
        """Scale the row weights of the modifiers to mean 1 over the global batch."""
        return (terms, 1.0) if self.modifiers is None else self.modifiers.finish(terms)

    def mask(
        self, ids: np.ndarray, valid: np.ndarray, purpose: str, rows: np.ndarray, period: int
    ) -> MaskedBatch:
        """Masks and weights for (B, T) ids, as training draws them.

        Args:
            purpose, rows: key of the draw; the mask of a row depends on its number in `rows` alone.
            period: the masking ratios are spread evenly over this many consecutive rows.
        """
        draw = BatchDraw(self.seed, purpose, rows, period)
        return mask_batch(self.config, valid, draw, self.lines_of(ids), rows // period / self._steps)

    def mask_to_fill(
        self, ids: np.ndarray, valid: np.ndarray, purpose: str, rows: np.ndarray, period: int
    ) -> MaskedBatch:
        """As `mask`, with uniform masking ratios: for text that is filled, which sampling starts from any ratio."""
        draw = BatchDraw(self.seed, purpose, rows, period)
        return mask_batch(self._fill_config, valid, draw, self.lines_of(ids))

    def lines_of(self, ids: np.ndarray) -> np.ndarray | None:
        """(B, T) line number of each token; None if no masking is of type `line`."""
        return None if self.newline_ids is None else line_numbers(np.isin(ids, self.newline_ids))

    def predict(
        self, model: nn.Module, inputs: np.ndarray, ids: np.ndarray, valid: np.ndarray, masked: np.ndarray
    ) -> tuple[Tensor, Tensor, np.ndarray]:
        """One forward pass over (B, T) `inputs`.

        Returns:
            (N, V) logits at the masked positions and nowhere else, (N,) clean tokens there, and the (N,) indices of
            these positions in the flattened (B, T) batch.
        """
        flat_idx = np.flatnonzero(masked)
        output = forward(model, self.runtime, inputs, valid, logits_at=tensor(flat_idx, self.runtime))
        return output.logits, tensor(ids.reshape(-1)[flat_idx], self.runtime), flat_idx

    # ------------------------------------------------------------------ evaluation and report

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """NELBO, and accuracy on masked tokens, of the `evaluated` selection windows, one mask each."""
        found = self.window_nelbos(model, self.splits.selection, self.evaluated)
        return {
            "nelbo": float(found.nats.sum() / found.tokens.sum()),
            "masked_accuracy": float(found.correct.sum() / found.masked.sum()),
        }

    def report(self, model: nn.Module) -> tuple[dict[str, float], list[ResultRow]]:
        """NELBO of the `reported` windows, `REPORT_DRAWS` masks each, and of as many windows of the train split.

        `nelbo_half_width` is the half-width of the 95 % interval. `nelbo_masked_20` is the mean over masks of at most 20 % of
        a window, `nelbo_masked_40` over masks of 20 to 40 %, and so on. The NELBO is the mean over all shares.
        """
        found = self.window_nelbos(model, self.splits.held_out, self.reported, REPORT_DRAWS)
        train = self.splits.train.tiled()
        sample = randomness.sample(self.seed, "train windows", train.count, len(self.reported))
        on_train = self.window_nelbos(model, train, sample)
        nats = found.nats.reshape(REPORT_DRAWS, -1).mean(0)  # (W,)
        nelbo = self.estimate(nats, found.tokens.reshape(REPORT_DRAWS, -1)[0])
        unigram = self.unigram_nll()
        metrics = {
            "nelbo": nelbo.value,
            "nelbo_half_width": nelbo.half_width,
            "masked_accuracy": float(found.correct.sum() / found.masked.sum()),
            "train_nelbo": float(on_train.nats.sum() / on_train.tokens.sum()),
            "train_masked_accuracy": float(on_train.correct.sum() / on_train.masked.sum()),
            "unigram_nll": unigram,
            **found.by_masked_share(),
        }
        metrics["bits_per_character"], rows = self.result_rows("NELBO", nelbo, unigram)
        return metrics, rows

    def window_nelbos(
        self, model: nn.Module, windows: Windows, examples: np.ndarray, draws: int = 1
    ) -> "WindowNelbos":
        """NELBO of each of the windows `examples`, with `draws` masks each. R = draws x examples, draw by draw."""
        repeated = np.tile(examples, draws)  # (R,)

        def measure(part: np.ndarray) -> tuple[np.ndarray, ...]:
            ids, valid = windows.batch(repeated[part], np.zeros(len(part)))
            batch = mask_batch(
                self._bound_config, valid, BatchDraw(self.seed, "evaluation", part, EVALUATION_BATCH)
            )
            inputs = np.where(batch.masked, self.mask_id, ids)
            logits, targets, flat_idx = self.predict(model, inputs, ids, valid, batch.masked)
            ce = cross_entropies(logits, targets).cpu().numpy()
            correct = (logits.argmax(-1) == targets).cpu().numpy()
            row_idx, size, lengths = flat_idx // ids.shape[1], len(part), valid.sum(1)
            nats = lengths * np.bincount(row_idx, ce * batch.weights.reshape(-1)[flat_idx], size)
            hits = np.bincount(row_idx, correct, size)
            return nats, lengths, hits, batch.masked.sum(1)

        found = self.runtime.processes.share(
            measure, list(chunks(len(repeated), evaluation_rows(EVALUATION_BATCH, windows.width)))
        )
        return WindowNelbos(*(np.concatenate(column) for column in zip(*found, strict=True)))


@dataclass(frozen=True)
class WindowNelbos:
    """Figures of windows under one mask each, all (R,)."""

    nats: np.ndarray  # NELBO of the whole window
    tokens: np.ndarray
    correct: np.ndarray  # masked tokens for which the clean token is the most likely
    masked: np.ndarray

    def by_masked_share(self) -> dict[str, float]:
        """`nelbo_masked_20` to `nelbo_masked_100`: nats per token of the windows with that masked share, where there are any."""
        band = np.ceil(BANDS * self.masked / self.tokens - 1e-9).astype(int)  # 1 to BANDS
        nats, tokens = (np.bincount(band, column, BANDS + 1) for column in (self.nats, self.tokens))
        return {
            f"nelbo_masked_{100 * b // BANDS}": float(nats[b] / tokens[b])
            for b in range(1, BANDS + 1)
            if tokens[b]
        }
