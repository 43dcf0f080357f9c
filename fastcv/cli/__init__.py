"""The commands, one file each: ``add_parser(commands)`` describes, ``main(arguments)`` does."""
