"""Pretrained masked LMs of other projects behind the interface of this project's models: heads, adapters, training, saving."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn
from transformers import AutoModelForMaskedLM, AutoTokenizer

from lib.config import load_config
from lib.diffusion.policies import POLICIES
from lib.diffusion.sampler import Sampler
from lib.diffusion.samples import MaskedTexts
from lib.errors import BadConfig
from lib.models.build import (
    PretrainedStart,
    heads_of,
    load_model,
    save_as_pretrained,
    save_model,
    start_model,
)
from lib.models.pretrained import open_pretrained
from lib.models.publish import _about_code
from lib.sections.critic import CriticConfig
from lib.tokenization import (
    decode_batch,
    encode_batch,
    forbidden_ids,
    num_ids,
)
from lib.training.critic_setup import critic_heads
from lib.training.freezing import Freezing
from lib.training.objectives.language_model import MaskedDiffusion
from lib.training.optimizer import Optimizer, hidden_matrices
from tests.pretrained_folders import KINDS, LORA, ROWS, TEXT_LENGTH, settings_of, some_ids, started, threads
from tests.test_hugging_face import check_exact_scores
from tests.trainings import CPU, TOKENS, Killed, context, fingerprint, settings, splits, train_tiny

ROOT = Path(__file__).parents[1]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_one_interface(kind, pretrained_folder, tmp_path):
    """Logits are those of the model itself around its own special tokens, in any batch, with padding, saved and loaded."""
    opened = open_pretrained(settings_of(pretrained_folder(kind)))
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
def test_what_would_be_ignored_is_refused(pretrained_folder):
    """Padding in front of a text, and arguments that a stock model reads."""
    opened = open_pretrained(settings_of(pretrained_folder("bert")))
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
def test_classifiers_share_the_backbone(kind, pretrained_folder, tmp_path):
    opened = open_pretrained(settings_of(pretrained_folder(kind)))
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


def test_scores_are_exact_under_autocast(pretrained_folder):
    opened = open_pretrained(settings_of(pretrained_folder("bert")))
    judge = started(opened, "sequence_scorer")
    front = torch.full((6, 1), opened.tokenizer.cls_token_id)
    check_exact_scores(judge, judge.classifier, torch.cat([front, some_ids(opened, 6)], 1), autocast=True)


@pytest.mark.parametrize("kind", ["bert", "deberta_v2", "own_code"])
def test_adapters_learn_alone_and_merge(kind, pretrained_folder, tmp_path):
    opened = open_pretrained(settings_of(pretrained_folder(kind)))
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


def test_an_adapter_is_part_of_the_backbone_and_the_critics_is_part_of_its_head(pretrained_folder):
    opened = open_pretrained(settings_of(pretrained_folder("bert")))

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


def test_adapters_of_a_rounded_backbone_stay_exact(pretrained_folder, tmp_path):
    """The merged weights are those of float32, rounded once."""
    opened = open_pretrained(settings_of(pretrained_folder("bert")))
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
def test_the_critics_adapter_is_off_when_the_generator_generates(pretrained_folder, tmp_path):
    opened = open_pretrained(settings_of(pretrained_folder("bert")))
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
def test_a_linear_critic_compares_each_state_with_the_token_it_belongs_to(kind, pretrained_folder):
    """As the formula says, from the backbone's own states and embeddings."""
    opened = open_pretrained(settings_of(pretrained_folder(kind)))
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
def test_the_mark_of_known_tokens_is_added_before_or_behind_the_backbone(mark, pretrained_folder):
    """Behind it, no other token notices; before it, all do. Either way the marked tokens do, and the vector starts at zero."""
    opened = open_pretrained(
        settings_of(pretrained_folder("albert"))
    )  # whose embeddings are narrower than its states
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


def test_shifted_logits_are_those_of_the_position_before(pretrained_folder):
    folder = pretrained_folder("own_code")
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
def test_killed_and_resumed_it_ends_with_the_same_bits(kind, adapter, pretrained_folder, tmp_path):
    opened = open_pretrained(settings_of(pretrained_folder(kind)))

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
def test_a_saved_folder_loads_in_a_fresh_process_without_this_project(pretrained_folder, tmp_path):
    wanted = {}
    for kind in ("esm", "own_code", "ltg_bert", "remask_gpt"):
        opened = open_pretrained(settings_of(pretrained_folder(kind)))
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
def test_a_generator_is_published_as_the_class_of_its_backbone(pretrained_folder, tmp_path):
    opened = open_pretrained(settings_of(pretrained_folder("roberta")))
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


def test_a_card_says_who_owns_each_code_file(pretrained_folder, tmp_path):
    """A critic's folder has the code of both projects, a generator's has that of its backbone alone."""
    opened = open_pretrained(settings_of(pretrained_folder("own_code")))
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
def test_a_critic_with_an_adapter_pays_for_its_own_pass(pretrained_folder):
    """Rounds and passes are counted from the calls of the backbone."""
    opened = open_pretrained(settings_of(pretrained_folder("bert")))
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
