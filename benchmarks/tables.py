"""Fill the tables of docs/results.md from the files of benchmarks/results.

A table stands between `<!-- FILE: SETS -->` and `<!-- end -->`. FILE is `reference` (the bundled
weights) or `untrained`, and SETS names with commas, `unseen` or `held-out` (all that no other table
names, and that were not, or were, trained on in their other half). Or FILE is, whatever SETS,
`study` (`reference` against `as_trained`), `draws` (`reference` and other draws of the bank's
slices), `labels`, `site`, `few`, `campaign`, `first`, `confidence` or `load`.
The text around it is written by hand and left alone, so that figures are never copied by hand.

    python benchmarks/tables.py                    # fills the tables
    python benchmarks/tables.py EARLIER [LATER]    # what changed since an earlier reference.json
"""

import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import by_labels, campaign, confidence, first_image, load, matchseg

RESULTS = HERE / "results"
OTHERS = {
    "labels": lambda: "\n".join(by_labels.lines(by_labels.read(RESULTS / "by_labels.jsonl"))),
    "draws": lambda: "\n".join(draws()),
    "site": lambda: "\n".join(matchseg.lines(matchseg.read_results(RESULTS / "matchseg.jsonl"))),
    "few": lambda: "\n".join(matchseg.lines(matchseg.read_results(RESULTS / "matchseg_few.jsonl"))),
    "campaign": lambda: "\n".join(campaign.lines(sorted(RESULTS.glob("campaign/*/campaign.json")))),
    "first": lambda: "\n".join(first_image.lines(read(RESULTS / "first_image.json"))),
    "confidence": lambda: "\n".join(confidence.lines(read(RESULTS / "confidence.json")["sets"])),
    "load": lambda: load.table({kind: read(RESULTS / f"load/{kind}.json") for kind in load.KINDS}),
}
BLOCK = re.compile(
    rf"(<!-- (reference|untrained|study|{'|'.join(OTHERS)}): (.*?) -->\n).*?(<!-- end -->)",
    re.DOTALL,
)
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

    def worse_than(low: int) -> str:
        last = {name: max(rows[name]) for name in names}
        worse = [n for n in names if rows[n][last[n]]["mean"] < rows[n][low]["mean"]]
        return (
            ", ".join(
                f"{n} ({rows[n][last[n]]['mean']:.3f} against {rows[n][low]['mean']:.3f})"
                for n in worse
            )
            or "none"
        )

    text = f"\nBelow copying: {worse_than(0)}."
    if all(4 in rows[name] for name in names):
        text += f" Most references worse than four: {worse_than(4)}."
    return text + "\n"


def against(before: Rows, after: Rows) -> str:
    """What the study's own labels are worth, at the largest k of both; the largest gains first."""
    gains = {
        name: (after[name][k]["mean"] - before[name][k]["mean"], k)
        for name in before.keys() & after.keys()
        for k in [max(before[name].keys() & after[name].keys())]
        if before[name][k]["cases"] == after[name][k]["cases"]
    }
    changed = sorted((n for n in gains if abs(gains[n][0]) >= 0.0005), key=lambda n: -gains[n][0])
    lines = ["| set | as trained | with what the labels say | gain |", "|---|---|---|---|"]
    for name in changed:
        gain, k = gains[name]
        both = (rows[name][k]["mean"] for rows in (before, after))
        lines.append(f"| {name} | {' | '.join(f'{x:.3f}' for x in both)} | {gain:+.3f} |")
    mean = sum(gain for gain, _ in gains.values()) / max(1, len(gains))
    same = sorted(gains.keys() - set(changed))
    text = f"\n{len(gains)} sets, mean gain {mean:+.3f}. Unchanged: {', '.join(same) or 'none'}.\n"
    return "\n".join(lines) + "\n" + text


def draws() -> list[str]:
    """Dice at the largest k by draw of the bank's slices: `reference.json` and `draw_*.json`."""
    files = [RESULTS / "reference.json", *sorted(RESULTS.glob("draw_*.json"))]
    found = [(read(file)["seed"], read_rows(file)) for file in files]
    names = sorted(set.intersection(*(set(rows) for _, rows in found)))
    seeds = " | ".join(f"draw {seed}" for seed, _ in found)
    lines = [
        f"| set | k | {seeds} | mean ± standard deviation |",
        "|---|---|" + "---|" * (len(found) + 1),
    ]
    for name in names:
        k = min(max(rows[name]) for _, rows in found)
        values = [rows[name][k]["mean"] for _, rows in found]
        each = " | ".join(f"{value:.3f}" for value in values)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        lines.append(
            f"| {name} | {k} | {each} | **{statistics.mean(values):.3f}** ± {spread:.3f} |"
        )
    return lines


def since(before: Rows, after: Rows) -> str:
    """Mean Dice by k, before and after, over the sets of which any figure changed."""
    both = {n: before[n].keys() & after[n].keys() - {0} for n in before.keys() & after.keys()}
    changed = sorted(
        name
        for name, ks in both.items()
        if any(before[name][k]["mean"] != after[name][k]["mean"] for k in ks)
    )
    lines = [f"{len(changed)} of {len(both)} sets changed: {', '.join(changed)}"]
    for k in sorted(set().union(*(both[name] for name in changed))):
        names = [name for name in changed if k in both[name]]
        old, new = (sum(rows[n][k]["mean"] for n in names) / len(names) for rows in (before, after))
        gains = [f"{n} {after[n][k]['mean'] - before[n][k]['mean']:+.3f}" for n in names]
        lines.append(f"k = {k}: {old:.3f} -> {new:.3f} ({', '.join(gains)})")
    return "\n".join(lines)


def read(path: Path) -> dict[str, Any]:
    """One file of results."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def read_rows(path: Path) -> Rows:
    """The rows of one file by set and k; none where it is not there."""
    rows: Rows = {}
    if path.exists():
        for row in read(path)["rows"]:
            rows.setdefault(row["set"], {})[row["k"]] = row
    return rows


def main() -> None:
    """Rewrite docs/results.md in place."""
    path = HERE.parent / "docs" / "results.md"
    text = path.read_text(encoding="utf-8")
    files = {
        kind: read_rows(RESULTS / f"{kind}.json")
        for kind in ("reference", "untrained", "as_trained")
    }
    named = {n for _, _, what, _ in BLOCK.findall(text) for n in what.split(",")}

    def fill(match: re.Match[str]) -> str:
        if match[2] in OTHERS:
            return match[1] + OTHERS[match[2]]() + "\n" + match[4]
        if match[2] == "study":
            return match[1] + against(files["as_trained"], files["reference"]) + match[4]
        rows, what = files[match[2]], match[3]
        if what in ("unseen", "held-out"):
            trained = what == "held-out"
            names = sorted(n for n in rows if n not in named and rows[n][0]["trained"] is trained)
        else:
            names = [n for n in what.split(",") if n in rows]
        if not names:
            return match[1] + "Not measured with these weights yet.\n" + match[4]
        body = table(rows, names, by_label=what not in ("unseen", "held-out"))
        return match[1] + body + remarks(rows, names) + match[4]

    path.write_text(BLOCK.sub(fill, text), encoding="utf-8")
    print(f"{path}: {', '.join(f'{len(rows)} sets of {kind}' for kind, rows in files.items())}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        earlier, later = (*map(Path, sys.argv[1:]), RESULTS / "reference.json")[:2]
        print(since(read_rows(earlier), read_rows(later)))
    else:
        main()
