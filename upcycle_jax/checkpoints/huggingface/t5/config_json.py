"""What config.json says of the function that a T5 folder computes: every key that changes it is
read, and what cannot be computed here is refused.

Sources: transformers' T5Config and MT5Config of 4.x and 5.24, which differ in what
`tie_word_embeddings` means. Up to 4.x a true value ties the output matrix to the embedding and
scales the decoder's output by d_model^-0.5. From 5 on T5 writes `scale_decoder_outputs` beside it,
mT5 never scales, both write a true value always, and a folder whose lm_head differs from the
embedding is untied all the same.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upcycle_jax.checkpoints.huggingface.keys import ACTIVATIONS, Keys

MODEL_TYPES = {"t5": "relu", "mt5": "gated-gelu"}
"""Types of models that are read -> their `feed_forward_proj` where config.json has none."""

SIZES = {
    "vocab_size": "",
    "d_model": "hidden_size",
    "d_kv": "head_dim",
    "d_ff": "",
    "num_layers": "num_hidden_layers",
    "num_decoder_layers": "",
    "num_heads": "num_attention_heads",
    "relative_attention_num_buckets": "",
}
"""Keys of sizes -> the other name by which transformers knows them."""

NOT_READ = {
    "umt5": "each of its layers has a position table of its own, T5X's layout one per stack",
    "longt5": "its encoder attends to neighbours and summaries, T5's to everything",
    "switch_transformers": (
        "it is a Mixture-of-Experts already; upcycle the dense T5 that it came from, or take its"
        " T5X checkpoint"
    ),
}
"""Types that are near to T5 -> why they are not read."""


@dataclasses.dataclass(frozen=True)
class Stated:
    """What config.json states.

    Attributes:
      activations: of the MLP, see `models.t5.config.T5Config.mlp_activations`.
      feed_forward: `feed_forward_proj`, for messages.
      epsilon: of the layer norms.
      max_distance: from which on all positions share a bucket.
      sizes: the keys of `SIZES` that are there.
      tied: whether the output matrix is the embedding; None where the tensors decide.
      scaled: whether the decoder's output is multiplied by d_model^-0.5 before the logits.
      head_may_differ: an output matrix of its own counts although `tied` is not False.
      encoder_only: the folder is that of an encoder without its decoder.
    """

    activations: tuple[str, ...]
    feed_forward: str
    epsilon: float
    max_distance: int
    sizes: Mapping[str, int]
    tied: bool | None
    scaled: bool
    head_may_differ: bool
    encoder_only: bool

    @property
    def gated(self) -> bool:
        """Whether the MLP has two input kernels."""
        return len(self.activations) == 2


def read_config(folder: Path, keys: Mapping[str, Any]) -> Stated:
    """What config.json states.

    Args:
      folder: for messages.
      keys: content of config.json, whose `model_type` is one of `MODEL_TYPES`.

    Raises:
      ValueError: it is damaged, contradicts itself, or describes what cannot be computed here; the
        message names file, key, value and remedy.
    """
    return _T5Keys(folder, keys).stated()


class _T5Keys(Keys):
    """What the keys of a T5's config.json state."""

    def stated(self) -> Stated:
        model_type = self._keys["model_type"]
        self._refuse_what_is_no_plain_t5()
        feed_forward, activations = self._activations(MODEL_TYPES[model_type])
        tied, scaled, head_may_differ = self._output(model_type)
        architectures = self.get("architectures", list, [])
        return Stated(
            activations=activations,
            feed_forward=feed_forward,
            epsilon=self._epsilon(),
            max_distance=self.size("relative_attention_max_distance") or 128,
            sizes=self._sizes(),
            tied=tied,
            scaled=scaled,
            head_may_differ=head_may_differ,
            encoder_only=any(
                isinstance(name, str) and name.endswith("EncoderModel") for name in architectures
            )
            or self.get("is_encoder_decoder", bool, True) is False,
        )

    def _sizes(self) -> dict[str, int]:
        out = {}
        for key, alias in SIZES.items():
            value, other = self.size(key), self.size(alias) if alias else None
            if value is not None and other is not None and value != other:
                raise self.refused(key, f"{alias} says {other}. Correct one of them")
            found = value if value is not None else other
            if found is not None:
                out[key] = found
        if "num_layers" in out:
            out.setdefault("num_decoder_layers", out["num_layers"])
        return out

    def _epsilon(self) -> float:
        value = self._keys.get("layer_norm_epsilon", 1e-6)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise self.refused("layer_norm_epsilon", "a number between 0 and 1 belongs there")
        return float(value)

    def _refuse_what_is_no_plain_t5(self) -> None:
        for key in ("is_decoder", "tie_encoder_decoder"):
            if self.get(key, bool, False):
                raise self.refused(key, "a T5 whose encoder and decoder are apart can be read")
        self.check_plain()
        if self.get("decoder_start_token_id", int, 0) != 0:
            raise self.refused(
                "decoder_start_token_id",
                "decoders begin with token 0 here. Nothing but training and predictions depend on"
                " it: where neither is wanted, set it to 0",
            )

    def _activations(self, default: str) -> tuple[str, tuple[str, ...]]:
        """`feed_forward_proj`, and our names of its activations."""
        name = self.get("feed_forward_proj", str, None)
        key = "feed_forward_proj"
        parts = (name or default).split("-")
        gated, function = parts[:-1] == ["gated"], parts[-1]
        if len(parts) > 2 or (len(parts) == 2 and not gated):
            raise self.refused(key, "only '<activation>' and 'gated-<activation>' are known")
        if parts == ["gated", "gelu"]:
            function = "gelu_new"  # transformers' exception: T5 1.1 was trained with tanh's gelu.
        stored = self.get("dense_act_fn", str, None)
        if name is None and stored is not None:
            key, function = "dense_act_fn", stored
        is_gated = self.get("is_gated_act", bool, None)
        if name is None and is_gated is not None:
            gated = is_gated
        ours = self.activation(key, function)
        if stored is not None and ACTIVATIONS.get(stored) != ours:
            raise self.refused("dense_act_fn", f"feed_forward_proj {name!r} means {function!r}")
        if is_gated is not None and is_gated != gated:
            raise self.refused("is_gated_act", f"feed_forward_proj {name!r} says {gated}")
        text = name or f"{'gated-' if gated else ''}{function}"
        return text, (ours, "linear") if gated else (ours,)

    def _output(self, model_type: str) -> tuple[bool | None, bool, bool]:
        """`tied`, `scaled` and `head_may_differ` of `Stated`."""
        tied = self.get("tie_word_embeddings", bool, None)
        scaled = self.get("scale_decoder_outputs", bool, None)
        version = re.match(r"(\d{1,4})\.", self.get("transformers_version", str, ""))
        recent = version is not None and int(version.group(1)) >= 5
        if model_type == "t5":
            scales = scaled if scaled is not None else tied is not False
            return tied, scales, recent or scaled is not None
        if tied and version is None:
            raise self.refused(
                "tie_word_embeddings",
                "transformers 4 scales the output of such an mT5 and 5 does not, and the file has"
                " no transformers_version. Load and save it with the version that it was made with",
            )
        scales = bool(tied) and not recent
        if scaled is not None and scaled != scales:
            raise self.refused(
                "scale_decoder_outputs", f"transformers computes this mT5 as if it were {scales}"
            )
        return tied, scales, recent or tied is None
