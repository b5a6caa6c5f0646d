"""The tables of docs/performance.md from what `make gpu` measured: one file in, Markdown out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_inputs import recipe_key

from mogan.disk.files import write_atomically

BEGIN, END = "<!-- make gpu writes below -->", "<!-- make gpu wrote above -->"
Found = Mapping[str, Any]
NONE = "-"


def tables(found: Found) -> list[str]:
    """Lines of Markdown: the card, updates, networks, penalties, sampling, compilation, and what is missing."""
    parts, predicted = found["parts"], found.get("predicted", {})
    card = next((p for p in parts.values() if "device" in p), {})
    lines = [
        f"{card.get('device', 'unknown')}, torch {card.get('torch', '?')}, {found['date']}, random weights, bf16, batch 1, `make gpu`.",
        "",
    ]
    lines += _card(parts.get("card", {}), predicted)
    lines += _updates(parts, predicted)
    lines += _networks(parts.get("networks", {}), predicted)
    lines += _penalties(parts.get("penalty", {}))
    lines += _plain("Sampling one clip at 81 x 480 x 832:", parts.get("sample", {}), predicted)
    lines += _plain("Transformer with compiled blocks:", parts.get("compile", {}), predicted)
    failed = [f"`{name}`: {part['failed']}" for name, part in parts.items() if "failed" in part]
    if failed:
        lines += ["Failed: " + "; ".join(failed) + ".", ""]
    if found.get("skipped"):
        lines += ["No time was left for " + ", ".join(f"`{name}`" for name in found["skipped"]) + ".", ""]
    return lines[:-1]


def _card(part: Found, predicted: Found) -> list[str]:
    rows = {row["what"]: row for row in part.get("rows", [])}
    said = []
    if "copy" in rows:
        said.append(f"a copy moves {rows['copy']['bandwidth'] / 1e12:.2f} TB/s")
    for name in ("bf16", "tf32", "fp32"):
        if (row := rows.get(f"matrix product, {name}")) is not None:
            said.append(
                f"a matrix product reaches {row['flops'] / 1e12:.0f} TFLOP/s in {name.upper() if name == 'tf32' else name}"
            )
    return ["On this card " + ", ".join(said) + ".", ""] if said else []


def _updates(parts: Found, predicted: Found) -> list[str]:
    lines = [
        "| recipe | clip | update | seconds | estimated | peak GB | estimated | model FLOPs utilisation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    empty = len(lines)
    for part in parts.values():
        for row in part.get("rows", []):
            if "recipe" not in row or not {"loss", "note"} & row.keys():
                continue
            steps = predicted.get(recipe_key(row["recipe"], row["clip"], row["lora"]), {}).get("steps", [])
            said = next((step for step in steps if step["label"] == row["what"]), {})
            recipe = f"`{row['recipe']}`" + (f", adapters of rank {row['lora']}" if row["lora"] else "")
            cells = [recipe + (", compiled" if row["compiled"] else ""), " x ".join(map(str, row["clip"])), row["what"]]
            if "loss" in row:
                share = said["model_flops"] / row["seconds"] / predicted["bf16"] if said else None
                cells.append(_number(row["seconds"], ".2f") + ("" if row["time"] > 1 else " (first)"))
                peak = _number(row.get("peak"), ".1f", 1e9)
            else:
                share, peak = None, NONE
                cells.append(row["note"])
            cells += [_number(said.get("seconds"), ".2f"), peak, _number(said.get("peak"), ".1f", 1e9)]
            lines.append("| " + " | ".join([*cells, _number(share, ".0%")]) + " |")
    return [*lines, ""] if len(lines) > empty else []


def _networks(part: Found, predicted: Found) -> list[str]:
    lines = [
        "One call; memory is what it takes above weights and their gradients.",
        "",
        "| call | seconds | estimated | GB | estimated | TFLOP | TFLOP/s |",
        "|---|---|---|---|---|---|---|",
    ]
    empty = len(lines)
    for row in part.get("rows", []):
        if "seconds" not in row:
            lines.append(f"| {row['what']} | {row['note']} | | | | | |")
            continue
        said = predicted.get("networks", {}).get(row["what"], {})
        speed = said["flops"] / row["seconds"] if said else None
        cells = [
            row["what"],
            _number(row["seconds"], ".3f"),
            _number(said.get("seconds"), ".3f"),
            _number(row.get("above"), ".1f", 1e9),
            _number(said.get("above"), ".1f", 1e9),
            _number(said.get("flops"), ".1f", 1e12),
            _number(speed, ".0f", 1e12),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""] if len(lines) > empty else []


def _penalties(part: Found) -> list[str]:
    rows = [row for row in part.get("rows", []) if "cosine" in row]
    if not rows:
        return []
    frames = next(row["frames"] for row in part["rows"] if "frames" in row)
    lines = [
        f"R1 at sigma 0.01 and its gradient beside fp64's, {frames} latent frames:",
        "",
        "| arithmetic | value, of fp64's | gradient's relative error | cosine | seconds |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['what']} | {row['ratio']:.4f} | {row['error']:.2e} | {row['cosine']:.6f} | {row['seconds']:.2f} |"
        )
    return [*lines, ""]


def _plain(title: str, part: Found, predicted: Found) -> list[str]:
    rows = [row for row in part.get("rows", []) if {"seconds", "note"} & row.keys() and "recipe" not in row]
    if not rows:
        return []
    lines = [title, "", "| | seconds | peak GB | |", "|---|---|---|---|"]
    for row in rows:
        if "seconds" not in row:
            lines.append(f"| {row['what']} | {row['note']} | | |")
            continue
        more = f"{row['steps']} of them measured" if row.get("steps", 0) < row.get("of", 0) else ""
        more = f"{row['compiling']:.0f} s to compile" if "compiling" in row else more
        lines.append(f"| {row['what']} | {row['seconds']:.2f} | {_number(row.get('peak'), '.1f', 1e9)} | {more} |")
    return [*lines, ""]


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return NONE if value is None else format(value / unit, form)


def write_tables(page: Path, lines: list[str]) -> None:
    """Replace what stands between the markers."""
    text = page.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    write_atomically(page, f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")
