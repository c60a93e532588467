"""Forms of deltas that several methods share: dW = B A, dW = B N A, dense dW, W R, factors made again from W, frozen bases."""
