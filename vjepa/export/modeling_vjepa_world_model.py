"""A world model for plain transformers: an encoder of frames and a predictor of the next latents under actions.

    model = AutoModel.from_pretrained("THIS FOLDER", trust_remote_code=True)
    model.latents(frames)                uint8 [B T H W C] to [B T h w D], each frame alone
    model.rollout(frames, actions)       the frames that are known, and the actions between and after them

`vjepa export` copies this file, with the network modules that it imports, to the folder of the weights. The copies need
torch and transformers alone.

Letters: B clips, T frames, H W pixels, h w rows and columns of tokens, D channels of a latent, V actions, A channels of
an action, S steps.
"""

import json
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from vjepa.nn.encoder import Encoder, View, normalise
from vjepa.nn.frame_dynamics import FrameDynamics
from vjepa.nn.latent_dynamics import LatentDynamics


class VJEPAWorldModelConfig(PretrainedConfig):
    """Sizes, the form of the clips, and the actions.

    Attributes:
        model: settings of the networks.
        dynamics: `frame`, or `latent` for a vector per frame.
        shapes: shapes of the tensors of the predictor.
        px, frames, fps: form of the clips that the model was trained on.
        actions: their signals, and the mean, standard deviation, name and unit of each channel.
    """

    model_type = "vjepa_world_model"

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        dynamics: str = "frame",
        shapes: dict[str, list[int]] | None = None,
        px: int = 64,
        frames: int = 1,
        fps: float = 1.0,
        actions: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        self.model, self.dynamics, self.shapes = model or {}, dynamics, shapes or {}
        self.px, self.frames, self.fps, self.actions = px, frames, fps, actions or {}
        super().__init__(**more)


class VJEPAWorldModel(PreTrainedModel):
    """A frozen encoder with a dynamics predictor."""

    config_class = VJEPAWorldModelConfig
    main_input_name = "frames"
    _supports_sdpa = True

    def __init__(self, config: VJEPAWorldModelConfig) -> None:
        super().__init__(config)
        self.sizes: Any = json.loads(json.dumps(config.model), object_hook=lambda group: SimpleNamespace(**group))
        kind = {"frame": FrameDynamics, "latent": LatentDynamics}[config.dynamics]
        self.encoder = Encoder(self.sizes)
        self.dynamics = kind.of_shapes(self.sizes, lambda name: tuple(config.shapes[name]))
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Do nothing: every tensor comes from the file."""

    def features(self, frames: Tensor) -> Tensor:
        """Encode uint8 clips [B T H W C] to tokens [B N D]. A single frame is repeated to fill a tubelet."""
        if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
            raise ValueError(f"frames are uint8 [B T H W 3], got {frames.dtype} {list(frames.shape)}")
        if frames.shape[1] == 1:
            frames = frames.expand(-1, self.sizes.tubelet_frames, -1, -1, -1)
        return self.encoder([View(normalise(frames).to(self.dtype))])[0]

    def latents(self, frames: Tensor) -> Tensor:
        """Encode each frame of uint8 [B T H W C] alone to [B T h w D], which `rollout` predicts."""
        return self.dynamics.latents(self, frames)

    def rollout(self, frames: Tensor, actions: Tensor) -> Tensor:
        """Predict the latents of the next S frames, [B S h w D].

        Args:
            frames: uint8 [B T H W C], the frames that are known, at `config.fps`.
            actions: [B V A] in their own units, V = T - 1 + S: the actions between the known frames, then an action for
                each step. Of a model with states, each action is followed by the state of the frame before it.
        """
        return self.dynamics.rollout(self, frames, actions)

    def forward(self, frames: Tensor, actions: Tensor | None = None) -> Tensor:
        """Return `rollout` if there are actions, else `latents`."""
        return self.latents(frames) if actions is None else self.rollout(frames, actions)
