"""What all jobs share: the record of a run, its lease, the cluster, blocks of rows.

command.py     a job as a command: arguments, exit statuses, what a terminal shows
config_file.py settings as YAML
settings.py    settings that several jobs have
run.py         the course of a run: claim, lease, Ray, work, record
progress.py    bars and lines
run_record.py  what fills a folder, and how far it is
lease.py       one writer per output folder
cluster.py     what a job takes of a cluster, checked first
blocks.py      rows to do, in blocks
recipe.py      stages as commands, in folders named by what decides them
"""
