"""The engine that makes synthetic text: a masked language model, of this project or any of transformers.

It fills the masked positions of its callers' rows and never generates a special token. The result of a row depends on the row
alone, not on its batch. Rows are padded to one width, and rows without padding are read separately from rows with it.

Legend: B rows, T positions, N masked positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib import randomness
from lib.diffusion.categorical import draw
from lib.diffusion.top_k import lowest_k
from lib.errors import BadConfig
from lib.models.compiling import CompiledLayers
from lib.models.int8 import to_int8
from lib.models.masked_lm import argument_names, load_masked_lm
from lib.models.pretrained_tokenizer import Framing, framing_of
from lib.runtime import Runtime
from lib.sections.data import CandidatesConfig
from lib.surfaces import closed_ids
from lib.tokenization import forbidden_ids

CONFIDENCE_PASSES = 4  # forward passes in which every token is masked once
_NEXT_PIECE = 0x1E3779B97F4A7C15  # added to the key of a row for each further piece


@dataclass(frozen=True)
class MaskedRows:
    """Rows to fill.

    Attributes:
        ids: (B, T); what stands at masked positions is not read.
        valid: (B, T) bool, real tokens.
        masked: (B, T) bool, to be generated.
        keys: (B,) keys of the rows; a row with the same key is filled the same way in any batch.
    """

    ids: np.ndarray
    valid: np.ndarray
    masked: np.ndarray
    keys: np.ndarray

    def select(self, index: np.ndarray) -> "MaskedRows":
        """The rows of an index."""
        return MaskedRows(self.ids[index], self.valid[index], self.masked[index], self.keys[index])


@dataclass(frozen=True)
class ForbiddenIds:
    """Ids that are not sampled, besides special ones.

    Attributes:
        everywhere: (V,) bool, at all positions.
        at_some: (V,) bool, at some positions only.
        positions: (B, T) bool, these positions.
    """

    everywhere: np.ndarray
    at_some: np.ndarray
    positions: np.ndarray

    def select(self, index: np.ndarray) -> "ForbiddenIds":
        """Those of the rows of an index."""
        return ForbiddenIds(self.everywhere, self.at_some, self.positions[index])

    def apply(self, logits: torch.Tensor, flat_idx: np.ndarray) -> torch.Tensor:
        """The (N, V) logits of flat positions, -inf for ids that are forbidden there."""
        size = logits.shape[1]
        everywhere, at_some = (
            torch.from_numpy(_resized(ids, size)).to(logits.device) for ids in (self.everywhere, self.at_some)
        )
        restricted = torch.from_numpy(self.positions.reshape(-1)[flat_idx]).to(logits.device)  # (N,)
        return logits.masked_fill(everywhere | (at_some & restricted[:, None]), -torch.inf)


@dataclass
class MaskedLMEngine:
    """A masked language model that fills masks.

    Attributes:
        model: forward(input_ids, attention_mask) -> .logits; models of this project also take `logits_at`.
        tokenizer: the model's own.
        width: rows are padded to this many tokens.
        framing: special ids that the model reads around every row, beside its `width` tokens.
        layers: those of the model, if they may be compiled.
    """

    model: Any
    tokenizer: Any
    runtime: Runtime
    width: int
    framing: Framing = field(default_factory=lambda: Framing([], []))
    layers: CompiledLayers | None = None

    def __post_init__(self) -> None:
        self.model.to(self.runtime.device).eval()
        self._special_ids: dict[int, torch.Tensor] = {}
        self._takes_logits_at = "logits_at" in argument_names(self.model)

    @classmethod
    def load(
        cls,
        folder: Path,
        runtime: Runtime,
        width: int | None = None,
        int8: bool = False,
        compiles: str = "off",
        run_tokenizer: Any = None,
    ) -> "MaskedLMEngine":
        """The engine of a saved folder with its tokenizer.

        Args:
            run_tokenizer: if its vocabulary is the model's, rows are texts without special tokens. So a model of transformers
                reads those of its tokenizer around them. Models of this project read none.

        Raises:
            MissingInput, BadData: see `load_masked_lm`.
            BadConfig: int8 on an accelerator.
        """
        if int8 and runtime.device.type != "cpu":
            raise BadConfig(
                f"candidates.int8 is for the CPU, and this runs on {runtime.device}; set it to false"
            )
        model, tokenizer, limit = load_masked_lm(folder)
        if int8:
            to_int8(model)
        layers = CompiledLayers(model, compiles, 0, learns=False, label=folder.name)
        engine = cls(model, tokenizer, runtime, min(width or limit, limit), layers=layers)
        is_own = engine._takes_logits_at
        if run_tokenizer is not None and not is_own and engine.has_vocabulary_of(run_tokenizer):
            engine.framing = framing_of(tokenizer)
            engine.width = min(engine.width, limit - engine.framing.count)
        return engine

    def environment(self) -> dict[str, str]:
        """What the bits of its texts depend on beside the code, for the manifest of a part."""
        return self.runtime.of_parts() | (self.layers.of_parts() if self.layers else {})

    def has_vocabulary_of(self, tokenizer: Any) -> bool:
        """Whether the model reads the ids of this tokenizer."""
        return self.tokenizer.get_vocab() == tokenizer.get_vocab()

    # ------------------------------------------------------------------------------------------ filling masks

    @torch.no_grad()
    def fill(
        self,
        rows: MaskedRows,
        config: CandidatesConfig,
        seed: int,
        forbidden: ForbiddenIds | None = None,
        width: int | None = None,
    ) -> np.ndarray:
        """(B, T) ids with a token at every masked position.

        There are `fill_passes` forward passes. Each unmasks an equal share of the rest, at random positions.

        Args:
            rows: rows longer than the engine's width are filled in pieces.
            forbidden: ids that are not sampled, for rows of at most the engine's width.
            width: pad rows to this many tokens instead of the engine's width. It must be a function of each row alone.
        """
        if rows.ids.shape[1] > self.width:
            assert forbidden is None and width is None, "rows in pieces take neither"
            return self._fill_in_pieces(rows, config, seed)
        filled = rows.ids.copy()
        is_full = rows.valid.all(1)
        for part in (np.flatnonzero(is_full), np.flatnonzero(~is_full)):
            for start in range(0, len(part), config.batch_size):
                index = part[start : start + config.batch_size]
                some = forbidden and forbidden.select(index)
                filled[index] = self._fill_batch(rows.select(index), config, seed, some, width)
        return filled

    def _fill_in_pieces(self, rows: MaskedRows, config: CandidatesConfig, seed: int) -> np.ndarray:
        """Rows longer than the model reads."""
        ids, valid, keys, join = self._in_pieces(rows.ids, rows.valid, rows.keys)
        masked = self._in_pieces(rows.masked, rows.valid, rows.keys)[0].astype(bool) & valid
        filled = ids.copy()
        used = np.flatnonzero(masked.any(1))
        filled[used] = self.fill(MaskedRows(ids, valid, masked, keys).select(used), config, seed)
        return join(filled)

    def _fill_batch(
        self,
        rows: MaskedRows,
        config: CandidatesConfig,
        seed: int,
        forbidden: ForbiddenIds | None,
        width: int | None,
    ) -> np.ndarray:
        ids, still_masked, length = rows.ids.copy(), rows.masked.copy(), rows.ids.shape[1]
        for number in range(config.fill_passes):
            # 1. An equal share of the masked positions, at random
            count = np.ceil(still_masked.sum(1) / (config.fill_passes - number)).astype(np.int64)
            order = randomness.uniform(randomness.key(seed, "fill place", number), rows.keys, length)
            unmasked = lowest_k(order, still_masked, count)  # (B, T)
            flat_idx = np.flatnonzero(unmasked)  # (N,)
            if not len(flat_idx):
                continue
            # 2. Their logits, given what is not masked
            inputs = np.where(still_masked, self.tokenizer.mask_token_id, ids)
            logits = self._logits(inputs, rows.valid, flat_idx, width)  # (N, V)
            if forbidden is not None:
                logits = forbidden.apply(logits, flat_idx)
            # 3. A token at each
            noise = randomness.uniform(randomness.key(seed, "fill token", number), rows.keys, length)
            tokens, _ = draw(
                logits,
                torch.from_numpy(noise.reshape(-1)[flat_idx]).to(logits.device),
                self._forbidden_always(logits.shape[1]),
                config.temperature,
                config.top_k,
                config.top_p,
            )
            ids.reshape(-1)[flat_idx] = tokens.cpu().numpy()
            still_masked &= ~unmasked
        return ids

    # ------------------------------------------------------------------------------------------ pseudo-likelihood

    @torch.no_grad()
    def confidence(
        self, ids: np.ndarray, valid: np.ndarray, seed: int, rows: np.ndarray, batch_size: int
    ) -> np.ndarray:
        """(B, T) log-probability of every token while it is masked, 0 for padding.

        A random quarter of the row is masked at a time. A masked LM is not trained to score tokens that it reads.
        """
        if ids.shape[1] > self.width:
            ids, valid, keys, join = self._in_pieces(ids, valid, rows)
            return join(self.confidence(ids, valid, seed, keys, batch_size))
        found = np.zeros(ids.shape, np.float32)
        noise = randomness.uniform(randomness.key(seed, "confidence part"), rows, ids.shape[1])
        quarter = np.floor(noise * CONFIDENCE_PASSES)  # (B, T)
        is_full = valid.all(1)
        for part in (np.flatnonzero(is_full), np.flatnonzero(~is_full)):
            for start in range(0, len(part), batch_size):
                index = part[start : start + batch_size]
                for number in range(CONFIDENCE_PASSES):
                    masked = valid[index] & (quarter[index] == number)
                    flat_idx = np.flatnonzero(masked)
                    if len(flat_idx):
                        inputs = np.where(masked, self.tokenizer.mask_token_id, ids[index])
                        logits = self._logits(inputs, valid[index], flat_idx)
                        log_probabilities = torch.log_softmax(logits.float(), -1)  # (N, V)
                        tokens = torch.from_numpy(ids[index].reshape(-1)[flat_idx]).to(logits.device)
                        values = log_probabilities.gather(1, tokens[:, None])[:, 0].cpu().numpy()
                        found[index] += _scattered(values, flat_idx, masked.shape)
        return found

    # ------------------------------------------------------------------------------------------ reading rows

    def _in_pieces(self, ids: np.ndarray, valid: np.ndarray, rows: np.ndarray):
        """(ids, valid, keys, join) of rows in consecutive pieces of `width`, each a row with its own key.

        `join` turns an array of the pieces' shape back into rows.
        """
        count, longest = ids.shape
        pieces = -(-longest // self.width)
        extra = ((0, 0), (0, pieces * self.width - longest))
        shape = (count * pieces, self.width)
        keys = (rows[:, None] + np.arange(pieces) * _NEXT_PIECE).reshape(-1)

        def cut(array: np.ndarray, fill: int) -> np.ndarray:
            return np.pad(array, extra, constant_values=fill).reshape(shape)

        def join(array: np.ndarray) -> np.ndarray:
            return array.reshape(count, -1)[:, :longest]

        return cut(ids, self.tokenizer.pad_token_id), cut(valid, False), keys, join

    def _forbidden_always(self, size: int) -> torch.Tensor:
        """(F,) ids below `size` that are never sampled: special and added tokens, and ids without a token."""
        if size not in self._special_ids:
            known = np.zeros(size, bool)
            known[[i for i in self.tokenizer.get_vocab().values() if i < size]] = True
            never = {*closed_ids(self.tokenizer), *forbidden_ids(self.tokenizer)}
            known[[i for i in never if i < size]] = False
            self._special_ids[size] = torch.from_numpy(np.flatnonzero(~known)).to(self.runtime.device)
        return self._special_ids[size]

    def _logits(
        self, inputs: np.ndarray, valid: np.ndarray, flat_idx: np.ndarray, width: int | None = None
    ) -> torch.Tensor:
        """(N, V) logits of (B, T) inputs at flat positions (N,)."""
        device = self.runtime.device
        width = (width or self.width) + self.framing.count
        if self.framing.count:
            inputs, valid, flat_idx = self._framed(inputs, valid, flat_idx)
        pad = width - inputs.shape[1]
        if pad > 0:
            inputs = np.pad(inputs, ((0, 0), (0, pad)), constant_values=self.tokenizer.pad_token_id)
            valid = np.pad(valid, ((0, 0), (0, pad)))
            flat_idx = flat_idx // (width - pad) * width + flat_idx % (width - pad)
        mask = None if valid.all() else torch.from_numpy(valid).to(device)
        where = torch.from_numpy(flat_idx).to(device)
        with self.runtime.autocast():
            if self._takes_logits_at:
                return self.model(
                    torch.from_numpy(inputs).to(device), attention_mask=mask, logits_at=where
                ).logits
            mask = torch.from_numpy(valid).to(device).long()
            logits = self.model(input_ids=torch.from_numpy(inputs).to(device), attention_mask=mask).logits
        return logits.flatten(0, 1)[where]

    def _framed(
        self, inputs: np.ndarray, valid: np.ndarray, flat_idx: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows (B, T) and their `valid` between the special ids of the framing, and the flat positions (N,) in them."""
        (count, length), before = inputs.shape, len(self.framing.prefix)
        total = length + self.framing.count
        lengths = valid.sum(1, keepdims=True)  # (B, 1); padding is on the right
        ids = np.full((count, total), self.tokenizer.pad_token_id, inputs.dtype)
        ids[:, :before] = self.framing.prefix
        ids[:, before : before + length] = inputs
        for place, token in enumerate(self.framing.suffix, before):
            np.put_along_axis(ids, lengths + place, token, 1)
        known = np.arange(total) < lengths + self.framing.count
        return ids, known, flat_idx // length * total + flat_idx % length + before


def _resized(values: np.ndarray, size: int) -> np.ndarray:
    """The first `size` values, with False for missing ones."""
    return np.pad(values[:size], (0, max(0, size - len(values))))


def _scattered(values: np.ndarray, flat_idx: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The values at their flat positions, 0 elsewhere."""
    result = np.zeros(shape, np.float32)
    result.reshape(-1)[flat_idx] = values
    return result


def load_engines(
    folders: Sequence[Path], settings: CandidatesConfig, runtime: Runtime, run_tokenizer: Any
) -> list[MaskedLMEngine]:
    """The engines of saved folders, as the section `candidates` wants them. Raises what `MaskedLMEngine.load` does."""
    return [
        MaskedLMEngine.load(
            folder, runtime, int8=settings.int8, compiles=settings.compile, run_tokenizer=run_tokenizer
        )
        for folder in folders
    ]
