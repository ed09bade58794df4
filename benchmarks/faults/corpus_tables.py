"""Hostile Parquet files, labels, and records of FinQA."""

import io
import json
import random
from collections.abc import Callable
from typing import Any

from benchmarks.faults.corpus import CONFIG, DATA, MISSING, Case, Place

TEXT_ROWS = [f"row {i}: the quick brown fox jumps over the lazy dog" for i in range(2_000)]


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    """A Parquet file of these columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    settings: dict[str, Any] = {"compression": "zstd"} | options
    pq.write_table(pa.table(columns), sink, **settings)
    return sink.getvalue()


def _flipped(data: bytes, start: float, stop: float, count: int, seed: int) -> bytes:
    """The file with bits flipped between two shares of its length."""
    draw, found = random.Random(seed), bytearray(data)
    for _ in range(count):
        at = draw.randrange(int(start * len(data)), int(stop * len(data)))
        found[at] ^= 1 << draw.randrange(8)
    return bytes(found)


def _tables() -> dict[str, Callable[[], bytes]]:
    import pyarrow as pa

    def plain(**options: Any) -> bytes:
        return parquet(
            {"text": TEXT_ROWS}, **({"write_page_checksum": True, "use_dictionary": False} | options)
        )

    def bits(start: float, stop: float, count: int = 40) -> Callable[[], bytes]:
        return lambda: _flipped(plain(), start, stop, count, int(100 * start))

    def other_footer() -> bytes:
        one, other = plain(), parquet({"text": [9.5] * 50})
        size = int.from_bytes(other[-8:-4], "little")
        return one[: -8 - int.from_bytes(one[-8:-4], "little")] + other[-8 - size :]

    def bomb() -> bytes:
        column = pa.array(["a" * 2_000_000] * 600)
        return parquet({"text": column}, use_dictionary=False, data_page_size=2**31 - 1)

    def many_rows() -> bytes:
        return parquet({"text": pa.array([None] * 200_000_000, pa.string())}, row_group_size=200_000_000)

    def extension() -> bytes:
        kind = pa.field("text", pa.string(), metadata={
            b"ARROW:extension:name": b"arrow.py_extension_type",
            b"ARROW:extension:metadata": b"\x80\x02cposix\nsystem\nq\x00X\x04\x00\x00\x00trueq\x01\x85q\x02Rq\x03.",
        })  # fmt: skip
        import pyarrow.parquet as pq

        sink = io.BytesIO()
        pq.write_table(
            pa.Table.from_arrays([pa.array([1] * 40).cast(pa.string())], schema=pa.schema([kind])), sink
        )
        return sink.getvalue()

    nested: Any = pa.array([["a"], []])
    for _ in range(60):
        nested = pa.ListArray.from_arrays([0, len(nested)], nested)
    return {
        "empty": lambda: b"",
        "the magic number alone": lambda: b"PAR1",
        "two magic numbers": lambda: b"PAR1PAR1",
        "footer of 4 GB": lambda: plain()[:-8] + b"\xff\xff\xff\xff" + b"PAR1",
        "negative footer": lambda: plain()[:-8] + b"\x00\x00\x00\x80" + b"PAR1",
        "no footer": lambda: plain()[:-200],
        "cut in the middle": lambda: plain()[: len(plain()) // 2],
        "bits of the first pages": bits(0.001, 0.2),
        "bits of the middle": bits(0.3, 0.7),
        "bits of the end": bits(0.97, 0.999),
        "footer of another file": other_footer,
        "page that grows 10,000 times": bomb,
        "200 million null rows": many_rows,
        "extension type with a pickle": extension,
        "no column text": lambda: parquet({"body": TEXT_ROWS}),
        "numbers as text": lambda: parquet({"text": list(range(100))}),
        "lists as text": lambda: parquet({"text": [["a"]] * 100}),
        "nested lists": lambda: parquet({"text": nested}),
        "binary that is not UTF-8": lambda: parquet({"text": pa.array([b"\xff\xfe\xfa"] * 100)}),
        "invalid UTF-8 as text": lambda: parquet(
            {"text": pa.array([b"\xff\xfe\xfa"] * 100).view(pa.string())}
        ),
        "no rows": lambda: parquet({"text": pa.array([], pa.string())}),
        "null texts": lambda: parquet({"text": pa.array([None] * 100, pa.string())}),
        "repeated column": lambda: _repeated_column(),
        "another format": lambda: b"ORC" + bytes(200),
    }


def _repeated_column() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(TEXT_ROWS)] * 2, names=["text", "text"]), sink)
    return sink.getvalue()


def parquet_cases() -> list[Case]:
    def of(name: str, content: Callable[[], bytes]) -> Callable[[Place], list[str]]:
        def make(place: Place) -> list[str]:
            return place.command("00_check_data", f'data.path="{place.file(f"{name}.parquet", content())}"')

        return make

    return [Case("parquet", name, of(name, content), (DATA, MISSING)) for name, content in _tables().items()]


# ------------------------------------------------------------------------------------------------ labels

LABELS: dict[str, str] = {
    "NaN.json": '{"a:0": NaN}',
    "infinite.json": '{"a:0": Infinity}',
    "1e999.json": '{"a:0": 1e999}',
    "number of 10,000 digits.json": '{"a:0": ' + "9" * 10_000 + "}",
    "beyond one.json": '{"a:0": 2.5, "a:1": -1}',
    "repeated name.json": '{"a:0": 0.5, "a:0": 0.7}',
    "boolean.json": '{"a:0": true}',
    "text.json": '{"a:0": "half"}',
    "null.json": '{"a:0": null}',
    "deep.json": '{"a:0": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "spans beyond 2^63.json": '{"a:0": [[0, 99999999999999999999, 1]]}',
    "negative spans.json": '{"a:0": [[-5, -1, 1]]}',
    "spans that overlap.json": '{"a:0": [[0, 9, 1], [3, 12, 2]]}',
    "class of 10^9.json": '{"a:0": [[0, 3, 1000000000]]}',
    "spans of fractions.json": '{"a:0": [[0.5, 3, 1]]}',
    "list of numbers.json": "[1, 2, 3]",
    "number.json": "7",
    "empty.json": "",
    "no columns.csv": "name,value\na,1\n",
    "code in a cell.csv": "example_id,score\na:0,\"__import__('os').system('true')\"\n",
    "records without ids.jsonl": '{"score": 0.5}\n{"example_id": null, "score": 1}\n',
    "escape in an id.json": '{"\\u001b[31mred\\u0007": 5}',
    "surrogate in an id.json": '{"\\ud800": 5}',
}


def label_cases() -> list[Case]:
    def of(name: str, content: str) -> Callable[[Place], list[str]]:
        def make(place: Place) -> list[str]:
            path = place.file(name, content)
            words = ["00_check_data.py", "--config", "configs/own_labels.yaml", "--quick_test"]
            return [*words, "--set", f'labels.path="{path}"', "--run_dir", str(place.run)]

        return make

    return [Case("labels", name, of(name, content), (DATA,)) for name, content in LABELS.items()]


# ------------------------------------------------------------------------------------------------ FinQA


def _record(**changes: Any) -> dict[str, Any]:
    """A record as FinQA has them."""
    qa = {"question": "what is the sum?", "program": "add(1, 2)", "exe_ans": 3.0, "gold_inds": {}}
    record: dict[str, Any] = {
        "id": "A/2010/page_1.pdf-1", "filename": "A/2010/page_1.pdf", "pre_text": ["some text."], "post_text": ["more."],
        "table": [["", "2010", "2009"], ["revenue", "1", "2"]], "qa": qa,
    }  # fmt: skip
    qa |= {key: changes.pop(key) for key in list(changes) if key in qa}
    return record | changes


def _of_records(**changes: Any) -> str:
    return json.dumps([_record(**changes), _record(id="B/2011/page_2.pdf-1", filename="B/2011/page_2.pdf")])


FINQA: dict[str, str] = {
    "map in place of a list": "{}",
    "no records": "[]",
    "100,000 brackets": "[" * 100_000,
    "numbers": "[1, 2, 3]",
    "nulls": "[null, null]",
    "record without qa": json.dumps([{"id": "a"}]),
    "call of Python": _of_records(program="__import__('os').system('true')"),
    "power tower": _of_records(program=", ".join(["exp(10, 300)", *(f"exp(#{i}, 300)" for i in range(40))])),
    "100,000 steps": _of_records(program=", ".join(["add(1, 2)"] * 100_000)),
    "nested calls": _of_records(program="add(" * 20_000 + "1, 2" + ")" * 20_000),
    "step that refers to itself": _of_records(program="add(#0, #0)"),
    "step of 10^9": _of_records(program="add(#1000000000, 1)"),
    "number of 100,000 digits": _of_records(program=f"add({'9' * 100_000}, 1)"),
    "program that is a list": _of_records(program=["add(1, 2)"]),
    "NaN answer": '[{"id": "a", "qa": {"question": "q", "program": "add(1, 2)", "exe_ans": NaN}}]',
    "table that is text": _of_records(table="a table"),
    "table of maps": _of_records(table=[[{"a": 1}]]),
    "ragged table": _of_records(table=[["a"], [], ["b", "c", "d"], 5]),
    "identical ids": json.dumps([_record(), _record()]),
    "id as a path": _of_records(id="../../../etc/passwd", filename="../../../etc/passwd"),
    "id that is a map": _of_records(id={"a": 1}),
    "pre_text that is deep": _of_records(pre_text=[[[["a"]]]]),
}


def finqa_cases() -> list[Case]:
    def of(content: str) -> Callable[[Place], list[str]]:
        def make(place: Place) -> list[str]:
            folder = place.folder / "finqa"
            for split in ("train", "dev", "test"):
                place.file(f"finqa/{split}.json", content)
            return place.command("00_check_data", f"data.path={folder}", base="finqa")

        return make

    allowed = {"nulls": (DATA,), "no records": (DATA, MISSING)}
    return [
        Case("FinQA", name, of(content), allowed.get(name, (DATA, MISSING, CONFIG)))
        for name, content in FINQA.items()
    ]
