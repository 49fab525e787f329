"""Small tensors on their way between host and device."""

from __future__ import annotations

import pytest
import torch

from arrcoc.transfer import Arrival, to_device


def test_on_the_cpu_an_arrival_is_the_tensor_itself() -> None:
    tensor = torch.arange(4)
    assert Arrival(tensor).get() is tensor


@pytest.mark.gpu
def test_what_arrives_is_what_was_sent_and_is_not_pinned() -> None:
    value = torch.arange(1000, device="cuda")
    torch.cuda._sleep(10_000_000)
    value += 1
    arrival = Arrival(value)
    value.zero_()
    assert torch.equal(arrival.get(), torch.arange(1, 1001))
    assert arrival.get() is arrival.get()
    assert not arrival.get().is_pinned()


@pytest.mark.gpu
def test_sending_does_not_wait() -> None:
    to_device(torch.arange(1000), torch.device("cuda"))
    Arrival(torch.zeros(1000, device="cuda")).get()  # pinned memory is there from now on
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    sent = Arrival(torch.ones(1000, device="cuda"))
    there = to_device(torch.arange(1000), torch.device("cuda"))
    assert not torch.cuda.current_stream().query(), "the host came here first"
    assert torch.equal(there.cpu(), torch.arange(1000))
    assert float(sent.get().sum()) == 1000
