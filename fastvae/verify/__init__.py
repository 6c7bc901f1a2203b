"""How right the ops are: what ``fastvae verify`` runs, and what the tests measure by.

`oracle` is the truth: NumPy in extended precision, independent of torch and of the kernels.
`accuracy` is the policy: what an error may be. `inputs` and `likelihoods` make the inputs.
`checks` holds the ops to all that on the user's machine.
"""
