"""
Fuzz whatever reads text of others: YAML, configs, labels, records and programs of FinQA, rows, manifests, headers of models, pages.

Only the errors that are meant for users may come, and each input may take one second at most. With atheris installed
(`pip install atheris`) the inputs are guided by coverage; without it, they are seeds with random changes.

    python -m benchmarks.fuzz all --seconds 600 --corpus outputs/fuzz      # each target for ten minutes
    python -m benchmarks.fuzz yaml --seconds 20
"""

import argparse
import contextlib
import importlib.util
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from benchmarks.result_files import add_out, write
from lib.errors import RemaskError

SECONDS_EACH = 1.0
MAX_LENGTH = 4096
SCRATCH = Path(tempfile.gettempdir())
_read_again: set[str] = set()  # configs that were written and read again


def _file(data: bytes, ending: str) -> Path:
    path = SCRATCH / f"fuzzed{ending}"
    path.write_bytes(data)
    return path


def fuzz_yaml(data: bytes) -> None:
    """The strict reader of YAML: a map of plain values, with a place for each key."""
    from lib.strict_yaml import parse_scalar, parse_yaml

    text = data.decode("utf-8", "replace")
    tree, places = parse_yaml(text, "file")
    assert all(len(place) for place in places) and isinstance(tree, dict)
    parse_scalar(text[:200], "--set")


def fuzz_config(data: bytes) -> None:
    """A config file, and one override. A config that is accepted is the same after it was written and read again."""
    from lib.config import load_config

    text = data.decode("utf-8", "replace")
    first, _, rest = text.partition("\n")
    config = load_config([_file(rest.encode(), ".yaml")], overrides=[first] if "=" in first else [])
    dump = json.dumps(config.model_dump(mode="json"))
    if dump not in _read_again:
        _read_again.add(dump)
        assert load_config([_file(dump.encode(), "_again.yaml")]) == config


def fuzz_labels(data: bytes) -> None:
    """Labels in the format that the first byte chooses."""
    from lib.label_files import read_labels

    endings = (".json", ".jsonl", ".csv", ".tsv")
    labels = read_labels(str(_file(data[1:], endings[(data[:1] or b"0")[0] % 4])))
    for label in labels.by_key.values():
        assert label.score is None or 0 <= label.score <= 1
        assert all(0 <= start < end and 0 < kind <= 127 for start, end, kind in label.spans or ())


def fuzz_rows(data: bytes) -> None:
    """Rows of a user's file in the format that the first byte chooses."""
    from lib.user_files.rows import read_rows

    endings = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".jsonl.gz")
    for row in read_rows(_file(data[1:], endings[(data[:1] or b"0")[0] % 6])):
        assert row.fault is None or row.fault.found is not None


def fuzz_program(data: bytes) -> None:
    """A program of FinQA. What runs gives a number within limits, or yes or no."""
    from lib.tasks.finqa.program import MAX_MAGNITUDE, ProgramError, execute

    table = (("", "2010"), ("revenue", "1,234"), ("costs ( net )", "$ -32 ( 32 )"), ("", ""))
    with contextlib.suppress(ProgramError):
        value = execute(data.decode("utf-8", "replace"), table)
        assert value in ("yes", "no") or abs(float(value)) <= MAX_MAGNITUDE


def fuzz_record(data: bytes) -> None:
    """A file of records of FinQA."""
    from lib.tasks.finqa.record import read_records

    for found in read_records(_file(data, "_train.json")):
        assert found is not None


def fuzz_manifest(data: bytes) -> None:
    """A manifest, an unfinished.json and a part, as the stages and the doctor read them."""
    from lib import runs
    from lib.doctor import examine_run
    from lib.stage.parts import Parts
    from lib.stage.unfinished import Dependencies, UnfinishedWork

    run = SCRATCH / "fuzzed_run"
    folder = run / "01_prepare_dataset"
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    for name in ("manifest.json", "unfinished.json", "parts/part_00000.json"):
        (folder / name).write_bytes(data)
    assert all(state.word for state in examine_run(run))
    Parts(folder, "key", {}).manifest(0)
    with contextlib.suppress(RemaskError):
        UnfinishedWork(folder, Dependencies({}, {}, {})).resume("stage")
    manifest = runs.load_manifest(folder)
    assert manifest is not None and isinstance(manifest["outputs"], dict)


def fuzz_model_files(data: bytes) -> None:
    """Headers of safetensors, config.json and patterns of a tokenizer."""
    from lib.models.folder_check import check_config, may_backtrack, read_header

    may_backtrack(data.decode("utf-8", "replace"))
    with contextlib.suppress(RemaskError):
        assert len(read_header(_file(data, ".safetensors"))) > 0
    assert isinstance(check_config(_file(data, "_config.json"), 10, 1000), dict)


