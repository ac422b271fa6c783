"""The commands that make feature stores, and those that say beforehand what it will take."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from cache_schema.atomic import parse_path
from cache_schema.errors import UsageError
from headstart.command import Json, Place, Wanting

if TYPE_CHECKING:  # slow to import
    from extract.tasks import ImageTask, TextTask


@dataclass(frozen=True)
class ExtractionOptions:
    """What to encode, and with what."""

    samples: Positional[Place]
    """The samples store, or a folder that holds just one; s3://bucket/folder and the like work too."""
    out: Place | None = None
    """Folder the feature stores are written to; by default the one the samples store is in."""
    image_encoder: str = "tiny"
    """Name, hub id or folder of the image encoder; `headstart encoders` lists the names. "tiny" is the embedded one,
    untrained."""
    text_encoder: str = "tiny"
    """Name, hub id or folder of the text encoder."""
    image_adapter: Path | None = None
    """Folder of a PEFT adapter to lay on the image encoder."""
    text_adapter: Path | None = None
    """Folder of a PEFT adapter to lay on the text encoder."""
    layers: tuple[str, ...] = ("last",)
    """Layers to keep: "last" is what the model calls its last hidden state, a number that block's output before any
    norm, a number with +norm (such as 9+norm) the same after the model's final norm, one with +tokens all tokens that
    go into the block behind it, for `headstart finetune --states`. Of a pyramid: stages."""
    attention: tuple[Literal["logits", "head_tokens", "mean_token"], ...] = ()
    """What the CLS token attends to in the last block, for Talk2DINO; for models of the DINO family."""
    input_size: tuple[int, int] | None = None
    """(height, width) the images are resized to; multiples of the encoder's patch. By default the encoder's own."""
    aspect: Literal["squash", "crop", "letterbox"] = "squash"
    """Where an image has another shape than the input: squash it, cut its longer side, or pad its shorter one."""
    image_dir: Path | None = None
    """Where the images lie, if they were moved since the samples store was written."""
    views: tuple[str, ...] = ("whole",)
    """How each image is looked at: whole first, then flip, scale-S, crop-S (S such as 0.8), the last two perhaps with
    +flip. Training draws a view of each image anew in every epoch. At the end perhaps windows-A-B: sliding windows, A
    and B times the short side wide and apart (such as windows-1-0.5)."""
    dtype: Literal["float16", "float32", "int8"] = "float16"
    """Data type in which token grids are kept; int8 takes half the room of float16, with a scale for each token."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the encoders compute in. The half types are several times faster on an accelerator."""
    compile: bool = False
    """Put the image encoder through torch.compile: slow to start, often faster after."""
    batch_size: int | None = None
    """Views in one forward pass, halved where memory runs out; by default 8 on a CPU, 64 elsewhere."""
    shard_rows: int = 64
    """Views in one shard, the unit of work; a killed job loses those it has under way."""
    decode_threads: int | None = None
    """Images decoded at the same time; by default one for each core."""
    device: str = "auto"
    """Where the encoders run: auto, cpu, cuda, cuda:1, ..."""

    def tasks(self) -> tuple[ImageTask, TextTask]:
        """The two jobs these options ask for.

        Raises:
            UsageError: there is no samples store, or an option has no meaning.
        """
        from cache_schema.quantize import float_dtype
        from extract.image_job import ImageJobConfig
        from extract.prompt_job import PromptJobConfig
        from extract.tasks import ImageTask, TextTask
        from headstart import encoders
        from headstart.stores import find_samples

        samples = find_samples(parse_path(self.samples))
        out = samples.parent if self.out is None else parse_path(self.out)
        tiny = (out if isinstance(out, Path) else Path()) / "encoders"
        image_encoder = encoders.image_spec(
            self.image_encoder,
            tiny,
            layers=self.layers,
            attention=self.attention,
            input_size=self.input_size,
            aspect=self.aspect,
            precision=self.precision,
            adapter=self.image_adapter,
        )
        text_encoder = encoders.text_spec(self.text_encoder, tiny, precision=self.precision, adapter=self.text_adapter)
        images = ImageJobConfig(
            samples,
            out,
            self.image_dir,
            self.dtype,
            self.batch_size,
            self.shard_rows,
            self.views,
            self.decode_threads,
        )
        prompts = PromptJobConfig(samples, out, float_dtype(self.dtype))
        return ImageTask(images, image_encoder, self.compile), TextTask(prompts, text_encoder)


