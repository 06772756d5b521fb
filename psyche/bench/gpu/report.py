"""The table of a check, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from psyche.bench.gpu.equality import Difference
from psyche.bench.gpu.timing import BAR, Timing


def write(
    directory: Path,
    system: Mapping[str, str],
    found: Mapping[str, Sequence[Difference]],
    timings: Sequence[Timing],
    *,
    timed: bool,
) -> str:
    """Write ``gpu_check.json`` and ``gpu_check.md`` to ``directory``; returns the Markdown.

    ``found`` has a key for every codec and ``outer step``. Unless ``timed``, the table leaves times out.
    """
    rows = [_row(system, found, timing) for timing in timings]
    text = _markdown(system, found, rows, timed)
    directory.mkdir(parents=True, exist_ok=True)
    wrong = {
        name: [str(difference) for difference in differences] for name, differences in found.items() if differences
    }
    content = {"system": dict(system), "differences": wrong, "rows": rows}
    (directory / "gpu_check.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    (directory / "gpu_check.md").write_text(text)
    return text


def _row(system: Mapping[str, str], found: Mapping[str, Sequence[Difference]], timing: Timing) -> dict[str, Any]:
    return {
        "system": "psyche",
        "codec": timing.codec,
        "backend": "cuda",
        "device": system["device"],
        "pass": timing.step,
        "equal": not found["outer step" if timing.step == "outer" else timing.codec],
        "elements": timing.elements,
        "bytes_moved": timing.bytes_moved,
        "milliseconds": timing.seconds * 1e3,
        "gbps": timing.gbps,
        "share_of_copy": timing.share_of_copy,
    }


def _share(row: Mapping[str, Any]) -> str:
    share = row["share_of_copy"]
    judged = row["pass"] != "check"  # where little is read, the launch is what takes time
    return f"{share:.0%} (below {BAR:.0%})" if judged and share < BAR else f"{share:.0%}"


def _markdown(
    system: Mapping[str, str],
    found: Mapping[str, Sequence[Difference]],
    rows: Sequence[Mapping[str, Any]],
    timed: bool,
) -> str:
    lines = ["# Kernels on this machine", "", *(f"- {key}: {value}" for key, value in system.items()), ""]
    lines += ["| codec | pass | bits | ms | GB/s of fp32 | share of copy |", "|---|---|---|---:|---:|---:|"]
    for row in rows:
        bits = "equal" if row["equal"] else "DIFFERENT"
        times = f"{row['milliseconds']:.3f} | {row['gbps']:.1f} | {_share(row)}" if timed else "– | – | –"
        lines.append(f"| {row['codec']} | {row['pass']} | {bits} | {times} |")
    wrong = [f"- {name}: {difference}" for name, differences in found.items() for difference in differences]
    lines += ["", "Every bit is as defined." if not wrong else "What differs from the definition:", "", *wrong]
    return "\n".join(lines).rstrip() + "\n"
