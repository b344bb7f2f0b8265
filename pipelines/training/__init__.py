"""The parts of the training job.

config.py        settings
job.py           a run from claim to report
rows.py          a run's own copy of its rows
checkpoints.py   a run's checkpoints, and Ray's index of them
tracking.py      numbers and pictures of a run
sample_sheet.py  edits of fixed rows as one picture
worker.py        what each worker does
"""
