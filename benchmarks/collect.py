"""``RESULTS.md``: every benchmark's last table on one page, with the machine and the versions.

    python -m benchmarks.collect

`make bench` runs the scripts and then this. A table says in its own file what it was measured on
where that differs; nothing here is computed anew, and nothing is estimated.
"""

from __future__ import annotations

import datetime
import json
import platform
from importlib.metadata import version
from pathlib import Path

from benchmarks.machine import machine
from benchmarks.svd_diff import markdown

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGES = {
    "A sweep over whole layers": "sweep.md",
    "SAE encoding": "sae_encode.md",
    "A step of VPD": "vpd_step.md",
    "VPD of a large difference": "diff_vpd_scale.md",
    "Reliability": "trust.md",
    "Calibration of every p": "p_calibration.md",
}
LIBRARIES = ("torch", "numpy", "scipy", "scikit-learn", "transformers", "safetensors")


def page() -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    lines = [
        "# Benchmarks",
        "",
        f"Collected {datetime.date.today().isoformat()} on: {machine()}, no GPU. Python "
        f"{platform.python_version()}, {libraries}. `make bench` measures again; ratios are of one "
        "interleaved run, CPU time at one thread unless a table says otherwise. **GPU: not "
        "measured.**",
    ]
    for file in sorted(RESULTS.glob("svd_diff_*.json")):
        record = json.loads(file.read_text())
        size = file.stem.removeprefix("svd_diff_").replace("x", " × ")
        lines += ["", f"## One matrix, {size}, bfloat16, top 8", "", markdown(record["rows"])]
        if "adapter_ms" in record:
            lines += ["", f"LoRA adapter of rank 16, exact: {record['adapter_ms']:.1f} CPU ms."]
    for title, name in PAGES.items():
        if (RESULTS / name).is_file():
            text = (RESULTS / name).read_text().strip().splitlines()
            body = text[1:] if text and text[0].startswith("# ") else text
            lines += ["", f"## {title}", "", *("#" + s if s.startswith("##") else s for s in body)]
    return "\n".join(lines) + "\n"


def main() -> None:
    (HERE / "RESULTS.md").write_text(page())


if __name__ == "__main__":
    main()
