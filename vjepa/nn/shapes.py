"""What the network's signatures are written in: shapes (jaxtyping) and the settings of a run (pydantic).

Where those packages are not installed the notation means nothing and the network runs all the same, so that an exported
model loads with torch and safetensors alone (`vjepa.load_encoder`).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8

    from vjepa.nn.settings import Model, Transformer
else:
    try:
        from jaxtyping import Bool, Float, Int, UInt8
    except ModuleNotFoundError:

        class Shape:
            """Any shape: `Shape[Tensor, "B N D"]` is no more than a word."""

            def __class_getitem__(cls, _: object) -> Any:
                return Any

        Bool = Float = Int = UInt8 = Shape
    try:
        from vjepa.nn.settings import Model, Transformer
    except ModuleNotFoundError:
        Model = Transformer = Any

__all__ = ["Bool", "Float", "Int", "Model", "Transformer", "UInt8"]
