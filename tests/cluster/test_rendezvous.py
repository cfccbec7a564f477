"""The ranks' store is served where it was asked for, and nowhere else."""

from __future__ import annotations

import socket
from datetime import timedelta

import psutil
import pytest
import ray.util
from torch.distributed import TCPStore

from cluster import rendezvous
from cluster.rendezvous import serve_store


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "::1"])
def test_it_listens_on_one_address(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    try:
        family = socket.getaddrinfo(address, None)[0][0]
        socket.create_server((address, 0), family=family).close()
    except OSError:
        pytest.skip(f"no IPv6: {address} cannot be listened on")
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
    monkeypatch.setattr(rendezvous, "_served", [])
    where, port = serve_store()
    assert where == address
    found = {each.laddr.ip for each in psutil.Process().net_connections("inet") if each.laddr.port == port}
    assert found == {address}
    rank = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
    rank.set("a", "b")
    assert rendezvous._served[0].get("a") == b"b"
    assert serve_store()[1] != port
