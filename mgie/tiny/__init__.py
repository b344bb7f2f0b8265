"""How the embedded models came to be: the world that they know, and their training.

sample.py     a data set drawn without the world, for a first try
world/        the procedural world: scenes, edits, words, the object check
pretraining/  one file per tiny model
"""
