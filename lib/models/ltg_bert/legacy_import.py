"""python -m lib.models.ltg_bert.legacy_import IN.bin OUT.safetensors: the tensors of a pickled checkpoint.

torch's weights-only loader refuses code in the file. It runs in a separate process, so a crash or an attack stays in there. A
training checkpoint has its weights under "model"; data parallelism adds the prefix `module.` to names.
"""

import sys

import torch
from safetensors.torch import save_file


def main() -> int:
    source, target = sys.argv[1:]
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile or damaged file can cause any error
        print(f"not a weights-only checkpoint ({str(error).splitlines()[0]})", file=sys.stderr)
        return 1
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not all(isinstance(t, torch.Tensor) for t in content.values()):
        print("the file has no state dict of tensors", file=sys.stderr)
        return 1
    # Tied tensors share memory, which safetensors refuses.
    save_file({name.removeprefix("module."): t.clone().contiguous() for name, t in content.items()}, target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
