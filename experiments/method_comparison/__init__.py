"""Every method on one model, beside published orders."""
