"""A gated memory beside a block, as an editor of editcore."""
