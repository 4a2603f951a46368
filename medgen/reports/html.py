"""HTML pages that need no other file: one style, tables, and pictures that are part of the page.

body = f"<h2>Numbers</h2>{table(['measure', 'value'], rows, numeric={1})}{figure(content, 'png', 'Samples')}"
write_atomic(path, page("medgen: evaluation", body))

What comes from outside is escaped here, so that a file's name is never markup.
"""

import base64
from collections.abc import Collection, Iterable, Sequence
from html import escape

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem }
table { border-collapse: collapse } td, th { padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top }
td { overflow-wrap: anywhere } td:first-child { min-width: 15rem }
tr + tr td { border-top: 1px solid #ddd } .number { text-align: right; font-variant-numeric: tabular-nums }
td.number { white-space: nowrap }
img { max-width: 100%; height: auto } figure { margin: 1.5rem 0 }
figcaption { color: #666; white-space: pre-line; overflow-wrap: anywhere }
.row { display: flex; flex-wrap: wrap; gap: 1.2rem; font-size: .8rem; line-height: 1.35; color: #666 }
.row figure { margin: 0; width: 150px } .row img { width: 100% } .pair { display: flex; gap: .4rem }
code { background: #f3f3f3; padding: .1rem .3rem }
"""


def page(title: str, body: str) -> bytes:
    """A whole page; `body` is HTML."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{_STYLE}</style></head><body>
{body}
</body></html>
""".encode()


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Collection[int] = ()) -> str:
    """A table of text; columns in `numeric` are set flush right."""

    def row(cells: Sequence[str], tag: str) -> str:
        marks = (' class="number"' if column in numeric else "" for column in range(len(cells)))
        joined = "".join(f"<{tag}{mark}>{escape(cell)}</{tag}>" for cell, mark in zip(cells, marks, strict=True))
        return f"<tr>{joined}</tr>"

    return f"<table>{row(head, 'th') if head else ''}{''.join(row(cells, 'td') for cells in rows)}</table>"


def bullets(sentences: Iterable[str]) -> str:
    """A list of text."""
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in sentences)}</ul>"


def figure(content: bytes, kind: str, caption: str) -> str:
    """A picture file of that kind (png, jpeg, gif) over its caption, whose line breaks are kept."""
    data, text = base64.b64encode(content).decode(), escape(caption)
    return f'<figure><img src="data:image/{kind};base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'
