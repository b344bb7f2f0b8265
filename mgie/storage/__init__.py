"""Folders on a disk or in a store, S3, the hub, and trying again.

atomic.py       files and folders on a disk that appear complete or not at all
retry.py        what a store fault is, and trying again
s3_settings.py  where an S3 store is and how long it is waited for
s3.py           boto3: conditional writes, presigned addresses, errors
hub.py          the Hugging Face hub: its ids, files of one commit
hub_files.py    the hub as a file system of pyarrow's
folder.py       folders on a disk or in a store (pyarrow's file systems); files appear whole
"""
