"""Calls the webhooks of jobs that have ended: what a job lacks is in its record, so that any replica can go on with it.

A try is written down before it is made, with the time from which another may be made if nothing more is heard of it.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator

import httpx2

from serving.jobs import webhooks
from serving.jobs.record import JobRecord
from serving.jobs.store import Job, JobStore, QueueEntry
from serving.jobs.view import view_job
from serving.telemetry.metrics import WEBHOOKS, Meter

logger = logging.getLogger("serving.jobs")


class Deliverer:
    """Delivers webhooks while `open`.

    Args:
        jobs: Where they are.
        settings: None: webhooks are given up.
        meter: Takes figures.
    """

    def __init__(self, jobs: JobStore, settings: webhooks.WebhookSettings | None, meter: Meter) -> None:
        self._jobs, self._settings, self._meter = jobs, settings, meter
        self._client: httpx2.AsyncClient | None = None

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Holds the connections."""
        async with httpx2.AsyncClient(timeout=webhooks.SEND_TIMEOUT_S, trust_env=False) as self._client:
            yield

    def claim(self, place: QueueEntry) -> Job | float | None:
        """The job whose webhook is ours to call now; else when to look again, Unix time; None: it is settled. Blocks.

        Raises:
            StoreError: The store is in trouble.
        """
        job = self._jobs.find(place.job_id)
        now_s = self._jobs.now_s()

        def change(record: JobRecord) -> JobRecord | None:
            if record.webhook is None or record.webhook.status != "pending" or record.webhook.next_s > now_s:
                return None
            begun = webhooks.begun(record.webhook, now_s=now_s)
            if self._settings is None:
                begun = begun.model_copy(update={"status": "given_up"})
            return record.model_copy(update={"webhook": begun})

        claimed = job and self._jobs.update(job, change)
        if claimed is not None and self._settings is not None:
            return claimed
        if claimed is not None:
            self._meter(WEBHOOKS, status="given_up")
        job = self._jobs.find(place.job_id)
        if job is not None and job.record.webhook is not None and job.record.webhook.status == "pending":
            return job.record.webhook.next_s
        self._jobs.remove(place)
        return None

    async def deliver(self, job: Job, place: QueueEntry) -> None:
        """One try of a job that was claimed.

        Raises:
            StoreError: The store is in trouble: what came of the try is not written, so that there is another.
        """
        settings, webhook, ended_s = self._settings, job.record.webhook, job.record.ended_s
        assert settings is not None
        assert webhook is not None
        assert ended_s is not None
        assert self._client is not None
        view = await asyncio.to_thread(view_job, self._jobs, job, has_files=False)
        del view["webhook"]  # the same words in every try
        body = json.dumps(view).encode()
        headers = webhooks.signed_headers(f"msg_{job.id}", body, secret=settings.secret, now_s=self._jobs.now_s())
        answer = await webhooks.send(self._client, webhook.url, body, headers)

        def change(record: JobRecord) -> JobRecord | None:
            if record.webhook is None or record.webhook.status != "pending":
                return None
            give_up_at_s = ended_s + settings.give_up_s
            heard = webhooks.ended(record.webhook, answer, now_s=self._jobs.now_s(), give_up_at_s=give_up_at_s)
            if heard.status != "delivered":
                logger.warning("a webhook answered %s, it is %s", answer, heard.status)
            return record.model_copy(update={"webhook": heard})

        changed = await asyncio.to_thread(self._jobs.update, job, change)
        if changed is not None and changed.record.webhook is not None:
            self._meter(WEBHOOKS, status=changed.record.webhook.status)
        if changed is None or changed.record.webhook is None or changed.record.webhook.status != "pending":
            await asyncio.to_thread(self._jobs.remove, place)
