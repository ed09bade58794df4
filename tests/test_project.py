"""The files that surround the code: licence, citation, changelog, contribution guide, templates, and the CI script agree."""

import re
import tomllib

import yaml

from lib.config import ROOT

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_licence_is_apache_2_and_is_named_where_it_is_stated():
    text = read("LICENSE")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "Copyright 2026 The Remask authors" in text and "END OF TERMS AND CONDITIONS" in text
    assert "(LICENSE)" in read("CONTRIBUTING.md")
    assert tomllib.loads(read("pyproject.toml"))["project"]["license"] == "Apache-2.0"


def test_the_citation_states_the_version_and_the_licence():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["title"]
    assert citation["version"] == VERSION and citation["license"] == "Apache-2.0"
    assert all({"name", "family-names"} & author.keys() for author in citation["authors"])
    for reference in citation["references"]:
        assert {"type", "title", "authors", "year"} <= reference.keys()


def test_the_changelog_has_the_version_and_a_place_for_the_next_one():
    headings = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", read("CHANGELOG.md"), re.M)
    assert headings[0] == ("Unreleased", "")
    assert VERSION in [name for name, _ in headings[1:]] and all(date for _, date in headings[1:])
    kinds = set(re.findall(r"^### (.+)$", read("CHANGELOG.md"), re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_every_file_that_the_guide_for_contributors_names_exists():
    text = read("CONTRIBUTING.md")
    names = set(
        re.findall(
            r"`((?:lib|tests|configs|docs|benchmarks)/[\w./-]+|\.ci/run|[A-Z]+\.md|0\d_\w+\.py)`", text
        )
    )
    names |= set(re.findall(r"\]\(((?!https?:)[^)#]+)\)", text))
    assert len(names) > 20
    missing = sorted(name for name in names if "NAME" not in name and not (ROOT / name).exists())
    assert missing == []


def test_every_command_of_the_guide_is_a_target_of_make():
    targets = set(re.findall(r"^([a-z_-]+):", read("Makefile"), re.M))
    named = set(re.findall(r"(?:`|^)make ([a-z_-]+)(?:`|$)", read("CONTRIBUTING.md"), re.M))
    assert (
        {"setup", "test", "test-fast", "test-commands", "lint", "types", "format", "language"}
        <= named
        <= targets
    )


def test_the_names_that_the_guide_tells_to_extend_exist():
    for file, names in {
        "lib/sections/sampler.py": ("POLICIES", "WITH_ERROR_VIEW"),
        "lib/diffusion/policies.py": ("class Policy", "POLICIES = {"),
        "lib/models/families.py": ("class Family", "FAMILIES = {"),
        "lib/sections/models.py": ("MODES = ", "class ModelSpec"),
        "lib/models/build.py": ("def make_model", "def heads_of"),
        "lib/training/train_model.py": ("def make_objective",),
        "lib/training/objectives/base.py": ("class Objective(Protocol)", "class ResultRow"),
    }.items():
        text = read(file)
        assert all(name in text for name in names), file


def test_the_templates_are_forms():
    for name in ("bug_report", "feature_request"):
        form = yaml.safe_load(read(f".github/ISSUE_TEMPLATE/{name}.yml"))
        assert {"name", "description", "body"} <= form.keys()
        ids = [field["id"] for field in form["body"]]
        assert len(ids) == len(set(ids))
        assert all(field["attributes"]["label"] for field in form["body"])
    assert isinstance(yaml.safe_load(read(".github/ISSUE_TEMPLATE/config.yml")), dict)
    assert "CHANGELOG.md" in read(".github/pull_request_template.md")


def test_ci_checks_style_format_types_and_tests():
    script, makefile = read(".ci/run"), read("Makefile")
    assert re.findall(r"^make ([a-z-]+)$", script, re.M)[:3] == ["lint", "types", "test"]
    (lint,) = re.findall(r"^lint: .*\n\t(.*)$", makefile, re.M)
    assert "ruff check ." in lint and "ruff format --check ." in lint
    (fast,) = re.findall(r"^test-fast: .*\n\t(.*)$", makefile, re.M)
    assert '-m "not commands and not slow and not long"' in fast
