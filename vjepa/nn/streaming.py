"""A causal encoder over a video without end: keys and values of the last tubelets, updated tubelet by tubelet.

    tubelet t  --embed-->  x  --block--> .. --block-->  features of tubelet t
                                 |
                   keys and values of tubelets t - W + 1 .. t, a ring per block:  slot t % W is the newest

Features of tubelet t equal the features of a single pass over the whole video, in which a token attends to its own
tubelet and to the W - 1 before it (`model.window: W`). A pass over the last W tubelets alone would differ: the keys of
a deep block also saw tubelets that have left the ring since, so features reach back depth * (W - 1) tubelets.

Keys are rotated at their time since the start of the stream. Rotary products depend on differences of times only, if
the form is a true rotation (`interleaved`). Times are counted in integers and their angles are computed in fp64, so
that a stream may run for years.

Letters: B streams, T frames, Y X pixels, k new tubelets, n tokens of a tubelet, W tubelets of the window, D width,
H heads, d channels of a head, L blocks.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjepa.nn.blocks import Block
from vjepa.nn.encoder import MEAN, STD, Encoder
from vjepa.nn.grid import Grid
from vjepa.nn.positions import Rotation, axis_channels, axis_speeds, rotations
from vjepa.nn.shapes import Float, Int, Model, UInt8
from vjepa_data.errors import BadInput

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(block, queries, keys, values), each [B k n H d], to attended values [B k n H d]."""


def check_streamable(model: Model) -> None:
    """Check that features of a tubelet depend on the past alone and positions on differences of times.

    Raises:
        BadInput: they do not. The text names the settings to train with.
    """
    remedy = "train with model.causal: true and model.rope: interleaved, as configs/vjepa2_causal_vitb16_224px_32f.yaml"
    if not model.causal:
        raise BadInput(f"this model cannot stream: its tokens attend to later tubelets as well; {remedy}")
    if model.rope != "interleaved":
        reason = "are not a rotation" if model.rope == "tiled" else "are added to the tokens"
        raise BadInput(
            f"this model cannot stream: its positions (model.rope: {model.rope}) {reason}, so attention depends on "
            f"the time since the start and not on differences; {remedy}"
        )


def embed_tubelets(encoder: Encoder, pixels: Float[Tensor, "B C T Y X"], grid: Grid) -> Float[Tensor, "B k n D"]:
    """Embed normalised pixels as tokens of tubelets. A class token comes first in each tubelet."""
    x = encoder.patch_embed(pixels)
    if encoder.settings.still_tokens:
        x = x + encoder.video_mod_embed.to(x.dtype)
    x = x.unflatten(1, (grid.t, grid.cells))
    if encoder.settings.class_token:
        x = torch.cat((encoder.cls_token.to(x.dtype).expand(*x.shape[:2], 1, -1), x), dim=2)
    return x


