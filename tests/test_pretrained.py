"""Pretrained masked LMs of other projects behind the interface of this project's models, in every stage."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForMaskedLM, AutoTokenizer

from lib import own_code
from lib.config import load_config
from lib.diffusion.policies import POLICIES
from lib.diffusion.sampler import Sampler
from lib.diffusion.samples import MaskedTexts
from lib.errors import BadConfig, BadData, MissingInput
from lib.evaluation.lm_eval import Harness
from lib.evaluation.text_scores import windows_for
from lib.examples import as_written, spans_as_written, without_unknown
from lib.models.build import (
    Checkpoint,
    PretrainedStart,
    heads_of,
    load_model,
    save_as_pretrained,
    save_model,
    start_model,
)
from lib.models.pretrained import _config_of, open_pretrained
from lib.models.pretrained_tokenizer import open_tokenizer
from lib.models.publish import _about_code, publish
from lib.outside import refuse_unnamed_pretrained
from lib.sections.critic import CriticConfig
from lib.sections.pretrained import AdapterConfig
from lib.tokenization import (
    decode_batch,
    encode_batch,
    encode_with_masks,
    forbidden_ids,
    load_tokenizer,
    num_ids,
)
from lib.training.critic_setup import critic_heads
from lib.training.freezing import Freezing
from lib.training.objectives.language_model import MaskedDiffusion
from lib.training.optimizer import Optimizer, hidden_matrices
from tests.conftest import manifest_of, run_stages
from tests.pretrained_folders import KINDS, masked_lm_folder, settings_of
from tests.test_foreign import TOKENIZERS, make
from tests.test_hugging_face import check_exact_scores
from tests.trainings import CPU, TOKENS, Killed, context, fingerprint, settings, splits, train_tiny

ROOT = Path(__file__).parents[1]
LORA = AdapterConfig(rank=3, alpha=6.0, targets="all-linear")
TEXT_LENGTH, ROWS = 11, 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Any:
    """kind -> its folder, made once."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = masked_lm_folder(kind, tmp_path_factory.mktemp("models") / kind)
        return made[kind]

    return folder


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


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_one_interface(kind, folders, tmp_path):
    """Logits are those of the model itself around its own special tokens, in any batch, with padding, saved and loaded."""
    opened = open_pretrained(settings_of(folders(kind)))
    ids, size = some_ids(opened, ROWS), num_ids(opened.tokenizer)
    plain, model = started(opened), started(opened, critic_layers=1)
    # 1. As the model itself, to the bit
    before, after = opened.values["prefix_ids"], opened.values["suffix_ids"]
    row = torch.cat([torch.tensor([before] * ROWS).long(), ids, torch.tensor([after] * ROWS).long()], 1)
    theirs = opened.model(input_ids=row).logits[:, len(before) : len(before) + TEXT_LENGTH, :size]
    assert torch.equal(plain(ids).logits, theirs)
    assert plain(ids).logits.shape == (ROWS, TEXT_LENGTH, size)
    # 2. The critic changes no logit, whichever head is asked for
    both = model(ids, head="both")
    assert torch.equal(both.logits, theirs) and torch.equal(model(ids).logits, theirs)
    critic = model(ids, head="critic")
    assert torch.equal(critic.logits, both.critic_logits) and critic.logits.shape == ids.shape
    marked = model(ids, head="critic", conditioning_mask=torch.arange(TEXT_LENGTH).expand(ROWS, -1) < 4)
    assert not torch.equal(marked.logits, critic.logits)
    assert torch.equal(model(ids).logits, theirs)  # the marks are gone
    # 3. Only where they are wanted; any batch
    where = torch.tensor([0, 5, TEXT_LENGTH + 2])
    assert torch.equal(plain(ids, logits_at=where).logits, plain(ids[:2], logits_at=where).logits)
    torch.testing.assert_close(plain(ids, logits_at=where).logits, theirs.flatten(0, 1)[where])
    assert torch.equal(model(ids[3:4], head="critic").logits, critic.logits[3:4])
    with threads(2):  # which split a product by its rows, so sums may be rounded in another order
        alone = [model(ids[row : row + 1], head="both") for row in (0, 40)]
        together = model(ids, head="both")
    for row, one in zip((0, 40), alone, strict=True):
        torch.testing.assert_close(one.logits[0], together.logits[row], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.critic_logits[0], together.critic_logits[row], rtol=1e-4, atol=1e-5)
    # 4. Padding changes nothing, and the special tokens come right behind the text
    pad = opened.tokenizer.pad_token_id
    short = torch.cat([ids[:, :7], torch.full((ROWS, 4), pad)], 1)
    valid = torch.arange(TEXT_LENGTH).expand(ROWS, -1) < 7
    torch.testing.assert_close(
        plain(short, valid).logits[:, :7], plain(ids[:, :7]).logits, rtol=1e-3, atol=1e-4
    )
    padded = model(short, valid, head="critic").logits[:, :7]
    torch.testing.assert_close(padded, model(ids[:, :7], head="critic").logits, rtol=1e-3, atol=1e-4)
    # 5. Saved and loaded
    save_model(model, tmp_path, opened.tokenizer)
    loaded = load_model(tmp_path)(ids, head="both")
    assert torch.equal(loaded.logits, theirs) and torch.equal(loaded.critic_logits, both.critic_logits)


