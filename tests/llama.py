"""Our RoPE model as transformers' Llama: for the test of its arithmetic and the benchmark of its speed."""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hf.convert import in_llama_names
from model import GPT, PRESETS, GPTConfig


def llama_of(ours: GPT) -> LlamaForCausalLM:
    c = ours.cfg
    heads = dict(num_attention_heads=c.n_head, num_key_value_heads=c.kv_heads)
    shape = dict(hidden_size=c.n_embd, intermediate_size=c.n_hidden, num_hidden_layers=c.n_layer, **heads)
    more = dict(rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=c.vocab_size, **shape, **more))
    llama.load_state_dict(in_llama_names(c, ours.state_dict()), strict=not c.tied)  # tied: lm_head is the embedding
    return llama


def main(preset: str, B: str, vocab: str, device: str, dtype: str) -> None:
    """A training step for every line of stdin, as a user of transformers would write it: for tests/bench.py."""
    llama = llama_of(GPT(GPTConfig(pos="rope", vocab_size=int(vocab), **PRESETS[preset]))).to(device).train()
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-5, weight_decay=0.1, fused=True)
    tokens = torch.randint(int(vocab), (int(B), 513), device=device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    for _ in sys.stdin:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = llama(x, labels=y, shift_labels=y, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        print("stepped", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
