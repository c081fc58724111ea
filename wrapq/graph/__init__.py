"""The structure of a float model: its blocks and layers, which weights share channels, and rewriting it.

The words of this folder, in the order in which they are needed. A *layer* (`LayerInfo`) is a module that counts as one
operation, and its *weight layout* (`WeightLayout`) says which axis of its weight holds the input and which the output
channels. The *channel tracer* (`ChannelTracer`) runs the model once on a few tokens and carries a *channel tag*
(`ChannelTag`) along each activation: which output channel of which layer each element is. A layer whose output channels
reach the weight of another is the *producer*, the other a *consumer*, and a producer with all its consumers is a
*channel edge* (`ChannelEdge`): divide a channel where it is produced, multiply the weights that consume it, and the
model computes the same. That holds only where no other operation sees the channel: what cannot undo the change, such as
a softmax, a sum or the model's output, is *unsafe*, and the tracer marks the channels that it sees. Tensors that blocks
add to form a *residual stream* (`ResidualStream`), which can only be changed as a whole. A *rewriter*
(`GraphRewriter`) changes weights along edges and streams so that the function stays; its *undo log* (`UndoLog`) keeps
what they were, to put everything back when the outputs moved after all.
"""
