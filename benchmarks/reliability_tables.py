"""The section on reliability of the results page, from the files in docs/results/."""

from typing import Any

from benchmarks.result_files import ResultFile, markdown


def reliability(files: dict[str, ResultFile]) -> list[str]:
    """Kills, losses of power, full disks, hostile files, fuzzing, slips and long runs; nothing of what was not measured."""
    parts = []
    for name, make in (
        ("kills", _kills), ("power_loss", _power_loss), ("full_disk", _full_disk), ("hostile", _hostile), ("fuzz", _fuzz),
        ("typos", _typos), ("long_runs", _long_runs),
    ):  # fmt: skip
        if (file := files.get(name)) is not None:
            parts += [make(file.figures), f"`{file.command}`, {file.source}. {file.note}".strip()]
    opening = "[Reliability](reliability.md) says what is tested, and how."
    return ["## Reliability", opening, *parts] if parts else []


def _kills(figures: dict[str, Any]) -> str:
    rows = [[r["stage"], r["scenario"], str(r["kills"]), str(r["equal"])] for r in figures["rows"]]
    rows.append(["all", "", str(figures["kills"]), str(figures["equal"])])
    at_points = sum(n for name, n in figures["landed"].items() if name != "random time")
    signals = ", ".join(f"{n} {name}" for name, n in sorted(figures["signals"].items()))
    return (
        f"### Kills\n\nReal signals to real processes ({signals}), {at_points} of them at chosen points between the calls that change the disk. "
        "Equal: every byte of the outputs is that of an undisturbed run. "
        f"Exit codes or messages other than the documented ones: {figures['faults']}.\n\n"
        + markdown(["stage", "started as", "kills", "equal"], rows)
    )


def _power_loss(figures: dict[str, Any]) -> str:
    names = ("events", "states", "runs", "completed", "refused", "wrong")
    rows = [[r["case"], *(f"{r[name]:,}" for name in names)] for r in figures["rows"]]
    rows.append(["all", *(f"{sum(r[name] for r in figures['rows']):,}" for name in names)])
    head = [
        "stage",
        "events",
        "different states",
        "of them run",
        "same bytes",
        "refused, then made again",
        "wrong",
    ]
    return (
        "### Loss of power\n\nStates after every event. A state that was not run differs from one that was in files that its run did not "
        "look into.\n\n" + markdown(head, rows)
    )


def _full_disk(figures: dict[str, Any]) -> str:
    names = ("chains", "full", "refused", "equal", "faults")
    rows = [[r["stage"], r["scenario"], *(str(r[name]) for name in names)] for r in figures["rows"]]
    rows.append(["all", "", *(str(figures[name]) for name in names)])
    head = [
        "stage",
        "started as",
        "runs",
        "times full",
        "of them refused before the work",
        "equal runs",
        "faults",
    ]
    return (
        "### Full disks\n\nA run on a disk that the kernel lets become full, again and again. Equal: every byte is that of an undisturbed "
        "run in the end.\n\n" + markdown(head, rows)
    )


def _long_runs(figures: dict[str, Any]) -> str:
    rows = [
        [
            r["case"], f"{r['count']:,} {r['unit']}", f"{r['megabytes']:.0f}", f"{r['bytes_per_unit']:+.0f}",
            f"{r['low']:+.0f} – {r['high']:+.0f}", f"{r['growth']:+.1%}", f"{r['files_first']} → {r['files_last']}",
            f"{r['disk_most'] / 1e6:.1f}",
        ]
        for r in figures["rows"]
    ]  # fmt: skip
    head = [
        "stage",
        "length",
        "memory, MB",
        "growth, bytes each",
        "95 % interval",
        "growth in all",
        "open files",
        "most disk, MB",
    ]
    return "### Long runs\n\nMemory after the first fifth; a line through 20 means.\n\n" + markdown(
        head, rows
    )


def _hostile(figures: dict[str, Any]) -> str:
    rows = [
        [
            r["group"],
            str(r["cases"]),
            str(r["refused"]),
            str(r["harmless"]),
            f"{r['seconds']:.1f}",
            f"{r['megabytes']:.0f}",
        ]
        for r in figures["rows"]
    ]
    rows.append(
        [
            "all",
            str(figures["cases"]),
            str(figures["refused"]),
            str(sum(r["harmless"] for r in figures["rows"])),
            "",
            "",
        ]
    )
    head = ["files", "cases", "refused", "harmless", "longest, s", "most memory, MB"]
    return (
        "### Hostile files\n\nMemory includes the 480 MB of a process that has imported all libraries before. Harmless: the command ends "
        "well and without a side effect.\n\n" + markdown(head, rows)
    )


def _fuzz(figures: dict[str, Any]) -> str:
    rows = [
        [r["target"], f"{r['inputs']:,}", f"{r.get('kept', 0):,}", f"{r['seconds']:.0f}", str(r["crashes"])]
        for r in figures["rows"]
    ]
    how = "guided by coverage (atheris)" if figures["guided"] else "random changes of seeds"
    return f"### Fuzzing\n\nInputs are {how}.\n\n" + markdown(
        ["target", "inputs", "reached new code", "seconds", "crashes and hangs"], rows
    )


def _typos(figures: dict[str, Any]) -> str:
    rows = [
        [r["of"], f"{r['slips']:,}", str(r["accepted"]), f"{r['suggested'] / r['slips']:.1%}"]
        for r in figures["rows"]
    ]
    return "### Slips of one letter\n\n" + markdown(["in", "slips", "accepted", "right suggestion"], rows)
