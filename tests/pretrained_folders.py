"""Small masked LMs with random weights in folders, as a user has them: of transformers, of this project, with code of their own.

And models and small runs that start from them.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lib.config import load_config
from lib.models.build import PretrainedStart, heads_of, make_model, model_config, save_model, start_model
from lib.own_code import hashes_of, version_of
from lib.sections.pretrained import AdapterConfig, PretrainedConfig
from lib.tokenization import forbidden_ids, num_ids, train_tokenizer
from tests.test_foreign import FAMILIES, LETTERS, SIGNS, WORDS, make, save

# A bidirectional decoder in the way of LLaDA: its code lies in the folder, its backbone computes the logits itself
CONFIGURATION = """
from transformers import PretrainedConfig


class TinyDiffusionConfig(PretrainedConfig):
    model_type = "tiny_diffusion"

    def __init__(self, vocab_size=100, d_model=24, n_layers=2, max_sequence_length=96, **kwargs):
        self.vocab_size, self.d_model, self.n_layers = vocab_size, d_model, n_layers
        self.max_sequence_length = max_sequence_length
        super().__init__(**kwargs)
"""
MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_tiny_diffusion import TinyDiffusionConfig


class TinyDiffusionModel(PreTrainedModel):
    config_class = TinyDiffusionConfig

    def __init__(self, config):
        super().__init__(config)
        size = config.d_model
        self.wte = nn.Embedding(config.vocab_size, size)
        self.wpe = nn.Embedding(config.max_sequence_length, size)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(size, 3 * size), "out": nn.Linear(size, size), "up": nn.Linear(size, 2 * size),
                           "down": nn.Linear(2 * size, size)}) for _ in range(config.n_layers))
        self.ln_f = nn.LayerNorm(size)
        self.ff_out = nn.Linear(size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        if hasattr(module, "weight") and module.weight.dim() == 2:
            nn.init.normal_(module.weight, std=0.2)

    def get_input_embeddings(self):
        return self.wte

    def forward(self, input_ids, attention_mask=None, output_hidden_states=False, return_dict=True):
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        states = []
        for block in self.blocks:
            q, k, v = block["qkv"](x).unsqueeze(1).chunk(3, -1)
            x = x + block["out"](nn.functional.scaled_dot_product_attention(q, k, v, mask)[:, 0])
            x = x + block["down"](block["up"](x).relu())
            states.append(x)
        states[-1] = x = self.ln_f(x)
        return CausalLMOutputWithPast(logits=self.ff_out(x), hidden_states=tuple(states) if output_hidden_states else None)
"""
OWN_CODE = {"configuration_tiny_diffusion.py": CONFIGURATION, "modeling_tiny_diffusion.py": MODELING}
KINDS = [*FAMILIES, "ltg_bert", "remask_gpt", "own_code"]


def tiny_diffusion(folder: Path) -> Path:
    """A folder with code of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in OWN_CODE.items():
        (folder / name).write_text(text)
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    reference = "modeling_tiny_diffusion.TinyDiffusionModel"
    kind: Any = get_class_from_dynamic_module(reference, str(folder), local_files_only=True)
    tokenizer = make("bpe_metaspace")
    torch.manual_seed(0)
    config = kind.config_class(vocab_size=max(tokenizer.get_vocab().values()) + 8)
    kind(config).save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "configuration_tiny_diffusion.TinyDiffusionConfig", "AutoModel": reference,
             "AutoModelForCausalLM": reference}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content | {"auto_map": names}))
    tokenizer.save_pretrained(folder)
    return folder


def own_family(family: str, folder: Path) -> Path:
    """A model of this project, as if it were of another one."""
    tokenizer = train_tokenizer("bpe", [" ".join(WORDS), "".join(LETTERS + SIGNS)], 300)
    architecture = load_config(quick_test=True).architecture.model_copy(
        update={
            "family": family,
            "context": 95,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
        }
    )
    model = make_model(
        "language_model", model_config(architecture, "bidirectional", len(tokenizer)), 0, "tiny"
    )
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder, tokenizer)
    return folder


def masked_lm_folder(kind: str, folder: Path, positions: int = 96) -> Path:
    """A folder of one of `KINDS`."""
    if kind == "own_code":
        return tiny_diffusion(folder)
    if kind in ("ltg_bert", "remask_gpt"):
        return own_family(kind, folder)
    return save(kind, folder, positions=positions, extra=5)


def settings_of(folder: Path, **changes: Any) -> PretrainedConfig:
    """The section `pretrained` for a folder. Code in it is allowed."""
    digest = version_of(hashes_of(folder)) if (folder / "modeling_tiny_diffusion.py").exists() else None
    base = load_config().pretrained.model_dump()
    return PretrainedConfig.model_validate(base | {"model": str(folder), "code_sha256": digest} | changes)


LORA = AdapterConfig(rank=3, alpha=6.0, targets="all-linear")


TEXT_LENGTH, ROWS = 11, 64


def started(opened: Any, mode: str = "language_model", adapter: Any = None, **choices: Any) -> Any:
    """A model of a mode that starts from a pretrained one, in evaluation mode, with every new weight random."""
    heads = heads_of(mode) | choices
    model, _ = start_model(
        mode,
        PretrainedStart(opened, 60, 0.0, adapter=adapter),
        "bidirectional",
        num_ids(opened.tokenizer),
        0,
        "x",
        **heads,
    )
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if not name.startswith("backbone."):
            nn.init.normal_(weight, std=0.3)
    return model.eval()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def some_ids(opened: Any, rows: int, length: int = TEXT_LENGTH) -> torch.Tensor:
    known = np.setdiff1d(np.arange(num_ids(opened.tokenizer)), forbidden_ids(opened.tokenizer))
    return torch.from_numpy(np.random.default_rng(0).choice(known, (rows, length)))


# --- the pipeline -----------------------------------------------------------------------------------------------------

MODELS = ("generator", "reference_lm", "inspector", "judge", "ranker")


def small_config(folder: Path, text: Path, *more: str) -> Any:
    given = settings_of(folder)
    overrides = [
        f"pretrained.model={folder}", f"data.path={text}", "data.passage_characters=48", "data.block_characters=256",
        "data.selection_fraction=0.1", "tokenizer.unknown=unk", "architecture.context=64", "candidates.per_example=2",
        "generator.training.steps=2", "training.batch_size=8", "training.evaluate_every=2", "training.evaluation_examples=8",
        "training.steps=2", "critic.training.steps=2", "models.ar_baseline=null", "models.ranker.training.batch_size=4",
        "sampler.num_samples=2", "sampler.nfe=[4]", "sampler.policies=[ancestral, critic, critic_origin]",
        *(f"models.{name}.training.steps=2" for name in MODELS), *more,
    ]  # fmt: skip
    if given.code_sha256:
        overrides.append(f"pretrained.code_sha256={given.code_sha256}")
    return load_config(["configs/pretrained.yaml"], quick_test=True, overrides=overrides)
