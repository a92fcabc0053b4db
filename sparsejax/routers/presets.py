"""Routers by the names of their papers and models: each a setting of the axes, to be changed one axis at a time.

    from sparsejax.routers import presets

    config.model.blocks.moe.router = presets.deepseek_v3()
    config.model.blocks.moe.router.score = "softmax"

A preset sets the router alone; capacity, shared experts and widths are the block's. Where a paper's part is not an
entry of an axis yet, its docstring says what stands in its place."""

import dataclasses
from collections.abc import Callable, Mapping

from sparsejax.routers.annealing import Annealing
from sparsejax.routers.balance import LoadBalance, NoBalance
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.controllers import ExpertThreshold, LossFree, Quantile
from sparsejax.routers.document_logits import DomainLogits
from sparsejax.routers.entropy import SelectorEntropy
from sparsejax.routers.expert_choice import ExpertChoice
from sparsejax.routers.limits import GroupLimit
from sparsejax.routers.noise import Gaussian, Gumbel, Learned
from sparsejax.routers.orders import Priority
from sparsejax.routers.plans import BalancedAssignment, Sinkhorn
from sparsejax.routers.policy import Policy, Random
from sparsejax.routers.projections import Cosine, Linear
from sparsejax.routers.scores import Relu, Sigmoid, SqrtSoftplus
from sparsejax.routers.smooth_step import DSelectK
from sparsejax.routers.sparsity import Sparsity
from sparsejax.routers.tables import Hash
from sparsejax.routers.top_k import Positive, Prototypes, SecondExpert, Threshold, TopK
from sparsejax.routers.variation import ImportanceLoad
from sparsejax.routers.weights import Constant, Raw, Renormalized


def switch() -> RouterConfig:
    """Top-1 with the probability as gate, jittered input (arXiv:2101.03961)."""
    return RouterConfig(
        selection=TopK(k=1), weight=Raw(), balance=LoadBalance(coefficient=0.01), z_loss=0.0, jitter=0.01
    )


def gshard() -> RouterConfig:
    """Top-2 whose second expert is taken at random in proportion to its weight; the balance loss counts first choices
    (arXiv:2006.16668)."""
    return RouterConfig(
        selection=SecondExpert(policy="random", threshold=0.5), balance=LoadBalance(count="first"), z_loss=0.0
    )


def mtf_top2() -> RouterConfig:
    """Mesh-TensorFlow's top-2: GShard's, with a second expert of share 0.2 or more always taken."""
    return RouterConfig(
        selection=SecondExpert(policy="random", threshold=0.2), balance=LoadBalance(count="first"), z_loss=0.0
    )


def st_moe() -> RouterConfig:
    """`mtf_top2` with the router z-loss (arXiv:2202.08906)."""
    return RouterConfig(
        selection=SecondExpert(policy="random", threshold=0.2), balance=LoadBalance(count="first"), z_loss=0.001
    )


def shazeer17() -> RouterConfig:
    """Noisy top-k that starts from zeros, with losses of importance and load over the batch (arXiv:1701.06538)."""
    return RouterConfig(
        logits=Linear(start="zeros"),
        noise=Learned(),
        selection=TopK(k=4),
        balance=ImportanceLoad(form="shazeer", importance=0.1, load=0.1, scope="microbatch"),
        z_loss=0.0,
    )


def vmoe() -> RouterConfig:
    """Top-2 of noisy probabilities, raw weights, losses of importance and load (arXiv:2106.05974)."""
    balance = ImportanceLoad(form="vmoe", importance=0.005, load=0.005)
    return RouterConfig(noise=Gaussian(), weight=Raw(), balance=balance, z_loss=0.0)


def vmoe_bpr() -> RouterConfig:
    """`vmoe` with batch prioritised routing. Not causal."""
    return dataclasses.replace(vmoe(), order=Priority(), allow_leak=True)


def expert_choice() -> RouterConfig:
    """Experts take tokens (arXiv:2202.09368). Not causal."""
    return RouterConfig(selection=ExpertChoice(k=2), weight=Raw(), balance=NoBalance(), z_loss=0.0, allow_leak=True)


def expert_choice_capped() -> RouterConfig:
    """`expert_choice` with at most three experts a token. Not causal."""
    return dataclasses.replace(expert_choice(), selection=ExpertChoice(k=2, cap=3))


def base() -> RouterConfig:
    """Balanced assignment, sigmoid weights (arXiv:2103.16716). Not causal in training. The paper's mixture of an
    expert x + f(x) with x itself, a (x + f(x)) + (1 − a) x, is the residual stream plus a · f(x): the weight `raw`."""
    return RouterConfig(
        score=Sigmoid(),
        selection=BalancedAssignment(),
        weight=Raw(),
        balance=NoBalance(),
        z_loss=0.0,
        allow_leak=True,
    )


