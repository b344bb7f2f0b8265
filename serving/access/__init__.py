"""Who may use the service, and how much of it: keys and their limits.

    limits.py    rates and costs
    keys.py      API keys and the file that holds them
    __main__.py  `python -m serving.access`: makes a key

The gate before the routes is `serving/api/access_gate.py`.
"""
