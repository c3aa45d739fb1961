"""llama.cpp's own converter for checkpoints, also where it does not know the tokenizer.

    python convert_gguf.py LLAMA_CPP_SOURCE CHECKPOINT --outfile OUT.gguf --outtype bf16

The converter recognizes tokenizers by a hash and refuses the others. A comparison hands over token
ids, so for those any rule that cuts text into words will do.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    source = Path(sys.argv[1])
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    from conversion.base import TextModel

    recognize = TextModel.get_vocab_base_pre

    def recognize_or_not(self: Any, tokenizer: Any) -> str:
        try:
            name: str = recognize(self, tokenizer)
        except NotImplementedError:
            name = "gpt-2"
        return name

    TextModel.get_vocab_base_pre = recognize_or_not
    script = source / "convert_hf_to_gguf.py"
    sys.argv = [str(script), *sys.argv[2:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
