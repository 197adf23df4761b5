"""`report.html`: what a run did and how well, in one self-contained file.

The file names no other: style and images are inside it, it has no script, and its content security
policy forbids the browser to load anything.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path

from patchword.report import blocks
from patchword.report.blocks import Block, Headline, Mistake, Section
from patchword.report.record import RunRecord
from patchword.report.sections import Results, headline, sections
from patchword.report.words import count, percent
from patchword.training.checkpoint import replace_text

THUMBNAIL = 160
"""Longest side of a thumbnail, pixels."""


def write_page(run: RunRecord, results: Results) -> Path:
    """Write `report.html` into the run directory and return its path."""
    listed = [section for section in sections(run, results) if section.anchor]
    style = resources.files("patchword.report").joinpath("page.css").read_text(encoding="utf-8")
    links = "".join(f'<li><a href="#{each.anchor}">{each.title}</a></li>' for each in listed)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'">
<title>{escape(run.title)}: patchword report</title>
<style>
{style}</style>
</head>
<body>
<header>
<p class="eyebrow">patchword report</p>
<h1>{escape(run.title)}</h1>
{_headline(headline(run, results))}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{"".join(map(_section, listed))}</main>
<footer><p>Run directory: {escape(run.path.name)}. Fractions of images are given in percent; \
intervals are Wilson's at 95 %.</p></footer>
</body>
</html>
"""
    path = run.path / "report.html"
    replace_text(path, page.encode("utf-8", "replace").decode())
    return path


def _headline(said: Headline) -> str:
    pill = f'<a class="pill" href="#notes">{count(said.notes, "note")} on this result</a>'
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in said.tiles.items()
    )
    return f"""<div class="hero">
<div class="figure-number">{said.figure}</div>
<div class="said"><p><strong>{escape(said.claim)}</strong></p>
<p class="muted">{escape(said.aside)}</p>{pill if said.notes else ""}</div>
</div>
<dl class="tiles">{tiles}</dl>"""


def _section(section: Section) -> str:
    key, kind = section.anchor, " class=notes" if section.anchor == "notes" else ""
    return (
        f'<section id="{key}"{kind} aria-labelledby="{key}-title">\n'
        f'<h2 id="{key}-title">{section.title}</h2>\n{_html(section.blocks)}\n</section>\n'
    )


def _html(content: Sequence[Block]) -> str:
    return "\n".join(map(_block, content))


def _block(block: Block) -> str:
    match block:
        case blocks.Text():
            strong, kind = escape(block.strong), " class=muted" if block.muted else ""
            text = escape(block.text)
            if strong:
                text = text.replace(strong, f"<strong>{strong}</strong>", 1)
            return f"<p{kind}>{text}</p>"
        case blocks.Items():
            return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in block.items)}</ul>"
        case blocks.Code():
            return f"<pre><code>{escape(block.text)}</code></pre>"
        case blocks.Pairs():
            return _titled(block.title) + _pairs(block)
        case blocks.Table():
            return _titled(block.title) + _table(block)
        case blocks.Picture():
            return f"<figure>{_image(block.png(), 'png', block.hint, block.kind)}</figure>"
        case blocks.Mistake():
            return _mistake(block)
        case blocks.Group():
            parts = "".join(f"<div>{_html(part)}</div>" for part in block.parts)
            return f'<div class="{block.layout}">{parts}</div>'


def _titled(title: str) -> str:
    return f"<h3>{escape(title)}</h3>" if title else ""


def _pairs(block: blocks.Pairs) -> str:
    rows = ""
    for name, value in block.rows.items():
        default = block.defaults.get(name)
        aside = "" if default is None else f'<span class="default">default {escape(default)}</span>'
        kind = " class=changed" if aside else ""
        head = f'<th scope="row">{escape(name)}</th>'
        rows += f"<tr{kind}>{head}<td>{escape(value)}{aside}</td></tr>"
    return f'<table class="pairs"><tbody>{rows}</tbody></table>'


def _table(block: blocks.Table) -> str:
    kinds = [f' class="{kind}"' if kind else "" for kind in block.columns.values()]
    names = zip(block.columns, kinds, strict=True)
    head = "".join(f'<th scope="col"{kind}>{name}</th>' for name, kind in names)
    rows = ""
    for name, *cells in block.rows:
        shown = zip(cells, kinds[1:], strict=True)
        body = "".join(f"<td{kind}>{_cell(cell)}</td>" for cell, kind in shown)
        rows += f'<tr><th scope="row">{escape(str(name))}</th>{body}</tr>'
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    if not block.scroll:
        return table
    label = escape(block.scroll)
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{table}</div>'


def _cell(cell: str | float | None) -> str:
    if isinstance(cell, str):
        return escape(cell)
    bar = f'<span class="bar"><i style="width:{100 * (cell or 0):.1f}%"></i></span>'
    return percent(cell, 1) if cell is None else bar + percent(cell, 1)


def _mistake(mistake: Mistake) -> str:
    picture = mistake.thumbnail.convert("RGB")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    tiny = max(picture.size) <= 64
    picture.save(stream, "PNG" if tiny else "JPEG", **({} if tiny else {"quality": 85}))
    hint = f"{mistake.key}: {mistake.label}, taken for {mistake.predicted}"
    sure = percent(mistake.probability, 1)
    rows = {"true": mistake.label, "said": mistake.predicted, "sure": sure}
    told = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in rows.items())
    drawn = _image(stream.getvalue(), "png" if tiny else "jpeg", hint, "tiny" if tiny else "")
    return f'{drawn}<dl>{told}</dl><span class="key">{escape(mistake.key)}</span>'


def _image(content: bytes, form: str, hint: str, kind: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img class="{kind}" alt="{escape(hint)}" src="data:image/{form};base64,{data}">'
