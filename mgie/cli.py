"""`mgie edit | convert | export | parity | info`: the command line. The only module of the package that prints.

Exit status: 0 done, 1 something failed (an edit of several, a parity group), 2 the command could not be
carried out.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mgie.bundle.record import BundleRecord
from mgie.bundle.resolve import locate_bundle
from mgie.config import BundleConfig, KeptDtype, Sampler, Sources, WeightKind
from mgie.data.edit_list import parse_edit_list
from mgie.errors import ConfigError, DataError, ImageError, MGIEError
from mgie.images.files import OutputFormat, output_format
from mgie.model.prompts import check_text

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".heic", ".heif")

out = Console()
err = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class _Edit:
    """One edit to do."""

    image: Path
    instruction: str
    target: Path
    expressive: str | None = None
    seed: int | None = None


def edit(
    source: Annotated[Path, tyro.conf.Positional],
    instruction: Annotated[str, tyro.conf.Positional] = "",
    /,
    *,
    out: Path | None = None,
    bundle: str = "tiny",
    seed: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    image_guidance_scale: float | None = None,
    sampler: Sampler | None = None,
    square_crop: bool | None = None,
    detail_transfer: bool | None = None,
    expressive: str | None = None,
    format: OutputFormat = "png",  # noqa: A002  # the flag's name
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
) -> int:
    """Edit an image, a folder of images, or the edits listed in a JSONL file.

    Args:
        source: An image; a folder of images, all edited by the same instruction; or a .jsonl file of objects
            with "image" (relative to the file), "instruction" and optionally "expressive" and "seed".
        instruction: What to change, for example "make it night". Not with a .jsonl file.
        out: File for one image (default: NAME-edited.png here), folder otherwise (default: ./edited).
        bundle: tiny (embedded), a folder, a hub id or s3://bucket/prefix.
        seed: The same seed gives the same result; default: a random one, which is printed.
        steps: Denoising steps; default: the bundle's.
        guidance_scale: How strongly to follow the words; default: the bundle's.
        image_guidance_scale: How strongly to keep to the source; default: the bundle's.
        sampler: Sampling algorithm; default: the bundle's.
        square_crop: Crop to the centre square as the published pipeline does.
        detail_transfer: Make the change to the photo's own pixels, so that what is not edited stays sharp;
            default: the bundle's.
        expressive: Your own expressive instruction, in place of a derived one.
        format: File format in a folder of results.
        device: auto, cpu, mps, cuda or cuda:N.
        dtype: auto, float32, bfloat16 or float16.
        overwrite: Replace results that exist.
    """
    edits = list(_edits(source, instruction, target=out, suffix=format, expressive=expressive, seed=seed))
    taken = [item.target for item in edits if item.target.exists()]
    if taken and not overwrite:
        raise ConfigError(f"{taken[0]} exists; choose another --out or give --overwrite", param="out")
    if source.suffix != ".jsonl":  # of a list, only the row at fault fails
        check_text(instruction, "instruction")
    for item in edits:
        if item.target.parent.exists() and not item.target.parent.is_dir():
            raise ConfigError(f"{item.target.parent} is a file; --out must be a folder here", param="out")
        output_format(item.target)
    from mgie.editor import Editor  # here and below, because it needs torch: `--help`, `info` and refusals do without

    editor = Editor.load(bundle, device=device, dtype=dtype)
    _warn_untrained(editor.bundle)
    settings: dict[str, Any] = {
        "steps": steps,
        "guidance_scale": guidance_scale,
        "image_guidance_scale": image_guidance_scale,
        "sampler": sampler,
        "square_crop": square_crop,
        "detail_transfer": detail_transfer,
    }
    editor.bundle.defaults.override(**settings)  # refuses bad settings before the first edit
    failed = 0
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
    ) as bar:
        overall = bar.add_task("edits", total=len(edits), visible=len(edits) > 1)
        for item in edits:
            task = bar.add_task(item.image.name, total=None)
            try:
                result = editor.edit(
                    item.image,
                    item.instruction,
                    seed=item.seed,
                    expressive=item.expressive,
                    on_step=lambda done, total, task=task: bar.update(task, completed=done, total=total),  # type: ignore[misc]
                    **settings,
                )
                item.target.parent.mkdir(parents=True, exist_ok=True)
                result.save(item.target)
            except (MGIEError, OSError) as error:
                if len(edits) == 1:
                    raise
                failed += 1
                err.print(f"{item.image}: {error}", style="red", markup=False, soft_wrap=True)
            else:
                note = " (no visual tokens came: the words may have had no effect)" if result.used_fallback else ""
                _print_result(item, result.expressive, result.seed, note)
            bar.remove_task(task)
            bar.advance(overall)
    if failed:
        err.print(f"{failed} of {len(edits)} edits failed")
    return 1 if failed else 0


def _print_result(item: _Edit, expressive: str, seed: int, note: str) -> None:
    out.print(f"{item.target}  seed {seed}{note}", markup=False, soft_wrap=True)
    if expressive:
        out.print(f"  {expressive}", markup=False, soft_wrap=True)


def _edits(
    source: Path, instruction: str, *, target: Path | None, suffix: str, expressive: str | None, seed: int | None
) -> Iterator[_Edit]:
    """The edits that the arguments name, each with its own target."""
    if source.suffix == ".jsonl":
        if instruction:
            raise ConfigError(
                "an instruction was given beside a .jsonl file; the file names its own", param="instruction"
            )
        rows = _read_list(source)
    elif source.is_dir():
        images = sorted(path for path in source.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES)
        if not images:
            raise ImageError(f"{source} holds no image; looked for {', '.join(_IMAGE_SUFFIXES)}")
        rows = [{"image": image, "instruction": instruction} for image in images]
    elif source.is_file():
        single = Path(f"{source.stem}-edited.png") if target is None else target
        yield _Edit(image=source, instruction=instruction, target=single, expressive=expressive, seed=seed)
        return
    else:
        raise ImageError(f"{source} is neither a file nor a folder")
    folder, names = target or Path("edited"), set[str]()
    for row in rows:
        name, count = row["image"].stem, 1
        while name in names:
            count += 1
            name = f"{row['image'].stem}-{count}"
        names.add(name)
        defaults = {"expressive": expressive, "seed": seed}
        yield _Edit(**(defaults | row), target=folder / f"{name}.{suffix}")


def _read_list(path: Path) -> list[dict[str, Any]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return [row | {"image": path.parent / row["image"]} for row in parse_edit_list(content, str(path))]


def convert_command(
    target: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    sources: Annotated[Sources, tyro.conf.arg(name="")],
    name: str | None = None,
    dtype: KeptDtype = "keep",
    num_visual_tokens: int | None = None,
    seed: int = 0,
    trained: bool | None = None,
    replace: bool = False,
) -> int:
    """Make a bundle of published weights.

    Give --llava --clip --stable-diffusion --mgie for the published MGIE; leave --mgie out for a fresh one to
    train; --llava --clip alone for LLaVA, --stable-diffusion alone for InstructPix2Pix, --summarizer for a T5.

    Args:
        target: The bundle's folder, to be made.
        sources: The folders to read.
        name: Short name of the bundle; default: that of its folder.
        dtype: Of the weights written; keep = as in the sources.
        num_visual_tokens: Visual tokens of a fresh MGIE; default: 8.
        seed: Of what a fresh MGIE draws.
        trained: Whether the weights are trained; default: yes, except for a fresh MGIE.
        replace: Replace a bundle that is there.
    """
    from mgie.bundle.convert import convert

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
    ) as bar:
        task = bar.add_task(target.name, total=None)
        bundle = convert(
            target,
            sources,
            name=name,
            dtype=dtype,
            num_visual_tokens=num_visual_tokens,
            seed=seed,
            trained=trained,
            replace=replace,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    out.print(f"{target}  bundle {bundle.config.name}, identity {bundle.identity}", markup=False, soft_wrap=True)
    out.print(f"  parts {', '.join(bundle.config.parts)}", markup=False, soft_wrap=True)
    _warn_untrained(bundle.config)
    return 0


def export(
    run: Annotated[str, tyro.conf.Positional],
    /,
    *,
    target: Annotated[Path, tyro.conf.arg(name="out")],
    base: str | None = None,
    weights: WeightKind | None = None,
    step: int | None = None,
    name: str | None = None,
    published: bool = False,
    replace: bool = False,
) -> int:
    """Make a bundle of what a training run has learnt.

    Args:
        run: A run's folder or one of its checkpoints, local or s3://bucket/prefix.
        target: The bundle's folder, to be made.
        base: Where the bundle that training began from lies now; default: where it did then.
        weights: ema = running averages, raw = those of the last step; default: ema where the run kept it.
        step: Which checkpoint; default: the newest.
        name: Short name of the bundle; default: that of its folder.
        published: Write mllm.pt and unet.pt, the layout of the published weights, instead of a bundle.
        replace: Replace a bundle that is there.
    """
    with err.status("exporting"):
        from mgie.training.export import PUBLISHED_FILES, export_bundle, export_published, open_base, read_trained

        trained = read_trained(run, step=step, weights=weights)
        origin = open_base(trained.snapshot, base)
        if published:
            export_published(trained, origin, target, replace=replace)
        else:
            bundle = export_bundle(trained, origin, target, name=name, replace=replace)
    what = f"step {trained.snapshot.step}, {trained.kind} weights"
    if published:
        out.print(f"{target}  {', '.join(PUBLISHED_FILES)}: {what}", markup=False, soft_wrap=True)
        return 0
    out.print(f"{target}  bundle {bundle.config.name}, identity {bundle.identity}", markup=False, soft_wrap=True)
    out.print(f"  {what}", markup=False, soft_wrap=True)
    _warn_untrained(bundle.config)
    return 0


def parity(
    folder: Annotated[Path, tyro.conf.Positional], /, *, json_: Annotated[bool, tyro.conf.arg(name="json")] = False
) -> int:
    """Compare the model with reference vectors recorded from the original code.

    Args:
        folder: A reference folder: checkpoints, images, vectors.json, vectors.safetensors.
        json_: Print the report as JSON.
    """
    # A live line for a person who waits; nothing where the output is piped.
    with err.status("loading") as status:
        from mgie.evaluation.parity import compare

        report = compare(folder, progress=lambda name: status.update(f"comparing {name}"))
    if json_:
        print(json.dumps(report.as_json(), indent=2))
    else:
        table = Table("group", "compared", "worst", "tolerance", "verdict", box=None)
        color = {"pass": "green", "fail": "red", "by design": "yellow"}
        for group in report.groups:
            table.add_row(
                group.name,
                str(group.compared),
                f"{group.worst:.1e}",
                f"{group.tolerance:.0e}",
                f"[{color[group.verdict]}]{group.verdict}",
            )
        out.print(table)
        # Below: in a column of their own they would be broken into many short lines.
        for group in report.groups:
            if group.reason:
                out.print(f"{group.verdict}: {group.name}: {group.reason}", markup=False, soft_wrap=True)
        out.print("[green]passed" if report.passed else "[red]failed")
    return 0 if report.passed else 1


def info(
    bundle: Annotated[str, tyro.conf.Positional] = "tiny",
    /,
    *,
    verify: bool = False,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Show what a bundle holds.

    Args:
        bundle: tiny (embedded), a folder, a hub id or s3://bucket/prefix.
        verify: Also check every file's sha256.
        json_: Print bundle.json with the identity.
    """
    opened = locate_bundle(bundle)
    if verify:
        opened.verify()
    if json_:
        print(json.dumps({"identity": opened.identity, **dataclasses.asdict(opened.config)}, indent=2))
        return 0
    table = Table(show_header=False, box=None)
    for name, value in _describe(opened).items():
        table.add_row(name, escape(value))
    out.print(table)
    if verify:
        out.print("every file is as listed")
    return 0


