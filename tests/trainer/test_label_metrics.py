"""What a labelling job tells Prometheus: a worker's images and their quality, the command's shards."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

from cluster.lease_actor import View
from cluster.leases import Counts
from dataio.dataset import Dataset
from dataio.labels import LabelStore
from tests.trainer.test_labelling import config_of, dataset, grip, labeller, weights
from trainer.config_label import LabelCluster
from trainer.labelling import _Account, describe, exporter

__all__ = ["dataset", "weights"]  # fixtures


def scraped(folder: Path) -> dict[str, float]:
    """Series -> value, of the one process that has announced itself in a labels' folder."""
    (entry,) = (folder / "telemetry").iterdir()
    (target,) = json.loads(entry.read_text())
    assert target["labels"]["run"] == f"label-{LabelStore.open(str(folder)).digest}"
    with urllib.request.urlopen(f"http://{target['targets'][0]}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    return {name: float(value) for name, value in re.findall(r"^(fathom_label\S*) (\S+)$", text, re.MULTILINE)}


def test_a_worker_tells_its_images(dataset: str, weights: str, tmp_path: Path) -> None:
    config = config_of(dataset, weights)
    store = LabelStore.create(str(tmp_path / "labels"), describe(config, Dataset.open(dataset)))
    with labeller(config, store) as worker:
        for stem in ("000000", "000001", "000000"):  # the last is there already
            worker.process(stem, grip(stem))
        found = scraped(tmp_path / "labels")
    assert found["fathom_label_images_total"] == 9
    assert found['fathom_label_failures_total{reason="bad_image"}'] == 2
    assert found['fathom_label_failures_total{reason="missing_image"}'] == 1
    assert found["fathom_label_quality_count"] == 9 and 0 < found["fathom_label_quality_sum"] <= 9
    assert found['fathom_label_quality_bucket{le="+Inf"}'] == 9
    assert not list((tmp_path / "labels" / "telemetry").iterdir())


def test_the_command_tells_how_the_shards_stand(tmp_path: Path) -> None:
    store = LabelStore.create(str(tmp_path / "labels"), {"dataset": {"fingerprint": "x"}})
    account = _Account(10, None)
    results = [{"samples": 8, "failed": 1, "differs": differs} for differs in (True, False)]
    late = [("l", {"samples": 8, "failed": 0, "differs": True})]
    with exporter(store, "label-driver", LabelCluster()) as account.exporter:
        counts = Counts(todo=4, leased=2, foreign=1, done=2, given_up=1, expired=3, speculated=1, deaths=5, late=1)
        for _ in range(2):  # counters are told what is new
            told = [("s", each) for each in results]
            view = View(counts=counts, finished=False, results=told, late=late, given_up={"t": "why"})
            account.on_look(view)
            results, late = [], []
        found = scraped(tmp_path / "labels")
    for state, value in (("todo", 4), ("leased", 2), ("foreign", 1), ("done", 2), ("given_up", 1)):
        assert found[f'fathom_label_shards{{state="{state}"}}'] == value, state
    for name, value in (
        ("leases_expired", 3), ("shards_speculated", 1), ("worker_deaths", 5), ("shards_late", 1),
        ("shards_differing", 2),
    ):  # fmt: skip
        assert found[f"fathom_label_{name}_total"] == value, name
    assert (account.images, account.failed, account.differing) == (16, 2, 2)
