"""Named configurations. Each is a function that returns a TrainConfig; options override its fields.

Every preset takes `--model.residual standard|ladder|parallel|parallel-ladder|desync`, and those with
experts all of these but desync.
"""

from collections.abc import Callable
from dataclasses import replace

from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.fields.experts import ExpertsConfig
from megatron_ladder.side.config import SideConfig
from pretrain.config.data import DataConfig
from pretrain.config.optimizer import OptimizerConfig
from pretrain.config.schedule import ScheduleConfig
from pretrain.config.train import TrainConfig


def debug() -> TrainConfig:
    """Seconds on a laptop: to see that everything works."""
    return TrainConfig(
        model=ModelConfig(
            num_layers=4,
            hidden_size=64,
            ffn_hidden_size=192,
            num_attention_heads=4,
            num_query_groups=2,
            max_position_embeddings=128,
        ),
        data=DataConfig(seq_length=64, num_workers=0),
        optimizer=OptimizerConfig(lr=3e-3),
        schedule=ScheduleConfig(train_steps=20, warmup_steps=2),
        micro_batch_size=4,
        global_batch_size=8,
        eval_interval=10,
        eval_sequences=16,
        save_interval=10,
    )


def tiny() -> TrainConfig:
    """The quick start: minutes on two CPU cores, two tensor-parallel ranks."""
    return TrainConfig(
        model=ModelConfig(
            num_layers=6,
            hidden_size=128,
            ffn_hidden_size=384,
            num_attention_heads=4,
            num_query_groups=2,
            max_position_embeddings=256,
        ),
        data=DataConfig(seq_length=256, num_workers=0),
        optimizer=OptimizerConfig(lr=5e-3),
        schedule=ScheduleConfig(train_steps=700, warmup_steps=40),
        parallel=ParallelConfig(tensor_model_parallel_size=2),
        micro_batch_size=8,
        global_batch_size=8,
        eval_interval=100,
        eval_sequences=256,
        save_interval=100,
        log_interval=5,
    )


def tiny_experts() -> TrainConfig:
    """As tiny, with eight experts a layer, of which a token takes two, and a shared one."""
    config = tiny()
    experts = ExpertsConfig(
        num_moe_experts=8, moe_ffn_hidden_size=128, moe_shared_expert_intermediate_size=128
    )
    return replace(
        config,
        model=replace(config.model, residual="standard", experts=experts),
        parallel=ParallelConfig(expert_model_parallel_size=2),
        micro_batch_size=4,
    )


def paper_1b() -> TrainConfig:
    """The paper's 1B: 104.9B tokens, 64 GPUs (arXiv 2501.06589, section 4.1)."""
    return TrainConfig(
        model=ModelConfig(
            num_layers=40,
            hidden_size=1536,
            ffn_hidden_size=4096,
            num_attention_heads=24,
            vocab_size=49152,
        ),
        schedule=ScheduleConfig(train_steps=25_000, warmup_steps=2_000),
        micro_batch_size=8,
        global_batch_size=2048,
        precision="bf16",
        eval_interval=500,
        eval_sequences=4096,
        save_interval=500,
        log_interval=10,
    )


def paper_3b() -> TrainConfig:
    """The paper's 3B: 104.9B tokens, 128 GPUs."""
    config = paper_1b()
    return replace(
        config,
        model=replace(config.model, hidden_size=2304, ffn_hidden_size=9216, num_attention_heads=36),
        micro_batch_size=4,
    )


def llama_3_8b() -> TrainConfig:
    """Llama 3's 8B shape, tensor parallel over one node."""
    config = paper_1b()
    return replace(
        config,
        model=ModelConfig(
            num_layers=32,
            hidden_size=4096,
            ffn_hidden_size=14336,
            num_attention_heads=32,
            num_query_groups=8,
            vocab_size=128256,
            max_position_embeddings=8192,
            rotary_base=500_000.0,
            share_embeddings_and_output_weights=False,
        ),
        data=DataConfig(seq_length=8192),
        parallel=ParallelConfig(tensor_model_parallel_size=8),
        micro_batch_size=1,
        global_batch_size=512,
    )


def llama_3_70b() -> TrainConfig:
    """Llama 3's 70B shape: tensor and sequence parallel over a node, two stages of four parts."""
    config = llama_3_8b()
    return replace(
        config,
        model=replace(
            config.model,
            num_layers=80,
            hidden_size=8192,
            ffn_hidden_size=28672,
            num_attention_heads=64,
        ),
        # The planner's fastest layout on 1024 H100s (docs/design/planner.md). On fewer GPUs it does not
        # fit in memory without `recompute`.
        parallel=ParallelConfig(
            tensor_model_parallel_size=8,
            sequence_parallel=True,
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=4,
        ),
        optimizer=replace(config.optimizer, lr=1.5e-4),
        recompute="none",
    )


