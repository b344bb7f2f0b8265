"""Edits photos through a running service, with the official client: `pip install openai pillow tyro`.

    python examples/client.py edit photo.jpg "make it night" --out night.png
    python examples/client.py stream photo.jpg "make it night"
    python examples/client.py mask photo.jpg "make it winter" --box 0 0 256 512
    python examples/client.py batch photos/ "make it night" --out edited/

The service is that of $OPENAI_BASE_URL, http://127.0.0.1:8000/v1 if there is none; the key that of $OPENAI_API_KEY.
"""

import os
import sys
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import tyro
from openai import OpenAI, OpenAIError
from openai.types import ImagesResponse
from PIL import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".heic"}

app = tyro.extras.SubcommandApp()


def connect() -> OpenAI:
    """The client. A service without keys takes any; the package wants one."""
    address = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
    return OpenAI(base_url=address, api_key=os.environ.get("OPENAI_API_KEY", "unused"))


@app.command
def edit(
    photo: Annotated[Path, tyro.conf.Positional],
    instruction: Annotated[str, tyro.conf.Positional],
    *,
    out: Path = Path("edited.png"),
    n: int = 1,
    seed: int | None = None,
    steps: int | None = None,
    expressive: str | None = None,
) -> None:
    """Edits one photo, and shows what the model understood.

    Args:
        photo: PNG, JPEG, WebP or HEIC.
        instruction: What to change.
        out: Where the result goes; of several, the second is NAME-2 and so on.
        n: Number of results.
        seed: Same seed, same result; none: another each time.
        steps: Of denoising; none: the bundle's default.
        expressive: Your own expressive instruction, instead of the model's.
    """
    answer = connect().images.edit(
        image=photo, prompt=instruction, n=n, extra_body=given(seed=seed, steps=steps, expressive=expressive)
    )
    report(answer)
    for i, result in enumerate(answer.data or []):
        write(out if i == 0 else out.with_stem(f"{out.stem}-{i + 1}"), result.b64_json)


@app.command
def stream(
    photo: Annotated[Path, tyro.conf.Positional],
    instruction: Annotated[str, tyro.conf.Positional],
    *,
    out: Path = Path("edited.png"),
    partial_images: int = 3,
) -> None:
    """Edits one photo, and writes pictures of it on its way.

    Args:
        photo: PNG, JPEG, WebP or HEIC.
        instruction: What to change.
        out: Where the result goes; those on its way are NAME-partial-0 and so on.
        partial_images: How many of them at most.
    """
    events = connect().images.edit(image=photo, prompt=instruction, stream=True, partial_images=partial_images)
    for event in events:
        if event.type == "image_edit.partial_image":
            write(out.with_stem(f"{out.stem}-partial-{event.partial_image_index}"), event.b64_json)
        else:
            write(out, event.b64_json)


@app.command
def mask(
    photo: Annotated[Path, tyro.conf.Positional],
    instruction: Annotated[str, tyro.conf.Positional],
    *,
    box: tuple[int, int, int, int],
    out: Path = Path("edited.png"),
    seed: int | None = None,
) -> None:
    """Edits what lies in a box; every pixel outside stays as it is.

    Args:
        photo: PNG, JPEG, WebP or HEIC.
        instruction: What to change.
        box: Left, top, right and bottom in pixels.
        out: Where the result goes.
        seed: Same seed, same result; none: another each time.
    """
    picture = Image.new("RGBA", Image.open(photo).size, "black")
    picture.paste((0, 0, 0, 0), box)  # transparent: may be edited
    png = BytesIO()
    picture.save(png, "PNG")
    answer = connect().images.edit(
        image=photo, mask=("mask.png", png.getvalue()), prompt=instruction, extra_body=given(seed=seed)
    )
    report(answer)
    write(out, (answer.data or [])[0].b64_json)


@app.command
def batch(
    photos: Annotated[Path, tyro.conf.Positional],
    instruction: Annotated[str, tyro.conf.Positional],
    *,
    out: Path = Path("edited"),
    seed: int = 0,
    at_once: int = 4,
) -> None:
    """Edits every photo of a folder, several at a time; what is there already is not made again.

    Args:
        photos: Folder of PNG, JPEG, WebP and HEIC files.
        instruction: What to change.
        out: Folder of the results, PNG files of the same names.
        seed: Of every edit.
        at_once: Edits under way at a time. The service batches them; too many and it says so, and they are sent again.
    """
    client = connect().with_options(max_retries=8)
    out.mkdir(parents=True, exist_ok=True)
    todo = {path: out / f"{path.name}.png" for path in sorted(photos.iterdir()) if path.suffix.lower() in SUFFIXES}
    if not todo:
        sys.exit(f"error: {photos} holds no photo ({', '.join(sorted(SUFFIXES))})")

    def one(photo: Path) -> str | None:
        if todo[photo].exists():
            return None
        try:
            answer = client.images.edit(image=photo, prompt=instruction, extra_body=given(seed=seed))
        except OpenAIError as error:
            return f"{photo}: {error}"
        write(todo[photo], (answer.data or [])[0].b64_json)
        return None

    with ThreadPoolExecutor(at_once) as pool:
        failures = [failure for failure in pool.map(one, todo) if failure]
    print(f"{len(todo) - len(failures)} of {len(todo)} photos are edited, in {out}")
    if failures:
        sys.exit("\n".join(failures))


def given(**fields: Any) -> dict[str, Any]:
    """Those that are not None: the API takes no null in a form."""
    return {name: value for name, value in fields.items() if value is not None}


def report(answer: ImagesResponse) -> None:
    """Prints what the model understood, and what it takes to get the same picture again."""
    details = answer.model_dump()["mgie"]  # beside OpenAI's own fields
    if answer.data:
        print(f"expressive instruction: {answer.data[0].revised_prompt}")
    print(f"seed {details['seed']}, {details['steps']} steps, {details['timings']['total_s']:.1f} s")
    if not details["trained"]:
        print("note: the bundle is untrained; its pictures mean nothing")
    if details["used_fallback"]:
        print("note: the model came to no conclusion, a fallback guided the edit: it may ignore the words")


def write(path: Path, b64_json: str | None) -> None:
    """Writes a picture of an answer."""
    path.write_bytes(b64decode(b64_json or ""))
    print(f"wrote {path}")


if __name__ == "__main__":
    try:
        app.cli()
    except (OpenAIError, OSError) as error:
        sys.exit(f"error: {error}")
