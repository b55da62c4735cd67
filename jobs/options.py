"""Options of a batch, which all of its jobs share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from cogvideox.model.settings import Condition
from jobs.claims import DEFAULT_EXPIRY
from jobs.records import Job, JobInput
from stages.condition import ConditionOptions
from stages.decode import DecodeOptions
from stages.denoise_options import DenoiseOptions
from stages.encode import EncodeOptions
from stages.session import VideoRequest


@dataclasses.dataclass(frozen=True)
class BatchOptions:
    """Options of batch.py, by the names of the command line.

    Attributes:
        jobs: the job file; None makes videos of `prompts`.
        stages: names of the stages to run, in their order.
        only: patterns of job names, folders or ids; None selects every job.
        claim_expiry: seconds after which others take over the job of a lost machine.
        mirror: URL of a copy of the folder; None keeps none.
        engine: "local" or "ray".
        workers_per_node: of the Ray engine.
        platform: devices that each worker of Ray insists on; local runs have chosen theirs.
        trust_executables: digest of `executables`, of which each worker of Ray makes its own copy.
        prompts: of the command line, instead of a job file.
        seeds: a range such as "1-4", or a list; for each prompt or line that names none itself.
        inputs_dir: see `jobfile.read_job_file`.
    """

    jobs: Path | None
    output_dir: Path
    stages: Sequence[str]
    model_id: str
    dtype: str
    decoder: str
    attention: str
    checkpoint_every: int | None
    dp: int | None
    sp: int | None
    tp: int | None
    executables: Path | None
    preview_every: int | None = None
    preview_factors: Path | None = None
    only: Sequence[str] | None = None
    dry_run: bool = False
    retry_failed: bool = False
    claim_expiry: float = DEFAULT_EXPIRY
    mirror: str | None = None
    engine: str = "local"
    workers_per_node: int = 1
    platform: str | None = None
    trust_executables: str | None = None
    prompts: Sequence[str] = ()
    seeds: str | Sequence[int] | None = None
    inputs_dir: Path | None = None

    def request(self, job: Job) -> VideoRequest:
        """The options of each stage for one job; the stages read and write its folder."""
        folder = self.output_dir / job.folder
        settings, start = job.settings, job.input
        size = (settings.height, settings.width)
        return VideoRequest(
            settings=settings,
            condition=start and Condition(start.kind, *size, start.frames),
            encode=EncodeOptions(
                prompt=[job.prompt],
                model_id=self.model_id,
                dtype=job.dtype,
                output_dir=folder,
                negative_prompt=job.negative_prompt,
                max_sequence_length=job.max_sequence_length,
                condition=start and self._condition_options(start, *size),
                allow_unsupported=True,  # the job was checked when it was made
            ),
            denoise=DenoiseOptions(
                input_dir=folder,
                output_dir=folder,
                dtype=job.dtype,
                model_id=self.model_id,
                **dataclasses.asdict(job.settings),
                allow_unsupported=True,  # the job was checked when it was made
                attention=self.attention,
                checkpoint_every=self.checkpoint_every,
                preview_every=self.preview_every,
                preview_factors=self.preview_factors,
                lossy=job.lossy,
                loras=job.loras,
                dp=self.dp,
                sp=self.sp,
                tp=self.tp,
                executables=self.executables,
            ),
            decode=DecodeOptions(
                input_dir=folder,
                dtype=job.dtype,
                decoder=job.decoder,
                model_id=self.model_id,
                fps=job.settings.fps,
                quality=job.quality,
                no_metadata=job.no_metadata,
                dp=self.dp,
                tp=self.tp,
                executables=self.executables,
            ),
            text_tokens=job.max_sequence_length,
        )

    def _condition_options(self, start: JobInput, height: int, width: int) -> ConditionOptions:
        path = Path(start.path)
        return ConditionOptions(
            image=path if start.kind == "image" else None,
            video=path if start.kind == "video" else None,
            image_fit=start.image_fit,
            height=height,
            width=width,
            allow_unsupported=True,  # the job was checked when it was made
            encode_on=start.encode_on,
            encoder=start.encoder,
            sha256=start.sha256,
            executables=self.executables,
        )
