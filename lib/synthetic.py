"""The masked-LM engine that writes synthetic text: our checkpoints, or any Hugging Face masked LM in a folder.

It fills given masks in given ids and never emits a special token. Which positions are masked is its caller's
business. The result of a row depends on the row alone, not on the batch it is in: rows are padded to one width,
and rows without padding go separately from rows with it.

Legend: B rows, T positions, N masked positions, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lib import randomness
from lib.diffusion.categorical import draw
from lib.diffusion.lowest import lowest
from lib.errors import BadConfig, BadData, MissingInput
from lib.models.int8 import to_int8
from lib.runtime import Runtime
from lib.sections.data import CandidatesConfig

CONFIDENCE_PASSES = 4  # passes in which every token is hidden once


@dataclass
class MaskedLMEngine:
    """A masked LM ready to fill masks.

    Attributes:
        model: forward(input_ids, attention_mask) -> .logits; ours also takes `logits_at`.
        tokenizer: its own tokenizer.
        width: rows are padded to this many tokens.
    """

    model: Any
    tokenizer: Any
    runtime: Runtime
    width: int

    def __post_init__(self) -> None:
        self.model.to(self.runtime.device).eval()
        ids = sorted(set(self.tokenizer.all_special_ids))
        self._forbidden = torch.tensor(ids, device=self.runtime.device)
        self._sparse = "logits_at" in _argument_names(self.model)

    @classmethod
    def load(
        cls, folder: Path, runtime: Runtime, width: int | None = None, int8: bool = False
    ) -> "MaskedLMEngine":
        """From a saved folder with its tokenizer. Raises MissingInput or BadData saying what does not fit."""
        from lib.models.build import is_ours, load_model

        if int8 and runtime.device.type != "cpu":
            raise BadConfig(
                f"candidates.int8 is for the CPU, and this runs on {runtime.device}: set it to false"
            )
        if not (folder / "config.json").exists():
            raise MissingInput(
                f"generator.checkpoint: {folder} has no config.json; give the folder of a masked LM"
            )
        tokenizer = _load_tokenizer(folder)
        model: Any = load_model(folder) if is_ours(folder) else _load_foreign(folder)
        size = model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > size:
            raise BadData(
                f"{folder}: the tokenizer has {len(tokenizer)} tokens but the model embeds {size}; "
                "they do not belong together"
            )
        longest = getattr(model.config, "max_position_embeddings", None) or 512
        limit = longest - 1 if is_ours(folder) else longest
        if int8:
            to_int8(model)
        return cls(model, tokenizer, runtime, min(width or limit, limit))

    @torch.no_grad()
    def fill(
        self,
        ids: np.ndarray,
        valid: np.ndarray,
        masked: np.ndarray,
        config: CandidatesConfig,
        seed: int,
        rows: np.ndarray,
    ) -> np.ndarray:
        """(B, T) ids with every masked position written.

        In `fill_passes` passes; each writes an equal share of what is left, at keyed random places.

        Args:
            ids: (B, T); what stands at masked positions is not read. Longer rows than `width` go in pieces.
            rows: (B,) keys of the rows; the same row is filled the same way in any batch.
        """
        if ids.shape[1] > self.width:
            return self._fill_in_pieces(ids, valid, masked, config, seed, rows)
        filled = ids.copy()
        full = valid.all(1)
        for part in (np.flatnonzero(full), np.flatnonzero(~full)):
            for start in range(0, len(part), config.batch_size):
                b = part[start : start + config.batch_size]
                filled[b] = self._fill_batch(filled[b], valid[b], masked[b], config, seed, rows[b])
        return filled

    @torch.no_grad()
    def confidence(
        self, ids: np.ndarray, valid: np.ndarray, seed: int, rows: np.ndarray, batch_size: int
    ) -> np.ndarray:
        """(B, T) log-probability of every token, each hidden once: a keyed quarter of the row at a time. 0 for padding.

        What a masked LM says of a token that it can see means nothing: it was never trained on those.
        """
        if ids.shape[1] > self.width:
            ids, valid, keys, join = self._in_pieces(ids, valid, rows)
            return join(self.confidence(ids, valid, seed, keys, batch_size))
        found = np.zeros(ids.shape, np.float32)
        noise = randomness.uniform(randomness.key(seed, "confidence part"), rows, ids.shape[1])
        part_of = np.floor(noise * CONFIDENCE_PASSES)
        full = valid.all(1)
        for some in (np.flatnonzero(full), np.flatnonzero(~full)):
            for start in range(0, len(some), batch_size):
                b = some[start : start + batch_size]
                for number in range(CONFIDENCE_PASSES):
                    hidden = valid[b] & (part_of[b] == number)
                    at = np.flatnonzero(hidden)
                    if len(at):
                        inputs = np.where(hidden, self.tokenizer.mask_token_id, ids[b])
                        logs = torch.log_softmax(self._logits(inputs, valid[b], at).float(), -1)
                        own = torch.from_numpy(ids[b].reshape(-1)[at]).to(logs.device)
                        found[b] += _spread_out(
                            logs.gather(1, own[:, None])[:, 0].cpu().numpy(), at, hidden.shape
                        )
        return found

    def _in_pieces(self, ids: np.ndarray, valid: np.ndarray, rows: np.ndarray):
        """(ids, valid, keys, join) of rows cut into consecutive pieces of `width`, each a row of its own.

        `join` puts arrays of the pieces' shape together again.
        """
        count, longest = ids.shape
        pieces = -(-longest // self.width)
        extra = ((0, 0), (0, pieces * self.width - longest))
        shape = (count * pieces, self.width)
        keys = (rows[:, None] + np.arange(pieces) * 0x1E3779B97F4A7C15).reshape(-1)

        def cut(array: np.ndarray, fill: int) -> np.ndarray:
            return np.pad(array, extra, constant_values=fill).reshape(shape)

        def join(array: np.ndarray) -> np.ndarray:
            return array.reshape(count, -1)[:, :longest]

        return cut(ids, self.tokenizer.pad_token_id), cut(valid, False), keys, join

    def _fill_in_pieces(self, ids, valid, masked, config, seed, rows) -> np.ndarray:
        """Rows longer than the model reads."""
        cut, fits, keys, join = self._in_pieces(ids, valid, rows)
        hidden = self._in_pieces(masked, valid, rows)[0].astype(bool) & fits
        filled = cut.copy()
        used = np.flatnonzero(hidden.any(1))
        filled[used] = self.fill(cut[used], fits[used], hidden[used], config, seed, keys[used])
        return join(filled)

    def _fill_batch(self, ids, valid, masked, config, seed, rows) -> np.ndarray:
        left = masked.copy()
        for number in range(config.fill_passes):
            count = np.ceil(left.sum(1) / (config.fill_passes - number)).astype(np.int64)
            place = randomness.uniform(randomness.key(seed, "fill place", number), rows, ids.shape[1])
            now = lowest(place, left, count)
            at = np.flatnonzero(now)
            if not len(at):
                continue
            inputs = np.where(left, self.tokenizer.mask_token_id, ids)
            noise = randomness.uniform(randomness.key(seed, "fill token", number), rows, ids.shape[1])
            logits = self._logits(inputs, valid, at)  # (N, V)
            tokens, _ = draw(
                logits,
                torch.from_numpy(noise.reshape(-1)[at]).to(logits.device),
                self._forbidden,
                config.temperature,
                config.top_k,
                config.top_p,
            )
            ids.reshape(-1)[at] = tokens.cpu().numpy()
            left &= ~now
        return ids

    def _logits(self, inputs: np.ndarray, valid: np.ndarray, at: np.ndarray) -> torch.Tensor:
        device = self.runtime.device
        pad = self.width - inputs.shape[1]
        if pad > 0:
            inputs = np.pad(inputs, ((0, 0), (0, pad)), constant_values=self.tokenizer.pad_token_id)
            valid = np.pad(valid, ((0, 0), (0, pad)))
            at = at // (self.width - pad) * self.width + at % (self.width - pad)
        mask = None if valid.all() else torch.from_numpy(valid).to(device)
        where = torch.from_numpy(at).to(device)
        with self.runtime.autocast():
            if self._sparse:
                return self.model(
                    torch.from_numpy(inputs).to(device), attention_mask=mask, logits_at=where
                ).logits
            mask = torch.from_numpy(valid).to(device).long()
            logits = self.model(input_ids=torch.from_numpy(inputs).to(device), attention_mask=mask).logits
        return logits.flatten(0, 1)[where]


def _spread_out(values: np.ndarray, at: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The values at their flat places, 0 elsewhere."""
    result = np.zeros(shape, np.float32)
    result.reshape(-1)[at] = values
    return result


def _argument_names(model: nn.Module) -> set[str]:
    import inspect

    return set(inspect.signature(model.forward).parameters)


def _load_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise MissingInput(f"{folder} holds no tokenizer that can be loaded: {error}") from None
    if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
        raise BadData(
            f"{folder}: its tokenizer has no mask or no padding token, so it belongs to no masked LM"
        )
    return tokenizer


def _load_foreign(folder: Path) -> nn.Module:
    from transformers import AutoModelForMaskedLM

    if not list(folder.glob("*.safetensors")):
        raise BadData(f"{folder} has no .safetensors file; pickled weights are not read, convert them first")
    try:
        return AutoModelForMaskedLM.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise BadData(f"{folder} is no masked LM that transformers can load: {error}") from None
