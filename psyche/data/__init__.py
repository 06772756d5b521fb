"""The token store: the data of a run, tokenized once, addressed by index, identified by one hash."""