def _describe(bundle: BundleRecord) -> dict[str, str]:
    config = bundle.config
    sizes = {part: sum(entry.size for entry in bundle.files([part]).values()) for part in config.parts}
    return {
        "name": config.name,
        "identity": bundle.identity,
        "trained": "yes" if config.trained else "no: random weights, results show nothing",
        "conditioner": config.conditioner + ("" if config.sees_image else " (the LLM does not see the image)"),
        "parts": "\n".join(f"{part}  {size / 1e6:.1f} MB" for part, size in sizes.items()),
        "dimensions": "\n".join(f"{name}  {value}" for name, value in config.dimensions.items()),
        "try": "\n".join(config.examples) or "-",
        "works at": f"{config.work_area_px} px of area, sides in multiples of {config.multiple_px}",
        "defaults": "\n".join(f"{name}  {value}" for name, value in dataclasses.asdict(config.defaults).items()),
        "made by": config.provenance.made_by,
        "from": "\n".join(config.provenance.sources),
        "data": config.provenance.data,
        "licences": "\n".join(config.provenance.licences),
    }


def _warn_untrained(config: BundleConfig) -> None:
    if not config.trained:
        err.print(
            f"bundle {config.name} is untrained (random weights): the result shows that everything runs, "
            "not what MGIE can do. `mgie convert` brings real weights.",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )


def main() -> None:
    """Entry point of the `mgie` command."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    commands: dict[str, Callable[..., int]] = {
        "edit": edit,
        "convert": convert_command,
        "export": export,
        "parity": parity,
        "info": info,
    }
    try:
        status = tyro.extras.subcommand_cli_from_dict(commands, prog="mgie", description="Edit photos with words.")
    except (MGIEError, OSError) as error:
        err.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        status = 2
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
