"""What compressed predictors promise.

Claims:
- the compressor finds the principal components, gives back what lies in their span, and whitens as far as it is told, the same in every
  run and in blocks of any size;
- predictors start as copies, see no more than they say, roll out as repeated single steps (as latents: as those without a norm between),
  keep the share of the residual that fits, and come back from a file with their card;
- cards without a kind are of transformers.
"""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from jepa_cache.predictor.checkpoints import CheckpointError, build_predictor, load_predictor, save_state
from jepa_cache.predictor.compressed import CompressedPredictor, Compressor
from jepa_cache.predictor.model import ACPredictor
from jepa_cache.predictor.rollout import LatentModel, normalize_tokens
from tests.predictor.makers import SIZES, same

N, E, P = 4, 8, 5
WIDTHS = {"embed_dim": E, "grid": [2, 2], "action_dim": 3, "state_dim": 2}
COMPRESSED = {**WIDTHS, "num_components": P, "whitening": 0.5, "use_states": True}
KINDS = {
    "compressed": {**COMPRESSED, "kind": "compressed", "predictor_dim": 12, "depth": 2},
    "linear": {**COMPRESSED, "kind": "linear", "num_products": 2},
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_steps(count: int = 300) -> Tensor:
    """[n, N, E] steps whose components have deviations 1, 1/2, 1/3 ..., far from the origin."""
    directions = torch.linalg.qr(draw(N * E, N * E, seed=1)).Q
    deviations = 1 / torch.arange(1, N * E + 1)
    return (3 + (draw(count, N * E, seed=2) * deviations) @ directions.T).view(count, N, E)


def fitted(steps: Tensor, num_components: int = P, whitening: float = 0.0, block: int = 64) -> Compressor:
    compressor = Compressor(N, E, num_components)
    compressor.fit(lambda: steps.split(block), whitening)
    return compressor


def build(kind: str, *, lively: bool = True, **changes: object) -> CompressedPredictor:
    """One whose compressor is fitted and whose core does something."""
    torch.manual_seed(0)
    predictor = build_predictor({**KINDS[kind], **changes})
    predictor.compressor.fit(lambda: [normalize_tokens(draw_steps())], predictor.whitening)
    if lively:
        for parameter in predictor.core.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return predictor.eval()


def inputs(num_steps: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return (
        normalize_tokens(draw(2, num_steps, N, E, seed=3)),
        draw(2, num_steps, 3, seed=4),
        draw(2, num_steps, 2, seed=5),
    )


def test_components_are_the_principal_ones():
    steps = draw_steps()
    compressor, reference = fitted(steps), PCA(P, svd_solver="full").fit(steps.flatten(1).numpy())
    along = np.abs((compressor.components.numpy() * reference.components_).sum(axis=1))
    np.testing.assert_allclose(along, 1, atol=1e-3)
    latents = compressor.compress(steps) * compressor.scale
    np.testing.assert_allclose(latents.square().mean(dim=0), reference.explained_variance_ * 299 / 300, rtol=1e-3)


@pytest.mark.parametrize("num_components", [P, 0])
@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_compress_and_expand_are_inverse_on_the_span_and_whitening_divides_by_a_power_of_the_deviation(
    num_components, whitening
):
    steps = draw_steps()
    compressor = fitted(steps, num_components, whitening)
    z = compressor.compress(steps)
    assert z.shape == (300, num_components or N * E)
    torch.testing.assert_close(compressor.compress(compressor.expand(z)), z, atol=1e-4, rtol=1e-4)
    if not num_components:
        torch.testing.assert_close(compressor.expand(z), steps, atol=1e-5, rtol=1e-5)
    deviation = z.std(dim=0, unbiased=False)
    raw = fitted(steps, num_components, 0.0).compress(steps).std(dim=0, unbiased=False)
    ratio = deviation / raw ** (1 - whitening)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), atol=0, rtol=1e-3)
    if whitening != 0.5:
        torch.testing.assert_close(deviation.square().mean(), torch.tensor(1.0), atol=0, rtol=1e-3)


def test_a_fit_repeats_bit_for_bit_and_blocks_change_it_by_rounding_alone():
    steps = draw_steps()
    first, again, other = fitted(steps), fitted(steps), fitted(steps, block=7)
    assert same(first, again)
    torch.testing.assert_close(other.compress(steps), first.compress(steps), atol=1e-3, rtol=1e-3)


def test_a_component_without_variance_is_not_blown_up():
    steps = draw_steps()
    steps[:] = steps.mean(dim=(1, 2), keepdim=True)  # one direction only
    assert fitted(steps, whitening=1.0).compress(steps).abs().max() < 10


