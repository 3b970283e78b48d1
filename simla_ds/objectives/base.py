"""What every objective is: a way to ask for passes and a way to turn them into a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from simla_ds.config import ObjectivesConfig, VocabularyConfig
from simla_ds.model.simla import Simla
from simla_ds.types import Batch, Outputs, Request, StepFeatures


@dataclass(frozen=True)
class Networks:
    """The two networks whose heads the objectives use. Not a Module: neither belongs to an objective."""

    student: Simla
    teacher: Simla


class Objective(ABC):
    """One term of the summed loss. It never runs a pass itself, so that passes of several objectives can be merged."""

    def __init__(self, networks: Networks, config: ObjectivesConfig, vocabulary: VocabularyConfig):
        self.networks = networks
        self.config = config
        self.official = config.fidelity == "official"
        self.vocabulary = vocabulary

    @abstractmethod
    def requests(self, batch: Batch, features: StepFeatures) -> list[Request]:
        """Return the cross-modal passes this objective reads, the same on every rank."""

    @abstractmethod
    def loss(self, batch: Batch, features: StepFeatures, outputs: Outputs, alpha: float) -> Tensor:
        """Return the scalar float32 loss; outputs are the results of `requests`, in order."""

    @abstractmethod
    def row_losses(
        self, batch: Batch, features: StepFeatures, outputs: Outputs, alpha: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what a corrected `loss` is the mean of, without gradient, to tell data sets apart.

        R rows: their losses (R,) float32, their weights (R,) float32, and the pair each belongs to (R,) int64.
        """

    @abstractmethod
    def measures(self, batch: Batch, features: StepFeatures, outputs: Outputs) -> dict[str, Tensor]:
        """Return what tells a person whether it learns: name -> (sum, count) as a (2,) float tensor, to be added up."""
