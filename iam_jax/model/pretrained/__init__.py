"""Models in Hugging Face's folder format: reading their shape, loading their weights onto the mesh, and writing such a folder.

    config = configure(config)              # replaces the shape in config.model by the folder's
    params = load(config, abstract)         # the pretrained part of the parameters
    notes = export(config, params, folder)  # transformers can read it

`names` lists the pretrained parameters. families/ has one file per model family.
"""

from iam_jax.model.pretrained.exporting import check_output, export
from iam_jax.model.pretrained.importing import configure, fingerprint, load, names, vocabulary

__all__ = ["check_output", "configure", "export", "fingerprint", "load", "names", "vocabulary"]
