"""A ladder model built from vLLM's own layers.

The weights have the names that Llama's have in vLLM. Norms, RoPE, attention and its cache, quantization of
linears, and sampling are vLLM's. The only difference from Llama is the order of sub-modules and sums
(schedule.py). For it the row-parallel linears do not sum their outputs: the layer does.
"""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_world_size,
    get_tp_group,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import SupportsPP, SupportsQuant
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from megatron_ladder.hf.modelling.configuration_ladder import PARALLELS
from megatron_ladder.vllm import all_reduce
from megatron_ladder.vllm.names import STACKED
from megatron_ladder.vllm.schedule import (
    State,
    ladder_layer,
    parallel_ladder_layer,
    parallel_layer,
    standard_layer,
    whole,
)
from megatron_ladder.vllm.supported import check_supported


class LadderAttention(nn.Module):
    """Attention: normalised [tokens, hidden] -> this rank's partial output, of the same shape."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            heads,
            groups,
            bias=config.qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            heads * config.head_dim,
            config.hidden_size,
            bias=False,
            reduce_results=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            config.head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
            is_neox_style=True,
        )
        # This rank's sizes. vLLM repeats key/value heads where there are fewer of them than ranks.
        self.head_dim = config.head_dim
        self.q_size = self.qkv_proj.num_heads * config.head_dim
        self.kv_size = self.qkv_proj.num_kv_heads * config.head_dim
        self.attn = Attention(
            self.qkv_proj.num_heads,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            # vLLM gives layers without a window that of its cache, unless layer_types has both kinds.
            per_layer_sliding_window=config.layer_windows()[extract_layer_index(prefix)],
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(x)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        if self.qk_norm:
            q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output


class LadderMLP(nn.Module):
    """SwiGLU: normalised [tokens, hidden] -> this rank's partial output, of the same shape."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            reduce_results=False,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )
        self.act_fn = SiluAndMul()

    def forward(self, x: Tensor) -> Tensor:
        gate_up, _ = self.gate_up_proj(x)
        output, _ = self.down_proj(self.act_fn(gate_up))
        return output


class LadderDecoderLayer(nn.Module):
    def __init__(self, vllm_config: VllmConfig, sums: all_reduce.AllReduce, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.sums = sums
        self.is_parallel = config.residual in PARALLELS
        self.is_ladder = extract_layer_index(prefix) in config.ladder_layer_indices()
        self.self_attn = LadderAttention(vllm_config, f"{prefix}.self_attn")
        self.mlp = LadderMLP(vllm_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not self.is_parallel:
            self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, positions: Tensor, state: State) -> State:
        def attention(x: Tensor) -> Tensor:
            return self.self_attn(positions, self.input_layernorm(x))

        def mlp(x: Tensor) -> Tensor:
            return self.mlp(self.post_attention_layernorm(x))

        def attention_and_mlp(x: Tensor) -> Tensor:
            normed = self.input_layernorm(x)
            return self.self_attn(positions, normed) + self.mlp(normed)

        if self.is_parallel:
            both = parallel_ladder_layer if self.is_ladder else parallel_layer
            return both(state, attention_and_mlp, self.sums)
        layer = ladder_layer if self.is_ladder else standard_layer
        return layer(state, attention, mlp, self.sums)


@support_torch_compile
class LadderModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        if get_pp_group().is_first_rank or (
            config.tie_word_embeddings and get_pp_group().is_last_rank
        ):
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config
            )
        else:
            self.embed_tokens = PPMissingLayer()
        group = None
        if get_tensor_model_parallel_world_size() > 1:
            group = get_tp_group().device_group.group_name
            all_reduce.run_between_graphs(vllm_config.compilation_config.splitting_ops)
        self.sums = all_reduce.AllReduce(group, tensor_model_parallel_all_reduce)
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: LadderDecoderLayer(vllm_config, self.sums, prefix),
            prefix=f"{prefix}.layers",
        )
        if get_pp_group().is_last_rank:
            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        else:
            self.norm = PPMissingLayer()
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["without_last", "whole"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if get_pp_group().is_first_rank:
            if inputs_embeds is None:
                assert input_ids is not None
                inputs_embeds = self.embed_input_ids(input_ids)
            embedding = inputs_embeds
            state = State(embedding, embedding, None)
        else:
            assert intermediate_tensors is not None
            received = intermediate_tensors
            state = State(received["without_last"], received["whole"], None)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            state = layer(positions, state)
        # A pipeline stage waits for its last sum, because the next stage reads complete states.
        a, m = whole(state, self.sums)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"without_last": a, "whole": m})
        return self.norm(m)


class LadderForCausalLM(nn.Module, SupportsPP, SupportsQuant):
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_stacked=STACKED)
    packed_modules_mapping = {  # noqa: RUF012 (vLLM's own name)
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        check_supported(config)
        self.config = config
        self.model = LadderModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
