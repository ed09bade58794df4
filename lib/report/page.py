"""A report as one HTML file that needs no network: header, links to its sections, and the sections in order.

The style adapts to narrow screens, dark mode and paper.
"""

import base64
import hashlib
from dataclasses import dataclass
from html import escape
from pathlib import Path

STYLE = Path(__file__).with_name("report.css")
SCRIPT = Path(__file__).with_name("report.js")


@dataclass(frozen=True)
class Section:
    """A section of a report.

    Attributes:
        title: also the text of its link.
        caption: plain text that explains how to read the section.
        body: HTML.
    """

    title: str
    caption: str
    body: str


def page(title: str, body: str, more_style: str = "") -> str:
    """A whole HTML file. `title` is plain text, `body` is HTML."""
    style, script = STYLE.read_text(encoding="utf-8") + more_style, SCRIPT.read_text(encoding="utf-8")
    # The browser runs the script of this project alone, and loads nothing: a text that slipped through stays a text
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>\n"
        f"{body}\n</main><script>{script}</script></body></html>\n"
    )


def report_body(run: str, facts: list[str], sections: list[Section]) -> str:
    """The body of a report. `run` and `facts` are plain text: the run's name, and lines about the run."""
    lines = "".join(f'<p class="caption">{escape(fact)}</p>' for fact in facts)
    links = "".join(f'<a href="#section-{i}">{escape(s.title)}</a>' for i, s in enumerate(sections, start=1))
    parts = [f"<header><h1>{escape(run)}</h1>{lines}</header>", f'<nav aria-label="sections">{links}</nav>']
    for i, section in enumerate(sections, start=1):
        caption = f'<p class="caption">{escape(section.caption)}</p>' if section.caption else ""
        parts.append(
            f'<section id="section-{i}"><h2>{i}. {escape(section.title)}</h2>{caption}{section.body}</section>'
        )
    return "\n".join(parts)


def part(title: str, caption: str, body: str) -> str:
    """A titled part of a section. `title` and `caption` are plain text, `body` is HTML."""
    text = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    return f'<div class="part"><h3>{escape(title)}</h3>{text}{body}</div>'


def figure(svg: str, label: str) -> str:
    """A figure that scrolls inside its own box on a narrow screen. `label` describes it for screen readers."""
    return f'<div class="wide figure" role="img" aria-label="{escape(label, quote=True)}">{svg}</div>'
