"""lossk under other libraries: each module is imported only when asked for, and each needs an extra of its own.

lossk.interop.devinterp    their samplers, callbacks and Bayesian influence functions, 1.3 and 2  lossk[devinterp]
lossk.interop.sklearn      transformer, affinities, distances, neighbor graphs                   lossk[sklearn]
lossk.interop.arviz        xarray datasets and ArviZ's DataTree                                   lossk[arviz]
lossk.interop.posteriors   any torch sampler's weights to a kernel; SGLD as (init, update)        -
lossk.interop.checkpoints  a kernel per checkpoint (.safetensors: lossk[checkpoints]), Lightning (lossk[lightning]),
                           Hugging Face Trainer (lossk[text])
"""
