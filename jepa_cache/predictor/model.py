"""The V-JEPA 2-AC predictor: next-step tokens from past tokens, actions and states.

Every step is a group of K conditioning tokens (action, state, and extrinsics where used) followed by its N frame tokens, or, with
adaptive layer norms (`conditioning: adaln`, not official), its N frame tokens alone;
attention is block-causal over steps. Parameter names are those of the released checkpoint, which loads strictly.
Letters besides the project's: P predictor width, always called `predictor_dim`; L = K + N tokens per step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from jepa_cache.predictor.layers import (
    Block,
    KeysValues,
    cast_for_passes,
    has_bfloat16_products,
    rotary_table,
    step_mask,
)


class PredictorOutput(NamedTuple):
    """What one pass gives: predictions, and what a later pass needs to continue after it."""

    tokens: Tensor
    """[B, T, N, E] prediction of the step after each given one; not layer-normed."""
    past: list[KeysValues]
    """Per block the keys and values of all steps so far (past ones included), or of those that are kept; empty where none are."""


class _Low(NamedTuple):
    """What `ACPredictor.cast_once` holds: by block the weights for the passes to come."""

    dtype: torch.dtype
    num_passes: int
    weights: list[list[dict[str, Tensor]]]


def _share_graphs(x: Tensor, past: KeysValues | None) -> None:
    """Let torch.compile make one graph for whole windows and one for single steps, after a past of any length."""
    torch._dynamo.mark_static(x, 1)
    for it in past or ():
        torch._dynamo.maybe_mark_dynamic(it, 2)


class ACPredictor(nn.Module):
    """Predicts the tokens of the next step from those of this and earlier steps, with their actions and states.

    Owns the official parameters under their official names, and nothing else: no buffers, no mask, no optimiser state.
    Positions are rotary; the output is not layer-normed (see `rollout.normalize_tokens`). The official predictor has no
    residual from input to output; `residual` adds one, which helps where few recordings are at hand: what does not move
    need not be rebuilt. Nor does it have adaptive layer norms (AdaLN): there action and state shift, scale and gate every block.

    `extrinsics_encoder` is always present, as in the released file; where unused it is frozen, so that DDP does not wait
    for it.

    Source: V-JEPA 2-AC, arXiv 2506.09985. There the state has the action's width; here both are free.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        predictor_dim: int,
        depth: int,
        num_heads: int,
        action_dim: int,
        state_dim: int,
        grid: tuple[int, int],
        mlp_ratio: float = 4.0,
        use_extrinsics: bool = False,
        norm_eps: float = 1e-6,
        activation_checkpointing: bool | Literal["auto"] = False,
        residual: bool = False,
        conditioning: Literal["tokens", "adaln"] = "tokens",
        use_states: bool = True,
    ) -> None:
        """Build the predictor with the official initialisation.

        Args:
            embed_dim: E, token width of the encoder.
            predictor_dim: inner width; a multiple of `num_heads`.
            depth: number of blocks.
            num_heads: attention heads.
            action_dim: A.
            state_dim: S, the extrinsics included where they are used.
            grid: (H, W) rows and columns of the patch grid of one step.
            mlp_ratio: hidden width of the MLP / `predictor_dim`.
            use_extrinsics: the last A - 1 columns of the states (1 where A is 1) are the camera's extrinsics, and get a conditioning
                token of their own.
            norm_eps: of every LayerNorm.
            activation_checkpointing: recompute each block in the backward pass: a third more time, far less memory. `auto`: on a CPU,
                and on a GPU where a pass without it is not expected to fit.
            residual: not official, so such weights cannot be exported to the official layout.
            conditioning: `adaln` in place of the conditioning tokens; not official either.
            use_states: whether states are read; without, any may be given.

        Raises:
            ValueError: a size is not positive, `predictor_dim` does not split into heads of 6 or more channels, or states hold no more than
                extrinsics.
        """
        super().__init__()
        num_extrinsics = max(action_dim - 1, 1)
        if use_extrinsics and state_dim <= num_extrinsics:
            raise ValueError(
                f"predictor: with use_extrinsics the last {num_extrinsics} columns of the states are the camera's pose, and there are "
                f"{state_dim}; set encode.action_space=pose7_extrinsics, or use_extrinsics to false in the preset"
            )
        if min(embed_dim, predictor_dim, depth, num_heads, action_dim, state_dim, *grid) < 1:
            raise ValueError(
                f"predictor: every size must be at least 1; got embed_dim {embed_dim}, "
                f"predictor_dim {predictor_dim}, depth {depth}, num_heads {num_heads}, action_dim {action_dim}, state_dim {state_dim}, "
                f"grid {tuple(grid)}"
            )
        if predictor_dim % num_heads or predictor_dim // num_heads < 6:
            raise ValueError(
                f"predictor: predictor_dim must be a multiple of num_heads with at least 6 channels a head (fewer hold no "
                f"rotary position), got {predictor_dim} and {num_heads}"
            )
        self.embed_dim, self.action_dim, self.state_dim = embed_dim, action_dim, state_dim
        self.grid = (int(grid[0]), int(grid[1]))
        self.use_extrinsics = use_extrinsics
        self.activation_checkpointing = activation_checkpointing
        self.residual, self.conditioning, self.use_states = residual, conditioning, use_states
        self.head_width = predictor_dim // num_heads
        self.predictor_embed = nn.Linear(embed_dim, predictor_dim)
        self.action_encoder = nn.Linear(action_dim, predictor_dim)
        self.num_measured = state_dim - num_extrinsics * use_extrinsics
        self.state_encoder = nn.Linear(self.num_measured, predictor_dim)
        self.extrinsics_encoder = nn.Linear(num_extrinsics, predictor_dim).requires_grad_(use_extrinsics)
        self.predictor_blocks = nn.ModuleList(
            Block(predictor_dim, num_heads, int(predictor_dim * mlp_ratio), norm_eps) for _ in range(depth)
        )
        if conditioning == "adaln":
            self.modulations = nn.ModuleList(nn.Linear(predictor_dim, 6 * predictor_dim) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(predictor_dim, eps=norm_eps)
        self.predictor_proj = nn.Linear(predictor_dim, embed_dim)
        self._low: _Low | None = None
        self._flex = self._compiled = False
        self.reset_parameters()

    @property
    def num_conditioning_tokens(self) -> int:
        """Return K, the conditioning tokens of each step: action, state, and extrinsics where used; with adaptive layer norms none."""
        if self.conditioning == "adaln":
            return 0
        return 3 if self.use_extrinsics else 2

    @property
    def tokens_per_step(self) -> int:
        """Return L = K + N, all tokens of one step."""
        return self.num_conditioning_tokens + self.grid[0] * self.grid[1]

    def reset_parameters(self) -> None:
        """Draw fresh weights: normal of deviation 0.02 cut at +-2, biases 0, and residual outputs of block l divided by sqrt(2 l).

        Source: V-JEPA 2-AC (official initialisation).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            for number, block in enumerate(self.predictor_blocks, start=1):
                block.attn.proj.weight.div_((2.0 * number) ** 0.5)
                block.mlp.fc2.weight.div_((2.0 * number) ** 0.5)
        if self.conditioning == "adaln":
            for modulation in self.modulations:  # every block begins as one without
                nn.init.zeros_(modulation.weight)

    def compile(self, *arguments: Any, flex: bool = False, **options: Any) -> None:
        """Compile each block by `torch.compile`, in place: all share their graphs, one for each kind of pass, wherever a rollout starts.

        `flex`: windows that begin here attend by one call of FlexAttention, on a GPU alone: it has no backward pass on a CPU.
        """
        self._flex, self._compiled = flex, True
        # Tracing the question would break the graph. Marked here, as it imports torch's compiler: 1.6 s.
        torch.compiler.assume_constant_result(has_bfloat16_products.__wrapped__)
        for block in self.predictor_blocks:
            block.compile(*arguments, **options)

    @contextmanager
    def cast_once(self, dtype: torch.dtype | None, num_passes: int) -> Iterator[None]:
        """Cast the weights of the blocks' products to `dtype` once for `num_passes` passes in the context, and their gradients back once.

        The numbers are autocast's, bit for bit, but for sums of gradients of LoRA's B; it would cast tensor by tensor, and again in every
        compiled pass and recomputation.
        """
        self._low = None if dtype is None else _Low(dtype, num_passes, [[] for _ in self.predictor_blocks])
        try:
            yield
        finally:
            self._low = None

    def _run_block(self, number: int, dtype: torch.dtype | None, *arguments: Any) -> tuple[Tensor, Any, Any]:
        block = self.predictor_blocks[number]
        if dtype is None:
            return block(*arguments)
        # A recomputation comes after the context: all weights held until then would take half a GiB more of `ac300m`.
        cast = self._low.weights[number] if self._low else []
        if not cast:
            cast += cast_for_passes(block, dtype, self._low.num_passes if self._low else 1)
        return functional_call(block, cast.pop(), arguments)

    def forward(
        self,
        tokens: Tensor,
        actions: Tensor,
        states: Tensor,
        past: Sequence[KeysValues] | None = None,
        num_kept_steps: int | None = None,
    ) -> PredictorOutput:
        """Predict the step after each of the T given ones.

        With `past` the given steps continue after the steps that it holds: the result equals that of one pass over all of
        them, gradients included, at the cost of the new steps only.

        Args:
            tokens: [B, T, N, E] tokens of the given steps, layer-normed by the caller.
            actions: [B, T, A]; `actions[t]` leads from step t to t+1.
            states: [B, T, S].
            past: what an earlier pass returned, or None for a window that begins here.
            num_kept_steps: keep keys and values of this many first steps only (None: of all), to save memory.

        Returns:
            Predictions [B, T, N, E] and the keys and values of the kept steps.

        Raises:
            ValueError: an input has the wrong shape, or `past` does not fit this predictor.
        """
        self._check_shapes(tokens, actions, states, past)
        batch, num_steps = tokens.shape[:2]
        length, num_conditioning = self.tokens_per_step, self.num_conditioning_tokens
        first_step = past[0][0].shape[2] // length if past else 0
        given = states if self.use_states else torch.zeros_like(states)
        conditions = [self.action_encoder(actions), self.state_encoder(given[..., : self.num_measured])]
        if self.use_extrinsics:
            conditions.append(self.extrinsics_encoder(states[..., self.num_measured :]))
        frame = self.predictor_embed(tokens)
        by_block: list[Tensor | None] = [None] * len(self.predictor_blocks)
        if self.conditioning == "adaln":
            condition = F.silu(torch.stack(conditions).sum(dim=0))
            by_block = [modulation(condition).unflatten(-1, (6, -1)) for modulation in self.modulations]
            x = frame.flatten(1, 2)
        else:
            x = torch.cat([torch.stack(conditions, dim=2).to(frame.dtype), frame], dim=2).flatten(1, 2)
        # Under autocast x is already in the low dtype of the queries; elsewhere it has the weights' dtype.
        table = rotary_table(
            self.head_width,
            first_step=first_step,
            num_steps=num_steps,
            grid=self.grid,
            num_conditioning=num_conditioning,
            dtype=x.dtype,
            device=x.device,
        )
        num_all_steps = first_step + num_steps
        num_kept = length * (num_all_steps if num_kept_steps is None else min(num_kept_steps, num_all_steps))
        mask = step_mask(num_steps, length, x.device) if self._flex and not past and num_steps > 1 else None
        recomputes, kept, to_keep = self._recomputes(x), [], x.new_empty(num_kept, 0)
        if self._compiled:
            torch._dynamo.maybe_mark_dynamic(to_keep, 0)
        # Random numbers are restored for the second computation only where some are drawn.
        draws = recomputes and any(it.p > 0 for it in self.predictor_blocks.modules() if isinstance(it, nn.Dropout))
        for i in range(len(self.predictor_blocks)):
            dtype, before = self._low and self._low.dtype, past[i] if past else None
            if self._compiled:
                _share_graphs(x, before)
            arguments = (i, dtype, x, table, length, before, by_block[i], mask, to_keep)
            if recomputes:
                x, k, v = checkpoint(self._run_block, *arguments, use_reentrant=False, preserve_rng_state=draws)
            else:
                x, k, v = self._run_block(*arguments)
            if num_kept:
                kept.append((k, v))
        x = x.view(batch, num_steps, length, -1)[:, :, num_conditioning:]
        predicted = self.predictor_proj(self.predictor_norm(x))
        return PredictorOutput(tokens + predicted if self.residual else predicted, kept)

    def _recomputes(self, x: Tensor) -> bool:
        """Say whether a pass over x [B, T*L, P] is to keep no activations inside its blocks."""
        if self.activation_checkpointing != "auto" or not torch.is_grad_enabled():
            return bool(self.activation_checkpointing) and torch.is_grad_enabled()
        if not x.is_cuda:
            return True
        size, width, hidden = x.element_size(), x.shape[2], self.predictor_blocks[0].mlp.fc1.out_features
        states = sum(weight.numel() * (16 if weight.requires_grad else 4) for weight in self.parameters())
        # Of a token and block, counted in bfloat16 and float32; a fifth more for what surrounds the blocks and for rollout steps.
        kept = len(self.predictor_blocks) * x.shape[0] * x.shape[1] * (7 * (1 + size) * width + 2 * size * hidden)
        return states + 1.2 * kept > 0.8 * torch.cuda.get_device_properties(x.device).total_memory

    def bytes_per_row(self, num_steps: int, num_kept: int, size: int) -> int:
        """Memory that one window of a pass without gradients takes, in numbers of `size` bytes; keys and values of `num_kept` steps are held."""
        width, hidden = self.predictor_proj.in_features, self.predictor_blocks[0].mlp.fc1.out_features
        # One block at a time: input, sum, norm and the MLP's two, or queries, keys and values twice; and a copy of the kept ones.
        block = num_steps * (5 * width + 2 * hidden) + 2 * num_kept * width
        kept = 2 * len(self.predictor_blocks) * num_kept * width
        frames = (
            4 * num_steps * 4 * self.grid[0] * self.grid[1] * self.embed_dim
        )  # float32: read, predicted, normed, compared
        return size * self.tokens_per_step * (block + kept) + frames

    def _check_shapes(
        self,
        tokens: Tensor,
        actions: Tensor,
        states: Tensor,
        past: Sequence[KeysValues] | None,
    ) -> None:
        expected = {
            "tokens": (tokens, (self.grid[0] * self.grid[1], self.embed_dim)),
            "actions": (actions, (self.action_dim,)),
            "states": (states, (self.state_dim,)),
        }
        for name, (array, widths) in expected.items():
            if array.shape != (*tokens.shape[:2], *widths) or not tokens.numel():
                raise ValueError(
                    f"predictor: {name} must be [B, T, {', '.join(map(str, widths))}] for tokens {list(tokens.shape)} of at least one "
                    f"step on a grid of {self.grid[0]}x{self.grid[1]}, got {list(array.shape)}"
                )
        if past is None:
            return
        if len(past) != len(self.predictor_blocks):
            raise ValueError(
                f"predictor: past holds {len(past)} blocks, the predictor has {len(self.predictor_blocks)}"
            )
        shape = past[0][0].shape
        if len(shape) != 4 or shape[0] != tokens.shape[0] or shape[2] % self.tokens_per_step or shape[2] == 0:
            raise ValueError(
                f"predictor: past must hold keys and values [B={tokens.shape[0]}, heads, steps*{self.tokens_per_step}, "
                f"{self.head_width}], got {list(shape)}"
            )
