"""python -m lib.models.ltg_bert.legacy_import IN.bin OUT.safetensors: the tensors of a pickled checkpoint.

A process of its own: torch's weights-only loader refuses code in the file, and should it be fooled or crash, it is this
process that is. A training checkpoint keeps the weights under "model"; `module.` in front comes from data parallelism.
"""

import sys

import torch
from safetensors.torch import save_file


def main() -> int:
    source, target = sys.argv[1:]
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile or damaged file makes of the loader
        print(f"not a weights-only checkpoint ({str(error).splitlines()[0]})", file=sys.stderr)
        return 1
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not all(isinstance(t, torch.Tensor) for t in content.values()):
        print("the file holds no state dict of tensors", file=sys.stderr)
        return 1
    # Tied tensors share memory, which safetensors refuses
    save_file({name.removeprefix("module."): t.clone().contiguous() for name, t in content.items()}, target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
