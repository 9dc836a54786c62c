"""Predictors on compressed steps: principal components of all tokens of a step, moved on by a small MLP or a ridge regression.

For few recordings, for a CPU, or to act soon. They are called like an `ACPredictor` and give tokens, but see one step only: what is
predicted of a step is the same whatever came before it. Inside, a step is a latent z of P numbers; the `core` maps z, action and state
to the next z and is trained alone, on latents that were computed once.

Letters besides the project's: P latent size; D = N*E numbers of a step's tokens.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_cache.predictor.layers import MLP, KeysValues
from jepa_cache.predictor.model import PredictorOutput

OVERSAMPLING = 16  # directions beyond those wanted: the last wanted ones converge sooner
NUM_PASSES = 4  # over the steps; on 3,936 steps of the sample the fifth moved no variance by more than 1e-4 of itself
LEAST_DEVIATION = 1e-3  # of a component, as a share of the largest: whitening would blow up the noise of weaker ones
Blocks = Callable[[], Iterable[Tensor]]
"""Gives the same steps each time it is called: tokens [n, ..., N, E], normed as the predictor's inputs are, block after block."""


class Compressor(nn.Module):
    """Tokens of a step to P numbers and back: principal components of the training steps, or all D numbers where P is 0.

        z = (h - mean) . components / scale          h = mean + (z * scale) . components

    `scale` is sd^p * g^(1-p), with the deviation sd of each component, g the root mean square of them, and p the `whitening`: 0 keeps
    their proportions, 1 makes all alike. The latents' mean square is about 1 whatever p. Owns buffers only, which travel in checkpoints.
    """

    def __init__(self, num_tokens: int, embed_dim: int, num_components: int) -> None:
        """Make room for a compressor of steps [N, E]; `fit` or a state dict fills it."""
        super().__init__()
        width = num_tokens * embed_dim
        self.shape = (num_tokens, embed_dim)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("components", torch.zeros(num_components, width) if num_components else None)
        self.register_buffer("scale", torch.ones(num_components or width))

    @property
    def latent_dim(self) -> int:
        """Return P."""
        return len(self.scale)

    def compress(self, h: Tensor) -> Tensor:
        """Turn tokens [..., N, E], normed as in training, into latents [..., P]."""
        centred = h.flatten(-2) - self.mean
        return (centred if self.components is None else F.linear(centred, self.components)) / self.scale

    def expand(self, z: Tensor) -> Tensor:
        """Turn latents [..., P] into tokens [..., N, E]."""
        return (self.mean + self.directions(z)).unflatten(-1, self.shape)

    def directions(self, dz: Tensor) -> Tensor:
        """Turn differences of latents [..., P] into differences of tokens [..., D]."""
        scaled = dz * self.scale
        return scaled if self.components is None else scaled @ self.components

    @torch.no_grad()
    def fit(self, blocks: Blocks, whitening: float) -> None:
        """Fit mean, components and scale to steps that are read several times, block by block.

        Randomised subspace iteration with a seed of its own, so that equal steps give equal numbers. Memory: some five times
        (P + 16) * D float32, 0.6 GB for 64 components of 256 tokens of ViT-g, whatever the number of steps.

        Raises:
            ValueError: There are fewer steps than components, or no step differs from another.

        Source: Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4.
        """
        count, total = 0, torch.zeros_like(self.mean, dtype=torch.float64)
        for block in blocks():
            rows = self._rows(block)
            count += len(rows)
            total += rows.sum(dim=0, dtype=torch.float64)
        width, num_components = len(self.mean), len(self.scale)
        if count <= (num_components if self.components is not None else 1):
            raise ValueError(
                f"{num_components} principal components need more steps than that to be fitted to; there are {count} (at first in half of the "
                "training episodes, as the others judge them). Set num_components of the predictor's preset lower, or add recordings"
            )
        self.mean.copy_(total / count)
        if self.components is None:
            deviation = (sum(self._centred(block).square().sum(dim=0) for block in blocks()) / count).sqrt()
        else:
            size = min(num_components + OVERSAMPLING, width, count)
            if num_components > width:
                raise ValueError(
                    f"tokens of {width} numbers a step have no {num_components} components; set num_components lower"
                )
            product = torch.randn(width, size, generator=torch.Generator().manual_seed(0)).to(self.mean.device)
            for _ in range(NUM_PASSES):
                basis = torch.linalg.qr(product).Q
                product = torch.zeros_like(basis)
                for block in blocks():
                    centred = self._centred(block)
                    product += centred.T @ (centred @ basis)
            variances, rotation = torch.linalg.eigh(basis.T @ product / count)
            self.components.copy_((basis @ rotation[:, -num_components:].flip(1)).T)
            deviation = variances[-num_components:].flip(0).clamp(min=0).sqrt()
        if not deviation.max() > 0:
            raise ValueError(
                "all training steps have equal tokens, which nothing can be learnt from; look at them with `jepa-cache inspect`"
            )
        overall = deviation.square().mean().sqrt()
        self.scale.copy_(
            deviation.clamp(min=LEAST_DEVIATION * float(deviation.max())) ** whitening * overall ** (1 - whitening)
        )

    def _rows(self, block: Tensor) -> Tensor:
        return block.reshape(-1, len(self.mean))

    def _centred(self, block: Tensor) -> Tensor:
        return self._rows(block) - self.mean


