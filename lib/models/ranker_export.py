"""Export a ranker as a stock `AutoModelForSequenceClassification` with one label, for tools other than Remask.

A stock classifier reads one pair of texts with ordinary attention, and ends in one linear layer. In BERT and RoBERTa this follows
the pooler. So these rankers can be exported, each with the linear head:

- causal ones with pooling "last"
- ones of attention "full" with pooling "cls", or also "last" for the backbone of this project
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lib.errors import BadConfig
from lib.models.backbones import position_offset
from lib.models.collation import collate
from lib.models.packing import Pools
from lib.models.ranker import CandidateRanker

OWN = "remask_gpt"
POOLER_THEN_LINEAR = ("bert",)  # pooler of the backbone, then `classifier`
DENSE_THEN_LINEAR = ("roberta", "xlm-roberta")  # the classifier contains the pooler's layer
PROBES = ["a", "a b c 1 2 3"], [["b", "c a 4"], ["a a 5", "b"]]
TOLERANCE, TOLERANCE_OF_HALF = 1e-4, 0.05  # relative to the scores


def export_classifier(model: CandidateRanker, folder: Path, tokenizer: Any) -> None:
    """Write config, merged weights and tokenizer for sentence-transformers' `CrossEncoder(folder)`.

    Its scores equal the ranker's (to 1e-5 in float32) for pairs of `collate` that are not truncated; stock tools truncate in
    another way. Before anything is written, both score a few texts and must agree.

    Raises:
        BadConfig: no stock classifier equals this ranker; the message names the setting to change.
    """
    backbone = _merged(model)
    _refuse(model, backbone)
    classifier = _classifier(model, backbone)
    config = classifier.config
    config.pad_token_id = tokenizer.pad_token_id
    tokenizer = _for_pairs(tokenizer, backbone)
    _compare(model, classifier, tokenizer)
    activation = f"{nn.Identity.__module__}.{nn.Identity.__name__}"
    if config.model_type == OWN:  # its config refuses unknown keys
        Path(folder).mkdir(parents=True, exist_ok=True)
        _write_cross_encoder_files(Path(folder), activation)
    else:
        config.sentence_transformers = {"activation_fn": activation}
    classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _for_pairs(tokenizer: Any, backbone: Any) -> Any:
    """A copy that reads names of special tokens as text, as `collate` does, and has the maximum length."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    tokenizer.split_special_tokens = True
    positions = getattr(backbone.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions - position_offset(backbone))
    kept = ("padding_side", "split_special_tokens", "model_max_length")
    tokenizer.init_kwargs |= {name: getattr(tokenizer, name) for name in kept}  # what is saved
    return tokenizer


def _merged(model: CandidateRanker) -> Any:
    """The backbone with adapters merged into its weights. The ranker itself is not changed."""
    if isinstance(model.backbone, PeftModel):
        return copy.deepcopy(model.backbone).merge_and_unload()
    return model.base


def _refuse(model: CandidateRanker, backbone: Any) -> None:
    kind = backbone.config.model_type
    problems = []
    if model.head_kind != "linear":
        problems.append(f"ranker.head is {model.head_kind}; set it to linear")
    if not model.is_causal and model.attention != "full":
        problems.append("ranker.attention is prefix, and stock models do not make this mask; set it to full")
    wanted = ("last",) if model.is_causal else ("cls", "last") if kind == OWN else ("cls",)
    if model.pooling not in wanted:
        problems.append(f"ranker.pooling is {model.pooling}; set it to {' or '.join(wanted)}")
    if not model.is_causal and kind not in (OWN, *POOLER_THEN_LINEAR, *DENSE_THEN_LINEAR):
        problems.append(
            f"the classifier of {kind} has layers that a ranker does not have; use an encoder of type "
            f"{', '.join((*POOLER_THEN_LINEAR, *DENSE_THEN_LINEAR))} or a causal model"
        )
    elif not model.is_causal and kind != OWN and getattr(backbone, "pooler", None) is None:
        problems.append(
            "its weights have no pooler, and the stock classifier needs one; use an encoder that has one"
        )
    if problems:
        raise BadConfig(f"no stock classifier equals this ranker: {'; '.join(problems)}, and train again")


def _classifier(model: CandidateRanker, backbone: Any) -> Any:
    """The stock classifier with the ranker's weights, in evaluation mode."""
    config = copy.deepcopy(backbone.config)
    config.num_labels, config.problem_type = (
        1,
        "regression",
    )  # otherwise pipelines apply a sigmoid to the score
    config.id2label, config.label2id = {0: "score"}, {"score": 0}
    kind = config.model_type
    if kind == OWN:
        config.pooling = {"cls": "first", "last": "last"}[model.pooling]
    with torch.random.fork_rng(devices=[]):
        classifier = AutoModelForSequenceClassification.from_config(config)
    inner = getattr(classifier, classifier.base_model_prefix)
    tensors = {
        k: v
        for k, v in backbone.state_dict().items()
        if not k.startswith("pooler.") or kind in POOLER_THEN_LINEAR
    }
    inner.load_state_dict(tensors)
    head = getattr(classifier, "score", None) or classifier.classifier
    with torch.no_grad():
        if kind in DENSE_THEN_LINEAR:
            head.dense.load_state_dict(backbone.pooler.dense.state_dict())
            head = head.out_proj
        head.weight.copy_(model.head.out.weight)
        if head.bias is not None:
            head.bias.zero_()
    first = next(backbone.parameters())
    return classifier.to(first.device, first.dtype).eval()


@torch.no_grad()
def _compare(model: CandidateRanker, classifier: Any, tokenizer: Any) -> None:
    """Raise BadConfig if the two score a few texts differently."""
    names = " ".join(map(str, tokenizer.all_special_tokens))
    prompts, candidates = [*PROBES[0], f"a {names}"], [*PROBES[1], ["b", f"{names} b"]]
    limit = getattr(model.config, "max_position_embeddings", 64) // 2
    device = next(classifier.parameters()).device
    pools = collate(tokenizer, prompts, candidates, limit, limit)
    was_training = model.training
    expected = _scores(model.eval(), pools)
    model.train(was_training)
    pairs = [(p, c) for p, row in zip(prompts, candidates, strict=True) for c in row]
    inputs = tokenizer(*zip(*pairs, strict=True), padding=True, return_tensors="pt")
    found = classifier(**inputs.to(device)).logits.squeeze(-1)
    difference = float((expected - found).abs().max()) / (1 + float(expected.abs().max()))
    half = found.dtype not in (torch.float32, torch.float64)
    if difference > (TOLERANCE_OF_HALF if half else TOLERANCE):
        raise BadConfig(
            f"{type(classifier).__name__} with this tokenizer has scores that differ from the ranker's by {difference:.1e}: they "
            "read pairs differently. The padding token may also end texts, or the tokenizer may not make segments; "
            "give the tokenizer a separate padding token"
        )


def _scores(model: CandidateRanker, pools: Pools) -> Tensor:
    return model.score_one_by_one(pools).flatten()


def _write_cross_encoder_files(folder: Path, activation: str) -> None:
    """The files that sentence-transformers 6 writes for a model: one module, pairs in, raw scores out."""
    transformer = "sentence_transformers.base.modules.transformer.Transformer"
    for name, content in (
        ("modules.json", [{"idx": 0, "name": "0", "path": "", "type": transformer}]),
        ("config_sentence_transformers.json", {"model_type": "CrossEncoder", "activation_fn": activation}),
        (
            "sentence_bert_config.json",
            {
                "transformer_task": "sequence-classification",
                "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
                "module_output_name": "scores",
            },
        ),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
