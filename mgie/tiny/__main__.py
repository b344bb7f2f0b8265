"""`python -m mgie.tiny`: unpacks or builds every embedded bundle now (part of `make setup`)."""

from mgie.tiny import EMBEDDED, ensure_bundle

if __name__ == "__main__":
    for name in EMBEDDED:
        print(f"embedded bundle {name}: {ensure_bundle(name)}")
