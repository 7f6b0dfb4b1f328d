"""A Llama with FoPE, or with RoPE and log-n scaling, for transformers. hf/convert.py exports it with a copy of fope.py.

Load it with AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True). config.fope holds what config.json
says about the position embedding: pos, omega (the frequencies), seed, logn, logit_scale, train_len, FoPE's options.
"""

import torch
import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("5.5"):
    raise ImportError(f"this model needs transformers 5.5 or newer, not {transformers.__version__}: upgrade it")

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

from .fope import FoPE, RoPE, log_n


class FopeLlamaConfig(LlamaConfig):
    """A Llama's config with the field `fope`.

    In config.json, rope_type is "fope", which a plain Llama does not know. So the model cannot be loaded as a plain
    Llama, which would silently compute RoPE.
    """

    base_model_tp_plan = {}  # a rank's share of the heads would not fit the coefficients of all heads

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0}  # LlamaModel wants some; not used

    def to_dict(self):
        return super().to_dict() | {"rope_parameters": {"rope_type": "fope"}}


class FopeLlamaAttention(LlamaAttention):
    """Llama's attention, whose q and k get their positions from fope.py instead of the model's rotary_emb."""

    def __init__(self, config: FopeLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        options = dict(config.fope)
        pos, self.logn, self.logit_scale = (options.pop(name) for name in ("pos", "logn", "logit_scale"))
        self.train_len, seed = options["train_len"], options.pop("seed") + layer_idx
        options["omega"] = torch.tensor(options["omega"], dtype=torch.float64, device="cpu")
        if pos == "rope":
            self.position = RoPE(head_dim=self.head_dim, omega=options["omega"])
        else:
            heads = dict(n_head=config.num_attention_heads, n_kv_head=config.num_key_value_heads)
            self.position = FoPE(**heads, head_dim=self.head_dim, seed=seed, **options)

    def forward(self, hidden_states, attention_mask=None, position_ids=None, cache=None, **kwargs):
        kwargs.pop("position_embeddings")
        cache = kwargs.pop("past_key_values", cache)  # its name in older versions of transformers
        B, T, _ = hidden_states.shape
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (f(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2) for f in projections)
        if self.logn:
            q = log_n(q, position_ids, self.train_len, self.logn)
        q, k = self.position(q * self.logit_scale, k, position_ids)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        y, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(y.reshape(B, T, -1)), weights


class FopeLlamaModel(LlamaModel):
    config_class = FopeLlamaConfig
    _keep_in_fp32_modules_strict = ["coef"]  # bfloat16 would round the coefficients

    def __init__(self, config: FopeLlamaConfig):
        super().__init__(config)
        for i, layer in enumerate(self.layers):
            layer.self_attn = FopeLlamaAttention(config, i)
        self.post_init()


class FopeLlamaForCausalLM(LlamaForCausalLM):
    config_class = FopeLlamaConfig
    _keep_in_fp32_modules_strict = ["coef"]

    def __init__(self, config: FopeLlamaConfig):
        super().__init__(config)
        self.model = FopeLlamaModel(config)
        self.post_init()
