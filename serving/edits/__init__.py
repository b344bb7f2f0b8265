"""One edit from its checked form to its result. Knows no HTTP.

call.py          one edit as a backend gets it
backend.py       what edits, as the HTTP side sees it
in_process.py    both stages in this process
cancellation.py  calling an edit off from any replica
results.py       results that are kept
safety.py        the operator's own check
service.py       one edit from its checked form to its result
"""
