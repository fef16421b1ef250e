r"""Equations between dollar signs become MathML while the page is built: no script, no network.

``$…$`` in a line, ``$$…$$`` by itself; ``\$`` is a dollar sign. Inside code nothing is touched.
"""

from __future__ import annotations

import re
from xml.etree.ElementTree import Element, fromstring

from latex2mathml import exceptions
from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.blockprocessors import BlockProcessor
from markdown.inlinepatterns import InlineProcessor

INLINE = r"(?<![\\$])\$(?!\s)([^$\n]+?)(?<![\\\s])\$(?![\d$])"
MALFORMED = tuple(e for e in vars(exceptions).values() if isinstance(e, type))
NAMESPACE = "{http://www.w3.org/1998/Math/MathML}"


def mathml(tex: str, display: str) -> Element:
    """The equation as an element. Raises ValueError, with the equation, if it is malformed."""
    try:
        root = fromstring(convert(tex.strip(), display=display))
    except MALFORMED as error:
        raise ValueError(f"equation {tex!r}: {type(error).__name__} {error}") from error
    for node in root.iter():
        node.tag = node.tag.removeprefix(NAMESPACE)
        if "\\" in (node.text or ""):
            raise ValueError(f"equation {tex!r}: {node.text!r} is not known to the converter")
        if node.tag == "mo" and node.text in ("|", "‖"):
            node.attrib |= {"lspace": "0", "rspace": "0"}  # a fence, not a relation
    return root


class _Inline(InlineProcessor):
    def handleMatch(self, m, data):
        text = self.md.htmlStash.store(_text(mathml(m.group(1), "inline")))
        return text, m.start(0), m.end(0)


class _Block(BlockProcessor):
    def test(self, parent, block):
        return block.lstrip().startswith("$$")

    def run(self, parent, blocks):
        text = blocks.pop(0)
        while not re.search(r"\$\$\s*$", text.strip()[2:]):
            if not blocks:
                raise ValueError(f"equation without an end: {text[:60]!r}")
            text += "\n" + blocks.pop(0)
        holder = Element("div", {"class": "equation"})
        holder.text = self.parser.md.htmlStash.store(
            _text(mathml(text.strip().removeprefix("$$").removesuffix("$$"), "block"))
        )
        parent.append(holder)


def _text(element: Element) -> str:
    from xml.etree.ElementTree import tostring

    return tostring(element, encoding="unicode")


class Maths(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.register(_Inline(INLINE, md), "maths", 185)
        md.parser.blockprocessors.register(_Block(md.parser), "maths", 95)
