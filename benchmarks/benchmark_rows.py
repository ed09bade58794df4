"""The rows and tables of single benchmarks on the results page, from the files in docs/results/."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.result_files import ResultFile, full, markdown, number, percent_cells

Figures = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A row of the table of benchmarks.

    Attributes:
        name: of the result file.
        what: what is measured.
        figure: the figures in words.
        detail: a table of its own below, or nothing.
        legend: what the columns of that table mean.
    """

    name: str
    what: str
    figure: Callable[[Figures], str]
    detail: Callable[[Figures], str] | None = None
    legend: str = ""


def benchmark_table(files: dict[str, ResultFile]) -> str:
    rows = [
        [
            row.what,
            ". ".join(filter(None, (row.figure(files[row.name].figures), files[row.name].note))),
            f"`{files[row.name].command}`",
            files[row.name].source,
        ]
        for row in BENCHMARKS
        if row.name in files
    ]
    return markdown(["what", "figure", "command", "measured"], rows)


def details(files: dict[str, ResultFile]) -> list[str]:
    """A heading, an explanation and a table for each benchmark with more figures than fit into a row."""
    return [
        "\n\n".join(
            part
            for part in (
                f"### {row.what[0].upper()}{row.what[1:]}",
                row.legend,
                row.detail(files[row.name].figures),
            )
            if part
        )
        for row in BENCHMARKS
        if row.detail is not None and row.name in files
    ]


def _nelbo(f: Figures) -> str:
    size = f"{f['parameters'] / 1e6:.2f} M parameters, {f['tokens'] / 1e6:.1f} M training tokens"
    text = f"held-out NELBO **{full(f['nelbo'])}** nats/character, {size}, {f['minutes']:.1f} minutes"
    return f"{text}; unigram {number(f['unigram_nll'])}" if "unigram_nll" in f else text


def _speedrun(f: Figures) -> str:
    ours, plain = f["recipes"]["ours"], f["recipes"].get("plain")
    text = f"{full(ours['nll'])} nats/character in {ours['seconds']:.1f} s"
    if plain is not None:
        share = ours["seconds"] / plain["seconds"]
        text = f"**{share:.2f}** of the time: {text}, plain recipe {full(plain['nll'])} in {plain['seconds']:.1f} s"
    reached = "reached" if ours["nll"]["value"] <= f["goal"] else "not reached"
    return f"{text}; the goal of {f['goal']} nats is {reached}"


def _trainer(f: Figures) -> str:
    plain = f.get("median_ratio_plain")
    detail = (
        "" if plain is None else f", each plain or compiled, whichever is faster; both plain: {plain:.2f} ×"
    )
    return f"**{f['median_ratio']:.2f} ×** as fast (median of {f['rounds']} rounds{detail})"


def _sampling(f: Figures) -> str:
    parts = [f"{name} {p['ratio']:.2f} ×" for name, p in f["policies"].items()]
    return f"**{f['ratio']:.2f} ×** as fast or more ({', '.join(parts)}; median of {f['rounds']} rounds)"


def _logits(f: Figures) -> str:
    plain = (
        f"**{f['everywhere_plain'] / f['masked']:.1f} ×** as fast as logits everywhere with `F.cross_entropy`"
    )
    own = f"{f['everywhere_sliced'] / f['masked']:.1f} × as fast as logits everywhere with the sliced cross-entropy"
    return f"{plain}, {own}; relative difference of the losses {f['relative_difference']:.0e}"


def _attention(f: Figures) -> str:
    return (
        f"**{f['speed_ratio']:.1f} ×** as fast, {f['memory_ratio']:.2f} of the memory; largest difference of a gradient "
        f"{f['gradient_difference']:.0e}"
    )


def _judge(f: Figures) -> str:
    own, other = f["rows"]["own generator"], f["rows"]["another generator"]
    return (
        f"judge R² **{full(own['r2'])}**, {number(other['r2']['value'])} on text by a generator that it never saw "
        f"(mean confidence {number(own['confidence_r2'])}); inspector AUROC **{full(own['auroc_changed'])}** "
        f"(confidence {number(own['auroc_changed_of_confidence'])})"
    )


JUDGE_COLUMNS = {
    "rewritten_r2": "judge R², rewritten only", "confidence_r2": "mean confidence R²", "best_r2": "oracle R²",
    "spearman": "judge Spearman",
}  # fmt: skip


