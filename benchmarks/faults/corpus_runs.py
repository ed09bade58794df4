"""Runs that were damaged or edited by hand: manifests, parts, tables, token stores, checkpoints, locks."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults.corpus import CONFIG, CREATE, DATA, MISSING, USAGE, Case, Place, fifo

Edit = Callable[[Place, Path], Any]
FIRST = ("00_check_data", "01_prepare_dataset")
TEXTS: dict[str, str] = {
    "empty": "",
    "list": "[]",
    "number": "7",
    "null": "null",
    "cut": '{"manifest_version": 1, "stage": "01_prep',
    "100,000 brackets": "[" * 100_000,
    "deep": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "number of 10,000 digits": '{"a": ' + "9" * 10_000 + "}",
}


def _edit(change: Callable[[dict], Any]) -> Edit:
    def apply(place: Place, path: Path) -> None:
        content = json.loads(path.read_text())
        replaced = change(content)
        path.write_text(json.dumps(content if replaced is None else replaced))

    return apply


def _output(**changes: Any) -> Edit:
    """Change the record of the table of documents in a manifest; a value of None removes the key."""

    def change(manifest: dict) -> None:
        record = manifest["outputs"]["documents"]
        record.update(changes)
        for key in [k for k, v in changes.items() if v is None]:
            del record[key]

    return _edit(change)


MANIFESTS: dict[str, Edit] = {
    "output above the folder": _output(path="../../../../etc/hostname"),
    "absolute output": _output(path="/etc/hostname"),
    "output with a zero byte": _output(path="a\0b"),
    "output that is a number": _output(path=7),
    "output without a path": _output(path=None),
    "output without a hash": _output(sha256=None),
    "hash of another file": _output(sha256="0" * 64),
    "hash that is a list": _output(sha256=["0"]),
    "size that is wrong": _output(bytes=1),
    "size that is text": _output(bytes="many"),
    "no size": _output(bytes=None),
    "outputs that are a list": _edit(lambda m: m.update(outputs=[])),
    "output that is a list": _edit(lambda m: m["outputs"].update({next(iter(m["outputs"])): []})),
    "no outputs": _edit(lambda m: m.update(outputs={})),
    "config that is a list": _edit(lambda m: m.update(config=[])),
    "stats that are a list": _edit(lambda m: m.update(stats=[])),
    "inputs that are a list": _edit(lambda m: m.update(inputs=[])),
    "escape in a setting": _edit(lambda m: m["config"].update(seed="\x1b[31m\x07")),
    "pipe": lambda place, path: (path.unlink(), fifo(path)),
    "folder": lambda place, path: (path.unlink(), path.mkdir()),
    "link to a secret": lambda place, path: (path.unlink(), path.symlink_to(place.secret)),
}


def run_cases() -> list[Case]:
    cases: list[Case] = []

    def add(group: str, name: str, file: str, edit: Edit, stages: tuple[str, ...], then: str, *words: str,
            codes: tuple[int, ...] = (DATA, MISSING, CONFIG)) -> None:  # fmt: skip
        def make(place: Place) -> list[str]:
            place.stages(*stages)
            edit(place, place.run / file)
            return place.command(then, more=words)

        cases.append(Case(group, name, make, codes))

    for name, text in TEXTS.items():
        write = lambda place, path, text=text: path.write_text(text)  # noqa: E731
        add("manifest", name, "00_check_data/manifest.json", write, FIRST[:1], FIRST[1])
    for name, edit in MANIFESTS.items():
        # A later stage compares hashes, not sizes
        codes = (0,) if name == "size that is wrong" else (DATA, MISSING, CONFIG)
        add("manifest", name, "00_check_data/manifest.json", edit, FIRST[:1], FIRST[1], codes=codes)
    for name in ("list", "cut", "deep"):
        write = lambda place, path, text=TEXTS[name]: path.write_text(text)  # noqa: E731
        add("manifest, own", name, "01_prepare_dataset/manifest.json", write, FIRST, FIRST[1])
        add("unfinished.json", name, "00_check_data/unfinished.json", write, FIRST, FIRST[1], codes=(0,))
        add("unfinished.json, resumed", name, "01_prepare_dataset/unfinished.json",
            lambda place, path, text=TEXTS[name]: ((path.parent / "manifest.json").unlink(), path.write_text(text)),
            FIRST, FIRST[1], codes=(0,))  # stage 01 starts again  # fmt: skip
        add("model's manifest", name, "04_train/generator/manifest.json", write, (*FIRST, "04_train"),
            "04_train", "--only", "generator")  # fmt: skip
    _add_tables(add)
    _add_folders(add)
    cases += _checkpoints()
    cases += _tools()
    return cases


def _add_tables(add: Callable[..., None]) -> None:
    four = (*FIRST, "02_generate_candidates", "03_build_rewards")

    def replaced(place: Place, path: Path) -> None:
        """A table of another stage, with the manifest's hash of it: only the schema tells."""
        from lib import durable

        other = place.run / "00_check_data" / "problems.parquet"
        path.write_bytes(other.read_bytes())
        manifest = path.parent / "manifest.json"
        content = json.loads(manifest.read_text())
        content["outputs"]["documents"].update(sha256=durable.sha256_file(path), bytes=path.stat().st_size)
        manifest.write_text(json.dumps(content))

    def flip(place: Place, path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))

    documents = "00_check_data/documents.parquet"
    add("table", "flipped bit", documents, flip, FIRST[:1], FIRST[1])
    add("table", "cut", documents, lambda place, path: os.truncate(path, 100), FIRST[:1], FIRST[1])
    add("table", "missing", documents, lambda place, path: path.unlink(), FIRST[:1], FIRST[1])
    add("table", "pipe", documents, lambda place, path: (path.unlink(), fifo(path)), FIRST[:1], FIRST[1])
    add("table", "link to a secret", documents,
        lambda place, path: (path.unlink(), path.symlink_to(place.secret)), FIRST[:1], FIRST[1])  # fmt: skip
    add("table", "folder", documents, lambda place, path: (path.unlink(), path.mkdir()), FIRST[:1], FIRST[1])
    add("table", "another table with its hash", documents, replaced, FIRST[:1], FIRST[1])
    add(
        "part",
        "flipped bit",
        "02_generate_candidates/candidates/part_00000.parquet",
        flip,
        four,
        "04_train",
        "--only",
        "judge",
    )
    add("part", "missing", "02_generate_candidates/candidates/part_00000.parquet",
        lambda place, path: path.unlink(), four, "04_train", "--only", "judge")  # fmt: skip
    add("part", "parts that are a map", "02_generate_candidates/manifest.json",
        _edit(lambda m: m["outputs"]["candidates"].update(parts={"a": 1})), four, "04_train", "--only", "judge")  # fmt: skip
    add("part", "rows that are too many", "02_generate_candidates/manifest.json",
        _edit(lambda m: m["outputs"]["candidates"]["parts"][0].update(rows=10**12)), four, "04_train", "--only", "judge")  # fmt: skip
    for name in ("list", "deep", "cut"):
        add("part manifest", name, "01_prepare_dataset/parts/part_00000.json",
            lambda place, path, text=TEXTS[name]: ((path.parent.parent / "manifest.json").rename(
                path.parent.parent / "unfinished.json"), path.write_text(text)), FIRST, FIRST[1], codes=(0,))  # fmt: skip

    def store(change: Callable[[dict], Any]) -> Edit:
        """Edit a token store, and give the manifest the hash of the folder as it is then."""

        def apply(place: Place, path: Path) -> None:
            from lib import durable

            _edit(change)(place, path)
            tokens, manifest = path.parent, path.parent.parent.parent / "manifest.json"
            content = json.loads(manifest.read_text())
            record = content["outputs"]["tokens/train"]
            record.update(sha256=durable.sha256_folder(tokens), bytes=durable.folder_bytes(tokens))
            manifest.write_text(json.dumps(content))

        return apply

    stored = "01_prepare_dataset/tokens/train/store.json"
    train = ("04_train", "--only", "ar_baseline")
    add("token store", "flipped bit", "01_prepare_dataset/tokens/train/tokens.bin", flip, FIRST, *train)
    add("token store", "negative sizes", stored, store(lambda s: _deep(s, -5)), FIRST, *train)
    add("token store", "sizes of 2^62", stored, store(lambda s: _deep(s, 2**62)), FIRST, *train)
    add("token store", "sizes that are text", stored, store(lambda s: _deep(s, "many")), FIRST, *train)
    add("token store", "another version", stored, store(lambda s: s.update(version=99)), FIRST, *train)
    add("token store", "list", stored, store(lambda s: []), FIRST, *train)
    add("tokenizer of a run", "changed", "01_prepare_dataset/tokenizer/tokenizer.json",
        lambda place, path: path.write_text("{}"), FIRST, *train)  # fmt: skip


