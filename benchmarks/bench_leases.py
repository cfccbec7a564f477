"""The lease actor as in a labelling job of 62,000 shards on 256 workers, without a network: leases/s, memory, time.

    .venv/bin/python benchmarks/bench_leases.py --shards 62000 --workers 256

The actor is the real one (cluster/lease_actor.py) in a real Ray, with its claims in a folder. Clients stand for the
workers: `--clients` processes that call it as workers do, each in the place of many. First every shard is leased,
beaten for once and completed as fast as it goes. Then for `--paced` seconds the workers are as slow as real ones
(`--shard-s` for a shard, a beat every 15 s), and what counts is the share of a processor that the actor takes. At last
a cold start: a label folder of which `--done` shards are committed, from the first look at it to the first lease.

The exit status is 1 when the cold start takes 10 s or more, or the paced actor more than 5 % of a processor.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import heapq
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from benchmarks.common import command_line, hardware
from cluster.lease_actor import LeaseActor, Settings, Worker
from cluster.leases import Lease
from cluster.runtime import ray_session
from dataio.label_ledger import LedgerEntry
from dataio.labels import LabelStore
from trainer.label_status import job_state
from trainer.labelling import Listing

COLD_S, PACED_SHARE = 10.0, 0.05
BEAT_EVERY_S = 15.0


def main() -> int:
    options = arguments()
    items = [f"{number:06d}" for number in range(options.shards)]
    print(f"# The lease actor: {options.shards} shards, {options.workers} workers, {hardware('cpu')}\n")
    print("| | |\n|---|---|")
    with tempfile.TemporaryDirectory(prefix="bench-leases-") as folder, ray_session(cpus=options.clients + 1):
        full_speed(options, items, folder)
        share = paced(options, items, folder)
        cold_s = cold_start(options, items, folder)
    return 0 if cold_s < COLD_S and share < PACED_SHARE else 1


def arguments() -> argparse.Namespace:
    """The command line's."""
    parser = command_line(__doc__)
    parser.add_argument("--shards", type=int, default=62000)
    parser.add_argument("--workers", type=int, default=256)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--paced", type=float, default=30.0)
    parser.add_argument("--shard-s", type=float, default=100.0)
    parser.add_argument("--done", type=int, default=50000)
    return parser.parse_args()


def actor_of(items: list[str], listed: Any, folder: str) -> tuple[Any, psutil.Process]:
    """The actor, up, and its process."""
    import ray

    settings = Settings(run="0badcafe", items=items, listed=listed, claims=folder, ttl_s=60.0)
    made = ray.remote(num_cpus=0)(Observed).remote(settings)
    return made, psutil.Process(ray.get(made.pid.remote()))


class Observed(LeaseActor):
    """Tells where it is."""

    def pid(self) -> int:
        return os.getpid()


class Client:
    """Stands for `count` workers."""

    def __init__(self, leases: Any, first: int, count: int) -> None:
        self._leases = leases
        self._owners = [f"{first + number:08x}" for number in range(count)]
        self._workers = {
            owner: Worker(owner=owner, node="n", host=f"node{first // 8}", pid=1, device="none")
            for owner in self._owners
        }

    def rush(self) -> int:
        """Lease, beat, complete, as fast as it goes; the number of shards."""
        import ray

        done, waiting = 0, {self._leases.take.remote(self._workers[owner]): owner for owner in self._owners}
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=10)
            for reference in ready:
                owner = waiting.pop(reference)
                got = ray.get(reference)
                if got is None:
                    continue
                if isinstance(got, Lease):
                    self._leases.beat.remote(owner, got.token, got.item, 0.5)
                    self._leases.complete.remote(got.item, got.token, {"samples": 1000})
                    done += 1
                waiting[self._leases.take.remote(self._workers[owner])] = owner
        return done

    def walk(self, seconds: float, shard_s: float) -> int:
        """As slow as workers are, for so long; the number of shards completed."""
        import ray

        rng, began, done = random.Random(0), time.monotonic(), 0
        holding: dict[str, tuple[Lease, float]] = {}
        turns = [(began + rng.random() * BEAT_EVERY_S, owner) for owner in self._owners]
        heapq.heapify(turns)
        while turns[0][0] < began + seconds:
            at, owner = heapq.heappop(turns)
            time.sleep(max(0.0, at - time.monotonic()))
            now = time.monotonic()
            if owner in holding:
                lease, until = holding[owner]
                if now < until:
                    ray.get(self._leases.beat.remote(owner, lease.token, lease.item, 0.5))
                else:
                    ray.get(self._leases.complete.remote(lease.item, lease.token, {"samples": 1000}))
                    del holding[owner]
                    done += 1
            if owner not in holding:
                got = ray.get(self._leases.take.remote(self._workers[owner]))
                if isinstance(got, Lease):
                    holding[owner] = got, now + shard_s * rng.random() * 2
            heapq.heappush(turns, (now + BEAT_EVERY_S, owner))
        return done


