"""Documents and messages are correct: each command is accepted by its program; each flag, config key and link exists.

tests/test_commands.py runs the same commands with small models. Here they are only parsed, by the parsers of the programs.
"""

import argparse
import ast
import importlib.metadata
import os
import re
import runpy
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from lib import cli
from lib.config import ROOT, load_config
from tests.documented import (
    LOG,
    SCRIPTS,
    SOURCES,
    Command,
    anchors,
    commands,
    config_keys,
    documents,
    expand_make,
    flags,
    key_exists,
    links,
    messages,
)

COMMANDS = commands()


def commands_of(*kinds: str) -> list[Command]:
    return [c for c in COMMANDS if c.kind in kinds]


def named(command: Command) -> str:
    return f"{command.where} {command.text}"[:100]


def test_the_documents_commands_are_found():
    """At least this many commands of each kind are found."""
    counts = {kind: len(commands_of(kind)) for kind in ("script", "module", "make", "file")}
    assert counts["script"] >= 30 and counts["module"] >= 30 and counts["make"] >= 10 and counts["file"] >= 1
    assert {c.target for c in commands_of("script")} == {script.name for script in SCRIPTS}


def parser_of(script: str, monkeypatch) -> argparse.ArgumentParser:
    """The parser that a script makes when it starts."""
    made = {}

    def catch(main, description, with_processes=False, **kinds):
        made["parser"] = cli.make_parser(description or "", **kinds)

    monkeypatch.setattr(cli, "run_stage", catch)
    runpy.run_path(str(ROOT / script), run_name="__main__")
    return made["parser"]


