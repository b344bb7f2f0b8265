"""Training one variant on one worker or several, to checkpoints that resume exactly.

distributed.py  one worker, DDP, sharded
optimizer.py    AdamW by groups, schedule, clipping, moving average
variants.py     bundle and configuration -> the variant's model
checkpoint.py   snapshots of what trains
trainer.py      the training loop
export.py       a run's weights -> bundle
"""
