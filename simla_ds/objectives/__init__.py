"""The five objectives. Each asks for passes and turns what it read into a loss; PretrainTask runs the passes."""

from simla_ds.objectives.base import Objective
from simla_ds.objectives.feature_queue import FeatureQueue
from simla_ds.objectives.itc import ImageTextContrast
from simla_ds.objectives.itm import ImageTextMatching
from simla_ds.objectives.mlm import MaskedLanguageModelling
from simla_ds.objectives.psl import PseudoLabelledKeywords
from simla_ds.objectives.xmm import CrossModalReconstruction

OBJECTIVES: dict[str, type[Objective]] = {
    "itc": ImageTextContrast,
    "itm": ImageTextMatching,
    "mlm": MaskedLanguageModelling,
    "xmm": CrossModalReconstruction,
    "psl": PseudoLabelledKeywords,
}

__all__ = ["OBJECTIVES", "FeatureQueue", "Objective"]