@dataclass(frozen=True)
class Extract(ExtractionOptions):
    """Encode the images and prompts of a samples store, once, into feature stores beside it.

    A killed job goes on where it was; a finished one is not done again. Images that cannot be read are listed in
    the store's ledger.jsonl. `headstart plan` takes the same options of what to encode, and says what it will cost.

    Example: headstart extract stores/samples-0123456789ab.zarr --image-encoder dinov2-base --text-encoder clip-base-16
    --input-size 448 448 --precision bfloat16
    """

    container: Literal["zarr", "hdf5"] = "zarr"
    """What the finished stores lie in: folders of shards, or one HDF5 file each."""
    overcommit: bool = False
    """Begin even where the disk has less room than the stores will need."""
    cluster: str | None = None
    """Spread the shards over workers: local:N (processes of this machine), slurm, or the address of a dask scheduler
    such as tcp://host:8786."""
    slurm_options: Path | None = None
    """For slurm: a TOML file with partition, walltime, gpus and so on; see docs/clusters.md."""
    json: Json = False

    def run(self) -> Any:
        from extract.job import run_job

        if self.slurm_options is not None and self.cluster != "slurm":
            raise UsageError("--slurm-options goes with --cluster slurm.")
        if self.cluster is None:
            jobs = [task.open(self.device) for task in self.tasks()]  # both, before any work: one may be missing
            images, prompts = (run_job(job, overcommit=self.overcommit) for job in jobs)
        else:
            from extract.cluster import ClusterSpec, start_cluster
            from extract.cluster_job import run_on_cluster

            spec = ClusterSpec.parse(self.cluster, self.slurm_options)
            with start_cluster(spec, device=self.device) as cluster:
                images, prompts = run_on_cluster(self.tasks(), cluster, overcommit=self.overcommit)
        if self.container == "hdf5":
            from headstart.cache_care import pack_hdf5

            images, prompts = (dataclasses.replace(job, path=pack_hdf5(job.path)) for job in (images, prompts))
        print(images.summary("images" if self.views == ("whole",) else "views"))
        print(prompts.summary("prompts"))
        return {"images": images.to_dict(), "prompts": prompts.to_dict()}


@dataclass(frozen=True)
class Plan(ExtractionOptions):
    """Say what an extraction will take before it starts: bytes, hours, and which stage will hold it up.

    Runs the real job on a few images for some seconds and throws the result away. Exit code 1 if the disk is too small.

    Example: headstart plan stores --image-encoder dinov2-base --text-encoder clip-base-16 --input-size 448 448
    """

    seconds: float = 10.0
    """How long to try each of the two encoders, at most; the longer, the better the forecast."""
    json: Json = False

    def run(self) -> Any:
        from extract.plan import ProbeConfig, make_plan

        plan = make_plan(self.tasks(), device=self.device, probe=ProbeConfig(self.seconds))
        print(plan.table())
        result = plan.to_dict()
        return result if plan.fits else Wanting(result)


@dataclass(frozen=True)
class Encoders:
    """The encoders that have a name: their hub ids, and what one image or prompt takes in a store.

    Any other hub id or folder of the same families works too.
    """

    json: Json = False

    def run(self) -> Any:
        from headstart.encoders import describe_encoders, encoders_table

        described = describe_encoders()
        print(encoders_table(described))
        return described
