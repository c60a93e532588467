"""The settings of one fine-tuning run, as the command line and YAML files give them; checked by pydantic, unknown keys refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graft.core.errors import GraftError, nearest


class Settings(BaseModel):
    """Checked settings; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def make(cls, values: dict[str, Any]) -> Self:
        """The settings of these values; raises :class:`GraftError` in one sentence for the first that is wrong."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            if not first["loc"]:  # settings that do not go together
                raise GraftError(f"{first['msg'].removeprefix('Value error, ')}.") from None
            key = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                raise GraftError(f"there is no setting {key!r}; {nearest(key, cls.model_fields)}") from None
            if first["type"] == "missing":
                raise GraftError(f"the setting {key!r} is missing; it is the {cls.model_fields[key].description}.") from None
            raise GraftError(f"the setting {key!r} is {first['input']!r}: {first['msg'].lower()}.") from None


class FitConfig(Settings):
    """Everything that decides what a run computes."""

    data: str = Field(description="file or folder with the training rows")
    model: str = Field("smollm2", description="packaged model, folder or hub id")
    output: str = Field(description="folder for the adapter, run.json and metrics.jsonl")
    method: str = Field("lora", description="a method of the catalogue")
    settings: dict[str, Any] = Field(default_factory=dict, description="the method's hyper-parameters")
    targets: str | list[str] | None = Field(None, description="role names or glob patterns; none: the method's own")
    steps: int = Field(100, ge=1, description="optimiser updates")
    batch_size: int = Field(8, ge=1, description="rows a forward pass of each process")
    accumulation: int = Field(1, ge=1, description="forward passes an update")
    max_length: int = Field(512, ge=2, description="tokens a row at most")
    lr: float = Field(2e-4, gt=0, description="learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="learning rate over the run")
    warmup: float = Field(0.03, ge=0, le=1, description="share of the updates in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, description="decay of matrices")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0: none")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the base model")
    shard: bool = Field(False, description="shard the frozen base over processes (FSDP2)")
    pack: bool | None = Field(None, description="several rows of a batch in one where they fit; none: where the model can tell them apart")
    bucket: bool = Field(False, description="batches of rows of similar length: less padding, but no longer random draws")
    fuse: bool = Field(True, description="run the frozen parts of the model by fused kernels")
    seed: int = Field(0, ge=0, description="of the adapter, the data order, dropout and a new head")
    calibration_batches: int = Field(8, ge=1, description="batches for methods that look at data first")
    checkpoint_every: int | None = Field(None, ge=1, description="updates between checkpoints; none: a tenth of the run")

    @property
    def folder(self) -> Path:
        return Path(self.output)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; nothing in it is ever run."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text("utf-8"))
    except OSError:
        raise GraftError(f"there is no config file {path}.") from None
    except yaml.YAMLError as error:
        raise GraftError(f"{path} is not valid YAML ({str(error).splitlines()[0]}).") from None
    if not isinstance(values, dict):
        raise GraftError(f"{path} must hold settings by name, such as 'steps: 100'.")
    return values
