"""Fine-tuning of one matrix, as an editor of editcore."""