def clients(options: argparse.Namespace, leases: Any) -> list[Any]:
    """Client processes for all workers."""
    import ray

    each = -(-options.workers // options.clients)
    return [
        ray.remote(num_cpus=0)(Client).remote(leases, first, min(each, options.workers - first))
        for first in range(0, options.workers, each)
    ]


def full_speed(options: argparse.Namespace, items: list[str], folder: str) -> None:
    """As many leases a second as it can give."""
    import ray

    leases, process = actor_of(items, nothing, os.path.join(folder, "rush"))
    crowd = clients(options, leases)
    before, began = process.cpu_times(), time.monotonic()
    done = sum(ray.get([client.rush.remote() for client in crowd]))
    took, after = time.monotonic() - began, process.cpu_times()
    view = ray.get(leases.look.remote())
    assert view.finished and view.counts.done == options.shards, view.counts
    cpu_s = after.user + after.system - before.user - before.system
    print(f"| leased, beaten for and completed | {done / took:.0f} shards/s |")
    print(f"| processor time of the actor | {1e6 * cpu_s / done:.0f} us a shard |")
    print(f"| its main memory | {process.memory_info().rss / 2**20:.0f} MiB |", flush=True)
    for actor in (*crowd, leases):
        ray.kill(actor)


def paced(options: argparse.Namespace, items: list[str], folder: str) -> float:
    """The share of a processor at the pace of real workers."""
    import ray

    leases, process = actor_of(items, nothing, os.path.join(folder, "paced"))
    crowd = clients(options, leases)
    before, began = process.cpu_times(), time.monotonic()
    done = sum(ray.get([client.walk.remote(options.paced, options.shard_s) for client in crowd]))
    took, after = time.monotonic() - began, process.cpu_times()
    share = (after.user + after.system - before.user - before.system) / took
    print(f"| at the pace of workers, {took:.0f} s, {done} shards | {100 * share:.2f} % of a processor |", flush=True)
    for actor in (*crowd, leases):
        ray.kill(actor)
    return share


def cold_start(options: argparse.Namespace, items: list[str], folder: str) -> float:
    """From the first look at a folder with much done in it to the first lease."""
    import ray

    store = LabelStore.create(os.path.join(folder, "labels"), {"teacher": "none"})
    for place in ("shards", "ledger"):
        os.makedirs(os.path.join(store.path, place))
    sha256 = hashlib.sha256(b"").hexdigest()
    for stem in items[: options.done]:
        entry = LedgerEntry(
            stem=stem, plan=store.digest, samples=1000, failures={}, sha256=sha256, bytes=10, quality=[50] * 20,
            seconds=100.0, by={"node": "node7", "worker": "0badcafe", "token": 1, "finished": 1.0},
        )  # fmt: skip
        Path(store.ledger(stem)).write_text(entry.to_json())
        Path(store.tar(stem)).write_bytes(b"0123456789")
        Path(store.tar(stem).replace(".tar", ".idx")).write_bytes(b"0")
    began = time.monotonic()
    listing = Listing(store.path)
    assert len(listing()) == options.done
    leases, _ = actor_of(items, listing, os.path.join(store.path, "leases"))
    worker = Worker(owner="0badcafe", node="n", host="n", pid=1, device="none")
    while not isinstance(ray.get(leases.take.remote(worker)), Lease):
        time.sleep(0.02)
    took = time.monotonic() - began
    print(f"| cold start with {options.done} done | {took:.2f} s |", flush=True)
    began = time.monotonic()
    job_state(store, None)
    print(f"| what `label status` reads of them, beside the dataset | {time.monotonic() - began:.2f} s |", flush=True)
    ray.kill(leases)
    return took


nothing = functools.partial(tuple, ())


if __name__ == "__main__":
    sys.exit(main())
