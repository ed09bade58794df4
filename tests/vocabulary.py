"""The words that the project no longer uses, each with the term that replaces it. tests/language.py searches the tree for them."""

import re
from dataclasses import dataclass


def _word(pattern: str) -> str:
    """The pattern as a word, in any case. `_` separates words here, since `\\b` does not stop at it."""
    return rf"(?i:(?<![A-Za-z])(?:{pattern})(?![A-Za-z]))"


@dataclass(frozen=True)
class Rule:
    """An old word. Only texts that contain one of the `hints`, in lower case, are searched for the pattern: this is fast."""

    term: str  # the word to use
    hints: tuple[str, ...]
    pattern: re.Pattern[str]


def _rule(pattern: str, term: str, hints: str) -> Rule:
    return Rule(term, tuple(hints.split("|")), re.compile(pattern))


_NEW_MODULE = "the module's new name (see CHANGELOG.md)"
_MODULES = "lowest|trunks|across|tally|bench|rank_bench|gather|cells|tables|recipes|named|joins|fresh|stop"
_EVALUATION = "bench|rank_bench|gather|quality|best_of|infilling|cells"
_TRAINING = "tables|recipes|named|joins|fresh|stop"

RULES = [
    # Words that stand for a term of the field
    _rule(r"(?i:trunks?(?!c))", "backbone", "trunk"),
    _rule(_word(r"fence[sd]?"), "fingerprint", "fence"),
    _rule(_word(r"running[ _-]means?"), "EMA", "running"),
    _rule(_word(r"(?:tak(?:e|es|en|ing)|took)(?:[ _](?!step)[\w'`-]+){0,3}[ _]back"), "re-mask", " back|_back"),
    _rule(_word(r"back[ _]share"), "remask_share", "back"),
    _rule(_word(r"held[ -]rounds?|rounds? (?:is|are|was|were) held|holds? (?:no )?rounds?"), "corrector steps", "round"),
    _rule(_word(r"hold_share"), "corrector_share", "hold_share"),
    _rule(_word(r"hold_rewrites"), "corrector_resampling", "hold_rewrites"),
    _rule(_word(r"hold_temperature"), "corrector_temperature", "hold_temperature"),
    _rule(_word(r"variety|varieties"), "diversity", "variet"),
    _rule(_word(r"dull(?:er|est|ness)?"), "low-diversity", "dull"),
    _rule(_word(r"heats?(?![ _-]?maps?)"), "temperature", "heat"),
    _rule(_word(r"told_fraction"), "conditioning_fraction", "told_fraction"),
    _rule(_word(r"(?:is|are|was|were) (?:not |never )?told(?! apart)"), "conditioned on", "told"),
    _rule(_word(r"(?:one )?who knew"), "oracle", "who knew"),
    _rule(_word(r"cannot be told from (?:nothing|zero|0|chance)"), "no measurable ...", "told from"),
    _rule(_word(r"strangers?"), "mismatched prompt", "stranger"),
    _rule(_word(r"(?:from|text) elsewhere"), "external text, off-page", "elsewhere"),
    _rule(_word(r"written tokens?"), "generated tokens", "written token"),
    _rule(_word(r"(?:written|wrote|writes? \w+) anew"), "resampled", "anew"),
    _rule(r"(?i:\b(?:\d[\d,]*|many|fewer|equal|the same|of|in|at|per|beside|more) passes\b)",
          "forward passes, NFE or epochs", " passes"),
    # Classes, functions and modules that were named by a metaphor
    _rule(r"\b(?:Tally|Bench|RankBench|Across|Materials|Recipe|FreshRows)\b", "a name by role (see CHANGELOG.md)",
          "tally|bench|across|materials|recipe|freshrows"),
    _rule(r"(?<![\w.])_?gather\(", "collect()", "gather("),
    _rule(r"\btrain_named\b", "train_model", "train_named"),
    _rule(r"\bnth_lowest\b", "kth_lowest", "nth_lowest"),
    _rule(r"(?<![\w.])lowest\(|\bimport .*\blowest\b", "lowest_k", "lowest"),
    _rule(rf"(?<![\w-])(?:{_MODULES})\.py\b", _NEW_MODULE, ".py"),
    _rule(rf"\breport[./](?:{_EVALUATION})\b|\bfrom lib\.report import .*\b(?:{_EVALUATION})\b", _NEW_MODULE, "report"),
    _rule(rf"\btraining[./](?:{_TRAINING})\b|\bfrom lib\.training import .*\b(?:{_TRAINING})\b", _NEW_MODULE, "training"),
    _rule(r"\b(?:diffusion[./]lowest|finqa[./]across|candidates[./]tally|models[./]trunks)\b", _NEW_MODULE,
          "lowest|across|tally|trunks"),
    # Config keys and policies
    _rule(r"\binner_width\b", "intermediate_size", "inner_width"),
    _rule(r"\barchitecture\.layers\b", "num_hidden_layers", "architecture"),
    _rule(r"\barchitecture\.width\b", "hidden_size", "architecture"),
    _rule(r"\barchitecture\.heads\b", "num_attention_heads", "architecture"),
    _rule(r"\bcritic\.layers\b(?!\.)", "critic.num_layers", "critic.layers"),
    _rule(r"\bstream\.patience\b", "stream.timeout_seconds", "stream.patience"),
    _rule(r"\brise_epochs\b", "ramp_epochs", "rise_epochs"),
    _rule(r"\bfirst_mask_ratio\b", "initial_mask_ratio", "first_mask_ratio"),
    _rule(r"\bleast_difference\b", "min_difference", "least_difference"),
    _rule(r"\bleast_gain\b", "min_improvement", "least_gain"),
    _rule(r"\bconfidence_first\b", "confidence_order", "confidence_first"),
    _rule(r"\bmargin_first\b", "margin_order", "margin_first"),
    _rule(r"\bconfidence_fresh\b", "fresh_confidence_remask", "confidence_fresh"),
    _rule(r"\bpolicies\s*[=:]\s*[\[(][^\])]*(?<![\w-])(?:none|random|confidence)\b",
          "ancestral, random_remask, confidence_remask", "policies"),
    # Plain words that stand for a technical one, or for nothing
    _rule(_word(r"mend(?:s|ed|ing)?"), "fix", "mend"),
    _rule(_word(r"lends?|lent|(?<!home )lending"), "provide", "lend|lent"),
    _rule(_word(r"a hair"), "epsilon", "a hair"),
    _rule(_word(r"of late"), "recently", "of late"),
    _rule(_word(r"so (?:many|often)(?! that)"), "n, this many, this often", "so many|so often"),
    _rule(_word(r"in the mean"), "on average", "in the mean"),
    _rule(_word(r"(?:leaves?|left|leaving) out (?:0|zero)"), "exclude zero", " out "),
]  # fmt: skip

