"""Run documented commands with small models in a copy of the tree. tests/test_commands.py starts this script there.

Standard input is a JSON list of commands. Each is a list of words that begins with `make`, `torchrun`, `python FILE` or `python -m MODULE`.
Commands run in this process, so that torch is imported once. For `make`, the commands of its recipe run. A command with
`--stream` runs in a process of its own, beside the next command. For each command, one JSON line goes to standard output: its
exit status and the end of its output.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

if __name__ == "__main__":
    sys.path[:] = [str(Path.cwd()), *sys.path[1:]]

from tests.documented import expand_make


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    beside = None
    for words in json.load(sys.stdin):
        if "--stream" in words:
            beside = subprocess.Popen([sys.executable, *words[1:]], stdout=subprocess.DEVNULL)
            print(json.dumps({"words": words, "code": 0, "said": ""}), file=answers, flush=True)
            continue
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
            for stream in (1, 2):
                os.dup2(said.fileno(), stream)
            code = run(words)
            if beside is not None:
                code = code or beside.wait(timeout=300)
                beside = None
            sys.stdout.flush()
            sys.stderr.flush()
            said.seek(0)
            print(
                json.dumps({"words": words, "code": code, "said": said.read()[-3000:]}),
                file=answers,
                flush=True,
            )


def run(words: list[str]) -> int:
    """The exit status of a command."""
    if words[0] == "make":
        try:
            lines = expand_make(words[1:], Path.cwd(), Path("made").absolute())
        except subprocess.CalledProcessError as error:
            sys.stderr.write(error.stderr)
            return error.returncode
        return next((code for line in lines if (code := run(line))), 0)
    if words[0] == "torchrun":
        return subprocess.run([sys.executable, "-m", "torch.distributed.run", *words[1:]]).returncode
    module = words[1] == "-m"
    name, arguments = (words[2], words[3:]) if module else (words[1], words[2:])
    sys.argv = [name, *arguments]
    try:
        if module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(end.code)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
