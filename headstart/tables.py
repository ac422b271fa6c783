"""Results as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = ("mean_iou", "overall_iou", "p_at_0.5", "p_at_0.7", "p_at_0.9", "dice")


def results_table(results: Mapping[str, Any]) -> str:
    """Heads, then baselines, then mean_iou by kind of prompt where the dataset has kinds."""
    protocol = results["protocol"]
    rows = [(run["head"], run["metrics"]) for run in results["runs"]]
    rows += [(f"({name})", metrics) for name, metrics in results["baselines"].items()]
    lines = [
        f"{protocol['dataset']}/{protocol['split']}, {rows[0][1]['num_samples']} prompts, masks at original size, "
        f"probability {protocol['comparison']} {protocol['threshold']}",
        _line("", COLUMNS),
        *(_line(name, [_number(metrics[column]) for column in COLUMNS]) for name, metrics in rows),
    ]
    if results["num_left_out"]:
        lines.append(f"{results['num_left_out']} samples are left out: their images could not be encoded")
    kinds = list(results["runs"][0]["slices"].get("kind", {}))
    if kinds:
        lines += ["", _line("mean_iou by kind", kinds)]
        for run in results["runs"]:
            slices = run["slices"]["kind"]
            lines.append(_line(run["head"], [_number(slices[kind]["mean_iou"]) for kind in kinds]))
    return "\n".join(lines)


def _line(name: str, cells: Any) -> str:
    return f"{name:18}" + "".join(f"{cell:>13}" for cell in cells)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
