"""Both training stages. The loop knows steps, checkpoints and when to stop; a stage knows its loss and validation."""