def _judge_detail(f: Figures) -> str:
    rows = [
        [name, full(row["r2"]), *(number(row[key]) for key in JUDGE_COLUMNS), full(row["auroc_changed"]),
         number(row["auroc_changed_of_confidence"])]
        for name, row in f["rows"].items()
    ]  # fmt: skip
    head = [
        "held-out candidates of",
        "judge R²",
        *JUDGE_COLUMNS.values(),
        "inspector AUROC",
        "confidence AUROC",
    ]
    return markdown(head, rows)


def _detection(f: Figures) -> str:
    found = f["detection"]["detectors"]
    at = next(rates for rates in f["new_text"] if rates["target"] == 0.05)
    best = max(
        (name for name in found if name.startswith("TF-IDF")), key=lambda n: found[n]["auroc"]["value"]
    )
    lead = f["detection"]["differences"][best]
    return (
        f"AUROC of the judge **{full(found['judge']['auroc'])}**, {best} {full(found[best]['auroc'])}, difference {full(lead)}; at 5 % "
        f"FPR on text by another generator: FPR **{full(at['fpr'], 1, percent=True)}**, TPR {full(at['tpr'], 1, percent=True)}"
    )


def _detection_detail(f: Figures) -> str:
    rows = []
    for name, row in f["detection"]["detectors"].items():
        one, five = row["thresholds"]
        rates = [full(r[k], 1, percent=True) for r in (one, five) for k in ("tpr", "fpr")]
        rows.append([name, full(row["auroc"]), *rates, number(row["ece"])])
    for line in f["new_text"]:
        target = f"judge, text by another generator, target {number(line['target'], 0, percent=True)}"
        rates = [full(line[k], 1, percent=True) for k in ("tpr", "fpr")]
        rows.append([target, "", *(["", "", *rates] if line["target"] == 0.05 else [*rates, "", ""]), ""])
    head = ["detector", "AUROC", "TPR at 1 % FPR", "real FPR", "TPR at 5 % FPR", "real FPR", "ECE"]
    table = markdown(head, rows)
    if not (parts := f["detection"].get("parts")):
        return table
    lines = []
    for name in dict.fromkeys([*parts["words"], *parts["turns"]]):
        f1, turn = parts["words"].get(name), parts["turns"].get(name)
        median = number(parts["median_turn_error"][name], 1) if turn else ""
        lines.append([name, full(f1) if f1 else "", full(turn, 1) if turn else "", median])
    return f"{table}\n\n" + markdown(
        ["parts of a text", "word F1", "mean error of the turn, characters", "median"], lines
    )


def _pretrained(f: Figures) -> str:
    """Nothing is selected by its figures: all critics, and two baselines beside the policy of the first critic."""
    name, first = next(iter(f["means"].items()))
    at = {critic: means["detection"]["16"] for critic, means in f["means"].items()}
    critics = ", ".join(f"{critic} {full(row['critic'])}" for critic, row in at.items())
    parts = [
        f"AUROC after 16 forward passes: {critics}; stored confidence {full(first['detection']['16']['confidence'])}"
    ]
    for nfe, policies in first["samples"].items():
        rows = [
            f"`{policy}` {full(policies[policy]['nll'])}"
            for policy in ("critic_origin", "random_remask", "ancestral")
            if policies.get(policy, {}).get("nll") is not None
        ]
        parts.append(f"NLL with {nfe} forward passes ({name}): {', '.join(rows)}")
    cost = first["cost"]
    parts.append(
        f"the critic ({name}) takes {number(cost['critic']['value'], 0, percent=True)} of a forward pass; through the interface the model "
        f"has {number(cost['interface']['value'], 2)} x its own speed"
    )
    return "; ".join(parts)


