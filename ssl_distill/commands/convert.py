"""`ssl-distill convert`: official checkpoints as ours."""

from pathlib import Path

from ssl_distill.commands.arguments import OneLineParser
from ssl_distill.commands.trust import HELP, import_known_only

_LAYOUTS = ("dino", "ibot", "udi", "dbot", "mokd", "pcd", "scalr")
_EPILOG = """An output in .safetensors is a backbone, as `fit` and `export` leave it. One in .ckpt is a checkpoint that
`ssl-distill fit -c CONFIG --ckpt_path OUTPUT` goes on from (dino and ibot)."""


def convert(args: list[str]) -> None:
    """Read a published file and save one of its encoders, or all of it as a checkpoint.

    Raises:
        ValueError: If the file is damaged, another paper's, or of an unknown architecture.
    """
    parser = OneLineParser(prog="ssl-distill convert", description=__doc__, epilog=_EPILOG, allow_abbrev=False)
    parser.add_argument("file", type=Path, help="a checkpoint as its authors published it, or their code saved it")
    parser.add_argument("--from", dest="layout", required=True, choices=_LAYOUTS, help="whose it is")
    parser.add_argument("--encoder", help="which network; default: the one that the paper evaluates")
    parser.add_argument("--backbone", help="timm name of the network; default: told by the sizes of the weights")
    parser.add_argument("--backbone_kwargs", metavar="JSON", help="further arguments of the timm model")
    parser.add_argument("--output", type=Path, help="default: backbone.safetensors beside the file")
    parser.add_argument("--config", type=Path, action="append", help="of the run that goes on, for an output in .ckpt")
    parser.add_argument("--trust", action="store_true", help=f"with --config: {HELP}")
    options = parser.parse_args(args)
    output = options.output or options.file.parent / "backbone.safetensors"
    if output.suffix not in (".safetensors", ".ckpt"):
        raise ValueError(f"`--output` must end in .safetensors or .ckpt, got {output}.")
    if (output.suffix == ".ckpt") != bool(options.config):
        raise ValueError("`--config` and an `--output` that ends in .ckpt must be given together, or neither.")

    from ssl_distill.convert import describe, make_backbone, parse_kwargs  # only now: torch takes seconds to import
    from ssl_distill.convert_layouts import check_layout, choose, find_networks, read_official

    kwargs = parse_kwargs(options.backbone_kwargs)
    content = read_official(options.file)
    found = find_networks(content)
    check_layout(found, options.layout, options.file)
    if options.config:
        from ssl_distill.commands.convert_checkpoint import convert_checkpoint

        if not options.trust:
            import_known_only()
        convert_checkpoint(content, options.layout, options.config, output)
        return

    from ssl_distill.export import export_backbone, loading_lines

    encoder, network = choose(found, options.layout, options.encoder, options.file)
    backbone = make_backbone(network, options.layout, options.backbone, kwargs)
    export_backbone(backbone, output, describe(backbone, options.layout, encoder, options.file))
    where = f" ({network.place.strip()})" if network.place else ""
    print("\n".join([f"{output}: the {encoder} of {options.file}{where}", *loading_lines(output)]))
