"""One file per defense; each is a stage of the server's pipeline (see ``fedsim.defense``)."""

__fedsim__ = "fedsim-backdoor"
