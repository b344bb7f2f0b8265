"""Edits that outlive their request: accepted at once, run by any replica of the ingress, asked for later.

record.py      what a job is, and the changes that it may go through; pure
store.py       jobs in the artifact store: accepting, the line of those to be run, cancelling
runner.py      finds jobs, claims them by leases, runs them, commits their results once
webhooks.py    one call of a webhook: which addresses may be called, signing, sending, what comes next
deliveries.py  calling those of jobs that have ended
view.py        a job as clients see it

The HTTP side is `serving/api/job_routes.py`.
"""
