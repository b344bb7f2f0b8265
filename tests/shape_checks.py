"""The run-time type checker that tests/conftest.py puts around every annotated function and record of mgie."""

from beartype import BeartypeConf, beartype

# The numeric tower of PEP 484, as mypy has it: an int is fine where a float is asked for.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
