"""What the models shall learn to say: verbose answers and concise expressive instructions, and whether a text says it.

The verbose answer describes, as LLaVA would, what the picture would be like: two to four sentences. The expressive
instruction names the right thing and the change in at most 32 words, however little the user said. `KEYWORDS` is
what a text must name to state the change.
"""

import re

from numpy.random import Generator

from mgie.tiny.world.edits import Edit
from mgie.tiny.world.nouns import caption, full_reference, listed, references
from mgie.tiny.world.operations import OPERATIONS
from mgie.tiny.world.scene import Scene, pick

# Operation -> expressive instruction / what would be seen (two ways each) / keywords, alternatives by "|".
_ANSWERS: dict[str, tuple[tuple[str, str], tuple[str, str], str]] = {
    "recolor": (
        ("Change the colour of {full} from {old} to {color}.", "Paint {full} {color}."),
        ("{full} would be {color} instead of {old}.", "{full} would have been painted {color}, and no {old} would be left on it."),
        "{name} {color}",
    ),
    "recolor_part": (
        ("Change the {part} of {full} from {old} to {color}.", "Paint the {part} of {full} {color}."),
        ("the {part} of {full} would be {color} instead of {old}.", "{full} would have a {color} {part} where it was {old}."),
        "{part} {color}",
    ),
    "remove": (
        ("Remove {full} and show the {behind} behind it.", "Take {full} away, so that only the {behind} is left there."),
        ("{full} would be gone, and the {behind} would be seen in its place.", "there would be no trace of {full}, only the {behind} behind it."),
        "{name} remove|gone|away|without|no",
    ),
    "remove_all": (
        ("Remove all the {all} from the picture.", "Take away the {all}, so that none is left."),
        ("all the {all} would be gone.", "there would be no {all} any more, only what was behind them."),
        "{all} remove|gone|away|without|no",
    ),
    "add": (
        ("Add {new} {place}.", "Put {new} into the picture {place}."),
        ("there would be {new} {place}.", "{new} would have appeared {place}."),
        "{new} {place}",
    ),
    "duplicate": (
        ("Add a second {name} like {full}, {place}.", "Copy {full}, so that another {name} stands {place}."),
        ("there would be a second {name} {place}, just like {full}.", "{full} would have a twin {place}."),
        "{name} second|another|copy|twin {place}",
    ),
    "replace": (
        ("Replace {full} with {new}.", "Put {new} in the place of {full}."),
        ("there would be {new} in the place of {full}.", "{full} would be gone, and {new} would be there instead."),
        "{name} {new}",
    ),
    "move": (
        ("Move {full} {where}.", "Take {full} from where it is {where}."),
        ("{full} would have moved {where}.", "{full} would not be {place} any more but {where}."),
        "{name} {where}",
    ),
    "enlarge": (
        ("Make {full} larger.", "Enlarge {full}, so that it is clearly larger."),
        ("{full} would be larger than before.", "{full} would have grown larger and take up more room."),
        "{name} larger",
    ),
    "shrink": (
        ("Make {full} smaller.", "Shrink {full}, so that it is clearly smaller."),
        ("{full} would be smaller than before.", "{full} would have shrunk and be much smaller."),
        "{name} smaller",
    ),
    "turn_around": (
        ("Turn {full} around, so that it faces the {side}.", "Make {full} face the {side}."),
        ("{full} would face the {side}.", "{full} would be turned around and face the {side}."),
        "{name} face|faces {side}",
    ),
    "swap_places": (
        ("Swap the places of {full} and {full_other}.", "Let {full} and {full_other} change places."),
        ("{full} would be where {full_other} was, and the other way round.", "{full} and {full_other} would have changed places."),
        "places|where {full} {full_other}",
    ),
    "swap_colors": (
        ("Swap the colours of {full} and {full_other}.", "Let {full} and {full_other} change colours."),
        ("{full} would be {color}, and {full_other} would be {old}: their colours would be swapped.", "{full} and {full_other} would have changed colours."),
        "colours {old} {color}",
    ),
    "put_on_hat": (
        ("Put {new} on the head of {full}.", "Let {full} wear {new}."),
        ("{full} would wear {new}.", "there would be {new} on the head of {full}."),
        "{new}",
    ),
    "brighter": (
        ("Make the whole picture {degree} brighter.", "Raise the brightness of the picture {degree}, so that all is brighter."),
        ("everything would be {degree} brighter, and the dark parts would show more.", "the light would be {degree} brighter all over."),
        "brighter {degree}",
    ),
    "darker": (
        ("Make the whole picture {degree} darker.", "Lower the brightness of the picture {degree}, so that all is darker."),
        ("everything would be {degree} darker.", "the light would be dim and all {degree} darker."),
        "darker {degree}",
    ),
    "more_contrast": (
        ("Increase the contrast of the picture {degree}.", "Give the whole picture {degree} more contrast."),
        ("there would be {degree} more contrast, with deeper darks and lighter lights.", "the picture would have {degree} more contrast."),
        "contrast more|increase {degree}",
    ),
    "less_contrast": (
        ("Reduce the contrast of the picture {degree}.", "Give the whole picture {degree} less contrast."),
        ("there would be {degree} less contrast, and all would look flat and soft.", "the picture would have {degree} less contrast."),
        "contrast less|reduce {degree}",
    ),
    "more_saturation": (
        ("Make all colours {degree} stronger.", "Make the colours of the picture {degree} stronger and more vivid."),
        ("the colours would be {degree} stronger.", "all colours would be vivid and {degree} stronger."),
        "colours stronger {degree}",
    ),
    "less_saturation": (
        ("Make all colours {degree} weaker.", "Make the colours of the picture {degree} weaker and more muted."),
        ("the colours would be {degree} weaker.", "all colours would be muted and {degree} weaker."),
        "colours weaker {degree}",
    ),
    "warmer": (
        ("Make the colours of the whole picture {degree} warmer.", "Give the picture a {degree} warmer, yellowish tone."),
        ("the colours would be {degree} warmer, with a golden tone.", "all would lie in a {degree} warmer light."),
        "warmer {degree}",
    ),
    "cooler": (
        ("Make the colours of the whole picture {degree} cooler.", "Give the picture a {degree} cooler, bluish tone."),
        ("the colours would be {degree} cooler, with a bluish tone.", "all would lie in a {degree} cooler light."),
        "cooler {degree}",
    ),
    "sharpen": (
        ("Sharpen the whole picture, so that edges are crisp.", "Make the picture sharper and bring out the details."),
        ("the edges would be sharper and the details would stand out.", "the picture would be crisp and sharper."),
        "sharpen|sharper",
    ),
    "blur": (
        ("Blur the whole picture softly.", "Make the picture blurred, so that details are lost."),
        ("the picture would be blurred, and no details would be seen.", "everything would be soft, blurred and out of focus."),
        "blur|blurred",
    ),
    "vignette": (
        ("Darken the corners of the picture with a vignette.", "Add a dark vignette around the picture."),
        ("a vignette would darken the corners, and the middle would stand out.", "the corners would fade to dark in a vignette."),
        "vignette",
    ),
    "black_and_white": (
        ("Turn the picture into black and white.", "Remove all colour, so that the picture is black and white."),
        ("the picture would be black and white, with no colour left.", "only tones of grey would be left, as in a black and white photograph."),
        "black white",
    ),
    "sepia": (
        ("Give the whole picture a brown sepia tone.", "Turn the picture into sepia, like a very old photograph."),
        ("the picture would be in brown sepia tones, like a very old photograph.", "all colours would give way to a sepia tone."),
        "sepia",
    ),
    "vintage": (
        ("Give the picture a faded vintage look.", "Fade the colours, so that the picture looks like a vintage print."),
        ("the picture would have the faded colours of a vintage print.", "the darks would be faded and the colours pale, as in a vintage film."),
        "vintage",
    ),
    "professional": (
        ("Correct the levels and colours, so that the picture looks professional.", "Balance light and colours for a clear, professional picture."),
        ("light and colours would be balanced, as in a professional photograph.", "the picture would look professional, with full tones and clear colours."),
        "professional",
    ),
    "fix_light": (
        ("Correct the exposure: the picture is {fault}, make it {remedy}.", "Make the picture {remedy}, as it is {fault}."),
        ("the picture would not be {fault} any more but {remedy}, with a natural light.", "the light would be natural and {remedy}, since it was {fault}."),
        "{remedy}",
    ),
    "fix_colors": (
        ("Correct the colours: the picture is {fault}, make it {remedy}.", "Make the colours {remedy}, as the picture is {fault}."),
        ("the picture would not be {fault} any more but {remedy}, with natural colours.", "the colours would be natural and {remedy}, since they were {fault}."),
        "{remedy}",
    ),
    "denoise": (
        ("Remove the noise from the picture.", "Take away the grain, so that the picture is free of noise."),
        ("the noise would be gone, and the surfaces would be smooth.", "there would be no grain or noise left."),
        "noise",
    ),
    "night": (
        ("Turn the scene into night: a dark blue sky and little light.", "Make it night, dark and blue."),
        ("it would be night, and the sky would be dark blue.", "the daylight would be gone and the darkness of the night would lie over all."),
        "night",
    ),
    "day": (
        ("Turn the {was} into bright day, with a light sky.", "Make it day, with full daylight on everything."),
        ("it would be bright day, and everything would lie in full light.", "the {was} would give way to the light of day."),
        "day",
    ),
    "dusk": (
        ("Turn the scene into dusk: an orange and purple sky at sunset.", "Make it sunset, with warm light and an orange sky."),
        ("the sun would set, and the sky would be orange and purple at dusk.", "the warm light of sunset would lie over everything."),
        "dusk|sunset",
    ),
    "spring": (
        ("Turn the {was} into spring: fresh green and blossoms.", "Make it spring, with light green trees and flowers."),
        ("it would be spring, with fresh green and pink blossoms on the trees.", "the {was} would be over, and flowers would announce the spring."),
        "spring",
    ),
    "summer": (
        ("Turn the {was} into summer: deep green trees and grass.", "Make it summer, with lush green trees."),
        ("it would be summer, and the trees and the grass would be deep green.", "the {was} would have turned into a green summer."),
        "summer",
    ),
    "autumn": (
        ("Turn the {was} into autumn: orange leaves and dry grass.", "Make it autumn, with orange and red trees."),
        ("it would be autumn, with orange leaves and dry grass.", "the {was} would be over, and the trees would wear the colours of autumn."),
        "autumn",
    ),
    "winter": (
        ("Turn the {was} into winter: snow on the ground and bare trees.", "Make it winter, with snow on the ground and on the roofs."),
        ("it would be winter, with snow on the ground and bare trees.", "the {was} would be over, and all would lie under the snow of winter."),
        "winter",
    ),
    "clear": (
        ("Make the sky clear: no more {was}.", "Replace the {was} by clear weather."),
        ("the weather would be clear, without {was}.", "the {was} would be gone and the sky would be clear."),
        "clear",
    ),
    "cloudy": (
        ("Cover the sky with grey clouds.", "Make the weather cloudy, with a grey sky full of clouds."),
        ("the sky would be covered with grey clouds.", "heavy clouds would hide the sky, and the light would be dull."),
        "clouds",
    ),
    "rain": (
        ("Let it rain: grey clouds and thin lines of rain.", "Add rain that falls from a grey sky."),
        ("rain would fall in thin lines from a grey sky.", "it would rain, and all would look grey and wet."),
        "rain",
    ),
    "snow": (
        ("Let it snow: white flakes in the air.", "Add falling snow, with white flakes all over the picture."),
        ("white flakes of snow would fall from a grey sky.", "the air would be full of snow."),
        "snow",
    ),
    "fog": (
        ("Cover the scene with thick fog.", "Add fog that hides what is far away."),
        ("thick fog would hide what is far away.", "everything would fade into grey fog."),
        "fog",
    ),
    "rainbow": (
        ("Add a large rainbow to the sky.", "Let a rainbow appear in the sky behind the scene."),
        ("a large rainbow would stand in the sky.", "the sky would show a rainbow in all its colours."),
        "rainbow",
    ),
    "lights_on": (
        ("Turn on {lights}.", "Let {lights} be on and shine with a warm yellow light."),
        ("{lights} would be on and shine with a warm yellow glow.", "a warm glow would show that {lights} would be on."),
        "{lights} on",
    ),
    "lights_off": (
        ("Turn off {lights}.", "Let {lights} be off and dark."),
        ("{lights} would be off and dark.", "there would be no glow any more, since {lights} would be off."),
        "{lights} off",
    ),
    "open_door": (
        ("Open the {door} door of {full}.", "Let the door of {full} stand open."),
        ("the {door} door of {full} would stand open.", "one could look in by the open door of {full}."),
        "door open",
    ),
    "close_door": (
        ("Close the {door} door of {full}, so that it is closed.", "Let the door of {full} be closed."),
        ("the {door} door of {full} would be closed.", "the closed door of {full} would be seen."),
        "door closed",
    ),
    "light_fire": (
        ("Let smoke rise from the chimney of {full}.", "Add white smoke above the chimney of {full}."),
        ("white smoke would rise from the chimney of {full}.", "smoke above the chimney would show that there is a fire in {full}."),
        "smoke chimney",
    ),
}  # fmt: skip

