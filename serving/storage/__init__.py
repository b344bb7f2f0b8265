"""Results and job records that any replica can read, over a folder or S3.

blobs.py      bytes under keys: the protocol, and a folder
s3_blobs.py   the same in S3
artifacts.py  a store by its URL: results and job records, until they expire
"""
