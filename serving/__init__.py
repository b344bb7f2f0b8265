"""The HTTP service on Ray Serve. `serve run serving.app` finds the application builder here."""

from serving.app import app

__all__ = ["app"]
