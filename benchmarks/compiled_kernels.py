"""What `train.compile` makes of a training step of `ac300m` on a GPU, counted without one: kernels, and bytes beside products and attention.

    pip install triton    # torch's builds for the CPU come without it; nothing is compiled
    python benchmarks/compiled_kernels.py                  # train.compile=true
    python benchmarks/compiled_kernels.py flex combo       # flex; and torch.compile's combo_kernels, which no setting switches on

The blocks' graphs go through inductor as far as the schedule of its kernels for an H100, on tensors without values; a block's kernels count
for all 24. What runs around the blocks is counted as tests/emulated_cuda.py counts it, with blocks that launch nothing. Tested with torch 2.13.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ["JEPA_TESTS_EMULATED_CUDA"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import emulated_cuda as emulation

# isort: split
import torch
import torch._dynamo.device_interface
import torch._inductor.config
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.codegen.common import init_backend_registration
from torch._inductor.compile_fx import _recursive_post_grad_passes, view_to_reshape
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode, Scheduler
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from jepa_cache.predictor import layers
from tests.predictor.test_counts import DEPTH, build, count_training_step

CARD = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    total_memory=80 * 2**30,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)


class Schedules:
    """A backend of torch.compile that counts the kernels which inductor would make, and runs the graph as it is."""

    def __init__(self) -> None:
        self.num_kernels = self.num_bytes = 0
        self.backend = aot_autograd(
            fw_compiler=lambda *graph: self._count(*graph, backward=False),
            bw_compiler=lambda *graph: self._count(*graph, backward=True),
            decompositions=select_decomp_table(),
            partition_fn=importlib.import_module("functorch.compile").min_cut_rematerialization_partition,
        )

    def _count(self, module: Any, _: Any, *, backward: bool) -> Callable[..., Any]:
        init_backend_registration()
        view_to_reshape(module)
        given = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
        mode = next(it.fake_mode for it in given if hasattr(it, "fake_mode"))
        with V.set_fake_mode(mode), _disable_current_modes(), V.set_debug_handler(DebugContext()):
            _recursive_post_grad_passes(module, is_inference=False)
            graph = GraphLowering(module, example_inputs=given, shape_env=mode.shape_env, is_backward=backward)
            with V.set_graph_handler(graph):
                graph.run(*given)
                graph.init_wrapper_code()
                for node in Scheduler(graph.operations).nodes:
                    external = isinstance(node, ExternKernelSchedulerNode)
                    if isinstance(node, NopKernelSchedulerNode) or (
                        external and type(node.node).__name__ == "MultiOutput"
                    ):
                        continue
                    self.num_kernels += 1
                    self.num_bytes += 0 if external or node.is_template() else node.get_read_write_buffers_sizes()
        return module.forward


@contextlib.contextmanager
def announced_card() -> Iterator[None]:
    """Let inductor and triton believe in a card."""
    driver, targets = (
        importlib.import_module("triton.runtime.driver"),
        importlib.import_module("triton.backends.compiler"),
    )
    target = SimpleNamespace(get_current_target=lambda: targets.GPUTarget("cuda", 90, 32))
    interface = torch._dynamo.device_interface.CudaInterface
    with emulation._cuda_announced(emulation.Counts()) as stack:
        for owner, name, value in (
            (torch.utils._triton, "has_triton", lambda *_: True),
            (torch.cuda, "get_device_properties", lambda *_: CARD),
            (interface, "get_device_properties", staticmethod(lambda *_: CARD)),
            (interface.Worker, "get_device_properties", staticmethod(lambda *_: CARD)),
            (interface, "get_compute_capability", staticmethod(lambda *_: 90)),
            (type(driver.driver), "active", property(lambda _: target)),
            (torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v: flash(q, k, v)),
            (torch.nn.Module, "_apply", emulation._move),
            (torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor),
            *(
                (it, "triton_hash_with_backend", str)
                for it in list(sys.modules.values())
                if hasattr(it, "triton_hash_with_backend")
            ),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(FakeTensorMode())
        yield


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The kernel that `devices.pin_attention` takes."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False)[0]


def compiled_block(*, flex: bool) -> Schedules:
    """The schedules of one block's two passes, forward and backward."""
    schedules = Schedules()
    with announced_card():
        layers.rotary_table.cache_clear()
        predictor = build(depth=1)
        predictor.compile(flex=flex, backend=schedules.backend, fullgraph=True)
        count_training_step(emulation.Counts(), predictor)
    return schedules


class _Nothing(torch.autograd.Function):
    """A block that makes its outputs, and gradients for all that it was given, without a launch."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(*given)
        ctx.set_materialize_grads(False)  # a compiled block does not return keys and values that nobody keeps
        return torch.empty_like(given[0]), given[0].new_empty(shape), given[0].new_empty(shape)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[torch.Tensor | None, ...]:
        return None, *(torch.empty_like(it) for it in ctx.saved_tensors)


def around_the_blocks() -> emulation.Counts:
    """What the training step launches beside them."""

    def forward(
        block: layers.Block,
        x: torch.Tensor,
        _table: Any,
        _length: int,
        past: Any,
        _modulation: Any,
        _mask: Any,
        kept: Any,
    ) -> tuple[torch.Tensor, ...]:
        heads = block.attn.num_heads
        shape = (x.shape[0], heads, len(kept), x.shape[2] // heads)
        return _Nothing.apply(shape, x, *(past or ()), *block.parameters())

    with emulation.counted_cuda() as counts, mock.patch.object(layers.Block, "forward", forward):
        layers.rotary_table.cache_clear()
        count_training_step(counts, build(activation_checkpointing=False))
    return counts


def main(*words: str) -> None:
    """Count and print."""
    if wrong := set(words) - {"flex", "combo"}:
        sys.exit(f"known are flex and combo, got {', '.join(wrong)}")
    torch._inductor.config.combo_kernels = "combo" in words
    around = around_the_blocks()
    block = compiled_block(flex="flex" in words)
    rows = {
        "blocks": (DEPTH * block.num_kernels, DEPTH * block.num_bytes),
        "around them": (sum(around.launches.values()), around.elementwise_bytes),
    }
    rows["together"] = tuple(map(sum, zip(*rows.values(), strict=True)))
    for name, (count, num_bytes) in rows.items():
        print(f"{name:12} {count:6,} launches {num_bytes / 1e9:6.1f} GB beside products and attention")


if __name__ == "__main__":
    main(*sys.argv[1:])
