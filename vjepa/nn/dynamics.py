"""The dynamics predictor: latents of frames and the actions between them, to the latent of the next frame.

    latents   z0  z1  z2              frame t attends to frames t - window + 1 .. t, itself included
    actions   a0  a1  a2              a_t acts between frame t and frame t + 1
    output    p1  p2  p3              p_{t+1} approximates z_{t+1}

Attention is causal over frames without a mask over tokens: the queries of a frame meet a slice of the keys. A cache of
keys and values makes a step of a rollout cost one frame, with the same result as the full pass.

Actions, and states if any, enter in one of two ways:

    adaln   they scale, shift and gate every block (adaptive layer norm, arXiv:2212.09748); the output is a change of z
    token   they are tokens in front of the frame's own, at its time and row and column 0, which equals the rotation in
            time alone of V-JEPA 2-AC (arXiv:2506.09985); parameters have the names and shapes of its predictor

Letters: B clips, T frames, N tokens of a frame, S = T N tokens, K keys, E channels of a latent, A channels of an
action, C of a state, D width, H heads, d channels of a head.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjepa.nn.blocks import MLP, NORM_EPS
from vjepa.nn.grid import Grid
from vjepa.nn.init import init_weights
from vjepa.nn.positions import Rotation, rotate, rotations
from vjepa.nn.shapes import Float, Model, Transformer

FIRST_CHANGE = 0.01
"""Scale of the first predicted changes of latents. Rollouts of large random changes would pull latents that are learned
together with the predictor to a point, before they mean anything."""


class Past(NamedTuple):
    """Keys and values of the earlier frames of a block."""

    keys: Float[Tensor, "B S H d"]
    values: Float[Tensor, "B S H d"]


class Cache(NamedTuple):
    """The past of every block, and the number of frames that have been seen."""

    blocks: tuple[Past, ...]
    frames: int


class FrameAttention(nn.Module):
    """Multi-head attention of each frame to a window of frames that ends with it."""

    def __init__(self, settings: Transformer):
        super().__init__()
        self.heads = settings.heads
        self.qkv = nn.Linear(settings.width, 3 * settings.width)
        self.proj = nn.Linear(settings.width, settings.width)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        rotation: Rotation | None,
        *,
        tokens: int,
        window: int | None,
        past: Past | None,
    ) -> tuple[Float[Tensor, "B S D"], Past]:
        """Args:
        x: tokens of the new frames.
        rotation: rotation of each new token, the same for all clips. None if each attends to itself alone.
        tokens: tokens of a frame, N.
        window: frames to attend to, with the frame itself. None for all.
        past: keys and values of earlier frames.
        """
        if rotation is None:
            width = x.shape[-1]
            values = F.linear(x, self.qkv.weight[2 * width :], self.qkv.bias[2 * width :])
            nothing = values[:, :0].unflatten(-1, (self.heads, -1))
            return self.proj(values), Past(nothing, nothing)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B S 3 H d]
        queries, keys = rotate(qkv[:, :, :2], rotation).unbind(2)
        values = qkv[:, :, 2]
        if past is not None:
            keys, values = torch.cat((past.keys, keys), dim=1), torch.cat((past.values, values), dim=1)
        attended = _attend(queries, keys, values, tokens=tokens, window=window)
        kept = 0 if window is None else max(0, keys.shape[1] - (window - 1) * tokens)
        return self.proj(attended.flatten(2)), Past(keys[:, kept:], values[:, kept:])


def _attend(
    queries: Float[Tensor, "B S H d"],
    keys: Float[Tensor, "B K H d"],
    values: Float[Tensor, "B K H d"],
    *,
    tokens: int,
    window: int | None,
) -> Float[Tensor, "B S H d"]:
    """Attend from the tokens of each of the last frames to its window, K >= S.

    A frame of several tokens meets a slice of the keys. Frames of one token share a call, with a mask of frames by
    frames.
    """
    length, total = queries.shape[1], keys.shape[1]
    q, k, v = (each.transpose(1, 2) for each in (queries, keys, values))  # [B H .. d]
    if tokens == 1:
        own = torch.arange(total - length, total, device=q.device)[:, None]
        age = own - torch.arange(total, device=q.device)
        mask = (age >= 0) & (age < (window or total))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    frames = []
    for start in range(0, length, tokens):
        end = total - length + start + tokens
        seen = slice(0 if window is None else max(0, end - window * tokens), end)
        own = slice(start, start + tokens)
        frames.append(F.scaled_dot_product_attention(q[:, :, own], k[:, :, seen], v[:, :, seen]))
    return torch.cat(frames, dim=2).transpose(1, 2)


class DynamicsBlock(nn.Module):
    """A pre-norm transformer layer over frames, which conditions may scale, shift and gate."""

    def __init__(self, settings: Transformer, *, is_modulated: bool):
        super().__init__()
        norm = {"eps": NORM_EPS, "elementwise_affine": not is_modulated}
        self.norm1 = nn.LayerNorm(settings.width, **norm)
        self.attn = FrameAttention(settings)
        self.norm2 = nn.LayerNorm(settings.width, **norm)
        self.mlp = MLP(settings)
        self.modulation = nn.Linear(settings.width, 6 * settings.width) if is_modulated else None

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        condition: Float[Tensor, "B T D"] | None,
        rotation: Rotation | None,
        tokens: int,
        window: int | None,
        past: Past | None,
    ) -> tuple[Float[Tensor, "B S D"], Past]:
        """Args are positional, as recomputation passes them on, and as in `FrameAttention.forward`."""
        ask = {"tokens": tokens, "window": window, "past": past}
        if self.modulation is None or condition is None:
            attended, seen = self.attn(self.norm1(x), rotation, **ask)
            x = x + attended
            return x + self.mlp(self.norm2(x)), seen
        changes = self.modulation(F.silu(condition))
        if tokens > 1:
            changes = changes.repeat_interleave(tokens, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = changes.chunk(6, dim=-1)
        attended, seen = self.attn(self.norm1(x) * (1 + scale1) + shift1, rotation, **ask)
        x = x + (1 + gate1) * attended
        return x + (1 + gate2) * self.mlp(self.norm2(x) * (1 + scale2) + shift2), seen


class DynamicsPredictor(nn.Module):
    """Frame-causal transformer from latents and actions to the next latents."""

    def __init__(self, settings: Model, *, latent: int, actions: int, states: int = 0):
        """Build the predictor without initializing it.

        Args:
            settings: `predictor` for the size, `window`, `condition`, positions.
            latent: channels of a token of a latent, E.
            actions: channels of an action, A.
            states: channels of a state, C, or 0 for none.
        """
        super().__init__()
        self.settings, size = settings, settings.predictor
        self.size, self.window = size, settings.window
        self.form: Literal["tiled", "interleaved"] = "interleaved" if settings.rope == "sincos" else settings.rope
        self.predictor_embed = nn.Linear(latent, size.width)
        self.condition, self.states = settings.condition, states
        if self.condition == "token":
            self.action_encoder = nn.Linear(actions, size.width)
        else:
            self.action_encoder = nn.Sequential(
                nn.Linear(actions, size.width), nn.SiLU(), nn.Linear(size.width, size.width)
            )
        if states:
            self.state_encoder = nn.Linear(states, size.width)
        self.predictor_blocks = nn.ModuleList(
            DynamicsBlock(size, is_modulated=self.condition == "adaln") for _ in range(size.depth)
        )
        self.predictor_norm = nn.LayerNorm(size.width, eps=NORM_EPS)
        self.predictor_proj = nn.Linear(size.width, latent)

    def predict(
        self,
        latents: Float[Tensor, "B T N E"],
        actions: Float[Tensor, "B T A"],
        states: Float[Tensor, "B T C"] | None = None,
        *,
        cache: Cache | None = None,
        grid: tuple[int, int] = (1, 1),
    ) -> tuple[Float[Tensor, "B T N E"], Cache]:
        """Predict the latents of the frame after each given frame.

        Args:
            latents: the new frames.
            actions: the action after each of them.
            states: the state at each of them, for a predictor with states.
            cache: result of the call for the frames before. By default there are none.
            grid: rows and columns of the tokens of a frame, N = rows * columns.

        Returns:
            Predictions, and the cache for the frames that follow.
        """
        frames, cells = latents.shape[1:3]
        seen = cache.frames if cache else 0
        dtype = self.predictor_embed.weight.dtype
        x = self.predictor_embed(latents.to(dtype))  # [B T N D]
        ids = torch.arange(seen * cells, (seen + frames) * cells, device=x.device).view(frames, cells)
        extra, modulation = self._condition(actions.to(dtype), None if states is None else states.to(dtype))
        if extra is not None:
            x = torch.cat((extra, x), dim=2)
            ids = torch.cat((ids[:, :1].expand(-1, extra.shape[2]), ids), dim=1)
        tokens = x.shape[2]
        rotation = None
        if torch.is_grad_enabled() or not frames == tokens == self.window == 1:
            rotation = rotations(
                [(Grid(seen + frames, *grid), ids.flatten()[None])],
                head_width=self.size.width // self.size.heads,
                form=self.form,
            )
        x = x.flatten(1, 2)  # [B S D]
        pasts: Sequence[Past | None] = cache.blocks if cache else [None] * len(self.predictor_blocks)
        after = []
        for block, past in zip(self.predictor_blocks, pasts, strict=True):
            x, past = block(x, modulation, rotation, tokens, self.window, past)
            after.append(past)
        x = x.unflatten(1, (frames, tokens))[:, :, tokens - cells :]
        predicted = self.predictor_proj(self.predictor_norm(x)).to(latents.dtype)
        if self.condition == "adaln":
            predicted = latents + predicted
        return predicted, Cache(tuple(after), seen + frames)

    def _condition(
        self, actions: Float[Tensor, "B T A"], states: Float[Tensor, "B T C"] | None
    ) -> tuple[Float[Tensor, "B T _K D"] | None, Float[Tensor, "B T D"] | None]:
        """Return condition tokens in front of each frame, or the conditions that modulate the blocks."""
        assert (states is not None) == bool(self.states), "states are given if and only if the predictor has them"
        parts = [self.action_encoder(actions)]
        if states is not None:
            parts.append(self.state_encoder(states))
        if self.condition == "adaln":
            return None, torch.stack(parts).sum(0)
        return torch.stack(parts, dim=2), None

    def init_weights(self, seed: int = 0) -> None:
        """Initialize all parameters. Call it after `to_empty` if the predictor was built on the meta device."""
        init_weights(self, seed=seed, name="dynamics", std=self.settings.init_std)
        if self.condition == "adaln":
            with torch.no_grad():
                self.predictor_proj.weight.mul_(FIRST_CHANGE)

    def predict_steps(
        self,
        latents: Float[Tensor, "B T N E"],
        actions: Float[Tensor, "B U A"],
        states: Float[Tensor, "B U C"] | None = None,
        *,
        grid: tuple[int, int] = (1, 1),
        detach: bool = False,
        transform: Callable[[Tensor], Tensor] = lambda latents: latents,
    ) -> Float[Tensor, "B S N E"]:
        """Predict from given latents, then from predictions alone.

        Args:
            latents: latents of the first T frames.
            actions: the action after each of the frames before the last prediction, U >= T.
            states: the state at each of these frames, for a predictor with states.
            grid: rows and columns of the tokens of a frame.
            detach: let no gradient flow from a step into the steps before it.
            transform: applied to every prediction.

        Returns:
            Predictions of the frames T to U, counted from 0: S = U - T + 1.
        """

        def part(first: int, last: int) -> tuple[Tensor, Tensor | None]:
            return actions[:, first:last], None if states is None else states[:, first:last]

        given = latents.shape[1]
        predicted, cache = self.predict(latents, *part(0, given), grid=grid)
        found = [transform(predicted[:, -1:])]
        for step in range(given, actions.shape[1]):
            newest = found[-1].detach() if detach else found[-1]
            predicted, cache = self.predict(newest, *part(step, step + 1), cache=cache, grid=grid)
            found.append(transform(predicted))
        return torch.cat(found, dim=1)
