"""The HTTP contract as types: the form of an edit, its answer, its errors, and the limits.

The form model is the only place where a parameter's type, range and default stand; the OpenAPI document
and the error messages are derived from it. Knows nothing of routes, stages or Ray.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.functional_validators import AfterValidator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from mgie.config import MAX_GUIDANCE_SCALE, MAX_INSTRUCTION_CHARS, MAX_RESULTS, MAX_SEED, MAX_STEPS, Sampler
from mgie.images.files import OutputFormat

MAX_UPLOADS = 16  # what the OpenAI SDK may send in a list; one is used, more get an error that says so
MAX_FIELDS = 64
MAX_FIELD_BYTES = 4 * MAX_INSTRUCTION_CHARS + 65_536  # a too long prompt still gets the error that names it
FORM_OVERHEAD_BYTES = 1_048_576  # what a form may hold besides its image
MIN_SIDE_PX, MAX_SIDE_PX = 16, 4096  # of a result whose size is asked for


@dataclass(frozen=True)
class Supported:
    """The part of OpenAI's value range that is built; the rest is refused by name, not ignored."""

    values: tuple[Any, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "enum": list(self.values)}

    def _check(self, value: Any) -> Any:
        if value not in self.values:
            allowed = " or ".join(str(allowed).lower() for allowed in self.values)
            raise PydanticCustomError("unsupported", "only {allowed} is supported yet", {"allowed": allowed})
        return value


def _size_in_range(size: str) -> str:
    if size != "auto" and not all(MIN_SIDE_PX <= int(side) <= MAX_SIDE_PX for side in size.split("x")):
        bounds = {"least": MIN_SIDE_PX, "most": MAX_SIDE_PX}
        raise PydanticCustomError("size_range", "each side must be {least} to {most} px", bounds)
    return size


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "it must hold some text")
    return text


Text = Annotated[str, Field(min_length=1, max_length=MAX_INSTRUCTION_CHARS), AfterValidator(_not_blank)]
Scale = Annotated[float, Field(ge=0, le=MAX_GUIDANCE_SCALE, allow_inf_nan=False)]


class EditForm(BaseModel):
    """The fields of `POST /v1/images/edits`; every value arrives as a string, the image as a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: bytes | None = Field(
        None,
        description="The photo: PNG, JPEG, WebP or, where the service has the extra, HEIC; one file (`image[]` is read as `image`).",
    )
    previous: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None,
        description="Instead of `image`: the `mgie.id` of an earlier edit that was kept, whose result is edited on; "
        "`id:1` is the second of several results.",
    )
    prompt: Text = Field(description="What to change.")
    model: str | None = Field(None, description="Name of the served bundle, as in /v1/models.")
    n: Annotated[int, Field(ge=1, le=MAX_RESULTS)] = Field(
        1, description="Number of results; result i has the seed + i."
    )
    size: Annotated[str, Field(pattern=r"^(auto|\d{1,5}x\d{1,5})$"), AfterValidator(_size_in_range)] = Field(
        "auto", description="`auto`: the photo's own; WxH, of the same aspect ratio: the result is scaled to it."
    )
    quality: Annotated[Literal["auto", "low", "medium", "high", "standard", "hd"], Supported(("auto",))] = Field(
        "auto", description="Use `steps` to trade time for quality."
    )
    response_format: Literal["b64_json", "url"] = Field(
        "b64_json", description="`url`: the results are kept, and addresses of them returned. Not with `stream`."
    )
    keep: bool | None = Field(
        None, description="Keep the results for a while, for `previous`. None: only with `response_format=url`."
    )
    output_format: OutputFormat = Field("png", description="File type of the result.")
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="Quality of a jpeg or webp result, 0 to 100; png has none."
    )
    background: Annotated[Literal["auto", "opaque", "transparent"], Supported(("auto", "opaque"))] = Field("auto")
    input_fidelity: Annotated[Literal["low", "high"], Supported(("low",))] = Field(
        "low", description="Use `image_guidance_scale` to stay closer to the photo."
    )
    mask: bytes | None = Field(
        None, description="A PNG of the photo's size: transparent where it may be edited, opaque where not."
    )
    stream: bool = Field(default=False, description="Answer with server-sent events.")
    partial_images: Annotated[int, Field(ge=0, le=3)] = Field(
        0, description="With `stream`: pictures of the first result on its way."
    )
    user: Annotated[str, Field(max_length=512)] | None = Field(None, description="Accepted, and not stored.")
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = Field(
        None, description="Same seed, same result. Without one a random seed is chosen and reported."
    )
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = Field(None, description="Denoising steps.")
    guidance_scale: Scale | None = Field(None, description="Text guidance; 1 = off.")
    image_guidance_scale: Scale | None = Field(None, description="Image guidance; 1 = off.")
    sampler: Sampler | None = Field(None, description="Sampling algorithm.")
    expressive: Text | None = Field(None, description="The expressive instruction, given instead of derived.")
    square_crop: bool | None = Field(None, description="Edit the centre square, as the published pipeline does.")
    detail_transfer: bool | None = Field(None, description="Make the change to the photo's own pixels: stays sharp.")
    deterministic: bool = Field(
        default=False, description="The same seed gives the same bits on one machine, whatever runs beside it."
    )
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Seconds until the edit is given up, at most the service's own limit."
    )
    webhook_url: Annotated[str, Field(min_length=1, max_length=2048)] | None = Field(
        None, description="With `Prefer: respond-async`: address that is told of the end of the job."
    )


Priority = Literal["interactive", "batch"]  # in the stages' lines

FILES = ("image", "mask")


def form_schema() -> dict[str, Any]:
    """JSON schema of the form. A form cannot send `null`: optional fields are simply left out."""
    schema = EditForm.model_json_schema()
    for described in schema["properties"].values():
        options = [option for option in described.pop("anyOf", []) if option["type"] != "null"]
        for option in options:
            described.update(option)
            del described["default"]
    return schema | {"oneOf": [{"required": [name]} for name in ("image", "previous")]}


def json_schema() -> dict[str, Any]:
    """The same of the JSON variant: pictures are data URLs, alone or as OpenAI wraps them."""
    url = {"type": "string", "pattern": "^data:image/"}
    wrapped = {"type": "object", "properties": {"image_url": url}, "required": ["image_url"]}
    picture = {"anyOf": [url, wrapped | {"additionalProperties": False}]}
    schema = form_schema()
    for name in FILES:
        schema["properties"][name] = picture | {"description": schema["properties"][name]["description"]}
    schema["properties"]["images"] = {"type": "array", "items": picture, "minItems": 1, "maxItems": 1}
    return schema | {"oneOf": [{"required": [name]} for name in ("image", "images", "previous")]}


# The answer ---------------------------------------------------------------------------------------------


class EditedImage(BaseModel):
    """One result."""

    b64_json: str | None = Field(None, description="The encoded image file, base64; absent where a `url` is asked for.")
    url: str | None = Field(None, description="Where the file can be fetched until it expires.")
    revised_prompt: str = Field(description="The expressive instruction that guided the edit.")


class InputTokens(BaseModel):
    """Tokens the MLLM read, by kind."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Tokens read and written by the MLLM."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputTokens


