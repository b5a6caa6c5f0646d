"""Results as text."""

from typing import Any

from mogan.evaluation.names import METRICS


def table(results: dict[str, Any]) -> str:
    """Metrics by systems as text, each as mean and interval."""
    systems = results["systems"]
    names = [name for name in METRICS if any(name in s["metrics"] for s in systems.values())]
    rows = [["", *systems]]
    for name in names:
        rows.append([METRICS[name].title, *(cell(s["metrics"].get(name)) for s in systems.values())])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def tables_of_tasks(results: dict[str, Any]) -> str:
    """A table per system whose clips are of tasks, with a column for each; "" where there are none."""
    told = {name: system["tasks"] for name, system in results["systems"].items() if "tasks" in system}
    return "".join(f"\n{name}, by task\n{table({'systems': tasks})}\n" for name, tasks in told.items())


def cell(metric: dict[str, Any] | None) -> str:
    """Mean and interval as text."""
    if metric is None:
        return "-"
    interval = " [{:.3g}, {:.3g}]".format(*metric["ci95"]) if metric.get("ci95") else ""
    return f"{metric['mean']:.3g}{interval}"
