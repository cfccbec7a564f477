"""A driver like the launcher's, to send signals to: `python -m tests.cluster.driver FUNCTION FOLDER SAVE_S`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cluster.group import run_group
from cluster.stop import StopFlag, exit_status
from tests.cluster import work


def main(function: str, folder: str, save_s: str) -> int:
    with StopFlag(grace_s=30.0) as stop:
        try:
            result = run_group(
                getattr(work, function),
                {"folder": folder, "save_s": float(save_s)},
                workers=2,
                name="signals",
                storage_path=str(Path(folder, ".ray")),
                stop=stop,
                on_progress=lambda progress: print("step", progress["step"], flush=True),
            )
        except KeyboardInterrupt:
            return 130
    Path(folder, "result.json").write_text(json.dumps(result.value))
    return exit_status(result.stop_reason) if result.stop_reason else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
