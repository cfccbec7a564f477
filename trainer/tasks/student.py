"""The student: pseudo-labelled images under strong perturbation, features near a frozen encoder; labelled ones or not.

Depth Anything V1 (arXiv 2401.10891, sections 3.2 and 3.3): labelled and pseudo-labelled images; the total is the
average of the three terms [section 4]. V2 (arXiv 2406.09414, section 5.2): pseudo-labelled images alone
(`labelled_weight: 0`), without their tenth of largest losses (`trim: 0.1`), and gradient matching
(`gradient_weight: 2.0`). What the papers leave open and we choose: the frozen encoder sees the same perturbed view as
the student (`frozen_view`), both features are the final normalised patch tokens.

Shape suffixes: B batch, C channel, H W pixels, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dataio.spec import RoleNeeds
from dataio.types import Batch
from model import DepthAnything, Encoder, get_preset
from model.presets import Preset
from model.types import DepthPrediction, WeightsError
from trainer.checkpoint import fingerprint
from trainer.config import ConfigError, Section
from trainer.config_train import ModelSection
from trainer.losses import feature_alignment_loss
from trainer.losses_disparity import DisparityOptions, RoleLoss
from trainer.tasks.base import DepthTask, Forward, weight_of


class StudentOptions(DisparityOptions):
    """Weights of the terms; a weight of 0 leaves the term out of the computation, and with it the role it needs."""

    labelled_weight: float = Field(default=1 / 3, ge=0)
    unlabelled_weight: float = Field(default=1 / 3, ge=0)
    feature_weight: float = Field(default=1 / 3, ge=0)
    trim: float = Field(default=0.0, ge=0, lt=1, description="share of a pseudo-label's pixels that is left out")
    alpha: float = Field(default=0.85, gt=-1, le=1, description="tokens with a larger cosine are left alone")
    frozen_encoder: str | None = Field(default=None, description="encoder file; default: model.encoder_weights")
    frozen_preset: str | None = Field(default=None, description="its preset; default: model.preset")
    frozen_view: Literal["student", "clean"] = "student"


class ProjectedDepthAnything(DepthAnything):
    """A network whose features go through a linear projection to the width of a frozen encoder (V1's issue 224).

    The projection is trained and saved in checkpoints like any tensor; `plain` is the network that is exported.
    """

    def __init__(self, network: DepthAnything, frozen_width: int) -> None:
        nn.Module.__init__(self)
        self.preset, self.loaded = network.preset, network.loaded
        self.pretrained, self.depth_head = network.pretrained, network.depth_head
        self.projection = nn.Linear(network.preset.width, frozen_width)

    def forward(self, image_BCHW: Tensor, features: bool = False) -> DepthPrediction:
        prediction = super().forward(image_BCHW, features)
        if prediction.features_BND is None:
            return prediction
        return prediction._replace(features_BND=self.projection(prediction.features_BND))

    def plain(self) -> DepthAnything:
        """The network without the projection: the same tensors."""
        with torch.device("meta"):
            network = DepthAnything(self.preset)
        network.pretrained, network.depth_head = self.pretrained, self.depth_head
        return network


class TrainingTask(DepthTask):
    """Terms `labelled` and `unlabelled` (per CutMix region), each with its `..._gradient` where gradient matching has a
    weight, and `feature` (unlabelled images only, V1's table 13)."""

    Options: ClassVar[type[Section]] = StudentOptions

    def __init__(self, options: StudentOptions, model: ModelSection) -> None:
        super().__init__(options, model)
        self.opt = options
        self.frozen: Encoder | None = None
        self._fingerprint: str | None = None
        self.losses = (
            RoleLoss(role="labelled", weight=options.labelled_weight, options=options),
            RoleLoss(
                role="unlabelled", weight=options.unlabelled_weight, options=options, num_regions=2, trim=options.trim
            ),
        )
        self._check_options()

    def _check_options(self) -> None:
        options = self.opt
        if not self.term_weights:
            raise ConfigError("task: every weight is 0; raise labelled_weight, unlabelled_weight or feature_weight")
        if options.trim > 0 and options.loss != "mad":
            raise ConfigError(f"task.trim: found {options.trim} with task.loss {options.loss!r}; use 0, or loss mad")
        if not options.feature_weight:
            return
        if not self._frozen_file:
            raise ConfigError(
                "task.frozen_encoder: missing; name a file of encoder weights (it may also come from "
                "model.encoder_weights), or set task.feature_weight to 0"
            )
        if self.frozen_preset.name != self.preset.name and not options.frozen_encoder:
            raise ConfigError(
                f"task.frozen_encoder: missing; name the weights of task.frozen_preset {options.frozen_preset!r}"
            )

    @property
    def frozen_preset(self) -> Preset:
        """The frozen encoder's preset; its position embeddings are resized as the student's own are."""
        try:
            chosen = get_preset(self.opt.frozen_preset or self.preset)
        except WeightsError as error:
            raise ConfigError(f"task.frozen_preset: {error}") from None
        return replace(chosen, position_mode=self.preset.position_mode)

    @property
    def needs(self) -> Mapping[str, RoleNeeds]:
        needs = {}
        if self.opt.labelled_weight > 0:
            needs["labelled"] = RoleNeeds()
        if self.opt.unlabelled_weight > 0:
            needs["unlabelled"] = RoleNeeds(sidecar=True)
        elif self.opt.feature_weight > 0:
            needs["unlabelled"] = RoleNeeds(target="none")
        return needs

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

    def build(self) -> nn.Module:
        network = super().build()
        assert isinstance(network, DepthAnything)
        width = self.frozen_preset.width
        if self.opt.feature_weight > 0 and width != network.preset.width:
            return ProjectedDepthAnything(network, width)
        return network

    def prepare(self, device: torch.device) -> None:
        if self.opt.feature_weight > 0:
            preset = self.frozen_preset
            frozen = Encoder.from_preset(preset, encoder_weights=self._frozen_file)
            self.frozen = frozen.to(device).eval().requires_grad_(False)
            self._fingerprint = f"{fingerprint(self.frozen.state_dict())}-{preset.position_mode}"

    def export(self, module: nn.Module, folder: str) -> None:
        super().export(module.plain() if isinstance(module, ProjectedDepthAnything) else module, folder)

    @property
    def term_weights(self) -> dict[str, float]:
        labelled, unlabelled = self.losses
        feature = {"feature": self.opt.feature_weight} if self.opt.feature_weight > 0 else {}
        return {**labelled.term_weights, **unlabelled.term_weights, **feature}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        labelled, unlabelled = self.losses
        feature = {"feature": weight_of(batch, "unlabelled")} if self.opt.feature_weight > 0 else {}
        return {**labelled.counts(batch), **unlabelled.counts(batch), **feature}

    def sums(self, forward: Forward, batch: Batch) -> dict[str, Tensor]:
        prediction = forward(batch.views["student"], features=self.frozen is not None)
        labelled, unlabelled = (loss.sums(prediction.disparity_BHW, batch) for loss in self.losses)
        feature = {"feature": self._feature_sum(prediction.features_BND, batch)} if self.frozen is not None else {}
        return {**labelled, **unlabelled, **feature}

    def _feature_sum(self, features_BND: Tensor, batch: Batch) -> Tensor:
        rows = batch.rows("unlabelled")
        if not len(features_BND[rows]):  # a micro-batch of labelled images only
            return features_BND[rows].float().sum()
        assert self.frozen is not None
        with torch.no_grad():
            frozen_BND = self.frozen(batch.views[self.opt.frozen_view][rows]).last_BND
        loss_B = feature_alignment_loss(features_BND[rows], frozen_BND, self.opt.alpha)
        return (loss_B * batch.weight_B[rows]).sum()

    def frozen_parameters(self) -> int:
        if not self.opt.feature_weight > 0:
            return 0
        with torch.device("meta"):
            return sum(p.numel() for p in Encoder(self.frozen_preset).parameters())

    def frozen_rows(self, rows: Mapping[str, int]) -> list[tuple[nn.Module, int]]:
        return [(self.frozen, rows.get("unlabelled", 0))] if self.frozen is not None else []

    def frozen_fingerprint(self) -> str | None:
        return self._fingerprint
