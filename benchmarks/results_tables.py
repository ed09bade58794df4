"""The tables of the default run and of FinQA on the results page, from the files in docs/results/."""

from typing import Any

from benchmarks.result_files import ResultFile, interval, markdown, number, percent_cells

Figures = dict[str, Any]

NAMES = {
    "adamw": "AdamW",
    "muon": "Muon",
    "ar_baseline": "`ar_baseline`",
    "report new": "report not in train",
}


# ---------------------------------------------------------------------------------------- the default run


def models_table(file: ResultFile) -> str:
    """Each trained model against its baseline. README has this table, too."""
    figures = file.figures
    rows = [
        [NAMES.get(row["model"], row["model"]), row["metric"], number(row["value"]), interval(row), f"{row['baseline']} {number(row['baseline_value'])}"]
        for row in figures["models"]
    ]  # fmt: skip
    fills, whole = figures["critic"]["fills"], figures["critic"]["whole_text"]
    better = fills["critic"]["value"] > fills["confidence"]["value"]
    stored = number(fills["confidence"]["value"])
    stored = stored if better else f"**{stored}**"
    rows += [
        ["critic", "AUROC of wrong tokens, in the generator's own fills", number(fills["critic"]["value"]), interval(fills["critic"]),
         f"stored confidence {stored}; both together {number(fills['both']['value'])}"],
        ["critic", "AUROC of wrong tokens, in external text", number(whole["critic"]["value"]), interval(whole["critic"]),
         f"fresh confidence {number(whole['fresh_confidence']['value'])}"],
    ]  # fmt: skip
    return markdown(["model", "metric", "value", "95 % interval", "baseline"], rows)


def policies_table(file: ResultFile) -> str:
    """Samples of each policy: likelihood beside diversity."""
    rows = []
    for row in file.figures["policies"]:
        name = f"`{row['policy']}`" if row["policy"] not in ("autoregressive", "real text") else row["policy"]
        rows.append([
            name, str(row["nfe"]) if row["nfe"] else "–", number(row["reference_nll"]["value"], 2), interval(row["reference_nll"], 2),
            number(row["character_entropy"], 2), number(row["fourgram_entropy"], 2),
            number(row["valid_words"]["value"], 0, percent=True),
        ])  # fmt: skip
    head = ["policy", "NFE", f"NLL, nats/{file.figures['unit']}", "95 % interval", "character entropy", "4-gram entropy",
            "real words"]  # fmt: skip
    return markdown(head, rows)


# -------------------------------------------------------------------------------------------- the leaderboard


BUDGET = 300.0  # seconds of training
TOLERANCE = 1.02  # of the budget: a training that takes longer is no row
THREADS = 2


def broken_rules_of(figures: dict[str, Any]) -> list[str]:
    """What in the figures of a measured row breaks the rules, in words."""
    found = []
    if figures["budget"] != BUDGET:
        found.append(f"its budget was {figures['budget']:.0f} s; expected {BUDGET:.0f}")
    if figures["seconds"] > TOLERANCE * BUDGET:
        found.append(f"its training took {figures['seconds']:.0f} s; expected {BUDGET:.0f}")
    if figures["threads"] > THREADS:
        found.append(f"it used {figures['threads']} threads; expected {THREADS}")
    return found


def leaderboard_table(files: dict[str, ResultFile]) -> str:
    """Rows of docs/leaderboard.md, the best of each kind of likelihood first.

    Raises ValueError for a row that breaks the rules of that page.
    """
    found = [file for name, file in files.items() if name.startswith("leaderboard_")]
    if not found:
        return "No row has been measured yet."
    for file in found:
        if broken := broken_rules_of(file.figures):
            raise ValueError(f"{file.name}.json is no row of the leaderboard: {'; '.join(broken)}")
    found.sort(key=lambda file: (file.figures["kind"], file.figures["value"]["value"]))
    rows = []
    for file in found:
        figures = file.figures
        value = f"**{number(figures['value']['value'])}** ({interval(figures['value'])})"
        cells = [value, ""] if figures["kind"] == "NLL" else ["", value]
        rows.append([
            file.name.removeprefix("leaderboard_"), *cells, f"{figures['parameters'] / 1e6:.2f} M", str(figures["context"]),
            f"{figures['steps']:,}", f"{figures['seconds']:.0f}", f"`{file.command}`, {file.source}",
        ])  # fmt: skip
    return markdown(
        [
            "row",
            "autoregressive NLL",
            "masked diffusion NELBO",
            "parameters",
            "context",
            "steps",
            "seconds",
            "measured",
        ],
        rows,
    )


