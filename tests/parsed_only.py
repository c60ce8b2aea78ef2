"""Our command line up to where classes would be made, for tests of configs."""

from ssl_distill.commands.train import CommandLine


class ParsedOnly(CommandLine):
    """Parses `fit`; `parse` does it again, without making the parser anew."""

    def before_instantiate_classes(self):
        pass

    def instantiate_classes(self):
        pass

    def after_instantiate_classes(self):
        pass

    def _run_subcommand(self, subcommand):
        pass

    def parse(self, *options):
        self.parse_arguments(self.parser, ["fit", *options])
        return self.section
