"""How long a user waits: `fathom --help`, `fathom submit` to a running local cluster until the id, `jobs status`.

    .venv/bin/python benchmarks/bench_submit.py

Starts a Ray head on this machine for the time of the benchmark (on loopback, ports of its own, with a token) and prints
medians and quartiles of whole processes, beside `python -c pass`, which none of them can beat.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import command_line

REPOSITORY = Path(__file__).resolve().parent.parent
PORT, DASHBOARD = 16379, 18265


def seconds(words: Sequence[str], folder: Path, env: dict[str, str], repeats: int) -> list[float]:
    """Of each run of a command."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
        found.append(time.perf_counter() - began)
        if done.returncode:
            sys.exit(f"error: {' '.join(words)}: {done.stderr}")
    return found


def main() -> None:
    """Measure, print a table."""
    parser = command_line(__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fathom-bench-") as name:
        folder = Path(name)
        env = {**os.environ, "HOME": name, "RAY_AUTH_MODE": "token", "PYTHONPATH": str(REPOSITORY),
               "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
               "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{DASHBOARD}"}  # fmt: skip
        env.pop("RAY_ADDRESS", None)
        ray = str(Path(sys.executable).parent / "ray")
        subprocess.run([ray, "get-auth-token", "--generate"], env=env, check=True, capture_output=True)
        started = [
            ray, "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--port", str(PORT), "--num-cpus", "1",
            "--dashboard-port", str(DASHBOARD), "--temp-dir", f"{name}/r", "--object-store-memory", str(80 << 20),
            "--min-worker-port", "0", "--max-worker-port", "0", "--disable-usage-stats",
        ]  # fmt: skip
        head = subprocess.Popen(started, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            fathom = [sys.executable, "-m", "launcher.cli"]
            ends = time.monotonic() + 60
            while subprocess.run([*fathom, "jobs", "list"], env=env, capture_output=True).returncode:
                if head.poll() is not None or time.monotonic() > ends:
                    sys.exit(f"error: the cluster does not answer: {' '.join(started)}")
            rows = {
                "python -c pass": [sys.executable, "-c", "pass"],
                "fathom --help": [*fathom, "--help"],
                "fathom submit data layouts": [*fathom, "submit", "--no-folder", "data", "layouts"],
                "fathom jobs list": [*fathom, "jobs", "list"],
            }
            print("| | seconds: median | quartiles |\n|---|---|---|")
            for title, words in rows.items():
                low, middle, high = statistics.quantiles(seconds(words, folder, env, arguments.repeats), n=4)
                print(f"| {title} | {middle:.2f} | {low:.2f} to {high:.2f} |", flush=True)
        finally:
            head.terminate()
            head.wait(timeout=60)


if __name__ == "__main__":
    main()
