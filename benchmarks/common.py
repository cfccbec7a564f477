"""What the benchmarks' command lines and headings share."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch


def command_line(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring; its second paragraph, the example, comes last."""
    first, example, *rest = (description or "").split("\n\n")
    return argparse.ArgumentParser(
        description="\n\n".join([first, *rest]),
        epilog=f"Example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def hardware(device: str) -> str:
    """The hardware's name and nothing else of the machine."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
