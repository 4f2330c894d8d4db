"""A trained model at inference: an encoder, and the other networks that its method trained.

    model = vjepa.load("runs/demo")               a run, a checkpoint, a native export or a Hugging Face folder
    model.encode(frames)                          every model
    model.predict(frames, visible, hidden)        models with a masked predictor (V-JEPA 2 and 2.1)
    model.rollout(frames, actions)                models with a dynamics predictor
    model.remember(frames)                        models with a memory
    model.stream(window=16)                       causal models with true rotary positions

The networks other than the encoder are listed in `PARTS`. Each is recognized by the names of its tensors and never by
the method that trained it. A new network is an entry there. Loading, export and this class stay as they are.

This module imports torch and our networks alone, so that a native export loads without our other dependencies.

Letters: B clips, T frames, H W pixels, t h w the grid of tokens, V visible and K hidden tokens, D width, LD width times
levels, S steps of a rollout, A channels of an action.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjepa.nn.frame_dynamics import FrameDynamics
from vjepa.nn.grid import Grid, clip_grid
from vjepa.nn.latent_dynamics import LatentDynamics
from vjepa.nn.memory import ClipMemory
from vjepa.nn.predictor import Predictor, PredictorInput
from vjepa.nn.shapes import Float, Int, Model, UInt8
from vjepa.weights.tensors import Tensors
from vjepa.weights.video_encoder import VideoEncoder, check_frames
from vjepa.weights.video_stream import VideoStream
from vjepa_data.errors import BadInput

Capability = Literal["encode", "predict", "rollout", "remember"]

Shape = Callable[[str], tuple[int, ...]]
"""Shape of a tensor, by its full name."""


@dataclass(frozen=True)
class PartKind:
    """A kind of network that a model may have in addition to its encoder."""

    name: str
    """Prefix of its tensors, and its name in `WorldModel.parts`."""

    marker: str
    """Tensor that only this kind has. Other networks with the same prefix (a projector) are ignored."""

    build: Callable[[Model, Shape], nn.Module]
    """Build the network from the model's settings and the shapes of its tensors."""

    capability: Capability
    """Method of `WorldModel` that the network enables."""

    methods: tuple[str, ...]
    """Names of the methods that train it, for error texts."""


PARTS = (
    PartKind(
        name="predictor",
        marker="predictor.mask_tokens",
        build=lambda model, shape: Predictor(model, shape("predictor.mask_tokens")[0]),
        capability="predict",
        methods=("vjepa2", "vjepa2_1"),
    ),
    PartKind(
        name="dynamics",
        marker="dynamics.projector.0.weight",
        build=LatentDynamics.of_shapes,
        capability="rollout",
        methods=("lewm",),
    ),
    PartKind(
        name="dynamics",
        marker="dynamics.scales.mean",
        build=FrameDynamics.of_shapes,
        capability="rollout",
        methods=("dynamics",),
    ),
    PartKind(
        name="memory",
        marker="memory.gate_state.weight",
        build=ClipMemory.of_shapes,
        capability="remember",
        methods=("memory",),
    ),
)


def part_kinds(names: Collection[str]) -> list[PartKind]:
    """Return the kinds of network, the encoder excepted, that have tensors of these names."""
    return [kind for kind in PARTS if kind.marker in names]