def s_base() -> RouterConfig:
    """Top-1 of the Sinkhorn plan, sigmoid weights (arXiv:2202.01169). Not causal in training."""
    return RouterConfig(
        score=Sigmoid(), selection=Sinkhorn(k=1), weight=Raw(), balance=NoBalance(), z_loss=0.0, allow_leak=True
    )


def hash() -> RouterConfig:
    """A random expert for every vocabulary id (arXiv:2106.04426)."""
    return RouterConfig(selection=Hash(k=1), weight=Constant())


def stable_moe() -> RouterConfig:
    """Top-1 with a sigmoid gate and a balance loss, the first stage of StableMoE (arXiv:2204.08396). For the second,
    count a trace of it and go on from the run with `selection=hash`, `kind=distilled`."""
    return RouterConfig(score=Sigmoid(), selection=TopK(k=1), weight=Raw(), z_loss=0.0)


def rl_r() -> RouterConfig:
    """An expert drawn from the softmax, ungated, learnt by REINFORCE (arXiv:2202.01169)."""
    return RouterConfig(selection=Policy(), weight=Constant(), balance=LoadBalance(coefficient=0.01), z_loss=0.0)


def routing_network() -> RouterConfig:
    """A policy without any pressure towards balance (arXiv:1711.01239). Goes with `pooled` experts, which all depths
    choose from. In place of the paper's collaborative multi-agent reinforcement learning stands REINFORCE."""
    return RouterConfig(selection=Policy(), weight=Constant(), balance=NoBalance(), z_loss=0.0)


def thor() -> RouterConfig:
    """One random expert for the whole batch of a layer (arXiv:2110.04260). Goes with `train.consistency`."""
    return RouterConfig(selection=Random(k=1), weight=Constant())


def m6_t() -> RouterConfig:
    """Expert prototyping, two groups with one expert each (arXiv:2105.15082)."""
    return RouterConfig(selection=Prototypes(k=2), weight=Raw(), z_loss=0.0)


def mixtral() -> RouterConfig:
    """Top-2, softmax over the selected (arXiv:2401.04088)."""
    return RouterConfig(selection=TopK(k=2), balance=LoadBalance(coefficient=0.01, scope="microbatch"), z_loss=0.0)


def qwen3() -> RouterConfig:
    """Top-8, renormalized, balanced over the whole step (arXiv:2501.11873)."""
    return RouterConfig(selection=TopK(k=8), balance=LoadBalance(coefficient=0.001, scope="global"), z_loss=0.0)


def olmoe() -> RouterConfig:
    """Top-8 with raw probabilities (arXiv:2409.02060)."""
    return RouterConfig(
        selection=TopK(k=8), weight=Raw(), balance=LoadBalance(coefficient=0.01, scope="microbatch"), z_loss=0.001
    )


def deepseek_moe() -> RouterConfig:
    """Fine-grained experts, raw probabilities (arXiv:2401.06066). Goes with shared experts."""
    return RouterConfig(
        selection=TopK(k=6), weight=Raw(), balance=LoadBalance(coefficient=0.001, scope="microbatch"), z_loss=0.0
    )


def deepseek_v3() -> RouterConfig:
    """Sigmoid scores, groups of experts, loss-free bias and a weak balance loss by sequence (arXiv:2412.19437)."""
    return RouterConfig(
        score=Sigmoid(),
        selection=TopK(k=8),
        limit=GroupLimit(groups=8, kept=4, best=2),
        controller=LossFree(rate=0.001),
        weight=Renormalized(scale=2.5),
        balance=LoadBalance(coefficient=0.0001, scope="sequence"),
        z_loss=0.0,
    )


def deepseek_v4() -> RouterConfig:
    """As V3 with √softplus scores and without groups; its first layers are `deepseek_v4_hash`."""
    return RouterConfig(
        score=SqrtSoftplus(),
        selection=TopK(k=6),
        controller=LossFree(rate=0.001),
        weight=Renormalized(scale=1.5),
        balance=LoadBalance(coefficient=0.0001, scope="sequence"),
        z_loss=0.0,
    )


def deepseek_v4_hash() -> RouterConfig:
    """Experts looked up by token id, weights from the scores."""
    return RouterConfig(score=SqrtSoftplus(), selection=Hash(k=6), weight=Renormalized(scale=1.5), z_loss=0.0)