def _deep(content: dict, value: Any) -> None:
    """Replace each whole number of a JSON value but the version."""
    for key, old in content.items():
        if isinstance(old, dict):
            _deep(old, value)
        elif isinstance(old, int) and key != "version":
            content[key] = value


def _add_folders(add: Callable[..., None]) -> None:
    """Locks and stages that are not what they should be."""
    only = FIRST[:1]
    lock = ".locks/01_prepare_dataset"

    def with_locks(edit: Edit) -> Edit:
        return lambda place, path: (path.parent.mkdir(exist_ok=True), edit(place, path))

    codes = (CREATE, DATA, MISSING, CONFIG)
    add("lock", "folder", lock, with_locks(lambda place, path: path.mkdir()), only, FIRST[1], codes=codes)
    add("lock", "link to a missing folder", lock,
        with_locks(lambda place, path: path.symlink_to(place.folder / "no" / "lock")), only, FIRST[1], codes=codes)  # fmt: skip
    add(
        "lock",
        "file in place of .locks",
        ".locks",
        lambda place, path: path.write_text("x"),
        only,
        FIRST[1],
        codes=codes,
    )
    add("stage", "file in place of its folder", "01_prepare_dataset", lambda place, path: path.write_text("x"), only, FIRST[1],
        codes=codes)  # fmt: skip
    add("stage", "link to itself", "01_prepare_dataset", lambda place, path: path.symlink_to(path.name), only, FIRST[1],
        codes=codes)  # fmt: skip
    add("stage", "link to a device", "01_prepare_dataset", lambda place, path: path.symlink_to("/dev/null"), only, FIRST[1],
        codes=codes)  # fmt: skip


