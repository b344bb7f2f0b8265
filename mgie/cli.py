"""`mgie edit | convert | export | parity | info`: the command line. The only module of the package that prints.

Exit status: 0 done, 1 something failed (an edit of several, a parity group), 2 the command could not be
carried out.
"""

import dataclasses
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mgie import __version__
from mgie.bundle.record import BundleRecord
from mgie.bundle.resolve import locate_bundle
from mgie.config import (
    MAX_RESULTS,
    MAX_SEED,
    BundleConfig,
    EditOverrides,
    ImageLimits,
    KeptDtype,
    Sources,
    WeightKind,
    check_range,
)
from mgie.data.edit_list import number_names, parse_edit_list
from mgie.errors import ConfigError, DataError, ImageError, MGIEError
from mgie.images.files import IMAGE_SUFFIXES, OutputFormat, output_format
from mgie.images.pictures import load_image, load_mask
from mgie.model.prompts import check_text

out = Console()
err = Console(stderr=True)
_MAX_NAMED = 10  # skipped files, one by one


@dataclass(frozen=True, kw_only=True)
class _Edit:
    """One edit to do, and where its results go."""

    image: Path
    instruction: str
    expressive: str | None
    seed: int | None
    targets: tuple[Path, ...]


class EditFlags(TypedDict, total=False):
    """What need not be given."""

    out: Path
    "file for one image (default: NAME-edited.png here), folder otherwise (default: ./edited)"
    seed: int
    "the same seed gives the same result; default: a random one, which is printed"
    mask: Path
    "image of the photo's size that says where it may change: where it is transparent or, if nowhere, white"
    expressive: str
    "your own expressive instruction, in place of a derived one"
    output_compression: int
    "quality of jpeg and webp, 0 to 100; default: 95 and 90"


def edit(
    source: Annotated[Path, tyro.conf.Positional],
    words: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[WORDS ...]")] = (),
    /,
    *,
    flags: Annotated[EditFlags, tyro.conf.arg(name="")],
    given: Annotated[EditOverrides, tyro.conf.arg(name="")],
    n: int = 1,
    format: OutputFormat = "png",  # noqa: A002  # the flag's name
    max_pixels: int = ImageLimits.max_pixels,
    batch_size: int = 8,
    bundle: str = "tiny",
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
) -> int:
    """Edit an image, a folder of images, or the edits listed in a JSONL file.

    Results are named NAME-edited.png, further ones of that name NAME-edited-2.png and so on. Of a folder or a list,
    results that are there are not made again: after an interruption the same command makes the rest.

    Args:
        source: An image; a folder of images, all edited by the same instruction; or a .jsonl file of objects
            with "image" (relative to the file), "instruction" and optionally "expressive" and "seed".
        words: What to change, for example "make it night". Not with a .jsonl file.
        flags: What need not be given.
        given: Settings; the others are the bundle's defaults.
        n: Results of each image; each has the next seed.
        format: File format of results that --out does not name.
        max_pixels: Largest image to take; its file may have four bytes a pixel, and at least 20 MiB.
        batch_size: Images that are made at a time.
        bundle: tiny (embedded), a folder, a hub id or s3://bucket/prefix.
        device: auto, cpu, mps, cuda or cuda:N.
        dtype: auto, float32, bfloat16 or float16.
        overwrite: Make results again that exist.
    """
    limits = ImageLimits(max_pixels=max_pixels, max_bytes=max(ImageLimits.max_bytes, 4 * max_pixels))
    is_single = source.is_file() and source.suffix != ".jsonl"  # of several edits, only the one at fault fails
    check_range("n", n, 1, MAX_RESULTS)
    check_range("batch_size", batch_size, 1, 1000)
    check_range("seed", flags.get("seed", 0), 0, MAX_SEED)
    edits = _list_edits(source, " ".join(words), flags, suffix=format, n=n)
    quality = _check_target(edits[0].targets[0], flags.get("output_compression"))
    there = set() if overwrite else {target for item in edits for target in item.targets if target.exists()}
    if there and is_single:
        raise ConfigError(f"{min(there)} exists; choose another --out or give --overwrite", param="out")
    if there:
        err.print(f"skipped {len(there)} results that are there; --overwrite makes them again", soft_wrap=True)
    edits = [item for item in edits if not there.issuperset(item.targets)]
    num_results, num_done, num_failed = sum(target not in there for item in edits for target in item.targets), 0, 0
    if not edits:
        return 0
    settings = locate_bundle(bundle).config.defaults.override(**given)
    mask = load_mask(flags["mask"], limits) if "mask" in flags else None
    if is_single:
        load_image(source, limits)
    from mgie.editor import CheckedEdit, Editor  # here: it needs torch, which `--help`, `info` and refusals do without

    editor = Editor.load(bundle, device=device, dtype=dtype)
    editor.renderer.schedule(settings)  # refuses what does not fit the bundle
    _warn_untrained(editor.bundle)

    def fail(item: _Edit, error: Exception, targets: Sequence[Path]) -> None:
        nonlocal num_failed
        if is_single:
            raise error
        num_failed += len(targets)
        err.print(f"{item.image}: {error}", style="red", markup=False, soft_wrap=True)

    def checked() -> Iterator[tuple[tuple[_Edit, Path], CheckedEdit]]:
        asked: dict[str, Any] = {"settings": settings, "mask": mask, "n": n}
        for item in edits:
            try:
                image = load_image(item.image, limits)
                made = editor.check(image, item.instruction, expressive=item.expressive, seed=item.seed, **asked)
            except MGIEError as error:
                fail(item, error, [target for target in item.targets if target not in there])
            else:
                yield from (((item, t), one) for t, one in zip(item.targets, made, strict=True) if t not in there)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        overall = bar.add_task("edits", total=num_results, visible=num_results > 1)
        steps = bar.add_task("steps", total=None)
        stream = editor.stream(
            checked(),
            batch_size=batch_size,
            on_step=lambda step: bar.update(steps, completed=step.done, total=step.total),
        )
        try:
            for (item, target), result in stream:
                try:
                    if isinstance(result, Exception):
                        raise result
                    result.save(target, quality=quality)
                except (MGIEError, OSError, RuntimeError) as error:
                    fail(item, error, [target])
                else:
                    num_done += 1
                    note = " (no visual tokens came: the words may have had no effect)" if result.used_fallback else ""
                    _print_result(target, result.expressive, result.seed, note)
                bar.update(overall, completed=num_done + num_failed)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{num_done} of {num_results} results are made; the same command goes on") from None
    if num_failed:
        err.print(f"{num_failed} of {num_results} edits failed")
    return 1 if num_failed else 0


