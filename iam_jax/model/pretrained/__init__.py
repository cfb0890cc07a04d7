"""Models in Hugging Face's folder format: their shape, their weights straight onto the mesh, and back into such a folder.

    config = configure(config)              # the folder's shape in place of config.model's
    params = load(config, abstract)         # the pretrained part of the parameters
    notes = export(config, params, folder)  # readable by transformers

`names` says which parameters are pretrained. One table of names per family lies beside this file.
"""

from iam_jax.model.pretrained.exporting import check_output, export
from iam_jax.model.pretrained.importing import configure, fingerprint, load, names, vocabulary

__all__ = ["check_output", "configure", "export", "fingerprint", "load", "names", "vocabulary"]
