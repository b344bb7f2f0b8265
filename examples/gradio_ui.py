"""The same service behind a Gradio page: `pip install gradio openai`, then `python examples/gradio_ui.py`.

Talks to the service at $OPENAI_BASE_URL (http://127.0.0.1:8000/v1) with the key $OPENAI_API_KEY, as any client does.
"""

import os
from base64 import b64decode
from io import BytesIO
from typing import Any

import gradio as gr
from openai import OpenAI, OpenAIError
from PIL import Image


def main() -> None:
    """Serves the page; $GRADIO_SERVER_PORT chooses the port."""
    address = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
    build(OpenAI(base_url=address, api_key=os.environ.get("OPENAI_API_KEY", "unused"))).launch()


def build(client: OpenAI) -> gr.Blocks:
    """The page."""
    details = next(iter(client.models.list())).model_dump()["mgie"]
    defaults = details["defaults"]

    def edit(
        photo: Image.Image | None, instruction: str, expressive: str, *numbers: float
    ) -> tuple[Image.Image, str, int]:
        """The edited photo, the expressive instruction that guided it, and its seed."""
        seed, steps, guidance_scale = numbers
        if photo is None:
            raise gr.Error("Choose a photo first.")
        file = BytesIO()
        photo.save(file, "PNG")
        fields: dict[str, Any] = {"steps": int(steps), "guidance_scale": guidance_scale}
        if expressive.strip():
            fields["expressive"] = expressive
        if seed >= 0:
            fields["seed"] = int(seed)
        try:
            answer = client.images.edit(image=("photo.png", file.getvalue()), prompt=instruction, extra_body=fields)
        except OpenAIError as error:
            raise gr.Error(str(error)) from error
        (result,) = answer.data or []
        picture = Image.open(BytesIO(b64decode(result.b64_json or "")))
        return picture, result.revised_prompt or "", answer.model_dump()["mgie"]["seed"]

    def edit_by_instruction(
        photo: Image.Image | None, instruction: str, *numbers: float
    ) -> tuple[Image.Image, str, int]:
        """The same, whatever the model had understood before."""
        return edit(photo, instruction, "", *numbers)

    with gr.Blocks(title="MGIE") as page:
        gr.Markdown("# Edit a photo with a few words")
        if not details["trained"]:
            gr.Markdown("**The served bundle is untrained: its pictures mean nothing.**")
        with gr.Row():
            photo = gr.Image(type="pil", label="Photo")
            edited = gr.Image(type="pil", format="png", label="Edited", interactive=False)
        instruction = gr.Textbox(label="What shall change?", placeholder="make it night")
        if details["examples"]:
            gr.Examples([[words] for words in details["examples"]], [instruction])
        run = gr.Button("Edit", variant="primary")
        expressive = gr.Textbox(label="What MGIE understood: change it, and run again", lines=3)
        again = gr.Button("Run again with this")
        with gr.Accordion("How", open=False):
            seed = gr.Number(-1, label="Seed (-1: another each time)", precision=0)
            steps = gr.Slider(1, 4 * defaults["steps"], defaults["steps"], step=1, label="Steps")
            guidance_scale = gr.Slider(
                1, 2 * defaults["guidance_scale"], defaults["guidance_scale"], label="Text guidance"
            )
        used = gr.Number(label="Seed of this picture", interactive=False, precision=0)
        numbers = [seed, steps, guidance_scale]
        results = [edited, expressive, used]
        run.click(edit_by_instruction, [photo, instruction, *numbers], results, api_name="edit")
        again.click(edit, [photo, instruction, expressive, *numbers], results, api_name="again")
    return page


if __name__ == "__main__":
    main()
