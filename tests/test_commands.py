"""Every command of README, docs, configs and docstrings runs, small: with --quick_test, on data made here, in a copy of the tree.

`make test-commands` runs them; they take some minutes. The outputs of earlier stages that a command needs are made first.
A new command that cannot be run as it stands needs an entry in `STAND_INS` (what its placeholders mean) or `SMALLER`.
"""

import json
import os
import re
import shutil
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lib.config import ROOT
from tests.documented import SCRIPTS, Command, commands

pytestmark = pytest.mark.commands
STAGES = [script.name for script in SCRIPTS]

# Placeholders of the documents, and what replaces them in the copy
STAND_INS = {
    "/path/to/tinyshakespeare/input.txt": "text.txt",
    "/path/to/text.txt": "text.txt",
    "/path/to/my_texts.csv": "builtin_labelled",
    "my_texts.csv": "builtin_labelled",
    "new_texts.csv": "my_text.txt",
    "/path/to/FinQA/dataset": "finqa_data",
    "FinQA/dataset": "finqa_data",
    "/path/to/dataset": "finqa_data",
    "/path/to/finqa": "finqa_data",
    "/path/to/model": "encoder",
    "/path/to/all-MiniLM-L6-v2": "encoder",
    "/path/to/pools.jsonl": "my_candidates.jsonl",
    "/path/to/wikiqa": "wikiqa",
    "/path/to/solutions.jsonl.xz": "solutions.jsonl",
    "/path/to/solutions.jsonl": "solutions.jsonl",
    "/path/to/gsm2_work": "gsm8k_runs",
    "outputs/all-MiniLM-L6-v2": "encoder",
    "/path/to/masked-lm": "masked_lm",
    "CHECKPOINT": "checkpoint/model.safetensors",
    "model.bin": "checkpoint/model.bin",
    "IN.bin": "checkpoint/model.bin",
    "configs/base.json": "checkpoint/config.json",
    "outputs/shakespeare": "outputs/default",
    "outputs/run_001": "outputs/default",
    "outputs/demo": "outputs/default",
    "/shared/outputs/big": "outputs/big",
    "$SLURM_ARRAY_TASK_ID/64": "0/2",
    "executor.type=ray": "executor.type=processes",  # Ray is optional
    "executor.workers=64": "executor.workers=2",
}
# Settings under which commands with the same configs need another run
RUNS_OF_THEIR_OWN = {
    "labels.path": "labels",
    "data.drop": "drop",
    "data.spans_key": "documents_only",
    "generator.checkpoint": "masked_lm",
    "finqa.pools.same_operators": "operators",
    "models.ranker.training.optimizer": "muon",
}
# Words of single programs that make them small; a program of benchmarks/ without an entry fails its test
SMALLER = {
    "benchmarks.nelbo": "--set data.path=text.txt --set models.generator.training.steps=4 --set architecture.num_hidden_layers=1",
    "benchmarks.leaderboard": "--budget 4 --set data.path=text.txt --set architecture.num_hidden_layers=1",
    "benchmarks.judge": "--quick",
    "benchmarks.detection": "--quick",
    "benchmarks.staging": "--steps 4 --seeds 2",
    "benchmarks.causal_speedrun": "--steps 4",
    "benchmarks.speed": "--steps 2",
    "benchmarks.scaling": "--steps 2",
    "benchmarks.ltg_attention": "--size xs --length 16 --batch 1 --steps 1 --rounds 1",
    "benchmarks.ranker_speed": "--pools 1 --rounds 1 --skip peer",
    "benchmarks.backbone_speed": "--seconds 0.01 --runs 1 --batch 2",
    "benchmarks.finqa_programs": "",
    "benchmarks.finqa_leak": "--set finqa.pools.bank=24 --set finqa.pools.rounds=1 --set finqa.pools.folds=2",
    "benchmarks.memory": "--megabytes 1 2",
    "benchmarks.over_seeds": "",
    "benchmarks.pools_speed": "--pools 2 --ranked 4 --rounds 1 --skip rank",
    "benchmarks.pools_gsm8k": "--short",
    "benchmarks.pretrained_critic": "--help",  # its quick version takes five minutes
    "benchmarks.english_mlm": "--help",
    "benchmarks.antiberty": "--help",
    "benchmarks.pools_wikiqa": "--short --losses --questions 100",
    "benchmarks.executors": "--passages 40 --workers 1 --rounds 1 --set candidates.rows_per_group=40",
    "benchmarks.results_page": "--quick",
    "benchmarks.kills": "--kills 2 --only=00_check_data/--overwrite",
    "benchmarks.power_loss": "--only 00_check_data --states 5",
    "benchmarks.hostile": "--only FinQA",
    "benchmarks.fuzz": "--seconds 1",
    "benchmarks.full_disk": "--chains 1 --only=00_check_data/--overwrite",
    "benchmarks.long_runs": "--share 0.001 --only 03_build_rewards",
    "benchmarks.typos": "--share 0.01",
}
NOT_RUN = {
    "test",
    "test-fast",
    "test-long",
    "test-commands",
    "lint",
    "language",
    "types",
    "format",
    "setup",
}  # of make: they are what CI runs


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what git would clone, with the data that the commands name."""
    root = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    (root / ".venv").symlink_to(sys.prefix)
    make_data(root)
    return root


def make_data(root: Path) -> None:
    import pydoc_data.topics

    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedTokenizerFast

    from lib.config import load_config
    from lib.tasks.finqa.builtin import builtin_records, make_pages
    from lib.tokenization import train_tokenizer
    from tests.test_ltg_bert import reference_dict, small_model

    text = "\n\n".join(list(pydoc_data.topics.topics.values())[:12])
    for name in ("text.txt", "my_text.txt"):
        (root / name).write_text(text, encoding="utf-8")
    pools = [
        {
            "prompt": f"what is {word}{n}?",
            "candidates": [f"{word} is {n}", f"it is not {n}", "no"],
            "rewards": [1, 0, 0],
        }
        for n, word in enumerate(("total", "annual", "margin", "cash", "debt") * 30)
    ]
    lines = "\n".join(json.dumps(row) for row in pools)
    (root / "my_candidates.jsonl").write_text(lines, encoding="utf-8")
    solved = "\n".join(
        json.dumps(row | {"id": f"p{n}", "writers": ["one", "two", "three"]}) for n, row in enumerate(pools)
    )
    (root / "solutions.jsonl").write_text(solved, encoding="utf-8")
    (root / "wikiqa").mkdir()
    for name in ("train", "dev"):
        (root / "wikiqa" / f"{name}.jsonl").write_text(lines.replace("what", name), encoding="utf-8")
    (root / "tinyshakespeare").mkdir()
    (root / "tinyshakespeare" / "input.txt").write_text(text, encoding="utf-8")
    labels = {
        f"text:{i}": {"score": i % 10 / 10, "spans": [[0, 1, 1]] if i % 2 else []} for i in range(20_000)
    }
    (root / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    (root / "finqa_data").mkdir()
    programs = [  # three systems, for the questions of a quick run
        json.dumps({"id": r.id, "programs": {"A": r.program, "B": r.program if i % 3 else "add(1, 2)", "C": "divide(7, 2)"}})
        for i, r in enumerate(builtin_records("builtin_small", load_config().seed))
        if r.split == "dev"
    ]  # fmt: skip
    (root / "programs.jsonl").write_text("\n".join(programs), encoding="utf-8")
    records = make_pages(0, 60)
    pages = sorted({r["filename"] for r in records})
    for split, names in (("train", set(pages[:48])), ("dev", set(pages[48:]))):
        part = [r for r in records if r["filename"] in names]
        (root / "finqa_data" / f"{split}.json").write_text(json.dumps(part), encoding="utf-8")
    characters = sorted({c.lower() for c in string.printable if not c.isspace()})
    words = [*characters, *("##" + c for c in characters), "total", "annual", "margin"]
    vocabulary = {t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    torch.manual_seed(0)
    shape: Any = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                 max_position_embeddings=512)  # fmt: skip
    BertModel(BertConfig(vocab_size=30522, **shape)).save_pretrained(root / "encoder")
    BertForMaskedLM(BertConfig(vocab_size=len(vocabulary), **shape)).save_pretrained(root / "masked_lm")
    for folder in ("encoder", "masked_lm"):
        PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
        ).save_pretrained(root / folder)  # fmt: skip
    model = small_model()
    (root / "checkpoint").mkdir()
    state = reference_dict(model)
    save_file({k: v.contiguous() for k, v in state.items()}, str(root / "checkpoint" / "model.safetensors"))
    torch.save(state, root / "checkpoint" / "model.bin")
    settings = model.config.to_dict()
    (root / "checkpoint" / "config.json").write_text(json.dumps(settings, default=str), encoding="utf-8")
    train_tokenizer("character", ["abc"], 0).save_pretrained(root / "checkpoint")


def small(command: Command, number: int) -> tuple[str, list[list[str]]]:
    """(group of commands that run one after the other, the small command with those that must run before it)."""
    text = command.text
    for name, stand_in in STAND_INS.items():
        text = re.sub(rf"(?<![\w/.-]){re.escape(name)}(?![\w/-])", stand_in, text)
    command = Command(command.where, text)
    arguments = [
        a.replace("OUT_DIR", f"out_{number}").replace("my_model", f"out_{number}") for a in command.arguments
    ]
    if command.kind == "make":
        if arguments[0] in NOT_RUN:
            return "none", []
        run = next((a for a in arguments if a.startswith("RUN=")), f"RUN=outputs/{_slug(arguments)}")
        rest = [a for a in arguments if not a.startswith("RUN=")]
        if arguments[0] == "pipeline":
            return "seeds" if "seed_" in run else run, [["make", *rest, run, "QUICK=1"]]
        if arguments[0] in ("inspect", "report"):
            made = ["make", "pipeline", "RUN=outputs/default", "QUICK=1"]
            return "RUN=outputs/default", [made, ["make", *arguments, "RUN=outputs/default", "QUICK=1"]]
        if arguments[0] == "benchmark-quick":
            return "remasking", [small_remasking(["OUT", "--quick"])]
        return ("quick_test" if arguments[0] == "quick_test" else run), [["make", *arguments]]
    if command.kind == "script":
        run = (
            arguments[arguments.index("--run_dir") + 1]
            if "--run_dir" in arguments
            else f"outputs/{_slug(arguments)}"
        )
        run = "outputs/stream" if "stream.enabled=true" in arguments else run
        given = [*_without(arguments, "--quick_test", "--run_dir="), "--run_dir", run, "--quick_test"]
        shared = _without(
            given,
            "--overwrite",
            "--stream",
            "--mode=",
            "--only=",
            "--score=",
            "--rank=",
            "--out_dir=",
            "--part=",
            "--set=sampler.",
        )
        before = [["python", stage, *shared] for stage in STAGES[: STAGES.index(command.target)]]
        if run == "outputs/stream":  # 02 makes shards beside 04
            before = [["python", stage, *shared] for stage in STAGES[:4]]
            if command.target == "04_train.py":
                before.append(["python", STAGES[2], *_without(given, "--overwrite"), "--stream"])
                return f"RUN={run}", [*before, ["python", command.target, *given]]
            given = [*_without(given, "--stream"), "--stream"]
        return f"RUN={run}", [*before, [*_start(command), command.target, *given]]
    if command.target == "benchmarks.remasking":
        return "remasking", [small_remasking(arguments)]
    if command.target == "benchmarks.finqa_programs":
        return finqa_programs(command, [FINQA_RUN])
    if command.target.startswith("benchmarks"):
        arguments = [{"FOLDER": "encoder" if "ranker" in command.target else "finqa_data", "OUT": "outputs/out"}.get(a, a)
                     for a in arguments]  # fmt: skip
        runs = [a for a in arguments if a == "RUN" or a.startswith("outputs/seed_")]
        before = []
        if command.target == "benchmarks.over_seeds":
            arguments = [f"outputs/seed_{i + 1}" for i in range(len(runs))]
            before = [
                ["make", "pipeline", f"SET=seed={i + 1}", f"RUN={run}", "QUICK=1"]
                for i, run in enumerate(arguments)
            ]
        elif "--run" in arguments:
            arguments[arguments.index("--run") + 1] = "outputs/default"
            before = [["make", "pipeline", "RUN=outputs/default", "QUICK=1"]]
        elif "--store" in arguments:
            given = [*arguments, *SMALLER[command.target].split()]
            before = [["make", "pipeline", "RUN=outputs/default", "QUICK=1"]]
            return "RUN=outputs/default", [*before, ["python", "-m", command.target, *given]]
        given = [*arguments, *SMALLER[command.target].split()]
        group = "RUN=" + arguments[-1] if before else command.target.split(".")[-1]
        group = "seeds" if command.target.endswith("over_seeds") else group
        kind = ["-m", command.target] if command.kind == "module" else [command.target]
        return group, [*before, ["python", *kind, *given]]
    kind = ["-m", command.target] if command.kind == "module" else [command.target]
    before = []
    if command.target == "lib.evaluation.finqa_programs":
        return finqa_programs(command, [{"outputs/default": FINQA_RUN}.get(a, a) for a in arguments])
    if "outputs/default" in arguments:
        before = [["make", "pipeline", "RUN=outputs/default", "QUICK=1"]]
    arguments = [{"config.json": "checkpoint/config.json", "tokenizer.json": "checkpoint/tokenizer.json",
                  "OUT.safetensors": f"out_{number}.safetensors"}.get(a, a) for a in arguments]  # fmt: skip
    return ("RUN=outputs/default" if before else "modules"), [*before, ["python", *kind, *arguments]]


FINQA_RUN = "outputs/finqa_programs"


def finqa_programs(command: Command, arguments: list[str]) -> tuple[str, list[list[str]]]:
    """Commands that read a finished run of FinQA."""
    made = ["make", "pipeline", "CONFIG=configs/finqa.yaml", f"RUN={FINQA_RUN}", "QUICK=1"]
    return f"RUN={FINQA_RUN}", [made, ["python", "-m", command.target, *arguments]]


def _start(command: Command) -> list[str]:
    """`python`, or torchrun with two processes."""
    if not command.launcher:
        return ["python"]
    at = command.launcher.index("--nproc-per-node") + 1
    return ["torchrun", *command.launcher[:at], "2", *command.launcher[at + 1 :]]


def small_remasking(arguments: list[str]) -> list[str]:
    """All commands of the re-masking benchmark share one folder, so that each runs only the settings that are missing.

    They use the same text, since a folder holds results of one text, and the same seed. Only `--contested` gets a seed of its
    own, so that something is left to run. `--tiny` takes the place of `--quick`.
    """
    if "--tables" in arguments:
        return ["python", "-m", "benchmarks.remasking", *arguments, "--tiny"]
    others = _without(arguments[1:], "--quick", "--data=")
    if "--seeds" in others:
        at = others.index("--seeds") + 1
        others[at] = "1" if "--contested" in others else "0"
    return [
        "python",
        "-m",
        "benchmarks.remasking",
        "outputs/remasking",
        "--data",
        "text.txt",
        *others,
        "--tiny",
    ]


def _slug(arguments: list[str]) -> str:
    """A run's name by the configs that a command has, and by settings that change what the first stages make."""
    text = " ".join(arguments)
    parts = re.findall(r"configs/(?:models/)?([a-z0-9_-]+)\.yaml", text)
    parts += ["text"] if "text.txt" in text and parts else []
    parts += ["data"] if "finqa_data" in text else []
    parts += [name for key, name in RUNS_OF_THEIR_OWN.items() if f"{key}=" in text]
    return "_".join(parts) or "default"


