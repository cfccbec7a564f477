"""The quickstart's rows for several seeds, on evaluation scenes that no choice in this repository was made on.

    .venv/bin/python benchmarks/quickstart_seeds.py --out seeds [--no-ladder]

Every seed makes its own scenes, stand-in encoder, teacher, labels, students and controls, and its own evaluation set.
Prints mean and standard deviation per row, and each row's difference from the teacher seed by seed; the same goes into
OUT/summary.json. What is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from cluster.stop import StopFlag, exit_status
from launcher import recipes
from trainer.quickstart import LADDER, Request, Results, Stopped, quickstart

FRESH_EVALUATION = 90_001  # plus the seed; the quickstart itself evaluates on other scenes
METRICS = (("wide", "abs_rel"), ("wide", "delta1"), ("wide, disparity space", "delta1"), ("labelled domain", "delta1"))


def run_seed(out: Path, seed: int, ladder: bool) -> Results:
    """One seed's rows, read back when they were made before."""
    done = out / f"seed{seed}" / "results.json"
    if done.exists():
        results = Results(**json.loads(done.read_text()))
        if not ladder or set(LADDER) <= set(results.rows):
            return results
    plain = {name: yaml.safe_load(recipes.read(f"quickstart-{name}")) for name in ("encoder", "teacher", "student")}
    request = Request(
        out=str(done.parent), recipes=plain, seed=seed, ladder=ladder, evaluation_seed=FRESH_EVALUATION + seed
    )
    with StopFlag() as stop:
        return quickstart(request, stop)


def summarise(results: dict[int, Results]) -> list[str]:
    """Lines of the two tables: rows with mean +- SD, and paired differences of delta1 from the teacher."""
    rows = [row for row in next(iter(results.values())).rows if all(row in r.rows for r in results.values())]
    titles = [f"{metric} ({domain})" for domain, metric in METRICS]
    lines = [f"{'row':<24}" + "".join(f"{title:>34}" for title in titles)]
    for row in rows:
        cells = []
        for domain, metric in METRICS:
            values = [r.rows[row][domain][metric] for r in results.values()]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            cells.append(f"{statistics.mean(values):.4f} +- {spread:.4f}".rjust(34))
        lines.append(f"{row:<24}" + "".join(cells))
    lines.append("")
    lines.append("delta1 (wide) less the teacher's, by seed " + " ".join(str(seed) for seed in results))
    for row in rows:
        differences = [r.rows[row]["wide"]["delta1"] - r.rows["teacher"]["wide"]["delta1"] for r in results.values()]
        lines.append(f"{row:<24}" + "".join(f"{d:+10.4f}" for d in differences))
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--no-ladder", action="store_true", help="teacher and student only")
    arguments = parser.parse_args()
    try:
        results = {seed: run_seed(arguments.out.resolve(), seed, not arguments.no_ladder) for seed in arguments.seeds}
    except Stopped as stopped:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(exit_status(stopped.reason))
    lines = summarise(results)
    print("\n".join(lines))
    summary = {str(seed): {"rows": r.rows, "seconds": r.seconds} for seed, r in results.items()}
    (arguments.out / "summary.json").write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
