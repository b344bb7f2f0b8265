"""Jobs in the artifact store, which is all that replicas share: accepting, the line, every change, cancelling.

    documents/job.<id>       the record of a job
    documents/key.<hash>     which job an idempotency key stands for
    documents/queue.<name>   the line: names sort in the order in which jobs are to be run

A job is written before its place in the line, and its place is removed after its end is written; so a death at any
moment leaves either a job that nobody was promised, or a place that somebody finds. Methods block, and raise
`StoreError` when the store is in trouble. Knows nothing of HTTP, and runs nothing.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from pydantic import ValidationError

from mgie.config import ImageLimits
from mgie.images.files import detect_format, read_image, read_mask
from mgie.images.geometry import Framing
from mgie.images.masks import check_mask
from serving.edits.call import EditCall
from serving.errors import DamagedError, JobEndedError, KeyReusedError, NotFoundError
from serving.jobs.record import JobOrder, JobRecord, Webhook, stored_call
from serving.schema import EditForm, Priority
from serving.storage.artifacts import Artifact, ArtifactStore, Document

HEAD_START_S = 600.0  # an interactive job goes before batch jobs that came so much earlier, not before older ones

_PLACE = re.compile(r"(?P<order_ms>[0-9a-f]{11})-(?P<ends_s>[0-9a-f]{8})-(?P<job_id>[0-9a-f]{40})")
_DELIVERY = re.compile(r"w-(?P<job_id>[0-9a-f]{40})")  # sorts behind all places


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """A checked edit that is to become a job."""

    call: EditCall
    square_crop: bool
    base_url: str
    wants_urls: bool
    owner: str
    priority: Priority
    timeout_s: float
    webhook_url: str | None
    key: str | None
    "the idempotency key"
    digest: str
    "see `form_digest`"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as it was read or written."""

    id: str
    record: JobRecord
    document: Document


@dataclass(frozen=True, order=True)
class QueueEntry:
    """An entry of the line."""

    name: str
    job_id: str
    ends_s: float
    "when the job is given up"
    is_delivery: bool
    "the job has ended, and its webhook is to be called"

    @classmethod
    def of(cls, job: Job) -> Self:
        """Where a job stands; it follows from what never changes."""
        order = job.record.order
        order_s = order.created_s + (HEAD_START_S if order.priority == "batch" else 0.0)
        name = f"{int(order_s * 1000):011x}-{int(order.ends_s):08x}-{job.id}"
        return cls(name=name, job_id=job.id, ends_s=float(int(order.ends_s)), is_delivery=False)

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """The entry of a name; None: it is none of ours."""
        if match := _PLACE.fullmatch(name):
            ends_s = float(int(match["ends_s"], 16))
            return cls(name=name, job_id=match["job_id"], ends_s=ends_s, is_delivery=False)
        if match := _DELIVERY.fullmatch(name):
            return cls(name=name, job_id=match["job_id"], ends_s=0.0, is_delivery=True)
        return None


