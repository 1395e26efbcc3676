"""Reports as pages of HTML, which need no other file, and as Markdown.

Whatever names and numbers come from files is text in a page: it is escaped, and the page allows
itself nothing but the pictures in it.
"""

import base64
import html

# Okabe and Ito's colours, which stay apart for colour-blind readers
COLORS = ("#0072B2", "#D55E00", "#009E73", "#A85585", "#000000", "#E69F00", "#56B4E9", "#8C8C8C")
HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>tdkern report</title>
<style>
body { font: 15px/1.5 sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin-bottom: 2em }
td, th { border: 1px solid #ccc; padding: .2em .7em; text-align: left; overflow-wrap: anywhere }
figure { display: inline-block; margin: 0 1em 1em 0; max-width: 100% }
img { max-width: 100%; image-rendering: pixelated }
img.curves { image-rendering: auto }
</style></head><body>
"""


class Strong(str):
    """Text of a table's cell that stands out."""


def html_page(title: str, parts: list[str]) -> str:
    """The page of a title and what stands under it, which is HTML."""
    return "".join([HEAD, f"<h1>{html.escape(title)}</h1>\n", *parts, "</body></html>\n"])


def html_table(head: list[str], rows: list[list[str]]) -> str:
    """A table of texts; those that are `Strong` are bold."""

    def cell(text: str, tag: str) -> str:
        inside = html.escape(text)
        if isinstance(text, Strong):
            inside = f"<b>{inside}</b>"
        return f"<{tag}>{inside}</{tag}>"

    lines = ["".join(cell(text, "th") for text in head)]
    lines += ["".join(cell(text, "td") for text in row) for row in rows]
    return "<table>\n" + "".join(f"<tr>{each}</tr>\n" for each in lines) + "</table>\n"


def html_image(data: bytes, kind: str) -> str:
    """A PNG file's bytes as a picture of a class, "curves" being one that is not of pixels."""
    return f'<img class="{kind}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """`html_table` as Markdown."""

    def cell(text: str) -> str:
        inside = markdown_text(text).replace("|", "\\|")
        return f"**{inside}**" if isinstance(text, Strong) else inside

    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(cell, line))} |\n" for line in lines) + "\n"


def markdown_text(text: str) -> str:
    """Text of one line in which HTML and links are text too."""
    for sign in "\\`*_[]":
        text = text.replace(sign, f"\\{sign}")
    return html.escape(" ".join(text.split()), quote=False)
