"""A stage's folder in outputs/run_NNN: what the stage read, what it wrote, and the manifest that marks it complete.

Only `Stage` touches outputs/. It writes the manifest last, so a folder with a manifest is complete. To enter a
complete stage again with the same config and inputs does nothing; with others it is refused. Changed code is no reason
to refuse it: one line names the changed files, and the manifests of the stages that read it record them.

--overwrite works in `<stage>.new` and leaves the present folder alone until the new outputs are complete. Then the new
folder replaces the old one. A crash may interrupt this at any point: the next command finishes it. If the same command
is given again after a failure, it continues the failed attempt.

If several processes run a stage (torchrun), the main process does all of this. The others take its decisions, read the
same inputs, and write nothing.

The modules of lib/stage/ are what a stage consists of: locks, inputs, outputs, parts, unfinished work and manifest. Stage
04 consists of units, the models: see lib/units.py.
"""

import json
import os
import shlex
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lib import code_version, durable, runs
from lib.config import Config
from lib.engine.processes import current
from lib.errors import CannotCreate, UsageError
from lib.log import log_to, say
from lib.outside import HubModel
from lib.stage.inputs import UpstreamReader, describe_inputs, upstream_manifest
from lib.stage.locks import StageLocks, with_stages
from lib.stage.making import PartsMaker
from lib.stage.manifest import Clock, code_differences, describe, make_manifest, upstream_differences
from lib.stage.outputs import OutputWriter, check_sizes
from lib.stage.unfinished import LOG_FILE, MARKER, Dependencies, UnfinishedWork, choose_folder

PART_LOG = "log_{}_of_{}.txt"  # of a command with --part: several may run at the same time


