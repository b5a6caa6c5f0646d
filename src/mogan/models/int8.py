"""Products in 8 bits: weights rounded once, per output, and activations at every call, per token (torchao); an option of streams."""

from typing import Any

from torch import nn

from mogan.errors import UserError


def in_int8(transformer: Any) -> Any:
    """The linear layers of a transformer's blocks compute in int8, in place; the rest as before. For sampling alone.

    Raises:
        UserError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise UserError(f"--precision int8 needs torchao ({error}): pip install 'mogan[int8]'") from error
    inside = {id(module) for module in transformer.blocks.modules() if isinstance(module, nn.Linear)}
    quantize_(transformer, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda module, name: id(module) in inside)
    return transformer
