"""Scale training to micro-batches, several processes and GPUs, through the hooks of
`cmp.training`."""
