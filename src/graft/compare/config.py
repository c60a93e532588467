"""The settings of one comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from graft.training.config import Settings


class CompareConfig(Settings):
    """Everything that decides what a comparison computes."""

    data: str = Field(description="folder with train and test files (and perhaps validation), or one file that is split")
    test: str | None = Field(None, description="test file, or folder with one, in place of the data's own")
    model: str = Field("smollm2", description="packaged model, folder or hub id")
    methods: list[str] = Field(default_factory=list, description="methods beside the baselines, such as dora or lora:rank=16")
    output: str = Field(description="folder for the runs, results.jsonl and the report")
    steps: int = Field(100, ge=2, description="optimiser updates of each run")
    batch_size: int = Field(8, ge=1, description="rows a forward pass")
    accumulation: int = Field(1, ge=1, description="forward passes an update")
    max_length: int = Field(256, ge=2, description="tokens a row at most")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the base model")
    tune: Literal["lr", "none"] = Field("lr", description="what is searched for each method on the validation rows")
    lrs: list[float] = Field(default=[1e-4, 1e-3, 1e-2], min_length=1, description="learning rates that are tried; with tune = none, the one")
    refine: bool = Field(True, description="try the learning rates between the best one and its neighbours, too")
    seeds: int = Field(3, ge=1, description="runs of each method with its learning rate")
    validation_rows: int = Field(100, ge=2, description="rows for choosing, at most")
    test_rows: int = Field(500, ge=2, description="held-out rows, at most")
    params: float | None = Field(None, gt=0, le=1, description="most trainable parameters, as a share of the base's")
    minutes: float | None = Field(None, gt=0, description="time for all runs together; sets steps")
    general: str | None = Field(None, description="text for measuring what was forgotten; none: a few pages that come with Graft")
    shots: int = Field(4, ge=1, description="examples in the prompt of the few-shot baseline")
    match: Literal["exact", "number"] = Field("exact", description="when a generated answer is right: the same text, or the same last number")
    prune: bool = Field(False, description="stop clearly losing runs early (successive halving); never a baseline's")

    @model_validator(mode="after")
    def _checked(self) -> CompareConfig:
        if sorted(set(self.lrs)) != self.lrs or self.lrs[0] <= 0:
            raise ValueError("the learning rates in lrs must be positive and rise")
        if self.tune == "none" and len(self.lrs) != 1:
            raise ValueError("tune = none needs exactly one learning rate in lrs, such as --lrs 1e-3")
        if self.refine and "refine" in self.model_fields_set and len(self.lrs) == 1:
            raise ValueError("refine tries rates around the best of several, but lrs has one; leave it out")
        if self.minutes is not None and "steps" in self.model_fields_set:
            raise ValueError("minutes sets the number of updates, so steps cannot be given beside it; leave one of them out")
        return self

    @property
    def folder(self) -> Path:
        return Path(self.output).resolve()