class Timings(BaseModel):
    """Seconds; `queue` is the wait for a place in the batch or in the engine, `run` from there to the result."""

    mllm_queue_s: float
    mllm_run_s: float
    diffusion_queue_s: float
    diffusion_run_s: float
    total_s: float = Field(description="From the parsed request to the encoded result.")


class BatchPlace(BaseModel):
    """The MLLM batch that an edit ran in."""

    replica: str = Field(description="Random name of the replica.")
    cached: bool = Field(description="The condition of an equal edit was used; there was no batch.")
    batch: int | None = Field(description="Number of the batch in that replica.")
    size: int = Field(description="Edits in the batch.")
    retries: int = Field(description="Times that the stage call was repeated because a replica died.")


class EnginePlace(BaseModel):
    """How an edit went through the diffusion engine."""

    replica: str = Field(description="Random name of the replica.")
    mean_batch_size: float = Field(description="Images per denoising step, over the steps of this edit.")
    join_steps: int = Field(description="Steps of others between being ready and the first own step.")
    retries: int = Field(description="Times that the stage call was repeated because a replica died.")


class EditDetails(BaseModel):
    """What OpenAI's answer has no room for."""

    id: str = Field(description="Names the edit: that of the answer's x-request-id.")
    kept_until: int | None = Field(description="Unix time until which `previous` finds the results; null: not kept.")
    seed: int
    sampler: str
    steps: int
    guidance_scale: float
    image_guidance_scale: float
    square_crop: bool
    detail_transfer: bool
    model: str
    bundle: str = Field(description="Identity of the bundle's content.")
    trained: bool = Field(description="False: random weights, the result means nothing.")
    used_fallback: bool = Field(description="True: the MLLM wrote no visual token, so a fallback guided the edit.")
    work_size: str = Field(description="WxH that the diffusion model worked at.")
    timings: Timings
    mllm: BatchPlace
    diffusion: EnginePlace


class EditResponse(BaseModel):
    """200 of `POST /v1/images/edits`."""

    created: int
    data: list[EditedImage]
    output_format: OutputFormat
    size: str
    quality: str
    background: str
    usage: Usage
    mgie: EditDetails


class _PictureEvent(BaseModel):
    type: str
    b64_json: str
    created_at: int
    size: str
    quality: str = "auto"
    background: str = "opaque"
    output_format: OutputFormat


class PartialEvent(_PictureEvent):
    """`image_edit.partial_image` of a stream."""

    type: Literal["image_edit.partial_image"] = "image_edit.partial_image"
    partial_image_index: int


class CompletedEvent(_PictureEvent):
    """`image_edit.completed` of a stream: one per result, in the order of their seeds."""

    type: Literal["image_edit.completed"] = "image_edit.completed"
    usage: Usage
    mgie: EditDetails


class ErrorDetail(BaseModel):
    """One error; all four keys are always there."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Any answer that is not 200."""

    error: ErrorDetail


class ModelDetails(BaseModel):
    """What a model is, beyond its name."""

    bundle: str = Field(description="Identity of the bundle's content.")
    trained: bool
    made_by: str
    work_area_px: int
    defaults: dict[str, Any] = Field(description="Sampling settings used where an edit gives none.")
    limits: dict[str, int] = Field(description="The most that this service allows of one edit.")
    examples: list[str] = Field(description="Instructions that it can follow.")


class Model(BaseModel):
    """One entry of `/v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    mgie: ModelDetails


class ModelList(BaseModel):
    """200 of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]
