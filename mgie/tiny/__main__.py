"""`python -m mgie.tiny`: builds every embedded bundle now (part of `make setup`)."""

from mgie.tiny import ensure_bundle
from mgie.tiny.recipe import EMBEDDED

if __name__ == "__main__":
    for name in EMBEDDED:
        print(f"embedded bundle {name}: {ensure_bundle(name)}")
