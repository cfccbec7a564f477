"""Ends of a run that trying again would not change: a rank raises them, the driver tells them."""

from __future__ import annotations


class OutOfMemory(RuntimeError):
    """A step did not fit into a device's memory."""

    exit_status = 1
    hopeless = True  # tried again, it would end in the same way


class CheckpointLost(RuntimeError):
    """The checkpoint that a run ends with cannot be written: what was trained since the one before is lost."""

    exit_status = 1
    hopeless = True  # tried again, it would end in the same way
