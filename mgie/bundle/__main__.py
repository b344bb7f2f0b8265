"""`python -m mgie.bundle`: unpacks or builds every embedded bundle now (part of `make setup`)."""

from mgie.bundle.embedded import EMBEDDED, ensure_bundle

if __name__ == "__main__":
    for name in EMBEDDED:
        print(f"embedded bundle {name}: {ensure_bundle(name)}")
