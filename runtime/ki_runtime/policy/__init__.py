"""From an observation to actions: `Policy`, `Sampler`, their stages, the witness's proof."""
