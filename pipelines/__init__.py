"""Data, training and evaluation jobs: thin Ray Data and Ray Train flows over `mgie`. Each job file runs as a script."""
