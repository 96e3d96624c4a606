"""How long the documents are: counts in bins of powers of two, as numbers, as a table and as a picture.

Bin b counts the documents whose number of tokens has b binary digits: bin 0 those without tokens, bin b > 0 those
of 2^(b-1) to 2^b - 1 tokens. It sees lengths alone, no file of tokens.
"""

from collections.abc import Iterable
from typing import BinaryIO

import numpy as np

NUM_BINS = 64  # as many as a length of 63 bits needs
BAR = 40  # characters of the longest bar


def length_histogram(pieces: Iterable[np.ndarray]) -> np.ndarray:
    """Documents in each bin, int64 [NUM_BINS], of their lengths [tokens], given in pieces, int64 [N]."""
    counts = np.zeros(NUM_BINS, np.int64)
    for lengths in pieces:
        # frexp takes x apart into m * 2^e with 0.5 <= m < 1: e is the number of binary digits, and 0 for 0.
        counts += np.bincount(np.frexp(lengths.astype(np.float64))[1], minlength=NUM_BINS)
    return counts


def bin_name(number: int) -> str:
    """The lengths that a bin stands for: 0, 1, 2–3, 4–7, …"""
    low, high = 2**number // 2, max(0, 2**number - 1)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def used(counts: np.ndarray) -> range:
    """The bins from the first to the last that counts a document."""
    filled = np.flatnonzero(counts)
    return range(filled[0], filled[-1] + 1) if filled.size else range(0)


def median_bin(counts: np.ndarray) -> int:
    """The bin of the median document."""
    return int(np.searchsorted(np.cumsum(counts), (counts.sum() + 1) // 2))


def table(counts: np.ndarray) -> list[str]:
    """A line for each bin: lengths, documents, their share, a bar."""
    bins = used(counts)
    rows = [("tokens", "documents", "share", "")]
    for b in bins:
        eighths = round(8 * BAR * int(counts[b]) / int(counts.max()))
        # A bin with a document shows at least the thinnest bar.
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip() or ("▏" if counts[b] else "")
        rows.append((bin_name(b), f"{counts[b]:,}", f"{counts[b] / counts.sum():.1%}", bar))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ("".join(f"  {cell:>{width}}" for cell, width in zip(row, widths, strict=False)) for row in rows)
    return [f"{line}  {row[3]}".rstrip() for line, row in zip(lines, rows, strict=True)]


def draw(counts: np.ndarray, title: str, facts: str, file: BinaryIO) -> None:
    """The histogram as a PNG: `title` and, smaller, a line of `facts` above the bars."""
    # Without pyplot there is neither a window nor a global state.
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    bins = used(counts)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    # A bar stands between its bin's bounds on an axis of binary logarithms.
    bars = axes.bar([b - 0.5 for b in bins], counts[bins.start : bins.stop], width=0.94, color="#4c72b0")
    shares = [f"{counts[b] / counts.sum():.0%}" if 200 * counts[b] >= counts.sum() else "" for b in bins]
    axes.bar_label(bars, shares, padding=2, fontsize=8, color="#444444")
    edges = range(max(0, bins.start - 1), bins.stop, 1 + len(bins) // 14) if bins else range(0)
    empty = [-0.5] if bins and bins.start == 0 else []
    labels = ["0"] * len(empty) + [f"{2 ** (b % 10)}{' kMGTP'[b // 10].strip()}" for b in edges]
    axes.set_xticks([*empty, *edges], labels)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="tokens in a document", ylabel="documents")
    axes.set_title(title, loc="left", fontweight="bold", pad=22, parse_math=False)
    axes.text(0, 1.02, facts, transform=axes.transAxes, fontsize=9, color="#444444")
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format="png", dpi=150)