class _Inert(HTMLParser):
    """Fails on whatever could run or load something."""

    scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        allowed = {"html", "head", "meta", "title", "style", "body", "main", "script", "table", "thead", "tbody", "tr", "th", "td",
                   "div", "span", "p", "pre", "i", "h1", "h2", "h3", "article", "details", "summary", "header", "nav", "a", "section"}  # fmt: skip
        assert tag in allowed, f"<{tag}>"
        for name, value in attrs:
            assert not name.startswith("on") and name not in ("src", "srcdoc", "action"), f"{tag} {name}"
            assert name != "href" or (value or "").startswith("#"), f"href {value}"


def fuzz_page(data: bytes) -> None:
    """A page with the same hostile text at every place that holds a text of a user."""
    from lib.report.data import RankedPool
    from lib.report.html_table import interval, table
    from lib.report.page import Section, page, part, report_body
    from lib.report.pools import pools_html
    from lib.report.tint import tinted

    text = data.decode("utf-8", "replace")
    pool = RankedPool(text, text, f"{text}\n{text}", [text, text], [text, text], [1.0, 0.0], [1.0, 0.0], text)
    body = (
        pools_html([pool])
        + part(text, text, table([text], [[interval(text)]], [""]))
        + tinted([0], [0.5], lambda _: text)
    )
    parser = _Inert()
    parser.feed(page(text, report_body(text, [text], [Section(text, text, body)])))
    parser.close()
    assert parser.scripts == 1


def fuzz_terminal(data: bytes) -> None:
    """A line for the terminal has no character that it would obey."""
    from lib.log import printable_line

    line = printable_line(data.decode("utf-8", "surrogateescape"))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", line)


