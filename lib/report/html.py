"""The report of a run that samples text: one HTML file, its sections in the order of a reader's questions."""

from lib.report import plots
from lib.report.critic import scorer_parts
from lib.report.data import ReportData
from lib.report.detection import detection_html
from lib.report.page import Section, figure, page, report_body
from lib.report.provenance import data_section, facts, provenance_section
from lib.report.results import VERDICT_CAPTION, results_html
from lib.report.samples import samples_parts
from lib.report.table import INTERVALS
from lib.report.trace import sampling_parts


def build_report(data: ReportData) -> str:
    """The whole page. All text of the run is escaped: it may hold anything. Runs that only compare detectors have no samples."""
    sampling = [
        Section("Samples", "What the policies generate, and how good it is.", samples_parts(data)),
        Section("Sampling", "How the samples were made, and what they cost.", sampling_parts(data)),
        Section("Critic and other scorers", "How well the models find errors and score text.", scorer_parts(data)),
    ] if data.policies or data.detection is None else []  # fmt: skip
    sections = [
        Section("Results", f"Each trained model against its baseline. {VERDICT_CAPTION} {INTERVALS}", results_html(data.results)),
        *sampling,
        *([] if data.detection is None else [Section("Detection", "How well the run finds synthetic documents, beside other detectors.", detection_html(data.detection))]),
        Section("Training", "Training loss, and the metric on the selection split that chose the best step. All reported figures are of held-out text, which chose nothing.", _curves(data)),
        data_section(data.manifests),
        provenance_section(data.manifests),
    ]  # fmt: skip
    return page(f"Remask: {data.run}", report_body(data.run, facts(data.settings, data.manifests), sections))


def _curves(data: ReportData) -> str:
    if not any(data.curves.values()):
        return "<p>No model was trained.</p>"
    # The baseline of a loss; AUROC and accuracy are not losses
    baselines = {
        r["model"]: r["baseline_value"]
        for r in reversed(data.results)
        if not any(name in r["metric"] for name in ("AUROC", "accuracy"))
    }
    return figure(plots.loss_curves(data.curves, baselines), "training curves, a panel per model")
