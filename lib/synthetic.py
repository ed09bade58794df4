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
from safetensors import SafetensorError
from torch import nn

from lib import randomness
from lib.diffusion.categorical import draw
from lib.diffusion.top_k import lowest_k
from lib.errors import BadConfig, BadData, MissingInput
from lib.models.int8 import to_int8
from lib.runtime import Runtime
from lib.sections.data import CandidatesConfig
from lib.surfaces import closed_ids

CONFIDENCE_PASSES = 4  # passes in which every token is hidden once
LONGEST = 512  # tokens, for a model that knows no limit


@dataclass(frozen=True)
class Barred:
    """Ids that are not drawn, besides those that never are.

    Attributes:
        never: (V,) bool, at any place.
        there: (V,) bool, at some places only.
        places: (B, T) bool, which.
    """

    never: np.ndarray
    there: np.ndarray
    places: np.ndarray

    def rows(self, which: np.ndarray) -> "Barred":
        return Barred(self.never, self.there, self.places[which])

    def take_out(self, logits: torch.Tensor, at: np.ndarray) -> torch.Tensor:
        """The (N, V) logits of the flat places `at`, -inf for what is barred there."""
        size = logits.shape[1]
        never, there = (
            torch.from_numpy(_resized(ids, size)).to(logits.device) for ids in (self.never, self.there)
        )
        here = torch.from_numpy(self.places.reshape(-1)[at]).to(logits.device)
        return logits.masked_fill(never | (there & here[:, None]), -torch.inf)


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
        self._forbidden: dict[int, torch.Tensor] = {}
        self._sparse = "logits_at" in _argument_names(self.model)

    @classmethod
    def load(
        cls, folder: Path, runtime: Runtime, width: int | None = None, int8: bool = False
    ) -> "MaskedLMEngine":
        """From a saved folder with its tokenizer. Raises MissingInput or BadData saying what does not fit."""
        from lib.models.backbones import longest_input, require_model_files
        from lib.models.build import is_ours

        if int8 and runtime.device.type != "cpu":
            raise BadConfig(
                f"candidates.int8 is for the CPU, and this runs on {runtime.device}: set it to false"
            )
        require_model_files(folder)
        tokenizer = _load_tokenizer(folder)
        ours = is_ours(folder)
        model: Any = _load_ours(folder) if ours else _load_foreign(folder)
        size = model.get_input_embeddings().weight.shape[0]
        largest = max(tokenizer.get_vocab().values())
        if largest >= size:
            raise BadData(
                f"{folder}: the tokenizer has ids up to {largest} but the model embeds {size}, from 0 on; "
                "they do not belong together"
            )
        limit = (
            longest_input(model) or LONGEST
        ) - ours  # ours have a position for [CLS], which is not used here
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
        barred: Barred | None = None,
        width: int | None = None,
    ) -> np.ndarray:
        """(B, T) ids with every masked position written.

        In `fill_passes` passes; each writes an equal share of what is left, at keyed random places.

        Args:
            ids: (B, T); what stands at masked positions is not read. Longer rows than `width` go in pieces.
            rows: (B,) keys of the rows; the same row is filled the same way in any batch.
            barred: ids that are not drawn, for rows of at most `width` tokens.
            width: pad rows to so many tokens, in place of the engine's; must be a function of each row alone.
        """
        if ids.shape[1] > self.width:
            assert barred is None and width is None, "rows in pieces take neither"
            return self._fill_in_pieces(ids, valid, masked, config, seed, rows)
        filled = ids.copy()
        full = valid.all(1)
        for part in (np.flatnonzero(full), np.flatnonzero(~full)):
            for start in range(0, len(part), config.batch_size):
                b = part[start : start + config.batch_size]
                filled[b] = self._fill_batch(
                    filled[b], valid[b], masked[b], config, seed, rows[b], barred and barred.rows(b), width
                )
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

    def _fill_batch(self, ids, valid, masked, config, seed, rows, barred=None, width=None) -> np.ndarray:
        left = masked.copy()
        for number in range(config.fill_passes):
            count = np.ceil(left.sum(1) / (config.fill_passes - number)).astype(np.int64)
            place = randomness.uniform(randomness.key(seed, "fill place", number), rows, ids.shape[1])
            now = lowest_k(place, left, count)
            at = np.flatnonzero(now)
            if not len(at):
                continue
            inputs = np.where(left, self.tokenizer.mask_token_id, ids)
            noise = randomness.uniform(randomness.key(seed, "fill token", number), rows, ids.shape[1])
            logits = self._logits(inputs, valid, at, width)  # (N, V)
            if barred is not None:
                logits = barred.take_out(logits, at)
            tokens, _ = draw(
                logits,
                torch.from_numpy(noise.reshape(-1)[at]).to(logits.device),
                self._never(logits.shape[1]),
                config.temperature,
                config.top_k,
                config.top_p,
            )
            ids.reshape(-1)[at] = tokens.cpu().numpy()
            left &= ~now
        return ids

    def _never(self, size: int) -> torch.Tensor:
        """(F,) ids below `size` that are never drawn: special and added tokens, and ids without a token."""
        if size not in self._forbidden:
            known = np.zeros(size, bool)
            known[[i for i in self.tokenizer.get_vocab().values() if i < size]] = True
            known[[i for i in closed_ids(self.tokenizer) if i < size]] = False
            self._forbidden[size] = torch.from_numpy(np.flatnonzero(~known)).to(self.runtime.device)
        return self._forbidden[size]

    def _logits(
        self, inputs: np.ndarray, valid: np.ndarray, at: np.ndarray, width: int | None = None
    ) -> torch.Tensor:
        device = self.runtime.device
        width = width or self.width
        pad = width - inputs.shape[1]
        if pad > 0:
            inputs = np.pad(inputs, ((0, 0), (0, pad)), constant_values=self.tokenizer.pad_token_id)
            valid = np.pad(valid, ((0, 0), (0, pad)))
            at = at // (width - pad) * width + at % (width - pad)
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


