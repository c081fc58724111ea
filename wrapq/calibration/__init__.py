"""Calibration: the walk of the calibration data through the model, block by block, which finalizes its points.

`scheduler.run_blocks` is the loop, which the float pass of transforms and streamed evaluation share. `walker.Walker` is
the walk that calibrates; `finalize.Finalizer` rounds its weights and sets its ranges by the algorithms that
`assignments.Assignments` gives each point.
"""
