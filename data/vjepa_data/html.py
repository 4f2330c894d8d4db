"""Render a page as a single HTML file: no scripts, no external resources, readable on a phone and on paper."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { --ink: #1c2330; --faint: #6b7585; --line: #e4e8ee; --soft: #f6f8fb; --accent: #2563eb; --paper: #fff }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif }
main { max-width: 1060px; margin: 0 auto; padding: 48px 28px 72px }
header { border-bottom: 1px solid var(--line); padding-bottom: 28px; margin-bottom: 12px }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 8px }
h2 { font-size: 21px; letter-spacing: -0.01em; margin: 44px 0 6px }
h3 { font-size: 15px; margin: 22px 0 4px }
p { color: var(--faint); margin: 0 0 18px; max-width: 78ch; overflow-wrap: anywhere }
.facts { display: flex; flex-wrap: wrap; gap: 12px 40px; margin: 24px 0 0 }
.facts div { min-width: 90px }
.facts b { display: block; font-size: 25px; letter-spacing: -0.02em; font-variant-numeric: tabular-nums }
.facts span { color: var(--faint); font-size: 13px }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); gap: 14px 28px }
svg { width: 100%; height: auto; display: block }
figure { margin: 0 0 24px }
figcaption { color: var(--faint); font: 12.5px ui-monospace, Menlo, Consolas, monospace; margin: 0 0 5px }
.strip { display: grid; grid-template-columns: 88px 1fr; align-items: center; margin-bottom: 3px }
.strip span { color: var(--faint); font-size: 12.5px }
.strip img { max-width: 100%; height: auto; border-radius: 3px; image-rendering: pixelated }
.sheet { display: flex; flex-wrap: wrap; gap: 6px }
.sheet img { height: 72px; border-radius: 3px; display: block }
table { border-collapse: collapse; width: 100%; margin: 8px 0 20px; font-size: 14px }
table { font-variant-numeric: tabular-nums }
td:first-child { white-space: nowrap }
td { overflow-wrap: anywhere }
code { font: 12.5px ui-monospace, Menlo, Consolas, monospace }
th { text-align: left; font-weight: 600; color: var(--faint); font-size: 12.5px }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); vertical-align: baseline }
small { color: var(--faint); font-weight: 400; font-size: 12px; white-space: nowrap }
details { border: 1px solid var(--line); border-radius: 8px; padding: 10px 16px; background: var(--soft) }
summary { cursor: pointer; font-weight: 600 }
pre { font: 12.5px/1.5 ui-monospace, Menlo, Consolas, monospace; overflow-x: auto; margin: 12px 0 4px }
.wide { overflow-x: auto }
footer { color: var(--faint); font-size: 12.5px; margin-top: 56px; padding-top: 16px }
footer { border-top: 1px solid var(--line) }
@media print {
  main { max-width: none; padding: 0 } body { font-size: 11px } h2 { margin-top: 24px; break-after: avoid }
  figure, svg, tr { break-inside: avoid } .grid { grid-template-columns: 1fr 1fr }
  details { border: 0; background: none; padding: 0 }
}
"""


@dataclass(frozen=True)
class Section:
    """A section of a page."""

    title: str
    text: str
    """Paragraph under the title, as HTML."""
    body: str = ""
    """Content, as HTML."""


def render(title: str, subtitle: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """Render a page.

    Args:
        title, subtitle: plain text.
        facts: label and value of each number at the top, plain text.
        sections: content below the numbers.
    """
    numbers = "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for label, value in facts)
    parts = "".join(f"<section><h2>{escape(s.title)}</h2><p>{s.text}</p>{s.body}</section>" for s in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p><div class="facts">{numbers}</div></header>'
        f"{parts}<footer>Made by vjepa-pretrain.</footer></main></body></html>\n"
    )


def note(title: str, text: str) -> Section:
    """Return a section without content and the reason for that, in plain text."""
    return Section(title, escape(text))


def strips(caption: str, rows: Sequence[tuple[str, str]]) -> str:
    """Render image strips of a clip above each other, given their names and `data:` URLs."""
    lines = "".join(
        f'<div class="strip"><span>{escape(name)}</span><img src="{url}" alt="{escape(name)}"></div>'
        for name, url in rows
    )
    return f"<figure><figcaption>{escape(caption)}</figcaption>{lines}</figure>"


def sheet(images: Sequence[tuple[str, str]]) -> str:
    """Render a contact sheet, given the captions and `data:` URLs of its images."""
    parts = "".join(f'<img loading="lazy" title="{escape(caption)}" src="{url}">' for caption, url in images)
    return f'<div class="sheet">{parts}</div>'


def values(rows: Sequence[tuple[str, str]]) -> str:
    """Render a table of names and values, given as plain text."""
    lines = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="wide"><table><tbody>{lines}</tbody></table></div>'


def table(rows: Sequence[Sequence[str]]) -> str:
    """Render a table of HTML cells. The first row is the header."""
    head, *rest = rows
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rest)
    names = "".join(f"<th>{name}</th>" for name in head)
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table></div>'