def _pretrained_detail(f: Figures) -> str:
    """Three tables: detection, likelihood of samples, infilling; a row per critic and policy."""
    detection, samples, gaps = [], [], []
    first = next(iter(f["means"]))
    numbers, nfe = (list(f["means"][first][part]) for part in ("detection", "samples"))
    for name, means in f["means"].items():
        detection.append([
            name,
            *(_or_dash(at[view]) for at in means["detection"].values()
              for view in ("critic", "confidence", "critic_over_confidence", f"over_{first}")),
        ])  # fmt: skip
        for policy in means["samples"][nfe[0]]:
            measured = [means["samples"].get(n, {}).get(policy, {}) for n in nfe]
            cells = [_or_dash(row.get(k)) for row in measured for k in ("nll", "over_ancestral")]
            accuracy = [means["infilling"].get(n, {}).get(policy) for n in nfe]
            samples.append([f"`{policy}`", name, *cells])
            gaps.append([f"`{policy}`", name, *(_or_dash(a, 1, percent=True) for a in accuracy)])
    heads = [
        f"{what}, {n}"
        for n in numbers
        for what in ("critic", "confidence", "critic − confidence", f"critic − {first}")
    ]
    likelihoods = [f"{what}, {n}" for n in nfe for what in ("NLL", "minus ancestral")]
    return "\n\n".join((
        "AUROC of wrong tokens, after 1 and after 16 forward passes:", markdown(["critic", *heads], detection),
        "Samples: NLL per character at the 4-gram entropy of real text, by forward passes:",
        markdown(["policy", "critic", *likelihoods], samples),
        "Infilling: correct tokens, by forward passes:", markdown(["policy", "critic", *nfe], gaps),
    ))  # fmt: skip


def _or_dash(estimate: dict[str, Any] | None, digits: int = 3, percent: bool = False) -> str:
    return "–" if estimate is None else full(estimate, digits, percent)


def _staging(f: Figures) -> str:
    staged, bound = f["masks"]["staged"], f["masks"]["continuous"]
    gain = staged["gain"]
    if gain["half_width"] is None:
        verdict = "one seed"
    else:
        verdict = "yes" if gain["value"] - gain["half_width"] > 0 else "no"
    return (
        f"{verdict}: NELBO {number(staged['mean'])} against {number(bound['mean'])} for the bound itself, difference "
        f"{_less(gain)}"
    )


def _less(gain: dict[str, Any]) -> str:
    """How much less a loss is, with its half-width where several seeds give one."""
    text = f"{-gain['value']:+.3f}"
    return text if gain["half_width"] is None else f"{text} ± {gain['half_width']:.3f}"


def _staging_detail(f: Figures) -> str:
    rows = []
    for name, row in f["masks"].items():
        gain = row.get("gain")
        difference = _less(gain).replace("-", "−") if gain else ""
        joined = "; ".join(" ".join(map(str, steps)) for steps in row["joined"] if steps)
        each = ", ".join(number(value) for value in row["nelbo"])
        rows.append([name, each, number(row["mean"]), difference, joined])
    return markdown(
        ["masks", "NELBO of each seed", "mean", "minus continuous", "phases joined at steps"], rows
    )


def _masking(f: Figures) -> str:
    times = list(f["milliseconds"].values())
    return f"{min(times):.1f} to {max(times):.1f} ms"


def _int8(f: Figures) -> str:
    p = f["precisions"]
    speeds = [p["int8"]["tokens_per_second"] / p[name]["tokens_per_second"] for name in ("bf16", "fp32")]
    loss = max(abs(p["int8"]["nats"] - p[name]["nats"]) for name in ("bf16", "fp32"))
    return f"{speeds[0]:.2f} × and {speeds[1]:.2f} × as fast, same loss to {loss:.4f} nats: off by default"


def _ranker(f: Figures) -> str:
    row = max(f["rows"], key=lambda found: (found["prompt"], found["precision"] == "bf16"))
    text = (
        f"{row['packed']:.2f} s for {f['pools']} pools in {row['precision']} ({row['prompt']} prompt and {row['candidate']} "
        f"candidate tokens), against {row['published']:.2f} s with one padded row per candidate and the published encoder, "
        f"{row['no_dropout']:.2f} s without its attention dropout"
    )
    if peer := f.get("peer"):
        text += (
            f"; with {peer['prompt']} prompt tokens in {peer['precision']}, CrossEncoderTrainer with ListNet "
            f"{peer['theirs']:.2f} s, ours {peer['ours']:.2f} s"
        )
    return text


def _ranker_detail(f: Figures) -> str:
    rows = [
        [str(r["prompt"]), str(r["candidate"]), r["precision"], f"{r['packed']:.2f}", f"{r['published']:.2f}",
         f"{r['published_ratio']:.1f}", f"{r['no_dropout']:.2f}", f"{r['no_dropout_ratio']:.1f}"]
        for r in f["rows"]
    ]  # fmt: skip
    head = [
        "prompt",
        "candidate",
        "precision",
        "packed, s",
        "one by one, s",
        "ratio",
        "without dropout, s",
        "ratio",
    ]
    return markdown(head, rows)


