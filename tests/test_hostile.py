"""Hostile and broken files that once were accepted, or ended in a traceback: each was found by benchmarks.hostile or kills."""

import fcntl
import json
import os
import shutil
import signal
import struct
import subprocess
import time

import pytest

from benchmarks import fuzz, typos
from lib import durable
from lib.config import load_config
from lib.errors import BadConfig, BadData, Busy, UsageError
from lib.models.folder_check import check_config, check_tokenizer, may_backtrack, read_header, shards_of
from lib.runs import load_manifest
from lib.shards import ShardStore
from lib.strict_yaml import parse_yaml
from lib.training import checkpoint
from tests.test_artifacts import finish, stage


@pytest.mark.parametrize(
    "text",
    ["a: &x [1]\nb: *x\n", "a: !!set {b}\n", "a: !!python/name:os.system\n", "[" * 5000, "a" * 300_000],
)
def test_yaml_that_grows_or_runs_is_refused(text):
    with pytest.raises(BadConfig):
        parse_yaml(text, "file")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=true", "--set seed=true: seed is true or false"),
        ("critic.rollout_passes=[true, 8]", "critic.rollout_passes is true or false"),
        ("training.learning_rate=.inf", "finite"),
        ("architecture.num_hidden_layers=1000000000", "less than or equal to 1000"),
        ("models=[a]", "models is"),
        ('data.path="a\\0b"', "zero byte"),
        ("models.jugde.training.steps=3", "did you mean 'judge'"),
    ],
)
def test_settings_that_were_accepted_or_ended_in_a_traceback(override, said):
    with pytest.raises(BadConfig, match=r"(?s)" + said.replace(".", r"\.")):
        load_config(overrides=[override])


def test_a_key_of_thousands_of_parts_and_thousands_of_problems(tmp_path):
    with pytest.raises(UsageError, match="at most 20 parts"):
        load_config(overrides=[".".join("a" * 30_000) + "=1"])
    path = tmp_path / "c.yaml"
    path.write_text("".join(f"key_{i}: 1\n" for i in range(1000)))
    with pytest.raises(BadConfig, match="and 980 more"):
        load_config([path])


def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(BadConfig, match="cannot be read"):
            load_config([path])
        with pytest.raises(OSError, match="not a file"):
            durable.sha256_file(tmp_path / "pipe")


