"""Write figures as Markdown tables, and as a chart."""

from __future__ import annotations

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
    ratio = next((value for name, value in figure.items() if name.startswith("of_")), 1.0)
    return f"{figure['median']:,.{digits}f} ({ratio:.2f})"
