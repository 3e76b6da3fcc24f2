"""What a report of run.py looks like: a table, and a plot (matplotlib is optional).

    python benchmarks/plot.py benchmarks/out/cpu-float32-1024x8192.json
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

OURS, PASSES = "fusedloss", ("forward", "backward", "both")
COLOURS = {OURS: "#d1495b", "torch": "#30638e", "torch.compile": "#7fb069", "naive": "#a0a0a0"}
PEERS = ("#8d6a9f", "#edae49", "#00798c", "#5c4742")
MARKERS = {OURS: "o", "torch": "|", "torch.compile": "D", "naive": "s"}


def slug(report: dict[str, Any]) -> str:
    name = "cpu" if report["kind"] == "cpu" else re.sub(r"[^a-z0-9]+", "-", report["device"].lower()).strip("-")
    return f"{name}-{report['dtype']}-{report['rows']}x{report['cols']}"


def table(report: dict[str, Any]) -> Table:
    of = {(r["case"], r["name"]): r for r in report["results"]}
    out = Table(title=f"{report['device']}: {report['rows']} x {report['cols']}, {report['dtype']}",
                caption=f"ms: median, ± half the 20-80 % range. GB/s and % of a copy's {report['copy_gbs']:.1f} GB/s "
                "count the bytes that forward and backward must move.\nMiB: peak beyond the inputs, forward and "
                "backward. x torch: both, torch's time over this one's.", box=SIMPLE_HEAD)  # fmt: skip
    for name in ("case", "", *(f"{p}, ms" for p in PASSES), "GB/s", "% copy", "x torch", "MiB", "launches"):
        out.add_column(name, justify="left" if name in ("case", "") else "right", no_wrap=True)
    shown = None
    for (case, name), r in of.items():
        if shown not in (None, case):
            out.add_row()
        first = "" if case == shown else case.replace("binary_cross_entropy", "bce")
        shown, style = case, "bold" if name == OURS else None
        if "ms" not in r:
            out.add_row(first, name, f"[red]{r['verdict'].split(':')[0]}", style=style)
            continue
        cells = [f"{t[0]:.3g} ±{(t[2] - t[1]) / 2 / t[0]:.0%}" for t in r["ms"].values()]
        rate, torch_ms = r["gbs"]["both"], of[case, "torch"].get("ms")
        cells += ["-", "-"] if rate is None else [f"{rate:.1f}", f"{rate / report['copy_gbs']:.0%}"]
        cells += [f"{torch_ms['both'][0] / r['ms']['both'][0]:.2f}" if torch_ms else "-"]
        cells += [f"{r['peak_bytes'] / 2**20:.1f}", "-" if r["launches"] is None else str(r["launches"])]
        out.add_row(first, name, *cells, style=style)
    return out



def draw(report: dict[str, Any], to: Path) -> Path | None:
    """Left: torch's time over each one's, forward and backward together. Right: the share of a copy's
    bandwidth at which torch and fusedloss move the bytes that have to be moved. None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    of = {(r["case"], r["name"]): r for r in report["results"] if "ms" in r}
    cases = list(dict.fromkeys(r["case"] for r in report["results"]))
    if not cases:
        return None
    names = list(dict.fromkeys(r["name"] for r in report["results"]))
    order = sorted(names, key=lambda n: (n == OURS, n))  # ours is drawn last, on top
    colour = {**dict(zip([n for n in names if n not in COLOURS], PEERS * 9, strict=False)), **COLOURS}
    figure = Figure(figsize=(12, 1.9 + 0.34 * len(cases)), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    both = lambda case, name: of[case, name]["ms"]["both"][0] if (case, name) in of else None
    for name in order:
        points = [(both(c, "torch") / both(c, name), i) for i, c in enumerate(cases)
                  if both(c, "torch") and both(c, name)]  # fmt: skip
        if name == "torch" or not points:
            continue
        x, y = zip(*points, strict=True)
        left.scatter(x, y, s=60 if name == OURS else 34, marker=MARKERS.get(name, "^"), color=colour[name],
                     label=name, zorder=4 if name == OURS else 3, edgecolors="white", linewidths=0.6)  # fmt: skip
        if name == OURS:
            left.hlines(y, 1, x, color=colour[name], alpha=0.35, linewidth=2.5, zorder=2)
            for value, row in points:
                left.annotate(
                    f"{value:.2f}" if value < 10 else f"{value:.0f}", (value, row), (0, 7), zorder=5,
                    textcoords="offset points", ha="center", fontsize=7.5, color=colour[name],
                    bbox=dict(facecolor="white", edgecolor="none", pad=0.6, alpha=0.85),
                )  # fmt: skip
    left.axvline(1, color=colour["torch"], linewidth=1.2, label="torch", zorder=1)
    left.set_xscale("log", base=2)
    low, high = (math.floor(math.log2(left.get_xlim()[0])), math.ceil(math.log2(left.get_xlim()[1])))
    ticks = [2.0**k for k in range(low, high + 1)]
    left.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    left.set_xlim(ticks[0] * 0.95, ticks[-1] * 1.05)
    left.set_title("speed against torch, forward + backward (right is faster)", fontsize=10, loc="left")
    shown = [name for name in ("torch", OURS) if name in names]
    for k, name in enumerate(shown):
        rate = [(of.get((c, name)) or {}).get("gbs", {}).get("both") or 0.0 for c in cases]
        offset = (k - (len(shown) - 1) / 2) * 0.36
        right.barh([i + offset for i in range(len(cases))], rate, 0.34, color=colour[name], label=name)
    right.axvline(report["copy_gbs"], color="black", linestyle="--", linewidth=1)
    right.annotate(f"a copy: {report['copy_gbs']:.0f} GB/s ", (report["copy_gbs"], -0.75), ha="right", fontsize=8)
    right.set_title("necessary bytes over time, GB/s", fontsize=10, loc="left")
    left.set_yticks(range(len(cases)), [c.replace("binary_cross_entropy", "bce") for c in cases], fontsize=8.5)
    left.set_ylim(len(cases) - 0.4, -1.1)
    losses = [c.partition("/")[0] for c in cases]
    for axis in (left, right):
        for i in range(1, len(cases)):
            if losses[i] != losses[i - 1]:
                axis.axhline(i - 0.5, color="#cccccc", linewidth=0.8, zorder=0)
        axis.grid(axis="x", color="#e6e6e6", zorder=0)
        axis.set_axisbelow(True)
        axis.tick_params(length=0, labelsize=8.5)
        axis.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(f"{report['device']} - {report['rows']} x {report['cols']}, {report['dtype']}",
                    x=0.01, ha="left", fontsize=12, fontweight="bold")  # fmt: skip
    left.legend(loc="upper center", bbox_to_anchor=(0.3, -0.05), ncols=6, fontsize=8.5, frameon=False)
    wrong = sum(bool(r["verdict"]) for r in report["results"])
    notes = [report["note"], f"{wrong} results were wrong or failed, and are not shown." if wrong else ""]
    figure.text(0.99, 0.005, " ".join(filter(None, notes)), ha="right", fontsize=8, color="#555555")
    figure.savefig(to, dpi=150)
    return to


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(draw(json.loads(Path(name).read_text()), Path(name).with_suffix(".png")))
