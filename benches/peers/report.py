"""From the JSON of compare.py to a table and a roofline plot: report.py IN.json PAGE.md PLOT.svg

Of a page that has the two MARKS, such as docs/performance.md, what is between them is replaced; any other becomes the table.
"""
import json
import os
import sys

import matplotlib
matplotlib.use("svg")
# The same figures give the same file, with its text as text.
matplotlib.rcParams |= {"svg.hashsalt": "fam", "svg.fonttype": "none"}
import matplotlib.pyplot as plt

ORDER = ["A", "B", "C", "D", "E-64", "E-128", "F-linear", "F-delta", "A-backward", "B-backward"]
DTYPES = ["f32", "bf16", "f16"]
MARKS = "<!-- peers: written by benches/peers/report.py -->", "<!-- /peers -->"


def table(rows):
    """One line for each case and dtype; the columns of each number of threads side by side."""
    counts = sorted({row["threads"] for row in rows})
    by = {(row["case"], row["dtype"], row["threads"]): row for row in rows}
    said = lambda n: f"{n} thread" + "s" * (n > 1)
    head = ["case", "dtype"]
    for n in counts:
        head += [f"ms, {said(n)}", "share of the roof", "best peer", "its ms", "peer / fam [95 %]"]
    yield from (head, ["---"] * len(head))
    for case in ORDER:
        for dtype in DTYPES:
            cells = []
            for n in counts:
                row = by.get((case, dtype, n))
                if row is None:
                    cells += ["", "", "not measured", "", ""]
                    continue
                cells += [f"{row['seconds'] * 1e3:.3f}", f"{100 * row['share']:.0f} %"]
                best = row["peers"].get(row["best"])
                cells += ["none", "", ""] if best is None else [
                    row["best"], f"{best['seconds'] * 1e3:.3f}", "{:.2f} [{:.2f}, {:.2f}]".format(best["ratio"], *best["interval"])]
            if any((case, dtype, n) in by for n in counts):
                yield [case, dtype, *cells]


def origin(rows):
    """Where the figures are from."""
    one = lambda values: ", ".join(sorted(set(values)))
    e = [row["environment"] for row in rows]
    versions = [f"PyTorch {r['versions']['torch']}, ONNX Runtime {r['versions']['onnxruntime']}" for r in rows]
    return (f"{one(x['cpu'] for x in e)}, {max(x['threads'] for x in e)} threads; {one(x['rustc'] for x in e)}; {one(versions)}; "
            f"{one(r['date'] for r in rows)}; commit {one(x['commit'] for x in e)}; {one(str(r['rounds']) for r in rows)} rounds.")


def plot(rows, path):
    """GFLOP/s of each case under its own roof: of arithmetic and exponentials, or for decode of memory. On the fewest threads."""
    threads = min(row["threads"] for row in rows)
    rows = [row for row in rows if row["threads"] == threads]
    dtypes = [dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in rows)]
    figure, panels = plt.subplots(1, len(dtypes), figsize=(4.4 * len(dtypes), 3.8), sharey=True, squeeze=False)
    for panel, dtype in zip(panels[0], dtypes):
        chosen = sorted((row for row in rows if row["dtype"] == dtype), key=lambda row: ORDER.index(row["case"]))
        at, rate = range(len(chosen)), lambda row, seconds: (row["flops"] + row["bf16_flops"]) / seconds / 1e9
        of_peer = lambda row: rate(row, row["peers"][row["best"]]["seconds"]) if row["best"] else float("nan")
        panel.bar(at, [rate(row, row["roof"]) for row in chosen], width=0.7, color="gainsboro", label="roof")
        panel.scatter(at, [rate(row, row["seconds"]) for row in chosen], color="tab:blue", s=24, label="fam")
        panel.scatter(at, [of_peer(row) for row in chosen], facecolors="none", edgecolors="tab:red", s=24, label="best peer")
        panel.set(title=f"{dtype}, {threads} thread" + "s" * (threads > 1), yscale="log")
        panel.set_xticks(at, [row["case"] for row in chosen], rotation=60, ha="right", fontsize=8)
    panels[0][0].set_ylabel("GFLOP/s")
    panels[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main():
    source, page, to_plot = sys.argv[1:]
    with open(source) as file:
        rows = json.load(file)["rows"]
    lines = ["| " + " | ".join(cells) + " |" for cells in table(rows)]
    text = "\n".join([origin(rows), "", *lines, ""])
    old = open(page).read() if os.path.exists(page) else ""
    if all(mark in old for mark in MARKS):
        before, after = old.split(MARKS[0])[0], old.split(MARKS[1])[1]
        text = "\n".join([before + MARKS[0], text.rstrip(), MARKS[1] + after])
    with open(page, "w") as file:
        file.write(text)
    plot(rows, to_plot)


if __name__ == "__main__":
    main()
