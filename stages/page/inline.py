"""Turn matplotlib figures into SVG elements that stand in the page.

The SVG differs from matplotlib's own: its colours are the page's CSS variables (which have a light
and a dark value), its text is in the page's font, markers have tooltips, and the whole has a title
and a description. What draws nothing is dropped, and coordinates have one decimal.
"""

import re
from io import BytesIO
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from stages.page.palette import COLOURS
from stages.page.plot import Plot, describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TIPS = " ¦ "
"""Prefix of each tooltip in the id of a group of markers."""
DROPPED = ("metadata", "style", "clipPath")
"""Elements that the page has no use for: nothing is drawn outside the frame."""


def inline_svg(figure: "Figure", plot: Plot, size: str) -> str:
    """Return a figure as an `<svg>` element for the page.

    Args:
        figure: The drawn figure.
        plot: The plot, for its words and for ids that are unique on the page.
        size: The class that says when the page shows it: "narrow", "wide" or "" (always).
    """
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = ElementTree.fromstring(buffer.getvalue())
    prefix = f"{plot.name}-{size}" if size else plot.name
    attributes = {
        "class": f"plot {size}".strip(),
        "viewBox": drawn.attrib["viewBox"],
        "style": f"--w: {drawn.attrib['width'].removesuffix('pt')}px",
        "role": "img",
        "aria-labelledby": f"{prefix}-title",
        "aria-describedby": f"{prefix}-description",
    }
    svg = ElementTree.Element("svg", attributes)
    ElementTree.SubElement(svg, "title", {"id": f"{prefix}-title"}).text = plot.title
    ElementTree.SubElement(svg, "desc", {"id": f"{prefix}-description"}).text = describe(plot)
    append_children(svg, drawn, prefix, {})
    return ElementTree.tostring(svg, encoding="unicode")


def append_children(
    parent: ElementTree.Element, element: ElementTree.Element, prefix: str, ids: dict[str, str]
) -> None:
    """Append the children of matplotlib's element, as the page needs them.

    Args:
        parent: What they are appended to.
        element: matplotlib's element.
        prefix: What every id on the page begins with.
        ids: matplotlib's id → id on the page, of the shapes that markers refer to; it grows.
    """
    for child in element:
        tag = child.tag.rpartition("}")[2]
        style = in_page_colours(child.get("style", ""))
        if tag in DROPPED or style == "fill: none":  # the latter is a background without a colour
            continue
        if tag == "g":
            group = ElementTree.SubElement(parent, "g") if TIPS in child.get("id", "") else parent
            append_children(group, child, prefix, ids)
            if group is not parent:
                add_tips(group, child.attrib["id"])
            continue
        attributes = {name: rounded(child.attrib[name]) for name in ("d", "x", "y") if name in child.attrib}
        transform = child.get("transform", "")
        if transform and not transform.startswith("rotate(-0"):
            attributes["transform"] = rounded(transform)
        if style:
            attributes["style"] = style
        if tag == "path" and "id" in child.attrib:
            ids[child.attrib["id"]] = f"{prefix}-{len(ids)}"
            attributes["id"] = ids[child.attrib["id"]]
        if tag == "use":
            attributes["href"] = f"#{ids[child.attrib[LINK].removeprefix('#')]}"
        copy = ElementTree.SubElement(parent, tag, attributes)
        if tag == "text":
            copy.text = child.text
        append_children(copy, child, prefix, ids)
        if tag == "defs" and not len(copy):
            parent.remove(copy)


LINK = "{http://www.w3.org/1999/xlink}href"
"""The attribute by which SVG 1.1 refers to a shape."""


def add_tips(group: ElementTree.Element, gid: str) -> None:
    """Give each marker of a group its tooltip, from the id that the group had."""
    for marker, tip in zip(group.iter("use"), gid.split(TIPS)[1:], strict=True):
        ElementTree.SubElement(marker, "title").text = tip


def rounded(text: str) -> str:
    """Round the numbers in coordinates to a tenth of a pixel."""
    return re.sub(r"-?\d+\.\d+(e-?\d+)?", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"),
                  " ".join(text.split()))  # fmt: skip


def in_page_colours(style: str) -> str:
    """Replace colours by the page's variables, and leave the font family to the page."""
    for tone, value in COLOURS.items():
        style = style.replace(value, f"var(--{tone})")
    return re.sub(r"font-family: [^;]*;? ?", "", style)
