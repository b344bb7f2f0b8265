"""What all jobs share: the record of a run, its lease, the cluster, blocks of rows.

run_record.py  what fills a folder, and how far it is
lease.py       one writer per output folder
cluster.py     what a job takes of a cluster, checked first
blocks.py      rows to do, in blocks
recipe.py      stages as commands, in folders named by what decides them
"""