@torch.no_grad()
def test_what_would_be_ignored_is_refused(folders):
    """Padding in front of a text, and arguments that a stock model reads."""
    opened = open_pretrained(settings_of(folders("bert")))
    ids = some_ids(opened, 2)
    left = torch.arange(TEXT_LENGTH).expand(2, -1) >= 2
    front = torch.full((2, 1), opened.tokenizer.cls_token_id)
    for mode in ("language_model", "token_classifier", "sequence_scorer"):
        model = started(opened, mode)
        rows, mask = ids, left
        if mode == "sequence_scorer":
            rows, mask = torch.cat([front, ids], 1), torch.cat([left[:, :1], left], 1)
        with pytest.raises(ValueError, match="padding must come last"):
            model(rows, mask)
        for given in ({"output_hidden_states": True}, {"position_ids": torch.arange(TEXT_LENGTH)}):
            with pytest.raises(ValueError, match=f"does not read {next(iter(given))}"):
                model(rows, **given)
        model(rows, mask.flip(1), output_attentions=False, inputs_embeds=None)  # as peft calls a model


@torch.no_grad()
def test_a_protein_model_as_it_is_published(tmp_path):
    """ESM-2 has a slow tokenizer of its own, special tokens <cls> and <eos>, and scales embeddings by the share of masks."""
    residues = [*"LAGVSERTIDPKQNFYMHWCXBUZO.-"]
    vocabulary = ["<cls>", "<pad>", "<eos>", "<unk>", *residues, "<null_1>", "<mask>"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    hf.EsmTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = hf.EsmConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, pad_token_id=1,
        mask_token_id=vocabulary.index("<mask>"), max_position_embeddings=66, position_embedding_type="rotary", token_dropout=True,
    )  # fmt: skip
    torch.manual_seed(0)
    hf.EsmForMaskedLM(config).save_pretrained(tmp_path)
    opened = open_pretrained(settings_of(tmp_path))
    texts = ["MKTAYIAKQR", "GSHMLEDPVW"]
    ids = encode_batch(opened.tokenizer, texts)
    assert decode_batch(opened.tokenizer, ids) == texts
    assert (opened.values["prefix_ids"], opened.values["suffix_ids"]) == ([0], [2])
    rows = torch.from_numpy(np.stack(ids)).long()
    rows[:, 2:4] = opened.tokenizer.mask_token_id
    theirs = opened.model(
        **hf.EsmTokenizer.from_pretrained(tmp_path)(
            [t[:2] + "<mask><mask>" + t[4:] for t in texts], return_tensors="pt"
        )
    )
    model = started(opened, critic_layers=0)
    assert torch.equal(model(rows).logits, theirs.logits[:, 1:-1])
    padded = torch.cat([rows, torch.full((2, 5), 1)], 1)
    valid = torch.arange(15).expand(2, -1) < 10
    found = model(padded, valid, head="both")
    torch.testing.assert_close(found.logits[:, :10], theirs.logits[:, 1:-1], rtol=1e-3, atol=1e-4)
    alone = model(rows[1:], head="both")
    assert torch.equal(alone.logits[0], model(rows).logits[1])
    torch.testing.assert_close(alone.critic_logits[0], found.critic_logits[1, :10], rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "modernbert", "own_code"])
def test_classifiers_share_the_backbone(kind, folders, tmp_path):
    opened = open_pretrained(settings_of(folders(kind)))
    ids = some_ids(opened, 6)
    tokens = started(opened, "token_classifier")
    assert tokens(ids).logits.shape == (6, TEXT_LENGTH, 3)
    assert torch.equal(tokens(ids[:1]).logits, tokens(ids).logits[:1])
    judge = started(opened, "sequence_scorer")
    front = torch.full((6, 1), opened.tokenizer.cls_token_id)
    scores = judge(torch.cat([front, ids], 1)).logits
    assert scores.shape == (6, 1) and ((scores >= 0) & (scores <= 1)).all() and scores.std() > 0
    later = ids.clone()
    later[:, -1] = ids[:, 0].roll(1)
    assert not torch.equal(judge(torch.cat([front, later], 1)).logits, scores)  # the whole text counts
    language_model = started(opened)
    for name, weight in language_model.named_parameters():
        if name.startswith(tokens.backbone_names):
            assert torch.equal(weight, dict(tokens.named_parameters())[name]), name


def test_scores_are_exact_under_autocast(folders):
    opened = open_pretrained(settings_of(folders("bert")))
    judge = started(opened, "sequence_scorer")
    front = torch.full((6, 1), opened.tokenizer.cls_token_id)
    check_exact_scores(judge, judge.classifier, torch.cat([front, some_ids(opened, 6)], 1), autocast=True)


@pytest.mark.parametrize("kind", ["bert", "deberta_v2", "own_code"])
def test_adapters_learn_alone_and_merge(kind, folders, tmp_path):
    opened = open_pretrained(settings_of(folders(kind)))
    ids = some_ids(opened, 4)
    model = started(opened, adapter=LORA)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning and all(name.startswith("adapter.") for name in learning)
    model(ids).logits.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n in learning)
    with torch.no_grad():
        wanted, plain = model(ids).logits, started(opened)(ids).logits
        assert (wanted - plain).abs().max() > 1e-3
        save_model(model, tmp_path, opened.tokenizer)
        merged = load_model(tmp_path)
        assert merged.adapter is None
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-3, atol=1e-4)