@pytest.mark.parametrize(
    ("steps", "message"),
    [(draw_steps(4), "5 principal components need more steps"), (torch.ones(9, N, E), "equal tokens")],
)
def test_steps_that_hold_no_components_are_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        fitted(steps)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_predictor_copies_and_keeps_the_fitted_share_of_the_rest(kind):
    predictor = build(kind, lively=False)
    tokens, actions, states = inputs()
    span = predictor.compressor.expand(predictor.compressor.compress(tokens))
    for share in (0.0, 0.3, 1.0):
        predictor.kept_share.fill_(share)
        predicted = predictor(tokens, actions, states).tokens
        torch.testing.assert_close(predicted, span + share * (tokens - span), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(predicted, tokens, atol=1e-5, rtol=1e-5)


def test_the_kept_share_is_how_much_of_the_residual_stays():
    predictor = build("compressed")
    tokens, _, _ = inputs(1)
    span = predictor.compressor.expand(predictor.compressor.compress(tokens))
    following = span.flip(0) + 0.4 * (tokens - span)
    predictor.fit_share([torch.cat([tokens, following], dim=1)])
    assert predictor.kept_share == pytest.approx(0.4, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rollout_is_repeated_single_steps_and_each_step_is_predicted_from_itself(kind):
    predictor = build(kind)
    tokens, actions, states = inputs()
    model = LatentModel(predictor)
    rolled = model.open_loop(tokens[:, :1], actions[:, :3], states[:, :3], 3)
    single = tokens[:, :1]
    for step in range(3):
        single = model.as_reps(predictor(single, actions[:, step : step + 1], states[:, step : step + 1]).tokens)
        torch.testing.assert_close(rolled[:, step : step + 1], single)
    assert not torch.allclose(rolled[:, 0], tokens[:, 0], atol=0.1)
    whole = predictor(tokens, actions, states)
    assert whole.past == []
    torch.testing.assert_close(whole.tokens[:, 2:3], predictor(tokens[:, 2:3], actions[:, 2:3], states[:, 2:3]).tokens)
    both = model.both_ways(tokens, actions[:, :3], states, num_forced=3, num_context=1, horizon=3)
    torch.testing.assert_close(both.open_loop, rolled)


@pytest.mark.parametrize("kind", [*KINDS, "transformer"])
def test_without_use_states_any_states_may_be_given(kind):
    transformer = {**WIDTHS, "predictor_dim": 12, "depth": 1, "num_heads": 2}
    torch.manual_seed(0)
    tokens, actions, states = inputs()
    for use_states in (True, False):
        predictor = (
            build(kind, use_states=use_states)
            if kind in KINDS
            else build_predictor({**transformer, "use_states": use_states})
        )
        with torch.no_grad():
            one, other = (predictor(tokens, actions, given).tokens for given in (states, states + 1))
        assert torch.equal(one, other) == (not use_states)


@pytest.mark.parametrize("kind", KINDS)
def test_a_predictor_comes_back_from_its_file_and_card(kind, tmp_path):
    predictor = build(kind)
    save_state(predictor.state_dict(), tmp_path / "p.safetensors", {"architecture": KINDS[kind], "run": "x"})
    loaded, card = load_predictor(tmp_path / "p.safetensors")
    assert same(loaded, predictor) and type(loaded) is type(predictor) and card["run"] == "x"
    assert loaded.eval()(*inputs()).tokens.equal(predictor(*inputs()).tokens)


def test_a_card_without_a_kind_is_of_a_transformer_and_an_unknown_one_is_named():
    assert isinstance(build_predictor(SIZES), ACPredictor)
    with pytest.raises(CheckpointError, match="'diffusion' are not known here, only transformer, compressed, linear"):
        build_predictor({**SIZES, "kind": "diffusion"})


@pytest.mark.parametrize("kind", KINDS)
def test_other_shapes_are_refused(kind):
    predictor, (tokens, actions, states) = build(kind), inputs()
    with pytest.raises(ValueError, match=r"actions must be \[B, T, 3\]"):
        predictor(tokens, actions[..., :2], states)


@pytest.mark.parametrize("kind", KINDS)
def test_rolled_latents_give_the_tokens_of_repeated_predictions_without_a_norm_between(kind):
    predictor = build(kind)
    predictor.kept_share.fill_(0.5)
    tokens, actions, states = inputs()
    single = tokens[:1, :1].expand(2, 1, N, E)
    for step in range(4):
        rolled = predictor.roll(tokens[0, :1], actions[:, : step + 1], states[:, : step + 1])
        single = predictor(single, actions[:, step : step + 1], states[:, step : step + 1]).tokens
        torch.testing.assert_close(rolled, single[:, 0], atol=1e-4, rtol=1e-4)
