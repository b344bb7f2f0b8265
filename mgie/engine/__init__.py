"""Continuous batching: edits join and leave at step borders. Knows no HTTP.

handle.py            what a caller holds of an edit
fair_scheduler.py    who shares the next step
admission.py         the line before the model: pixels in flight
priority_threads.py  threads that do urgent work first
in_flight.py         what the engine knows of an edit
engine.py            continuous batching
"""
