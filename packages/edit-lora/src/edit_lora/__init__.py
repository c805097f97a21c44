"""The backend ``lora`` for editcore: edits as adapters that standard tools load, stack, serve and take away."""
