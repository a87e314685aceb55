"""Fill the tables of docs/results.md from benchmarks/results/reference.json.

A table stands between `<!-- reference: SETS -->` and `<!-- end -->`, SETS being names with commas,
`unseen` or `held-out` (all others that were not, or were, trained on in their other half). The
text around it is written by hand and left alone, so that figures are never copied by hand.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BLOCK = re.compile(r"(<!-- reference: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
STAGES = ("encode", "retrieve", "load", "segment", "merge")

Rows = dict[str, dict[int, dict[str, Any]]]  # set -> k -> row of reference_segmentation.py


def table(rows: Rows, names: Sequence[str], *, by_label: bool) -> str:
    """One line a set: Dice by k, by label at the largest k, false alarms, seconds."""
    ks = sorted({k for name in names for k in rows[name] if k})
    last = ks[-1]
    head = ["set", "cases", "copy", *(f"k = {k}" for k in ks[:-1]), f"k = {last} (interval)"]
    head += ["by label"] * by_label + ["absent but found", "s a slice, k = 8"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in names:
        found = rows[name]
        best = found[last]
        cells = [name, str(best["cases"]), f"{found[0]['mean']:.3f}"]
        cells += [f"{found[k]['mean']:.3f}" for k in ks[:-1]]
        cells.append(f"**{best['mean']:.3f}** ({best['low']:.2f}-{best['high']:.2f})")
        if by_label:
            each = (f"{n} {m['mean']:.2f}" for n, m in best["labels"].items() if m["cases"])
            cells.append(", ".join(each))
        cells.append(f"{best['false_alarms']:.2f}")
        cells.append(f"{sum(found[8]['seconds_per_slice'].values()):.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def remarks(rows: Rows, names: Sequence[str]) -> str:
    """What the table must not hide: below copying, and more references that make it worse."""

    def against(low: int) -> str:
        last = {name: max(rows[name]) for name in names}
        worse = [n for n in names if rows[n][last[n]]["mean"] < rows[n][low]["mean"]]
        return (
            ", ".join(
                f"{n} ({rows[n][last[n]]['mean']:.3f} against {rows[n][low]['mean']:.3f})"
                for n in worse
            )
            or "none"
        )

    return f"\nBelow copying: {against(0)}. Most references worse than four: {against(4)}.\n"


def main() -> None:
    """Rewrite docs/results.md in place."""
    report = json.loads((HERE / "results" / "reference.json").read_text(encoding="utf-8"))
    rows: Rows = {}
    for row in report["rows"]:
        rows.setdefault(row["set"], {})[row["k"]] = row
    path = HERE.parent / "docs" / "results.md"
    text = path.read_text(encoding="utf-8")
    named = {n for _, what, _ in BLOCK.findall(text) for n in what.split(",")}

    def fill(match: re.Match[str]) -> str:
        what = match[2]
        if what in ("unseen", "held-out"):
            trained = what == "held-out"
            names = sorted(n for n in rows if n not in named and rows[n][0]["trained"] is trained)
        else:
            names = [n for n in what.split(",") if n in rows]
        if not names:
            return match[1] + "Not measured with these weights yet.\n" + match[3]
        detailed = what not in ("unseen", "held-out")
        body = table(rows, names, by_label=detailed) + remarks(rows, names)
        return match[1] + body + match[3]

    filled = BLOCK.sub(fill, text)
    path.write_text(filled, encoding="utf-8")
    print(f"{path}: {len(rows)} sets of {report['segmenter']}", file=sys.stderr)


if __name__ == "__main__":
    main()