def quantile_balanced() -> RouterConfig:
    """Sigmoid scores balanced by quantiles, no loss (arXiv:2607.24653)."""
    return RouterConfig(score=Sigmoid(), selection=TopK(k=8), controller=Quantile(), balance=NoBalance(), z_loss=0.0)


def trinity() -> RouterConfig:
    """Top-4 of sigmoid scores, balanced by a bias whose steps are clamped softly and gather momentum
    (arXiv:2602.17004). Goes with a shared expert. Whatever else balances in the paper is not in it."""
    return RouterConfig(
        score=Sigmoid(),
        selection=TopK(k=4),
        controller=LossFree(rate=0.001, rule="soft_clamped", momentum=0.5),
        balance=NoBalance(),
        z_loss=0.0,
    )


def moe_plus_plus() -> RouterConfig:
    """Top-2 over experts of which some are free (arXiv:2410.07348). Goes with the block's `zero_experts`,
    `copy_experts` and `constant_experts`, which count less than the others in the balance loss."""
    balance = LoadBalance(coefficient=0.01, free_weight=0.75)
    return RouterConfig(selection=TopK(k=2), weight=Raw(), balance=balance, residual=True, z_loss=0.0)


def longcat() -> RouterConfig:
    """Top-12 over experts of which some are the identity, balanced by a bias in proportion to the load error of those
    that are not (LongCat-Flash, arXiv:2509.01322). Goes with the block's `copy_experts`; with them a token has a
    varying number of networks."""
    return RouterConfig(
        selection=TopK(k=12),
        controller=LossFree(rate=0.001, rule="proportional"),
        weight=Raw(scale=6.0),
        balance=LoadBalance(coefficient=0.0001, scope="sequence"),
        z_loss=0.0,
    )


def remoe() -> RouterConfig:
    """Every expert with a positive ReLU score, whose number an adaptive L1 loss brings down to 4 (arXiv:2412.14711).
    The first hundred steps or so are denser than that, so that scarce slots drop much. The paper has one coefficient,
    here every layer has its own."""
    return RouterConfig(
        score=Relu(), selection=Positive(k=4), controller=Sparsity(), weight=Raw(), balance=NoBalance(), z_loss=0.0
    )


def xmoe() -> RouterConfig:
    """Switch by directions alone: cosines over a learned temperature (arXiv:2204.09179)."""
    return dataclasses.replace(switch(), logits=Cosine(), jitter=0.0)


def task_moe() -> RouterConfig:
    """Top-2 chosen once for a domain (arXiv:2110.03742). Tokens of a domain come together and want the same experts,
    so that it goes with a layer that drops nothing."""
    return dataclasses.replace(gshard(), logits=DomainLogits())


def dselect_k() -> RouterConfig:
    """Two selectors of smooth binary codes, at most 8 experts a token until their bits are settled, towards which a
    penalty on entropy presses; without the paper's penalty on codes of no expert (arXiv:2106.03760)."""
    return RouterConfig(
        logits=DSelectK(selectors=2),
        score=Relu(),
        selection=Positive(k=8, most=8),
        weight=Raw(),
        balance=SelectorEntropy(coefficient=1e-6),
        z_loss=0.0,
    )


def dts_gate() -> RouterConfig:
    """Every expert with enough of a softmax with Gumbel noise, whose temperature falls, so that at first nearly all
    experts are taken and in the end few (arXiv:2112.14397). Goes with a layer that drops nothing."""
    return RouterConfig(
        noise=Gumbel(), selection=Positive(k=2, above=0.05), controller=Annealing(), weight=Raw(), z_loss=0.0
    )


def expert_threshold() -> RouterConfig:
    """Every expert whose score is above its running quantile, two in the mean; no balance loss (arXiv:2603.11535)."""
    return RouterConfig(
        selection=Threshold(k=2), controller=ExpertThreshold(), weight=Raw(), balance=NoBalance(), z_loss=0.0
    )


PRESETS: Mapping[str, Callable[[], RouterConfig]] = {
    preset.__name__: preset
    for preset in (
        switch,
        gshard,
        mtf_top2,
        st_moe,
        shazeer17,
        vmoe,
        vmoe_bpr,
        expert_choice,
        expert_choice_capped,
        base,
        s_base,
        hash,
        stable_moe,
        rl_r,
        routing_network,
        thor,
        m6_t,
        mixtral,
        qwen3,
        olmoe,
        deepseek_moe,
        deepseek_v3,
        deepseek_v4,
        deepseek_v4_hash,
        quantile_balanced,
        trinity,
        moe_plus_plus,
        longcat,
        remoe,
        xmoe,
        task_moe,
        dselect_k,
        dts_gate,
        expert_threshold,
    )
}