class JobStore:
    """Jobs; see the module.

    Args:
        artifacts: Where they lie.
        limits: Limits of photos.
    """

    def __init__(self, artifacts: ArtifactStore, *, limits: ImageLimits) -> None:
        self.artifacts, self.now_s = artifacts, artifacts.now_s
        self._limits = limits

    # ---- accepting

    def accept(self, request: JobRequest) -> Job:
        """Takes a job on: when this returns, it survives. With a key known already, the job that it stands for.

        Raises:
            ImageError: The photo or the mask cannot be used.
            KeyReusedError: The key stands for another request.
        """
        photo_wh, mask_wh = self._check_pictures(request)
        job_id = self.artifacts.new_id()
        if request.key is not None:
            job_id = self._claim_key(request.owner, request.key, request.digest, job_id)
            known = self.find(job_id)
            if known is not None:
                return self._lined_up(known)
        call, now_s = request.call, self.now_s()
        image = self._put(call.image, photo_wh)
        mask = None if mask_wh is None or call.mask is None else self._put(call.mask, mask_wh)
        record = JobRecord(
            order=JobOrder(
                call=stored_call(call.options),
                image=image.id,
                mask=None if mask is None else mask.id,
                base_url=request.base_url,
                wants_urls=request.wants_urls,
                owner=request.owner,
                priority=request.priority,
                created_s=now_s,
                ends_s=now_s + request.timeout_s,
            ),
            webhook=None if request.webhook_url is None else Webhook(url=request.webhook_url),
        )
        document = self.artifacts.create("job", job_id, record.model_dump(mode="json"))
        if document is None:  # an equal request with the same key came between
            self._delete_pictures(record)
            return self._lined_up(self.get(job_id))
        return self._lined_up(Job(id=job_id, record=record, document=document))

    def _check_pictures(self, request: JobRequest) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """Sizes of the photo and of the mask; a synchronous edit would find what is wrong with them in a stage."""
        call = request.call
        photo_wh = read_image(call.image, limits=self._limits).size
        if call.mask is None:
            return photo_wh, None
        mask = read_mask(call.mask, limits=self._limits)
        check_mask(mask, Framing(photo_wh, photo_wh, request.square_crop))
        return photo_wh, mask.size

    def _put(self, data: bytes, wh: tuple[int, int]) -> Artifact:
        name = detect_format(data)
        assert name is not None  # it was read
        content_type = f"image/{name.lower()}"
        return self.artifacts.put(data, content_type=content_type, width=wh[0], height=wh[1], is_durable=True)

    def _claim_key(self, owner: str, key: str, digest: str, job_id: str) -> str:
        """Id of the job that a key stands for, which is the one given if the key is new.

        Its job may not be there yet: then whoever comes first makes it, with this id.
        """
        name = hashlib.sha256(f"{owner}\0{key}".encode()).hexdigest()
        content = {"job": job_id, "request": digest}
        while self.artifacts.create("key", name, content) is None:
            known = self.artifacts.find("key", name)
            if known is None:
                continue  # expired meanwhile
            if self._is_current(known.content["job"]):
                if known.content["request"] != digest:
                    message = "the Idempotency-Key was sent with another request; use a new key for this one"
                    raise KeyReusedError(message, param="Idempotency-Key")
                return str(known.content["job"])
            if self.artifacts.replace(known, content) is not None:
                break
        return job_id

    def _lined_up(self, job: Job) -> Job:
        """Makes sure that whoever looks for work finds the job."""
        if not job.record.has_ended:
            self.artifacts.create("queue", QueueEntry.of(job).name, {})
        return job

    # ---- finding and changing

    def find(self, job_id: str) -> Job | None:
        """The job as it is now; None if there is none (any more)."""
        if not self._is_current(job_id):
            return None
        document = self.artifacts.find("job", job_id)
        if document is None:
            return None
        try:
            record = JobRecord.model_validate(document.content)
        except ValidationError as error:
            raise DamagedError(f"the record of a job is damaged: {error}") from error
        return Job(id=job_id, record=record, document=document)

    def get(self, job_id: str) -> Job:
        """The same.

        Raises:
            NotFoundError: There is none (any more).
        """
        job = self.find(job_id)
        if job is None:
            raise NotFoundError("there is no job of this id, or not any more")
        return job

    def pictures(self, job: Job) -> tuple[bytes, bytes | None]:
        """The photo and the mask.

        Raises:
            NotFoundError: The job has ended.
        """
        order = job.record.order
        mask = None if order.mask is None else self.artifacts.read(order.mask)[1]
        return self.artifacts.read(order.image)[1], mask

    def expires_s(self, job: Job) -> int:
        """When a job and its result are deleted."""
        return self.artifacts.expiry_s(job.id)

    def update(self, job: Job, change: Callable[[JobRecord], JobRecord | None]) -> Job | None:
        """Changes a job, whatever others do at the same time.

        Args:
            job: As last seen.
            change: Gives the record as it is to be, or None if nothing is to be done; called again with the present
                record when the job was not as last seen.

        Returns:
            The job as it is now; None: nothing was done, or it has expired.
        """
        seen: Job | None = job
        while seen is not None:
            record = change(seen.record)
            if record is None:
                return None
            document = self.artifacts.replace(seen.document, record.model_dump(mode="json"))
            if document is not None:
                return Job(id=job.id, record=record, document=document)
            seen = self.find(job.id)
        return None

    def cancel(self, job_id: str) -> Job:
        """Ends a job that has not ended; whoever runs it notices by itself, at the latest with its next heartbeat.

        Raises:
            NotFoundError: There is none (any more).
            JobEndedError: It has ended.
        """
        job = self.update(
            self.get(job_id), lambda record: None if record.has_ended else record.ended("cancelled", now_s=self.now_s())
        )
        if job is None:
            raise JobEndedError(
                f"the job is {self.get(job_id).record.status}; only one that has not ended is cancelled"
            )
        self.settle(job)
        return job

    # ---- the line

    def line(self) -> list[QueueEntry]:
        """All places, in the order in which jobs are to be run, then the deliveries."""
        return [place for name in self.artifacts.names("queue") if (place := QueueEntry.parse(name)) is not None]

    def remove(self, place: QueueEntry) -> None:
        """Takes an entry out of the line."""
        document = self.artifacts.find("queue", place.name)
        if document is not None:
            self.artifacts.remove(document)

    def settle(self, job: Job) -> None:
        """What is left to do for a job that has ended: its photo goes, its webhook is lined up, it leaves the line."""
        self._delete_pictures(job.record)
        if job.record.webhook is not None and job.record.webhook.status == "pending":
            self.artifacts.create("queue", f"w-{job.id}", {})
        self.remove(QueueEntry.of(job))

    def _delete_pictures(self, record: JobRecord) -> None:
        self.delete_images([record.order.image, *([record.order.mask] if record.order.mask else [])])

    def delete_images(self, ids: list[str]) -> None:
        """Removes artifacts, if they are there."""
        for artifact_id in ids:
            try:
                self.artifacts.delete(artifact_id)
            except NotFoundError:  # expired: the sweep takes it
                continue

    def _is_current(self, job_id: str) -> bool:
        try:
            self.artifacts.expiry_s(job_id)
        except NotFoundError:
            return False
        return True


def form_digest(form: EditForm) -> str:
    """Hash of all that a client asks for, pictures included; equal requests have equal ones."""
    digest = hashlib.sha256(form.model_dump_json(exclude={"image", "mask"}).encode())
    for picture in (form.image, form.mask):
        digest.update(hashlib.sha256(picture).digest() if picture is not None else b"none")
    return digest.hexdigest()