def test_an_adapter_is_part_of_the_backbone_and_the_critics_is_part_of_its_head(folders):
    opened = open_pretrained(settings_of(folders("bert")))

    def learning(model: Any) -> set[str]:
        return {name for name, p in model.named_parameters() if p.requires_grad}

    model = started(opened, "token_classifier", adapter=LORA)
    adapter = {name for name in learning(model) if name.startswith("adapter.")}
    head = {"classifier.weight", "classifier.bias"}
    assert adapter and learning(model) == adapter | head
    choices = settings(
        steps=4, optimizer="normuon", freeze_backbone=True, unfreeze_at_step=2, head_learning_rate=0.5
    )
    groups = {group["group"]: group for group in Optimizer(model, choices).groups()}
    (of_adapter,) = (group for group in groups.values() if set(group["names"]) & adapter)
    assert set(of_adapter["names"]) == adapter and set(groups["head"]["names"]) == head
    assert of_adapter["learning_rate"] == choices.learning_rate and groups["head"]["learning_rate"] == 0.5
    assert of_adapter["optimizer"] == "AdamW" and of_adapter["weight_decay"] == 0
    freezing = Freezing(model, choices, None)
    freezing.at(0)
    assert learning(model) == head
    freezing.at(2)
    assert learning(model) == adapter | head
    with pytest.raises(BadConfig, match="nothing would learn"):
        Freezing(started(opened, adapter=LORA), choices, None)
    critic = started(opened, critic_layers=0, critic_rank=2)
    Freezing(critic, choices, None).at(0)
    own = {name for name, _ in critic.named_parameters() if name.startswith("critic.lora.")}
    assert own and own <= learning(critic) and not own & hidden_matrices(critic)


def test_adapters_of_a_rounded_backbone_stay_exact(folders, tmp_path):
    """The merged weights are those of float32, rounded once."""
    opened = open_pretrained(settings_of(folders("bert")))
    start = PretrainedStart(opened, 60, 0.0, "bfloat16", LORA)
    vocabulary, heads = num_ids(opened.tokenizer), heads_of("token_classifier")
    model, _ = start_model("token_classifier", start, "bidirectional", vocabulary, 0, "x", **heads)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if name.startswith("adapter.") else torch.bfloat16), name
        if name.startswith("adapter."):
            nn.init.normal_(p, std=0.3)
    # 1. Weights of both types learn together
    ids, optimizer = some_ids(opened, 2), Optimizer(model, settings(optimizer="normuon"))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model(ids, labels=ids % 3).loss.backward()
    optimizer.clip_gradients()
    optimizer.step(0)
    for name, value in before.items():
        assert not torch.equal(model.get_parameter(name), value), name
    # 2. Merged
    merged = model.merged()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    name, added = model.adapter.names[0], model.adapter[0]
    plain, summed = (m.backbone.base_model.get_submodule(name).weight for m in (model, merged))
    assert torch.equal(summed, (plain.float() + added.product()).bfloat16())


