"""Results and job records that any replica can read, over a folder or S3.

blobs.py      bytes under keys: the protocol, and a folder
s3_blobs.py   the same in S3
stores.py     a store by its URL
artifacts.py  results and job records, until they expire
"""
