"""The common look of all figures, and a figure as SVG that fits a light and a dark page."""

from __future__ import annotations

import hashlib
import html
import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter

from brittle.results.wording import SUPERSCRIPT, number

INK = "#010203"
"""Colour of text and axes; :func:`svg` turns it into the colour of the surrounding page."""
SERIES = ("#1f7fc4", "#d55e00", "#009e73", "#c2659a")
"""Colours of the data (after Okabe and Ito): told apart by the colour-blind, 3 : 1 or better on white and on black."""
NORM_SERIES = {2: 0, math.inf: 1, 1: 2}
"""Place of each norm's colour and mark in :data:`SERIES`."""
NORM_LIFT = {2: -0.16, math.inf: 0.16, 1: 0.0}
"""How far each norm's marks lie from the middle of a layer's row, so that they do not cover one another."""
MOST_LABELS = 80
"""Most names down the side of a figure; of more layers, every second or third is named."""
LEGEND_SIGNS = 130
"""Signs that fit into a line of a figure's legend, with room for the marks."""
STYLE: dict[str, Any] = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.linewidth", "grid.linewidth"), 0.6),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top", "legend.frameon"), False),
    **dict.fromkeys(("legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 8.5),
    **dict.fromkeys(("axes.labelsize", "axes.titlesize", "font.size"), 9),
    **{"axes.facecolor": "none", "axes.titlelocation": "left", "axes.titlepad": 9},
    **{"grid.alpha": 0.14, "grid.color": INK},
    **{"svg.fonttype": "none", "svg.hashsalt": "brittle"},  # text stays text; ids depend on the drawing alone
    **{"figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.06},
}
styled = style.context(("default", STYLE))
"""Decorates what draws: the caller's style is neither read nor changed."""


class Drawing(Figure):
    """A figure that notebooks show as its page does, in the colours of the notebook, whatever matplotlib's backend."""

    def _repr_svg_(self) -> str:
        return svg(self)


@styled
def svg(figure: Figure) -> str:
    """The figure as one ``<svg>`` element to place in a page: no prolog, no date, no fixed text colour.

    Text and axes take the colour of the page; all ids begin with a hash of the content, so that figures can share one.
    Every mark has a title, which browsers show beside the pointer: what it is, and its value.
    """
    titles = name_marks(figure)
    title = html.escape(str(figure.get_label()))
    stream = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the page's own font will have it
        figure.savefig(stream, format="svg", facecolor="none", metadata=no_metadata)
    content = stream.getvalue().partition("<svg")[2].partition(">")[2]
    content = add_titles(content, titles)
    # A style element would rule all drawings of the page; what it says stands in the root element below.
    content = re.sub(r"<!--.*?-->|<style.*?</style>", "", content, flags=re.DOTALL)
    prefix = f"f{hashlib.sha256((title + content).encode()).hexdigest()[:8]}-"
    content = re.sub(r"<[^>]*>", lambda tag: _inline(tag[0], prefix), content)
    box = "0 0 " + " ".join(f"{72 * side:g}" for side in figure.get_size_inches())
    fonts = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
    look = f"font-family: {fonts}; stroke-linejoin: round; stroke-linecap: butt"
    root = f'xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{title}" viewBox="{box}" style="{look}"'
    return f"<svg {root}><title>{title}</title>{content.strip()}\n"


def _inline(tag: str, prefix: str) -> str:
    """A tag with ids of its own, the page's colour and font, and paths of two decimals."""
    tag = re.sub(r"(?<=\s)id=\"", f'id="{prefix}', tag)
    tag = tag.replace('xlink:href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag).replace(INK, "currentColor")
    # Less than a hundredth of a point cannot be seen.
    more_than_hundredths = r"(\.\d\d)\d+"
    return re.sub(r'(?<=\sd=")[^"]*', lambda path: " ".join(re.sub(more_than_hundredths, r"\1", path[0]).split()), tag)


MARK = "mark-"
"""How the ids of what carries titles begin."""


def name_marks(figure: Figure) -> dict[str, list[str]]:
    """What each mark of a figure shows, in the order of drawing, by an id that its line is given for that."""
    above = [handle for legend in figure.legends for handle in _named_handles(legend)]
    titles: dict[str, list[str]] = {}
    for axis in figure.axes:
        known = [*above, *_named_handles(axis.get_legend())]
        for line in axis.lines:
            x, y = (np.asarray(values, dtype=float) for values in line.get_data(orig=False))
            if line.get_transform() != axis.transData or not len(x):
                continue  # a rule across the panel
            name = next((text for look, text in known if look == _look(line)), "")
            gid = f"{MARK}{len(titles)}"
            line.set_gid(gid)
            alone = line.get_marker() in ("None", None, "", " ", "none")
            values = (
                [] if alone else [_title(axis, name, *at) for at in zip(x, y, strict=True) if np.isfinite(at).all()]
            )
            titles[gid] = values if values or not name else [name]
        for bar in axis.patches:
            if isinstance(bar, Rectangle) and bar.get_alpha() is None:
                gid = f"{MARK}{len(titles)}"
                bar.set_gid(gid)
                titles[gid] = [_title(axis, "", bar.get_x() + bar.get_width(), bar.get_y() + bar.get_height() / 2)]
    return {gid: texts for gid, texts in titles.items() if texts}


def _named_handles(legend: Legend | None) -> list[tuple[tuple[object, ...], str]]:
    """The look of each series that a legend names, with its name."""
    if legend is None:
        return []
    handles = [handle for handle in legend.legend_handles if isinstance(handle, Line2D)]
    return [(_look(handle), text.get_text()) for handle, text in zip(handles, legend.get_texts(), strict=False)]


def _look(line: Line2D) -> tuple[object, ...]:
    """By what a reader tells series apart."""
    hollow = line.get_markerfacecolor() == "none"
    return line.get_color(), line.get_marker(), hollow, line.get_linestyle() if line.get_marker() == "None" else ""


def _title(axis: Axes, name: str, x: float, y: float) -> str:
    """What a mark shows: the row or place where it stands, its series, and its value."""
    rows, locator = axis.yaxis.get_major_formatter(), axis.yaxis.get_major_locator()
    if isinstance(rows, FuncFormatter) and isinstance(locator, FixedLocator):  # what naming the ticks leaves there
        nearest = min(map(float, axis.get_yticks()), key=lambda place: abs(place - y), default=math.inf)
        row = rows(nearest).partition("\n")[0] if abs(nearest - y) <= 0.5 else ""
        value, where = _valued(x, axis.get_xlabel()), ", ".join(filter(None, (row, name)))
        return f"{where}: {value}" if where else value
    where = f"{name}, " if name else ""
    return f"{where}at {_valued(x, axis.get_xlabel())}: {_valued(y, _outer_label(axis))}"


def _outer_label(axis: Axes) -> str:
    """The label of the y axis, which panels side by side have on the first alone."""
    return axis.get_ylabel() or next((other.get_ylabel() for other in axis.figure.axes if other.get_ylabel()), "")


def _valued(value: float, label: str) -> str:
    return f"{value:.1f} %" if "%" in label else number(value)


def add_titles(content: str, titles: Mapping[str, Sequence[str]]) -> str:
    """An SVG whose marks carry titles: one for each mark of a line, or one for a line that has none.

    Args:
        content: As matplotlib writes it, with the ids of :func:`name_marks`.
        titles: What :func:`name_marks` returned.
    """
    for gid, texts in titles.items():
        start = content.find(f'<g id="{gid}">')
        if start < 0:
            continue
        end = _end_of_group(content, start)
        group, left = content[start:end], [html.escape(text) for text in texts]
        if group.count("<use ") == len(left):
            marks = group.split("<use ")
            titled = [
                mark.replace("/>", f"><title>{text}</title></use>", 1)
                for mark, text in zip(marks[1:], left, strict=True)
            ]
            group = "<use ".join([marks[0], *titled])
        elif len(left) == 1:  # a line without marks
            group = group.replace(">", f"><title>{left[0]}</title>", 1)
        content = content[:start] + group + content[end:]
    return content


def _end_of_group(content: str, start: int) -> int:
    """Where the group that begins at ``start`` ends."""
    depth = 0
    for tag in re.finditer(r"<g\b[^>]*?(/?)>|</g>", content[start:]):
        depth += 0 if tag[1] else -1 if tag[0] == "</g>" else 1
        if depth == 0:
            return start + tag.end()
    return len(content)


def panels(title: str, columns: int, height: float, *, narrow: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side that share their y axis, or one below the other where it is to be narrow; the
    title is for those who cannot see it.
    """
    # The width is 826 CSS pixels, or 619 points, in which the SVG counts; a narrow one is 384 pixels wide.
    inches = (4.0, columns * height) if narrow else (8.6, height)
    figure = Drawing(figsize=inches, layout="constrained")
    figure.set_label(title)
    grid = (columns, 1) if narrow else (1, columns)
    return figure, list(figure.subplots(*grid, squeeze=False, sharey=True).flat)


def layer_panels(title: str, names: Sequence[str], columns: int, *, narrow: bool = False) -> tuple[Figure, list[Axes]]:
    """Panels with one row a layer, in the order of the model, names down the left side."""
    rows = min(len(names), MOST_LABELS)
    figure, axes = panels(title, columns, 1.15 + max(2, rows) * (0.27 if rows <= 20 else 0.165), narrow=narrow)
    label_rows(axes[0], names, most=20 if narrow else 34)
    for axis in axes[1:]:
        axis.tick_params(left=False, labelleft=narrow)
        axis.spines.left.set_visible(not narrow)
    for axis in axes:
        axis.grid(visible=True)
        axis.tick_params(labeltop=rows > 20)
    return figure, axes


def label_rows(axis: Axes, names: Sequence[str], *, most: int = 34) -> None:
    """One row a name, of at most so many signs, the first at the top, without an axis line."""
    step = math.ceil(len(names) / MOST_LABELS)
    labels = [short(name, most) for name in names[::step]]
    axis.set_yticks(range(0, len(names), step), labels, parse_math=False, fontsize=8 if len(names) > 20 else 8.5)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.spines.left.set_visible(False)
    axis.tick_params(axis="y", length=0)


def short(name: str, most: int = 34) -> str:
    """A name that fits beside a figure: printable, and without its middle when it is long."""
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return name if len(name) <= most else f"{name[: most // 2 - 4]}…{name[-(most // 2 + 3) :]}"


def drawable(value: float) -> bool:
    """Whether a logarithmic axis can show the value, with room for limits beyond it."""
    return 1e-290 < value < 1e290


def log_scale(axis: Axes, values: Iterable[float], room: float = 1.15) -> None:
    """A logarithmic x axis around ``values``, at most six ticks, at powers of ten or at 1, 2 and 5 of each."""
    usable = [value for value in values if drawable(value)] or [1.0]
    low, high = min(usable), max(usable)
    # Over less than about a decade and a half, powers of ten alone would leave one or two ticks.
    steps = (1, 2, 5) if high / low < 40 else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [step * 10.0**exponent for exponent in exponents for step in steps]
    first, last = max(m for m in marks if m <= low * 1.001), min(m for m in marks if m >= high * 0.999)
    marks = [mark for mark in marks if first <= mark <= last]
    marks = marks[:: math.ceil(len(marks) / 6)]
    axis.set_xscale("log")
    axis.set_xticks(marks, [_tick(mark) for mark in marks])
    axis.minorticks_off()
    axis.set_xlim(min(first, low / room), max(last, high * room))


def _tick(value: float) -> str:
    if 0.999e-3 < value < 1e4:
        return f"{value:g}"
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    power = f"10{str(int(exponent)).translate(SUPERSCRIPT)}"
    return power if mantissa == "1" else f"{mantissa} × {power}"


def legend(parent: Figure | Axes, handles: Sequence[Line2D], names: Sequence[str]) -> None:
    """A legend above a figure or below a panel; names are set last, so ``_x`` and ``$x$`` stay as they are."""
    whole = parent if isinstance(parent, Figure) else parent.get_figure()
    signs = int(LEGEND_SIGNS * whole.get_figwidth() / 8.6) if isinstance(whole, Figure) else LEGEND_SIGNS
    columns = max(1, min(len(names), signs // (max(map(len, names), default=0) + 8)))
    above: dict[str, Any] = {"loc": "outside upper left", "ncols": columns}
    below: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (-0.02, -0.19)}
    legend = parent.legend(handles, ["x"] * len(names), **(above if isinstance(parent, Figure) else below))
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def remark(axis: Axes, rows: Iterable[float], text: str, *, left: bool = False) -> None:
    """Write a remark at the right (or left) end of some rows."""
    for y in rows:
        place: dict[str, Any] = {"ha": "left" if left else "right", "va": "center", "fontstyle": "italic", "alpha": 0.8}
        axis.text(0.01 if left else 0.99, y, text, transform=axis.get_yaxis_transform(), fontsize=8, **place)


def series_look(series: int) -> dict[str, Any]:
    """Arguments of ``plot`` for the marks of a series."""
    colour, shape = SERIES[series], "os^D"[series]
    return {"marker": shape, "markersize": 4.3, "markeredgewidth": 0, "linestyle": "none", "color": colour}


def norm_look(p: float) -> dict[str, Any]:
    """The same for what is measured in a norm."""
    return series_look(NORM_SERIES[p])


def hollow_look(p: float) -> dict[str, Any]:
    """The same with the inside left open, for what a measurement is compared with."""
    return {
        **norm_look(p),
        "markerfacecolor": "none",
        "markeredgecolor": SERIES[NORM_SERIES[p]],
        "markeredgewidth": 0.9,
    }
