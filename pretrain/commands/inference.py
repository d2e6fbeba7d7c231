"""`megatron-ladder generate` and `serve`."""

import tyro

from megatron_ladder.errors import UserError
from pretrain.commands.users import for_users
from pretrain.ranks import check_gpus, is_first_rank, launched_rank


@for_users
def generate(argv: list[str]) -> int:
    """Prints continuations of prompts."""
    from pretrain.inference.options import GenerateOptions

    options = tyro.cli(GenerateOptions, args=argv, prog="megatron-ladder generate")
    parallel = options.parallel()
    from pretrain.convert.plain_model import is_hf_folder

    choice = {key: getattr(options, key) for key in ("temperature", "top_k", "top_p")}
    if is_hf_folder(options.model):
        if parallel.model_parallel_size > 1 or options.batching != "dynamic":
            raise UserError(
                f"{options.model} is a Hugging Face folder, which `generate` runs by transformers in one "
                "process: leave out --tensor-model-parallel-size, --pipeline-model-parallel-size and "
                "--batching, or use `serve`, which takes folders at any layout"
            )
        from megatron_ladder.hf.generate import generate_text

        texts = generate_text(
            options.model,
            list(options.prompt),
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
            **choice,
        )
    else:
        from megatron_ladder.inference.requests import Sampling
        from pretrain.inference.generate import generate_from_run
        from pretrain.inference.loaded import find

        sampling = Sampling(options.max_new_tokens, **choice)
        find(options.model, parallel, options.all_reduce)  # refuses mistakes before ranks start
        _start_ranks("generate", argv, parallel.model_parallel_size)
        texts = generate_from_run(
            options.model,
            options.prompt,
            parallel,
            sampling,
            batching=options.batching,
            all_reduce=options.all_reduce,
            seed=options.seed,
        )
    if is_first_rank():
        print(("\n" + "-" * 80 + "\n").join(texts))
    return 0


@for_users
def serve(argv: list[str]) -> int:
    """Serves a model over HTTP until it is told to stop."""
    from pretrain.inference.options import ServeOptions

    options = tyro.cli(ServeOptions, args=argv, prog="megatron-ladder serve")
    from pretrain.inference.loaded import find
    from pretrain.inference.server.serve import listen
    from pretrain.inference.server.serve import serve as serve_model

    # Mistakes are refused before ranks start. Ranks do not try the port: any rank but the first would find
    # it in use by the first one.
    if options.parallel().model_parallel_size > 1 and launched_rank() is None:
        find(options.model, options.parallel(), options.all_reduce)
        listen(options).close()
    _start_ranks("serve", argv, options.parallel().model_parallel_size)
    serve_model(options)
    return 0


def _start_ranks(command: str, argv: list[str], ranks: int) -> None:
    """Replaces this process by torchrun with `ranks` ranks of the same command.

    Does nothing for one rank, or when torchrun has already started the ranks.
    """
    if launched_rank() is None and ranks > 1:
        check_gpus(ranks, "ranks of the layout:")
        from pretrain.start.launch import become_torchrun

        become_torchrun(ranks, "--module", "pretrain.cli", command, *argv)