@torch.no_grad()
def test_the_critics_adapter_is_off_when_the_generator_generates(folders, tmp_path):
    opened = open_pretrained(settings_of(folders("bert")))
    ids = some_ids(opened, 4)
    model, plain = started(opened, critic_layers=0, critic_rank=2), started(opened, critic_layers=0)
    both, wanted = model(ids, head="both"), plain(ids).logits
    assert torch.equal(both.logits, wanted) and torch.equal(model(ids).logits, wanted)
    assert torch.equal(both.critic_logits, model(ids, head="critic").logits)
    for name, weight in model.critic.named_parameters():
        if name.startswith(("score", "origin", "given")):
            weight.copy_(dict(plain.critic.named_parameters())[name])
    assert not torch.equal(model(ids, head="critic").logits, plain(ids, head="critic").logits)
    assert model.separate_critic_pass and not plain.separate_critic_pass
    save_model(model, tmp_path, opened.tokenizer)
    loaded = load_model(tmp_path)(ids, head="both")
    assert torch.equal(loaded.logits, wanted) and torch.equal(
        loaded.critic_logits, model(ids, head="critic").logits
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "albert"])  # the embeddings of ALBERT are narrower than its states
def test_a_linear_critic_compares_each_state_with_the_token_it_belongs_to(kind, folders):
    """As the formula says, from the backbone's own states and embeddings."""
    opened = open_pretrained(settings_of(folders(kind)))
    ids = some_ids(opened, 4)
    model = started(opened, critic_layers=0)

    def normalised(x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + model.critic.eps).rsqrt()

    before, after = (torch.tensor([opened.values[k]] * 4).long() for k in ("prefix_ids", "suffix_ids"))
    output = opened.model(input_ids=torch.cat([before, ids, after], 1), output_hidden_states=True)
    first = before.shape[1]
    state = normalised(output.hidden_states[-1][:, first : first + TEXT_LENGTH])
    token = normalised(opened.model.get_input_embeddings().weight[ids]) @ model.critic.own.weight.T
    wanted = (state + state * token) @ model.critic.score.weight[0] + model.critic.score.bias
    found = model(ids, head="critic").logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    model.critic.own.weight.zero_()  # where it starts: then the score is linear in the state
    plain = state @ model.critic.score.weight[0] + model.critic.score.bias
    torch.testing.assert_close(model(ids, head="critic").logits, plain, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("mark", ["embeddings", "states"])
def test_the_mark_of_known_tokens_is_added_before_or_behind_the_backbone(mark, folders):
    """Behind it, no other token notices; before it, all do. Either way the marked tokens do, and the vector starts at zero."""
    opened = open_pretrained(settings_of(folders("albert")))  # whose embeddings are narrower than its states
    ids, marked = some_ids(opened, 3), torch.arange(TEXT_LENGTH).expand(3, -1) < 4
    model = started(opened, critic_layers=0, critic_mark=mark)
    model.critic.given.weight.zero_()  # where it starts
    plain = model(ids, head="critic").logits
    assert torch.equal(model(ids, head="critic", conditioning_mask=marked).logits, plain)
    model.critic.given.weight.normal_()
    found = model(ids, head="critic", conditioning_mask=marked).logits
    assert (found[marked] != plain[marked]).all()
    assert (found[~marked] == plain[~marked]).all() == (mark == "states")
    if mark == "states":
        more = (model.critic.given.weight[0] * model.critic.score.weight[0]).sum()
        torch.testing.assert_close(found[marked], plain[marked] + more, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("coupling", "lora", "mark"),
    [("decoupled", None, "states"), ("decoupled", {"rank": 2}, "embeddings"), ("joint", None, "embeddings")],
)
def test_only_a_frozen_backbone_is_marked_behind(coupling, lora, mark):
    config = load_config([ROOT / "configs/pretrained.yaml"], overrides=["pretrained.model=/nowhere"])
    critic = CriticConfig.model_validate(config.critic.model_dump() | {"coupling": coupling, "lora": lora})
    heads = critic_heads(critic, config.models["generator"])
    assert heads.get("critic_mark", "embeddings") == mark


def test_layers_are_not_computed_twice_with_other_weights():
    config = load_config(
        overrides=["critic.coupling=stop_gradient", "critic.training.activation_checkpointing=true"]
    )
    with pytest.raises(BadConfig, match=r"stop_gradient.*activation_checkpointing to false"):
        critic_heads(config.critic, config.models["generator"])


def test_shifted_logits_are_those_of_the_position_before(folders):
    folder = folders("own_code")
    plain = open_pretrained(settings_of(folder))
    shifted = open_pretrained(settings_of(folder, shift_logits=True))
    ids = some_ids(plain, 3)
    row = torch.cat([torch.full((3, 1), 2), ids, torch.full((3, 1), 3)], 1)
    with torch.no_grad():
        ours, theirs = started(shifted)(ids).logits, plain.model(input_ids=row).logits
    assert torch.equal(
        ours, theirs[:, :TEXT_LENGTH, : num_ids(plain.tokenizer)]
    )  # [CLS] predicts the first token


# --- training, saving, publishing -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "adapter"), [("bert", LORA), *((kind, None) for kind in KINDS)])
def test_killed_and_resumed_it_ends_with_the_same_bits(kind, adapter, folders, tmp_path):
    opened = open_pretrained(settings_of(folders(kind)))

    def train(folder: str, **more: Any) -> dict[str, str]:
        model = started(opened, adapter=adapter)
        objective = MaskedDiffusion(context(), splits(), load_config(quick_test=True).diffusion, TOKENS)
        given = settings(optimizer="adamw", learning_rate=0.01, steps=6, evaluate_every=3, checkpoint_every=2)
        train_tiny(model, objective, given, tmp_path / folder, **more)
        return fingerprint(tmp_path / folder)

    undisturbed = train("undisturbed")
    for fault in (3, 5):
        with pytest.raises(Killed):
            train("killed", fault=fault)
    assert train("killed") == undisturbed
    assert load_model(tmp_path / "killed" / "best_model").adapter is None


FRESH = """
import sys, torch
from transformers import AutoModelForMaskedLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.load(folder + "/ids.pt")
    with torch.no_grad():
        torch.save(model(ids, head="critic").logits, folder + "/critic.pt")
        torch.save(model(ids).logits, folder + "/lm.pt")
assert not [name for name in sys.modules if name.startswith("lib.")]
"""


@pytest.mark.slow
def test_a_saved_folder_loads_in_a_fresh_process_without_this_project(folders, tmp_path):
    wanted = {}
    for kind in ("esm", "own_code", "ltg_bert", "remask_gpt"):
        opened = open_pretrained(settings_of(folders(kind)))
        model, ids, folder = (
            started(opened, critic_layers=1, critic_rank=2),
            some_ids(opened, 3),
            tmp_path / kind,
        )
        folder.mkdir()
        save_model(model, folder, opened.tokenizer)
        torch.save(ids, folder / "ids.pt")
        with torch.no_grad():
            wanted[folder] = model(ids).logits, model(ids, head="critic").logits
    command = [sys.executable, "-c", FRESH, *map(str, wanted)]
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    for folder, (lm, critic) in wanted.items():
        assert torch.equal(torch.load(folder / "lm.pt"), lm), folder
        assert torch.equal(torch.load(folder / "critic.pt"), critic), folder


@torch.no_grad()
def test_a_generator_is_published_as_the_class_of_its_backbone(folders, tmp_path):
    opened = open_pretrained(settings_of(folders("roberta")))
    model = started(opened, adapter=LORA)
    save_as_pretrained(model, tmp_path, opened.tokenizer)
    stock, tokenizer = (
        AutoModelForMaskedLM.from_pretrained(tmp_path).eval(),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    assert type(stock).__name__ == "RobertaForMaskedLM"
    text = "the fox jumps"
    ids = torch.from_numpy(encode_batch(opened.tokenizer, [text])[0])[None].long()
    row = tokenizer(text, return_tensors="pt")["input_ids"]
    assert torch.equal(row[:, 1:-1], ids)
    theirs = stock(input_ids=row).logits[:, 1:-1, : num_ids(opened.tokenizer)]
    torch.testing.assert_close(model(ids).logits, theirs, rtol=1e-3, atol=1e-4)


def test_a_card_says_who_owns_each_code_file(folders, tmp_path):
    """A critic's folder has the code of both projects, a generator's has that of its backbone alone."""
    opened = open_pretrained(settings_of(folders("own_code")))
    model = started(opened, critic_layers=0)
    theirs = {"configuration_tiny_diffusion.py", "modeling_tiny_diffusion.py"}
    assert set(model.config.code_files) == theirs
    for name, save in (("critic", save_model), ("generator", save_as_pretrained)):
        (tmp_path / name).mkdir()
        save(model, tmp_path / name, opened.tokenizer)
        text = _about_code(tmp_path / name, model.config.code_files)
        ours, _, others = text.partition("These Python files belong to the authors of the pretrained model")
        assert set(re.findall(r"`(.+?)`", others)) == theirs
        assert ("modeling_adapted.py" in ours) == ("Apache-2.0" in ours) == (name == "critic")
        assert not theirs & set(re.findall(r"`(.+?)`", ours))


@torch.no_grad()
def test_a_critic_with_an_adapter_pays_for_its_own_pass(folders):
    """Rounds and passes are counted from the calls of the backbone."""
    opened = open_pretrained(settings_of(folders("bert")))
    tokenizer, passes = opened.tokenizer, {}
    for rank in (None, 2):
        model = started(opened, critic_layers=0, critic_rank=rank)
        calls = []
        model.backbone.bert.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        config = load_config(quick_test=True).sampler
        sampler = Sampler(model, tokenizer.mask_token_id, forbidden_ids(tokenizer), CPU, config, 0)
        masked = np.full((2, 30), tokenizer.mask_token_id)
        made = sampler.sample(MaskedTexts(masked, masked > 0, np.arange(2)), POLICIES["critic_origin"], 8)
        assert set(made.passes) == {len(calls)}
        passes[rank] = len(calls)
    assert passes == {None: 8, 2: 7}  # four rounds, the last one without the critic


# --- what is refused -------------------------------------------------------------------------------------------------


def _edit(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


def _no_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def _no_mask(folder: Path) -> None:
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=make("word_piece").backend_tokenizer, pad_token="[PAD]"
    )
    tokenizer.save_pretrained(folder)


def _other_vocabulary(folder: Path) -> None:
    make("byte_level").save_pretrained(folder)


def _causal(folder: Path) -> None:
    hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=113, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)


def _without_code(folder: Path) -> None:
    """As it was saved from the hub: its code lies in another repository."""
    names = json.loads((folder / "config.json").read_text())["auto_map"]
    _edit(folder, auto_map={auto: f"owner/name--{name}" for auto, name in names.items()})
    for file in folder.glob("*.py"):
        file.unlink()


def _loose(folder: Path) -> None:
    """The decoder has weights of its own, although the config ties it to the embeddings."""
    weights = load_file(folder / "model.safetensors")
    decoder = weights["bert.embeddings.word_embeddings.weight"] * 2
    save_file(
        weights | {"cls.predictions.decoder.weight": decoder}, folder / "model.safetensors", {"format": "pt"}
    )


def _damaged_values(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["ln_f.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _code(old: str, new: str) -> Any:
    """Changes the code of a model that brings its own."""

    def spoil(folder: Path) -> None:
        file = folder / "modeling_tiny_diffusion.py"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    return spoil


ATTENTION = "scaled_dot_product_attention(q, k, v, mask)"
REFUSED_CODE = {
    "causal": (_code(ATTENTION, "scaled_dot_product_attention(q, k, v, is_causal=True)"), "is causal only"),
    "reads padding": (_code(ATTENTION, "scaled_dot_product_attention(q, k, v)"), "reads padding although"),
    "no hidden states": (_code("tuple(states) if output_hidden_states else None", "None"), "no logits and hidden states"),
    "no attention mask": (_code("attention_mask=None, ", ""), "takes no attention_mask"),
    "missing package": (_code("import torch\n", "import torch\nimport no_such_package\n"), "by its own code.*no_such_package"),
    "fails": (_code("states = []", "raise KeyError('x')"), "cannot read a text: KeyError"),
    "not finite": (_damaged_values, "not finite"),
    "code elsewhere": (_without_code, "no modeling_tiny_diffusion.py. Copy it from owner/name"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_CODE)
def test_code_that_cannot_serve_is_refused_by_one_message(name, folders, tmp_path):
    spoil, message = REFUSED_CODE[name]
    folder = tmp_path / "model"
    shutil.copytree(folders("own_code"), folder)
    spoil(folder)
    with pytest.raises(BadData, match=message):
        open_pretrained(settings_of(folder))


@torch.no_grad()
def test_a_decoder_with_weights_of_its_own_keeps_them(folders, tmp_path):
    """Although the config says that they are those of the embeddings: as transformers reads such a folder."""
    shutil.copytree(folders("bert"), tmp_path / "model")
    _loose(tmp_path / "model")
    opened = open_pretrained(settings_of(tmp_path / "model"))
    ids = some_ids(opened, 3)
    row = torch.cat([torch.full((3, 1), 2), ids, torch.full((3, 1), 3)], 1)
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path / "model")(input_ids=row).logits[:, 1:-1]
    theirs, model = theirs[..., : num_ids(opened.tokenizer)], started(opened)
    assert torch.equal(model(ids).logits, theirs)
    (tmp_path / "saved").mkdir()
    save_model(model, tmp_path / "saved", opened.tokenizer)
    assert torch.equal(load_model(tmp_path / "saved")(ids).logits, theirs)
    tied = open_pretrained(settings_of(folders("bert"))).model
    assert tied.config.tie_word_embeddings


def test_the_code_of_a_saved_model_runs_only_if_the_user_allowed_it(folders, tmp_path, monkeypatch):
    """A folder cannot allow its own code: neither by the hashes in its config, nor by leaving them out."""
    opened = open_pretrained(settings_of(folders("own_code")))
    (tmp_path / "saved").mkdir()
    save_model(started(opened), tmp_path / "saved", opened.tokenizer)
    monkeypatch.setattr(own_code, "_allowed", set())
    evil = tmp_path / "evil"
    shutil.copytree(tmp_path / "saved", evil)
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass M: pass\nclass C: pass\n")
    _edit(evil, backbone_class="evil.M", backbone_config_class="evil.C", code_files={})
    with pytest.raises(BadData, match=r"evil needs code of its own, and has no evil\.py"):
        load_model(evil)
    _edit(evil, code_files=own_code.hashes_of(evil))
    for folder in (evil, tmp_path / "saved"):
        start = Checkpoint(folder, 0.0)
        for opening in (
            lambda folder=folder: load_model(folder),
            lambda folder=folder: Harness.open(str(folder)),
            lambda start=start: start_model("language_model", start, "bidirectional", num_ids(opened.tokenizer), 0, "x"),
        ):  # fmt: skip
            with pytest.raises(BadData, match=r"runs code of its own .*pretrained\.code_sha256="):
                opening()
    assert not (tmp_path / "ran").exists()
    digest = settings_of(folders("own_code")).code_sha256
    load_config(overrides=[f"pretrained.code_sha256={digest}"])
    assert load_model(tmp_path / "saved").config.backbone_class


@torch.no_grad()
@pytest.mark.parametrize("kind", ["modernbert", "esm_rotary"])
def test_bfloat16_weights_leave_rotary_frequencies_exact(kind, folders, tmp_path):
    opened = open_pretrained(settings_of(folders(kind)))
    start = PretrainedStart(opened, 60, 0.0, "bfloat16")
    model, _ = start_model("language_model", start, "bidirectional", num_ids(opened.tokenizer), 0, "x")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    exact = dict(opened.model.named_buffers())
    save_model(model, tmp_path, opened.tokenizer)
    for other in (model, load_model(tmp_path)):
        found = {n.removeprefix("backbone."): b for n, b in other.named_buffers() if "inv_freq" in n}
        assert found and all(torch.equal(b, exact[n]) for n, b in found.items())


@torch.no_grad()
def test_an_adapter_leaves_a_layer_alone_that_is_also_the_embedding(folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders("own_code"), folder)
    _code("    config_class", "    _tied_weights_keys = {'ff_out.weight': 'wte.weight'}\n    config_class")(
        folder
    )
    _edit(folder, tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    del weights["ff_out.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    opened = open_pretrained(settings_of(folder))
    assert opened.model.ff_out.weight is opened.model.wte.weight
    model, ids = started(opened, adapter=LORA), some_ids(opened, 4)
    assert model.adapter.names and "ff_out" not in model.adapter.names
    (tmp_path / "saved").mkdir()
    save_model(model, tmp_path / "saved", opened.tokenizer)
    torch.testing.assert_close(
        load_model(tmp_path / "saved")(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-4
    )


REFUSED = {
    "no tokenizer": (_no_tokenizer, MissingInput, "has no tokenizer"),
    "no mask": (_no_mask, BadData, "no mask token.*pretrained.mask_token"),
    "pickled": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), BadData, "is a pickle"),
    "other vocabulary": (_other_vocabulary, BadData, "do not belong together"),
    "causal": (_causal, BadData, "not a masked LM"),
    "decoder": (lambda f: _edit(f, is_decoder=True), BadData, "is_decoder"),
    "quantised": (lambda f: _edit(f, quantization_config={"bits": 4}), BadData, "quantised"),
    "unknown kind": (lambda f: _edit(f, model_type="no_such"), BadData, "does not have"),
    "no folder": (lambda f: shutil.rmtree(f), MissingInput, "is not a folder"),
    "damaged": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), BadData, "model.safetensors|not a masked LM"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_serve_is_refused_in_stage_01(name, folders, small_text, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    spoil, error, message = REFUSED[name]
    folder = tmp_path / "model"
    shutil.copytree(folders("bert"), folder)
    spoil(folder)
    config = small_config(folder, small_text)
    with pytest.raises(error, match=message):
        run_stages(tmp_path / "run", config, ["00_check_data", "01_prepare_dataset"])
    assert not (tmp_path / "run" / "01_prepare_dataset" / "manifest.json").exists()


def test_a_name_on_the_hub_and_a_long_context_are_refused_in_stage_01(
    folders, small_text, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    stages = ["00_check_data", "01_prepare_dataset"]
    for more, error, message in (
        (
            "pretrained.model=owner/no-such-model",
            MissingInput,
            "owner/no-such-model is not a folder.*HF_HUB_OFFLINE=0",
        ),
        ("architecture.context=200", BadConfig, "reads 96 tokens at most.*architecture.context=94"),
    ):
        with pytest.raises(error, match=message):
            run_stages(tmp_path / "run", small_config(folders("bert"), small_text, more), stages)
        assert not (tmp_path / "run" / "01_prepare_dataset" / "manifest.json").exists()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_code_runs_only_if_its_hash_is_given(folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders("own_code"), folder)
    with pytest.raises(
        BadData, match=r"runs code of its own \(configuration.*pretrained.code_sha256=[0-9a-f]{64}"
    ):
        open_pretrained(settings_of(folder, code_sha256=None))
    pinned = settings_of(folder)
    open_pretrained(pinned)
    with (folder / "modeling_tiny_diffusion.py").open("a") as file:
        file.write("\n# changed")
    with pytest.raises(BadData, match="runs code of its own"):
        open_pretrained(pinned)


def test_a_context_that_the_model_cannot_read_is_refused(folders):
    opened = open_pretrained(settings_of(folders("roberta")))
    assert opened.longest == 96 - 1 - 2  # positions start behind the padding; two special tokens
    opened.config(93)
    with pytest.raises(BadConfig, match=r"reads 95 tokens at most.*architecture.context=93"):
        opened.config(94)


def test_a_family_without_a_model_is_refused():
    with pytest.raises(BadConfig, match=r"pretrained\.model is null"):
        refuse_unnamed_pretrained(load_config(["configs/pretrained.yaml"]))
    with pytest.raises(BadConfig, match=r"models.ar_baseline.*cannot be causal"):
        load_config(overrides=["architecture.family=pretrained", "models.reference_lm=null"])


# --- text ------------------------------------------------------------------------------------------------------------

HARD = ("the fox jumps", "Caf\u00e9 na\u00efve fox", "fox \U0001f98a dog \U0001f469\u200d\U0001f52c", "\u05e9\u05dc\u05d5\u05dd the fox",
        "the\tlazy\n\n  dog ", "(fox), don't: dog.", "cafe\u0301 the", "[MASK] the <mask> fox [UNK]")  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_decode_to_the_passage_or_the_tokenizer_is_refused(name, tmp_path):
    make(name).save_pretrained(tmp_path)
    tokenizer, framing = open_tokenizer(tmp_path)
    assert (framing.prefix, framing.suffix) == ([2], [3])
    kept = 0
    for text in HARD:
        try:
            ids = encode_batch(tokenizer, [text], "error")
            as_written(tokenizer, [text], ids, "exact")
            kept += 1
        except BadData as error:
            assert "outside the vocabulary" in str(error) or "loses characters" in str(error)
        else:
            assert decode_batch(tokenizer, ids) == [text]
        ids = encode_batch(tokenizer, [text], "unk")
        assert not set(np.concatenate(ids).tolist()) & (
            set(forbidden_ids(tokenizer)) - {tokenizer.unk_token_id}
        )
        (written,) = as_written(tokenizer, [text], ids, "normalise")
        assert decode_batch(tokenizer, ids) == [written]
    assert (kept == len(HARD)) == (name in ("byte_level", "bpe_metaspace"))


def test_spans_move_with_a_text_that_is_normalised(tmp_path):
    """Spans are in characters of the passage as the user wrote it; the stored text is shorter."""
    make("word_piece_uncased").save_pretrained(tmp_path)
    tokenizer, _ = open_tokenizer(tmp_path)
    text = "the \n\n Quick  fox\tjumps over"
    (written,) = as_written(tokenizer, [text], encode_batch(tokenizer, [text], "unk"), "normalise")
    marked = [[text.index("Quick"), text.index("  fox"), 1], [text.index("\tjumps"), len(text), 2]]
    record = json.dumps({"label": None, "spans": marked})
    (found, other) = spans_as_written(tokenizer, [record, None], [text, "x"], [written, "x"])
    assert found is not None and other is None and written == "the quick fox jumps over"
    assert [(written[a:b], kind) for a, b, kind in json.loads(found)["spans"]] == [
        ("quick", 1),
        ("jumps over", 2),
    ]
    with pytest.raises(BadData, match="has other tokens, so its spans"):
        spans_as_written(tokenizer, [record], [text], ["the fox"])


def test_what_a_tokenizer_does_not_know_leaves_spans_in_place(tmp_path):
    """A stored [UNK] would be other tokens when it is read again. Such words become spaces, and no position changes."""
    make("word_piece_uncased").save_pretrained(tmp_path)
    tokenizer, _ = open_tokenizer(tmp_path)
    text = "The \U0001f600 quick \u4e00fox\u4e00 jumps \U0001f600"
    ids = encode_batch(tokenizer, [text, "the dog"], "unk")
    assert tokenizer.unk_token_id in ids[0]
    (plain, other), found, words = without_unknown(tokenizer, [text, "the dog"], ids)
    assert words == (ids[0] == tokenizer.unk_token_id).sum()
    assert len(plain) == len(text) and other == "the dog" and np.array_equal(found[1], ids[1])
    assert tokenizer.unk_token_id not in found[0] and plain.index("jumps") == text.index("jumps")
    (written,) = as_written(tokenizer, [plain], found[:1], "normalise")
    assert np.array_equal(encode_batch(tokenizer, [written], "unk")[0], found[0])
    record = json.dumps(
        {"spans": [[text.index("quick"), text.index(" jumps"), 1], [text.index("jumps"), len(text), 2]]}
    )
    (moved,) = spans_as_written(tokenizer, [record], [plain], [written])
    assert moved is not None
    assert [written[a:b] for a, b, _ in json.loads(moved)["spans"]] == ["quick fox", "jumps"]
    only = without_unknown(tokenizer, ["\U0001f600"], [[tokenizer.unk_token_id]])
    with pytest.raises(BadData, match="has no token for 1 passages"):
        as_written(tokenizer, *only[:2], "normalise")
    section = SimpleNamespace(spans_key="spans", passage_characters=64, has_labels=True)
    pretrained = SimpleNamespace(model="a folder", text="normalise")
    config = SimpleNamespace(data=section, pretrained=pretrained, tokenizer=SimpleNamespace(unknown="unk"))
    evaluator = SimpleNamespace(config=config, tokenizer=tokenizer, min_context=16)
    parts, left_out = windows_for([("fox", text), ("smile", "\U0001f600")], evaluator)
    assert left_out == words + 1 and [part.document_id for part in parts] == ["fox", "smile"]
    assert parts[0].ids.tolist() == found[0].tolist()
    assert parts[1].ids.tolist() == [tokenizer.unk_token_id], (
        "a text of unknown words alone still has a score"
    )


def test_what_a_tokenizer_loses_is_named(tmp_path):
    make("word_piece_uncased").save_pretrained(tmp_path)
    tokenizer, _ = open_tokenizer(tmp_path)
    texts = ["Caf\u00e9 fox", "the\tdog"]
    with pytest.raises(BadData, match=r"2 of 2 passages.*'C' \(U\+0043\).*pretrained.text=normalise"):
        as_written(tokenizer, texts, encode_batch(tokenizer, texts, "unk"), "exact")


@pytest.mark.parametrize("name", ["word_piece", "byte_level", "unigram_always", "characters"])
def test_masks_in_a_users_text(name, tmp_path):
    make(name).save_pretrained(tmp_path)
    tokenizer, _ = open_tokenizer(tmp_path)
    (row,) = encode_with_masks(tokenizer, ["the [MASK] fox [MASK][MASK]"], "unk")
    assert (row == tokenizer.mask_token_id).sum() == 3
    (again,) = encode_with_masks(
        tokenizer, [f"the {tokenizer.mask_token} fox {tokenizer.mask_token}[MASK]"], "unk"
    )
    assert np.array_equal(row, again)


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


@pytest.fixture(scope="module")
def small_text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    rng = np.random.default_rng(1)
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "lazy",
        "dog",
        "while",
        "seven",
        "wizards",
        "brew",
        "potion",
        "near",
        "old",
        "stone",
    ]
    lines = [" ".join(rng.choice(words, 9)) + "." for _ in range(120)]
    file.write_text("\n\n".join(lines))
    return file


CORE = ("bert", "modernbert", "deberta_v2", "esm", "own_code")  # every kind of tokenizer and of head


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k if k in CORE else pytest.param(k, marks=pytest.mark.long) for k in KINDS])
def test_every_stage_runs(kind, folders, small_text, tmp_path):
    """Stages 00 to 06. The text is what its tokens say, and special tokens are neither masked nor generated."""
    run_dir = tmp_path / "run_001"
    run_stages(run_dir, small_config(folders(kind), small_text))
    tokenizer = load_tokenizer(run_dir / "01_prepare_dataset" / "tokenizer")
    stage = run_dir / "01_prepare_dataset"
    examples = pq.read_table(stage / "examples")
    assert examples["target"].to_pylist() == decode_batch(tokenizer, examples["token_ids"].to_pylist())
    candidates = pq.read_table(run_dir / "02_generate_candidates" / "candidates")
    assert candidates["text"].to_pylist() == decode_batch(tokenizer, candidates["token_ids"].to_pylist())
    never = set(forbidden_ids(tokenizer)) - {tokenizer.unk_token_id}
    for table in (candidates, pq.read_table(run_dir / "06_sample" / "samples")):
        assert not {i for row in table["token_ids"].to_pylist() for i in row} & never
    policies = {row["policy"] for row in manifest_of(run_dir / "06_sample")["stats"]["policies"]}
    assert {"ancestral", "critic", "critic_origin"} <= policies
    generator = load_model(run_dir / "04_train" / "generator" / "best_model")
    assert generator.config.model_type == "remask_adapted" and generator.adapter is None
    for name in ("generator", "critic"):
        card = (publish(run_dir, name, tmp_path / name) / "README.md").read_text()
        (block, *_) = re.findall(r"^```python\n(.*?)^```$", card, re.M | re.S)
        made: dict[str, Any] = {}
        exec(block.replace("THIS_FOLDER", str(tmp_path / name)), made)
        assert made["logits"].isfinite().all() if name == "generator" else np.isfinite(made["errors"]).all()
        assert tokenizer.mask_token in card
        assert ("belong to the authors of the pretrained model" in card) == (kind == "own_code")


def test_a_config_that_is_nested_too_deeply_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(BadData, match=r"config\.json.*nested too deeply"):
        _config_of(tmp_path)
