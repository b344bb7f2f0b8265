"""The HTTP side: the only place, with `app.py`, that knows FastAPI and Starlette.

request_body.py  forms and JSON -> checked fields
responses.py     results and errors as the API words them; the one table
middleware.py    body limit, request id, figures, log line, client gone
access_gate.py   keys and limits before a body is read
sse.py           an edit as server-sent events
job_routes.py    the HTTP side of jobs
edit_routes.py   the HTTP side of edits
info_routes.py   models, readiness, figures
page.py          the page's files
opened.py        store, keys, checks and spans of a replica
routes.py        the application with all of them
"""
