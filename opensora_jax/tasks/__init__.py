"""One kind of training each: init, loss and eval_step as pure functions."""
