"""The tree keeps the vocabulary of the field, short sentences, a short README, short files and short parameter lists.

`python -m tests.language` prints the same offences, of some files only if paths are given.
"""

import textwrap

import pytest

from tests import language
from tests.language import Offence, offences, paragraphs, sentences, word_count


def lines(found: list[Offence]) -> str:
    return f"{len(found)} offences\n" + "\n".join(map(str, found[:60]))


# ------------------------------------------------------------------------------------------------ the tree
@pytest.fixture(scope="module")
def of_the_tree() -> list[Offence]:
    return offences()


@pytest.mark.parametrize("kind", ["words", "sentences", "readme", "files"])
def test_the_tree_has_no_offence_of_kind(of_the_tree, kind):
    found = [offence for offence in of_the_tree if offence.kind == kind]
    assert not found, lines(found)


def test_every_constructor_has_at_most_six_parameters(of_the_tree):
    found = [offence for offence in of_the_tree if offence.kind == "parameters" and offence.is_constructor]
    assert not found, lines(found)


def test_the_check_reads_the_tree():
    files = {file.relative_to(language.ROOT).as_posix() for file in language.tree_files()}
    assert {
        "README.md",
        "Makefile",
        "04_train.py",
        "lib/config.py",
        "configs/default.yaml",
        "tests/test_cli.py",
    } <= files
    assert not any(name.startswith(("outputs/", ".venv")) for name in files)


# ------------------------------------------------------------------------------------------------ the check itself
@pytest.mark.parametrize(
    ("path", "line", "count"),
    [
        ("lib/a.py", "trunk = make_trunks(TRUNK)", 3),
        ("lib/a.py", "truncated = text.truncate()", 0),
        ("README.md", "The critic takes a token back; offences and defences stay.", 1),
        ("README.md", "The fences of a resume", 1),
        ("README.md", "A heat map and a heatmap, but a low heat", 1),
        ("lib/a.py", "heat = draw_heat_map(temperature)", 2),
        ("lib/a.py", "x = torch.gather(x, 1, i) + x.gather(1, i)", 0),
        ("lib/a.py", "return gather(stage)", 1),
        ("lib/a.py", "cells = [cell for row in rows]", 0),
        ("lib/a.py", "from lib.report import cells, html", 1),
        ("lib/a.py", "lowest = min(losses)  # the lowest loss", 0),
        ("lib/a.py", "from lib.diffusion.top_k import lowest_k, lowest", 1),
        ("lib/a.py", "return lowest(noise, free) | lowest_k(noise, free)", 1),
        ("lib/a.py", 'randomness.key(seed, f"{purpose} written tokens", "trunk")', 0),
        ("lib/a.py", 'say(f"{self.shown(path)} is ready")', 1),
        ("README.md", "Each kind is told apart. What it is told counts.", 1),
        ("README.md", "sampler.policies=[none,critic] or policies: [ancestral, random_remask]", 1),
        ("README.md", "32 forward passes, 32 passes; a test passes", 1),
        ("README.md", "So many that memory ends, so many rows", 1),
        ("CHANGELOG.md", "trunk is now backbone", 0),
        ("docs/glossary.md", "trunk: see backbone", 0),
    ],
)
def test_old_words_are_found_and_other_words_are_not(path, line, count):
    found = list(language.word_offences(path, line + "\n"))
    assert len(found) == count, lines(found)


def test_the_refrain_is_found_across_lines_and_allowed_once_in_the_architecture():
    text = "A module knows token ids\nand no files. It also knows nothing of tasks.\n"
    assert len(list(language.word_offences("docs/a.md", text))) == 2
    assert len(list(language.word_offences("docs/architecture.md", text))) == 1
    assert not list(
        language.word_offences("docs/a.md", "Nobody knows. There is no file. It knows the shape.\n")
    )


def test_sentences_end_at_full_stops_but_not_at_abbreviations_code_and_numbers():
    text = "See e.g. Sahoo et al. (2024), vs. 3.5 of `a.b. c`, i.e. this. Another one! `x` is a third? Yes."
    assert len(sentences(text)) == 4
    assert (
        word_count(sentences("`a b c` has [two words](https://a.b/c d) of (B, T, V) at https://x.y.z")[0])
        == 7
    )


def test_code_tables_headings_items_and_entries_are_no_sentences_together():
    text = """\
    A paragraph
    of two lines:

    - an item
    - another item
      that goes on

    | a | table |
    |---|-------|

    python 04_train.py --set a=b \\
        --set c=d

    Args:
        first: one
            more line
        second, third: two
    """
    found = [text for _, text in paragraphs(textwrap.dedent(text), markdown=False)]
    assert found == ["A paragraph of two lines:", "an item", "another item that goes on", "Args:",
                     "first: one more line", "second, third: two"]  # fmt: skip
    text = "# Title\nprose\n```\ncode of many words\n```\n    indented code\n\n1. one\n2. two\n"
    found = [text for _, text in paragraphs(text, markdown=True)]
    assert found == ["Title", "prose", "one", "two"]


def test_a_long_sentence_is_found_in_documents_and_docstrings():
    long = " ".join(["word"] * 31) + ".\n"
    assert [o.line for o in language.sentence_offences("docs/a.md", "Short.\n\n" + long)] == [3]
    assert len(list(language.sentence_offences("lib/a.py", f'def f():\n    """{long}"""\n'))) == 1
    assert not list(language.sentence_offences("docs/a.md", " ".join(["word"] * 30) + "."))
    assert not list(language.sentence_offences("lib/a.py", f"# {long}"))


def test_readme_files_and_parameters_have_limits():
    assert len(list(language.readme_offences("word\n" * 151))) == 1
    assert len(list(language.readme_offences("w " * 1401))) == 2
    assert not list(language.readme_offences("| " + "w" * 200 + " |\n"))
    assert len(list(language.file_offences("lib/a.py", "\n" * 401))) == 1
    assert not list(language.file_offences("lib/models/x/modeling_x.py", "\n" * 401))
    many = "(self, a, b, c, *, d, e, f, g=1, **others): pass\n"
    text = f"class A:\n    def __init__{many}    def forward{many}    def _hidden{many}    def shown{many}"
    found = list(language.parameter_offences("lib/a.py", text))
    assert [o.is_constructor for o in found] == [True, False]
    assert not list(language.parameter_offences("lib/a.py", text.replace(", g=1", "")))
