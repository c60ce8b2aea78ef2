"""The command `ssl-distill`. This file imports nothing heavy, so that `--help` answers at once."""

import argparse
import difflib
import os
import sys

import ssl_distill
from ssl_distill.stopping import stopping_now

_COMMANDS = {
    "fit": "train a method; evaluates before the first step and as it goes on, and exports the backbone",
    "validate": "the evaluation table of a checkpoint",
    "test": "the test loop of a model that has one",
    "predict": "the predict loop of a model that has one",
    "export": "backbone.safetensors from a checkpoint",
    "convert": "backbone.safetensors, or a checkpoint, from an official one",
    "preview": "a picture of the views that a config makes",
    "report": "one HTML page about one or several runs, to send to others",
    "doctor": "read a folder of images before training does, and list those to leave out",
    "sweep": "search for hyper-parameters by a wandb sweep file, without a server",
    "data": "optimize: images, or a config's lidar frames, as shards, which disks and networks read faster",
    "methods": "what methods there are",
}

_HELP = """usage: ssl-distill COMMAND [options]

{commands}

Start here:
  ssl-distill fit -c configs/quickstart.yaml
  ssl-distill fit -c configs/dino/folder_cpu.yaml --data.init_args.root DIR
  ssl-distill fit -c CONFIG --ckpt_path last             go on where a run stopped
  ssl-distill validate -c RUN/config.yaml --ckpt_path RUN/last.ckpt

Every argument has one dotted address, such as --model.init_args.num_prototypes 1024 or --trainer.devices 2; a later
config or option overrides an earlier one.
  ssl-distill fit --help                                 trainer, callbacks and what else a run has
  ssl-distill fit --model.help DINO                      arguments of a method; --data.help ImageFolderData likewise
  ssl-distill COMMAND --help                             the other commands

A config names classes, which are imported. `fit` imports any; `validate`, `test`, `predict`, `export` and `convert`
take --trust for such as are not of ssl_distill, torch, timm, lightning, torchvision, torchmetrics or kornia.

--debug, or SSL_DISTILL_DEBUG=1, shows the traceback of an error."""


def main(args: list[str] | None = None) -> int:
    """Run one command; errors that a user can mend are one line.

    Returns:
        Exit code: 0, or 2 after such an error.

    Raises:
        SystemExit: With code 75 on SIGTERM or SIGUSR1, 130 on Ctrl-C; `fit` saves its step before.
    """
    args = sys.argv[1:] if args is None else args
    debug = "--debug" in args or bool(os.environ.get("SSL_DISTILL_DEBUG"))
    args = [each for each in args if each != "--debug"]
    if not args or args[0] in ("-h", "--help", "help"):
        print(_HELP.format(commands="\n".join(f"  {name:<10}{text}" for name, text in _COMMANDS.items())))
        return 0
    if args[0] == "--version":
        print(f"ssl-distill {ssl_distill.__version__}")
        return 0
    try:
        with stopping_now():
            _run(args[0], args[1:])
    except (ValueError, OSError, argparse.ArgumentError) as error:
        if debug:
            raise
        from ssl_distill.commands.explain import one_line

        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _run(command: str, args: list[str]) -> None:
    if command not in _COMMANDS:
        near = difflib.get_close_matches(command, _COMMANDS, n=1)
        raise ValueError(f"there is no command {command!r}; did you mean {near[0] if near else ', '.join(_COMMANDS)}?")
    if command == "methods":
        from ssl_distill.commands.methods import methods_table

        print(methods_table())
    elif command == "export":
        from ssl_distill.commands.export import export

        export(args)
    elif command == "convert":
        from ssl_distill.commands.convert import convert

        convert(args)
    elif command == "preview":
        from ssl_distill.commands.preview import preview

        preview(args)
    elif command == "report":
        from ssl_distill.commands.report import report

        report(args)
    elif command == "sweep":
        from ssl_distill.commands.sweep import sweep

        sweep(args)
    elif command == "doctor":
        from ssl_distill.commands.doctor import doctor

        doctor(args)
    elif command == "data":
        from ssl_distill.commands.data import data

        data(args)
    else:
        from ssl_distill.commands.train import train

        train(command, args)


if __name__ == "__main__":
    sys.exit(main())
