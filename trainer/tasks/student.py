"""The student: labelled and pseudo-labelled images, strong perturbation, features near a frozen encoder.

arXiv 2401.10891, section 3.2 and 3.3. The total is the average of the three terms [section 4]. What the paper leaves
open and we choose: the frozen encoder sees the same perturbed view as the student (`frozen_view`), both features are
the final normalised patch tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dataio.spec import RoleNeeds
from dataio.types import Batch
from model import Encoder
from trainer.checkpoint import fingerprint
from trainer.config import ConfigError, Section
from trainer.config_train import ModelSection
from trainer.losses import feature_alignment_loss, regional_affine_invariant_loss
from trainer.tasks.base import DepthTask, Forward, weight_of


class StudentOptions(Section):
    """Weights of the terms; a weight of 0 leaves the term out of the computation."""

    labelled_weight: float = Field(default=1 / 3, ge=0)
    unlabelled_weight: float = Field(default=1 / 3, ge=0)
    feature_weight: float = Field(default=1 / 3, ge=0)
    alpha: float = Field(default=0.85, gt=-1, le=1, description="tokens with a larger cosine are left alone")
    frozen_encoder: str | None = Field(default=None, description="encoder file; default: model.encoder_weights")
    frozen_view: Literal["student", "clean"] = "student"


class TrainingTask(DepthTask):
    """Terms `labelled`, `unlabelled` (per CutMix region) and `feature` (unlabelled images only, paper table 13)."""

    Options: ClassVar[type[Section]] = StudentOptions
    needs: ClassVar[Mapping[str, RoleNeeds]] = {"labelled": RoleNeeds(), "unlabelled": RoleNeeds(sidecar=True)}

    def __init__(self, options: StudentOptions, model: ModelSection) -> None:
        super().__init__(options, model)
        self.opt = options
        self.frozen: nn.Module | None = None
        self._fingerprint: str | None = None
        if options.feature_weight > 0 and not self._frozen_file:
            raise ConfigError(
                "task.frozen_encoder: missing; name a file of encoder weights (it may also come from "
                "model.encoder_weights), or set task.feature_weight to 0"
            )
        if not self.term_weights:
            raise ConfigError("task: every weight is 0; raise labelled_weight, unlabelled_weight or feature_weight")

    @property
    def files(self) -> dict[str, str]:
        own = {"task.frozen_encoder": self.opt.frozen_encoder} if self.opt.feature_weight > 0 else {}
        return super().files | {field: path for field, path in own.items() if path}

    @property
    def views(self) -> tuple[str, ...]:
        clean = self.opt.frozen_view == "clean" and self.opt.feature_weight > 0
        return ("student", "clean") if clean else ("student",)

    @property
    def _frozen_file(self) -> str | None:
        return self.opt.frozen_encoder or self.model.encoder_weights

    def prepare(self, device: torch.device) -> None:
        if self.opt.feature_weight > 0:
            frozen = Encoder.from_preset(self.preset, encoder_weights=self._frozen_file)
            self.frozen = frozen.to(device).eval().requires_grad_(False)
            self._fingerprint = f"{fingerprint(self.frozen.state_dict())}-{self.preset.position_mode}"

    @property
    def term_weights(self) -> dict[str, float]:
        weights = {
            "labelled": self.opt.labelled_weight,
            "unlabelled": self.opt.unlabelled_weight,
            "feature": self.opt.feature_weight,
        }
        return {term: weight for term, weight in weights.items() if weight > 0}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        unlabelled = weight_of(batch, "unlabelled")
        counts = {"labelled": weight_of(batch, "labelled"), "unlabelled": unlabelled, "feature": unlabelled}
        return {term: counts[term] for term in self.term_weights}

    def sums(self, forward: Forward, batch: Batch) -> dict[str, Tensor]:
        image_BCHW = batch.views["student"]
        prediction = forward(image_BCHW, features=self.frozen is not None)
        target_BHW = batch.targets["disparity"].value_BHW
        loss_B = regional_affine_invariant_loss(
            prediction.disparity_BHW.float(), target_BHW, batch.region_BHW, num_regions=2
        )
        weighted_B = loss_B * batch.weight_B
        rows = batch.rows("unlabelled")
        sums = {"labelled": weighted_B[batch.rows("labelled")].sum(), "unlabelled": weighted_B[rows].sum()}
        if self.frozen is not None:
            sums["feature"] = self._feature_sum(prediction.features_BND[rows], batch, rows)
        return {term: sums[term] for term in self.term_weights}

    def _feature_sum(self, features_BND: Tensor, batch: Batch, rows: slice) -> Tensor:
        if not len(features_BND):  # a micro-batch of labelled images only
            return features_BND.float().sum()
        assert self.frozen is not None
        with torch.no_grad():
            frozen_BND = self.frozen(batch.views[self.opt.frozen_view][rows]).last_BND
        loss_B = feature_alignment_loss(features_BND.float(), frozen_BND.float(), self.opt.alpha)
        return (loss_B * batch.weight_B[rows]).sum()

    def frozen_fingerprint(self) -> str | None:
        return self._fingerprint