@dataclass
class Stage(UpstreamReader, OutputWriter, PartsMaker):
    """One stage of one run, as a context manager. The body begins with `if stage.finished: return`.

    Args:
        script: `__file__` of the numbered script; its stem names the stage.
        config, args: as loaded by lib.cli.
        uses: the sections of the config that the result depends on, or single keys of them.
        reads: earlier stages, or units of them such as 04_train/judge, whose outputs are read.
        files: what is read from outside outputs/ (raw data, checkpoints, models of the hub); see lib.outside.
        restarts: start again instead of continuing unfinished work, also when config or inputs have changed.
        check: called before any work; an error that it raises leaves all files as they were.
        ignores: settings such as `data.text_key` in which earlier stages may differ.
        outputs_root: the folder of all runs.

    Attributes:
        stats, environment: entries of the manifest, filled by the body.
        finished: the stage is complete, and there is nothing to do.
        resuming: unfinished work is continued.
        code: hashes of the files that this stage can import, by path; see lib.code_version.
    """

    script: str
    config: Config
    args: runs.RunArgs
    uses: Iterable[str]
    reads: Iterable[str] = ()
    files: Iterable[Path | HubModel] = ()
    restarts: bool = False
    check: Callable[["Stage"], None] | None = None
    ignores: tuple[str, ...] = ()
    outputs_root: Path = runs.OUTPUTS
    stats: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    resuming: bool = False
    _incomplete: bool = False

    def __enter__(self) -> "Stage":
        self.processes = current()
        if self.processes.is_main:
            self._enter_main()
        self._share_decisions()
        return self

    def _enter_main(self) -> None:
        self._find_place()
        self._locks = StageLocks(self.run_dir, {self.name: self.args.out_dir} if self.args.out_dir else {})
        try:
            self._lock()
            self._find_upstream()
            self._find_dependencies()
            # Commands with --part share the lock of the stage. They begin one after the other
            one_by_one = self._locks.alone(f"{self.name}.beginning") if self.args.part else nullcontext()
            with one_by_one:
                self._decide()
                if not self.finished:
                    self._begin()
        except BaseException:
            self._locks.close()
            raise

    def _share_decisions(self) -> None:
        """Tell the other processes what the main one has decided. It holds the locks for all."""
        main = self.processes.is_main
        mine = [str(self.run_dir), str(self.folder), self.finished, self.resuming] if main else None
        run_dir, folder, finished, resuming = self.processes.from_main(mine)
        if not main:
            self.args = replace(self.args, run_dir=Path(run_dir))
            self._find_place()
            self._find_upstream()
            self._locks = StageLocks(self.run_dir)  # none is held
            self.folder, self.finished, self.resuming = Path(folder), finished, resuming

    def __exit__(self, kind, error, traceback) -> None:
        complete = kind is None and not self.finished and not self._incomplete
        try:
            if complete and self.processes.is_main:
                self._complete()
        finally:
            log_to(None)
            self._locks.close()

    def leave_incomplete(self, reason: str) -> None:
        """End without a manifest and without an error: there is more to do under the same config."""
        self._incomplete = True
        say(reason)

    def display_path(self, path: Path) -> str:
        """A path in the stage's folder as a user would type it once the stage is complete."""
        return runs.display_path(self._final_folder / path.relative_to(self.folder))

    # ------------------------------------------------------------------------------ steps of entering

    def _find_place(self) -> None:
        """The name of the stage and its folder."""
        self.name = Path(self.script).stem
        runs.check_stage_name(self.name)
        self.run_dir = runs.find_run(self.name, self.config, self.args, self.outputs_root)
        place = self.args.out_dir or self.run_dir
        runs.make_run_dir(place)
        self._final_folder = place / self.name
        self._outputs, self._verified, self._digests = {}, set(), {}
        self._again = "--overwrite"  # the flags that make this stage again

    def _lock(self) -> None:
        """Lock the stage and what it reads, and repair what a crash left."""
        reads = with_stages(self.reads)
        for name in reads:
            self._locks.lock(name, shared=True)
        self._locks.lock(self.name, shared=self.args.part is not None)  # of one table, several may make parts
        for name in (*reads, self.name):
            self._locks.recover(name)

    def _find_upstream(self) -> None:
        """The code, and the manifests of what the stage reads."""
        self.code = code_version.code_files(self.script, self.config.task)
        self._upstream = {
            name: upstream_manifest(self.run_dir, name, self.folder_of_stage(name), self.config, self.ignores)
            for name in self.reads
        }

    def _find_dependencies(self) -> None:
        """What the result depends on."""
        inputs = describe_inputs(self._upstream, self.files, self._digests)
        used = json.loads(json.dumps(self.config.slice(self.uses)))
        self._dependencies = Dependencies(used, inputs, self.code, self._again)

    def _decide(self) -> None:
        """Is there anything to do, and in which folder?"""
        self.folder = choose_folder(self._final_folder, self._dependencies, self.args.overwrite)
        self.finished = not self.args.overwrite and self._is_finished()
        if not self.finished and self.check is not None:
            self.check(self)

    def _is_finished(self) -> bool:
        """Whether the stage is complete under this config and these inputs. Raises BadConfig under others."""
        where = runs.display_path(self.run_dir)
        manifest = runs.load_manifest(self._final_folder)
        if manifest is None:
            if self.args.resume and not UnfinishedWork(self._final_folder, self._dependencies).exists():
                raise UsageError(f"--resume: {self.name} has nothing unfinished in {where}")
            return False
        self._dependencies.refuse_changes(manifest, f"{self.name} in {where} was made with")
        check_sizes(self._final_folder, manifest)
        with suppress(
            OSError
        ):  # a process was killed after it had written the manifest; the folder may be read-only
            (self._final_folder / MARKER).unlink(missing_ok=True)
        if self.args.resume:
            raise UsageError(f"--resume: {self.name} has finished in {where}; nothing to resume")
        line = f"{self.name} in {where} is up to date"
        if differences := code_differences(manifest, self.code):
            line += f", but was made with different code ({describe(differences)}); it is kept. {self._again} makes it again"
        if durable.beside(self._final_folder, durable.NEW).exists():
            line += f" (an attempt to make it again is unfinished in {self.name}{durable.NEW}; {self._again} continues it)"
        say(line)
        return True

    def _begin(self) -> None:
        """Start the work, or continue unfinished work of the same config and inputs."""
        where = runs.display_path(self.run_dir)
        self._work = UnfinishedWork(self.folder, self._dependencies)
        if self.args.part is None:
            durable.remove_temporaries(self.folder)
        # A command with --part may run beside others, which must have the same settings
        self.resuming = self._work.exists() and not (self.restarts and self.args.part is None)
        if self.resuming:
            self._work.resume(f"{self.name} in {where}")
        else:
            self._start()
        if self.name == runs.STAGES[0]:
            runs.store_config(self.run_dir, self.config)
        self._clock = Clock()
        log_to(self.folder / (LOG_FILE if self.args.part is None else PART_LOG.format(*self.args.part)))
        verb = "continuing" if self.resuming else "starting"
        detail = f" ({self.folder.name} until it is complete)" if self.folder != self._final_folder else ""
        say(f"{self.name}: {verb} in {where}{detail}")
        self._upstream_differs = upstream_differences(self._upstream, self.config.task)

    def _start(self) -> None:
        try:
            self._work.start(self.args.overwrite)
        except CannotCreate as error:
            if not (self.args.score or self.args.rank):
                raise
            raise CannotCreate(f"{error}; --out_dir DIR writes into another folder") from None

    # ------------------------------------------------------------------------------ completing

    def _complete(self) -> None:
        """Write the manifest. After --overwrite the new folder then replaces the old one."""
        code = {
            "files": self.code,
            "mixed": self._work.mixed_code,
            "upstream_differs": self._upstream_differs,
        }
        content = {
            "config": self._dependencies.config,
            "inputs": self._dependencies.inputs,
            "outputs": self._outputs,
            "stats": runs.plain(self.stats),
            "code": code_version.commit() | code,
            "environment": runs.environment() | runs.plain(self.environment),
        }
        manifest = make_manifest(self.name, self.run_dir, self.args, self._clock, content)
        durable.remove_temporaries(self.folder)
        durable.write_json(self.folder / "manifest.json", manifest)
        self._work.finish()
        if self.folder != self._final_folder:
            durable.replace_folder(self._final_folder, self.folder)
            self.folder = self._final_folder
        say(f"{self.name}: done in {manifest['seconds']:.1f} s")
        self._say_next()

    def _say_next(self) -> None:
        """Name the command of the stage after this one."""
        following = runs.STAGES.index(self.name) + 1 if self.name in runs.STAGES else len(runs.STAGES)
        if following < len(runs.STAGES) and os.environ.get("REMASK_MAKE") is None:
            where = shlex.quote(runs.display_path(self.run_dir))
            say(f"next: python {runs.STAGES[following]}.py --run_dir {where}")
