"""Charts as SVG text that stands inside a page: no file, no script, no address outside."""

import io
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from lib.evaluation.pictures import COLORS
from lib.types import FloatArray

MARKERS = "osD^vPX*<>"
FIGURE = (8.4, 4.2)  # inches
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a label may have dollar signs in its name
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}
_STYLED = threading.Lock()  # matplotlib has one style for all threads


@dataclass(frozen=True)
class Line:
    """One curve: y over x with a band from low to high."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    dashed: bool = False


@dataclass(frozen=True, eq=False)
class Points:
    """One group of points (N, 2) of a map; `texts` are written beside them."""

    name: str
    places: FloatArray
    color: str
    size: float
    marker: str = "o"
    texts: tuple[str, ...] = ()


def curves(
    lines: Sequence[Line], *, x_label: str, y_label: str, title: str, logarithmic: bool = True
) -> str:
    """Curves; a logarithmic axis has its ticks at the x of the lines that are not dashed."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with _STYLED, rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=FIGURE, layout="constrained")
        axis = figure.add_subplot()
        for number, line in enumerate(lines):
            color = COLORS[number % len(COLORS)]
            axis.plot(
                line.x,
                line.y,
                color=color,
                marker=None if line.dashed else MARKERS[number % len(MARKERS)],
                markersize=5,
                linestyle="--" if line.dashed else "-",
                label=line.name,
            )
            axis.fill_between(line.x, line.low, line.high, color=color, alpha=0.13, linewidth=0)
        if logarithmic:
            axis.set_xscale("log", base=2)
            ticks = sorted({x for line in lines if not line.dashed for x in line.x})
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.set_title(title, loc="left", fontsize=11)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _svg(figure, title)


def scatter(groups: Sequence[Points], *, title: str) -> str:
    """A map: groups of points; its axes have no meaning, so they are not shown."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with _STYLED, rc_context({**STYLE, "svg.hashsalt": title, "axes.grid": False}):
        figure = Figure(figsize=(8.4, 6.0), layout="constrained")
        axis = figure.add_subplot()
        for group in groups:
            if not len(group.places):
                continue
            axis.scatter(
                group.places[:, 0],
                group.places[:, 1],
                s=group.size,
                c=group.color,
                marker=group.marker,
                label=f"{group.name} ({len(group.places)})",
                edgecolors="white",
                linewidths=0.6,
            )
            for place, text in zip(group.places, group.texts, strict=False):
                axis.annotate(text, place, xytext=(5, 4), textcoords="offset points", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
        axis.set_aspect("equal", adjustable="datalim")
        axis.set_title(title, loc="left", fontsize=11)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _svg(figure, title)


def _svg(figure: object, title: str) -> str:
    """The svg element alone, scaled by the page, with a title for those who do not see it."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})  # type: ignore[attr-defined]  # Figure
    inside = text.getvalue()
    inside = inside[inside.index("<svg") :]
    inside = re.sub(r"<metadata>.*?</metadata>", "", inside, flags=re.DOTALL)
    inside = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", inside, count=1)
    inside = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", inside, count=1)
    safe = title.replace("&", "&amp;").replace("<", "&lt;")
    return inside.replace(">", f' role="img"><title>{safe}</title>', 1)
