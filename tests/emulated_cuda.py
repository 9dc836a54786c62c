"""A GPU that is not there: tensors labelled "cuda:0" on a CPU build of torch, to catch device mistakes and to count.

- `with counted_cuda() as counts`: no values (FakeTensorMode). Operators, bytes and peak memory of the CUDA path at any size, with
  autograd, CUDA's autocast rules, and attention on the operators that a GPU of today takes.
- `with emulated_cuda() as counts`: real values. A tensor of the CPU mixed with one of the device raises, as on a GPU. A copy from or to
  page-locked memory with `non_blocking` is done as late as CUDA may do it: when its stream is used, waited for or synchronised, so
  that whoever reads too early gets what was there before.

Speed, kernels, nondeterminism, several devices and a GPU's roundings are not emulated. Both are for one thread that computes; other threads may
wait for events and read page-locked memory. The device's guard must be there before torch is imported, so tests run in processes of their own:

    @on_emulated_cuda
    def test_nothing_waits_in_the_loop():
        with emulated_cuda() as counts:
            ...

It is built with g++ once into the temporary directory; tests skip where there is none.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest import mock

import pytest

CHILD = "JEPA_TESTS_EMULATED_CUDA"


def load_guard() -> None:
    """Build and load the guard; torch, imported afterwards, knows a device "cuda:0" on which nothing can be computed."""
    folder = Path(importlib.util.find_spec("torch").origin).parent
    source, version = Path(__file__).with_suffix(".cpp"), importlib.metadata.version("torch")
    key = hashlib.sha256(source.read_bytes() + f"{folder} {version}".encode()).hexdigest()[:12]
    library = Path(tempfile.gettempdir()) / f"emulated-cuda-{os.getuid()}-{key}.so"
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        headers = [f"-I{folder}/include", f"-I{folder}/include/torch/csrc/api/include"]
        build = ["g++", "-shared", "-fPIC", "-std=c++20", "-O1", *headers, str(source), "-o", str(made)]
        subprocess.run(build, check=True)
        made.rename(library)
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(folder / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


if CHILD in os.environ:
    assert "torch" not in sys.modules, "the guard comes too late: import tests.emulated_cuda first"
    load_guard()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402


def on_emulated_cuda(test: Callable[[], None]) -> Callable[[], None]:
    """Run a test without arguments in a process that has the guard; it fails as the test does there."""

    @pytest.mark.skipif(shutil.which("g++") is None, reason="the emulated GPU needs g++")
    @pytest.mark.skipif(torch.version.cuda is not None, reason="the emulated GPU needs a CPU build of torch")
    @functools.wraps(test)
    def run() -> None:
        with tempfile.TemporaryFile("w+") as output:
            asked = json.dumps([test.__code__.co_filename, test.__name__])
            server = _server()
            socket.send_fds(server, [asked.encode()], [output.fileno()])
            status = server.recv(16)
            output.seek(0)
            assert status == b"0", output.read()[-8000:]

    return run


@functools.cache
def _server() -> socket.socket:
    """A process that has the guard and has imported torch once, and forks one for every test that is asked for."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    root = Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, CHILD: "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", f"import tests.emulated_cuda as it; it._serve({theirs.fileno()})"]
    subprocess.Popen(command, env=environment, cwd=root, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    return ours


def _serve(number: int) -> None:
    """Until whoever asks is gone."""
    import torch._dynamo  # noqa: F401  as the first operator in a dispatch mode would, for seconds

    asked_by = socket.socket(fileno=number)
    while True:
        asked, outputs, _, _ = socket.recv_fds(asked_by, 4096, 1)
        if not asked:
            os._exit(0)  # taking all that is imported down takes seconds, here and below
        if child := os.fork():
            os.close(outputs[0])
            asked_by.send(str(os.waitpid(child, 0)[1]).encode())
            continue
        signal.alarm(300)
        os.dup2(outputs[0], 1)
        os.dup2(outputs[0], 2)
        path, name = json.loads(asked)
        failed = True
        try:
            getattr(_module_at(path), name).__wrapped__()
            failed = False
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(failed)


def _module_at(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CUDA = torch.device("cuda:0")
aten = torch.ops.aten
# Operators that launch nothing, and those whose result the CPU has to wait for.
WITHOUT_LAUNCH = """
_reshape_alias _unsafe_view alias as_strided detach device diagonal empty empty_like empty_strided expand lift_fresh narrow new_empty permute
select slice split split_with_sizes squeeze sym_size sym_storage_offset sym_stride t transpose unbind unflatten unsqueeze view
"""
VIEWS = set(WITHOUT_LAUNCH.split())
WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution"}


class Counts:
    """What a device was asked to do.

    `launches` and `num_bytes` (read and written) by operator; `synchronisations` and `pageable` copies (one side neither on the device nor
    page-locked, or not `non_blocking`) as (name, thread); `peak_bytes` of tensors held at once, kept by `counted_cuda` alone.
    """

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()
        self.synchronisations: list[tuple[str, str]] = []
        self.pageable: list[tuple[str, str]] = []
        self.attention: Counter[tuple] = Counter()  # shapes of queries and keys, dtype, whether there was a mask
        self.held_bytes = self.peak_bytes = 0

    @property
    def elementwise_bytes(self) -> int:
        """Bytes of all but matrix products and attention."""
        return sum(n for name, n in self.num_bytes.items() if name not in PRODUCTS and "attention" not in name)

    def reset(self) -> None:
        """Forget all but what is held, whose peak begins anew: for what comes after setting up."""
        for it in (self.launches, self.num_bytes, self.synchronisations, self.pageable, self.attention):
            it.clear()
        self.peak_bytes = self.held_bytes

    def wait(self, name: str) -> None:
        """Note a synchronisation of the calling thread."""
        self.synchronisations.append((name, threading.current_thread().name))

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any, on_device: Callable[[torch.Tensor], bool]) -> None:
        name = func._schema.name.split("::")[1]
        given, made = ([t for t in tree_leaves(it) if isinstance(t, torch.Tensor)] for it in ((args, kwargs), out))
        if name in WAITS and any(map(on_device, given)):
            self.wait(name)
        if name in ("copy_", "_to_copy"):
            source, target = (given[1], given[0]) if name == "copy_" else (given[0], made[0])
            if on_device(source) != on_device(target) and source.dim():
                host = target if on_device(source) else source
                waits = not kwargs.get("non_blocking", len(args) > 2 and args[2])
                if waits or not _is_pinned(host):
                    self.pageable.append((f"{name} {tuple(host.shape)}", threading.current_thread().name))
                    self.wait(name)
        if name in VIEWS or not any(map(on_device, made + given)):
            return
        self.launches[name] += 1
        self.num_bytes[name] += sum(map(_bytes_touched, given + made))

    def _hold(self, out: Any) -> None:
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                if not getattr(storage, "_counted", False):
                    storage._counted, size = True, storage.nbytes()
                    self.held_bytes += size
                    self.peak_bytes = max(self.peak_bytes, self.held_bytes)
                    weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.held_bytes -= size


def _bytes_touched(tensor: torch.Tensor) -> int:
    """A tensor that repeats itself is read once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= 1 if stride == 0 else size
    return count * tensor.element_size()


@contextlib.contextmanager
def _cuda_announced(counts: Counts) -> Iterator[contextlib.ExitStack]:
    """Let `torch.cuda` say that one device is there; streams, events and waits are ours."""
    answers = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "is_initialized": lambda: False,
        "_lazy_init": lambda: None,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "emulated",
        "get_device_capability": lambda *_: (9, 0),
        "get_rng_state": lambda *_, **__: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_, **__: None,
        "manual_seed_all": lambda _: None,
        "max_memory_allocated": lambda *_: counts.peak_bytes,
        "reset_peak_memory_stats": lambda *_: None,
        "synchronize": lambda *_: (counts.wait("synchronize"), Stream.flush_all())[0],
        "current_stream": lambda *_: Stream.current,
        "default_stream": lambda *_: Stream.default,
        "set_device": lambda *_: None,
        "stream": _on_stream,
        "Stream": Stream,
        "Event": Event,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        Stream.counts, Stream.default = counts, Stream()
        Stream.current = Stream.default
        yield stack


class Stream:
    """Copies that wait to be done, in order. Kernels run at once, after the copies of their own stream."""

    counts: Counts
    default: Stream
    current: Stream
    _every: ClassVar[weakref.WeakSet[Stream]] = weakref.WeakSet()

    def __init__(self, *_: Any, **__: Any) -> None:
        self.waiting: list[Callable[[], object]] = []
        self._lock = threading.RLock()
        self._done = 0  # copies that were done, over all time
        Stream._every.add(self)

    @property
    def num_given(self) -> int:
        return self._done + len(self.waiting)

    def flush(self, until: int | None = None) -> None:
        with self._lock:
            while self.waiting and (until is None or self._done < until):
                self.waiting.pop(0)()
                self._done += 1

    @classmethod
    def flush_all(cls) -> None:
        for stream in list(cls._every):
            stream.flush()

    def synchronize(self) -> None:
        self.counts.wait("stream.synchronize")
        self.flush()

    def wait_stream(self, other: Stream) -> None:
        if other is not self:
            other.flush()

    def wait_event(self, event: Event) -> None:
        event.flush()

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event


class Event:
    """The place in a stream where it was recorded."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._stream: Stream | None = None
        self._until = 0

    def record(self, stream: Stream | None = None) -> None:
        self._stream = stream or Stream.current
        self._until = self._stream.num_given

    def flush(self) -> None:
        if self._stream is not None:
            self._stream.flush(self._until)

    def synchronize(self) -> None:
        Stream.counts.wait("event.synchronize")
        self.flush()

    def wait(self, stream: Stream | None = None) -> None:
        self.flush()

    def query(self) -> bool:
        return self._stream is None or self._stream._done >= self._until

    def elapsed_time(self, other: Event) -> float:
        return 0.0


@contextlib.contextmanager
def _on_stream(stream: Stream | None) -> Iterator[None]:
    before = Stream.current
    Stream.current = stream or before
    try:
        yield
    finally:
        Stream.current = before


def _is_cuda(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda"


# --- without values -------------------------------------------------------------------------------------------------------


class _Counting(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.counts._note(func, args, kwargs or {}, out, _is_cuda)
        self.counts._hold(out)
        return out


@contextlib.contextmanager
def counted_cuda() -> Iterator[Counts]:
    """Count what CUDA code does without running it; results have shapes, dtypes and gradients, but no values."""
    counts, attention = Counts(), F.scaled_dot_product_attention

    def attend(
        q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, **_: Any
    ) -> Any:
        if not _is_cuda(q):
            return attention(q, k, v, attn_mask, dropout_p, is_causal, **_)
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            q, k, v = (it.to(dtype) if it.dtype == torch.float32 else it for it in (q, k, v))
        counts.attention[tuple(q.shape), tuple(k.shape), q.dtype, attn_mask is not None] += 1
        if attn_mask is None and q.dtype in (torch.float16, torch.bfloat16):
            return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
        if attn_mask is not None:
            minus = torch.full((), float("-inf"), dtype=q.dtype, device=q.device)
            mask = (
                torch.where(attn_mask, torch.zeros_like(minus), minus) if attn_mask.dtype == torch.bool else attn_mask
            )
            attn_mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        with_gradient = torch.is_grad_enabled() and any(it.requires_grad for it in (q, k, v))
        return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, with_gradient)[0]

    with _cuda_announced(counts) as stack:
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attend))
        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", _move))
        stack.enter_context(mock.patch.object(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(_Counting(counts))
        yield counts


def _move(module: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> torch.nn.Module:
    """As Module._apply, which cannot swap the parameters that FakeTensorMode refers to."""
    for child in module.children():
        _move(child, fn)
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(fn(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fn(buffer)
    return module


# --- with values ----------------------------------------------------------------------------------------------------------

_PINNED: weakref.WeakKeyDictionary[torch.UntypedStorage, bool] = weakref.WeakKeyDictionary()


def _is_pinned(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, Gpu) and tensor.untyped_storage() in _PINNED


class Gpu(torch.Tensor):
    """A tensor "on cuda:0" around the one of the CPU that holds its values."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Gpu:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CUDA,
            requires_grad=False,
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"Gpu({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _inner(it: Any) -> Any:
    return it.inner if isinstance(it, Gpu) else it


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    out = _compute(func, args, kwargs)
    Stream.counts._note(func, args, kwargs, out, lambda tensor: isinstance(tensor, Gpu))
    return out


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name.split("::")[1]
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    on_device = [t for t in given if isinstance(t, Gpu)]
    device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if name == "copy_":
        return _copy(*args, **kwargs)
    if name == "_to_copy":
        return _to_copy(args[0], device, kwargs)
    if on_device or (device is not None and device.type == "cuda"):
        Stream.current.flush()
    others = [t for t in given if t.dim() and not isinstance(t, Gpu)]
    if on_device and others and name not in ("index", "index_put_", "index_put"):
        shapes = [(type(t).__name__, tuple(t.shape)) for t in given]
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu! {func} {shapes}")
    if not on_device and (device is None or device.type != "cuda"):
        return func(*args, **kwargs)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    known = {id(t.inner): t for t in on_device}
    out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))

    def wrap(it: Any) -> Any:
        if not isinstance(it, torch.Tensor) or isinstance(it, Gpu):
            return it
        return known[id(it)] if id(it) in known else Gpu(it)  # in-place operators give what they were given

    return tree_map(wrap, out)


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    into, out_of = _inner(target), _inner(source)
    if isinstance(target, Gpu) == isinstance(source, Gpu):
        Stream.current.flush()
        into.copy_(out_of)
    elif non_blocking and _is_pinned(source if isinstance(target, Gpu) else target):
        # A kernel that makes `source` was run before; one that changes it afterwards is another mistake than those looked for.
        Stream.current.waiting.append(lambda: into.copy_(out_of))
    else:
        Stream.current.flush()
        into.copy_(out_of)
    return target


def _to_copy(source: torch.Tensor, device: torch.device | None, kwargs: dict[str, Any]) -> torch.Tensor:
    options = {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking", "pin_memory")}
    from_device = isinstance(source, Gpu)
    to_device = device.type == "cuda" if device is not None else from_device
    if kwargs.get("non_blocking") and to_device and not from_device and _is_pinned(source):
        made = torch.empty_like(source, **options)
        Stream.current.waiting.append(lambda: made.copy_(source))
        return Gpu(made)
    if from_device or to_device:
        Stream.current.flush()
    made = aten._to_copy.default(_inner(source), **options)
    return Gpu(made) if to_device else made


class _Emulating(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextlib.contextmanager
def emulated_cuda() -> Iterator[Counts]:
    """Compute on the CPU under the label "cuda:0"."""
    counts, empty, tolist, save = Counts(), torch.empty, torch.Tensor.tolist, torch.save

    def attend(
        q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, **_: Any
    ) -> Any:
        counts.attention[tuple(q.shape), tuple(k.shape), q.dtype, attn_mask is not None] += 1
        with torch.autocast("cuda", enabled=False):
            scores = (q.float() @ k.float().mT) * (q.shape[-1] ** -0.5)
            if attn_mask is not None:
                scores = (
                    scores.masked_fill(~attn_mask, float("-inf"))
                    if attn_mask.dtype == torch.bool
                    else scores + attn_mask
                )
            return (scores.softmax(-1) @ v.float()).to(q.dtype)

    def make_empty(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made = empty(*shape, **options)
        if pin_memory:
            _PINNED[made.untyped_storage()] = True
        return made

    def make_pinned(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        return make_empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)

    def unwrap(it: Any) -> Any:
        return it.detach().inner if isinstance(it, Gpu) else it

    patches: list[tuple[Any, str, Any]] = [
        (F, "scaled_dot_product_attention", attend),
        (torch, "empty", make_empty),
        (torch.Tensor, "pin_memory", make_pinned),
        (torch.Tensor, "record_stream", lambda *_: None),
        (torch.Tensor, "is_pinned", lambda tensor, *_: _is_pinned(tensor)),
        (
            torch.Tensor,
            "tolist",
            lambda tensor: (
                (counts.wait("tolist"), tolist(unwrap(tensor)))[1] if isinstance(tensor, Gpu) else tolist(tensor)
            ),
        ),
        (torch, "save", lambda content, file, **options: save(tree_map(unwrap, content), file, **options)),
    ]
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    with _cuda_announced(counts) as stack:
        for owner, name, new in patches:
            stack.enter_context(mock.patch.object(owner, name, new))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        stack.enter_context(_Emulating())
        yield counts
