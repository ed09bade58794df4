"""Pretrained masked LMs of other projects behind the interface of this project's models, in every stage."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lib.config import load_config
from lib.errors import BadData
from lib.examples import as_written
from lib.models.build import PretrainedStart, heads_of, load_model, save_model, start_model
from lib.models.pretrained import open_pretrained
from lib.models.pretrained_tokenizer import open_tokenizer
from lib.sections.pretrained import AdapterConfig
from lib.tokenization import (
    decode_batch,
    encode_batch,
    encode_with_masks,
    forbidden_ids,
    load_tokenizer,
    num_ids,
)
from tests.conftest import manifest_of, run_stages
from tests.pretrained_folders import KINDS, masked_lm_folder, settings_of
from tests.test_foreign import TOKENIZERS, make

LORA = AdapterConfig(rank=3, alpha=6.0, targets="all-linear")
TEXT_LENGTH = 11


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
    for name, weight in model.named_parameters():
        if not name.startswith("backbone."):
            nn.init.normal_(weight, std=0.3)
    return model.eval()


def some_ids(opened: Any, rows: int, length: int = TEXT_LENGTH) -> torch.Tensor:
    known = np.setdiff1d(np.arange(num_ids(opened.tokenizer)), forbidden_ids(opened.tokenizer))
    return torch.from_numpy(np.random.default_rng(0).choice(known, (rows, length)))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_one_interface(kind, folders, tmp_path):
    """Logits are those of the model itself around its own special tokens, in any batch, with padding, saved and loaded."""
    opened = open_pretrained(settings_of(folders(kind)))
    ids, size = some_ids(opened, 20), num_ids(opened.tokenizer)
    plain, model = started(opened), started(opened, critic_layers=1)
    # 1. As the model itself, to the bit
    before, after = opened.values["prefix_ids"], opened.values["suffix_ids"]
    row = torch.cat([torch.tensor([before] * 20).long(), ids, torch.tensor([after] * 20).long()], 1)
    theirs = opened.model(input_ids=row).logits[:, len(before) : len(before) + TEXT_LENGTH, :size]
    assert torch.equal(plain(ids).logits, theirs)
    assert plain(ids).logits.shape == (20, TEXT_LENGTH, size)
    # 2. The critic changes no logit, whichever head is asked for
    both = model(ids, head="both")
    assert torch.equal(both.logits, theirs) and torch.equal(model(ids).logits, theirs)
    critic = model(ids, head="critic")
    assert torch.equal(critic.logits, both.critic_logits) and critic.logits.shape == ids.shape
    marked = model(ids, head="critic", conditioning_mask=torch.arange(TEXT_LENGTH).expand(20, -1) < 4)
    assert not torch.equal(marked.logits, critic.logits)
    assert torch.equal(model(ids).logits, theirs)  # the marks are gone
    # 3. Only where they are wanted; any batch
    where = torch.tensor([0, 5, TEXT_LENGTH + 2])
    assert torch.equal(plain(ids, logits_at=where).logits, plain(ids[:2], logits_at=where).logits)
    torch.testing.assert_close(plain(ids, logits_at=where).logits, theirs.flatten(0, 1)[where])
    assert torch.equal(model(ids[3:4], head="critic").logits, critic.logits[3:4])
    # 4. Padding changes nothing, and the special tokens come right behind the text
    pad = opened.tokenizer.pad_token_id
    short = torch.cat([ids[:, :7], torch.full((20, 4), pad)], 1)
    valid = torch.arange(TEXT_LENGTH).expand(20, -1) < 7
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_runs(kind, folders, small_text, tmp_path):
    """Stages 00 to 06. The text is what its tokens say, and special tokens are neither masked nor generated."""
    run_dir = tmp_path / "run_001"
    run_stages(run_dir, small_config(folders(kind), small_text))
    tokenizer = load_tokenizer(run_dir / "01_prepare_dataset" / "tokenizer")
    stage = run_dir / "01_prepare_dataset"
    import pyarrow.parquet as pq

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
