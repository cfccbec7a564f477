"""`fathom monitor` beside a training of two ranks and a labelling run: what it shows of them is true."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.monitor.alerts import ALERTS
from cluster.monitor.boards import BOARDS
from cluster.monitor.panels import bound
from cluster.monitor.standing import ask
from cluster.telemetry import METRICS, STATES
from tests.end_to_end import cli
from tests.end_to_end.cli import SIZE, Running, fathom, gone, json_lines, steps_done, succeed, write_config
from tests.end_to_end.conftest import World
from tests.end_to_end.nodes import run_values
from tests.end_to_end.test_bad_data import rewrite

pytestmark = pytest.mark.timeout(1800)

EVERY_S = 2.0
LABEL_SAMPLES = 240
Series = list[dict[str, Any]]


@dataclass
class Facts:
    """What was seen. `values`: all series of our own and Ray's metrics while both ranks worked, over their last
    minutes; `shown`: how many series each expression of each panel gave; `fired`: alerts; by what ran then."""

    folder: Path
    state: dict[str, Any] = field(default_factory=dict)
    listening: set[str] = field(default_factory=set)
    values: dict[str, Series] = field(default_factory=dict)
    pages: dict[str, str] = field(default_factory=dict)
    shown: dict[str, dict[str, int]] = field(default_factory=dict)
    fired: dict[str, list[str]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    ups: dict[str, list[str]] = field(default_factory=dict)
    killed: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    ended: dict[str, Any] = field(default_factory=dict)

    @property
    def prometheus(self) -> str:
        return str(self.state["prometheus"])

    def query(self, expr: str, at: float | None = None) -> Series:
        """An instant query."""
        when = {} if at is None else {"time": str(at)}
        words = urllib.parse.urlencode({"query": expr, **when})
        return list(ask(self.prometheus, f"/api/v1/query?{words}")["result"])

    def look(self, roles: tuple[str, ...], name: str) -> None:
        """Keep what the boards of these roles and all rules give now, and the pages of all targets."""
        own = {key: board for key, board in BOARDS.items() if set(board.roles) & set(roles)}
        shown = {
            f"{key} {place} {number}": len(self.query(bound(query.expr, {}, "20s")))
            for key, board in own.items()
            for place, panel in board.panels().items()
            for number, query in enumerate(panel.queries)
        }
        self.shown[name] = shown
        self.fired[name] = [series["metric"]["alertname"] for series in self.query('ALERTS{alertstate="firing"}[10m]')]
        for alert in ALERTS:
            self.query(alert.expr)  # Prometheus refuses what it cannot match
        for group in json.loads((self.folder / "runs" / ".monitor" / "targets.json").read_text()):
            labels = group["labels"]
            key = "-".join(labels[name] for name in ("role", "rank", "worker") if name in labels)
            with urllib.request.urlopen(f"http://{group['targets'][0]}/metrics", timeout=10) as answer:
                self.pages[key] = answer.read().decode()
        self.values[name] = self.query('{__name__=~"fathom_.*"}[10m]')
        self.ups[name] = [series["metric"]["role"] for series in self.query("up == 1")]


def until(condition: Callable[[], Any], what: str, patience_s: float = 120.0) -> Any:
    ends = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < ends, f"no {what} within {patience_s:.0f} s"
        time.sleep(0.1)
    return value


@pytest.fixture(scope="module")
def facts(world: World, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """One training with a bad sample and a rank that is killed, one labelling run, one monitor beside both."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    folder = tmp_path_factory.mktemp("monitor")
    found = Facts(folder)
    done = succeed("monitor", "up", "runs", "labels", "--interval", str(EVERY_S), cwd=folder)
    assert "http://127.0.0.1:" in done.out
    try:
        found.state = json.loads((folder / "runs" / ".monitor" / "monitor.json").read_text())
        watch_training(found, world)
        found.listening = listening(found.state["pid"])
        watch_labelling(found, world)
        until(lambda: not found.query("up"), "end of all that was scraped", 60.0)
        found.status["after"] = json.loads(succeed("monitor", "status", "runs", "--json", cwd=folder).out)
    finally:
        while cli.started:
            cli.started.pop().end()
        before = [psutil.Process(found.state["pid"]), *psutil.Process(found.state["pid"]).children(recursive=True)]
        down = fathom("monitor", "down", "runs", cwd=folder)
        found.ended = {"down": down, "left": gone(before), "again": fathom("monitor", "down", "runs", cwd=folder),
                       "status": fathom("monitor", "status", "runs", cwd=folder)}  # fmt: skip
    return found


