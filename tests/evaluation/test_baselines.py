"""Baselines and controls.

Claims:
- donors are of another episode, the same by seed, and drawn from all of them; one episode alone is refused;
- the mean baseline is the mean of training tokens, and held-out ones do not touch it.
"""

import numpy as np
import pytest
import zarr

from jepa_cache.evaluation.baselines import TRAINING_WINDOWS_PER_EPISODE, choose_donors, training_mean
from tests.caches import make_cache


def test_every_window_gets_the_actions_of_another_episode():
    episodes = [f"{number // 7}" for number in range(42)]
    donors = choose_donors(episodes, seed=0)
    assert all(episodes[donor] != episodes[window] for window, donor in enumerate(donors))
    assert np.array_equal(donors, choose_donors(episodes, seed=0))
    assert not np.array_equal(donors, choose_donors(episodes, seed=1))
    assert len(set(donors.tolist())) > 20, "donors are spread over the windows"


def test_one_episode_alone_has_no_donors():
    with pytest.raises(ValueError, match=r"at least two held-out episodes.*split\.val_share.*held out: only"):
        choose_donors(["only"] * 5, seed=0)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_mean_baseline_is_the_mean_over_training_windows(tmp_path, normalize):
    cache, num_steps = make_cache(tmp_path), 5
    segments = cache.dataset.segments_of("train", cache.config.split)
    found = training_mean(cache.dataset, segments, cache.scaler, num_steps=num_steps, normalize_reps=normalize)
    parts = []
    for segment in segments:
        entry = cache.dataset.manifest.entries[segment.store]
        tokens = zarr.open(cache.root.tokens(cache.dataset.manifest.fingerprint, entry.unit_digest))["tokens"][
            ...
        ].astype(float)
        last = segment.stop - segment.start - num_steps
        for start in np.linspace(0, last, TRAINING_WINDOWS_PER_EPISODE).round().astype(int):
            window = tokens[segment.start + start :][:num_steps]
            if normalize:
                window = (window - window.mean(-1, keepdims=True)) / np.sqrt(window.var(-1, keepdims=True) + 1e-5)
            parts.append(window)
    assert np.allclose(found.numpy(), np.concatenate(parts).mean(axis=0), atol=1e-5)
