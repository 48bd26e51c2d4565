"""How layers are named in the paths of parameters, in every family: 'encoder/layers_1/...'."""

import re
from typing import NamedTuple

_LAYER = re.compile(r"(?P<stack>.+?)/layers_(?P<number>\d+)(?:/(?P<rest>.+))?")


class InLayer(NamedTuple):
    """The path of a layer, or of something in it.

    Attributes:
      stack: what is before the layer: a stack's name, after any prefix that the path has.
      number: which layer of the stack.
      rest: the path below the layer; '' for the layer itself.
    """

    stack: str
    number: int
    rest: str

    @property
    def layer(self) -> str:
        """Path of the layer."""
        return layer(self.stack, self.number)


def layer(stack: str, number: int) -> str:
    """Path of a layer.

    >>> layer("encoder", 1)
    'encoder/layers_1'
    """
    return f"{stack}/layers_{number}"


def split(path: str) -> InLayer | None:
    """A path in its parts; None where it is of no layer.

    >>> split("target/encoder/layers_1/mlp/wo/kernel")
    InLayer(stack='target/encoder', number=1, rest='mlp/wo/kernel')
    """
    match = _LAYER.fullmatch(path)
    if match is None:
        return None
    return InLayer(match["stack"], int(match["number"]), match["rest"] or "")
