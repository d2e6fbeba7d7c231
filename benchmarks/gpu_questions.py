"""What gpu_page.py says around the figures of each section: words only, no figure that was measured."""

from typing import NamedTuple


class Words(NamedTuple):
    """Of one section. Markdown."""

    question: str
    wanted: str
    not_shown: str


QUESTIONS = {
    "Attention": Words(
        question="Which core attention is the fastest, forward and backward, on 8,192 tokens?",
        wanted="a fused kernel, one that keeps no scores in memory.",
        not_shown="""\
Other lengths, heads and masks. What attention costs inside a step, where Python counts too: that is in
[training steps](#training-steps).""",
    ),
    "Tests": Words(
        question="""\
Are bf16 and each FP8 recipe right against fp32, at TP=2 with and without sequence parallelism, and after
resuming?""",
        wanted="all pass, within the tests' bounds.",
        not_shown="Several GPUs, NCCL: two ranks share one GPU and talk over gloo.",
    ),
    "Layers, TP=1": Words(
        question="""\
What do ladder layers cost beside megatron-core's, without tensor parallelism? `layers-experts` has the same
for mixtures of 128 experts, all on this GPU.""",
        wanted="at most 1.00 of standard's time, and noise; FP8 1.25 times as fast as bf16 at 8B.",
        not_shown="""\
The overlap: at TP=1 there is nothing to hide. "Over standard" is of pairs in one repetition. A precision's
speed over another is of medians, as one precision is built at a time. With fewer tokens Python takes longer
to launch a kernel than the kernel takes, and Python is what would be compared.""",
    ),
    "Training steps": Words(
        question="""\
How fast is a whole step, and how much memory does it take beside the plan? What do FP8, a CUDA graph and
Transformer Engine's attention change?""",
        wanted="""\
MFU of 45 % in bf16 at 1B; FP8 1.25 times as fast as bf16 at 8B; memory within 5 % of the plan.""",
        not_shown="""\
Several GPUs. Data, validation and checkpoints: tokens are random and nothing is written. A whole model of
8B: it has as many layers as its case says, with the whole output head. MFU counts 6 N + 12 L h s operations
a token (PaLM's counting; causality is left out, recomputation does not count) over the card's dense bf16
peak, for FP8 too.""",
    ),
    "Hidden share of a modelled link, TP=8": Words(
        question="""\
How much of a link's time do layers hide, forward and backward, as rank 0 of 8? The shares are against a
standard layer that waits for every collective at once.""",
        wanted="ladder hides 0.95 of the most that its number of layers allows.",
        not_shown="""\
Real ranks. **The link is modelled**: collectives move nothing, and a kernel that counts the GPU's cycles
holds a stream for as long as the link would take. It counts by the clock of an idle GPU. Under load the
clock falls and the link is slower than it says, for every kind alike. What NCCL's kernels take from GEMMs
is not in it. The micro-batches are large (65,536 tokens of 8B, 16,384 of 70B): with fewer tokens Python
takes longer to launch a kernel than the kernel takes, and everything would seem hidden.""",
    ),
    "All kinds of layers over a modelled link, TP=8": Words(
        question="""\
Which kind of layers hides how much of a link's time, and what does it cost when the link takes none? Shares
are against a standard layer that waits for every collective at once, beside the most that the kind can
hide by the planner's model with the measured times of sub-modules. Times of forward and backward together
are over those of megatron-core's standard in the same repetition, with quartiles.""",
        wanted="""\
halves and parallel-ladder hide 0.95 of the most that is possible; halves cost little without the link.""",
        not_shown="""\
Real ranks: **the link is modelled**, as above. Whether a kind learns as well: that is in
[learning](learning.md). The best layout of each kind: here all have the same. Kernels that hide a GEMM's
communication behind the same GEMM: [what others report](overlap.md#what-others-report).""",
    ),
    "All-to-alls of experts over a modelled link, EP=8": Words(
        question="""\
How much of the time of the experts' all-to-alls do ladder layers hide, as rank 0 of 8 (the shape of
DeepSeek-V2-Lite's layers, without MLA)? Standard layers wait for each at once: their share says how far the
others may be off.""",
        wanted="0.9 of the most that the number of layers allows, with a shared expert.",
        not_shown="""\
Real ranks: **the link is modelled**, as above. Uneven experts, and the exchange of numbers of tokens: what
experts get is padded to the mean. Learning.""",
    ),
    "Hardware queues": Words(
        question="""\
Does the number of hardware queues (`CUDA_DEVICE_MAX_CONNECTIONS`: 1, 2, 8, 32) hold back the second stream
of sequence parallelism?""",
        wanted="a number that does not hold it back.",
        not_shown="Real ranks: the link is modelled, as above.",
    ),
    "Learning": Words(
        question="""\
Does ladder learn as well as standard, with 25M parameters and up to 210M tokens of the machine's own source
text?""",
        wanted="a loss that is not behind standard's. [Learning](learning.md) has smaller models on a CPU.",
        not_shown="""\
Larger models, other text. Times of large shapes are modelled by the planner, not measured.""",
    ),
    "Learning rates": Words(
        question="Which of three learning rates suits standard and ladder?",
        wanted="a rate at which the kinds can be compared.",
        not_shown="More rates, longer runs.",
    ),
    "Precisions": Words(
        question="Do the FP8 recipes learn as bf16 does?",
        wanted="a loss within 1 % of bf16's. [FP8 and bf16](precision.md) has it on a CPU.",
        not_shown="Large models, long runs.",
    ),
    "torch.compile": Words(
        question="What does `--compile` win in bf16, at hidden sizes 256 and 512?",
        wanted="at most 0.9 of the plain step's time.",
        not_shown="Larger models. Tensor parallelism, which `--compile` refuses.",
    ),
}
