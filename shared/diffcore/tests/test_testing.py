import os
import signal
import socket

import pytest
import torch
from torchmetrics import Metric

from diffcore.stats import ExactMetric
from diffcore.testing.distributed import RankFailedError, run_forked
from diffcore.testing.fixtures import NetworkRefusedError
from diffcore.testing.metrics import check_metric


def test_ranks_talk_and_return_in_order():
    def total(rank):
        value = torch.tensor([rank + 1.0])
        torch.distributed.all_reduce(value)
        return rank, value.item(), torch.get_num_threads()

    assert run_forked(total, ranks=3) == [(0, 6.0, 1), (1, 6.0, 1), (2, 6.0, 1)]


def test_first_exception_surfaces_with_its_type_and_rank():
    def fail(rank):
        if rank == 1:
            raise KeyError("lost")
        torch.distributed.barrier()

    with pytest.raises(KeyError, match="lost") as caught:
        run_forked(fail)
    assert "rank 1 of 2" in caught.value.__notes__[0]


def test_killed_rank_ends_the_job():
    def die(rank):
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()  # waits for the dead one, until the harness ends it

    with pytest.raises(RankFailedError, match="rank 0 died"):
        run_forked(die)


def test_hanging_rank_ends_by_the_timeout():
    with pytest.raises(RankFailedError, match="did not answer"):
        run_forked(lambda rank: signal.pause() if rank == 1 else None, timeout_seconds=1.0)


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("2001:db8::1", 80), ("example.org", 80)])
def test_no_socket_leaves_the_machine(address):
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as box:
        for call in (lambda: box.connect(address), lambda: box.connect_ex(address), lambda: box.sendto(b"", address)):
            with pytest.raises(NetworkRefusedError):
                call()
    with pytest.raises(NetworkRefusedError):
        socket.getaddrinfo(*address)


def test_loopback_is_open():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
    assert socket.getaddrinfo("localhost", 80)


class Mean(ExactMetric):
    """Right by default; each flaw is a mistake that real metrics make."""

    def __init__(self, flaw=""):
        super().__init__()
        self.flaw = flaw
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum" if flaw != "ranks" else None)
        self.add_state("calls", torch.zeros(()), dist_reduce_fx="sum")

    def _apply(self, fn, exclude_state=""):
        return Metric._apply(self, fn) if self.flaw == "casts" else super()._apply(fn)

    def update(self, x, sign):
        x = x.double()
        self.total += sign * (x.mean() * 4 if self.flaw == "batches" else x.sum())
        self.count += 4 if self.flaw == "batches" else len(x)
        self.calls += 1
        if self.flaw == "order":
            self.total += 1e-3 * x[0] if len(x) > 3 else 0

    def compute(self):
        if self.flaw == "compute":
            self.total += 1
            self._computed = None
        count = self.count.flatten()[0] if self.flaw == "ranks" else self.count
        return (self.total / count).float(), self.total.float()


DATA = [(torch.randn(4, generator=torch.Generator().manual_seed(s)), 1.0 if s else -1.0) for s in range(3)]
TOTAL = float(DATA[1][0].double().sum() + DATA[2][0].double().sum() - DATA[0][0].double().sum())


def test_check_metric_accepts_a_right_metric():
    check_metric(Mean, DATA, (TOTAL / 12, TOTAL), atol=1e-6, half_atol=1e-2)


@pytest.mark.parametrize("flaw", ["batches", "order", "compute", "ranks", "casts"])
def test_check_metric_finds_the_flaw(flaw):
    with pytest.raises(AssertionError, match="Mean"):
        check_metric(lambda: Mean(flaw), DATA, (TOTAL / 12, TOTAL), atol=1e-6)


def test_check_metric_finds_a_wrong_value():
    with pytest.raises(AssertionError, match="as given"):
        check_metric(Mean, DATA, (TOTAL / 12 + 1e-3, TOTAL), atol=1e-6)
