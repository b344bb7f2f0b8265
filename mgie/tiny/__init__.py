"""How the embedded models came to be: the world that they know, and their training.

world/        the procedural world: scenes, edits, words, the object check
pretraining/  one file per tiny model
"""