@pytest.mark.parametrize("command", commands_of("script"), ids=named)
def test_every_command_of_a_script_has_flags_and_settings_that_exist(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    parser = parser_of(command.target, monkeypatch)
    if "--version" in command.arguments:  # printed by the parser, which then exits
        with pytest.raises(SystemExit):
            parser.parse(command.arguments)  # type: ignore[attr-defined]
        return
    options = parser.parse(command.arguments)  # type: ignore[attr-defined]
    load_config(options.config, quick_test=options.quick_test, overrides=options.overrides)


@pytest.mark.parametrize("command", commands_of("module", "file"), ids=named)
def test_every_command_of_a_module_is_accepted_by_its_parser(command, monkeypatch):
    """The program starts with the documented arguments, and is stopped after it has parsed them."""

    class Understood(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def stop(self, *given):
        raise Understood(str(parse(self, *given)))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [command.target, *command.arguments])
    monkeypatch.setenv("REMASK_DATA", os.environ.get("REMASK_DATA", str(ROOT.parent / "shared" / "data")))
    if command.kind == "file" or command.target.endswith("legacy_import"):
        assert (ROOT / command.target).exists() or command.target.startswith("lib.")
        if "argparse" not in source_of(command):
            return  # it takes no arguments, or plain ones
    if "parse_args" not in source_of(command):
        assert not command.arguments, "it takes no arguments"
        return
    with pytest.raises(Understood):
        if command.kind == "file":
            runpy.run_path(str(ROOT / command.target), run_name="__main__")
        else:
            runpy.run_module(command.target, run_name="__main__")


def source_of(command: Command) -> str:
    if command.kind == "file":
        return (ROOT / command.target).read_text(encoding="utf-8")
    path = ROOT / command.target.replace(".", "/")
    file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__main__.py"
    return file.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("command", commands_of("make"), ids=named)
def test_every_make_command_calls_programs_with_flags_and_settings_that_exist(command, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    calls = expand_make(command.arguments, ROOT, tmp_path / "bin")
    assert calls or command.target in ("setup", "help")
    for program, *words in calls:
        if program == "python" and words[0] in {script.name for script in SCRIPTS}:
            options = parser_of(words[0], monkeypatch).parse(words[1:])  # type: ignore[attr-defined]
            load_config(options.config, quick_test=options.quick_test, overrides=options.overrides)


def test_every_target_of_make_has_a_rule_and_a_line_of_help():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", text, re.M)
    assert phony
    rules = set(re.findall(r"^([a-z_-]+):", text, re.M))
    assert set(phony[1].split()) == rules
    printed = subprocess.run(["make", "help"], capture_output=True, text=True, cwd=ROOT).stdout
    for target in rules - {"help"}:
        assert re.search(rf"^make {target} ", printed, re.M), f"make help does not list {target}"


def test_every_config_key_that_a_message_or_a_document_names_exists():
    named = [(where, key) for where, text in [*messages(), *documents()] for key in config_keys(text)]
    assert len(named) > 200
    wrong = [f"{where}: {key}" for where, key in named if not key_exists(key)]
    assert wrong == []


@pytest.mark.parametrize(
    ("text", "exists"),
    [
        ("try training.precision=fp32", False), ("training.steps", True), ("models.judge.training.steps", True),
        ("models.{name}.num_klasses", False), ("set models.<x>.num_classes", True), ("data.fractions.train", True),
        ("`diffusion.masking.p1`", True), ("finqa.pools.leak_limit", True), ("critic.ppo.clipp", False),
    ],
)  # fmt: skip
def test_key_exists_accepts_only_keys_of_the_config(text, exists):
    found = config_keys(text.replace("{name}", "<x>"))
    assert len(found) == 1 and key_exists(found[0]) == exists


def test_every_flag_that_a_message_or_a_document_names_exists():
    declared = {"--help"}
    for source in SOURCES:
        text = source.read_text(encoding="utf-8")
        declared |= set(re.findall(r'(?:add|add_argument)\(\s*"(--[a-z][a-z_-]*)"', text))
    assert {"--mode", "--only", "--stream", "--score", "--part", "--config", "--run_dir"} <= declared
    outside = {"--porcelain", "--keep", "--from", "--to"}  # of git, iconv
    outside |= {
        "--standalone",
        "--nproc-per-node",
        "--nnodes",
        "--rdzv-backend",
        "--rdzv-endpoint",
    }  # of torchrun
    outside |= {
        "--nodes",
        "--ntasks-per-node",
        "--gpus-per-node",
        "--signal",
        "--array",
        "--gpus",
    }  # of Slurm
    outside |= {"--head", "--port", "--address"}  # of ray start
    wrong = [
        f"{where}: {flag}"
        for where, text in [*messages(), *documents()]
        for flag in flags(text)
        if flag not in declared | outside
    ]
    assert wrong == []


def test_every_import_is_declared_in_a_requirements_file():
    """`pip install -r` installs what the code imports; Ray and benchmarks have files of their own."""
    distributions = importlib.metadata.packages_distributions()

    def normal(name: str) -> str:
        return name.lower().replace("_", "-")

    def declared(name: str) -> set[str]:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        return {normal(Requirement(x).name) for x in lines if x and not x.startswith(("#", "-"))}

    main = declared("requirements.txt") | declared("requirements-cluster.txt")
    extra = declared("requirements-benchmarks.txt")
    optional = {"tensorboard", "lm-eval", "pocketsphinx"}  # asked for with the command that installs them
    own = {"lib", "tests", "benchmarks"} | {s.stem for s in SCRIPTS}
    missing = []
    for source in [*SOURCES, *(ROOT / "tests").glob("*.py"), *(ROOT / "docs").rglob("*.py")]:
        allowed = main | optional | (extra if {"benchmarks", "tests"} & set(source.parts) else set())
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            for top in {m.split(".")[0] for m in modules} - own - sys.stdlib_module_names:
                names = {normal(d) for d in distributions.get(top, [top])}
                if not names & allowed:
                    missing.append(f"{source.relative_to(ROOT)}: {top}")
    assert missing == []


def test_every_link_of_a_document_leads_to_a_file_and_a_heading():
    found = list(links())
    assert len(found) > 50
    wrong = [
        f"{where}: {os.path.relpath(file, ROOT)}{heading and '#' + heading}"
        for where, file, heading in found
        if not file.exists() or (heading and heading not in anchors(file))
    ]
    assert wrong == []


def test_every_heading_of_the_log_that_a_document_names_exists():
    log = LOG.read_text(encoding="utf-8")
    for where, line in documents():
        for title in re.findall(r'LOG\.md, "([^"]+)"', line):
            assert title in log, f"{where}: LOG.md has no '{title}'"
