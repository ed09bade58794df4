"""Put a critic on any masked LM: `python -m docs.examples.critic_on_any_mlm FOLDER_OR_HUB_NAME`."""

import pydoc_data.topics
import sys

from lib.evaluation.masked_lm import MaskedLM

# 1. Open a masked LM, with its own tokenizer. Its weights will not change
lm = MaskedLM.open(sys.argv[1], context=64)

# 2. Train a critic on a list of texts: here, paragraphs of Python's language reference
paragraphs = [p for text in pydoc_data.topics.topics.values() for p in text.split("\n\n")]
texts = [" ".join(p.split()) for p in paragraphs if 60 < len(p) < 400][:300]
print(lm.train_critic(texts))

# 3. Fill gaps. The critic reads each draft, and the policy re-masks the tokens that look generated
gaps = ["The value of the [MASK] is [MASK] [MASK] before the [MASK] is called.",
        "If the [MASK] does not [MASK], a [MASK] exception is raised."]  # fmt: skip
for filled in lm.fill(gaps, policy="critic_origin", nfe=16):
    print(filled.text)
    for token in filled.remasked:  # 4. What was re-masked
        print(f"  round {token.round}: {token.before!r} was re-masked, finally {token.after!r}")
