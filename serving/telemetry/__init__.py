"""What operators see: figures, logs, traces.

metrics.py  every figure that is exported
logs.py     JSON logs without secrets and prompts
tracing.py  OpenTelemetry
"""
