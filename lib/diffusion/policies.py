"""Re-masking policies: which tokens are masked after a round of sampling.

A round is one forward pass that drafts every masked position. Then the policy chooses the positions that are masked after
the round; the schedule decides how many. Policies that re-mask also have the schedule's corrector steps
(`schedule.corrector_steps`). Everything else is the same for all policies, so they can be compared at equal NFE.

| policy                  | what it masks after a round                                              | NFE | paper |
|-------------------------|--------------------------------------------------------------------------|-----|-------|
| ancestral               | random masked positions; it never re-masks                               | 1 | MDLM, Sahoo et al. 2024 |
| confidence_order        | masked positions of lowest confidence; it never re-masks                 | 1 | MaskGIT, Chang et al. 2022; LLaDA's low_confidence |
| margin_order            | masked positions of smallest top-2 probability margin; it never re-masks | 1 | Kim et al. 2025 |
| random_remask           | random positions of the draft                                            | 1 | |
| confidence_remask       | tokens of lowest confidence when they were sampled                       | 1 | stored confidence as in ReMDM-conf |
| fresh_confidence_remask | tokens of lowest probability under the generator, given the whole draft  | 2 | |
| present_confidence      | tokens of lowest probability in the partly masked text                   | 1 | probability as in T2M, 2026 |
| temporal_difference     | tokens whose probability fell most since they were sampled               | 1 | T2M, 2026 |
| remdm_cap               | a constant share of the unmasked tokens, at random                       | 1 | ReMDM-cap, Wang et al. 2025, with fixed counts |
| remdm_rescale           | a share of the largest count that the schedule allows, at random         | 1 | ReMDM-rescale, with fixed counts |
| remdm_conf              | the same count, tokens of low stored confidence                          | 1 | ReMDM-conf, with fixed counts |
| critic                  | tokens that the critic finds wrong in the whole draft                    | 2 | Token-Critic, Lezama et al. 2022 |
| critic_blend            | as critic, combined with the stored confidence                           | 2 | |
| critic_partial          | tokens that the critic finds wrong in the partly masked text             | 1 | PRISM, Kim et al. 2025 |
| critic_origin           | tokens of the partly masked text that look sampled by the generator      | 1 | |
| oracle                  | exactly the tokens that differ from the truth: the upper bound for known text | 1 | |

The column NFE counts forward passes per round. Its second pass is not spent after the last round.

ReMDM re-masks each token independently. Here the schedule fixes the count, and `sampler.remdm_share` replaces ReMDM's
probability, so all policies mask equally many tokens. With the schedule `threshold`, a policy's error estimate decides how
many are masked; see `chooser`.

Legend: B rows, T positions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lib.diffusion.top_k import lowest_k
from lib.errors import BadConfig


@dataclass(frozen=True)
class View:
    """What a policy can read in a round. Arrays are (B, T) unless noted. Callables are computed only when called.

    Attributes:
        masked: bool, masked before the round.
        free: bool, may be changed at all.
        target: (B,) how many positions are masked after the round.
        is_corrector: the next round is a corrector step: whatever is masked now was re-masked.
        noise: uniform.
        rounding_noise: (B,) uniform, to round counts.
        confidence: probability of each token when it was sampled.
        margin: gap between the two most likely tokens of masked positions.
        remask_share: re-masked by the partial critics while the text grows, as a share of the largest possible count.
        remdm_share: the same for ReMDM's policies.
        fresh_confidence: probability of each token of the draft, given the whole draft. One forward pass.
        critic_error: calibrated probability that a token of the draft is wrong. One forward pass.
        blend_error: the same, from `critic_error` and `confidence`. One forward pass.
        partial_error: calibrated probability of error in the text before the round, from the round's own pass.
        partial_origin: raw probability that the generator sampled the token, from the same pass.
        present_confidence: probability of each visible token that the generator wrote, from the same pass; 1 elsewhere.
        wrong: bool, the draft differs from the truth.
        select: (scores, eligible, counts (B,)) -> bool; positions with high scores, with the noise of the settings.
    """

    masked: np.ndarray
    free: np.ndarray
    target: np.ndarray
    is_corrector: bool
    noise: np.ndarray
    rounding_noise: np.ndarray
    confidence: np.ndarray
    margin: Callable[[], np.ndarray]
    remask_share: float
    remdm_share: float
    fresh_confidence: Callable[[], np.ndarray]
    critic_error: Callable[[], np.ndarray]
    partial_error: Callable[[], np.ndarray]
    partial_origin: Callable[[], np.ndarray]
    present_confidence: Callable[[], np.ndarray]
    blend_error: Callable[[], np.ndarray]
    wrong: Callable[[], np.ndarray]
    select: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


Scores = Callable[[View], np.ndarray]  # (B, T)


@dataclass(frozen=True)
class Policy:
    """A re-masking policy.

    Attributes:
        choose: View -> (B, T) bool, masked after the round: `target[b]` of row b, all free.
        extra_pass: it needs a second forward pass after each round but the last.
        noise_only: it reads noise alone, so positions that stay masked need no draft.
        partial_critic: it needs the critic's output on the partly masked text, from the round's own pass.
        reads_present: it needs the generator's probabilities of visible tokens, from the round's own pass.
        error: View -> (B, T) estimated probability that each token of the draft is wrong; None if it has no estimate.
        remasks: it may mask tokens that an earlier round unmasked.
        drafts_all: every masked position is drafted before it chooses, so all positions it chooses are re-masked.
        stops: a row is finished when nothing of it is chosen.
    """

    name: str
    choose: Callable[[View], np.ndarray]
    extra_pass: bool = False
    noise_only: bool = False
    partial_critic: bool = False
    reads_present: bool = False
    error: Scores | None = None
    remasks: bool = True
    drafts_all: bool = False
    stops: bool = False


def chooser(policy: Policy, threshold: float | None) -> Callable[[View], np.ndarray]:
    """The function that chooses the positions that are masked after a round.

    Without a threshold it is the policy's own `choose`. With one, it chooses tokens whose estimated probability of error is
    not below the threshold, at most `view.target` of them. So the budget of forward passes suffices. A row without such
    tokens is finished. With confidence_order this is the threshold decoding of Fast-dLLM (Wu et al. 2025).

    Raises:
        BadConfig: a threshold, for a policy without an error estimate.
    """
    if threshold is None:
        return policy.choose
    error_of = policy.error
    if error_of is None:
        known = ", ".join(name for name, p in POLICIES.items() if p.error is not None)
        raise BadConfig(
            f"sampler.schedule=threshold needs a policy that estimates errors, and {policy.name} does not; "
            f"policies that do: {known}"
        )

    def choose_doubtful(view: View) -> np.ndarray:
        error = error_of(view)
        doubtful = (view.free if policy.remasks else view.masked) & (error >= threshold)
        return view.select(error, doubtful, np.minimum(doubtful.sum(1), view.target))

    return choose_doubtful


# --------------------------------------------------------------------------------------------- how policies choose


def _keep_lowest(order: Scores) -> Callable[[View], np.ndarray]:
    """Never re-mask. The masked positions with the lowest `order` stay masked."""
    return lambda view: lowest_k(order(view), view.masked, view.target)


def _remask_highest(scores: Scores) -> Callable[[View], np.ndarray]:
    """Treat the whole text as a draft, and mask the free positions with the highest scores."""
    return lambda view: view.select(scores(view), view.free, view.target)


def _remask_some(
    scores: Scores, share_of: Callable[[View], float], capped: bool = False
) -> Callable[[View], np.ndarray]:
    """Re-mask a few unmasked tokens. As many more masked ones are unmasked, so the schedule's count is met.

    At most `view.target` tokens can be re-masked. The count is a share of that limit. If `capped`, it is that share of the
    unmasked tokens instead, up to the limit. A corrector step re-masks as many as the limit.
    """

    def choose(view: View) -> np.ndarray:
        # 1. How many tokens of each row are re-masked
        unmasked = view.free & ~view.masked
        num_unmasked = unmasked.sum(1)
        limit = np.minimum(view.target, num_unmasked)
        share = share_of(view)
        wanted = np.minimum(share * num_unmasked, limit) if capped else share * limit
        wanted = limit if view.is_corrector else wanted
        remask_count = np.minimum(_rounded(wanted, view.rounding_noise), limit)
        # A row with too few masked positions left must re-mask the rest of its target.
        remask_count = np.maximum(remask_count, view.target - view.masked.sum(1))
        # 2. Which ones, and which masked positions stay masked
        remasked = view.select(scores(view), unmasked, remask_count)
        return remasked | lowest_k(view.noise, view.masked, view.target - remask_count)

    return choose


def _rounded(wanted: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Random integers with mean `wanted`: 0.3 becomes 1 with probability 0.3."""
    floor = np.floor(wanted)
    return (floor + (noise < wanted - floor)).astype(np.int64)


