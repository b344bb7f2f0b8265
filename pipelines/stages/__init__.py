"""What is done to each row: plain classes on Arrow tables, without Ray.

fetch.py             reading the image of each row
squares.py           what a cache is made from
seeds.py             the seed of a row
describers.py        who says what an edit will look like
local_describers.py  those that run a model here
describe.py          DescribeEdit
summarize.py         Summarize, presets
summarizer.py        Flan-T5
encode.py            EncodeLatents
edit.py              EditImages
score_rows.py        which rows are scored, FetchPictures
score.py             ScoreEdits
"""
