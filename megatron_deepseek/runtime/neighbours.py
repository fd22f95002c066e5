"""A ring of connections between the ranks: each rank notices at once that a neighbour's process is gone.

The kernel closes the connections of a process that dies, whatever it was doing and whatever the others wait for: a
collective, a store's key while groups are built, a save. A link that is cut closes nothing; there the kernel's
keep-alive probes give up after the time that a collective may take. A process that is merely slow or stopped keeps its
connections, so nothing here mistakes it for a dead one.
"""

import ipaddress
import json
import os
import selectors
import socket
import threading
import traceback
import uuid
from collections.abc import Callable

import torch.distributed as dist

from megatron_deepseek.launch.links import limit_silence

_KEY = "megatron_deepseek/neighbours"
_BYE = b"."  # the last byte that a rank sends when it ends well
_HELLO_SECONDS, _POLL_SECONDS = 5.0, 0.2


class Ring:
    """This rank's connections to the ranks before and after it, and the thread that watches them.

    `lost(rank)` is called in that thread for a neighbour that is gone without a goodbye. `store` is where ranks find
    each other; `patience`: seconds until a silent link counts as cut.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, patience: float, lost: Callable[[int], None]):
        self.store, self.rank, self.world_size, self.patience, self.lost = store, rank, world_size, patience, lost
        self.token = uuid.uuid4().hex.encode()  # tells a neighbour from anybody else who finds the port
        self.wake, self.woken = socket.socketpair()
        self.thread = threading.Thread(target=self._run, daemon=True, name="neighbours")

    def start(self) -> None:
        if self.world_size > 1:
            self.thread.start()

    def stop(self, seconds: float) -> None:
        """Say goodbye to both, and end the thread; within `seconds`, or it is left where it is."""
        self.wake.close()
        if self.thread.is_alive():
            self.thread.join(seconds)

    def _run(self) -> None:
        try:
            listener = self._listen()
        except (OSError, dist.DistError):  # no way to be found: this rank goes unwatched
            return
        with selectors.DefaultSelector() as selector, listener:
            selector.register(self.woken, selectors.EVENT_READ)
            selector.register(listener, selectors.EVENT_READ)
            try:
                self._watch(selector, listener)
            except Exception:  # a fault of the watch, such as too many open files, is no neighbour's death
                traceback.print_exc()
            for key in list(selector.get_map().values()):
                if key.data is not None:
                    _send(key.fileobj, _BYE)
                    key.fileobj.close()

    def _listen(self) -> socket.socket:
        family, host = _address_towards_master()
        listener = socket.create_server(("", 0), family=family)
        own = {"host": host, "port": listener.getsockname()[1], "token": self.token.decode()}
        self.store.set(f"{_KEY}/{self.rank}", json.dumps(own))
        return listener

    def _watch(self, selector: selectors.BaseSelector, listener: socket.socket) -> None:
        following, connected = (self.rank + 1) % self.world_size, False
        while True:
            if not connected:
                connected = self._connect(following, selector)
            for key, _ in selector.select(None if connected else _POLL_SECONDS):
                if key.fileobj is self.woken:
                    return
                if key.fileobj is listener:
                    self.accept_connection(listener, selector)
                else:
                    self._hear(key.fileobj, key.data, selector)

    def _connect(self, rank: int, selector: selectors.BaseSelector) -> bool:
        """Connect to the next rank once it has published its address. True when there is nothing more to try."""
        key = f"{_KEY}/{rank}"
        try:
            if not self.store.check([key]):
                return False
            where = json.loads(self.store.get(key))
        except dist.DistError:
            return True  # the store is gone, which another thread watches
        host = os.environ["MASTER_ADDR"] if ipaddress.ip_address(where["host"]).is_loopback else where["host"]
        try:
            connection = socket.create_connection((host, where["port"]), timeout=_HELLO_SECONDS)
        except ConnectionRefusedError:
            self.lost(rank)
            return True
        except OSError:  # no way from here to there: this pair goes unwatched
            return True
        _send(connection, where["token"].encode())
        self._register(connection, rank, selector)
        return True

    def accept_connection(self, listener: socket.socket, selector: selectors.BaseSelector) -> None:
        connection, _ = listener.accept()
        connection.settimeout(_HELLO_SECONDS)
        if _receive(connection, len(self.token)) == self.token:
            self._register(connection, (self.rank - 1) % self.world_size, selector)
        else:
            connection.close()

    def _register(self, connection: socket.socket, rank: int, selector: selectors.BaseSelector) -> None:
        connection.settimeout(_HELLO_SECONDS)
        limit_silence(connection, self.patience)
        selector.register(connection, selectors.EVENT_READ, rank)

    def _hear(self, connection: socket.socket, rank: int, selector: selectors.BaseSelector) -> None:
        selector.unregister(connection)
        said = _receive(connection, 1)
        connection.close()
        if said != _BYE:
            self.lost(rank)


def _address_towards_master() -> tuple[int, str]:
    """Return the family and the address of the interface by which this machine reaches the host of the store.

    A loopback address means that this machine is that host.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                                                            type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # sends nothing
        return family, probe.getsockname()[0].split("%")[0]


def _send(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
    except OSError:
        pass  # the next read reports it


def _receive(connection: socket.socket, count: int) -> bytes:
    """Return `count` bytes, or those that came until the other end was gone."""
    data = b""
    try:
        while len(data) < count and (more := connection.recv(count - len(data))):
            data += more
    except OSError:
        pass
    return data
