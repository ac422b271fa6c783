"""Results as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COMPARED = ("mean_iou", "overall_iou", "median_iou", "p_at_0.5", "p_at_0.7", "p_at_0.9", "dice", "giou", "ciou")


def results_table(results: Mapping[str, Any]) -> str:
    """Heads with intervals, then baselines, then mean_iou by kind of prompt where the dataset has kinds.

    The columns are those that the protocol shows first.
    """
    columns = results["protocol"]["headline"]
    rows = [(run["head"], run["metrics"]) for run in results["runs"]]
    lines = [_heading(results, rows[0][1]["num_samples"]), _line("", columns)]
    for run in results["runs"]:
        lines.append(_line(run["head"], [_number(run["metrics"][column]) for column in columns]))
        if any(run["intervals"][column] for column in columns):
            lines.append(_line("", [_interval(run["intervals"][column]) for column in columns]))
    for name, metrics in results["baselines"].items():
        lines.append(_line(f"({name})", [_number(metrics[column]) for column in columns]))
    if results["num_left_out"]:
        lines.append(f"{results['num_left_out']} samples are left out: their images could not be encoded")
    lines.append(_method(results["bootstrap"]))
    kinds = list(results["runs"][0]["slices"].get("kind", {}))
    if kinds:
        lines += ["", _line("mean_iou by kind", kinds)]
        for run in results["runs"]:
            slices = run["slices"]["kind"]
            lines.append(_line(run["head"], [_number(slices[kind]["mean_iou"]) for kind in kinds]))
    return "\n".join(lines)


def comparison_table(results: Mapping[str, Any]) -> str:
    """Two heads' metrics, how they differ and how sure that is, and how many samples changed."""
    first, second = (run["head"] for run in results["runs"])
    found, samples = results["differences"], results["samples"]
    width = max(13, len(first) + 2, len(second) + 2)
    lines = [
        _heading(results, samples["num"]),
        f"{'':18}{first:>{width}}{second:>{width}}{'difference':>13}{'interval':>20}{'p':>8}",
    ]
    for name in COMPARED:
        one = found[name]
        low_high = "-" if one["interval"] is None else " to ".join(map(_signed, one["interval"]))
        change = "-" if one["difference"] is None else _signed(one["difference"])
        values = f"{_number(one['first']):>{width}}{_number(one['second']):>{width}}"
        lines.append(f"{name:18}{values}{change:>13}{low_high:>20}{_number(one['p_value']):>8}")
    return "\n".join(
        [
            *lines,
            _method(results["bootstrap"]),
            f"IoU rises in {samples['won']} samples, falls in {samples['lost']} and stays the same in "
            f"{samples['same']}; {samples['reached_0.5']} reach 0.5, {samples['fell_below_0.5']} fall below it",
        ]
    )


def _heading(results: Mapping[str, Any], num_samples: int) -> str:
    protocol = results["protocol"]
    size = "original size" if protocol["resolution"] == "original" else protocol["resolution"]
    return (
        f"{protocol['dataset']}/{protocol['split']}, {num_samples} prompts, protocol {protocol['name']}: "
        f"masks at {size}, probability {protocol['comparison']} {protocol['threshold']}"
    )


def _method(bootstrap: Mapping[str, Any]) -> str:
    return (
        f"intervals: {bootstrap['level']:.0%}, bootstrap over {bootstrap['num_images']} images, "
        f"{bootstrap['num_replicates']} replicates"
    )


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:18}" + "".join(f"{cell:>16}" for cell in cells)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _signed(value: float) -> str:
    text = f"{value:+.3f}"
    return text[1:] if text in ("+0.000", "-0.000") else text


def _interval(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.3f}-{interval[1]:.3f}"
