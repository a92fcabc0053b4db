"""Axis 2, selection: candidates → the pairs of each group, in the order in which slots are filled."""

from sparsejax.base.registry import Registry
from sparsejax.routers.expert_choice import ExpertChoice
from sparsejax.routers.plans import BalancedAssignment, Sinkhorn
from sparsejax.routers.policy import Policy, Random
from sparsejax.routers.tables import ByDomain, Hash
from sparsejax.routers.top_k import Positive, Prototypes, SecondExpert, Threshold, TopK, TopP

SELECTORS = Registry(
    "selection",
    {
        "top_k": TopK,
        "second_expert": SecondExpert,
        "prototypes": Prototypes,
        "top_p": TopP,
        "positive": Positive,
        "threshold": Threshold,
        "expert_choice": ExpertChoice,
        "sinkhorn": Sinkhorn,
        "balanced_assignment": BalancedAssignment,
        "policy": Policy,
        "random": Random,
        "hash": Hash,
        "by_domain": ByDomain,
    },
)
