"""Claims: batches that run one behind the other give what each gives alone, bit for bit, also on a GPU that copies late; nobody who launches waits.

Products with weights that were cast once are those of autocast.
"""

import queue
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jepa_cache.config.loading import load_config
from jepa_cache.encoder import KINDS
from jepa_cache.encoder.frozen import FrozenEncoder, Overlap, cast_tokens, to_stored
from tests.emulated_cuda import emulated_cuda, on_emulated_cuda

FRAMES = np.random.default_rng(0).integers(0, 256, (7, 8, 45, 64, 3), dtype=np.uint8)  # seven batches


def make(preset, device, compute_dtype):
    state = KINDS[preset.kind].make(preset).state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(value.shape, generator=generator) * 0.2 for name, value in state.items()}
    return FrozenEncoder(preset, KINDS[preset.kind].build(preset, state), device=device, compute_dtype=compute_dtype)


def run_all(overlap, batches):
    """As stage one does: one thread launches, another takes; gives tokens and errors."""
    taken, results = queue.Queue(2), []

    def take():
        while (slot := taken.get()) is not None:
            tokens, errors = slot.result()
            results.append((tokens.copy(), errors.copy()))
            slot.release()

    thread = threading.Thread(target=take, name="write")
    thread.start()
    for batch in batches:
        taken.put(overlap.submit(*batch.split(5)))  # as frames of two recordings that share a batch
    taken.put(None)
    thread.join()
    return results


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cast", ["float16", "bfloat16"])
def test_batches_give_what_each_gives_alone(preset, cast, compute_dtype):
    encoder = make(preset, "cpu", compute_dtype)
    batches = [encoder.preprocess(frames[: 8 - number])[:, None] for number, frames in enumerate(FRAMES)]
    for (tokens, errors), batch in zip(run_all(Overlap(encoder, cast, 4), batches), batches, strict=True):
        alone = encoder.encode(batch).flatten(0, 1)
        assert np.array_equal(tokens, to_stored(alone, cast)) and np.array_equal(errors, cast_tokens(alone, cast)[1])


@pytest.mark.parametrize("name", ["preset", "preset_21"])
@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float16"])
def test_weights_that_are_cast_once_give_the_bits_of_autocast(request, name, compute_dtype):
    preset = request.getfixturevalue(name)
    encoder = make(preset, "cpu", compute_dtype)
    assert encoder.encoder.blocks[0].attn.qkv.weight.dtype == encoder.compute_dtype
    batch = encoder.preprocess(FRAMES[0])[:, None]
    once = encoder.encode(batch)
    plain = make(preset, "cpu", "float32")
    plain.compute_dtype = encoder.compute_dtype
    assert torch.equal(once, plain.encode(batch)) and once.dtype == plain.encode(batch).dtype


@on_emulated_cuda
def test_on_a_gpu_nothing_waits_in_the_loop_and_nothing_is_read_too_early():
    tiny = load_config(Path(__file__).parents[2], ["encoder=tiny"]).encoder
    for crop, compute_dtype, frames in (("ac", "float32", FRAMES), ("eval_array", "bfloat16", FRAMES)):
        preset = replace(tiny, crop=crop, depth=2)
        on_cpu = make(preset, "cpu", compute_dtype)
        alone = [on_cpu.encode(on_cpu.preprocess(batch)[:, None]) for batch in frames]
        with emulated_cuda() as counts:
            encoder = make(preset, "cuda", compute_dtype)
            batches = [encoder.preprocess(batch)[:, None] for batch in frames]
            assert {batch.dtype for batch in batches} == {torch.uint8}
            overlap = Overlap(encoder, "float16", 4)
            run_all(overlap, batches[:1])  # rotation tables go to the device once
            counts.reset()
            results = run_all(overlap, batches)
            waits = {(name, thread) for name, thread in counts.synchronisations}
            assert waits == {("event.synchronize", "write")}, waits
            assert not counts.pageable
            online = [encoder.encode(batch).flatten(0, 1) for batch in batches]
            assert online[0].dtype == alone[0].dtype  # one recipe, one dtype, on either kind of device
            for (tokens, _), each in zip(results, online, strict=True):
                assert np.array_equal(tokens, to_stored(each, "float16"))
        for (tokens, _), each in zip(results, alone, strict=True):  # attention is another there
            assert np.abs(tokens - each.flatten(0, 1).float().numpy()).max() < 0.1
