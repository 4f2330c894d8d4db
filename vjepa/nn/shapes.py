"""Types of the network's signatures: shapes (jaxtyping) and the settings of a model (pydantic).

Where these packages are not installed, the types are placeholders and the network runs all the same. An exported model
therefore loads with torch and safetensors alone (`vjepa.load`).
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
            """Placeholder that accepts any shape: `Shape[Tensor, "B N D"]`."""

            def __class_getitem__(cls, _: object) -> Any:
                return Any

        Bool = Float = Int = UInt8 = Shape
    try:
        from vjepa.nn.settings import Model, Transformer
    except ModuleNotFoundError:
        Model = Transformer = Any

__all__ = ["Bool", "Float", "Int", "Model", "Transformer", "UInt8"]
