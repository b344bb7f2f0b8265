"""An edit as server-sent events.

Named events for pictures, as OpenAI defines them; comments, which clients skip, for the rest.
"""

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from mgie.engine.handle import Stepped
from serving.api.middleware import cancel_on_disconnect
from serving.api.responses import answer_error, edit_response
from serving.edits.backend import EditEvent
from serving.edits.service import AcceptedEdit, DeliveredEdit, EditService
from serving.schema import CompletedEvent, PartialEvent
from serving.stages.messages import Derived, Partial


async def event_stream(request: Request, accepted: AcceptedEdit, service: EditService) -> Response:
    """Server-sent events of an edit; what fails before the words are derived still gets a status of its own.

    A slow reader makes only this queue longer: the edit goes on.
    """
    frames: asyncio.Queue[str | Exception | None] = asyncio.Queue()

    async def produce() -> None:
        async with accepted.in_time(), contextlib.aclosing(service.stream(accepted)) as events:
            async for event in events:
                for frame in sse_frames(accepted, event):
                    frames.put_nowait(frame)

    def ended(task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        # Whatever it is, the client is told in the API's form, if there still is one.
        if isinstance(error, Exception) and not isinstance(error, ClientDisconnect):
            frames.put_nowait(error)
        frames.put_nowait(None)

    producer = asyncio.create_task(cancel_on_disconnect(request, service.running.run(accepted.owned_id, produce())))
    producer.add_done_callback(ended)
    try:
        first = await frames.get()
    except asyncio.CancelledError:
        producer.cancel()
        raise
    if first is None:
        raise ClientDisconnect
    if isinstance(first, Exception):
        raise first

    async def body() -> AsyncIterator[str]:
        frame: str | Exception | None = first
        try:
            while frame is not None:
                if isinstance(frame, Exception):
                    answer = answer_error(frame, request.state.request_id)
                    frame = f"data: {bytes(answer.body).decode()}\n\n"
                yield frame
                frame = await frames.get()
        finally:
            producer.cancel()

    return StreamingResponse(body(), media_type="text/event-stream", headers={"cache-control": "no-cache"})


def sse_frames(accepted: AcceptedEdit, event: EditEvent | DeliveredEdit) -> list[str]:
    """An event as it is sent."""
    if isinstance(event, Derived):
        return [f": id {accepted.id}\n\n", f": expressive {json.dumps(event.expressive)}\n\n"]
    if isinstance(event, Stepped):
        return [f": step {event.step}/{event.num_steps}\n\n"]
    bodies: list[PartialEvent | CompletedEvent]
    if isinstance(event, Partial):
        bodies = [
            PartialEvent(
                b64_json=base64.b64encode(event.data).decode(),
                partial_image_index=event.number,
                created_at=int(time.time()),
                size=f"{event.width}x{event.height}",
                output_format=accepted.call.options.output_format,
            )
        ]
    else:
        assert isinstance(event, DeliveredEdit)  # the service turns every outcome into one
        answer = edit_response(accepted, event)
        common = answer.model_dump(exclude={"created", "data"})
        bodies = [
            CompletedEvent(b64_json=str(result.b64_json), created_at=answer.created, **common) for result in answer.data
        ]
    return [f"event: {body.type}\ndata: {body.model_dump_json()}\n\n" for body in bodies]
