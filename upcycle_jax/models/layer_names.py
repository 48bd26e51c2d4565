"""How layers are named in the paths of parameters: 'encoder/layers_1/...'."""

import re
from typing import NamedTuple

LAYERS = "layers"
"""What the layers of a stack are called, unless it says otherwise."""
CALLED = (LAYERS, "encoderblock")
"""What layers may be called; 'encoderblock_0' is the name of the field's vision transformers."""

_LAYER = re.compile(
    rf"(?P<stack>.+?)/(?P<called>{'|'.join(CALLED)})_(?P<number>\d+)(?:/(?P<rest>.+))?"
)


class InLayer(NamedTuple):
    """The path of a layer, or of something in it.

    Attributes:
      stack: what is before the layer: a stack's name, after any prefix that the path has.
      number: which layer of the stack.
      rest: the path below the layer; '' for the layer itself.
      called: what the layers of the stack are called, one of `CALLED`.
    """

    stack: str
    number: int
    rest: str
    called: str = LAYERS

    @property
    def layer(self) -> str:
        """Path of the layer."""
        return layer(self.stack, self.number, self.called)

    def in_layer(self, number: int) -> str:
        """The same path in another layer of the stack."""
        return f"{layer(self.stack, number, self.called)}/{self.rest}"


def name(number: int, called: str = LAYERS) -> str:
    """Name of a layer within its stack.

    >>> name(1)
    'layers_1'
    """
    return f"{called}_{number}"


def layer(stack: str, number: int, called: str = LAYERS) -> str:
    """Path of a layer.

    >>> layer("encoder", 1), layer("Transformer", 0, "encoderblock")
    ('encoder/layers_1', 'Transformer/encoderblock_0')
    """
    return f"{stack}/{name(number, called)}"


def split(path: str) -> InLayer | None:
    """A path in its parts; None where it is of no layer.

    >>> split("target/encoder/layers_1/mlp/wo/kernel")
    InLayer(stack='target/encoder', number=1, rest='mlp/wo/kernel', called='layers')
    """
    match = _LAYER.fullmatch(path)
    if match is None:
        return None
    return InLayer(match["stack"], int(match["number"]), match["rest"] or "", match["called"])
