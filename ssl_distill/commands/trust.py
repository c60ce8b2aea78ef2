"""Whose classes a config may name."""

_KNOWN = ("ssl_distill", "torch", "timm", "lightning", "torchvision", "torchmetrics", "kornia")
HELP = f"import what the config names besides classes of {', '.join(_KNOWN)}; it may run any code, so read it first"


def import_known_only() -> None:
    """From now on, this process makes only classes and functions of known packages from configs and options.

    That includes where they are defined: one of another package by the name of a module that imports it is refused.
    """
    from jsonargparse import set_parsing_settings  # only now: `convert` answers wrong options without it

    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=list(_KNOWN),
        # Where anything may stand, as in `backbone_kwargs`, it would make any class of theirs, such as torch's that
        # starts a program.
        instantiate_subclass_spec_in_any=False,
    )


def take_trust(options: list[str]) -> list[str]:
    """Options without `--trust`; where it is not among them, only what is known is imported."""
    if "--trust" not in options:
        import_known_only()
    return [option for option in options if option != "--trust"]


def refusal(path: str) -> str:
    """Why a class was not imported, and what to do."""
    return (
        f"{path} is not of {', '.join(_KNOWN)}, and whoever wrote the config might run any code by it; read it, then"
        " give --trust."
    )