class WorldModel(nn.Module):
    """A frozen model. Move it with `.to(device)`. Frames and tokens must then be on that device.

    Gradients flow from results to floating-point inputs, never into the parameters.

    Attributes:
        encoder: the encoder alone.
        parts: the other networks, by name.
        px: height and width of the clips that the model was trained on last.
        frames: frames per clip.
        fps: frames per second of video time.
        provenance: run, step, settings and corpora, as far as they are known.
    """

    def __init__(
        self, model: Model, tensors: Tensors, *, px: int, frames: int, fps: float, provenance: Mapping[str, Any]
    ) -> None:
        """Build all networks on the CPU, usually through `vjepa.load`.

        Args:
            model: sizes, patch, positions.
            tensors: `encoder.*`, and the tensors of the other parts under their names.
            px, frames, fps: form of the clips that the model was trained on last.
            provenance: where the model came from.
        """
        super().__init__()
        self.encoder = VideoEncoder(model, tensors, px=px, frames=frames, fps=fps, provenance=provenance)
        self.model, self.px, self.frames, self.fps = model, px, frames, fps
        self.provenance = provenance
        self._kinds = part_kinds(tensors.names)
        self.parts = nn.ModuleDict()
        for kind in self._kinds:
            with torch.device("meta"):
                part = kind.build(model, tensors.find_shape)
            part.load_state_dict(tensors.part(kind.name), assign=True)
            self.parts[kind.name] = part
        self.eval().requires_grad_(False)

    @property
    def predictor(self) -> Predictor | None:
        """Masked predictor, or None."""
        found = self._find("predict")
        assert found is None or isinstance(found, Predictor)
        return found

    @property
    def width(self) -> int:
        """Channels of a feature."""
        return self.encoder.width

    @property
    def levels(self) -> int:
        """Levels of features that `predict` and `targets` give side by side. Most models have 1."""
        return max(1, len(self.model.levels))

    @property
    def capabilities(self) -> frozenset[Capability]:
        """The subset of `encode`, `predict`, `rollout` and `remember` that this model supports."""
        return frozenset(("encode", *(kind.capability for kind in self._kinds)))

    def encode(self, frames: UInt8[Tensor, "B T H W C"], *, levels: bool = False) -> Float[Tensor, "B t h w LD"]:
        """Encode RGB clips of equal shape.

        Args:
            frames: H and W are multiples of the patch, T of the tubelet. A still picture (T = 1) fills a tubelet.
            levels: return all levels side by side, the last block's last. By default the last block alone, L = 1.

        Raises:
            BadInput: the frames have another form.

        Example:
            >>> model = vjepa.load("model-native")
            >>> model.encode(torch.zeros(2, 16, 256, 256, 3, dtype=torch.uint8)).shape
            torch.Size([2, 8, 16, 16, 1024])
        """
        grid = self.encoder.grid(frames)
        return self.encoder.features(frames, levels=levels).unflatten(1, (grid.t, grid.h, grid.w))

    def stream(self, window: int | None = None) -> VideoStream:
        """Begin to encode a video without end, tubelet by tubelet in constant memory (see `VideoStream`).

        Args:
            window: tubelets that a token attends to, its own included. By default `model.window`, else the tubelets
                of the clips that the model was trained on.

        Raises:
            BadInput: the encoder attends to later tubelets, or its positions are not a rotation.
        """
        return self.encoder.stream(window)

    def targets(self, frames: UInt8[Tensor, "B T H W C"]) -> Float[Tensor, "B t h w LD"]:
        """Return the features that `predict` approximates: all levels, each layer-normed without scale and shift.

        Exact for `part="target"`, the encoder that gave the targets in training.
        """
        features = self.encode(frames, levels=True).unflatten(-1, (self.levels, -1))
        return F.layer_norm(features.float(), features.shape[-1:]).flatten(-2)

    def predict(
        self,
        context: UInt8[Tensor, "B T H W C"] | Float[Tensor, "B V LD"],
        visible: Int[Tensor, "B V"],
        hidden: Int[Tensor, "B K"],
        *,
        mask_kind: int = 0,
        grid: Grid | None = None,
        still: bool = False,
    ) -> Float[Tensor, "B K LD"]:
        """Predict the features of hidden tokens from the visible tokens of the same clips.

        A token's id is `(t * grid.h + row) * grid.w + column`. Ids of a clip may come in any order and need not cover
        the clip. Training encodes the context with the trained encoder (`part="encoder"`) and predicts the features of
        the moving average (`part="target"`).

        Args:
            context: frames, of which only the visible tokens are encoded, or features of the visible tokens, of all
                levels, as `encoder.features(frames, visible, levels=True)` returns them.
            visible: ids of the visible tokens.
            hidden: ids of the tokens to predict.
            mask_kind: which mask token stands for hidden tokens: the place of its kind in the masks of the run.
            grid: grid of the clips. Only needed with features, and only if the clips do not have the size that the
                model was trained on.
            still: the features come from still pictures. Only for features, and for a model with `still_tokens`.

        Returns:
            Features to compare with `targets`, all levels side by side.

        Raises:
            BadInput: the model has no masked predictor, or the arguments do not fit each other.

        Example:
            >>> model = vjepa.load("runs/demo")
            >>> frames = torch.zeros(1, 8, 64, 64, 3, dtype=torch.uint8)
            >>> tokens = torch.arange(model.encoder.grid(frames).tokens)[None]
            >>> past, future = tokens.chunk(2, dim=1)
            >>> predicted = model.predict(frames, past, future)
            >>> actual = model.targets(frames).flatten(1, 3)[:, future[0]]
            >>> surprise = (predicted - actual).abs().mean()
        """
        predictor = self._require("predict")
        if not isinstance(context, Tensor):
            check_frames(context)
        if context.dtype == torch.uint8:
            grid, still = self.encoder.grid(context), context.shape[1] == 1
        elif grid is None:
            grid = clip_grid(1 if still else self.frames, self.px, self.model)
        self._check_tokens(visible, hidden, mask_kind, grid)
        if context.dtype == torch.uint8:
            context = self.encoder.features(context, visible, levels=True)
        expected = (*visible.shape, self.levels * self.width)
        if tuple(context.shape) != expected:
            raise BadInput(
                f"features of the visible tokens are {list(expected)}, got {list(context.shape)}. "
                "Take them from model.encoder.features(frames, visible, levels=True)."
            )
        return predictor([PredictorInput(context, visible, hidden, grid, mask_kind, still=still)])[0]

    def rollout(
        self, frames: UInt8[Tensor, "B T H W C"], actions: Float[Tensor, "B V A"]
    ) -> Float[Tensor, "B S h w D"]:
        """Predict the latents of the next S frames under actions.

        Args:
            frames: the frames that are known, at the rate of the model's clips.
            actions: actions in their own units: the actions between the known frames, then an action for each step to
                predict, V = T - 1 + S. Of a model with states, each action is followed by the state of the frame before
                it.

        Returns:
            Latents to compare with `latents`. A model whose latents are vectors has h = w = 1.

        Raises:
            BadInput: the model has no dynamics predictor, or the actions do not fit.

        Example:
            >>> model = vjepa.load("runs/lewm_two_room")
            >>> frames = torch.zeros(1, 1, 64, 64, 3, dtype=torch.uint8)
            >>> model.rollout(frames, torch.zeros(1, 16, 2)).shape
            torch.Size([1, 16, 1, 1, 32])
        """
        return self._require("rollout").rollout(self.encoder, frames, actions)

    def rollout_from(
        self, latents: Float[Tensor, "B T h w D"], actions: Float[Tensor, "B V A"]
    ) -> Float[Tensor, "B S h w D"]:
        """Predict as `rollout` does, from the latents of the known frames: a planner encodes a frame once.

        Raises:
            BadInput: the model has no dynamics predictor, or the actions do not fit.
        """
        return self._require("rollout").rollout_from(latents, actions)

    def latents(self, frames: UInt8[Tensor, "B T H W C"]) -> Float[Tensor, "B T h w D"]:
        """Encode each frame alone, to the latents that `rollout` predicts.

        Raises:
            BadInput: the model has no dynamics predictor, or the frames have another form.
        """
        return self._require("rollout").latents(self.encoder, frames)

    def remember(
        self, frames: UInt8[Tensor, "B K T H W C"], state: Float[Tensor, "B m D"] | None = None
    ) -> Float[Tensor, "B K m D"]:
        """Return the memory after each of K consecutive clips of B videos.

        Args:
            frames: the clips, in order, at the rate of the model's clips.
            state: the memory before them, `remember(earlier)[:, -1]`. By default nothing has been seen.

        Returns:
            A vector for each cell of a coarse grid, row by row.

        Raises:
            BadInput: the model has no memory, or the frames have another form.
        """
        memory = self._require("remember")
        cells = memory.read(self.encode(frames.flatten(0, 1)))
        return memory.remember(cells.unflatten(0, frames.shape[:2]), state)

    def _find(self, capability: Capability) -> nn.Module | None:
        return next((self.parts[kind.name] for kind in self._kinds if kind.capability == capability), None)

    def _require(self, capability: Capability) -> Any:
        part = self._find(capability)
        if part is None:
            able = [name for kind in PARTS if kind.capability == capability for name in kind.methods]
            remedy = f"load a model trained by {' or '.join(able)}" if able else "no method of this version can"
            parts = ", ".join(["encoder", *self.parts])
            raise BadInput(f"this model cannot {capability}: its parts are {parts}; {remedy}")
        return part

    def _check_tokens(self, visible: Tensor, hidden: Tensor, mask_kind: int, grid: Grid) -> None:
        for name, ids in (("visible", visible), ("hidden", hidden)):
            if ids.ndim != 2 or ids.dtype != torch.int64 or not ids.numel():
                kind = str(ids.dtype).removeprefix("torch.")
                raise BadInput(f"{name} token ids are int64 [B N], got {kind} {list(ids.shape)}")
            low, high = (int(end) for end in ids.aminmax())
            if low < 0 or high >= grid.tokens:
                wrong = low if low < 0 else high
                raise BadInput(f"{name} has token {wrong}, and the clips have tokens 0 to {grid.tokens - 1}")
        kinds = len(self._require("predict").mask_tokens)
        if not 0 <= mask_kind < kinds:
            raise BadInput(f"mask_kind is {mask_kind}, and the model has mask tokens 0 to {kinds - 1}")
