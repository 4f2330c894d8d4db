"""Sizes of the networks and their variants. Never imports torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vjepa_data.settings import Settings

# name: (width, depth, heads, mlp_ratio). V-JEPA 2 (arXiv:2506.09985), table of model sizes. ViT-g has heads of 64
# channels, as in the released model.
ENCODERS: dict[str, tuple[int, int, int, float]] = {
    "vit_tiny": (192, 12, 3, 4.0),
    "vit_small": (384, 12, 6, 4.0),
    "vit_base": (768, 12, 12, 4.0),
    "vit_large": (1024, 24, 16, 4.0),
    "vit_huge": (1280, 32, 16, 4.0),
    "vit_giant": (1408, 40, 22, 48 / 11),
    "vit_gigantic": (1664, 48, 26, 64 / 13),
}


class Transformer(Settings):
    """Size of a stack of transformer blocks."""

    width: int = Field(ge=8)
    """Channels of a token."""

    depth: int = Field(ge=1)
    """Blocks."""

    heads: int = Field(ge=1)
    """Attention heads. Must divide the width."""

    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden channels of the MLP over the width."""

    @model_validator(mode="after")
    def _divisible(self) -> "Transformer":
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be divisible by heads ({self.heads})")
        if self.width // self.heads % 2 or self.width // self.heads < 6:
            raise ValueError(
                f"width / heads ({self.width} / {self.heads}) must be even and at least 6, so that its channels can "
                "rotate in pairs with time, height and width"
            )
        return self


class EncoderSize(Transformer):
    """Size of the encoder: a registry name, or its numbers."""

    name: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_giant", "vit_gigantic", "custom"]
    """Registry name, or `custom` with all numbers given."""

    @model_validator(mode="before")
    @classmethod
    def _from_registry(cls, given: object) -> object:
        if isinstance(given, str):
            given = {"name": given}
        if isinstance(given, dict) and given.get("name", "custom") not in (*ENCODERS, "custom"):
            raise ValueError(f"expected {', '.join(ENCODERS)} or custom, got {given['name']!r}")
        if isinstance(given, dict) and given.get("name") in ENCODERS:
            sizes = dict(zip(("width", "depth", "heads", "mlp_ratio"), ENCODERS[given["name"]], strict=True))
            given = {**sizes, **given}
        return given


class Model(Settings):
    """Encoder and predictor."""

    encoder: EncoderSize
    """A registry name (`vit_large`), or `{name: custom, width: 96, depth: 4, heads: 3}`."""

    predictor: Transformer = Transformer(width=384, depth=12, heads=12)
    """Narrow transformer that predicts the features of hidden tokens, or of the next frame."""

    window: int | None = Field(default=None, ge=1)
    """Reach of attention that looks back, the newest included: tubelets in a causal encoder, frames in a dynamics
    predictor. By default all earlier tubelets of the clip. A stream (`vjepa embed --stream`) takes it as its window."""

    condition: Literal["adaln", "token"] = "adaln"
    """How actions enter a dynamics predictor: they scale, shift and gate its blocks, or they are tokens
    (V-JEPA 2-AC)."""

    patch_px: int = Field(default=16, ge=1)
    """Height and width of a token, in pixels."""

    tubelet_frames: int = Field(default=2, ge=1)
    """Frames in a token."""

    init_std: Annotated[float, Field(gt=0)] | Literal["fan_in"] = 0.02
    """Standard deviation of initial weights. V-JEPA 2 uses 0.02, for widths around 1,024. `fan_in` is 1 / sqrt(inputs)
    for each matrix, with which tiny models learn faster."""

    rope: Literal["tiled", "interleaved", "sincos"] = "tiled"
    """3-D positions. Rotary: `tiled` is V-JEPA 2's form, which Hugging Face can express. `interleaved` is a true
    rotation (V-JEPA 2.1). Not rotary: `sincos` adds the sines and cosines of the first V-JEPA to the tokens."""

    rope_cells: int | None = Field(default=None, ge=2)
    """Stretch the rows and columns of any picture to this many, so that positions keep their meaning when the
    resolution changes (V-JEPA 2.1: 16). By default positions are counted."""

    levels: tuple[int, ...] = ()
    """Blocks, counted from 0, whose features are predicted side by side. The last block must be among them. By default
    the last block alone. V-JEPA 2.1 takes the ends of quarters: [5, 11, 17, 23] of 24."""

    predict_context: bool = False
    """Predict the features of visible tokens too, through a separate output layer (V-JEPA 2.1)."""

    still_tokens: bool = False
    """Embed still pictures with a patch embedding of one frame, and mark pictures and clips with a learned embedding
    each (V-JEPA 2.1). By default a still picture is repeated to fill a tubelet."""

    causal: bool = False
    """In the encoder a token attends to its own tubelet and earlier tubelets only (LeVJEPA's block-causal attention),
    which needs sdpa. By default it attends to the full clip."""

    class_token: bool = False
    """Add a token to the encoder that represents the clip (LeVJEPA). With `causal` it attends to all tokens and no
    token attends to it."""

    @model_validator(mode="after")
    def _ends_at_the_last(self) -> "Model":
        depth = self.encoder.depth
        if self.levels and (list(self.levels) != sorted(set(self.levels)) or self.levels[-1] != depth - 1):
            raise ValueError(
                f"levels {list(self.levels)} must ascend and end at the last block ({depth - 1}); "
                f"try {[(i + 1) * depth // 4 - 1 for i in range(4)] if depth >= 4 else [depth - 1]}"
            )
        return self
