"""Where the ranks of a group meet: rank 0 serves their store, on its node's address alone.

By itself Ray Train looks for a free port, lets go of it, and torch then serves there on every interface of the machine,
unless somebody else has taken the port. Here rank 0 listens first, and tells where: on a laptop that is loopback.
"""

from __future__ import annotations

import socket
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch import config as torch_config

# What makes every rank, rank 0 too, a client of a store that is there already.
STORE_IS_SERVED = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}

_served: list[Any] = []  # for as long as the process lives


class Meeting(torch_config._TorchBackend):
    """Ray Train's backend for torch, but for who serves the store."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        usual = torch_config.get_address_and_port
        torch_config.get_address_and_port = serve_store  # runs on rank 0
        try:
            super().on_start(worker_group, backend_config)
        finally:
            torch_config.get_address_and_port = usual


class MeetingConfig(TorchConfig):
    """A TorchConfig whose ranks need `STORE_IS_SERVED` in their environment."""

    @property
    def backend_cls(self) -> type[Meeting]:
        return Meeting


def serve_store() -> tuple[str, int]:
    """Serve a store from this process on the address by which Ray knows this node; returns (address, port)."""
    import ray
    from torch.distributed import TCPStore

    address = str(ray.util.get_node_ip_address())
    family = socket.getaddrinfo(address, None)[0][0]
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind((address, 0))
        listener.listen(socket.SOMAXCONN)
        port = int(listener.getsockname()[1])
        store = TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.fileno())
        listener.detach()  # the store's now
    _served.append(store)
    return address, port