_OPENINGS = ("", "", "In the edited picture, ", "If the picture were edited in this way, ")
_REST = (
    "The rest would stay as it is.",
    "Nothing else in the picture would change.",
    "Everything else would look the same.",
)
_WHOLE = ("All things would stay in their places.", "What the picture shows would stay the same.")
_MOODS: dict[str, tuple[str, str]] = {
    "night": ("The mood would be quiet and calm.", "The place would look quiet and a little secret."),
    "dusk": ("The mood would be warm and peaceful.", "The light would be soft."),
    "winter": ("The mood would be cold and still.", "The air would look cold and clear."),
    "autumn": ("The colours would be warm.", "The mood would be calm."),
    "spring": ("The mood would be fresh and friendly.", "Everything would look young and bright."),
    "summer": ("The mood would be warm and friendly.", "Everything would look full of life."),
    "rain": ("The mood would be gloomy.", "One would like to be inside."),
    "snow": ("The mood would be still.", "The flakes would dance in the air."),
    "fog": ("The mood would be mysterious.", "Only what is near would be clear to see."),
    "lights_on": ("It would look inviting.", "The mood would be cosy."),
    "light_fire": ("It would look inviting.", "The mood would be cosy."),
    "rainbow": ("The mood would be cheerful.", "It would look like after a shower."),
}


