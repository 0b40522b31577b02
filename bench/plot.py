"""The plot of a run's products: the share of the machine's peak by batch size, for nplora and its peers."""

from pathlib import Path
from typing import Any

from bench.timing import on_threads

SHAPE = (1536, 576)


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot the products with the fewest threads, with W of SHAPE (or the smallest shape), to `path`."""
    from matplotlib.figure import Figure

    threads = min(row["threads"] for row in results["product"])
    rows = [row for row in results["product"] if row["threads"] == threads and row["of_bound"] is not None]
    if not rows:
        print(f"{path} is not written: it would show shares of ceilings, and none were measured")
        return
    shapes = {(row["d_out"], row["d_in"]) for row in rows}
    shape = SHAPE if SHAPE in shapes else min(shapes)
    figure = Figure((10, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for line, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        for ax, direction in zip(line, ("forward", "backward"), strict=True):
            seen = {
                row["batch"]: row  # cold rows replace warm ones, so the cold one is drawn if both were timed
                for row in reversed(rows)
                if (row["dtype"], row["direction"], row["d_out"], row["d_in"]) == (dtype, direction, *shape)
            }
            batches = sorted(seen)
            ax.plot(batches, [seen[n]["of_bound"] for n in batches], "o-", label="nplora")
            for peer in seen[batches[0]]["over"]:
                ax.plot(
                    batches, [seen[n]["of_bound"] / seen[n]["over"][peer] for n in batches], "s--", label=peer
                )
            ax.set(xscale="log", ylim=(0, 1.05), title=f"{direction}, {dtype}")
            ax.set_xticks(batches, [str(n) for n in batches])
            ax.grid(alpha=0.3)
            ax.legend()
    figure.suptitle(
        f"Product with W {shape[0]}x{shape[1]}, {on_threads(threads)}: share of the machine's peak"
    )
    figure.supxlabel("rows of x (W is cold up to 32)")
    figure.savefig(path)
