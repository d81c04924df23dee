"""Targets of the ablations, and how often a GRPO run that did not collapse raised an alarm.

    python scripts/benchmarks/bench_ablations.py --folder outputs/ablations

`scripts/ablations.sh --tiny` runs this at its end; it writes outputs/bench/ablations.json. Reads
compare/compare.json in the folder, and for each run its evaluation and its alarms.json. An alarm is false if the
run ended with sampled recall@1 no lower than that of the policy it started from (`sft_only` or, for `rl_only`,
`base_only`), and with at least as many complete orders.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from bench_common import (
    OUTPUT,
    ROOT,
    Row,
    argument_parser,
    at_least,
    at_most,
    equal,
    machine,
    print_targets,
    write_results,
)

from mmr5_train.evaluation.alarms import read_alarms

SEEDS, MAX_MINUTES = 3, 90
STORY = ("base_only", "rl_only", "sft_only", "recommended")  # the paper's order, worst first
TRAINED = ("recall@1_sampled", "complete_permutations")  # what training must not lower


def last_system(folder: Path) -> Row:
    """The figures of the last system that a recipe evaluated: the recipe's result."""
    results = json.loads((folder / "evaluation/results.json").read_text(encoding="utf-8"))
    row: Row = results["rows"][-1]
    return row


def alarm_counts(folder: Path) -> dict[str, Any]:
    """Counts of GRPO runs, of those with an alarm, and of those with a false one; and each alarm by run."""
    runs, raised, false = 0, {}, []
    for grpo in sorted(folder.glob("*/*/grpo/manifest.json")):
        run = grpo.parents[1]
        name, start = f"{run.parent.name}/{run.name}", "base_only" if run.name == "rl_only" else "sft_only"
        runs += 1
        alarms = [alarm.name for alarm in read_alarms(grpo.parent)]
        if alarms:
            raised[name] = alarms
            before, after = last_system(run.parent / start), last_system(run)
            if all(after[figure] >= before[figure] for figure in TRAINED):
                false.append(name)
    return {"runs": runs, "with_alarm": raised, "false": false}


def holds(rows: list[Row]) -> dict[str, bool]:
    """For each pair of neighbors in the paper's order, whether the later recipe has the higher mean recall@1."""
    means = {row["recipe"]: row["recall@1"]["mean"] for row in rows}
    return {f"{a} < {b}": means[a] < means[b] for a, b in itertools.pairwise(STORY)}


def targets(compared: dict[str, Any], minutes: float | None) -> list[Row]:
    rows = [at_most("minutes", minutes, MAX_MINUTES)]
    fewer = [row["recipe"] for row in compared["rows"] if len(row["seeds"]) < SEEDS]
    rows.append(equal(f"recipes with fewer than {SEEDS} seeds", ", ".join(fewer), ""))
    for population in ("catalogue", "users"):
        figures = {row["recipe"]: row for row in compared["by_question_type"][population]}
        recommended = figures["recommended"]
        best = max(figures[name]["recall@1"]["mean"] for name in ("recommended", "reward_gated"))
        rows += [
            at_least(
                f"recommended, complete orders, {population}", recommended["complete_permutations"]["mean"], 0.98
            ),
            at_least(
                f"recommended, true descriptions, {population}", recommended["true_descriptions"]["mean"], 0.95
            ),
            at_least(
                f"recommended − better of gated and true_reasoning, recall@1, {population}",
                recommended["recall@1"]["mean"] - best,
                -0.01,
            ),
        ]
    return rows


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs/ablations")
    parser.add_argument("--seconds", type=float, help="time of scripts/ablations.sh, all its parts together")
    parser.add_argument("--out", type=Path, default=OUTPUT / "ablations.json")
    args = parser.parse_args()
    compared = json.loads((args.folder / "compare/compare.json").read_text(encoding="utf-8"))
    order = {name: holds(rows) for name, rows in compared["by_question_type"].items()}
    alarms = alarm_counts(args.folder)
    rows = targets(compared, args.seconds and args.seconds / 60)
    write_results(args.out, {"machine": machine(), **compared, "order": order, "alarms": alarms}, rows)
    for name, pairs in order.items():
        print(f"{name}: {', '.join(f'{pair}: {value}' for pair, value in pairs.items())}")
    print(f"alarms in {len(alarms['with_alarm'])} of {alarms['runs']} GRPO runs, false in {len(alarms['false'])}")
    print_targets(rows)


if __name__ == "__main__":
    main()
