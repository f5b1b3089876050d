"""Draw growth.py's measurements: `plot_growth.py POINTS.json OUT.png`."""

import json
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter


def main(points, out):
    series = json.load(open(points))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, rows in series.items():
        n = [row["n"] for row in rows]
        for axis, key, unit in ((axes[0], "seconds", 1), (axes[1], "peak", 1e6)):
            middle = [row[key]["median"] / unit for row in rows]
            below = [m - row[key]["min"] / unit for m, row in zip(middle, rows)]
            above = [row[key]["max"] / unit - m for m, row in zip(middle, rows)]
            line = axis.errorbar(n, middle, [below, above], marker="o", capsize=3, label=name)
            if key == "seconds":
                axis.plot(n, [middle[0] * x / n[0] for x in n], ":", color=line[0].get_color(), linewidth=1)
    for axis, title in ((axes[0], "seconds (dotted: linear from the " "first)"), (axes[1], "peak resident memory, " "MB")):
        axis.set(xscale="log", yscale="log", xlabel="images", title=title)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(LogLocator(subs=(1, 2, 5)))
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            side.set_minor_formatter(NullFormatter())
        axis.set_xticks(n)
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
