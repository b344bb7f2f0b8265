"""MGIE: guiding instruction-based image editing by a multimodal LLM. Ray-free; `serving` and `pipelines` build on it."""

__version__ = "0.1.0"
