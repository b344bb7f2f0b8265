"""MGIE: guiding instruction-based image editing by a multimodal LLM. Ray-free; `serving` and `pipelines` build on it.

    from mgie import Editor

    Editor.load("tiny").edit("photo.jpg", "make it night", seed=1).save("night.png")

The folders, each of which knows only those before it:

errors.py      exception tree
config.py      configuration records: defaults, checks
storage/       folders on a disk or in a store, S3, trying again
images/        pictures as files and as pixels
model/         the networks and the mathematics, from tokens to losses
inference/     one edit with a loaded model
engine/        continuous batching
data/          what is learnt from, and in which order
bundle/        one folder = one model
training/      training one variant, to checkpoints that resume exactly
evaluation/    scores of edits and of the model itself
editor.py      `Editor`: the whole inference path in one process
tiny/          how the embedded models came to be
cli.py         the `mgie` command
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgie.editor import Editor

__version__ = "0.1.0"
__all__ = ["Editor", "__version__"]


def __getattr__(name: str) -> Any:
    """`Editor`, loaded when it is asked for: it needs torch, which most of the package does not."""
    if name == "Editor":
        from mgie.editor import Editor

        return Editor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