def adapt() -> TrainConfig:
    """A model that exists (--init-from), some of its layers made ladder: the paper's 3B tokens."""
    config = debug()
    return replace(
        config,  # the model is that of --init-from
        data=DataConfig(seq_length=4096),
        # Section 4.2: 5e-6 after 200 steps of warm-up.
        optimizer=OptimizerConfig(lr=5e-6, weight_decay=0.0),
        schedule=ScheduleConfig(train_tokens=3_000_000_000, warmup_steps=200),
        model=replace(config.model, max_position_embeddings=4096),
        micro_batch_size=1,
        global_batch_size=128,
        precision="bf16",
        eval_interval=200,
        eval_sequences=512,
        save_interval=200,
        log_interval=10,
    )


def adapt_control() -> TrainConfig:
    """The same training of the unmodified model, to compare with."""
    return adapt()


def extend() -> TrainConfig:
    """A model that exists (--init-from), with a context of --data.seq-length tokens: YaRN's 400 steps."""
    config = adapt()
    return replace(
        config,
        data=DataConfig(seq_length=32_768),
        # arXiv 2309.00071, section 4.1.
        optimizer=OptimizerConfig(lr=2e-5, weight_decay=0.0),
        schedule=ScheduleConfig(train_steps=400, warmup_steps=20),
        model=replace(config.model, max_position_embeddings=32_768),
        global_batch_size=64,
        recompute="full",  # what a long sequence keeps for backward would not fit
        eval_interval=50,
        eval_sequences=64,
        save_interval=50,
        log_interval=1,
    )


def side_tune() -> TrainConfig:
    """A model that exists (--init-from), not trained, and a small network beside it that is (LST)."""
    config = adapt()
    return replace(
        config,
        side=SideConfig(reduction=8),
        data=DataConfig(seq_length=2048),
        # arXiv 2206.06522: the learning rate of T5-base, and the warm-up of its scripts.
        optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.0),
        schedule=ScheduleConfig(train_steps=2_000, warmup_steps=200),
        global_batch_size=32,
    )


def qwen3_30b_a3b() -> TrainConfig:
    """Qwen3-30B-A3B's shape: 128 experts a layer, 8 a token, over the eight GPUs of a node."""
    # config.json of Qwen/Qwen3-30B-A3B, and NVIDIA/Megatron-LM, examples/post_training/modelopt/conf/qwen/
    # Qwen3-30B-A3B.sh. How the balance is asked for is this project's default, which no layout changes.
    config = llama_3_8b()
    return replace(
        config,
        model=ModelConfig(
            num_layers=48,
            hidden_size=2048,
            ffn_hidden_size=6144,  # of layers without experts: it has none
            num_attention_heads=32,
            num_query_groups=4,
            kv_channels=128,
            qk_layernorm=True,
            vocab_size=151936,
            max_position_embeddings=40960,
            rotary_base=1_000_000.0,
            layernorm_epsilon=1e-6,
            share_embeddings_and_output_weights=False,
            experts=ExpertsConfig(
                num_moe_experts=128,
                moe_router_topk=8,
                moe_ffn_hidden_size=768,
                moe_aux_loss_coeff=1e-3,
            ),
        ),
        data=DataConfig(seq_length=4096),
        parallel=ParallelConfig(expert_model_parallel_size=8),
        global_batch_size=1024,
    )


def deepseek_v2_lite_mha() -> TrainConfig:
    """DeepSeek-V2-Lite's shape without MLA: multi-head attention instead, 16 heads of 128 channels."""
    # config.json of deepseek-ai/DeepSeek-V2-Lite, and NVIDIA/Megatron-LM, examples/post_training/modelopt/
    # conf/deepseek-ai/DeepSeek-V2-Lite.sh. Its MLA has heads of 128 + 64 channels and 13.8 M weights a
    # layer; this attention has 16.8 M.
    config = llama_3_8b()
    layers = 27
    return replace(
        config,
        model=ModelConfig(
            num_layers=layers,
            hidden_size=2048,
            ffn_hidden_size=10944,  # of the first layer
            num_attention_heads=16,
            kv_channels=128,
            vocab_size=102400,
            max_position_embeddings=4096,
            layernorm_epsilon=1e-6,
            share_embeddings_and_output_weights=False,
            experts=ExpertsConfig(
                num_moe_experts=64,
                moe_router_topk=6,
                moe_ffn_hidden_size=1408,
                moe_shared_expert_intermediate_size=2 * 1408,
                moe_layer_freq=(0,) + (1,) * (layers - 1),
                moe_router_pre_softmax=True,
                moe_aux_loss_coeff=1e-3,
            ),
        ),
        data=DataConfig(seq_length=4096),
        parallel=ParallelConfig(expert_model_parallel_size=8),
        global_batch_size=1024,
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "debug": debug,
    "tiny": tiny,
    "tiny-experts": tiny_experts,
    "paper-1b": paper_1b,
    "paper-3b": paper_3b,
    "llama-3-8b": llama_3_8b,
    "llama-3-70b": llama_3_70b,
    "qwen3-30b-a3b": qwen3_30b_a3b,
    "deepseek-v2-lite-mha": deepseek_v2_lite_mha,
    "adapt": adapt,
    "adapt-control": adapt_control,
    "extend": extend,
    "side-tune": side_tune,
}
# They have no model of their own: it is that of --init-from.
OF_A_MODEL = frozenset(("adapt", "adapt-control", "extend", "side-tune"))
