"""From an observation to actions: `Policy`, `Sampler`, their stages, the witness's proof.

Imports: backends; of ki_edge: bundle, files, policy.
"""
