"""The demo on several seeds, with its targets: what GRPO with labels alone gains on users' questions.

    python scripts/benchmarks/bench_demo.py        # make bench-demo: writes outputs/bench/demo.json

The settings of the demo were chosen on seeds 0 to 9. The default seeds are others, so nothing was chosen on them.
Runs one seed after another, so that the times are those of the demo alone. Skips the stages of an earlier run that
are up to date.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_common import (
    OUTPUT,
    ROOT,
    Row,
    argument_parser,
    at_least,
    at_most,
    machine,
    print_targets,
    write_results,
)

SHOWN = ("recall@1", "recall@3", "recall@1_sampled", "complete_permutations", "true_descriptions")


def run_demo(folder: Path, seed: int) -> dict[str, Any]:
    """The demo's results.json."""
    command = [sys.executable, "-m", "mmr5_train.demo", f"out={folder}", f"seed={seed}", "overwrite=false"]
    subprocess.run(command, cwd=ROOT, check=True)
    results: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return results


def targets(results: list[dict[str, Any]]) -> list[Row]:
    rows = []
    for result in results:
        seed = result["seed"]
        figures = {(row["population"], row["system"]): row for row in result["rows"]}
        gain = result["grpo_minus_sft"]
        users, catalogue = gain["users"]["recall@1"], gain["catalogue"]["recall@1"]
        rows += [
            at_least(f"users' questions, GRPO − SFT, seed {seed}", users["mean"], 0.15),
            at_least(f"lower end of its interval, seed {seed}", users["low"], 1e-6),
            at_least(f"catalogue, GRPO − SFT, seed {seed}", catalogue["mean"], -0.01),
        ]
        for population in ("catalogue", "users"):
            after, before = figures[population, "sft+grpo"], figures[population, "sft"]
            true, true_before = after["true_descriptions"], before["true_descriptions"]
            rows += [
                at_least(f"complete orders, {population}, seed {seed}", after["complete_permutations"], 0.98),
                at_least(f"true descriptions, {population}, seed {seed}", true, 0.95),
                at_least(f"true descriptions, GRPO − SFT, {population}, seed {seed}", true - true_before, -0.02),
            ]
        rows.append(at_most(f"seconds, seed {seed}", result["seconds"], 600))
    return rows


def table(results: list[dict[str, Any]]) -> str:
    lines = [f"| seed | questions | system | {' | '.join(SHOWN)} |", "|" + "---|" * (len(SHOWN) + 3)]
    for result in results:
        for row in result["rows"]:
            cells = ["–" if row[name] is None else f"{row[name]:.3f}" for name in SHOWN]
            lines.append(f"| {result['seed']} | {row['population']} | {row['system']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--out", type=Path, default=OUTPUT / "demo", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    args = parser.parse_args()
    results = [run_demo(args.out / str(seed), seed) for seed in args.seeds]
    write_results(args.out.with_suffix(".json"), {"machine": machine(), "runs": results}, targets(results))
    print(table(results))
    print_targets(targets(results))


if __name__ == "__main__":
    main()
