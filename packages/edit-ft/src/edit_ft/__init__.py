"""Fine-tuning of one matrix: LocFT-BF and FT-M."""
