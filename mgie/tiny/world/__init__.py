"""The procedural world: small drawn scenes and photo-like pictures, edits of them with exact goals, and all words.

    scene.py         what stands where, in which light; sampling      paint.py    colours, light, canvases
    things.py        how each thing is drawn                          draw.py     a whole scene; its map of regions
    photos.py        photo-like pictures                              filters.py  optimisations, as functions of pixels
    edits.py         what each change makes of a scene                operations.py   how each is sampled
    ambiguities.py   edits that words leave open
    nouns.py         what things are called; captions                 wordings.py how people ask (+ wordings.txt)
    instructions.py  the user's words                                 answers.py  verbose and expressive texts (+ answers.txt)
    samples.py       one sample by seed, split and number             checker.py  the object check
    layouts.py       raw data sets in every layout that is read

Plain numpy and Pillow; the same arguments give the same pixels and words for the same versions of these.
"""

from mgie.tiny.world.answers import states_change
from mgie.tiny.world.checker import Check, check_edit
from mgie.tiny.world.layouts import LAYOUTS, write_layout
from mgie.tiny.world.samples import Sample, make_sample

__all__ = ["LAYOUTS", "Check", "Sample", "check_edit", "make_sample", "states_change", "write_layout"]
