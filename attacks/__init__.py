"""One file per attack; each is what a malicious client does (see ``fedsim.attack``)."""

__fedsim__ = "fedsim-backdoor"
