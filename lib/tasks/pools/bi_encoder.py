"""The encoder of `ranker.encoder` before any training, as a bi-encoder: cosine of the mean states of prompt and candidate."""

from typing import Any

import numpy as np
import torch

from lib.models.backbones import longest_input
from lib.models.encoders import configured, open_encoder
from lib.runtime import Runtime

TOKENS_PER_PASS = 8192


class BiEncoder:
    """Vectors of texts, and cosines of them.

    Args:
        encoder: as in `ranker.encoder`.
        max_tokens: longer texts are truncated, as are those that are longer than the encoder reads.
    """

    def __init__(self, encoder: str, max_tokens: int, runtime: Runtime):
        source, revision = configured(encoder)
        self.model, self.tokenizer = open_encoder(source, torch.float32, revision)
        self.model.to(runtime.device).eval()
        self.max_tokens, self.runtime = min(max_tokens, longest_input(self.model) or max_tokens), runtime

    @torch.no_grad()
    def vectors(self, texts: list[str]) -> np.ndarray:
        """(N, D) vectors of length 1. Texts of similar length are read together."""
        ids = self.tokenizer(
            texts, truncation=True, max_length=self.max_tokens, split_special_tokens=True, return_attention_mask=False,
            verbose=False,
        )["input_ids"]  # fmt: skip
        lengths = np.array([len(row) for row in ids])
        order = np.argsort(-lengths, kind="stable")
        result: Any = None
        start = 0
        while start < len(order):
            longest = max(int(lengths[order[start]]), 1)
            chosen = order[start : start + max(1, TOKENS_PER_PASS // longest)]
            found = self._read([ids[i] for i in chosen], longest)
            if result is None:
                result = np.zeros((len(texts), found.shape[1]), np.float32)
            result[chosen] = found
            start += len(chosen)
        return result if result is not None else np.zeros((0, 1), np.float32)

    def _read(self, ids: list[list[int]], longest: int) -> np.ndarray:
        mask = np.arange(longest) < np.array([len(row) for row in ids])[:, None]
        padded = np.full(mask.shape, self.tokenizer.pad_token_id or 0)
        padded[mask] = np.concatenate([np.asarray(row, np.int64) for row in ids]) if mask.any() else 0
        device = self.runtime.device
        valid = torch.from_numpy(mask).to(device)
        states = self.model(input_ids=torch.from_numpy(padded).to(device), attention_mask=valid.long())
        weights = valid.unsqueeze(-1).float()
        mean = (states.last_hidden_state.float() * weights).sum(1) / weights.sum(1).clamp_min(1)
        return torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()

    def scores(self, prompts: list[str], texts: np.ndarray, present: np.ndarray) -> np.ndarray:
        """(N, K) cosines of N prompts with their (N, K) texts; 0 where there is no candidate."""
        asked = self.vectors(prompts)
        found = self.vectors(texts[present].tolist())
        scores = np.zeros(present.shape)
        scores[present] = (found * asked[np.nonzero(present)[0]]).sum(1)
        return scores