SEEDS: dict[str, list[bytes]] = {
    "yaml": [b"a: 1\nb: {c: [1e-4, x], d: null}\n", b"a: &x [*x]\n", b"? [a]\n: b\n", b"a: 'x\n  y'\nb: |\n  z\n", b"a: !!set {x}\n", b"\xef\xbb\xbfa: 12:30\n"],
    "config": [b"training.steps=5\nseed: 3\nmodels: {a: {mode: ranker}}\n", b"\ndata: {path: x, drop: [null text]}\nquick_test: {seed: 4}\n", b"critic.ppo.clip=.nan\ndiffusion: {masking: {type: sticky, p1: 0.1, p2: 0.2}}\n"],
    "labels": [b'\x00{"a:0": 0.5, "a:1": [[0, 3, 1]]}', b'\x01{"example_id": "a", "score": 1, "spans": []}\n', b"\x02example_id,score,spans\na,0.5,\n", b'\x00{"a": {"score": 0.5, "spans": [[0, 1, 2]]}}'],
    "rows": [b'\x00[{"text": "a"}]', b'\x01{"text": "a"}\n[1]\n', b'\x02text,x\n"a\nb",1\n', b"\x03text\tx\na\t1\n", b"\x04PAR1\x00\x00\x00\x00PAR1"],
    "program": [b"add(1, 2), divide(#0, const_100)", b"table_max(revenue, none)", b"exp(2, -3), greater(#0, 5%)", b"subtract(1,234.5, -7)"],
    "record": [b'[{"id": "a", "filename": "f", "pre_text": ["a"], "post_text": [], "table": [["", "1"]], "qa": {"question": "q", "program": "add(1, 2)", "exe_ans": 3.0, "gold_inds": {}}}]'],
    "manifest": [b'{"manifest_version": 1, "stage": "01_prepare_dataset", "config": {}, "inputs": {}, "outputs": {"a": {"path": "a", "sha256": "0", "bytes": 1, "rows": 2, "parts": []}}, "stats": {}, "units": {}, "command": ["a"], "seconds": 1}', b'{"config": {}, "inputs": {}, "code": {}, "mixed": [], "overwrite": true}', b'{"key": "key", "tables": {}}'],
    "model_files": [b'\x10\x00\x00\x00\x00\x00\x00\x00{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b'{"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2}', rb"(a+|\p{L}*)+[\]x]{2,}"],
    "page": [b"<script>alert(1)</script>", b"\"><img src=x onerror=alert(1)>", b"</style></title><svg onload=x>", b"javascript:alert(1)", b"&lt;b&gt;", "\u202e\u2028".encode()],
    "terminal": [b"\x1b[31mred\x1b]0;t\x07", b"\xc2\x9b31m", "\u202egnp.exe".encode()],
}  # fmt: skip
TARGETS: dict[str, Callable[[bytes], None]] = {name: globals()[f"fuzz_{name}"] for name in SEEDS}


def try_input(target: str, data: bytes) -> None:
    """Raises for an input that breaks a rule. The errors for users are expected."""
    begin = time.process_time()
    with contextlib.suppress(RemaskError):
        TARGETS[target](data)
    seconds = time.process_time() - begin
    if seconds > SECONDS_EACH:
        raise TimeoutError(f"{seconds:.1f} s for {data[:200]!r}")


def changed(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """The input with a few random changes: bytes, repetitions, and pieces of other inputs."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 8))):
        at = draw.randrange(len(found) + 1)
        kind = draw.randrange(5)
        if kind == 0 and found:
            found[at % len(found)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del found[at : at + draw.choice((1, 2, 8))]
        elif kind == 2:
            found[at:at] = bytes(
                draw.choices(b"{}[]()<>\"':,#&*!|-\n\t 0e9.\\\x00\x1b\xff=_a", k=draw.choice((1, 2, 6)))
            )
        elif kind == 3:
            found[at:at] = found[at : at + draw.choice((1, 4, 16))] * draw.choice((2, 3, 50))
        else:
            other = draw.choice(others)
            start = draw.randrange(len(other) + 1)
            found[at:at] = other[start : start + 32]
    return bytes(found[:MAX_LENGTH])


def mutate(target: str, count: int, seed: int, seconds: float = float("inf")) -> int:
    """Try seeds with random changes, until the time is over. Returns the number of inputs."""
    draw, pool = random.Random(f"{seed} {target}"), list(SEEDS[target])
    with contextlib.suppress(RemaskError):
        TARGETS[target](pool[0])  # imports what it needs, before the time begins
    end = time.monotonic() + seconds
    for data in pool:
        try_input(target, data)
    for number in range(count):
        data = changed(draw.choice(pool), draw, pool)
        try_input(target, data)
        if number % 50 == 0 and len(pool) < 500:
            pool.append(data)
        if time.monotonic() > end:
            return number + 1
    return count


def _import_instrumented(target: str) -> None:
    """Import what the targets test so that atheris sees its coverage, also modules that are imported already."""
    global RemaskError
    import atheris

    for name in [n for n in sys.modules if n.partition(".")[0] in ("lib", "yaml")]:
        del sys.modules[name]
    # instrumented, PyYAML is ten times slower: it guides the inputs of its own target only
    with atheris.instrument_imports(include=["lib", "yaml"] if target == "yaml" else ["lib"]):
        for name in ("lib.config", "lib.strict_yaml", "lib.label_files", "lib.user_files.rows", "lib.tasks.finqa.program", "lib.log",
                     "lib.tasks.finqa.record", "lib.doctor", "lib.models.folder_check", "lib.report.pools", "lib.report.tint"):  # fmt: skip
            importlib.import_module(name)
    RemaskError = sys.modules["lib.errors"].RemaskError


def with_atheris(target: str, seconds: float, corpus: Path) -> int:
    """Run libFuzzer over a target in this process; it ends the process. Coverage of lib/ guides the inputs."""
    import atheris

    _import_instrumented(target)
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(SEEDS[target]):
        (corpus / f"seed_{number}").write_bytes(data)
    flags = [
        f"-max_total_time={seconds:.0f}",
        f"-max_len={MAX_LENGTH}",
        "-timeout=10",
        "-rss_limit_mb=1500",
        "-print_final_stats=1",
    ]
    atheris.Setup(
        [sys.argv[0], *flags, f"-artifact_prefix={corpus.parent}/{target}_crash_", str(corpus)],
        lambda data: try_input(target, data),
    )
    atheris.Fuzz()
    return 0


def run_target(target: str, seconds: float, corpus: Path | None) -> dict[str, Any]:
    """Fuzz one target in a process of its own. Figures of what was tried."""
    words = [sys.executable, "-m", "benchmarks.fuzz", target, "--seconds", str(seconds), "--here"]
    words += ["--corpus", str(corpus)] if corpus else []
    done = subprocess.run(words, text=True, capture_output=True, check=False, timeout=2 * seconds + 120)
    text = done.stdout + done.stderr
    inputs = re.search(r"number_of_executed_units: (\d+)|tried (\d+) inputs", text)
    count = int(next(filter(None, inputs.groups()))) if inputs else 0
    new = re.search(r"new_units_added:\s+(\d+)", text)
    crash = "" if done.returncode == 0 else text[-1500:]
    return {
        "target": target,
        "inputs": count,
        "kept": int(new[1]) if new else 0,
        "seconds": seconds,
        "crashes": int(done.returncode != 0),
        "crash": crash,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="a folder for the inputs that reached new code")
    parser.add_argument("--here", action="store_true", help="fuzz in this process")
    add_out(parser)
    args = parser.parse_args()
    if args.here:
        global SCRATCH
        with tempfile.TemporaryDirectory() as folder:
            SCRATCH = Path(folder)
            if importlib.util.find_spec("atheris"):
                corpus = (args.corpus or SCRATCH) / args.target
                return with_atheris(args.target, args.seconds, corpus)
            print(f"tried {mutate(args.target, 10**9, args.seed, args.seconds)} inputs")
        return 0
    rows = []
    for target in TARGETS if args.target == "all" else [args.target]:
        rows.append(run_target(target, args.seconds, args.corpus))
        row = rows[-1]
        print(
            f"{target:<12} {row['inputs']:9,d} inputs, {row['kept']} kept, {row['crashes']} crashes {row['crash']}",
            flush=True,
        )
    if args.target == "all":
        figures: dict[str, Any] = {"rows": [{k: v for k, v in row.items() if k != "crash"} for row in rows]}
        figures["guided"] = bool(importlib.util.find_spec("atheris"))
        write(args.out, "fuzz", figures, provenance())
    return int(any(row["crashes"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
