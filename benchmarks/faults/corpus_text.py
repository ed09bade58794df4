"""Hostile configs, flags, texts and file names."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.corpus import CONFIG, CREATE, DATA, MISSING, USAGE, Case, Place, fifo

LAUGHS = "\n".join([
    "a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]",
    *(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
])  # fmt: skip
CONFIGS: dict[str, str | bytes] = {
    "billion laughs": LAUGHS,
    "billion laughs in a known key": LAUGHS + "\ndata: {drop: *i}\n",
    "anchor that contains itself": "data: &a\n  drop: [*a]\n",
    "mapping that contains itself": "models: &m\n  one: *m\n",
    "merge key": "a: &a {steps: 3}\ntraining:\n  <<: *a\n",
    "duplicate keys": "seed: 1\nseed: 2\n",
    "code in a tag": "seed: !!python/object/apply:os.system ['touch CANARY']\n",
    "module in a tag": "seed: !!python/module:antigravity\n",
    "binary tag": "seed: !!binary aGVsbG8=\n",
    "set and ordered map": "data: !!omap [path: x]\nmodels: !!set {generator}\n",
    "NaN as a learning rate": "training: {learning_rate: .nan}\n",
    "infinite learning rate": "training: {learning_rate: .inf}\n",
    "negative layers": "architecture: {num_hidden_layers: -1}\n",
    "10^9 layers": "architecture: {num_hidden_layers: 1000000000}\n",
    "width of 10^12": "architecture: {hidden_size: 1000000000000, num_attention_heads: 4}\n",
    "integer of 10,000 digits": f"seed: {'9' * 10_000}\n",
    "line of 10 MB": "seed: " + "x" * 10_000_000,
    "key of 10 MB": "x" * 10_000_000 + ": 1\n",
    "100,000 brackets": "seed: " + "[" * 100_000,
    "100,000 closed brackets": "seed: " + "[" * 50_000 + "]" * 50_000,
    "10,000 nested maps": "".join(" " * i + "a:\n" for i in range(3_000)),
    "100,000 unknown keys": "".join(f"key_{i}: 1\n" for i in range(100_000)),
    "not UTF-8": b"seed: \xff\xfe\n",
    "zero bytes": b"seed: 1\x00\n",
    "UTF-16": "seed: 1\n".encode("utf-16"),
    "lone surrogate": 'data: {path: "\\ud800"}\n',
    "list": "- seed\n- 1\n",
    "two documents": "seed: 1\n---\nseed: 2\n",
    "look-alike letter in a key": "s\u0435ed: 1\n",
    "terminal escapes in a key": '"\\e]0;owned\\a\\e[31mseed": 1\n',
    "model that is named like a path": 'models: {"../../../tmp/x": {mode: language_model}}\n',
    "boolean as a seed": "seed: true\n",
    "mapping as a path": "data: {path: {a: b}}\n",
    "zero byte in a path": 'data: {path: "a\\0b"}\n',
}  # fmt: skip


def config_cases() -> list[Case]:
    def of(content: str | bytes) -> Callable[[Place], list[str]]:
        def make(place: Place) -> list[str]:
            text = content if isinstance(content, bytes) else content.replace("CANARY", str(place.canary))
            return [*_plain(place), "--config", str(place.file("hostile.yaml", text))]

        return make

    codes = {"zero byte in a path": (MISSING, CONFIG, DATA), "lone surrogate": (MISSING, CONFIG, DATA)}
    cases = [
        Case("config", name, of(content), codes.get(name, (CONFIG,))) for name, content in CONFIGS.items()
    ]

    def special(name: str, path: Callable[[Place], Path | str], *allowed: int) -> None:
        cases.append(
            Case("config", name, lambda place: [*_plain(place), "--config", str(path(place))], allowed)
        )

    special("folder as a config", lambda place: place.folder, CONFIG, MISSING)
    special("pipe without a writer", lambda place: fifo(place.folder / "pipe.yaml"), CONFIG)
    special("endless device", lambda place: "/dev/zero", CONFIG)
    special("name of 5,000 bytes", lambda place: "x" * 5_000, CONFIG, MISSING)
    special("link to itself", lambda place: _link_loop(place.folder / "loop.yaml"), CONFIG, MISSING)

    def flag(name: str, *words: str, codes: tuple[int, ...] = (CONFIG, USAGE)) -> None:
        cases.append(Case("flag", name, lambda place: [*_check(place), *words], codes))

    flag("key of 100,000 parts", "--set", ".".join("a" * 30_000) + "=1")
    flag("value of 30,000 brackets", "--set", "seed=" + "[" * 30_000)
    flag("no number", "--set", "training.steps=1e999")
    flag("dunder key", "--set", "__class__.__init__=1")
    flag("terminal escapes in a value", "--set", "seed=\x1b]0;owned\x07")
    flag("unknown flag with escapes", "--\x1b[31mseed")
    flag("part of zero", "--part", "0/0")
    return cases


TEXTS: dict[str, bytes | Callable[[], bytes]] = {
    "zip bomb.txt.gz": lambda: gzip.compress(b"all work and no play " * 25_000_000, 9, mtime=0),
    "zip bomb of zeros.txt.gz": lambda: gzip.compress(bytes(400_000_000), 9, mtime=0),
    "endless line.jsonl.gz": lambda: gzip.compress(b'{"text": "' + b"a" * 400_000_000, 9, mtime=0),
    "endless field.csv.gz": lambda: gzip.compress(b'text\n"' + b"a" * 400_000_000, 9, mtime=0),
    "endless list.json.gz": lambda: gzip.compress(b"[" + b"1," * 200_000_000, 9, mtime=0),
    "cut.txt.gz": lambda: gzip.compress(os.urandom(10_000))[:-2_000],
    "wrong checksum.txt.gz": lambda: gzip.compress(b"some text " * 500)[:-8] + b"\0" * 8,
    "no gzip.txt.gz": b"plain text",
    "not UTF-8.txt": b"some text \xff\xfe\xfa and more\n" * 20,
    "UTF-16.txt": ("some text and more\n" * 20).encode("utf-16"),
    "zero bytes.txt": b"some text\x00 and more\n" * 20,
    "a program.txt": b"\x7fELF\x02\x01\x01\x00" + os.urandom(5_000),
    "an archive.txt": b"PK\x03\x04" + os.urandom(500),
    "a pickle.txt": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00.",
    "empty.txt": b"",
    "nothing but spaces.txt": b" \n" * 1_000,
    "deep.json": b"[" * 1_000_000,
    "deep and closed.json": b"[" * 200_000 + b"]" * 200_000,
    "deep.jsonl": b'{"text": ' + b"[" * 500_000 + b"\n",
    "huge number.json": b'[{"text": ' + b"9" * 1_000_000 + b"}]",
    "NaN.json": b'[{"text": NaN}]',
    "no list.json": b'{"text": {"text": {}}}',
    "number as text.jsonl": b'{"text": 1}\n{"text": null}\n{"text": ["a"]}\n',
    "cut.jsonl": b'{"text": "abc"}\n{"text": "ab',
    "no such key.jsonl": b'{"body": "abc"}\n',
    "unclosed quote.csv": b'text\n"never closed\n' + b"a line\n" * 1_000,
    "100,000 columns.csv": b",".join(b"c%d" % i for i in range(100_000)) + b"\n",
    "repeated column.csv": b"text,text\na,b\n",
}


def text_cases() -> list[Case]:
    def of(name: str, content: bytes | Callable[[], bytes]) -> Callable[[Place], list[str]]:
        def make(place: Place) -> list[str]:
            path = place.file(name, content() if callable(content) else content)
            return _check(place, f'data.path="{path}"')

        return make

    cases = [Case("text", name, of(name, content), (DATA, MISSING)) for name, content in TEXTS.items()]

    def special(name: str, path: Callable[[Place], Path | str], *allowed: int) -> None:
        cases.append(
            Case(
                "text",
                name,
                lambda place: _check(place, f"data.path={path(place)}"),
                allowed or (DATA, MISSING),
            )
        )

    special("pipe without a writer.txt", lambda place: fifo(place.folder / "pipe.txt"))
    special("endless device", lambda place: "/dev/zero")
    special("link to an endless device.txt", lambda place: _link(place.folder / "zero.txt", "/dev/zero"))
    special("link to itself.txt", lambda place: _link_loop(place.folder / "loop.txt"))
    special("folder that contains itself", lambda place: _folder_loop(place.folder / "texts"))
    special("name of 300 bytes.txt", lambda place: place.folder / ("x" * 300 + ".txt"))
    special("path out of the folder", lambda place: place.folder / ".." / "nothing" / ".." / ".." / "x.txt")
    cases += [_name_case(name, raw) for name, raw in NAMES.items()]
    cases += [
        Case("run folder", name, _run_folder(path), (CREATE, MISSING, DATA, USAGE))
        for name, path in RUN_FOLDERS.items()
    ]
    return cases


NAMES = {
    "line end in a name": b"a\nb.txt",
    "escape in a name": b"\x1b[31mred\x1b[0m\x07.txt",
    "name that is not UTF-8": b"caf\xe9\xff.txt",
    "name of 255 bytes": b"n" * 251 + b".txt",
    "name like a flag": b"--overwrite.txt",
    "name of quotes": b"'; touch canary; '.txt",
    "right-to-left name": "\u202etxt.exe\u202d.txt".encode(),
}
RUN_FOLDERS = {
    "a device": "/dev/null",
    "a file": "FOLDER/file",
    "below a file": "FOLDER/file/run",
    "a link to itself": "FOLDER/loop",
    "a name of 300 bytes": "FOLDER/" + "r" * 300,
}


def _name_case(name: str, raw: bytes) -> Case:
    """A file that cannot be used, under a hostile name. The message names it; nothing is interpreted."""

    def make(place: Place) -> list[str]:
        folder = place.folder / "texts"
        folder.mkdir(parents=True)
        with open(os.fsencode(folder) + b"/" + raw, "wb") as file:
            file.write(b"not UTF-8: \xff\xfe\n")
        return _check(place, f"data.path={folder}")

    return Case("file name", name, make)


def _run_folder(path: str) -> Callable[[Place], list[str]]:
    def make(place: Place) -> list[str]:
        place.file("file", "a file")
        _link_loop(place.folder / "loop")
        words = place.command("00_check_data")
        words[-1] = path.replace("FOLDER", str(place.folder))
        return words

    return make


def _plain(place: Place) -> list[str]:
    """Stage 00 with the defaults alone, so that nothing replaces what a config says."""
    return ["00_check_data.py", "--run_dir", str(place.run)]


def _check(place: Place, *settings: str) -> list[str]:
    return place.command("00_check_data", *settings)


def _link(path: Path, target: str) -> Path:
    path.symlink_to(target)
    return path


def _link_loop(path: Path) -> Path:
    return _link(path, path.name)


def _folder_loop(path: Path) -> Path:
    path.mkdir()
    (path / "again").symlink_to(path)
    return path
