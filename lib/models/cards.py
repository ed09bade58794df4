"""The section "Use" of a model card. A test runs every example of it.

The texts follow from the saved config and from the special tokens of its tokenizer (`lib.models.build.tokenizer_of`).
"""

from dataclasses import dataclass
from typing import Any

FOLDER = "THIS_FOLDER"  # in the examples: the folder's path or its name on a hub
FLOOR = "5.5"  # oldest transformers that published folders are tested with


@dataclass(frozen=True)
class Usage:
    """The section of a card.

    Attributes:
        task: pipeline tag for the card's header.
        text: Markdown.
    """

    task: str
    text: str


OWN_CODE = """The folder contains its modeling code, so transformers needs `trust_remote_code=True`: read the code first. Only torch and
transformers {floor} or newer have to be installed. `{folder}` stands for the folder's path, or its name on a hub."""

STOCK_CODE = """No custom code is needed, only torch and transformers {floor} or newer. `{folder}` stands for the folder's path, or its name
on a hub."""

LOAD = """```python
import torch
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{folder}", trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)
"""

FILL = """inputs = tokenizer("The val{mask}e of an object", return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits  # (texts, tokens, vocabulary)
masked = inputs["input_ids"] == tokenizer.mask_token_id
print(tokenizer.decode(logits[masked].argmax(-1)))
```

"""
PROPOSALS = """or, with several proposals for the token,

```python
from transformers import pipeline

fill = pipeline("fill-mask", model="{folder}", trust_remote_code=True)
for found in fill("The val{mask}e of an object"):
    print(found["score"], found["sequence"])
```

"""
OF_MASKS = """`{mask}` is a token to be generated. {around} All masks of one forward pass are filled independently of each other. The model
was trained on up to {text_tokens} tokens."""
NOTHING_AROUND = "The tokenizer adds no special tokens."
FRAMED = "The tokenizer puts the special tokens of the model around a text. They count as tokens."

CAUSAL = """inputs = tokenizer("The value of", return_tensors="pt")
with torch.no_grad():
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    generated = model.generate(**inputs, do_sample=True)
print(f"{{loss:.3f}} nats per token")
print(tokenizer.decode(generated[0], skip_special_tokens=True))
```

or

```python
from transformers import pipeline

write = pipeline("text-generation", model="{folder}", trust_remote_code=True)
print(write("The value of", do_sample=True)[0]["generated_text"])
```

The tokenizer puts `[CLS]` in front, as in training. So the first token has a likelihood, too, and the empty text can be continued.
The model reads and generates {text_tokens} tokens in all. It has no end token: set `max_new_tokens` for less."""

TOKENS = """text = "The value of an object"
inputs = tokenizer(text, truncation=True, return_tensors="pt")
with torch.no_grad():
    shares = model(**inputs).logits.softmax(-1)[0]  # (tokens, classes)
for token, row in zip(inputs["input_ids"][0].tolist(), shares):
    print(repr(tokenizer.decode([token])), model.config.id2label[row.argmax().item()], row.max().item())
```

or, grouped into spans of one class,

```python
from transformers import pipeline

text = "The value of an object"
classify = pipeline(
    "token-classification", model="{folder}", trust_remote_code=True, aggregation_strategy="simple"
)
for found in classify(text):
    print(found["entity_group"], repr(text[found["start"] : found["end"]]), found["score"])
```

The classes: {classes}. No special tokens are added around a text, and names of special tokens in it are ordinary text. Texts are
truncated to {text_tokens} tokens."""

SEQUENCES = """texts = ["The value of an object", "The valve on and object"]
inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    {expression}
print({shown})
```

or

```python
from transformers import pipeline

classify = pipeline("text-classification", model="{folder}", trust_remote_code=True)
print(classify(["The value of an object", "The valve on and object"], truncation=True{every}))
```

{meaning} The tokenizer puts `[CLS]` in front, whose hidden state the
model classifies; without it the output has no meaning. Names of special tokens in a text are ordinary text. `truncation=True`
truncates to {text_tokens} tokens; score a longer text piece by piece."""

SCORES = {
    "expression": "scores = model(**inputs).logits[:, 0]  # (texts,)",
    "shown": "scores.tolist()",
    "every": "",
}
CLASSES = {
    "expression": "shares = model(**inputs).logits.softmax(-1)  # (texts, classes)",
    "shown": "[model.config.id2label[i] for i in shares.argmax(-1).tolist()]",
    "every": ", top_k=None",
}