class LatentCore(nn.Module):
    """Moves latents on by one step: called like an `ACPredictor` whose steps are one token of width P; a copy before training."""

    def forward(
        self,
        z: Tensor,
        actions: Tensor,
        states: Tensor,
        past: Sequence[KeysValues] | None = None,
        num_kept_steps: int | None = None,
    ) -> PredictorOutput:
        """Predict the step after each given one: z [B, T, 1, P], actions [B, T, A] and states [B, T, S] to [B, T, 1, P], without a past."""
        return PredictorOutput(z + self.change(z[:, :, 0], actions, states)[:, :, None], [])

    def change(self, z: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        """Predict z' - z: [..., P], [..., A] and [..., S] to [..., P]."""
        raise NotImplementedError


class LatentBlock(nn.Module):
    """Residual block whose input is shifted and scaled, and whose output is gated, by the action and the state (AdaLN).

    Source: Peebles and Xie, arXiv 2212.09748; the gate begins near 1 here, as the core's output begins at 0.
    """

    def __init__(self, width: int) -> None:
        """Make both layers and the modulation."""
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.mlp = MLP(width, 2 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return [..., width] of x and condition [..., width]."""
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        return x + (1 + gate) * self.mlp(self.norm(x) * (1 + scale) + shift)


class LatentMLP(LatentCore):
    """z' = z + f(z, action, state), f an MLP of residual blocks whose output starts at zero."""

    def __init__(self, latent_dim: int, action_dim: int, state_dim: int, *, predictor_dim: int, depth: int) -> None:
        """Make `depth` blocks of width `predictor_dim`; `state_dim` 0 takes no states."""
        super().__init__()
        self.state_dim, width = state_dim, predictor_dim
        self.enter = nn.Linear(latent_dim, width)
        inputs = nn.Linear(action_dim + state_dim, width)
        self.condition = nn.Sequential(inputs, nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(LatentBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, latent_dim)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def change(self, z: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        """Predict z' - z, as `LatentCore.change` says."""
        x = self.enter(z)
        condition = self.condition(torch.cat([actions, states[..., : self.state_dim]], dim=-1))
        for block in self.blocks:
            x = block(x, condition)
        return self.leave(self.norm(x))


class LatentRidge(LatentCore):
    """z' = z + W [z, state, action, action x state, action x the first latents] + b; `training.ridge` finds W and b in closed form."""

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        state_dim: int,
        *,
        num_products: int,
        columns: tuple[Sequence[int], Sequence[int]] | None = None,
    ) -> None:
        """Start as a copy; `num_products` latents are multiplied with the action, `state_dim` 0 takes no states.

        `columns` are those of actions and states that are looked at, all by default.
        """
        super().__init__()
        actions, states = columns or (range(action_dim), range(state_dim))
        self._actions, self._states = list(actions), list(states) if state_dim else []
        self.num_products = min(num_products, latent_dim)
        num_features = latent_dim + len(self._states)
        num_features += len(self._actions) * (1 + len(self._states) + self.num_products)
        self.weight = nn.Parameter(torch.zeros(latent_dim, num_features))
        self.bias = nn.Parameter(torch.zeros(latent_dim))

    def features(self, z: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        """What W multiplies: [..., features], the constant aside."""
        actions, states = actions[..., self._actions], states[..., self._states]
        factors = torch.cat([states, z[..., : self.num_products]], dim=-1)
        products = (actions[..., :, None] * factors[..., None, :]).flatten(-2)
        return torch.cat([z, states, actions, products], dim=-1)

    def change(self, z: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        """Predict z' - z, as `LatentCore.change` says."""
        return F.linear(self.features(z, actions, states), self.weight, self.bias)

    def rows(self, z: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        """What it is fitted to, of steps z [B, T, P] with states [B, T, S]: [1, features, z' - z] [B, T-1, 1 + features + P] float64."""
        features = self.features(z[:, :-1], actions, states[:, :-1])
        return torch.cat([torch.ones_like(features[..., :1]), features, z.diff(dim=1)], dim=-1).double()

    def set_weights(self, weights: Tensor) -> None:
        """Take b and W from weights [1 + features, P]."""
        self.bias.copy_(weights[0])
        self.weight.copy_(weights[1:].T)


class CompressedPredictor(nn.Module):
    """Predicts the tokens of the next step through a few numbers of the present one.

    Of what the compressor does not hold of the given tokens, a share is kept: that which fits the training windows best, near 1 under a
    camera that stands still. (Held-out L1 on the Minecraft sample, whose view turns: 0.605 all of it, 0.536 none, 0.5355 the fitted .05.)

    Attributes: `compressor`, and `core`, which moves latents on and can be called alone by programs that compare latents.
    """

    CORE: type[LatentCore] = LatentMLP

    def __init__(
        self,
        *,
        embed_dim: int,
        action_dim: int,
        state_dim: int,
        grid: tuple[int, int],
        num_components: int,
        whitening: float,
        use_states: bool,
        **sizes: int,
    ) -> None:
        """Build it with fresh weights and an empty compressor.

        Args:
            embed_dim: E, token width of the encoder.
            action_dim: A.
            state_dim: S.
            grid: (H, W) rows and columns of the patch grid of one step.
            num_components: P; 0 takes all numbers of a step's tokens.
            whitening: See `Compressor`; used when it is fitted.
            use_states: Whether the core sees the states.
            sizes: Of the core.
        """
        super().__init__()
        self.embed_dim, self.action_dim, self.state_dim = embed_dim, action_dim, state_dim
        self.grid = (int(grid[0]), int(grid[1]))
        self.whitening, self.use_states = whitening, use_states
        self.compressor = Compressor(self.grid[0] * self.grid[1], embed_dim, num_components)
        self.register_buffer("kept_share", torch.zeros(()))
        self.core = self.CORE(self.compressor.latent_dim, action_dim, state_dim if use_states else 0, **sizes)

    @torch.no_grad()
    def fit_share(self, windows: Iterable[Tensor]) -> None:
        """Fit the share of the residual that is kept: by least squares over all steps of windows [B, T, N, E] and the steps after them."""
        products = squares = 0.0
        for h in windows:
            residual = h - self.compressor.expand(self.compressor.compress(h))
            products += float((residual[:, :-1] * residual[:, 1:]).sum(dtype=torch.float64))
            squares += float(residual[:, :-1].square().sum(dtype=torch.float64))
        self.kept_share.fill_(products / squares if squares > 0 else 0.0)

    def forward(
        self,
        tokens: Tensor,
        actions: Tensor,
        states: Tensor,
        past: Sequence[KeysValues] | None = None,
        num_kept_steps: int | None = None,
    ) -> PredictorOutput:
        """Predict the step after each of the T given ones, as `ACPredictor.forward` does, with an empty past.

        Args:
            tokens: [B, T, N, E] tokens of the given steps, layer-normed by the caller.
            actions: [B, T, A]; `actions[t]` leads from step t to t+1.
            states: [B, T, S]; not read where `use_states` is off.
            past: Ignored: every step is predicted from itself alone.
            num_kept_steps: Ignored.

        Returns:
            Predictions [B, T, N, E] and no keys and values.

        Raises:
            ValueError: an input has the wrong shape.
        """
        expected = {
            "tokens": (tokens, self.compressor.shape),
            "actions": (actions, (self.action_dim,)),
            "states": (states, (self.state_dim,)),
        }
        for name, (array, widths) in expected.items():
            if array.shape != (*tokens.shape[:2], *widths):
                raise ValueError(
                    f"predictor: {name} must be [B, T, {', '.join(map(str, widths))}] for tokens {list(tokens.shape)}, got {list(array.shape)}"
                )
        z = self.compressor.compress(tokens)
        moved = self.core(z[:, :, None], actions, states).tokens[:, :, 0]
        return PredictorOutput(self._expand(moved, z, tokens, self.kept_share), [])

    def roll(self, tokens: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        """Predict the last of H steps after one given step, moved on as a latent throughout: tokens are made of the last one alone.

        Args:
            tokens: [1, N, E] of the step that all candidates begin with.
            actions: [B, H, A].
            states: [B, H, S].

        Returns:
            [B, N, E]; for H = 1 what `forward` gives.
        """
        first = self.compressor.compress(tokens)
        z = first[:, None, None].expand(len(actions), 1, 1, -1)
        for step in range(actions.shape[1]):
            z = self.core(z, actions[:, step : step + 1], states[:, step : step + 1]).tokens
        return self._expand(z[:, 0, 0], first, tokens, self.kept_share ** actions.shape[1])

    def _expand(self, moved: Tensor, z: Tensor, tokens: Tensor, share: Tensor) -> Tensor:
        """expand(moved) + share * (tokens - expand(z)), by one product with the components."""
        flat = share * tokens.flatten(-2) + (1 - share) * self.compressor.mean
        return (flat + self.compressor.directions(moved - share * z)).unflatten(-1, tokens.shape[-2:])


class LinearPredictor(CompressedPredictor):
    """The same with a ridge regression as its core: seconds to fit, and the least that a larger predictor has to beat."""

    CORE = LatentRidge
