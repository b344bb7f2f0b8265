"""Spans of an edit, over the ingress and both stages, for OpenTelemetry. Off unless asked for.

A span's place in its trace travels with the call as W3C trace context, a few headers in a dictionary. Spans hold figures
and the classes of errors, never words, photos or keys. The packages are those of the extra `tracing`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mgie.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

CONSOLE = "console"
TRACE_HEADERS = ("traceparent", "tracestate")
EXPORT_EVERY_MS = 1000  # a replica that is stopped loses no more

Trace = Mapping[str, str]
"where a call belongs: some of `TRACE_HEADERS`; empty: nowhere"
NO_TRACE: Trace = {}


def trace_of(headers: Mapping[str, str]) -> Trace:
    """Where a request belongs."""
    return {name: headers[name] for name in TRACE_HEADERS if name in headers}


class OpenSpan:
    """A span that has not ended; `trace` goes with the calls that belong to it."""

    def __init__(self, trace: Trace, span: "Span | None" = None) -> None:
        self.trace, self._span = trace, span

    def record(self, **attributes: str | bool | float) -> None:
        """Adds figures to it."""
        if self._span is not None:
            self._span.set_attributes({f"mgie.{name}": value for name, value in attributes.items()})


class Spans:
    """Makes the spans of one process.

    Args:
        exporter: Where they go; None: there are none, and a trace is passed on as it came.
        service: Who makes them, for whoever reads them.
    """

    def __init__(self, exporter: "SpanExporter | None", *, service: str) -> None:
        self._tracer = None
        if exporter is not None:
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            # One of our own, not the process-wide one: that is Ray's.
            provider = TracerProvider(resource=Resource.create({SERVICE_NAME: service}))
            provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_EVERY_MS))
            self._provider, self._tracer = provider, provider.get_tracer("mgie")

    @contextmanager
    def span(self, name: str, parent: Trace) -> Iterator[OpenSpan]:
        """A span around the block; an exception marks it by its class."""
        if self._tracer is None:
            yield OpenSpan(parent)
            return
        from opentelemetry.trace import Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        span = self._tracer.start_span(name, context=propagator.extract(dict(parent)))
        trace: dict[str, str] = {}
        propagator.inject(trace, context=set_span_in_context(span))
        try:
            yield OpenSpan(trace, span)
        except BaseException as error:
            span.set_status(Status(StatusCode.ERROR, type(error).__name__))  # not its words: a user's may be among them
            raise
        finally:
            span.end()

    def flush(self) -> None:
        """Sends what has ended."""
        if self._tracer is not None:
            self._provider.force_flush()


NO_SPANS = Spans(None, service="")


def open_spans(target: str | None, *, service: str) -> Spans:
    """Spans as the setting `tracing` asks for.

    Args:
        target: None: off; `console`: JSON in the replica's log; or the address of a collector that takes OTLP over HTTP.
        service: See `Spans`.

    Raises:
        ConfigError: The packages are missing, or the target is neither.
    """
    if target is None:
        return NO_SPANS
    if target != CONSOLE and not target.startswith(("http://", "https://")):
        raise ConfigError(f"tracing is {target!r}; it must be {CONSOLE!r} or an http(s) address", param="tracing")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter
    except ImportError as error:
        raise ConfigError(
            f"tracing needs a package that is missing ({error.name}): pip install 'mgie[tracing]'", param="tracing"
        ) from error
    return Spans(ConsoleSpanExporter() if target == CONSOLE else OTLPSpanExporter(endpoint=target), service=service)