# -------------------------------------------------------------------------------------------------- FinQA

FINQA_ROWS = (
    ("ranker_blind", "a ranker trained without the question"),
    ("question_removed", "this ranker, question removed"),
    ("question_of_another_page", "mismatched-prompt control: question of another page"),
    ("candidates_on_another_page", "off-page control: candidates described with the words of another page"),
    ("overlap", "word overlap of question and descriptions"),
    ("trees", "boosted trees on features of question and candidate"),
    ("ranker", "**ranker**"),
)
FURTHER = {"ppo": "PPO", "exact": "exact gradient of the expected reward", "cross_entropy": "cross-entropy"}


def finqa_table(file: ResultFile, leak: ResultFile | None) -> str:
    """The ranker against its controls and baselines: accuracy and normalised reward (0: random choice, 1: best choice)."""
    figures = file.figures
    rows = [["chance", number(figures["chance"], 1, percent=True), "", "0"]]
    if best := figures.get("without_question"):
        rows.append(
            [f"best of {best['scorers']} question-blind scorers (stage 02)", *percent_cells(best), ""]
        )
    if leak is not None and best:
        naive = leak.figures["naive"]
        rows.append(["… on naive pools (single edits of the gold program): one candidate", *percent_cells(naive["one candidate"]), ""])  # fmt: skip
        rows.append(["… on naive pools: whole pool", *percent_cells(naive["whole pool"]), ""])
    for key, text in FINQA_ROWS:
        if (row := figures["rows"].get(key)) is not None:
            reward = number(row["reward"]["value"], 2) if "reward" in row else ""
            accuracy, around = percent_cells(row["accuracy"])
            rows.append([text, f"**{accuracy}**" if key == "ranker" else accuracy, around, reward])
    return markdown(["selected by", "accuracy", "95 % interval", "normalised reward"], rows)


def finqa_text(file: ResultFile) -> str:
    """The figures beside the table, in sentences."""
    figures = file.figures
    parts = [
        f"{figures['pools']:,} held-out pools of {round(1 / figures['chance'])}, seed {figures['seed']}, "
        f"{figures['steps']:,} steps of {NAMES[figures['optimizer']]}. Intervals resample pages."
    ]
    if lead := figures.get("lead_over_trees"):
        low, high = (100 * lead[k] for k in ("low", "high"))
        parts.append(
            f"The ranker leads the trees by {100 * lead['value']:.1f} points ({low:.1f} – {high:.1f})."
        )
    if tags := figures.get("tags"):
        said = [
            f"{NAMES.get(name, name)} {number(tag['value'], 1, percent=True)}" for name, tag in tags.items()
        ]
        parts.append(f"Accuracy by kind of question: {', '.join(said)}.")
    if (share := figures.get("wrong_choices", {}).get("page_gold")) is not None:
        parts.append(
            f"Of the wrong choices, {number(share, 0, percent=True)} are gold programs of other questions on the page."
        )
    return " ".join(parts)


def seeds_table(file: ResultFile) -> str:
    """Runs of several seeds together: training, sampling and whatever else the seed decides."""
    rows = []
    for row in file.figures["rows"]:
        scale, digits = (100, 1) if row.get("percent") else (1, 3)
        each, base = (
            ", ".join(f"{scale * v:.{digits}f}" for v in row[key]) for key in ("each", "baseline_each")
        )
        lead = row["difference"]
        difference = f"{scale * lead['value']:+.{digits}f} ± {scale * lead['half_width']:.{digits}f}".replace(
            "-", "−"
        )
        rows.append([row["model"], row["metric"], each, row["baseline"], base, difference])
    head = ["model", "metric", "each seed", "baseline", "each seed", "mean difference"]
    return markdown(head, rows)


def further_table(file: ResultFile) -> str:
    """Stage 05: further training of the ranker, on the same pools."""
    further = file.figures["further_training"]
    rows = [
        [
            "before",
            *percent_cells(further["start"]["accuracy"]),
            number(further["start"]["reward"]["value"], 3),
            "",
        ]
    ]
    for key, text in FURTHER.items():
        if key in further:
            row = further[key]
            gain = f"{100 * row['gain']['value']:+.1f} ({100 * row['gain']['low']:+.1f} – {100 * row['gain']['high']:+.1f})"
            rows.append(
                [
                    text,
                    *percent_cells(row["accuracy"]),
                    number(row["reward"]["value"], 3),
                    gain.replace("-", "−"),
                ]
            )
    head = ["trained further by", "accuracy", "95 % interval", "normalised reward", "difference, points"]
    return markdown(head, rows)