def watch_training(found: Facts, world: World) -> None:
    folder, run = found.folder, found.folder / "runs" / "teacher"
    spoiled = Path(shutil.copytree(world.data / "labelled", folder / "data" / "spoiled"))
    rewrite(spoiled, lambda name, data: data[: len(data) // 2] if name == "labelled_000003.jpg" else data)
    validation = {"datasets": [str(world.data / "labelled")], "every": 40, "limit": 4}
    values = run_values(world) | {"steps": 1_000_000, "checkpoint": {"every": 50}, "validation": validation}
    values["data"] = values["data"] | {"max_bad_fraction": 0.5}
    values["data"]["roles"]["labelled"]["datasets"] = [str(spoiled)]
    write_config(folder / "teacher.yaml", values)
    running = Running("train", "teacher.yaml", cwd=folder)
    running.until(lambda: steps_done(run) >= 120, "step 120")
    victim = running.ranks()[-1]
    address = address_of(found, "train", rank="1")
    assert found.query('fathom_steps_total{rank="1"}')
    victim.kill()
    until(lambda: not address_in_targets(found, address), "targets.json without the killed rank", 30.0)
    running.until(lambda: not found.query(f'{{instance="{address}"}}'), "end of the killed rank's series")
    found.killed = {"files": [path.read_text() for path in (run / "telemetry").glob("*.json")], "address": address}
    running.until(lambda: "fathom_rank_slowdown_ratio" in names_now(found), "comparison of the ranks")
    again = 'fathom_steps_total{rank="1"} > 60 and count_over_time(fathom_steps_total{rank="1"}[20s]) >= 4'
    running.until(lambda: len(found.query(again)) == 1, "rank 1 at work again")
    running.until(lambda: found.query('fathom_event_result'), "validation")
    running.until(lambda: found.query('ray_node_cpu_utilization'), "metrics of Ray")
    found.look(("train", "driver"), "training")
    found.status["training"] = json.loads(succeed("monitor", "status", "runs", "--json", cwd=folder).out)
    found.metadata = {
        name: about[0]["type"] for name, about in ask(found.prometheus, "/api/v1/metadata").items()
    }
    running.signal(signal.SIGINT)
    assert running.wait().status == 130


def watch_labelling(found: Facts, world: World) -> None:
    folder = found.folder
    succeed(
        "data", "synth", "data/photos", "--domain", "wide", "--count", str(LABEL_SAMPLES), "--size", str(SIZE),
        "--no-labels", "--shard-samples", "8", cwd=folder,
    )  # fmt: skip
    rewrite(folder / "data" / "photos", lambda name, data: data[:99] if name.endswith("000003.jpg") else data)
    running = Running(
        "label", "run", "data/photos", "--weights", str(world.teacher), "--input-size", "420", "--workers", "2",
        "--quality", "flip+scale", "--out", "labels", cwd=folder,
    )  # fmt: skip
    done = 'max(fathom_label_shards{state="done"}) >= 4 and max(fathom_label_shards{state="done"}) < 28'
    running.until(lambda: found.query(done), "shards that are done")
    running.until(lambda: found.query("sum(fathom_label_failures_total) > 0"), "the image that fails")
    time.sleep(3 * EVERY_S)
    found.look(("label", "label-driver"), "labelling")
    ended = running.wait()
    assert ended.status == 0, ended.err


def names_now(found: Facts) -> set[str]:
    return {series["metric"]["__name__"] for series in found.query('{__name__=~"fathom_.*"}')}


def address_of(found: Facts, role: str, **labels: str) -> str:
    groups = json.loads((found.folder / "runs" / ".monitor" / "targets.json").read_text())
    (address,) = [
        group["targets"][0]
        for group in groups
        if group["labels"]["role"] == role and labels.items() <= group["labels"].items()
    ]
    return str(address)


def address_in_targets(found: Facts, address: str) -> bool:
    return address in (found.folder / "runs" / ".monitor" / "targets.json").read_text()


def listening(pid: int) -> set[str]:
    """Where a process and those below it listen."""
    own = {process.pid for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))}
    found = [each for each in psutil.net_connections("inet") if each.pid in own]
    return {each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN}


def served(facts: Facts, name: str) -> dict[str, Series]:
    """Series by the declared metric that they are of."""
    found: dict[str, Series] = {}
    for series in facts.values[name]:
        full = series["metric"]["__name__"]
        base = next((full.removesuffix(end) for end in ("_bucket", "_sum", "_count")
                     if METRICS.get(full.removesuffix(end)) and METRICS[full.removesuffix(end)].kind == "histogram"),
                    full)  # fmt: skip
        found.setdefault(base, []).append(series)
    return found


def numbers(series: Mapping[str, Any]) -> list[float]:
    return [float(value) for _, value in series["values"]]


PARTS = {"training": {"rank", "first-rank", "driver"}, "labelling": {"label", "label-driver"}}


