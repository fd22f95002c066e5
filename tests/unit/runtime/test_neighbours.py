"""A neighbour that goes away without a goodbye is lost; one that says it, or a stranger, is not."""

import json
import queue
import socket
import threading

import pytest
import torch.distributed as dist

from megatron_deepseek.runtime.neighbours import Ring


class Neighbour:
    """Rank 1 of 2 as rank 0 sees it: a connection each way."""

    def __init__(self, store):
        self.listener = socket.create_server(("127.0.0.1", 0))
        port = self.listener.getsockname()[1]
        store.set("megatron_deepseek/neighbours/1", json.dumps({"host": "127.0.0.1", "port": port, "token": "other"}))
        self.incoming, _ = self.listener.accept()
        assert self.incoming.recv(5) == b"other"
        own = json.loads(store.get("megatron_deepseek/neighbours/0"))
        self.address, self.token = ("127.0.0.1", own["port"]), own["token"].encode()
        self.outgoing = socket.create_connection(self.address)
        self.outgoing.sendall(self.token)

    def leave(self, word: bytes = b"") -> None:
        for connection in (self.incoming, self.outgoing):
            connection.sendall(word)
            connection.close()
        self.listener.close()


@pytest.fixture
def ring(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    rings = []

    def make(rank, size, store, lost):
        rings.append(Ring(store, rank, size, 60.0, lost))
        rings[-1].start()
        return rings[-1]

    yield make
    for each in rings:
        each.stop(20)
        assert not each.thread.is_alive()


def test_a_neighbour_that_is_gone_is_told_on_both_connections(ring):
    store, lost = dist.HashStore(), queue.SimpleQueue()
    ring(0, 2, store, lost.put)
    neighbour = Neighbour(store)
    with socket.create_connection(neighbour.address) as stranger:
        stranger.sendall(32 * b"?")  # as long as a token
        assert stranger.recv(1) == b""  # thrown out
    assert lost.empty()
    neighbour.leave()
    assert [lost.get(timeout=20), lost.get(timeout=20)] == [1, 1]


def test_a_goodbye_is_no_loss(ring):
    store, lost = dist.HashStore(), []
    watching = ring(0, 2, store, lost.append)
    Neighbour(store).leave(b".")
    watching.stop(20)
    assert lost == []


def test_one_that_is_gone_before_it_could_be_reached(ring):
    store, lost = dist.HashStore(), queue.SimpleQueue()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    store.set("megatron_deepseek/neighbours/1", json.dumps({"host": "127.0.0.1", "port": port, "token": "other"}))
    ring(0, 2, store, lost.put)
    assert lost.get(timeout=20) == 1


def test_ranks_that_end_well_lose_nobody(ring):
    """Whichever ends first."""
    store, lost = dist.HashStore(), []
    rings = [ring(rank, 4, store, lost.append) for rank in range(4)]
    threading.Event().wait(0.5)
    for each in (rings[2], rings[0], rings[1], rings[3]):
        each.stop(20)
    assert lost == [] and not any(each.thread.is_alive() for each in rings)


def test_a_fault_of_the_watch_is_a_goodbye(ring, monkeypatch, capfd):
    """Neighbours would take closed connections without one for a death, and end the job."""
    store = dist.HashStore()
    watching = ring(0, 2, store, lambda rank: None)
    neighbour = Neighbour(store)
    with socket.create_connection(neighbour.address) as stranger:
        stranger.sendall(32 * b"?")
        assert stranger.recv(1) == b""  # thrown out, so the neighbour before it was let in
    monkeypatch.setattr(Ring, "accept_connection", lambda *_: 1 / 0)
    with socket.create_connection(neighbour.address):
        assert neighbour.incoming.recv(1) == b"."
        assert neighbour.outgoing.recv(1) == b"."
    watching.thread.join(20)
    assert "ZeroDivisionError" in capfd.readouterr().err