def _leak(f: Figures) -> str:
    naive, own = (max(f[name].values(), key=lambda found: found["value"]) for name in ("naive", "ours"))
    texts = [f"{' ('.join(percent_cells(found))})" for found in (own, naive)]
    return f"best scorer that does not see the question: {texts[0]}; on naive pools {texts[1]}"


def _scaling(f: Figures) -> str:
    ratios = {"generator": "the default generator", "ranker": "the MiniLM ranker of FinQA"}
    speeds = ", ".join(
        f"**{f[name]['median_ratio']:.2f} ×** for {what}" for name, what in ratios.items() if name in f
    )
    off = max(abs(row["ratio"] - 1) for row in f["bytes"])
    return (
        f"{speeds} (median of {len(f['generator']['rows_per_second'])} rounds); bytes sent in 2 and 4 processes are within "
        f"{100 * off:.1f} % of the formula; in one process the engine takes {100 * f['engine_share']:.2f} % of a step"
    )


def _executors(f: Figures) -> str:
    speeds = {name: sorted(values)[len(values) // 2] for name, values in f["passages_per_second"].items()}
    ratio = speeds["ray"] / speeds["processes"]
    return (
        f"**{ratio:.2f} ×** the throughput: {speeds['ray']:.0f} and {speeds['processes']:.0f} passages/s, median of "
        f"{len(f['passages_per_second']['ray'])} rounds"
    )


def _memory(f: Figures) -> str:
    small, large = f["megabytes"].values()
    ratios = [f"{stage[:2]} {large[stage]['peak_mb'] / small[stage]['peak_mb']:.2f} ×" for stage in small]
    return "peak memory of stages " + ", ".join(ratios)


def _memory_detail(f: Figures) -> str:
    (few, small), (many, large) = f["megabytes"].items()
    rows = [
        [stage, f"{small[stage]['peak_mb']:.0f} MB", f"{large[stage]['peak_mb']:.0f} MB",
         f"{large[stage]['peak_mb'] / small[stage]['peak_mb']:.2f}"]
        for stage in small
    ]  # fmt: skip
    return markdown(["stage", f"{few} MB of text", f"{many} MB of text", "ratio"], rows)


def _programs(f: Figures) -> str:
    parts = []
    for run in f["runs"]:
        of, wanted = run["methods"], ("ranker", "majority vote", "ranker with votes")
        each = ", ".join(f"{name} {full(of[name]['differ'], 1, percent=True)}" for name in wanted)
        every = ", ".join(f"{name} {full(of[name]['all'], 1, percent=True)}" for name in wanted)
        parts.append(f"seed {run['seed']}: where answers differ {each}; all questions {every}")
    return ". ".join(parts)


def _programs_detail(f: Figures) -> str:
    rows = []
    for run in f["runs"]:
        start = [str(run["seed"]), number(run["near_misses"], 1)]
        rows.append([*start, "ranker, pools without shortcuts", full(run["pools"], 1, percent=True), ""])
        rows += [
            [
                *start,
                name,
                *(full(cells[key], 1, percent=True) if cells[key] else "–" for key in ("all", "differ")),
            ]
            for name, cells in run["methods"].items()
        ]
    return markdown(
        ["seed", "near misses", "chosen by", "right, all questions", "right, where answers differ"], rows
    )


def _gsm8k(f: Figures) -> str:
    right = {name: full(row["right"], 1, percent=True) for name, row in f["rows"].items()}
    others = ", ".join(
        f"{name} {right[name]}" for name in ("random", "majority of answers", "best single writer")
    )
    return f"right solutions, {f['folds']} folds of {f['problems']} problems: ranker **{right['ranker']}**, {others}"


def _gsm8k_detail(f: Figures) -> str:
    rows = [
        [name, full(row["right"], 1, percent=True), "" if name == "ranker" else full(row["lead_of_ranker"], 1, percent=True)]
        for name, row in f["rows"].items()
    ]  # fmt: skip
    return markdown(["chosen by", "right", "lead of the ranker"], rows)


BENCHMARKS = (
    Row("nelbo", "masked diffusion on tinyshakespeare characters, contiguous 90/10 split; measured before configs/nelbo.yaml had a "
        "convolution (2,500 steps)", _nelbo),
    Row("causal_speedrun", "training time of a causal model on tinyshakespeare, against the plain recipe (GPT-2 of "
        "transformers, AdamW, fp32, 2,000 steps)", _speedrun),
    Row("judge", "judge and inspector, tinyshakespeare, passages of 256 characters", _judge, _judge_detail,
        "\"Rewritten only\" leaves out the original passages, which are the easiest to recognise. Intervals are over passages of one "
        "training, and say little about others: the seeds in LOG.md (2026-11-29, four benchmarks) differ by more."),
    Row("detection", "detection of rewritten passages of Python's documentation", _detection, _detection_detail,
        "Held-out documents, with thresholds chosen on the selection split. Intervals resample passages; an original and its rewritten "
        "version are one group. Text by another generator: passages that no stage has seen, rewritten by a generator of another size, "
        "seed, masking and temperature."),
    Row("detection_pretrained", "detection of the same passages from a pretrained encoder of 22 million weights", _detection,
        _detection_detail, "The same passages and splits. The encoder, MiniLM, was pretrained to compare sentences."),
    Row("pretrained_critic", "critics on a frozen ModernBERT that Hugging Face's Trainer made from novels", _pretrained, _pretrained_detail,
        "Means over seeds with intervals by Student's t; differences are paired. A seed is that of the splits, of the generator's tuning, of the "
        "critic and of the samples; the masked LM is the same. The critics that were measured are those in the table. A dash: in a seed, samples "
        "are less diverse than real text at every temperature. At equal NFE a critic with an adapter (lora) has half of the rounds."),
    Row("pretrained_critic_look_back", "critics with look-back injection on a second ModernBERT of the same recipe", _pretrained, _pretrained_detail,
        "The masked LM was trained a second time. Trainer does not repeat a training to the bit, so this is another model. The linear critic "
        "(head) is measured on both; compare the differences to it."),
    Row("staging", "does staged unmasking pay? 6 layers x 192, three seeds", _staging, _staging_detail,
        "`continuous` trains on the bound itself. `random` draws all mask ratios from the start, with equal weights of masked "
        "tokens in a row. The last column has the steps at which phases joined, for each seed."),
    Row("speed_trainer", "training speed, 6 layers x 192, against `Trainer` + `BertForMaskedLM` of transformers", _trainer),
    Row("speed_logits", "training step with logits at masked positions only, vocabulary 8k", _logits),
    Row("speed_generation", "synthetic generation against the bare forward pass", lambda f: f"{f['share']:.0%}".replace("%", " %")),
    Row("speed_sampling", "64 samples by 32 forward passes, compiled layers against plain ones", _sampling),
    Row("speed_overhead", "counter-based random numbers, hashing and fsync, as a share of a training stage", lambda f: number(f["share"], 1, percent=True)),
    Row("speed_masking", "masks of 64 x 1,024 tokens, any type", _masking),
    Row("speed_int8", "generator in 8 bits on the CPU, against bf16 and fp32", _int8),
    Row("ltg_attention", "LTG-BERT small, forward and backward, 512 tokens, batch size 8, against a direct implementation of the formula", _attention),
    Row("ranker_speed", "training step of a ranker, all candidates behind one copy of the prompt", _ranker, _ranker_detail,
        "\"One by one\": one padded row per candidate and the published encoder; \"without dropout\": without its attention "
        "dropout. Each ratio is the time relative to packed candidates."),
    Row("scaling", "training in two processes of one thread, against one process of two threads, the same rows", _scaling),
    Row("executors", "candidates of 5,000 passages by two actors of Ray, against two processes, once started", _executors),
    Row("memory", "300 MB of text against 30 MB", _memory, _memory_detail),
    Row("memory_candidates", "30 MB of text against 3 MB", _memory, _memory_detail,
        "Stage 00 has caches of fixed size, which 3 MB of text do not fill."),
    Row("pools_gsm8k", "GSM8K: the right one of the solutions that four language models wrote", _gsm8k, _gsm8k_detail,
        "Intervals resample problems. The ranker does not see who wrote a solution. \"Recognised writer\": a classifier tells who "
        "wrote it, and the strongest writer is chosen."),
    Row("finqa_programs", "FinQA: programs that four simulated systems wrote for held-out questions", _programs, _programs_detail,
        "Intervals resample pages. Weights of scores and votes are fitted on the split selection. lib/tasks/finqa/simulated_systems.py "
        "describes the systems."),
    Row("finqa_leak", "FinQA: gold programs found without the question", _leak),
)  # fmt: skip
