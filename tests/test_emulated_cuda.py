"""Claims: the emulated GPU computes what the CPU does, refuses to mix devices, copies late, and counts launches, waits and memory."""

import pytest

from tests.emulated_cuda import counted_cuda, emulated_cuda, on_emulated_cuda


@on_emulated_cuda
def test_values_are_those_of_the_cpu_and_devices_do_not_mix():
    import torch

    module, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
    expected = module(x)
    with emulated_cuda() as counts:
        module.to("cuda")
        on_device = x.to("cuda")
        counts.reset()
        y = module(on_device)
        assert y.device.type == "cuda" and counts.launches == {"addmm": 1} and not counts.synchronisations
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert module(on_device).dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="same device"):
            y + x
        y.sum().backward()
        assert module.weight.grad.device.type == "cuda"
        assert torch.equal(y.detach().cpu(), expected)
        assert [name for name, _ in counts.pageable] == ["_to_copy (4, 8)"]
        assert y.sum().item() and counts.synchronisations[-1][0] == "_local_scalar_dense"


@on_emulated_cuda
def test_a_copy_is_done_when_it_is_waited_for_and_not_before():
    import torch

    with emulated_cuda() as counts:
        upload, download = torch.cuda.Stream(), torch.cuda.Stream()
        pinned, back = torch.empty(4, pin_memory=True).fill_(1), torch.empty(4, pin_memory=True).fill_(0)
        on_device, done = torch.zeros(4, device="cuda"), torch.cuda.Event()
        with torch.cuda.stream(upload):
            on_device.copy_(pinned, non_blocking=True)
        early = on_device + 0
        torch.cuda.current_stream().wait_stream(upload)
        late = on_device + 0
        with torch.cuda.stream(download):
            back.copy_(late, non_blocking=True)
            done.record(download)
        assert back.tolist() == [0] * 4 and not counts.pageable and not counts.synchronisations
        done.synchronize()
        assert back.tolist() == [1] * 4 and counts.synchronisations == [("event.synchronize", "MainThread")]
        assert early.cpu().tolist() == [0] * 4


@pytest.mark.long  # as what is counted so: tests/predictor/test_counts.py
@on_emulated_cuda
def test_a_training_step_without_values_is_counted():
    import torch

    with counted_cuda() as counts:
        module = torch.nn.Linear(1024, 1024, bias=False).to("cuda")
        x = torch.empty(1 << 20, 1024, device="cuda")  # 4 GiB that are not there
        counts.reset()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = module(x).square().mean()
        loss.backward()
        assert counts.launches["mm"] == 2 and module.weight.grad.dtype == torch.float32
        assert 4 * 2**30 < counts.peak_bytes < 32 * 2**30
