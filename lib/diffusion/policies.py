"""Re-masking policies: which tokens are masked after a round of sampling.

A round is one forward pass that gives a draft for every masked position, then a choice: the policy names the
positions that stay or become masked, as many as the schedule says. Every extra pass is counted. Those that take back what
was written also have the schedule's held rounds, drawn colder (`schedule.temperatures`); among them nothing else differs.

| policy           | what it masks again                                                   | passes | paper |
|------------------|------------------------------------------------------------------------|--------|-------|
| ancestral        | nothing: each token is written once, in a random order                 | 1 | MDLM, Sahoo et al. 2024 |
| confidence_order | nothing: the surest drafts are written first                           | 1 | MaskGIT, Chang et al. 2022 |
| margin_order     | nothing: largest gap between the two likeliest tokens first            | 1 | Kim et al. 2025 |
| random_remask    | any token                                                              | 1 | |
| confidence_remask | tokens the generator was unsure of when it wrote them                  | 1 | stored as in ReMDM-conf |
| fresh_confidence_remask | tokens the generator finds unlikely now that it sees the whole         | 2 | |
| remdm_cap        | a constant share of the written tokens, at random                      | 1 | after ReMDM, Wang et al. 2025 |
| remdm_rescale    | a share of the most that the schedule allows, at random                | 1 | after ReMDM |
| remdm_conf       | as many, tokens written without confidence rather                      | 1 | after ReMDM |
| critic           | tokens the critic takes for errors in the whole draft                  | 2 | Token-Critic, Lezama et al. 2022 |
| critic_blend     | as critic, with what the generator thought when it wrote the token     | 2 | |
| critic_partial   | tokens the critic suspects in the partly masked text, same pass        | 1 | PRISM, Kim et al. 2025 |
| critic_origin    | tokens that look written by the generator, in the partly masked text, same pass | 1 | |
| oracle           | exactly the tokens that differ from the truth: the ceiling, when filling known text | 1 | |

ReMDM gives each written token a chance of its own; here the number is the schedule's, and `sampler.remdm_share` stands for the
size of that chance, so that all policies mask equally many.

With the schedule `threshold` a policy's view of error decides how many: see `rule`.

Legend: B rows, T positions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lib.diffusion.top_k import lowest_k
from lib.errors import BadConfig


@dataclass(frozen=True)
class View:
    """What a policy may look at in a round. Arrays are (B, T) unless said otherwise."""

    masked: np.ndarray  # bool: masked before the round
    free: np.ndarray  # bool: may be changed at all
    left: np.ndarray  # (B,) positions to be masked after the round
    held: bool  # the next round only corrects: all that is masked now was taken back
    noise: np.ndarray  # uniform
    chance: np.ndarray  # (B,) uniform, of its own
    confidence: np.ndarray  # probability of each token when it was written or drafted
    margin: Callable[[], np.ndarray]  # gap between the two likeliest tokens at masked positions
    # What the partial critics take back while the text grows, as a share of the most possible
    remask_share: float
    remdm_share: float  # the same for ReMDM's policies, whose papers take back less
    fresh_confidence: Callable[[], np.ndarray]  # probability of each drafted token now; one pass
    critic_error: Callable[[], np.ndarray]  # calibrated chance that a drafted token is wrong; one pass
    partial_error: Callable[[], np.ndarray]  # of the text before the round, from this round's own pass
    partial_origin: Callable[[], np.ndarray]  # raw chance that the generator wrote it, from the same pass
    blend_error: Callable[[], np.ndarray]  # from critic_error and confidence together; one pass
    wrong: Callable[[], np.ndarray]  # bool: the draft differs from the truth
    most: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # (suspicion, where, count (B,)) -> bool


@dataclass(frozen=True)
class Policy:
    """
    Attributes:
        choose: View -> (B, T) bool, masked after the round: `left[b]` of row b, all free.
        extra_pass: it takes a forward pass of its own after each round but the last.
        blind: it looks at noise alone, so that nothing need be drafted that is not written.
        partial: it needs the critic's view of the partly masked text from the round's own pass.
        error: View -> (B, T) how likely each token of the draft is an error; None if it has no such view.
        takes_back: it may mask again what an earlier round wrote.
        drafts: every masked token is written before it chooses, so that those masked again were taken back.
        stops: a row of which it masks nothing is finished.
    """

    name: str
    choose: Callable[[View], np.ndarray]
    extra_pass: bool = False
    blind: bool = False
    partial: bool = False
    error: Callable[[View], np.ndarray] | None = None
    takes_back: bool = True
    drafts: bool = False
    stops: bool = False


def rule(policy: Policy, threshold: float | None) -> Callable[[View], np.ndarray]:
    """What chooses the tokens that are masked after a round: the policy's own `choose`, or, with a threshold, those
    whose chance of error is not below it.

    Those are at most as many as the schedule wants masked (`view.left`), so that the budget of passes suffices; a row
    of which none is doubted is finished. With confidence_order it is the threshold decoding of Fast-dLLM (Wu et al.,
    2025). Raises BadConfig for a policy without a view of error.
    """
    if threshold is None:
        return policy.choose
    view_of_error = policy.error
    if view_of_error is None:
        known = ", ".join(name for name, p in POLICIES.items() if p.error is not None)
        raise BadConfig(
            f"the policy {policy.name} has no view of error that sampler.schedule=threshold could ask; "
            f"policies that have one: {known}"
        )

    def doubted(view: View) -> np.ndarray:
        error = view_of_error(view)
        among = (view.free if policy.takes_back else view.masked) & (error >= threshold)
        return view.most(error, among, np.minimum(among.sum(1), view.left))

    return doubted


def _keep_masked(order: Callable[[View], np.ndarray]) -> Callable[[View], np.ndarray]:
    """Nothing is taken back: of the masked positions those with the lowest `order` stay masked."""
    return lambda view: lowest_k(order(view), view.masked, view.left)


def _suspicious(name: str, error: Callable[[View], np.ndarray], extra_pass: bool = False) -> Policy:
    """The policy that masks the most suspicious by a view of error."""
    return Policy(name, _suspect(error), extra_pass=extra_pass, error=error, drafts=True)


def _suspect(suspicion: Callable[[View], np.ndarray]) -> Callable[[View], np.ndarray]:
    """The whole text is a draft: the most suspicious free positions are masked."""
    return lambda view: view.most(suspicion(view), view.free, view.left)


def _take_back_some(
    suspicion: Callable[[View], np.ndarray], share: Callable[[View], float], capped: bool = False
) -> Callable[[View], np.ndarray]:
    """A few written tokens are taken back, and so many masked ones more are written that the schedule is kept.

    At most as many can be taken back as the schedule leaves masked. It takes back `share` of those or, `capped`, that
    share of the written ones, at most those. In held rounds nothing else is masked, so that it takes back all of them.
    """

    def choose(view: View) -> np.ndarray:
        written = view.free & ~view.masked
        count = written.sum(1)
        most = np.minimum(view.left, count)
        wanted = np.minimum(share(view) * count, most) if capped else share(view) * most
        wanted = most if view.held else wanted
        back_count = np.minimum(_rounded(wanted, view.chance), most)
        # Rows with nothing else masked must take back all that the schedule wants masked
        back_count = np.maximum(back_count, view.left - view.masked.sum(1))
        back = view.most(suspicion(view), written, back_count)
        return back | lowest_k(view.noise, view.masked, view.left - back_count)

    return choose


def _rounded(wanted: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Whole numbers whose mean is `wanted`: 0.3 tokens a round are one token in three rounds of ten."""
    down = np.floor(wanted)
    return (down + (chance < wanted - down)).astype(np.int64)