@pytest.mark.parametrize("name", PARTS)
def test_every_metric_is_there_and_in_its_range(facts: Facts, name: str) -> None:
    found = served(facts, name)
    declared = {metric for metric, about in METRICS.items() if PARTS[name] & set(about.of)}
    earlier = set(served(facts, "training")) if name == "labelling" else set()  # within the same ten minutes
    assert declared <= found.keys() <= declared | earlier
    for metric in declared:
        about = METRICS[metric]
        for series in found[metric]:
            labels = series["metric"]
            assert about.labels.keys() <= labels.keys() and {"run", "role", "node", "instance"} <= labels.keys()
            for label, known in about.labels.items():
                assert not known or labels[label] in known, labels
            if about.kind != "histogram":
                assert all(about.low <= value <= about.high for value in numbers(series)), series
            if about.kind == "counter":
                assert numbers(series) == sorted(numbers(series)), series
        for label, known in about.labels.items():
            assert set(known) <= {series["metric"][label] for series in found[metric]}, metric
        if about.kind == "histogram":
            check_histogram(metric, found[metric])


def check_histogram(metric: str, found: Series) -> None:
    about = METRICS[metric]
    one: dict[tuple[str, ...], dict[str, float]] = {}
    for series in found:
        labels = dict(series["metric"])
        which, le = labels.pop("__name__").removeprefix(metric), labels.pop("le", "")
        one.setdefault(tuple(sorted(labels.values())), {})[which + le] = numbers(series)[-1]
    for values in one.values():
        count, total = values["_count"], values["_sum"]
        buckets = [values[f"_bucket{le}"] for le in (*map(str, about.buckets), "+Inf")]
        assert buckets == sorted(buckets) and buckets[-1] == count
        assert total >= about.low * count
        assert math.isinf(about.high) or total <= about.high * count


def test_prometheus_has_what_the_log_says(facts: Facts) -> None:
    """Scraped at once, a rank's values are of one moment: that of the step which its counter names."""
    lines = json_lines(facts.folder / "runs" / "teacher" / "metrics.jsonl")
    begins = max(number for number, line in enumerate(lines) if line.get("event") == "resumed")
    steps = [line for line in lines[begins:] if "event" not in line]
    rank = [series for series in facts.values["training"] if series["metric"].get("rank") == "0"]
    last = max(rank, key=lambda series: series["values"][-1][0])["metric"]["instance"]  # the second attempt's
    when, counts = 0.0, {}
    for series in rank:
        if series["metric"]["instance"] == last:
            own = {k: v for k, v in series["metric"].items() if k not in ("instance", "job", "node", "run", "role")}
            at, value = series["values"][-1]
            when = max(when, at)
            counts[tuple(sorted(own.items()))] = (at, float(value))

    def value(name: str, /, **labels: str) -> float:
        at, found = counts[tuple(sorted({"__name__": name, "rank": "0", **labels}.items()))]
        assert at == when
        return found

    done = int(value("fathom_steps_total"))
    assert done > 60
    told = steps[:done]
    assert told[-1]["step"] == pytest.approx(value("fathom_step"), abs=1)
    images = sum(line["images_per_second"] * line["seconds"] for line in told)
    assert value("fathom_images_total") == pytest.approx(images / 2, rel=0.01)  # of two ranks
    assert value("fathom_step_duration_seconds_sum") == pytest.approx(sum(line["seconds"] for line in told), rel=0.01)
    assert value("fathom_step_duration_seconds_count") == pytest.approx(done, abs=1)
    for phase in told[-1]["phases"]:
        counted = value("fathom_phase_seconds_total", phase=phase)
        assert counted == pytest.approx(sum(line["phases"][phase] for line in told), rel=0.01, abs=0.01), phase
    near = [line["loss"] for line in steps[done - 2 : done + 1]]
    assert any(value("fathom_loss", term="total") == pytest.approx(loss, rel=1e-6) for loss in near)
    norms = [line["grad_norm"] for line in steps[done - 2 : done + 1]]
    assert any(value("fathom_grad_norm") == pytest.approx(norm, rel=1e-6) for norm in norms)
    results = [line["values"] for line in lines if line.get("event") == "validation"]
    where, metric = next(iter(results[-1].items()))
    shown = value("fathom_event_result", event="validation", name=where)
    assert any(shown == pytest.approx(each[where], rel=1e-6) for each in results), (metric, shown)


# Panels with nothing to show, for the reason that each states; others may have nothing, or something.
NOTHING = {"training": {"GPUs", "Quality", "Images without a label"}, "labelling": {"GPUs", "Goodput"}}