def _print_result(target: Path, expressive: str, seed: int, note: str) -> None:
    out.print(f"{target}  seed {seed}{note}", markup=False, soft_wrap=True)
    if expressive:
        out.print(f"  {expressive}", markup=False, soft_wrap=True)


def _list_edits(source: Path, instruction: str, flags: EditFlags, *, suffix: str, n: int) -> list[_Edit]:
    """The edits that the arguments name, each with its own targets."""
    out, stem = flags.get("out"), None
    folder = out or Path("edited")
    if source.suffix == ".jsonl":
        if instruction:
            raise ConfigError(
                "an instruction was given beside a .jsonl file; the file names its own", param="instruction"
            )
        rows = _read_list(source)
    elif source.is_dir():
        if folder.resolve() == source.resolve():
            raise ConfigError(f"--out is {out}, the folder of the photos; it must be another one", param="out")
        rows = [{"image": image} for image in _list_images(source)]
    elif source.is_file():
        rows = [{"image": source}]
        folder = out or Path()
        if out is not None and not out.is_dir():
            output_format(out)
            folder, stem, suffix = out.parent, out.stem, out.suffix.removeprefix(".")
    else:
        raise ImageError(f"{source} is neither a file nor a folder")
    if source.suffix != ".jsonl":
        check_text(instruction, "instruction")
    names = number_names(stem or f"{row['image'].stem}-edited" for row in rows for _ in range(n))
    given = {"instruction": instruction, "expressive": flags.get("expressive"), "seed": flags.get("seed")}
    return [_Edit(**given | row, targets=tuple(folder / f"{next(names)}.{suffix}" for _ in range(n))) for row in rows]


def _list_images(folder: Path) -> list[Path]:
    """Images of a folder, sorted; says what else is there."""
    found = sorted(folder.iterdir())
    shown = [path for path in found if not path.name.startswith(".")]
    images = [path for path in shown if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    others = [f"{path.name}/" if path.is_dir() else path.name for path in shown if path not in images]
    if len(others) > _MAX_NAMED:
        others[_MAX_NAMED:] = [f"and {len(others) - _MAX_NAMED} more"]
    notes = [f"no images: {', '.join(others)}"] if others else []
    notes += [f"hidden files: {len(found) - len(shown)}"] if len(shown) < len(found) else []
    if not images:
        raise ImageError(f"{folder} holds no image; looked for {', '.join(IMAGE_SUFFIXES)}")
    if notes:
        err.print(f"skipped {'; '.join(notes)}", markup=False, soft_wrap=True)
    return images


def _check_target(target: Path, output_compression: int | None) -> int | None:
    """The quality that `write_image` takes. Raises ConfigError, ImageError: it could not be written as asked."""
    if output_format(target) == "png" and output_compression is not None:
        raise ConfigError(
            f"output_compression is {output_compression}; png is lossless and takes none", param="output_compression"
        )
    check_range("output_compression", output_compression or 0, 0, 100)
    folder = next(path for path in target.absolute().parents if path.exists())
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file; --out must be a folder here", param="out")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written to: {error.strerror}; choose another --out") from error
    return None if output_compression is None else max(1, output_compression)  # the encoders count from 1


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
        dtype: Number format of the weights written; keep = as in the sources.
        num_visual_tokens: Visual tokens of a fresh MGIE; default: 8.
        seed: Seed of what a fresh MGIE draws.
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
    if sys.argv[1:] == ["--version"]:
        out.print(f"mgie {__version__}", highlight=False)
        sys.exit(0)
    try:
        status = tyro.extras.subcommand_cli_from_dict(commands, prog="mgie", description="Edit photos with words.")
    except (MGIEError, OSError) as error:
        err.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        status = 2
    except KeyboardInterrupt as stopped:
        err.print(f"stopped{': ' if stopped.args else ''}{stopped}", soft_wrap=True)
        status = 130
    sys.exit(status)
