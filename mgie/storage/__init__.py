"""Folders on a disk or in a store, S3, and trying again.

retry.py   what a store fault is, and trying again
s3.py      boto3: conditional writes, presigned addresses, errors
folder.py  folders on a disk or in a store (pyarrow's file systems); files appear whole
"""