def test_json_that_is_nested_too_deeply_or_too_large_is_a_value_error(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        durable.read_json(path)
    with pytest.raises(ValueError, match="more than 10 bytes"):
        durable.read_json(path, 10)


@pytest.mark.parametrize(
    "change",
    [
        {"outputs": []}, {"outputs": {"a": []}}, {"outputs": {"a": {"path": 7, "sha256": "0", "bytes": 1}}}, {"config": []},
        {"outputs": {"a": {"path": "a\0", "sha256": "0", "bytes": 1}}}, {"outputs": {"a": {"path": "a", "bytes": 1}}},
        {"outputs": {"a": {"path": "a", "sha256": "0", "bytes": -1}}}, {"units": ["a"]}, {"inputs": {"a": 1}},
    ],
)  # fmt: skip
def test_a_manifest_that_was_edited_by_hand_is_refused(tmp_path, change):
    content = finish(tmp_path) | change
    path = tmp_path / "run" / "00_check_data" / "manifest.json"
    path.write_text(json.dumps(content))
    with pytest.raises(BadData, match="not a manifest"):
        load_manifest(path.parent)


def test_a_manifest_that_is_a_link_is_not_read(tmp_path):
    finish(tmp_path)
    path = tmp_path / "run" / "00_check_data" / "manifest.json"
    (tmp_path / "elsewhere.json").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(BadData, match="it is a link"):
        load_manifest(path.parent)


@pytest.mark.parametrize("text", ["[]", "7", '{"config": 1', "[" * 100_000])
def test_a_mark_of_unfinished_work_that_is_damaged(tmp_path, text):
    with pytest.raises(RuntimeError), stage(tmp_path):
        raise RuntimeError
    (tmp_path / "run" / "00_check_data" / "unfinished.json").write_text(text)
    with pytest.raises(BadData, match=r"unfinished\.json is damaged"), stage(tmp_path):
        pass


def test_what_killed_processes_left_is_removed(tmp_path):
    """Each SIGKILL in the middle of a write leaves a file with the number of the process in its name."""
    with pytest.raises(RuntimeError), stage(tmp_path) as s:
        (s.folder / "rewards.parquet.99999.tmp").write_bytes(b"x")
        (s.folder / "deep").mkdir()
        (s.folder / "deep" / "a.1.tmp").write_bytes(b"x")
        raise RuntimeError
    (tmp_path / "run" / "config.json.99999.tmp").write_bytes(b"x")
    finish(tmp_path)
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_process_that_dies_after_the_manifest_leaves_a_mark_which_the_next_one_removes(tmp_path):
    finish(tmp_path)
    mark = tmp_path / "run" / "00_check_data" / "unfinished.json"
    mark.write_text("{}")
    with stage(tmp_path) as s:
        assert s.finished
    assert not mark.exists()


# ------------------------------------------------------------------------------------------- models


def tensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


@pytest.mark.parametrize(
    "data", [b"", b"1234567", tensors(b"{}", 2**60), tensors(b"[]"), tensors(b"{}"), tensors(b"[" * 9000), tensors(b"{'a'}")]
)  # fmt: skip
def test_a_header_of_safetensors_that_is_wrong(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(BadData, match="safetensors"):
        read_header(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9}, {"num_hidden_layers": 11}, {"hidden_size": -1}, {"hidden_size": float("nan")},
        {"vocab_size": 10**12}, {"max_position_embeddings": 10**9}, {"text_config": {"hidden_size": 10**9}},
        {"model_type": "../evil"}, {"model_type": ["bert"]}, {"_attn_implementation": "evil/kernel"},
    ],
)  # fmt: skip
def test_a_config_whose_sizes_cannot_be_those_of_the_weights(tmp_path, changes):
    path = tmp_path / "config.json"
    good = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 10, "vocab_size": 100}
    path.write_text(json.dumps(good))
    assert check_config(path, tensors=10, weight_bytes=10_000)["hidden_size"] == 32
    path.write_text(json.dumps(good | changes))
    with pytest.raises(BadData, match=next(iter(changes))[:9].replace("text_conf", "hidden_siz")):
        check_config(path, tensors=10, weight_bytes=10_000)


def test_a_tokenizer_that_grows_repeats_or_gives_wrong_ids(tmp_path):
    from tests.trainings import TOKENIZER

    path, good = tmp_path / "tokenizer.json", json.loads(TOKENIZER.backend_tokenizer.to_str())
    path.write_text(json.dumps(good))
    check_tokenizer(path)
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    regex = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False}
    bad = [
        good | {"normalizer": {"type": "Sequence", "normalizers": [step] * 2}},
        good | {"pre_tokenizer": regex},
        good | {"model": good["model"] | {"vocab": {"a": 0, "b": 0}}},
        good | {"model": good["model"] | {"vocab": {"a": -1}}},
        good | {"model": {"type": "Evil"}},
        {"version": "1.0"},
    ]
    for content in bad:
        path.write_text(json.dumps(content))
        with pytest.raises(BadData, match="tokenizer"):
            check_tokenizer(path)
    path.write_text(json.dumps(good))
    with pytest.raises(BadData, match="more than the weights"):
        check_tokenizer(path, max_tokens=3)