def _remdm(scores: Scores, capped: bool = False) -> Callable[[View], np.ndarray]:
    return _remask_some(scores, lambda view: view.remdm_share, capped)


def _partial_critic(name: str, scores: Scores) -> Policy:
    return Policy(name, _remask_some(scores, lambda view: view.remask_share), partial_critic=True)


def _present(name: str, scores: Scores) -> Policy:
    return Policy(name, _remask_some(scores, lambda view: view.remask_share), reads_present=True)


def _error_remask(name: str, error: Scores, extra_pass: bool = False) -> Policy:
    """The policy that masks the tokens with the highest estimated probability of error."""
    return Policy(name, _remask_highest(error), extra_pass=extra_pass, error=error, drafts_all=True)


def _noise(view: View) -> np.ndarray:
    return view.noise


def _confidence_error(view: View) -> np.ndarray:
    return 1 - view.confidence


def _wrong(view: View) -> np.ndarray:
    return view.wrong().astype(np.float64)


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("ancestral", _keep_lowest(_noise), noise_only=True, remasks=False),
        Policy("confidence_order", _keep_lowest(lambda view: view.confidence), error=_confidence_error,
               remasks=False),
        Policy("margin_order", _keep_lowest(lambda view: view.margin()), remasks=False),
        Policy("random_remask", _remask_highest(_noise), drafts_all=True),
        _error_remask("confidence_remask", _confidence_error),
        _error_remask("fresh_confidence_remask", lambda view: 1 - view.fresh_confidence(), extra_pass=True),
        _present("present_confidence", lambda view: 1 - view.present_confidence()),
        _present("temporal_difference", lambda view: view.confidence - view.present_confidence()),
        Policy("remdm_cap", _remdm(_noise, capped=True)),
        Policy("remdm_rescale", _remdm(_noise)),
        Policy("remdm_conf", _remdm(_confidence_error)),
        _error_remask("critic", lambda view: view.critic_error(), extra_pass=True),
        _error_remask("critic_blend", lambda view: view.blend_error(), extra_pass=True),
        _partial_critic("critic_partial", lambda view: view.partial_error()),
        _partial_critic("critic_origin", lambda view: view.partial_origin()),
        Policy("oracle", lambda view: view.free & view.wrong(), error=_wrong, drafts_all=True, stops=True),
    )
}  # fmt: skip


def rounds_for(policy: Policy, nfe: int, passes_of_partial_critic: int = 1) -> int:
    """Rounds that fit into `nfe` forward passes. A second pass is needed after each round but the last.

    `passes_of_partial_critic`: of a round of a policy with a partial critic; 2 if the critic does not share the generator's.
    """
    two = policy.extra_pass or (policy.partial_critic and passes_of_partial_critic == 2)
    return max(1, (nfe + 1) // 2 if two else nfe)
