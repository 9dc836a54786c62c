"""One self-contained HTML file: its style for light and dark screens, phones and print, and the few parts that pages are made of.

A page loads nothing and runs nothing. Every function escapes the text it is given; what it returns is markup.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

# Names and messages come from the data; the policy holds even where escaping should be forgotten.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

# Wide things scroll inside their own box, so that a page never does; colours change with the theme, on paper they are always light.
STYLE = """
:root { color-scheme: light; --text: #222; --soft: #5c5c5c; --page: #fff; --box: #f6f6f6; --line: #d8d8d8; --accent: #36648b;
  --good: #17663a; --bad: #a40000; --open: #8a5a00; }
@media screen and (prefers-color-scheme: dark) { :root { color-scheme: dark; --text: #e4e4e4; --soft: #a8a8a8; --page: #16181b;
  --box: #202429; --line: #3a4047; --accent: #8fbce6; --good: #6fd39b; --bad: #ff8d84; --open: #f0be62; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 1em; color: var(--text); background: var(--page); }
h1, h2, h3, p, li, dd { overflow-wrap: anywhere; } h1 { font-size: 1.5em; line-height: 1.25; }
h2 { font-size: 1.2em; margin: 2em 0 .5em; border-bottom: 1px solid var(--line); } h3 { font-size: 1em; margin: 1.2em 0 .4em; }
ul, ol { padding-left: 1.4em; } code { font-size: .92em; overflow-wrap: anywhere; } .soft { color: var(--soft); }
.bad { color: var(--bad); }
.scroll { overflow-x: auto; max-width: 100%; margin: .6em 0; } .scroll:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; font-size: .93em; } caption { text-align: left; color: var(--soft); padding-bottom: .3em; }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap;
  font-variant-numeric: tabular-nums; }
thead th { vertical-align: bottom; } th:first-child, td:first-child { text-align: left; padding-left: 0; } tbody th { font-weight: 400; }
td.words, th.words { text-align: left; white-space: normal; min-width: 14em; }
figure { margin: 1em 0 1.6em; } figure .light { background: #fff; border: 1px solid var(--line); border-radius: 4px; padding: 4px; }
figure .light:not(:has(.wide)) { width: fit-content; max-width: 100%; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; } figcaption { color: var(--soft); margin-top: .4em; }
figure .wide img { max-width: none; width: 100%; min-width: 760px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 1em; }
.card { border: 1px solid var(--line); border-radius: 4px; padding: .6em; overflow-wrap: anywhere; min-width: 0; }
.card h3 { margin: .3em 0; } .card ul { margin: .3em 0; } .card img { width: 100%; height: auto; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } .scroll { overflow: visible; }
  figure, tr, .card { break-inside: avoid; } h2, h3, caption { break-after: avoid; } figure img, figure .wide img { min-width: 0; width: auto; max-width: 100%; max-height: 10cm; }
  th, td { white-space: normal; overflow-wrap: anywhere; padding: .15em .35em; font-size: 8pt; } }
"""


def build_document(title: str, body: Iterable[str], *, style: str = "") -> str:
    """A whole page.

    Args:
        title: As text.
        body: Markup, in order; empty parts are left out.
        style: Rules of the page's own, after the common ones.
    """
    parts = "\n".join(part for part in body if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style></head>\n<body>\n<main>\n{parts}\n</main>\n</body></html>\n"
    )


def build_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, label: str, words: Iterable[int] = ()) -> str:
    """A table in a box that scrolls sideways by itself; the first cell of a row is its heading.

    Args:
        head: Column headings.
        rows: Cells as text.
        label: What the table holds, for screen readers.
        words: Positions of columns that hold sentences, which may wrap.
    """
    return build_markup_table(head, ([escape(cell) for cell in row] for row in rows), label=label, words=words)


def build_markup_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, label: str, words: Iterable[int] = ()
) -> str:
    """As `build_table`, of cells that are markup already."""
    kinds = [' class="words"' if position in set(words) else "" for position in range(len(head))]
    top = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(head, kinds, strict=True))
    lines = []
    for row in rows:
        first, *others = row
        cells = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(others, kinds[1:], strict=True))
        lines.append(f'<tr><th scope="row"{kinds[0]}>{first}</th>{cells}</tr>')
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0"><table>'
        f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def build_figure(picture: str, *, alt: str, caption: str, wide: bool = False) -> str:
    """A picture on a light ground, whatever the theme, with a caption.

    Args:
        picture: Data URL.
        alt: What it shows, for those who do not see it.
        caption: What to look for.
        wide: Too wide for a phone: it scrolls in a box of its own.
    """
    image = f'<img src="{picture}" alt="{escape(alt)}">'
    if wide:
        image = f'<div class="scroll wide" role="region" aria-label="{escape(alt)}" tabindex="0">{image}</div>'
    return f'<figure><div class="light">{image}</div><figcaption>{escape(caption)}</figcaption></figure>'


def picture_url(picture: bytes, kind: str = "jpeg") -> str:
    """A picture as a data URL; `kind` is "jpeg", "png" or "gif"."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
