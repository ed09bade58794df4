"""Models of transformers as peers of this project's own: of the size of a config, for the objectives of stage 04.

A function (config, vocabulary) -> model. Rows of docs/leaderboard.md name one, and may name any other function of this kind.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

from lib.config import Config


def gpt2(config: Config, vocabulary: int) -> nn.Module:
    """GPT-2: LayerNorm, GELU, learned positions, biases; no dropout, as in nanoGPT's recipe for a CPU."""
    from transformers import GPT2Config, GPT2LMHeadModel

    a = config.models["generator"].architecture
    torch.manual_seed(config.seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_layer=a.num_hidden_layers, n_embd=a.hidden_size, n_head=a.num_attention_heads, n_positions=a.context,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def bert(config: Config, vocabulary: int) -> nn.Module:
    """BERT with its masked LM head, without dropout, as a denoiser of masked diffusion."""
    from transformers import BertConfig

    a = config.models["generator"].architecture
    torch.manual_seed(config.seed)
    return BertAtPositions(
        BertConfig(
            vocab_size=vocabulary, hidden_size=a.hidden_size, num_hidden_layers=a.num_hidden_layers, type_vocab_size=1,
            num_attention_heads=a.num_attention_heads, intermediate_size=4 * a.hidden_size, max_position_embeddings=a.context,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


class BertAtPositions(nn.Module):
    """BertForMaskedLM that gives logits at chosen positions, which saves it the head at all others."""

    def __init__(self, config: Any):
        from transformers import BertForMaskedLM

        super().__init__()
        self.config, self.model = config, BertForMaskedLM(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        logits_at: Tensor | None = None,
    ) -> MaskedLMOutput:
        """(N, V) logits at the flat positions `logits_at` of (B, T) ids; (B, T, V) without it."""
        hidden = self.model.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        chosen = hidden if logits_at is None else hidden.flatten(0, 1)[logits_at]
        return MaskedLMOutput(logits=self.model.cls(chosen))