def _resized(values: np.ndarray, size: int) -> np.ndarray:
    """The first `size` values, False where there are fewer."""
    return np.pad(values[:size], (0, max(0, size - len(values))))


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
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise MissingInput(f"{folder} holds no tokenizer that can be loaded: {_line(error)}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise BadData(f"{folder} has no fast tokenizer; save it with a tokenizer.json")
    for name in ("mask", "pad"):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise BadData(
                f"{folder}: its tokenizer has no {name} token, so it belongs to no masked LM; give generator.checkpoint "
                "the folder of one"
            )
    return tokenizer


def _load_ours(folder: Path) -> nn.Module:
    from lib.models.build import load_model
    from lib.models.families import FAMILIES

    model = load_model(folder)
    if type(model) is not FAMILIES[model.config.model_type].heads["masked_lm"]:
        raise BadData(
            f"{folder} holds a {type(model).__name__}, which is no masked LM; give a model of mode language_model with "
            "attention bidirectional"
        )
    return model


def _load_foreign(folder: Path) -> nn.Module:
    from transformers import AutoModelForMaskedLM
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of missing tensors advises to train them
    try:
        model, report = AutoModelForMaskedLM.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise BadData(f"{folder} is no masked LM that transformers can load: {_line(error)}") from None
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(report["missing_keys"])
    if missing:
        raise BadData(
            f"{folder} lacks {len(missing)} tensors of {type(model).__name__}, such as {', '.join(missing[:3])}; "
            "give the folder of a masked LM with its head, not of an encoder, a classifier or a discriminator"
        )
    if getattr(model.config, "is_decoder", False):
        raise BadData(
            f"{folder}/config.json says is_decoder: its tokens see only earlier ones; give a masked LM that reads both ways"
        )
    if "attention_mask" not in _argument_names(model):
        raise BadData(
            f"{folder}: {type(model).__name__} takes no attention_mask and would read padding as text; give another masked LM"
        )
    return model


def _line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0]
