"""Makes the pictures of the README, and the photos that its commands edit: `python docs/pictures.py`."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mgie.editor import Editor
from mgie.tiny.world import make_sample

SIDE_PX, MARGIN_PX, TEXT_PX = 192, 8, 14
# Scenes of the held-out split, by number, and what is asked for.
EDITS = (
    (37, "make it night"),
    (31, "make it look like winter"),
    (20, "a sepia look, please"),
    (5, "more cosy"),
    (51, "let it rain"),
    (22, "make it autumn"),
)

PHOTOS = {"lake": 4, "harbour": 11, "meadow": 16, "beach": 26}  # scenes of the held-out split of another seed
PHOTO_SIDE_PX = 512


def main() -> None:
    """Writes `examples.jpg` beside this file, and `examples/photos/`."""
    photos = Path(__file__).resolve().parents[1] / "examples" / "photos"
    photos.mkdir(exist_ok=True)
    for name, number in PHOTOS.items():
        make_sample(12, "test", number, side_px=PHOTO_SIDE_PX).source.save(photos / f"{name}.jpg", quality=88)
    editor = Editor.load("tiny")
    font = ImageFont.load_default(TEXT_PX)
    column, height = SIDE_PX + MARGIN_PX, 2 * (SIDE_PX + MARGIN_PX) + MARGIN_PX + 2 * TEXT_PX
    sheet = Image.new("RGB", (MARGIN_PX + column * len(EDITS), height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (number, instruction) in enumerate(EDITS):
        source = make_sample(11, "test", number, side_px=SIDE_PX).source
        edited = editor.edit(source, instruction, seed=0).image
        left = MARGIN_PX + column * i
        sheet.paste(source, (left, MARGIN_PX))
        sheet.paste(edited, (left, 2 * MARGIN_PX + SIDE_PX + 2 * TEXT_PX))
        pen.text((left + 4, 2 * MARGIN_PX + SIDE_PX), instruction, fill="black", font=font)
    sheet.save(Path(__file__).with_name("examples.jpg"), quality=88)


if __name__ == "__main__":
    main()
