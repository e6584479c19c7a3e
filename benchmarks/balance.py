"""Balancing of experts over ranks.

    python -m benchmarks.balance --planner [--rounds 11] [--only TEXT] [--write]

`--planner`: quality and time of the planner beside DeepSeek's method (`benchmarks/balance_planner.py`).
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.balance_planner import compare_planners


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planner", action="store_true", help="the planner beside DeepSeek's method")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", default="", help="cases whose name has this text, such as '64 ranks of 5 slots'")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/balance_DATE.json")
    arguments = parser.parse_args()
    if not arguments.planner:
        parser.error("say what to measure: --planner")
    return compare_planners(arguments.rounds, arguments.write, arguments.only)


if __name__ == "__main__":
    sys.exit(main())