def test_patterns_of_real_tokenizers_are_not_suspected():
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    llama = (
        r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert not any(
        may_backtrack(p) for p in (gpt2, llama, r"[\s\S]", r"(ab)+", r"(\w)(\w+)", r"[(+)]+", r"\(a+\)+")
    )
    assert all(may_backtrack(p) for p in ("(a+)+", "(a*b)*", "((a+)b)+", "(a{2,})+", "(?:x[)]+)*"))


@pytest.mark.parametrize(
    "names", [{"a": "../secret.safetensors"}, {"a": "weights.bin"}, {"a": "no.safetensors"}, [], {}]
)
def test_an_index_of_shards_names_safetensors_beside_it(tmp_path, names):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    (tmp_path.parent / "secret.safetensors").write_bytes(b"x")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(BadData):
        shards_of(index)


def test_a_checkpoint_that_lacks_a_tensor_is_not_continued_in_silence(tmp_path):
    """With hashes that fit: before, the weights that were missing kept their random values."""
    import torch

    weights = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    full = {"weights": weights, "ema": weights, "optimizer": {"a/momentum": torch.zeros(2, 3)}}
    checkpoint.check_tensors(full, {"weights": weights, "ema": weights}, tmp_path)
    for group, found in (("weights", {"a": weights["a"]}), ("ema", {}), ("optimizer", {}), ("weights", weights | {"c": weights["b"]}),
                         ("weights", weights | {"b": torch.zeros(5)}), ("optimizer", {"z/m": weights["b"]})):  # fmt: skip
        with pytest.raises(BadData, match="checkpoint"):
            checkpoint.check_tensors(full | {group: found}, {"weights": weights, "ema": weights}, tmp_path)


# ------------------------------------------------------------------------------- fuzzing and slips


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_random_changes_of_the_seeds_end_in_errors_for_users_alone(target, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SCRATCH", tmp_path)
    assert fuzz.mutate(target, int(os.environ.get("REMASK_FUZZ", 60)), seed=1, seconds=60) > 0


def test_the_fuzzer_notices_what_it_should(monkeypatch):
    def crash(data: bytes) -> None:
        raise KeyError(data)

    monkeypatch.setitem(fuzz.TARGETS, "yaml", crash)
    with pytest.raises(KeyError):
        fuzz.try_input("yaml", b"x")
    parser = fuzz._Inert()
    for page in ("<p onclick=x>", "<img>", "<a href='javascript:x'>", "<iframe>", "<svg>"):
        with pytest.raises(AssertionError):
            parser.feed(page)


def test_slips_of_one_letter_are_refused_with_the_right_name():
    wrong = typos.wrong_keys()
    assert len(wrong) > 5_000
    sample = wrong[:: len(wrong) // 300]
    accepted, unsuggested = typos.try_keys(sample)
    assert accepted == [] and len(unsuggested) <= 0.05 * len(sample)
    count, accepted, unsuggested = typos.try_flags()
    assert accepted == [] and count > 500 and len(unsuggested) <= 0.05 * count
    assert set(typos.slips("ab")) == {"a", "b", "aab", "abb", "ba", "sb", "an"}


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_page_of_hostile_text_runs_nothing_in_a_browser(tmp_path):
    """The title is changed by the page's own script alone: with the policy of the page, nothing else may run."""
    from lib.report.page import Section, page, part, report_body
    from lib.report.tint import tinted

    payloads = [data.decode() for data in fuzz.SEEDS["page"]] + ["<img src=x onerror=document.title='ran'>"]
    text = " ".join(payloads)
    body = part(text, text, tinted([0], [0.5], lambda _: text))
    escaped = page("safe", report_body(text, [text], [Section(text, text, body)]))
    slipped = page(
        "safe", "<script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">"
    )
    for number, html in enumerate((escaped, slipped)):
        (tmp_path / f"{number}.html").write_text(html, encoding="utf-8")
        done = subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--user-data-dir={tmp_path / 'profile'}",
             (tmp_path / f"{number}.html").as_uri()], capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert "<title>safe</title>" in done.stdout, done.stderr[-500:]


def test_a_heartbeat_from_the_future_keeps_no_dead_process_alive(tmp_path):
    """A clock that was put back: the file of a dead process is newer than now."""
    store = ShardStore(tmp_path, "key", 2)
    (tmp_path / "producer.alive").write_text("key")
    assert store.is_alive("producer")
    later = time.time() + 3600
    os.utime(tmp_path / "producer.alive", (later, later))
    assert not store.is_alive("producer")


def test_a_lock_dies_with_its_process(tmp_path):
    """SIGKILL leaves no lock behind, whatever the clock says."""
    finish(tmp_path)
    pid = os.fork()
    if not pid:
        handle = open(tmp_path / "run" / ".locks" / "00_check_data", "a+")  # noqa: SIM115
        fcntl.flock(handle, fcntl.LOCK_EX)
        (tmp_path / "held").touch()
        time.sleep(60)
        os._exit(0)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(Busy), stage(tmp_path):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with stage(tmp_path) as s:
        assert s.finished
