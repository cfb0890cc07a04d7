"""A model family: everything this project knows about one `model_type` of Hugging Face's format."""

import dataclasses
from collections.abc import Callable

from iam_jax.model.pretrained.folder import Settings
from iam_jax.model.pretrained.table import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """`top` and `layer` are name tables (table.py): they map our parameters to the folder's tensors. The parameters that the model does
    not have, such as biases that config.json switches off, are ignored; every one that it has must be in a table."""

    name: str  # the `model_type` in config.json
    shape: Callable[[Settings], dict]  # the folder's settings -> fields of ModelConfig; those that are missing take their defaults
    layers: str  # the setting that holds the number of layers
    prefix: str  # most names of tensors begin with it; files may lack it
    top: dict[str, Source]  # parameters outside the layers, by their names in the model
    layer: dict[str, Source]  # parameters of a layer, by their names in a block
    buffers: str = r"(?!)"  # regular expression of tensors that are not parameters
    window: Callable[[Settings], int | None] = lambda settings: None  # the sliding window of any layer; None: there is none
    scale_embedding: bool = False  # the model multiplies its token embeddings by sqrt(width)
    norm_offset: float = 0.0  # the model adds this to the scales of its norms

    def fields(self, settings: Settings) -> dict:
        """The fields of ModelConfig that the family determines."""
        return self.shape(settings) | {"scale_embedding": self.scale_embedding, "norm_offset": self.norm_offset}

    @property
    def unprefixed(self) -> tuple[str, ...]:
        """The tensors whose names never have the prefix."""
        return tuple(source.tensor for source in self.top.values() if not source.tensor.startswith(self.prefix))