@pytest.mark.parametrize("name", PARTS)
def test_every_panel_shows_something_or_says_why_not(facts: Facts, name: str) -> None:
    shown = facts.shown[name]
    for key, board in BOARDS.items():
        for place, panel in board.panels().items():
            for number, query in enumerate(panel.queries):
                count = shown.get(f"{key} {place} {number}")
                assert count is None or count > 0 or panel.empty, (board.title, panel.title, query.expr)
    titles = {
        panel.title
        for key, board in BOARDS.items()
        for place, panel in board.panels().items()
        if f"{key} {place} 0" in shown and not any(shown[f"{key} {place} {n}"] for n in range(len(panel.queries)))
    }
    may = {"Alerts", "Silent processes", "Time left"} | NOTHING[name]
    if name == "labelling":  # the cluster's board, of which the training's half is gone
        may |= {panel.title for panel in BOARDS["cluster"].panels().values() if panel.empty}
    assert titles <= may


def test_every_rule_s_series_are_there(facts: Facts) -> None:
    """An expression without a series never fires, right or wrong: what each selects is there in one of the runs."""
    everything = {**served(facts, "training"), **served(facts, "labelling")}
    for alert in ALERTS:
        selected = [metric for metric in METRICS if metric in alert.expr]
        assert selected or "up{" in alert.expr, alert.name
        assert set(selected) <= everything.keys(), alert.name
        for text in re.findall(r'(fathom_\w+)\{(\w+)="(\w+)"\}', alert.expr):
            metric, label, wanted = text
            assert wanted in {series["metric"].get(label) for series in everything[metric]}, alert.name


@pytest.mark.parametrize("name", PARTS)
def test_nobody_is_woken(facts: Facts, name: str) -> None:
    """A rank was killed once, and one image in forty is broken."""
    assert facts.fired[name] == []


def test_promtool_finds_nothing(facts: Facts) -> None:
    roles = [key.partition("-")[0] for key in facts.pages]
    assert {"train", "driver", "label", "ray"} <= set(roles) and roles.count("train") == 2
    for key, page in facts.pages.items():
        if not key.startswith("ray"):
            checked = subprocess.run(["promtool", "check", "metrics"], input=page.encode(), capture_output=True)
            assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b""), key
    folder = facts.folder / "runs" / ".monitor"
    checked = subprocess.run(["promtool", "check", "config", folder / "prometheus.yml"], capture_output=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_types_are_those_declared(facts: Facts) -> None:
    told = {name: kind for name, kind in facts.metadata.items() if name.startswith("fathom_")}
    for name, kind in told.items():
        declared = METRICS[name if name in METRICS else f"{name}_total"]  # OpenMetrics leaves it out of the name
        assert kind == declared.kind, name
    assert len(told) > 30


def test_a_killed_rank_is_forgotten(facts: Facts) -> None:
    assert not any(facts.killed["address"] in text for text in facts.killed["files"])
    restarts = {
        series["metric"]["reason"]: numbers(series)[-1]
        for series in served(facts, "training")["fathom_restarts_total"]
    }
    assert restarts["died"] == 1 and sum(restarts.values()) == 1


def test_all_is_scraped_and_nothing_is_served_to_others(facts: Facts) -> None:
    assert sorted(facts.ups["training"]) == ["driver", "ray", "train", "train"]
    assert set(facts.ups["labelling"]) == {"label", "label-driver", "ray"}
    assert facts.listening == {"127.0.0.1"}
    standing = facts.status["training"]["standing"]
    assert standing["up"] == {"driver": 1, "ray": 1, "train": 2}
    assert standing["silent"] == standing["out_of_reach"] == [] and standing["trouble"] is None
    assert facts.status["after"]["standing"]["up"] == {}


def test_states_are_of_one_rank_at_a_time(facts: Facts) -> None:
    states = served(facts, "training")["fathom_rank_state"]
    assert {series["metric"]["state"] for series in states} == set(STATES)
    by_time: dict[tuple[str, float], float] = {}
    for series in states:
        for at, value in series["values"]:
            key = (series["metric"]["instance"], at)
            by_time[key] = by_time.get(key, 0.0) + float(value)
    assert set(by_time.values()) <= {0.0, 1.0} and 1.0 in by_time.values()


def test_the_end_leaves_the_data_and_no_process(facts: Facts) -> None:
    down, again, status = facts.ended["down"], facts.ended["again"], facts.ended["status"]
    assert (down.status, down.out.strip()) == (0, "ended")
    assert facts.ended["left"] == []
    assert (again.status, again.out.strip()) == (0, "no monitor is up for runs")
    assert status.status == 1 and "fathom monitor up runs" in status.out
    folder = facts.folder / "runs" / ".monitor"
    assert (folder / "data").is_dir() and not (folder / "monitor.json").exists()
    assert sorted(path.name for path in (folder / "grafana").iterdir()) == [
        f"fathom-{key}.json" for key in sorted(BOARDS)
    ]
