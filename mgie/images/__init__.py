"""Pictures as files and as pixels: reading, framing, masks, detail at full size.

files.py            bytes <-> RGB, limits, orientation, metadata
pictures.py         pictures and masks of any kind: paths, arrays, tensors
geometry.py         framing, resizing, crops
pixels.py           pictures as tensors: pixel ranges, CLIP pixels
masks.py            where an edit may change the picture
detail_transfer.py  carries a small picture's change onto the full-size source
"""