def _without(words: list[str], *flags: str) -> list[str]:
    """Words without some flags; `--mode=` is one with a value, `--set=sampler.` one whose value begins so."""
    kept, at = [], 0
    while at < len(words):
        word, following = words[at], words[at + 1] if at + 1 < len(words) else ""
        size = (
            2
            if word
            in (
                "--mode",
                "--only",
                "--score",
                "--rank",
                "--out_dir",
                "--part",
                "--set",
                "--config",
                "--run_dir",
                "--data",
                "--seeds",
            )
            else 1
        )
        gone = word in flags or any(
            "=" in flag and word == flag.partition("=")[0] and following.startswith(flag.partition("=")[2])
            for flag in flags
        )
        kept += [] if gone else words[at : at + size]
        at += size
    return kept


def plan() -> dict[str, list[tuple[Command, list[list[str]]]]]:
    """group -> its commands, with what must run before each. Those that replace outputs of a shared run come last."""
    groups: dict[str, list] = {}
    for number, command in enumerate(commands()):
        group, steps = small(command, number)
        if steps:
            groups.setdefault(group, []).append((command, steps))
    for members in groups.values():
        members.sort(key=lambda member: "--overwrite" in member[1][-1])
    return groups


@pytest.mark.parametrize("group", sorted(plan()))
def test_documented_commands_run(tree, group):
    steps, asked, done = [], {}, set()
    for command, needed in plan()[group]:
        for words in needed:
            if tuple(words) not in done:
                done.add(tuple(words))
                steps.append(words)
        asked[tuple(needed[-1])] = command
    environment = os.environ | {
        "REMASK_DATA": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tree)
    }  # fmt: skip
    answer = subprocess.run(
        [sys.executable, str(tree / "tests" / "run_commands.py")], input=json.dumps(steps), text=True, cwd=tree,
        env=environment, stdout=subprocess.PIPE, timeout=900,
    )  # fmt: skip
    results = [json.loads(line) for line in answer.stdout.splitlines()]
    assert len(results) == len(steps), f"ended after {len(results)} of {len(steps)} commands"
    wrong = []
    for result in results:
        words = tuple(result["words"])
        if result["code"]:
            where = asked[words].where if words in asked else "(needed first)"
            wrong.append(f"{where}: {' '.join(words)}\n  exit {result['code']}: {result['said'][-1500:]}")
    assert not wrong, "\n\n".join(wrong)
