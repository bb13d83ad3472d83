"""Training objectives; `objective.class_path` in a YAML names one of these, or one of your own."""

from learnkv.training.objectives.base import Comparison, Objective, Outputs
from learnkv.training.objectives.budgets import BudgetRegression
from learnkv.training.objectives.hidden import HiddenMSE
from learnkv.training.objectives.kl import ForwardKL, ReverseKL
from learnkv.training.objectives.policy_gradient import PolicyGradient
from learnkv.training.objectives.scores import ScoreRegression
from learnkv.training.objectives.stages import Stages
from learnkv.training.objectives.weighted_sum import WeightedSum

__all__ = [
    "BudgetRegression",
    "Comparison",
    "ForwardKL",
    "HiddenMSE",
    "Objective",
    "Outputs",
    "PolicyGradient",
    "ReverseKL",
    "ScoreRegression",
    "Stages",
    "WeightedSum",
]
