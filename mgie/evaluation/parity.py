"""Compares the model with reference vectors recorded from the original code.

A reference folder holds checkpoints in the published layouts, images, and `vectors.json` +
`vectors.safetensors` with what the original computed from them. Everything is recomputed here through the
code that serves and trains: the checkpoints are converted to a bundle and loaded from it.

A group passes when its worst difference is within its tolerance. It is "by design" only where a rule, not a
list, says that a recorded behaviour was mended on purpose (docs/model.md, "Deviations from the original").
"""

import contextlib
import dataclasses
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mgie.bundle.bundle import Bundle
from mgie.bundle.convert import convert
from mgie.config import EditSettings, GenerationConfig, Sources
from mgie.data.collate import MAX_LENGTH, ConversationCollator, EditExample, pixel_pair, vision_pixels
from mgie.errors import ParityError
from mgie.images.files import read_image
from mgie.images.geometry import Framing, center_square, resize, training_pixels
from mgie.images.pixels import to_signed
from mgie.inference.conditioner import EditRequest
from mgie.inference.renderer import RenderRequest
from mgie.model.batch import Conversations, PixelPair, TrainingBatch, TrainingDraws
from mgie.model.diffusion import widen_input
from mgie.model.generation import Generation, Generator, select_states
from mgie.model.mgie import MGIE
from mgie.model.mllm import VisionTower
from mgie.model.prompts import IGNORE, SUMMARIZE, clean_expressive, encode_answered, encode_question, generated_text
from mgie.model.sampler import denoise_step, make_schedule
from mgie.model.tokens import Control
from mgie.model.visual_states import gather_states, select_start

Verdict = Literal["pass", "fail", "by design"]

EXACT = 0.0
FLOAT_PIXELS = 1e-5
STATES = 1e-5  # hidden states, logits, features, losses: relative to the tensor's maximum
DEEP = 5e-5  # gradients, VAE latents, UNet output, step latents: relative to the tensor's maximum
FINAL_IMAGE = 1e-4  # absolute
GRADIENT_NORMS = 1e-4  # relative to each norm: small norms of deep parameters carry more rounding

_TURN_MARKERS = ("USER:", "ASSISTANT:")  # the original splits prompts at these, also in user text
_IMAGE_MARKER = "<image>"  # the original replaces it, also in user text


@dataclass
class Group:
    """One group of comparisons."""

    name: str
    tolerance: float
    compared: int = 0
    worst: float = 0.0
    problems: list[str] = field(default_factory=list)
    design_reason: str = ""

    @property
    def verdict(self) -> Verdict:
        """What came out."""
        if self.problems or not self.compared or not self.worst <= self.tolerance:
            return "fail"
        return "by design" if self.design_reason else "pass"

    @property
    def reason(self) -> str:
        """Why, where the verdict is not simply `pass`."""
        if self.verdict == "pass":
            return ""
        if not self.compared and not self.problems:
            return "nothing was compared"
        return "; ".join(self.problems[:5]) or self.design_reason or f"worst difference {self.worst:.3g}"

    def tensor(self, name: str, ours: Tensor, recorded: Tensor, *, relative: bool = True) -> None:
        """Compares numbers; the difference is divided by the recorded maximum if `relative`."""
        self.compared += recorded.numel()
        if ours.shape != recorded.shape:
            self.problems.append(f"{name} has shape {tuple(ours.shape)}, recorded {tuple(recorded.shape)}")
            return
        ours, recorded = ours.detach().double(), recorded.double()
        for side, values in (("", ours), ("recorded ", recorded)):
            if not torch.isfinite(values).all():
                self.problems.append(f"{side}{name} is not finite")
                return
        difference = float((ours - recorded).abs().max())
        if relative and difference:
            difference /= max(float(recorded.abs().max()), torch.finfo(torch.float32).tiny)
        self.worst = max(self.worst, difference)
        if difference > self.tolerance:
            self.problems.append(f"{name} differs by {difference:.3g}")

    def equal(self, name: str, ours: object, recorded: object) -> None:
        """Compares things that are equal or not; a difference counts as 1."""
        self.compared += 1
        if ours != recorded:
            self.worst = max(self.worst, 1.0)
            self.problems.append(f"{name} is {ours!r:.80}, recorded {recorded!r:.80}")