STATES: dict[str, Edit] = {
    "list": lambda place, path: path.write_text("[]"),
    "cut": lambda place, path: path.write_text('{"step": 1'),
    "deep": lambda place, path: path.write_text(TEXTS["deep"]),
    "step of -1": _edit(lambda s: s.update(step=-1)),
    "step of 10^12": _edit(lambda s: s.update(step=10**12)),
    "step that is text": _edit(lambda s: s.update(step="two")),
    "no step": _edit(lambda s: {k: v for k, v in s.items() if k != "step"}),
    "empty": _edit(lambda s: {}),
}


def _checkpoints() -> list[Case]:
    """A training that was stopped after a checkpoint, which is then edited. Hashes are made to fit where a person could."""

    def of(edit: Edit, file: str, fitting: bool) -> Callable[[Place], list[str]]:
        def make(place: Place) -> list[str]:
            place.stages(*FIRST)
            source, target = place.bases / "stopped" / "04_train", place.run / "04_train"
            import shutil

            shutil.copytree(source, target)
            checkpoint = target / "ar_baseline" / "checkpoint"
            edit(place, checkpoint / file)
            if fitting:
                _fit_hashes(checkpoint)
            return place.command("04_train", more=("--only", "ar_baseline"))

        return make

    def tensors(change: Callable[[dict], dict]) -> Edit:
        def apply(place: Place, path: Path) -> None:
            from safetensors.torch import load_file, save_file

            save_file(change(load_file(path)), path)

        return apply

    cases = [
        Case("checkpoint", f"state: {name}", of(edit, "state.json", True)) for name, edit in STATES.items()
    ]
    edits: dict[str, tuple[str, Edit, bool]] = {
        "flipped byte": ("weights.safetensors", lambda place, path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"), False),
        "hashes that are a list": ("hashes.json", lambda place, path: path.write_text("[]"), False),
        "no hashes": ("hashes.json", lambda place, path: path.unlink(), False),
        "hash of a file outside": ("hashes.json", _edit(lambda h: h | {"../../../../../etc/hostname": "0" * 64}), False),
        "hash of a pipe": ("pipe", lambda place, path: (fifo(path), _edit(lambda h: h | {"pipe": "0" * 64})(
            place, path.parent / "hashes.json")), False),
        "weights of another shape": ("weights.safetensors", tensors(lambda t: {k: v[..., :1].contiguous() for k, v in t.items()}), True),
        "weights without a tensor": ("weights.safetensors", tensors(lambda t: dict(list(t.items())[1:])), True),
        "weights that are no safetensors": ("weights.safetensors", lambda place, path: path.write_bytes(b"\x80\x02."), True),
        "no optimizer": ("optimizer.safetensors", lambda place, path: path.unlink(), True),
        "link to a secret": ("state.json", lambda place, path: (path.unlink(), path.symlink_to(place.secret)), True),
    }  # fmt: skip
    cases += [Case("checkpoint", name, of(edit, file, fit)) for name, (file, edit, fit) in edits.items()]
    return cases


def _fit_hashes(checkpoint: Path) -> None:
    from lib import durable

    hashes = {
        path.relative_to(checkpoint).as_posix(): durable.sha256_file(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != "hashes.json"
    }
    (checkpoint / "hashes.json").write_text(json.dumps(hashes))


def _tools() -> list[Case]:
    """Commands that read a run besides the stages."""

    def inspect(edit: Edit) -> Callable[[Place], list[str]]:
        def make(place: Place) -> list[str]:
            place.stages(*FIRST)
            edit(place, place.run / "01_prepare_dataset" / "manifest.json")
            return ["-m", "lib.runs", str(place.run)]

        return make

    cases = [
        Case("inspect", name, inspect(MANIFESTS.get(name) or (lambda p, path, t=TEXTS[name]: path.write_text(t))), (DATA, 0))
        for name in ("list", "cut", "deep", "outputs that are a list", "stats that are a list", "output that is a list", "pipe")
    ]  # fmt: skip

    def publish(name: str) -> Callable[[Place], list[str]]:
        def make(place: Place) -> list[str]:
            place.stages(*FIRST, "04_train")
            return ["-m", "lib.models.publish", str(place.run), name, str(place.folder / "out")]

        return make

    cases += [
        Case("publish", name, publish(name), (DATA, MISSING, USAGE, CONFIG))
        for name in ("../../../etc", "no_such_model", "a\nb")
    ]

    def score(name: str, content: bytes | None) -> Callable[[Place], list[str]]:
        def make(place: Place) -> list[str]:
            place.stages(*FIRST, "02_generate_candidates", "03_build_rewards", "04_train", "05_train_critic")
            path = place.folder / name
            fifo(path) if content is None else path.write_bytes(content)
            return place.command("06_sample", more=(f"--score={path}",))

        return make

    scores: dict[str, bytes | None] = {
        "pipe.txt": None, "pickle.txt": b"\x80\x02.\x00", "not UTF-8.txt": b"\xff\xfe\xfa" * 50, "no ending": b"text",
        "deep.json": b"[" * 100_000, "empty.txt": b"",
    }  # fmt: skip
    cases += [
        Case("score", name, score(name, content), (DATA, MISSING, USAGE)) for name, content in scores.items()
    ]
    return cases