CRITIC = """inputs = tokenizer("The valve of an object", truncation=True, return_tensors="pt")
with torch.no_grad():
    raw = model(**inputs, head="critic").logits.sigmoid()[0]  # (tokens,)
with open(cached_file("{folder}", "calibration.json"), encoding="utf-8") as file:
    curve = json.load(file)["readings"]["unknown"]["whole"]
errors = numpy.interp(raw.numpy(), curve["raw"], curve["calibrated"])
for token, chance in zip(inputs["input_ids"][0].tolist(), errors):
    print(repr(tokenizer.decode([token])), chance)
```

`errors` is the probability that each token is wrong, when nothing is known of the text. `calibration.json` maps the critic's
output to the frequency of errors on held-out text. The same model fills masks:

```python
from transformers import pipeline

fill = pipeline("fill-mask", model="{folder}", trust_remote_code=True)
for found in fill("The val{mask}e of an object"):
    print(found["score"], found["sequence"])
```

No special tokens are added around a text; `{mask}` in it is the mask. The model was trained on up to {text_tokens} tokens."""

PAIRS = """```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("{folder}"{trust}).eval()
tokenizer = AutoTokenizer.from_pretrained("{folder}"{trust})
question = {question}
candidates = ["subtract(2257, 1748) = 509", "add(2257, 1748) = 4005"]
inputs = tokenizer([question] * len(candidates), candidates, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    scores = model(**inputs).logits[:, 0]  # (candidates,)
print(candidates[scores.argmax()])
```

or, with sentence-transformers 6,

```python
from sentence_transformers import CrossEncoder

question = {question}
candidates = ["subtract(2257, 1748) = 509", "add(2257, 1748) = 4005"]
scores = CrossEncoder("{folder}"{trust}).predict([(question, candidate) for candidate in candidates])
print(candidates[scores.argmax()])
```

The candidate of the highest score is the answer. Scores of different questions are not comparable. {prompt}"""


def usage(
    config: dict[str, Any], kind: str | None = None, prompt: str = "", own_labels: bool = False
) -> Usage:
    """The section for the model of a saved config.

    Args:
        kind: "critic", or "pairs" for a ranker with prompts; the architecture alone does not say this.
        prompt: content of a ranker's prompts; empty for a ranker that reads none.
        own_labels: the labels are user-defined.
    """
    architecture = config["architectures"][0]
    has_code = "auto_map" in config
    about = (OWN_CODE if has_code else STOCK_CODE).format(folder=FOLDER, floor=FLOOR)
    words: dict[str, Any] = {
        "folder": FOLDER,
        "text_tokens": config.get("max_position_embeddings", 1) - 1,
        "mask": config.get("mask_token", "[MASK]"),
    }
    if kind == "pairs":
        words |= {
            "trust": ", trust_remote_code=True" if has_code else "",
            "question": '"what was the change in net revenue from 2012 to 2013?"' if prompt else '""',
            "prompt": f"It was trained with {prompt} before each candidate." if prompt else "It was trained without the question, as a control.",
        }  # fmt: skip
        return Usage("text-ranking", PAIRS.format(**words) + "\n\n" + about)
    auto, task, body, more = _head_of(architecture, config, own_labels)
    load = LOAD
    if kind == "critic":
        load = load.replace("import torch\n", "import json\n\nimport numpy\nimport torch\n")
        load = load.replace(
            "AutoTokenizer\n\n", "AutoTokenizer\nfrom transformers.utils import cached_file\n\n"
        )
        body = CRITIC
    return Usage(task, load.format(auto=auto, **words) + body.format(**words, **more) + "\n\n" + about)


def _head_of(
    architecture: str, config: dict[str, Any], own_labels: bool
) -> tuple[str, str, str, dict[str, str]]:
    """(Auto class, pipeline, template, further values for the template) of an architecture.

    `config["own_class"]`: the Auto class of a masked LM of another project that brings its own code.
    """
    if architecture.endswith("MaskedLM"):
        around = NOTHING_AROUND if "auto_map" in config else FRAMED
        return (
            "AutoModelForMaskedLM",
            "fill-mask",
            FILL + PROPOSALS + OF_MASKS,
            {"around": around},
        )
    if config.get("own_class"):
        return config["own_class"], "fill-mask", FILL + OF_MASKS, {"around": FRAMED}
    if architecture.endswith("CausalLM"):
        return "AutoModelForCausalLM", "text-generation", CAUSAL, {}
    names = [f"`{name}`" for _, name in sorted(config["id2label"].items(), key=lambda pair: int(pair[0]))]
    if architecture.endswith("TokenClassification"):
        return (
            "AutoModelForTokenClassification",
            "token-classification",
            TOKENS,
            {"classes": ", ".join(names)},
        )
    if len(names) > 1:
        words = CLASSES | {"meaning": f"The classes: {', '.join(names)}."}
    elif config["score_activation"] == "sigmoid":
        score = "as in the training labels" if own_labels else "1 for original text, less for rewritten text"
        words = SCORES | {"meaning": f"The score lies in [0, 1]: {score}."}
    else:
        words = SCORES | {
            "meaning": "The candidate of the highest score is the best. Scores have no unit; compare only candidates of one example."
        }
    return "AutoModelForSequenceClassification", "text-classification", SEQUENCES, words
