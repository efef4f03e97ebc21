"""Growing a checkpoint that is larger than memory: `flow` is the pass, the rest is what it stands on."""
