"""Sampling from the causal baseline."""

import numpy as np
import torch

from lib import randomness
from lib.config import load_config
from lib.diffusion.autoregressive import AutoregressiveSampler
from lib.diffusion.categorical import draw
from lib.diffusion.samples import MaskedTexts
from lib.runtime import Runtime
from tests.test_hugging_face import make, make_ids


def test_the_baseline_reads_given_text_at_no_cost_and_writes_what_a_whole_pass_would():
    """Equal to a full forward pass without a cache for every generated token. Other tokens come first, between and last."""
    model, settings = (
        make(("remask", "causal"), 0),
        load_config().sampler.model_copy(update={"temperature": 0.7, "top_p": 1.0}),
    )
    ids = make_ids(2, 9).numpy()
    free = np.zeros(ids.shape, bool)
    free[:, [3, 4, 7]], free[1, 6] = True, True
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    sampler = AutoregressiveSampler(model, 0, [0, 1], Runtime(torch.device("cpu"), "fp32"), settings, seed=3)
    made = sampler.sample(MaskedTexts(ids, free, np.arange(2)))
    handle.remove()
    assert made.passes.tolist() == [3, 4] and len(passes) == 4
    assert (made.ids[~free] == ids[~free]).all() and not np.isin(made.ids[free], [0, 1]).any()
    noise = randomness.uniform(randomness.key(3, "autoregressive token"), np.arange(2), 9)
    whole = np.concatenate([np.zeros((2, 1), int), made.ids], 1)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(whole)).logits
    for row, position in zip(*np.nonzero(free), strict=True):
        chance = torch.tensor([noise[row, position]])
        token, _ = draw(logits[row, position][None], chance, torch.tensor([0, 1]), 0.7)
        assert token.item() == made.ids[row, position]


def test_a_sample_is_keyed_by_its_number_whatever_stands_beside_it():
    model, settings = make(("remask", "causal"), 0), load_config().sampler
    ids = np.repeat(make_ids(1, 9).numpy(), 6, 0)
    free = np.zeros(ids.shape, bool)
    free[:, 3:] = True

    def made(rows: list[int], **changes) -> np.ndarray:
        chosen = settings.model_copy(update={"temperature": 3.0, "top_p": 1.0} | changes)
        some = slice(len(rows))
        sampler = AutoregressiveSampler(
            model, 0, [0, 1], Runtime(torch.device("cpu"), "fp32"), chosen, seed=3
        )
        return sampler.sample(MaskedTexts(ids[some], free[some], np.array(rows))).ids

    whole = made([0, 1, 2, 7, 8, 9])
    assert len({tuple(row) for row in whole}) == 6
    np.testing.assert_array_equal(made([9, 7, 1]), whole[[5, 3, 1]])
    sure = made([0, 1, 2], top_p=1e-6)  # the likeliest token and no other, however hot
    assert len({tuple(row) for row in sure}) == 1