def express(rng: Generator, edit: Edit) -> str:
    """The concise expressive instruction: one sentence, at most 32 words."""
    return _filled(pick(rng, _ANSWERS[edit.operation][0]), edit)


def describe(rng: Generator, edit: Edit) -> str:
    """The verbose answer: two to four sentences on what the edited picture would be like."""
    sentences = [_capitalized(pick(rng, _OPENINGS) + _filled(pick(rng, _ANSWERS[edit.operation][1]), edit))]
    if edit.operation in ("night", "dusk") and isinstance(edit.goal, Scene) and edit.goal.of("house", "lamp"):
        sentences.append("The lights would be on and shine.")
    elif edit.operation in _MOODS and rng.random() < 0.7:
        sentences.append(pick(rng, _MOODS[edit.operation]))
    if rng.random() < 0.5:
        sentences += _unchanged(rng, edit)
    sentences.append(pick(rng, _REST if OPERATIONS[edit.operation].family == "modification" else _WHOLE))
    return " ".join(sentences)


def states_change(text: str, edit: Edit) -> bool:
    """Whether a text names the thing and the change of an edit: every keyword, as whole words."""
    said = f" {' '.join(re.findall('[a-z]+', text.lower()))} "
    return all(any(f" {one} " in said for one in group.split("|")) for group in _keywords(edit))


