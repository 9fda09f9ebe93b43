"""Write figures as Markdown tables, and as a chart."""

from __future__ import annotations

import math
from typing import Any

#: Figures of a run: heading, and digits after the point.
COLUMNS = {
    "rate": ("events/s", 0),
    "publish": ("publish, us", 1),
    "receive": ("receive, us", 1),
    "redis": ("Redis, us", 1),
    "send": ("send(), us", 1),
    "p50": ("p50, ms", 2),
    "p99": ("p99, ms", 2),
    "first": ("first event, ms", 0),
    "context": ("context, us", 1),
    "step": ("CPU, us", 1),
    "request": ("request, us", 1),
    "import": ("import, ms", 1),
}


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """Return the figures as one table for each subject."""
    machine = found["machine"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}; Python "
        f"{machine['python']}, redis-py {machine['redis-py']}, Redis {machine['redis']}. Medians "
        f"of {machine['rounds']} rounds; in brackets the median ratio to the first line."
    ]

    for subject, figures in found.items():
        if subject != "machine":
            lines += ["", *table(subject, figures)]

    return "\n".join(lines)


def table(subject: str, figures: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of a table."""
    names = [name for name in COLUMNS if any(name in each for each in figures.values())]

    if any("p50" in each for each in figures.values()):
        names.remove("rate")

    lines = [
        f"| {subject} | " + " | ".join(COLUMNS[name][0] for name in names) + " |",
        "|---|" + "---:|" * len(names),
    ]

    for contender, each in figures.items():
        if "error" in each:
            lines.append(f"| {contender} | {each['error']} |" + " |" * (len(names) - 1))
            continue

        title = f"{contender} {each['version']}" if "version" in each else contender
        cells = [cell(each[name], COLUMNS[name][1]) if name in each else "" for name in names]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")

    return lines


def cell(figure: dict[str, float], digits: int) -> str:
    """Return a figure and its ratio."""
    ratio = next((f" ({figure[name]:.2f})" for name in figure if name.startswith("of_")), "")
    return f"{figure['median']:,.{digits}f}{ratio}"


#: Pixels of the chart.
WIDTH, ROW, LABEL = 720, 26, 190

STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2328 }
  .value { font-variant-numeric: tabular-nums }
  .own { fill: #0b7285 }
  .other { fill: #adb5bd }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .own { fill: #3bc9db }
    .other { fill: #495057 }
  }
"""


def chart(figures: dict[str, dict[str, Any]]) -> str:
    """Return an SVG with a bar for each program: events a second, the fastest first.

    The scale is logarithmic: the slowest program is a thousand times slower than the fastest.
    """
    rates = {name: each["rate"]["median"] for name, each in figures.items() if "rate" in each}
    ordered = sorted(rates.items(), key=lambda item: -item[1])
    room = WIDTH - LABEL - 80
    most = math.log10(ordered[0][1])
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" '
        f'height="{ROW * len(ordered) + 30}" role="img" aria-label="Events a second">',
        f"<style>{STYLE}</style>",
        f'<text x="{LABEL}" y="16">events a second, process to process (logarithmic)</text>',
    ]

    for number, (name, rate) in enumerate(ordered):
        y = 30 + number * ROW
        wide = max(2, room * math.log10(max(rate, 1)) / most)
        kind = "own" if name.startswith("flask-eventbus") else "other"
        lines += [
            f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end">{name}</text>',
            f'<rect class="{kind}" x="{LABEL}" y="{y + 2}" width="{wide:.0f}" height="18" rx="2"/>',
            f'<text class="value" x="{LABEL + wide + 6:.0f}" y="{y + 15}">{rate:,.0f}</text>',
        ]

    return "\n".join([*lines, "</svg>", ""])