# Over several lines, in documents and docstrings
REFRAIN = re.compile(
    r"\b[Kk]nows?\s(?:no|nothing|neither)\b|\b[Kk]nows?\b[^.:;]{0,120}?(?:,|\band|\bbut)\s(?:no|not|nothing|neither)\b"
)
REFRAIN_HOME = "docs/architecture.md"  # may state the rule once

# Whole identifiers of Python code, and parts of one between underscores
NAMES = {
    "ways": "methods",
    "elsewhere": "off_page",
    "told": "conditioning",
    "heat": "temperature",
}
NAME_PARTS = {
    "shown": "display, label or diagnostics",
    "told": "conditioning",
    "heat": "temperature",
    "ELSEWHERE": "OFF_PAGE",
}
ANOTHER_MEANING = re.compile(r"^test_|heat_?map", re.IGNORECASE)  # identifiers that may hold these parts
# Identifiers with another meaning in other folders
LOCAL_NAMES = {
    "place": ("position", r"lib/(?:diffusion|training|candidates|ranking|evaluation|models)/"),
    "places": ("positions", r"lib/(?:diffusion|training|candidates|ranking|evaluation|models)/"),
    "given": ("conditioning_mask", r"lib/(?:diffusion|models/remask_gpt)/|lib/training/objectives/(?:token_critic|error_d)"),
}  # fmt: skip