_LIGHTS = {"house": ["house|houses"], "lamp": ["lamp|lamps"], "car": ["headlights"]}


def _keywords(edit: Edit) -> list[str]:
    """What a text must name; each is one word or phrase, or several with `|` between."""
    groups: list[str] = []
    for pattern in _ANSWERS[edit.operation][2].split(" "):
        if pattern == "{lights}":
            groups += [one for kind in edit.target.split(" ") for one in _LIGHTS[kind]]
        else:
            groups.append(pattern.format(**edit.slots).removeprefix("the "))
    return [group for group in groups if group]


def _filled(template: str, edit: Edit) -> str:
    text = re.sub(" +", " ", template.format(**edit.slots)).replace(" ,", ",").replace(" .", ".")
    return _capitalized(text) if template[0].isupper() else text


def _capitalized(text: str) -> str:
    return text[0].upper() + text[1:]


def _unchanged(rng: Generator, edit: Edit) -> list[str]:
    """A sentence on what the edit leaves alone, where there is something."""
    if not (isinstance(edit.source, Scene) and isinstance(edit.goal, Scene)):
        return [f"One would still see {caption(edit.source)}."]
    kept = [thing for thing in edit.source.things if thing in edit.goal.things and references(edit.source, thing)]
    named = [full_reference(edit.source, kept[int(i)]) for i in rng.permutation(len(kept))[:2]]
    if not named:
        return []
    return [f"{_capitalized(listed(named))} would {pick(rng, ('not be touched', 'still be there'))}."]
