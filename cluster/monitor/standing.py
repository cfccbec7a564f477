"""How a monitor stands: what it scrapes, what does not answer, which alerts fire, how large its data are."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from cluster import storage
from cluster.monitor.control import State
from cluster.monitor.prometheus import DIRECTLY
from cluster.monitor.targets import Targets

_ANSWER_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Standing:
    """`up`: processes that answer, by role. `silent`: those that do not, with what was said. `out_of_reach`: those that
    serve on another machine's loopback. `trouble`: why Prometheus could not be asked."""

    up: dict[str, int] = field(default_factory=dict)
    silent: Sequence[str] = ()
    out_of_reach: Sequence[str] = ()
    alerts: Sequence[str] = ()
    data_bytes: int = 0
    trouble: str | None = None


def standing(state: State) -> Standing:
    """A look at the monitor, which is up."""
    seen = Targets(state.order.folders, None).look()
    away = [f"{target.labels['role']} on {target.labels.get('node', '?')}" for target in seen.out_of_reach]
    size = 0
    with suppress(storage.StorageError):
        size = sum(each or 0 for each in storage.sizes(os.path.join(state.order.state, "data")).values())
    if state.prometheus is None:
        return Standing(up=dict(Counter(t.labels["role"] for t in seen.targets)), out_of_reach=away)
    try:
        targets = ask(state.prometheus, "/api/v1/targets?state=active")["activeTargets"]
        alerts = ask(state.prometheus, "/api/v1/alerts")["alerts"]
    except (OSError, ValueError, KeyError) as error:
        return Standing(out_of_reach=away, data_bytes=size, trouble=f"{state.prometheus} does not answer: {error}")
    return Standing(
        up=dict(Counter(target["labels"]["role"] for target in targets if target["health"] == "up")),
        silent=sorted(_silent(target) for target in targets if target["health"] == "down"),
        out_of_reach=away,
        alerts=sorted(
            f"{alert['labels']['severity']}: {alert['annotations']['summary']} ({alert['annotations']['runbook']})"
            for alert in alerts
            if alert["state"] == "firing"
        ),
        data_bytes=size,
    )


def ask(prometheus: str, path: str) -> Any:
    """What Prometheus' API answers. OSError, ValueError or KeyError when it does not."""
    with DIRECTLY.open(f"http://{prometheus}{path}", timeout=_ANSWER_S) as answer:
        return json.load(answer)["data"]


def _silent(target: dict[str, Any]) -> str:
    labels = target["labels"]
    who = " ".join(labels[name] for name in ("role", "rank", "worker") if name in labels)
    of = f" of {labels['run']}" if "run" in labels else ""
    return f"{who}{of} on {labels.get('node', '?')} ({labels['instance']}): {target['lastError']}"
