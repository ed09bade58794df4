"""A stage that consists of units: each is locked, made and completed on its own, such as the models of stage 04.

    with StageOfUnits(__file__, config, args, plans=plans, chosen=names) as stage:
        for name in stage.chosen:
            with stage.unit(name) as unit:
                if not unit.finished: ...
        stage.summarise()

A unit is a `Stage` with the folder `<stage>/<unit>`: it has its own lock, unfinished marker, log, inputs and manifest. The
manifest of the stage is a summary. It is made from the manifests of the units alone, and lists their hashes.

Several processes may work on different units of a stage. If --overwrite makes all units again, it works in
`<stage>.new`, which replaces the stage when every unit is complete. If it makes some units again, it replaces each of
them as soon as it is complete.

What a model of stage 04 reads and uses is in lib/training/model_plans.py.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lib import durable, runs
from lib.artifacts import Stage
from lib.errors import BadConfig, BadData, UsageError
from lib.log import log_to, say
from lib.outside import HubModel
from lib.stage.inputs import describe_inputs
from lib.stage.manifest import Clock, make_manifest
from lib.stage.unfinished import LOG_FILE, MARKER, Attempt, Dependencies, UnfinishedWork, choose_folder
from lib.units_summary import describe_units

Files = Iterable[Path | HubModel]


@dataclass(frozen=True)
class UnitPlan:
    """What the result of a unit depends on.

    Attributes:
        uses: sections or single keys of the config.
        reads: earlier stages, and units of the same stage.
        files: returns what is read from outside outputs/. Called only for units that are to be made.
    """

    uses: tuple[str, ...]
    reads: tuple[str, ...]
    files: Callable[[], Files] = tuple


@dataclass
class StageOfUnits(Stage):
    """The stage as a whole: locks what its units read, chooses the folder, and writes the summary.

    Args:
        plans: all units of the config, in its order.
        chosen: the units to be made, each after those that it reads.

    `uses`, `reads` and `files` are taken from the plans.
    """

    uses: Iterable[str] = ()
    plans: Mapping[str, UnitPlan] = field(default_factory=dict)
    chosen: tuple[str, ...] = ()

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None and self.processes.is_main:
            self.attempt.finish()
        log_to(None)
        self._locks.close()

    def unit(self, name: str) -> "Unit":
        """The unit `name`, to be entered. The units that it reads must be complete."""
        plan = self.plans[name]
        args = replace(self.args, overwrite=name in self._again_names, resume=False)
        return Unit(
            self.script, self.config, args, plan.uses, plan.reads, plan.files(), unit=name, whole=self
        )

    def unmade(self) -> list[str]:
        """The chosen units that this command has to make."""
        return [
            n for n in self.chosen if n in self._again_names or runs.load_manifest(self.folder / n) is None
        ]

    def _share_decisions(self) -> None:
        """Also which units --overwrite has to make again, if it makes only some units again."""
        super()._share_decisions()
        again = sorted(self._again_names) if self.processes.is_main else None
        self._again_names = set(self.processes.from_main(again))

    def folder_of_stage(self, stage_name: str) -> Path:
        stage, _, unit = stage_name.partition("/")
        return self.folder / unit if unit and stage == self.name else super().folder_of_stage(stage_name)

    # ------------------------------------------------------------------------------ steps of entering

    def _find_place(self) -> None:
        plans = [self.plans[name] for name in self.chosen]
        own = {f"{Path(self.script).stem}/{name}" for name in self.plans}
        self.uses = list(dict.fromkeys(key for plan in plans for key in plan.uses))
        self.reads = [r for r in dict.fromkeys(r for plan in plans for r in plan.reads) if r not in own]
        self.files = [file for plan in plans for file in plan.files()]
        self._replaces_all = self.args.overwrite and set(self.chosen) == set(self.plans) != set()
        super()._find_place()

    def _lock(self) -> None:
        """Like a stage, but the lock of the stage is shared, unless the whole of it is made again."""
        for name in self.reads:
            self._locks.lock(name, shared=True)
        self._locks.lock(self.name, shared=not self._replaces_all)
        for name in (*self.reads, self.name):
            self._locks.recover(name)

    def _decide(self) -> None:
        self.folder = self._final_folder
        self.attempt = Attempt(self.folder, self.chosen, self._dependencies)
        some_again = self.args.overwrite and not self._replaces_all
        self._again_names = set(self.chosen) - self.attempt.done if some_again else set()
        if self._replaces_all:
            self.folder = choose_folder(self._final_folder, self._dependencies, overwrite=True)
            return
        runs.refuse_without_units(self.run_dir, self.name)
        if self.args.resume:
            self._refuse_resume()
        if not self.args.overwrite:
            self._refuse_changed()

    def _begin(self) -> None:
        self._work = UnfinishedWork(self.folder, self._dependencies)
        if not self._replaces_all:
            if self.folder.is_symlink() and self.unmade():
                self._replace_link()
            return
        if self._work.exists():
            self._work.resume(f"{self.name} in {runs.display_path(self.run_dir)}")
        else:
            self._work.start(overwrite=True)
        if self.folder != self._final_folder:
            say(f"{self.name}: making all of it again in {self.folder.name} until it is complete")

    def _replace_link(self) -> None:
        """If the stage is a link to that of another run: take its complete units into a folder of this run.

        So the other run does not change. The files are hard links where the file system has them.
        """
        with self._locks.alone(f"{self.name}.link"):
            if not self.folder.is_symlink():
                return
            new = durable.beside(self.folder, ".tmp")
            durable.remove(new)
            new.mkdir()
            for manifest in self.folder.glob("*/manifest.json"):
                durable.link_folder(manifest.parent, new / manifest.parent.name)
            durable.replace_folder(self.folder, new)

    def _refuse_resume(self) -> None:
        """Raises UsageError if --resume was given and the chosen units are all complete, or all untouched."""
        where = runs.display_path(self.run_dir)
        complete = [name for name in self.chosen if runs.load_manifest(self.folder / name) is not None]
        if len(complete) == len(self.chosen):
            raise UsageError(f"--resume: {self.name} has finished in {where}; nothing to resume")
        if not complete and not any((self.folder / name / MARKER).exists() for name in self.chosen):
            raise UsageError(f"--resume: {self.name} has nothing unfinished in {where}")

    def _refuse_changed(self) -> None:
        """Raises BadConfig, before any work, if chosen units were made or begun with other settings or inputs."""
        where = runs.display_path(self.run_dir)
        found: dict[str, list[str]] = {}
        for name in self.chosen:
            manifest = runs.load_manifest(self.folder / name)
            record = manifest or _marker(self.folder / name)
            if record is not None and (changes := self._changes(name, record)):
                found[name] = changes
        if not found:
            return
        again = set(found)
        for name in self.chosen:  # also what starts from them
            if again & {read.partition("/")[2] for read in self.plans[name].reads}:
                again.add(name)
            elif name not in again and runs.load_manifest(self.folder / name) is not None:
                say(f"{self.name}/{name} in {where} is up to date")
        lines = [f"{self.name}/{name}: {line}" for name, changes in found.items() for line in changes]
        flags = " ".join(f"--only {name}" for name in self.chosen if name in again)
        raise BadConfig(
            f"models of {self.name} in {where} were made with another config or other inputs:\n  "
            + "\n  ".join(lines)
            + f"\npass --overwrite {flags} to make them again, or choose another --run_dir"
        )

    def _changes(self, name: str, record: Mapping[str, Any]) -> list[str]:
        """What differs from a unit's manifest or marker: settings, and outputs of stages and units.

        Files from outside are not compared, nor are stages without a manifest.
        """
        found = {read: runs.load_manifest(self.folder_of_stage(read)) for read in self.plans[name].reads}
        upstream = {read: manifest for read, manifest in found.items() if manifest is not None}
        left_out = {None, *(read for read, manifest in found.items() if manifest is None)}
        before = {k: v for k, v in record["inputs"].items() if v.get("stage") not in left_out}
        used = json.loads(json.dumps(self.config.slice(self.plans[name].uses)))
        now = Dependencies(used, describe_inputs(upstream, (), {}), {})
        return now.changes_since(record["config"], before)

    # ------------------------------------------------------------------------------ completing

    def summarise(self) -> dict[str, Any] | None:
        """Write the manifest of the stage, if all units are complete and belong together; then return it.

        None if the stage is incomplete, which a line says, or if its manifest describes its units already. None in all processes
        but the main one.
        """
        if not self.processes.is_main:
            return None
        with self._locks.alone(f"{self.name}.summary"):
            found = {name: runs.load_manifest(self.folder / name) for name in self.plans}
            made = {name: manifest for name, manifest in found.items() if manifest is not None}
            units = {name: durable.sha256_file(self.folder / name / "manifest.json") for name in made}
            stored = runs.load_manifest(self.folder)
            self._name_others()
            if problem := self._incomplete_because(made):
                if stored is not None and any(units.get(n, h) != h for n, h in stored["units"].items()):
                    (self.folder / "manifest.json").unlink()  # it describes units that are no longer there
                say(problem)
                return None
            if stored is not None and list(stored["units"].items()) == list(units.items()):
                with suppress(OSError):  # of a process that was killed after it had written the manifest
                    (self.folder / MARKER).unlink(missing_ok=True)
                return None
            log_to(self.folder / LOG_FILE)
            content = describe_units(self.name, made, units)
            manifest = make_manifest(self.name, self.run_dir, self.args, Clock(), content)
            # Unless this process has the whole stage, others may write theirs at this moment, such as that of an attempt
            durable.remove_temporaries(self.folder, "*.tmp" if self._replaces_all else "manifest.json.*.tmp")
            durable.write_json(self.folder / "manifest.json", manifest)
            self._work.finish()
            self._replace()
        say(f"{self.name}: complete; its units took {manifest['seconds']:.1f} s")
        self._say_next()
        return manifest

    def _incomplete_because(self, made: Mapping[str, dict]) -> str:
        """Why the stage has no manifest; empty if all units are complete and belong together."""
        if not self.plans:
            return "the config has no models"
        if missing := [name for name in self.plans if name not in made]:
            return f"not trained yet: {', '.join(missing)}; run without --mode and --only to train all models"
        stale = [name for name, manifest in made.items() if self._changes(name, manifest)]
        if not stale:
            return ""
        flags = " ".join(f"--only {name}" for name in stale)
        return (
            f"made with other settings or inputs than now: {', '.join(stale)}; {self.name} is complete after "
            f"`python {self.name}.py --overwrite {flags}`"
        )

    def _name_others(self) -> None:
        """A line about units in the folder that the config does not have."""
        folders = (path.parent for path in self._final_folder.glob("*/manifest.json"))
        if others := sorted(f.name for f in folders if not f.suffix and f.name not in self.plans):
            say(f"{self.name} keeps models that the config does not have: {', '.join(others)}")

    def _replace(self) -> None:
        """After all units were made again: put the new folder in place of the old one.

        Units that the config does not have move along.
        """
        if self.folder == self._final_folder:
            return
        for path in self._final_folder.iterdir():
            if path.is_dir() and path.name.partition(".")[0] not in self.plans:
                durable.link_folder(path, self.folder / path.name)
        durable.replace_folder(self._final_folder, self.folder)
        self.folder = self._final_folder


@dataclass
class Unit(Stage):
    """One unit of a stage, which `whole` has entered. `StageOfUnits.unit` makes it."""

    unit: str = ""
    whole: StageOfUnits | None = None

    def folder_of_stage(self, stage_name: str) -> Path:
        return self._whole.folder_of_stage(stage_name)

    def lock_alone(self, name: str, subject: str) -> None:
        """Lock something besides the unit until its end. Raises Busy, with `subject`, if another process has it."""
        self._locks.lock(name, shared=False, subject=subject)

    def _complete(self) -> None:
        super()._complete()
        if self.args.overwrite:
            self._whole.attempt.add(self.unit)

    @property
    def _whole(self) -> StageOfUnits:
        assert self.whole is not None
        return self.whole

    def _find_place(self) -> None:
        whole = self._whole
        self.name, self.run_dir = f"{whole.name}/{self.unit}", whole.run_dir
        runs.check_stage_name(self.name)
        self._final_folder = whole.folder / self.unit
        self._outputs, self._verified, self._digests = {}, whole._verified, whole._digests
        self._again = f"--overwrite --only {self.unit}"

    def _lock(self) -> None:
        """Lock the unit and the units that it reads; `whole` has locked the stages."""
        units = [name for name in self.reads if runs.stage_of(name) == self._whole.name]
        for name in units:
            self._locks.lock(name, shared=True)
        self._locks.lock(self.name, shared=False)
        for name in (*units, self.name):
            self._locks.recover(name)

    def _decide(self) -> None:
        folder = self._final_folder
        known = any((folder / file).exists() for file in ("manifest.json", MARKER))
        # A process that is killed while it writes its first file leaves a temporary one
        has_files = folder.exists() and any(path.suffix != ".tmp" for path in folder.iterdir())
        if has_files and not known and not self.args.overwrite:
            raise BadData(
                f"{folder} has files, but neither manifest.json nor {MARKER}: an earlier version of this project made it. "
                f"Pass {self._again} to make it again, or choose another --run_dir"
            )
        super()._decide()


def _marker(folder: Path) -> dict[str, Any] | None:
    """The record of a unit's unfinished work; None if there is none, or if it is damaged."""
    try:
        record = durable.read_json(folder / MARKER)
        return record if "config" in record and "inputs" in record else None
    except (OSError, ValueError, TypeError):
        return None