class TubeletRotation:
    """Rotary positions of the tokens of a tubelet at any time."""

    def __init__(self, model: Model, grid: Grid, device: torch.device) -> None:
        size = model.encoder
        self.head_width = size.width // size.heads
        ids = torch.arange(grid.cells, device=device)[None]
        # The token of time, row and column 0 is not rotated, as is a class token.
        positions = [(Grid(1, 1, 1), ids[:, :1])] if model.class_token else []
        self.still = rotations(
            [*positions, (Grid(1, grid.h, grid.w), ids)],
            head_width=self.head_width, form="interleaved", cells=model.rope_cells,
        )  # fmt: skip
        self.class_tokens = len(positions)
        self.speeds = axis_speeds(self.head_width, device).double()

    def at(self, times: Int[Tensor, " k"]) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [k n 1 1 d] of tubelets at these times."""
        turns = times[:, None].double() * (self.speeds / (2 * torch.pi))
        angles = ((turns - turns.floor()) * (2 * torch.pi)).float().repeat_interleave(2, dim=-1)
        channels = axis_channels(self.head_width)
        found = []
        for still, moved in zip(self.still, (angles.cos(), angles.sin()), strict=True):
            tokens = moved[:, None].expand(-1, len(still) - self.class_tokens, -1)
            tokens = torch.cat((still[: self.class_tokens, 0, 0, :channels].expand(len(times), -1, -1), tokens), dim=1)
            space = still[:, 0, 0, channels:].expand(len(times), -1, -1)
            found.append(torch.cat((tokens, space), dim=-1)[:, :, None, None])
        return found[0], found[1]


def run_blocks(
    encoder: Encoder, x: Float[Tensor, "B k n D"], rotation: tuple[Tensor, Tensor], attend: Attend
) -> Float[Tensor, "B k n D"]:
    """Pass tubelets through all blocks and the last norm, with attention as a function."""
    shape, every = x.shape[:3], x.shape[0]
    packed = Rotation(*(table.flatten(0, 1).repeat(every, 1, 1, 1) for table in rotation))
    x = x.flatten(0, 2)
    for number, block in enumerate(encoder.blocks):
        assert isinstance(block, Block)
        q, k, v = (each.unflatten(0, shape) for each in block.attn.project(block.norm1(x), packed))
        x = x + block.attn.proj(attend(number, q, k, v).flatten(0, 2).flatten(1))
        x = x + block.mlp(block.norm2(x))
    return encoder.last_norm(x.unflatten(0, shape))


class EncoderStream:
    """Keys and values of the last tubelets of a video, and the encoder that goes on from them.

    Memory is allocated with the first frames and does not grow.
    """

    def __init__(self, encoder: Encoder, *, window: int) -> None:
        """Args:
        encoder: a causal encoder with true rotary positions.
        window: tubelets that a token attends to, its own included.

        Raises:
            BadInput: the encoder cannot stream.
        """
        check_streamable(encoder.settings)
        if window < 1:
            raise BadInput(f"the window of a stream is at least 1 tubelet, got {window}")
        self.encoder, self.window = encoder, window
        self.time = 0
        """Tubelets so far."""
        self.class_features: Float[Tensor, "B k D"] | None = None
        """Features of the class token after each tubelet of the last call, of a model that has one."""
        self._grid: Grid | None = None
        self._rotation: TubeletRotation | None = None
        self._keys: Tensor | None = None  # [L B H slots d]; a class token has slot 0, tubelets follow
        self._values: Tensor | None = None

    def __call__(self, pixels: Float[Tensor, "B C T Y X"]) -> Float[Tensor, "B k n D"]:
        """Encode the next whole tubelets. How frames are cut into calls does not matter.

        Raises:
            BadInput: the frames are not whole tubelets, or their number or size differs from the earlier frames.
        """
        settings = self.encoder.settings
        batch, _, frames, height, width = pixels.shape
        if frames % settings.tubelet_frames:
            raise BadInput(f"a stream takes whole tubelets of {settings.tubelet_frames} frames, got {frames} frames")
        grid = Grid(frames // settings.tubelet_frames, *_rows_and_columns(height, width, settings))
        self._begin(grid, batch, pixels.device)
        assert self._rotation is not None
        times = torch.arange(self.time, self.time + grid.t, device=pixels.device)
        x = embed_tubelets(self.encoder, pixels, grid)
        x = run_blocks(self.encoder, x, self._rotation.at(times), self._attend)
        self.time += grid.t
        if settings.class_token:
            self.class_features, x = x[:, :, 0], x[:, :, 1:]
        return x

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of the stream, from which `load_state_dict` goes on: a copy."""
        if self._keys is None or self._values is None or self._grid is None:
            return {"place": torch.tensor([0, 0, 0])}
        place = torch.tensor([self.time, self._grid.h, self._grid.w])
        return {"place": place, "keys": self._keys.clone(), "values": self._values.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where another stream of the same model and window was.

        Raises:
            BadInput: the state is of another model or window.
        """
        time, rows, columns = state["place"].tolist()
        if not time:
            self.time, self._grid, self._keys, self._values = 0, None, None, None
            return
        settings, keys, values = self.encoder.settings, state["keys"], state["values"]
        size = settings.encoder
        slots = int(settings.class_token) + self.window * rows * columns
        expected = (size.depth, keys.shape[1], size.heads, slots, size.width // size.heads)
        if tuple(keys.shape) != expected or keys.shape != values.shape:
            raise BadInput(
                f"the state of a stream has keys {list(keys.shape)}, and this model with a window of {self.window} "
                f"has {list(expected)}. Go on with the model and the window that began it."
            )
        weight = self.encoder.patch_embed.proj.weight
        self.time, self._grid = time, Grid(1, rows, columns)
        self._keys, self._values = (each.to(weight, copy=True) for each in (keys, values))
        self._rotation = TubeletRotation(settings, self._grid, weight.device)

    def _begin(self, grid: Grid, batch: int, device: torch.device) -> None:
        """Allocate the ring for the first frames, and check that later frames are of the same form."""
        settings = self.encoder.settings
        if self._keys is None:
            size = settings.encoder
            slots = int(settings.class_token) + self.window * grid.cells
            shape = (size.depth, batch, size.heads, slots, size.width // size.heads)
            weight = self.encoder.patch_embed.proj.weight
            self._keys, self._values = (torch.zeros(shape, dtype=weight.dtype, device=device) for _ in range(2))
            self._rotation, self._grid = TubeletRotation(settings, grid, device), grid
        assert self._grid is not None
        before, now = ((self._keys.shape[1], self._grid.h, self._grid.w), (batch, grid.h, grid.w))
        if before != now:
            raise BadInput(
                f"the stream began with {before[0]} videos of {before[1]} x {before[2]} tokens and goes on with "
                f"{now[0]} of {now[1]} x {now[2]}. Begin a new stream."
            )

    def _attend(self, number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store each new tubelet in its slot and attend to the filled slots: no mask, whatever the chunk."""
        assert self._keys is not None
        assert self._values is not None
        assert self._grid is not None
        keys, values, cells = self._keys[number], self._values[number], self._grid.cells
        extra = int(self.encoder.settings.class_token)
        q, k, v = (each.permute(1, 0, 3, 2, 4) for each in (q, k, v))  # [k B H n d]
        outputs = []
        for step, time in enumerate(range(self.time, self.time + len(q))):
            start = extra + time % self.window * cells
            end = extra + min(time + 1, self.window) * cells
            keys[:, :, start : start + cells] = k[step, :, :, extra:]
            values[:, :, start : start + cells] = v[step, :, :, extra:]
            out = F.scaled_dot_product_attention(q[step, :, :, extra:], keys[:, :, extra:end], values[:, :, extra:end])
            if extra:
                keys[:, :, :1], values[:, :, :1] = k[step, :, :, :1], v[step, :, :, :1]
                summary = F.scaled_dot_product_attention(q[step, :, :, :1], keys[:, :, :end], values[:, :, :end])
                out = torch.cat((summary, out), dim=2)
            outputs.append(out)
        return torch.stack(outputs).permute(1, 0, 3, 2, 4)


def _rows_and_columns(height: int, width: int, settings: Model) -> tuple[int, int]:
    grid = Grid.of(settings.tubelet_frames, height, width, settings)
    return grid.h, grid.w


class StreamStep(nn.Module):
    """A step of a stream without hidden state, for export: the cache is an input and an output.

    `keys` and `values` hold the W tubelets before, the newest last. A step drops the oldest. The first cache is zeros.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, *, window: int, px: int) -> None:
        """Args:
        encoder: a causal encoder with true rotary positions.
        window: tubelets that a token attends to, its own included.
        px: height and width of the frames.

        Raises:
            BadInput: the encoder cannot stream.
        """
        super().__init__()
        settings = encoder.settings
        check_streamable(settings)
        self.encoder, self.window = encoder, window
        self.grid = Grid.of(settings.tubelet_frames, px, px, settings)
        self.rotation = TubeletRotation(settings, self.grid, encoder.patch_embed.proj.weight.device)
        for name, value in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(value)[:, None, None, None])

    def empty(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, values and time of a stream that has not begun."""
        size = self.encoder.settings.encoder
        shape = (size.depth, batch, size.heads, self.window * self.grid.cells, size.width // size.heads)
        return torch.zeros(shape), torch.zeros(shape), torch.zeros(1, dtype=torch.int64)

    def forward(
        self,
        frames: UInt8[Tensor, "B T Y X C"],
        keys: Float[Tensor, "L B H Wn d"],
        values: Float[Tensor, "L B H Wn d"],
        time: Int[Tensor, " 1"],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode the next tubelet of each stream.

        Args:
            frames: the frames of a tubelet.
            keys, values: of the W tubelets before.
            time: number of tubelets before.

        Returns:
            Features of the tubelet [B n D], a class token's first. Keys, values and time for the next step.
        """
        cells, extra = self.grid.cells, int(self.encoder.settings.class_token)
        x = embed_tubelets(self.encoder, (frames.movedim(-1, 1).float() / 255 - self.mean) / self.std, self.grid)
        age = self.window - 1 - torch.arange(self.window * cells, device=frames.device) // cells
        seen = age <= time
        after: list[tuple[Tensor, Tensor]] = []

        def attend(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (each[:, 0].transpose(1, 2) for each in (q, k, v))  # [B H n d]
            every = [
                torch.cat((past[number][:, :, cells:], new[:, :, extra:]), dim=2)
                for past, new in ((keys, k), (values, v))
            ]
            after.append((every[0], every[1]))
            out = F.scaled_dot_product_attention(q[:, :, extra:], *every, attn_mask=seen[None, None, None])
            if extra:
                own = [torch.cat((each, new[:, :, :1]), dim=2) for each, new in zip(every, (k, v), strict=True)]
                mask = F.pad(seen, (0, 1), value=True)[None, None, None]
                out = torch.cat((F.scaled_dot_product_attention(q[:, :, :1], *own, attn_mask=mask), out), dim=2)
            return out.transpose(1, 2)[:, None]

        features = run_blocks(self.encoder, x, self.rotation.at(time), attend)[:, 0]
        return features, torch.stack([k for k, _ in after]), torch.stack([v for _, v in after]), time + 1
