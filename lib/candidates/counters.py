"""Statistics of the candidates of stage 02, for the manifest and the screen."""

import numpy as np
import pyarrow.compute as pc


class CandidateCounters:
    """Counts candidates, table by table and part by part.

    Args:
        labels_tell_origin: class 2 is every predicted token (`candidates.label_rule: origin`). Otherwise class 2 is only
            changed tokens, and predicted tokens that equal the original cannot be counted.
    """

    def __init__(self, labels_tell_origin: bool = True) -> None:
        self.labels_tell_origin = labels_tell_origin
        self.candidates = self.rewritten = self.unchanged = 0
        self.synthetic = 0.0  # sum of the synthetic fractions of rewritten candidates
        self.histogram: np.ndarray | None = None  # (20,) of them
        self.kinds: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self.predicted: dict[str, int] = {}
        self.correct: dict[str, int] = {}

    def add(self, table) -> None:
        self.candidates += table.num_rows
        for count in pc.value_counts(table["kind"]).to_pylist():
            self.kinds[count["values"]] = self.kinds.get(count["values"], 0) + count["counts"]
        if "synthetic_fraction" not in table.column_names:
            return
        fraction = table["synthetic_fraction"].to_numpy()
        original = np.asarray(table["kind"].to_pylist()) == "original"
        self.rewritten += int((~original).sum())
        self.synthetic += float(fraction[~original].sum())
        self._add_histogram(np.histogram(fraction[~original], bins=20, range=(0, 1))[0])
        if not table["token_labels"].null_count and not table["token_ids"].null_count:
            self._compare(table, original)

    def drop(self, items: list) -> None:
        for item in items:
            self.dropped[item.reason] = self.dropped.get(item.reason, 0) + 1

    def state(self) -> dict:
        """The counts as JSON can hold them, for `merge`."""
        counts = {name: value for name, value in vars(self).items() if name != "labels_tell_origin"}
        return counts | {"histogram": None if self.histogram is None else self.histogram.tolist()}

    def merge(self, state: dict) -> None:
        """Add the counts of other candidates."""
        for name in ("candidates", "rewritten", "unchanged", "synthetic"):
            setattr(self, name, getattr(self, name) + state[name])
        for name in ("kinds", "dropped", "predicted", "correct"):
            own = getattr(self, name)
            for key, count in state[name].items():
                own[key] = own.get(key, 0) + count
        if state["histogram"] is not None:
            self._add_histogram(np.asarray(state["histogram"]))

    def _add_histogram(self, counts: np.ndarray) -> None:
        self.histogram = counts if self.histogram is None else self.histogram + counts

    def _compare(self, table, original) -> None:
        """Count the predicted tokens that equal the original's, per split."""
        ids, labels = table["token_ids"].to_pylist(), table["token_labels"].to_pylist()
        examples, splits = table["example_id"].to_pylist(), table["split"].to_pylist()
        changed = np.rint(table["changed_fraction"].to_numpy() * np.array([len(i) for i in ids]))
        original_ids = {examples[i]: ids[i] for i in range(len(ids)) if original[i]}
        for i in np.flatnonzero(~original):
            self.unchanged += int(original_ids.get(examples[i]) == ids[i])
            predicted = int((np.asarray(labels[i]) == 2).sum())
            if predicted and self.labels_tell_origin:
                self.predicted[splits[i]] = self.predicted.get(splits[i], 0) + predicted
                self.correct[splits[i]] = self.correct.get(splits[i], 0) + predicted - int(changed[i])

    def summary(self) -> dict:
        counts = {"candidates": self.candidates, "kinds": self.kinds, "dropped": self.dropped}
        if self.histogram is None:
            return counts
        histogram = self.histogram
        accuracy = {s: self.correct[s] / n for s, n in self.predicted.items() if n}
        return counts | {
            "rewritten": self.rewritten,
            "unchanged": self.unchanged,
            "mean_synthetic_fraction": self.synthetic / max(self.rewritten, 1),
            "synthetic_fraction_histogram": histogram,
            "generator_accuracy": accuracy,
        }

    def line(self) -> str:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(self.kinds.items()))
        line = f"{self.candidates:,} candidates ({kinds})"
        if self.histogram is not None:
            accuracy = {s: f"{self.correct[s] / n:.1%}" for s, n in self.predicted.items() if n}
            line += (
                f", {self.unchanged:,} of the rewritten ones equal the original; predicted tokens that equal the "
                f"original's: {accuracy or 'not compared'}"
            )
        dropped = ", ".join(f"{n:,} x {reason}" for reason, n in self.dropped.items())
        return line + (f"; examples without candidates: {dropped}" if dropped else "")