@dataclass(frozen=True)
class Report:
    """All groups and the overall verdict."""

    groups: tuple[Group, ...]

    @property
    def passed(self) -> bool:
        """Whether no group failed."""
        return all(group.verdict != "fail" for group in self.groups)

    def as_json(self) -> dict[str, Any]:
        """`{"groups": [{name, compared, worst, tolerance, verdict, reason}], "passed"}`."""
        names = ("name", "compared", "worst", "tolerance", "verdict", "reason")
        return {"groups": [{name: getattr(g, name) for name in names} for g in self.groups], "passed": self.passed}


def compare(folder: Path, progress: Callable[[str], None] = lambda _name: None) -> Report:
    """Recomputes and compares every recorded group of a reference folder.

    Args:
        progress: Called with each group's name before it is computed.

    Raises:
        ParityError: The folder is not laid out as expected.
        ConversionError: Its checkpoints cannot be converted.
    """
    try:
        record = json.loads((folder / "vectors.json").read_text(encoding="utf-8"))
        vectors = load_file(folder / "vectors.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ParityError(f"{folder} is not a reference folder: {error}") from error
    if not isinstance(record, dict):
        raise ParityError(f"{folder}/vectors.json holds a {type(record).__name__}; it must be an object")
    with tempfile.TemporaryDirectory() as scratch:
        bundle = convert(
            Path(scratch) / "bundle",
            Sources(
                llava=folder / "llava",
                clip=folder / "clip",
                stable_diffusion=folder / "stable-diffusion",
                mgie=folder / "mgie",
            ),
        )
        groups = []
        try:
            comparison = _Comparison(folder, record, vectors, bundle)
            for step in comparison.steps():
                progress(step.__name__)
                groups.extend(step())
        except KeyError as error:
            raise ParityError(f"the reference folder {folder} lacks the recorded entry {error}") from error
    return Report(tuple(groups))


class _Comparison:
    """The reference folder and the bundle made of it, and one method per family of groups."""

    def __init__(self, folder: Path, record: Mapping[str, Any], vectors: Mapping[str, Tensor], bundle: Bundle) -> None:
        self.folder, self.record, self.vectors, self.bundle = folder, record, vectors, bundle
        self.tokenizer = bundle.load_tokenizer()
        self.clip_pixels = bundle.load_clip_pixels()
        self.mgie: MGIE = bundle.load_mgie(device="cpu")
        self.conditioner = bundle.load_conditioner(device="cpu", dtype="float32")
        self.renderer = bundle.load_renderer(device="cpu", dtype="float32")
        self.num_visual = bundle.config.num_visual_tokens
        self.num_patches = self.mgie.mllm.num_patches
        self.side_px: int = record["meta"]["p2p_size"]
        self.samples = record["generation"]["samples"]

    def steps(self) -> list[Callable[[], list[Group]]]:
        """The families in the order of the data flow."""
        return [
            self.tokenizing, self.labels, self.cleaning, self.crops, self.pixels, self.training,
            self.gradients, self.dropout, self.edge, self.widening, self.generation, self.sampling,
        ]  # fmt: skip

    def image(self, relative: str) -> Image.Image:
        try:
            return read_image((self.folder / relative).read_bytes())
        except OSError as error:
            raise ParityError(f"{self.folder} lacks {relative}: {error.strerror}") from error

    def check(self, group: Group, ours: Mapping[str, Tensor], *, relative: bool = True) -> None:
        for name, tensor in ours.items():
            group.tensor(name, tensor, self.vectors[name], relative=relative)

    def tokenizing(self) -> list[Group]:
        ids = Group("tokenizing", EXACT)
        for token, token_id in self.record["tokenizer"]["ids"].items():
            ids.equal(f"id of {token}", self.tokenizer.encode(self.tokenizer.parse(token))[1:], [token_id])
        for row in self.record["tokenize_table"]:
            ids.equal(
                f"ids of {row['text']!r}", self.tokenizer.encode(self.tokenizer.parse(row["text"])), row["input_ids"]
            )
        for i, sample in enumerate(self.samples):
            ours = encode_question(self.tokenizer, sample["instruction"], self.num_patches)
            ids.equal(f"gen{i}.input_ids", ours, self.vectors[f"gen{i}.input_ids"].tolist())
        ids.equal("size of the vocabulary", self.tokenizer.vocab_size, self.record["tokenizer"]["size"])
        prompts = Group("prompts", EXACT)
        rendered, used = self.record["prompts"], self.record["prompts"]["instruction_used"]
        for name, instruction, for_data in (
            ("inference", used["inference"], False),
            ("data_generation", used["inference"], True),
        ):
            ours = encode_question(self.tokenizer, instruction, self.num_patches, for_data=for_data)
            prompts.equal(name, ours, self.tokenizer.encode(self.tokenizer.parse(rendered[name])))
        first = self.record["train_samples"][0]
        prompts.equal("instruction of the training prompt", first["instruction"], used["train"])
        ours = encode_answered(self.tokenizer, used["train"], first["expressive"], self.num_patches).ids
        prompts.equal("train", ours, self.tokenizer.encode(self.tokenizer.parse(rendered["train"])))
        summarizer = rendered["summarizer"]
        prompts.equal("summarizer", SUMMARIZE.format(text=summarizer["prompt_for"]), summarizer["prompt"])
        return [ids, prompts]

    def labels(self) -> list[Group]:
        plain, control = Group("labels", EXACT), Group("labels of rows with control text", EXACT)
        for row in self.record["label_table"]:
            ours = encode_answered(self.tokenizer, row["instruction"], row["expressive"], self.num_patches)
            name = f"row {row['instruction']!r} / {row['expressive']!r}"
            text = row["instruction"] + row["expressive"]
            parsed = any(marker in text for marker in (*self.tokenizer.control_tokens, _IMAGE_MARKER))
            if not parsed:
                plain.equal(f"{name}: ids", ours.ids, row["input_ids"])
            if not parsed and not any(marker in text for marker in _TURN_MARKERS):
                plain.equal(f"{name}: labels", ours.labels, row["labels"])
                continue
            # The promise here: the text stays text, no other control token than the template's, and exactly
            # the answer is unmasked. Recorded labels are those of another row, or mask everything.
            control.design_reason = "text that looks like control tokens or turn markers stays text and masks nothing"
            specials = {self.tokenizer.encode([Control(token)])[-1] for token in self.tokenizer.control_tokens}
            count = sum(token_id in specials for token_id in ours.ids)
            control.equal(f"{name}: control tokens", count, 1 + self.num_patches + 2 + self.num_visual + 1)
            answer = [token_id for token_id in ours.labels if token_id != IGNORE]
            masked = [token_id for token_id, label in zip(ours.ids, ours.labels, strict=True) if label == IGNORE]
            control.equal(f"{name}: unmasked text", self.tokenizer.decode(answer).strip(), row["expressive"].strip())
            control.equal(f"{name}: unmasked end", answer[-1 - self.num_visual :], self._end_ids())
            question = encode_question(self.tokenizer, row["instruction"], self.num_patches)
            control.equal(f"{name}: masked ids", masked, question)
        return [group for group in (plain, control) if group is plain or group.compared]

    def _end_ids(self) -> list[int]:
        return [*self.tokenizer.visual_ids, self.tokenizer.eos_id]

    def cleaning(self) -> list[Group]:
        same, mended = Group("cleaned strings", EXACT), Group("cleaned strings, mended", EXACT)
        rows = list(self.record["remove_alter"])
        rows += [{"input": sample["decoded"], "output": sample["expressive"]} for sample in self.samples]
        for row in rows:
            # The product knows where the output begins; in a recorded conversation the first marker says it.
            text = row["input"].split("ASSISTANT:", 1)[-1] if "ASSISTANT:" in row["input"] else row["input"]
            ours = clean_expressive(
                generated_text(self.tokenizer, self.tokenizer.encode(self.tokenizer.parse(text))[1:])
            )
            if fault := _cleaning_fault(row, text):
                mended.design_reason = (
                    "mended: error on empty text, sentences joined without a space, "
                    "decimal points taken for full stops, `alternative` inside words"
                )
                mended.equal(f"{row['input']!r} ({fault}) -> {ours!r}", _is_mended(ours, row, text, fault), True)
            else:
                same.equal(repr(row["input"]), ours, row["output"])
        return [group for group in (same, mended) if group is same or group.compared]

    def crops(self) -> list[Group]:
        crops = Group("crops", EXACT)
        for name in sorted({key.split(".")[1] for key in self.vectors if key.startswith("pre.")}):
            image = self.image(f"images/{name}.png")
            for key in [key for key in self.vectors if key.startswith(f"pre.{name}.")]:
                recorded, side = self.vectors[key], int((re.findall(r"resize(\d+)", key) or [self.side_px])[0])
                if key.endswith("train_chain"):
                    ours = _array(training_pixels(image, side))
                elif key.endswith("img2npy"):
                    ours = to_signed(resize(center_square(image), (side, side)))
                else:
                    corner = _array(resize(center_square(image), (side, side)))
                    ours = corner[: recorded.shape[0], : recorded.shape[1]]
                crops.tensor(key, ours, recorded, relative=False)
        for i, sample in enumerate(self.samples):
            image = resize(center_square(self.image(sample["image"])), (self.side_px, self.side_px))
            self.check(crops, {f"gen{i}.sd_image": _array(image)}, relative=False)
        return [crops]

    def pixels(self) -> list[Group]:
        pixels = Group("pixels", FLOAT_PIXELS)
        for i, sample in enumerate(self.samples):
            seen = self.clip_pixels([self.image(sample["image"])])[0]
            self.check(pixels, {f"gen{i}.pixel_values": seen}, relative=False)
        words, images = self._batch(self.record["train_samples"])
        ours = {"train.pixel_values": cast(Tensor, words.clip_pixels)}
        self.check(pixels, ours | {"train.p2p_inp": images.source, "train.p2p_ans": images.goal}, relative=False)
        return [pixels]

    def _batch(self, samples: list[dict[str, Any]], max_length: int = MAX_LENGTH) -> tuple[Conversations, PixelPair]:
        examples = [
            EditExample(
                source=self.image(sample["image"]),
                goal=self.image(sample["goal"]),
                instruction=sample["instruction"],
                expressive=sample["expressive"],
            )
            for sample in samples
        ]
        collate = ConversationCollator(self.tokenizer, num_patches=self.num_patches, max_length=max_length)
        words = [(example.instruction, example.expressive) for example in examples]
        clip_pixels = vision_pixels([example.source for example in examples], self.clip_pixels)
        return collate(words, clip_pixels=clip_pixels), pixel_pair(examples, self.side_px)

    def _draws(self, dropout_u: Tensor) -> TrainingDraws:
        return TrainingDraws(
            noise=self.vectors["train.noise"],
            posterior_noise=self.vectors["train.posterior_noise"],
            timesteps=self.vectors["train.timesteps"],
            dropout_u=dropout_u,
        )

    @torch.no_grad()
    def training(self) -> list[Group]:
        (words, images), v, mgie = self._batch(self.record["train_samples"]), self.vectors, self.mgie
        ids = Group("training ids, mask and labels", EXACT)
        self._check_ids(ids, "train", words)
        ids.equal("train_select_index", words.state_starts.tolist(), self.record["train_select_index"])

        features = Group("image features and input embeddings", STATES)
        pixels = cast(Tensor, words.clip_pixels)
        projected = mgie.mllm.image_features(pixels)
        ours = {
            "train.clip_features": cast(VisionTower, mgie.mllm.vision)(pixels),
            "train.projected_features": projected,
            "train.inputs_embeds": mgie.mllm.embed(words.input_ids, projected),
        }
        self.check(features, ours)

        hidden = mgie.hidden(words)
        states = Group("hidden states and logits", STATES)
        # States of padding are never used, and need not be what the original computed from padding.
        real = words.mask[..., None]
        states.tensor("train.hidden", hidden * real, v["train.hidden"] * real)
        states.tensor("train.logits", mgie.mllm.logits(hidden) * real, v["train.logits"] * real)
        self.check(states, {"train.selected_hidden": gather_states(hidden, words.state_starts, self.num_visual)})

        condition, null_condition = mgie.condition(hidden, words.state_starts)
        edit = Group("edit features", STATES)
        emb = mgie.mllm.visual_embeddings(self.num_visual).expand_as(v["train.emb"])
        ours = {"train.emb": emb, "train.edit_features": condition, "gen.null_features": null_condition}
        self.check(edit, ours | {"train.null_features": null_condition.expand_as(condition)})

        latents = Group("latents", DEEP)
        mean, logvar = mgie.vae.moments(images.goal)
        goal, source = mgie.latents(images, v["train.posterior_noise"])
        noisy = mgie.schedule.add_noise(goal, v["train.noise"], v["train.timesteps"])
        ours = {"train.vae_ans_mean": mean, "train.vae_ans_logvar": logvar, "train.lat_ans": goal}
        ours |= {"train.lat_inp": source, "train.lat_noise": noisy, "sched.alphas_cumprod": mgie.schedule.abar}
        self.check(latents, ours)

        unet = Group("UNet", DEEP)
        self.check(unet, {"train.unet_out": mgie.predict(noisy, source, v["train.timesteps"], condition)})

        losses = Group("losses", STATES)
        self._check_losses(losses, "train", words, images, v["train.prob_nodrop"])
        return [ids, features, states, edit, latents, unet, losses]

    def _check_ids(self, group: Group, prefix: str, words: Conversations) -> None:
        ours = {"input_ids": words.input_ids, "labels": words.labels, "attention_mask": words.mask.long()}
        self.check(group, {f"{prefix}.{name}": tensor for name, tensor in ours.items()}, relative=False)

    def _check_losses(
        self, group: Group, prefix: str, words: Conversations, images: PixelPair, dropout_u: Tensor
    ) -> None:
        losses = self.mgie(TrainingBatch(words=words, images=images), self._draws(dropout_u))
        for name, ours in (("loss_ce", losses.instruction), ("loss_edit", losses.edit), ("loss", losses.total)):
            if (recorded := self.vectors.get(f"{prefix}.{name}")) is not None:
                group.tensor(f"{prefix}.{name}", ours, recorded)

    def gradients(self) -> list[Group]:
        words, images = self._batch(self.record["train_samples"])
        losses = self.mgie(TrainingBatch(words=words, images=images), self._draws(self.vectors["train.prob_nodrop"]))
        losses.total.backward()
        ours = {_published_name(name): p.grad for name, p in self.mgie.named_parameters() if p.grad is not None}
        values, norms = Group("gradients", DEEP), Group("gradient norms", GRADIENT_NORMS)
        for name in [key.removeprefix("grad.") for key in self.vectors if key.startswith("grad.")]:
            values.tensor(f"grad.{name}", ours.get(name, torch.tensor(0.0)), self.vectors[f"grad.{name}"])
        recorded = self.record["gradient_norms"]
        trained = {_published_name(name) for name, p in self.mgie.named_parameters() if p.requires_grad}
        norms.equal("trained parameters", sorted(trained), sorted(recorded["per_parameter"]))
        for name, norm in recorded["per_parameter"].items():
            grad = ours.get(name, torch.tensor(0.0))
            norms.tensor(name, grad.double().norm(), torch.tensor(norm, dtype=torch.float64))
        for name, norm in recorded["groups"].items():
            prefix = "model.embed_tokens" if name == "embed_tokens" else name
            members = [g for key, g in ours.items() if name == "all" or key == prefix or key.startswith(prefix + ".")]
            total = torch.cat([torch.zeros(1), *(g.double().flatten() for g in members)]).norm()
            norms.tensor(f"group {name}", total, torch.tensor(norm, dtype=torch.float64))
        self.mgie.zero_grad()
        return [values, norms]

    @torch.no_grad()
    def dropout(self) -> list[Group]:
        (words, images), v = self._batch(self.record["train_samples"]), self.vectors
        group = Group("condition dropout", DEEP)
        unet = self.mgie.unet
        with _recorded_inputs(unet) as seen:
            self._check_losses(group, "drop", words, images, v["drop.prob"])
        names = {"sample": "drop.unet_in", "condition": "drop.text", "output": "drop.unet_out"}
        self.check(group, {name: seen[ours] for ours, name in names.items()})
        boundaries = self.record["dropout_boundaries"]
        u = torch.tensor(boundaries["prob"], dtype=torch.float32)
        with _recorded_inputs(unet) as seen:
            losses = self.mgie(TrainingBatch(words=words, images=images), self._draws(u))
        null = v["train.null_features"]
        group.tensor("boundary loss", losses.total, torch.tensor(boundaries["loss"]))
        for i, (text, image) in enumerate(zip(boundaries["text_null"], boundaries["image_null"], strict=True)):
            half = seen["sample"].shape[1] // 2
            group.equal(f"u = {u[i]:.2f}: text null", torch.allclose(seen["condition"][i], null[i], atol=1e-5), text)
            group.equal(f"u = {u[i]:.2f}: image null", bool((seen["sample"][i, half:] == 0).all()), image)
        return [group]

    @torch.no_grad()
    def edge(self) -> list[Group]:
        edge, v = self.record["edge_samples"], self.vectors
        words, images = self._batch(edge["samples"], max_length=edge["model_max_length"])
        ids = Group("edge batch: ids and selection", EXACT)
        numbers = Group("edge batch: states, features, losses", STATES)
        self._check_ids(ids, "edge", words)
        ids.equal("select_index", words.state_starts.tolist(), edge["select_index"])
        hidden, real = self.mgie.hidden(words), words.mask[..., None]
        numbers.tensor("edge.hidden", hidden * real, v["edge.hidden"] * real)
        ours = {
            "edge.selected_hidden": gather_states(hidden, words.state_starts, self.num_visual),
            "edge.edit_features": self.mgie.condition(hidden, words.state_starts)[0],
        }
        self.check(numbers, ours)
        self._check_losses(numbers, "edge", words, images, v["train.prob_nodrop"])
        return [ids, numbers]

    def widening(self) -> list[Group]:
        group, v = Group("widened input convolution", EXACT), self.vectors
        weight = v["init.conv_in_4ch.weight"]
        unet = self.bundle.load_unet()
        unet.conv_in = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[-1], padding=1)
        unet.conv_in.weight.data, unet.conv_in.bias.data = weight.clone(), v["init.conv_in_4ch.bias"].clone()
        widened = widen_input(unet, v["init.conv_in_8ch.weight"].shape[1]).conv_in
        self.check(group, {"init.conv_in_8ch.weight": widened.weight}, relative=False)
        name = "bias (copied; the original leaves it random)"
        group.tensor(name, widened.bias, v["init.conv_in_4ch.bias"], relative=False)
        return [group]

    def generation(self) -> list[Group]:
        v = self.vectors
        ids, states = Group("generated ids", EXACT), Group("generation: states", STATES)
        selection, edit = Group("selection of states", EXACT), Group("generation: edit features", STATES)
        to_eos = GenerationConfig(max_new_tokens=self.record["generation"]["max_new_tokens"], stop="eos")
        early = dataclasses.replace(to_eos, stop="visual_tokens")
        rows, repeating = self._generate(to_eos), self._generate(dataclasses.replace(to_eos, no_repeat_ngram_size=0))
        for i, (row, sample) in enumerate(zip(repeating, self.samples, strict=True)):
            ids.equal(f"gen{i}: output_without_ngram_constraint", row.ids, sample["output_without_ngram_constraint"])
        requests = [
            EditRequest(image=self.image(sample["image"]), instruction=sample["instruction"]) for sample in self.samples
        ]
        for i, (row, sample) in enumerate(zip(rows, self.samples, strict=True)):
            ids.equal(f"gen{i}.output_ids", row.ids, v[f"gen{i}.output_ids"].tolist())
            ids.equal(f"gen{i}: position of [IMG0]", row.visual_start, sample["img0_position"])
            ids.equal(f"gen{i}: ended", row.output_ids[-1] == self.tokenizer.eos_id, sample["ended_with_eos"])
            selected = select_states(row, self.num_visual)
            self.check(states, {f"gen{i}.hidden": row.hidden, f"gen{i}.selected_hidden": selected})
            start = select_start(len(row.hidden), row.visual_start, self.num_visual, complete=not row.ended_early)
            selection.equal(f"gen{i}: p", start, sample["p"])
        for config in (to_eos, early):
            for i, edit_condition in enumerate(self.conditioner.derive(requests, config)):
                name = f"gen{i}.edit_features, stop {config.stop}"
                edit.tensor(name, edit_condition.condition[None], v[f"gen{i}.edit_features"])
        return [ids, states, selection, edit]

    def _generate(self, config: GenerationConfig) -> list[Generation]:
        mllm = self.mgie.mllm
        images = [self.image(sample["image"]) for sample in self.samples]
        prompts = [encode_question(self.tokenizer, sample["instruction"], self.num_patches) for sample in self.samples]
        generator = Generator(mllm, eos_id=self.tokenizer.eos_id, visual_ids=self.tokenizer.visual_ids)
        with torch.inference_mode():
            return generator.generate(prompts, mllm.image_features(self.clip_pixels(images)), config)

    @torch.inference_mode()
    def sampling(self) -> list[Group]:
        v, renderer, recorded = self.vectors, self.renderer, self.record["generation"]["diffusion"]
        settings = EditSettings(
            sampler="euler_ancestral",
            steps=recorded["steps"],
            guidance_scale=recorded["guidance_scale"],
            image_guidance_scale=recorded["image_guidance_scale"],
        )
        schedule = Group("noise schedule", STATES)
        made = make_schedule(self.bundle.scheduler_config(), settings.sampler, settings.steps)
        self.check(schedule, {f"gen.scheduler_{n}": torch.tensor(getattr(made, n)) for n in ("timesteps", "sigmas")})
        draws, steps = Group("noise draws", EXACT), Group("sampling trajectory", DEEP)
        unet, image = Group("guided UNet input and output", DEEP), Group("final image", FINAL_IMAGE)
        edit_conditions = self.conditioner.derive(
            [EditRequest(image=self.image(s["image"]), instruction=s["instruction"]) for s in self.samples],
            GenerationConfig(max_new_tokens=self.record["generation"]["max_new_tokens"]),
        )
        for i, (sample, edit_condition) in enumerate(zip(self.samples, edit_conditions, strict=True)):
            source = resize(center_square(self.image(sample["image"])), (self.side_px, self.side_px))
            request = RenderRequest(
                image=source, edit_condition=edit_condition, settings=settings, seed=recorded["seed"]
            )
            # Recorded images are of the working size already, whichever the bundle works at.
            framing = Framing(source_wh=source.size, work_wh=source.size, square_crop=False)
            state = renderer.start(renderer.prepare(request, framing), request.seed)
            self.check(steps, {f"gen{i}.image_latents": state.image_latents[None]})
            self.check(draws, {f"gen{i}.init_latents": state.latents[None]}, relative=False)
            stream = torch.Generator().set_state(state.generator.get_state())
            for k, noise in enumerate(v[f"gen{i}.step_noise"]):
                drawn = torch.randn(noise.shape, generator=stream)
                draws.tensor(f"gen{i}.step_noise {k}", drawn, noise, relative=False)
            calls: list[tuple[Tensor, Tensor]] = []

            def denoiser(latents: Tensor, timesteps: Tensor, condition: Tensor, calls: list[Any] = calls) -> Tensor:
                output = renderer.denoiser(latents, timesteps, condition)
                calls.append((latents, output))
                return output

            for k, latents in enumerate(v[f"gen{i}.step_latents"]):
                denoise_step(denoiser, [state])
                steps.tensor(f"gen{i}.step_latents {k}", state.latents[None], latents)
            self.check(unet, {f"gen{i}.unet_in_step0": calls[0][0], f"gen{i}.unet_out_step0": calls[0][1]})
            pixels = (renderer.vae.decode(state.latents[None])[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)
            self.check(image, {f"gen{i}.image": pixels}, relative=False)
        return [schedule, draws, unet, steps, image]


def _published_name(name: str) -> str:
    """A parameter's name in the published checkpoints."""
    return name.removeprefix("mllm.llm.")


def _array(image: Image.Image) -> Tensor:
    """uint8 HWC pixels, as recorded."""
    return ((to_signed(image).permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8)


@contextlib.contextmanager
def _recorded_inputs(unet: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects what goes into and comes out of the UNet."""
    seen: dict[str, Tensor] = {}

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.update(sample=args[0], condition=kwargs["encoder_hidden_states"], output=output[0])

    handle = unet.register_forward_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _cleaning_fault(row: Mapping[str, str], text: str) -> str:
    """Which mended fault of the published clean-up a recorded row shows; "" = none."""
    if "raises" in row or not any(char.isalnum() for char in row["output"]):
        return "no text"
    if re.search(r"\d\.\d", text):
        return "decimal point"
    if re.search(r"\w(?i:alternative)|(?i:alternative)(?!ly\b)\w", text):
        return "`alternative` inside a word"
    if re.search(r"\.\S", row["output"]):
        return "joined without a space"
    return ""


def _is_mended(ours: str, row: Mapping[str, str], text: str, fault: str) -> bool:
    """Whether our result is the recorded one but for the fault."""
    if fault == "no text":
        return ours == ""
    if fault == "joined without a space":
        return re.sub(r"\.\s", ".", ours) == row["output"]
    # The original cut too early: its result is where ours begins, and ours is the text itself.
    return ours.startswith(row["output"].rstrip(".")) and ours.rstrip(".") in " ".join(text.split())