def _remdm(suspicion: Callable[[View], np.ndarray], capped: bool = False) -> Callable[[View], np.ndarray]:
    return _take_back_some(suspicion, lambda view: view.remdm_share, capped)


def _critics(suspicion: Callable[[View], np.ndarray]) -> Callable[[View], np.ndarray]:
    return _take_back_some(suspicion, lambda view: view.remask_share)


def _unsure(view: View) -> np.ndarray:
    return 1 - view.confidence


def _wrong(view: View) -> np.ndarray:
    return view.wrong().astype(np.float64)


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("ancestral", _keep_masked(lambda view: view.noise), blind=True, takes_back=False),
        Policy(
            "confidence_order", _keep_masked(lambda view: view.confidence), error=_unsure, takes_back=False
        ),
        Policy("margin_order", _keep_masked(lambda view: view.margin()), takes_back=False),
        Policy("random_remask", _suspect(lambda view: view.noise), drafts=True),
        _suspicious("confidence_remask", _unsure),
        _suspicious("fresh_confidence_remask", lambda view: 1 - view.fresh_confidence(), extra_pass=True),
        Policy("remdm_cap", _remdm(lambda view: view.noise, capped=True)),
        Policy("remdm_rescale", _remdm(lambda view: view.noise)),
        Policy("remdm_conf", _remdm(_unsure)),
        _suspicious("critic", lambda view: view.critic_error(), extra_pass=True),
        _suspicious("critic_blend", lambda view: view.blend_error(), extra_pass=True),
        Policy("critic_partial", _critics(lambda view: view.partial_error()), partial=True),
        Policy("critic_origin", _critics(lambda view: view.partial_origin()), partial=True),
        Policy("oracle", lambda view: view.free & view.wrong(), error=_wrong, drafts=True, stops=True),
    )
}


def rounds_for(policy: Policy, nfe: int) -> int:
    """Rounds that fit into `nfe` forward passes: a round is one, and one more to judge it unless it is the last."""
    return max(1, (nfe + 1) // 2 if policy.extra_pass else nfe)
